"""What page 06 says is inside a file that is called Q4_K_M."""

from __future__ import annotations

from types import SimpleNamespace

from lib.report import quantize_page


def file(name: str, size: int, *parts: tuple[str, int, int]) -> SimpleNamespace:
    histogram = [{"type": kind, "bytes": stored, "weights": weights} for kind, stored, weights in parts]
    values = {"type": name, "bytes": size, "histogram": histogram, "token_embedding_type": "Q6_K"}
    return SimpleNamespace(**values, bits_per_weight=4.87)


NOTHING = SimpleNamespace(made=[], skipped=[])
MIXED = file("Q4_K_M", 5_000_000, ("F32", 100, 25), ("Q4_K", 600, 1000), ("Q6_K", 300, 400))


def learned(*files: SimpleNamespace) -> str:
    words = quantize_page.learned(SimpleNamespace(files=list(files)), NOTHING).data
    return " ".join(words.replace("\u00a0", " ").split())


def test_the_two_largest_parts_of_a_mixed_file_are_named_with_their_bits() -> None:
    told = learned(file("Q8_0", 9_000_000, ("Q8_0", 10, 10)), MIXED)
    assert "Q4_K_M holds 4.87 bits a weight, not 4:" in told
    assert "60 % of its bytes are Q4_K (4.80 bits), 30 % of its bytes are Q6_K (6.00 bits);" in told
    assert "the token embedding is Q6_K." in told and "F32" not in told
    assert "from 9.00 MB down to 5.00 MB (Q4_K_M)" in told


def test_without_it_another_recipe_is_told_of_and_number_formats_are_none() -> None:
    assert "Q5_K_M holds" in learned(file("F16", 9, ("F16", 4, 2)), file("Q5_K_M", 5, ("Q5_K", 6, 8)))
    assert "holds" not in learned(file("F16", 9_000_000, ("F16", 4, 2)))
