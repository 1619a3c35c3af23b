"""What quantizing refuses, before it touches anything."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.errors import InputError
from lib.runs.files import sha256_file
from lib.stages.quantize import calibration, files, llama_library, quantizer, size_budget, type_costs
from lib.stages.quantize.files import Options, predict_sizes
from tests import tiny_gguf


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("source") / "tiny-F16.gguf")


def test_report_of_one_file(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "空 格" / "tiny-Q4_K_M.gguf"
    report = tiny_gguf.quantize_file(source, output, "Q4_K_M")
    assert report.bytes == report.predicted_bytes == output.stat().st_size
    assert report.type == "Q4_K_M" and report.file == output.name and report.token_embedding_type == "q6_K"
    assert sum(row["bytes"] for row in report.histogram) == report.tensor_bytes
    assert sum(row["share"] for row in report.histogram) == pytest.approx(1)
    assert [row["type"] for row in report.histogram] == ["q4_K", "q6_K", "f32"]
    assert report.peak_memory_mib > 10 and report.seconds > 0
    assert [p.name for p in output.parent.iterdir()] == [output.name]
    description = quantizer.describe(llama_library.read_header(output))
    assert description["type"] == "Q4_K_M" and description["bits_per_weight"] == report.bits_per_weight
    with pytest.raises(InputError, match=r"already quantized .Q4_K_M.*outtype: f16"):
        tiny_gguf.quantize_file(output, tmp_path / "again.gguf", "Q2_K")


@pytest.mark.parametrize("name", ["Q4_K", "q4_k_m", "Q9_0", "", "NVFP4"])
def test_unknown_type(source: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="unknown quantization type"):
        tiny_gguf.quantize_file(source, tmp_path / "out.gguf", name)


def test_close_match_of_an_unknown_type() -> None:
    with pytest.raises(InputError, match="write Q4_K_M"):
        files.file_type("q4_k_m")


def test_output_that_is_the_source(source: Path, tmp_path: Path) -> None:
    before = sha256_file(source)
    hard, soft = tmp_path / "hard.gguf", tmp_path / "soft.gguf"
    os.link(source, hard)
    soft.symlink_to(source)
    for output in (source, hard, soft, source.parent / "." / source.name):
        with pytest.raises(InputError, match=r"the source file itself|symbolic link"):
            tiny_gguf.quantize_file(source, output, "Q8_0")
    assert sha256_file(source) == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (bytes(4096), "zeros"),
        (b"PK\x03\x04" + bytes(64), "pickle"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, "a whole GGUF file"),
    ],
)
def test_source_that_is_no_gguf(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        tiny_gguf.quantize_file(path, tmp_path / "out.gguf", "Q8_0")
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_missing_source_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        predict_sizes(tmp_path / "none.gguf", ["Q8_0"])
    with pytest.raises(InputError, match="is a folder"):
        predict_sizes(tmp_path, ["Q8_0"])


def test_truncated_source(source: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(source.read_bytes()[:-4096])
    with pytest.raises(InputError, match="header describes"):
        tiny_gguf.quantize_file(cut, tmp_path / "out.gguf", "Q8_0")


def test_source_with_nan_leaves_nothing(tmp_path: Path) -> None:
    weights = tiny_gguf.tensors(256, 2, 1, 259, 512, 128)
    weights["blk.1.ffn_up.weight"][3, 7] = np.nan
    source = tiny_gguf.write(tmp_path / "nan-F16.gguf", weights=weights)
    with pytest.raises(InputError, match="cannot quantize"):
        tiny_gguf.quantize_file(source, tmp_path / "out.gguf", "Q8_0")
    assert [p.name for p in tmp_path.iterdir()] == ["nan-F16.gguf"]


def test_full_disk_is_refused_before_the_work(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="MB free"):
        tiny_gguf.quantize_file(source, tmp_path / "out.gguf", "Q8_0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["blk.0.attn_norm.weight", "output_norm.weight", "blk.1.attn_q.bias"])
def test_vectors_that_llama_cpp_does_not_compute_with(tmp_path: Path, name: str) -> None:
    source = tiny_gguf.write(tmp_path / "half-F16.gguf", half=(name,))
    with pytest.raises(InputError, match=f"{name} of type f16"):
        tiny_gguf.quantize_file(source, tmp_path / "out.gguf", "Q8_0")
    with pytest.raises(InputError, match=f"{name} of type f16"):
        predict_sizes(source, ["Q8_0"])
    assert [p.name for p in tmp_path.iterdir()] == ["half-F16.gguf"]


def test_importance_matrix_is_needed(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="IQ2_XXS without an importance matrix"):
        tiny_gguf.quantize_file(source, tmp_path / "out.gguf", "IQ2_XXS")


def test_importance_matrix_of_another_model(source: Path, tmp_path: Path) -> None:
    matrix = tiny_gguf.write_imatrix(tmp_path / "imatrix.gguf", width=896)
    with pytest.raises(InputError, match=r"has 896 values for .*256"):
        predict_sizes(source, ["Q4_K_M"], Options(matrix))
    argument = {
        "source": str(source),
        "imatrix": str(matrix),
        "folder": str(tmp_path),
        "scales": {},
        "n_threads": 1,
        "options": vars(Options(matrix)),
    }
    for work in (size_budget.least_in_child, type_costs.measure):
        with pytest.raises(InputError, match=r"has 896 values for .*256"):
            work(argument)


def test_importance_beyond_the_rows_is_never_read() -> None:
    with pytest.raises(ValueError, match="rows of 256 weights"):
        llama_library.quantize_rows("q4_K", np.ones((2, 256), np.float32), np.ones(128, np.float32))


def test_importance_matrix_values(tmp_path: Path) -> None:
    """Both formats hold the same means: sums / calls."""
    new = llama_library.read_imatrix(tiny_gguf.write_imatrix(tmp_path / "a.gguf"))
    old = llama_library.read_imatrix(tiny_gguf.write_imatrix(tmp_path / "a.dat", legacy=True))
    assert new.values.keys() == old.values.keys() and len(new.values) == 14
    for name, values in new.values.items():
        np.testing.assert_array_equal(values, old.values[name])
    assert (new.dataset, new.chunks) == (old.dataset, old.chunks) == ("calibration.txt", 4)


BROKEN = {
    "negative": ({"a": np.array([1.0, -2.0])}, 777, "a holds negative values"),
    "zeros": ({"a": np.ones(2), "b": np.zeros(2)}, 777, "b holds nothing but zeros"),
    "no count": ({"a": np.ones(2)}, float("nan"), "a has counts that are no numbers"),
    "endless count": ({"a": np.ones(2)}, float("inf"), "a has counts that are no numbers"),
    "negative count": ({"a": np.ones(2)}, -2, "a has counts that are no numbers"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_importance_matrix_that_no_text_gives(case: str, tmp_path: Path) -> None:
    sums, count, words = BROKEN[case]
    path = tmp_path / "a.gguf"
    calibration.write_imatrix(path, sums, 777, "text", 1)
    data, written = path.read_bytes(), np.float32(777).tobytes()
    assert data.count(written) == len(sums)
    path.write_bytes(data.replace(written, np.float32(count).tobytes()))
    with pytest.raises(InputError, match=words):
        llama_library.read_imatrix(path)


def test_importance_matrix_with_nan(tmp_path: Path) -> None:
    path = tiny_gguf.write_imatrix(tmp_path / "a.dat", legacy=True)
    data = bytearray(path.read_bytes())
    start = 4 + 4 + int.from_bytes(data[4:8], "little") + 8
    data[start : start + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    with pytest.raises(InputError, match="not finite"):
        llama_library.read_imatrix(path)


@given(st.binary(max_size=300))
def test_any_bytes_as_an_importance_matrix(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.dat"
    path.write_bytes(content)
    try:
        llama_library.read_imatrix(path)
    except InputError:
        return
    assert len(content) > 12


def test_a_file_that_kills_llama_cpp(source: Path, tmp_path: Path) -> None:
    """No layers: llama.cpp aborts its process; here only the child dies, and nothing is left behind."""
    bad = tiny_gguf.with_number(source, tmp_path / "bad-F16.gguf", "qwen2.block_count", 0)
    planned = files.PlannedFile({"type": "Q8_0", "bytes": 1_000_000, "set_by_hand": []}, Options())
    with pytest.raises(InputError, match="SIGABRT"):
        files.quantize_planned(bad, tmp_path / "out.gguf", planned, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["bad-F16.gguf"]


REFUSED_OPTIONS = {
    "no type": (256, "Q4_K_M", {"tensor_types": ("attn_v",)}, "REGEX=TYPE"),
    "no expression": (256, "Q4_K_M", {"tensor_types": ("=q8_0",)}, "REGEX=TYPE"),
    "a recipe": (256, "Q4_K_M", {"tensor_types": ("attn_v=Q4_K_M",)}, "unknown tensor type 'Q4_K_M'.*q4_K"),
    "unknown embedding type": (256, "Q4_K_M", {"token_embedding_type": "q9"}, "unknown tensor type 'q9'"),
    "capital letters": (256, "Q4_K_M", {"tensor_types": (r"attn\D=q8_0",)}, "capital letters"),
    "no regular expression": (
        256,
        "Q4_K_M",
        {"tensor_types": ("attn_(=q8_0",)},
        r"refuses 'attn_\('.*regular expression",
    ),
    "fits nothing": (256, "Q4_K_M", {"tensor_types": ("attn_x=q8_0",)}, "'attn_x' of tensor_types chooses no tensor"),
    "fits a norm only": (256, "Q4_K_M", {"tensor_types": ("attn_norm=q8_0",)}, "chooses no tensor.*norms"),
    "fits nothing that is left": (
        256,
        "Q4_K_M",
        {"tensor_types": ("blk=q4_0", "attn_v=q5_0")},
        "'attn_v' of tensor_types chooses no tensor",
    ),
    "embedding is set already": (
        256,
        "Q4_K_M",
        {"tensor_types": ("token_embd=q4_0",), "token_embedding_type": "q6_K"},
        "'token_embd' of tensor_types chooses no tensor",
    ),
    "tied output is set already": (
        256,
        "Q4_K_M",
        {"output_tensor_type": "q8_0", "token_embedding_type": "q6_K"},
        "output_tensor_type q8_0 has no effect: token_embd.weight becomes q6_K",
    ),
    "rows that do not fill blocks": (896, "Q4_K_M", {"token_embedding_type": "q4_K"}, "rows of 896.*blocks of q4_K"),
    "full weights": (256, "BF16", {"tensor_types": ("attn_v=q8_0",)}, "tensor_types with BF16"),
    "embedding without importance": (256, "Q8_0", {"token_embedding_type": "iq2_xs"}, "without importance values"),
    "layer without importance": (
        256,
        "Q4_K_M",
        {"tensor_types": ("attn_v=iq2_xs",)},
        r"Found: blk\.0\.attn_v\.weight as iq2_xs without an importance matrix\. .* another type for that tensor",
    ),
}


@pytest.mark.parametrize("case", REFUSED_OPTIONS)
def test_options_that_do_not_fit(case: str, tmp_path: Path) -> None:
    width, name, options, words = REFUSED_OPTIONS[case]
    source = tiny_gguf.write(tmp_path / "tiny-F16.gguf", width=width, layers=1)
    with pytest.raises(InputError, match=words):
        tiny_gguf.quantize_file(source, tmp_path / "out.gguf", name, Options(**options))
    assert [p.name for p in tmp_path.iterdir()] == ["tiny-F16.gguf"]


def test_what_options_changed_is_reported(source: Path, tmp_path: Path) -> None:
    options = Options(tensor_types=(r"blk\.0\.attn_v=Q8_0",), token_embedding_type="q5_0")
    report = tiny_gguf.quantize_file(source, tmp_path / "out.gguf", "Q4_0", options)
    assert sorted(report.set_by_hand, key=lambda row: row["tensor"]) == [
        {"tensor": "blk.0.attn_v.weight", "recipe": "q4_0", "type": "q8_0"},
        {"tensor": "token_embd.weight", "recipe": "q6_K", "type": "q5_0"},
    ]
    assert report.token_embedding_type == "q5_0"
    assert {row["type"]: row["tensors"] for row in report.histogram}["q8_0"] == 1


def test_a_tied_output_that_falls_back_is_said(tmp_path: Path) -> None:
    source = tiny_gguf.write(tmp_path / "tiny-F16.gguf", width=896, layers=1)
    (row,) = predict_sizes(source, ["Q8_0"], Options(output_tensor_type="q6_K"))
    assert row["fallbacks"] == [{"tensor": "token_embd.weight", "columns": 896, "wanted": "q6_K", "type": "q8_0"}]
