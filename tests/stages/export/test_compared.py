"""Export folders beside GGUF files of the same model: one scorer, one table, advice about GGUF files only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lib.errors import InputError
from lib.models.loading import count_weights, load_as_saved, weight_bytes
from lib.scoring.log_probabilities import Scores, score_rows
from lib.scoring.metric import ACCURACY
from lib.scoring.torch_backend import TransformersBackend
from lib.stages.compare import child
from lib.stages.compare.files import Comparison, compare_files
from lib.stages.compare.recommend import recommend
from lib.stages.convert.convert import convert
from lib.stages.evaluate import standalone
from lib.stages.evaluate.standalone import evaluate_models
from tests import tiny_gguf, tiny_run

pytestmark = pytest.mark.usefixtures("unmeasured_children", "forked_children")

ROWS = tiny_run.rows(30, "test", 3)


@pytest.fixture(scope="module")
def compared(
    exported: Callable[[str], tuple[Path, dict]], base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict, Path, Path]:
    """comparison.json, its folder, and the reference file."""
    folder = tmp_path_factory.mktemp("compared")
    convert(base, folder / "m-F16.gguf", "f16")
    tiny_gguf.quantize_file(folder / "m-F16.gguf", folder / "m-Q8_0.gguf", "Q8_0")
    others = [folder / "m-Q8_0.gguf", exported("bf16")[0], exported("nf4")[0]]
    reference = folder / "m-F16.gguf"
    asked = Comparison(reference, others, ROWS, tiny_run.TASK, folder / "out", n_ctx=128, n_threads=1, merged=base)
    return compare_files(asked), folder / "out", reference


def test_one_table(compared: tuple[dict, Path, Path], exported: Callable) -> None:
    result, output, _ = compared
    entries = {entry["type"]: entry for entry in result["files"]}
    assert list(entries) == ["F16", "Q8_0", "bf16", "nf4"]
    assert [entry["kind"] for entry in entries.values()] == ["gguf", "gguf", "folder", "folder"]
    assert all(entry.keys() == entries["F16"].keys() for entry in entries.values())
    bf16, nf4 = entries["bf16"], entries["nf4"]
    folder = exported("nf4")[0]
    assert nf4["bytes"] == weight_bytes(folder) and bf16["bits_per_weight"] == 16
    assert entries["F16"]["bits_per_weight"] == pytest.approx(16, rel=0.02)  # the same count of weights
    assert nf4["bits_per_weight"] == 8 * exported("nf4")[1]["tensor_bytes"] / count_weights(folder)
    assert abs(bf16["kld_mean"]) < 2e-3 < nf4["kld_mean"] and bf16["same_top"] > 0.97
    assert bf16["ppl"] == pytest.approx(entries["F16"]["ppl"], rel=0.01)
    for entry in (bf16, nf4):
        for kind in ("prompt", "generation"):
            low, high = entry[f"{kind}_tokens_per_second_range"]
            assert 0 < low <= entry[f"{kind}_tokens_per_second"] <= high
        assert entry["load_seconds"] > 0 and entry["peak_memory_mib"] > entries["F16"]["peak_memory_mib"]
        assert entry["p_holm"] is not None and entry["verdict"] and entry["n"] == 30
    assert (output / "scores-nf4.jsonl").is_file()


def test_scores_are_those_of_the_one_scorer(compared: tuple[dict, Path, Path], exported: Callable) -> None:
    from lib.models.loading import load_tokenizer

    folder, _ = exported("bf16")
    backend = TransformersBackend(load_as_saved(folder))
    own = score_rows(backend, load_tokenizer(folder), tiny_run.TASK, ROWS, "test")
    saved = Scores.load(compared[1] / "scores-bf16.jsonl")
    assert saved.ids == own.ids
    np.testing.assert_allclose(saved.log_probs, own.log_probs, atol=0.05)


def test_labels_of_the_merged_model_in_transformers(compared: tuple[dict, Path, Path], base: Path) -> None:
    """Against scores made here: the same model in transformers and as F16 in llama.cpp, by margin."""
    from lib.models.loading import load_tokenizer

    merged = score_rows(TransformersBackend(load_as_saved(base)), load_tokenizer(base), tiny_run.TASK, ROWS, "test")
    pairs = {(pair["first"], pair["second"]): pair for pair in compared[0]["agreement"]}
    title = f"merged, transformers ({str(load_as_saved(base).dtype).removeprefix('torch.')})"
    assert list(pairs) == [
        *((title, n) for n in ("F16", "Q8_0", "bf16", "nf4")),
        *(("F16", n) for n in ("Q8_0", "bf16", "nf4")),
    ]
    f16 = Scores.load(compared[1] / "scores-F16.jsonl")
    pair = pairs[title, "F16"]
    assert pair["near_ties"] == int((abs(merged.margins) < 0.1).sum())
    *bins, whole = pair["bins"]
    assert whole["n"] == 30 == sum(part["n"] for part in bins)
    assert whole["agree"] == int((merged.predictions == f16.predictions).sum()) == sum(part["agree"] for part in bins)
    assert all(part["agree"] == part["n"] for part in bins[2:]), "F16 flips no row with a margin above 0.5 nats"


def test_the_merged_model_in_32_bit_arithmetic(tmp_path: Path) -> None:
    """A bfloat16 folder: the scores of its weights in float32, not those of 16-bit arithmetic."""
    from lib.models.loading import load_model, load_tokenizer

    folder = tmp_path / "bf16"
    tiny_run.make_base(folder, "bfloat16")
    tokenizer, rows = load_tokenizer(folder), ROWS[:8]
    given = child.encode_rows(tokenizer, tiny_run.TASK, rows, 64, 512).argument(1, 0)
    given |= {"path": str(folder), "keep": str(tmp_path / "keep.jsonl")}
    answer = child.score_as(child.MERGED_FLOAT32, given)
    own = score_rows(
        TransformersBackend(load_model(folder, "float32", device="cpu")), tokenizer, tiny_run.TASK, rows, "t"
    )
    order = np.argsort([row["id"] for row in rows], kind="stable")
    np.testing.assert_allclose(answer["log_probs"], own.log_probs[order], atol=1e-4)
    rough = child.score_as(child.MERGED, given)
    assert (answer["dtype"], rough["dtype"]) == ("float32", "bfloat16")
    assert np.abs(np.array(rough["log_probs"]) - answer["log_probs"]).max() > 1e-3


def test_weights_of_the_file_computed_by_transformers(compared: tuple[dict, Path, Path], base: Path) -> None:
    """Against gguf's own dequantization put into the model by hand: the step between weights and llama.cpp."""
    import torch
    from gguf import GGUFReader, dequantize
    from transformers import AutoModelForCausalLM

    from lib.models.loading import load_tokenizer

    result, output, reference = compared
    assert result["steps"]["file"] == "Q8_0" and result["steps"]["merged"].startswith("merged, transformers")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tensors = {t.name: t for t in GGUFReader(reference.with_name("m-Q8_0.gguf")).tensors}
    part = tensors["blk.0.ffn_down.weight"]
    weight = model.model.layers[0].mlp.down_proj.weight
    rounded = torch.from_numpy(dequantize(part.data, part.tensor_type))
    assert 0 < (weight - rounded).abs().max() < 0.01 * weight.abs().max()
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            for kind, name in names.items():
                stored = tensors[f"blk.{i}.{name}.weight"]
                linear = getattr(layer.mlp if "ffn" in name else layer.self_attn, kind)
                linear.weight.copy_(torch.from_numpy(dequantize(stored.data, stored.tensor_type)))
        table = tensors["token_embd.weight"]
        model.model.embed_tokens.weight.copy_(torch.from_numpy(dequantize(table.data, table.tensor_type)))
        if "output.weight" in tensors:
            head = tensors["output.weight"]
            model.lm_head.weight.copy_(torch.from_numpy(dequantize(head.data, head.tensor_type)))
    own = score_rows(TransformersBackend(model.eval()), load_tokenizer(base), tiny_run.TASK, ROWS, "test")
    saved = Scores.load(output / "scores-dequantized.jsonl")
    np.testing.assert_allclose(saved.log_probs, own.log_probs, atol=1e-4)
    in_llama = Scores.load(output / "scores-Q8_0.jsonl")
    assert 0 < np.abs(saved.log_probs - in_llama.log_probs).max() < 0.2
    assert (output / "scores-merged.jsonl").is_file()


def test_advice_and_frontier_are_about_gguf_files(compared: tuple[dict, Path, Path]) -> None:
    result = compared[0]
    assert result["frontier"] == ["Q8_0"] and "GGUF" in result["recommendation"]["rule"]
    said = " ".join(result["recommendation"][part] for part in ("headline", "text"))
    assert "nf4" not in said and "bf16" not in said
    only = recommend(ACCURACY, result["files"][0], [], 1.0, None)
    assert only["type"] is None and "no smaller GGUF file was compared with F16" in only["headline"]


def test_evaluate_takes_the_folders(exported: Callable, compared: tuple[dict, Path, Path]) -> None:
    folder, _ = exported("nf4")
    (model,) = evaluate_models([folder], ROWS, tiny_run.TASK)["models"]
    entry = next(entry for entry in compared[0]["files"] if entry["type"] == "nf4")
    assert model["accuracy"] == entry["accuracy"] and model["n"] == 30
    argument = {"model": str(folder), "path": str(folder), "adapter": None, "load_in_4bit": True}
    with pytest.raises(InputError, match="quantized already"):
        standalone.open_model(argument, 64)


def test_a_folder_with_another_tokenizer(base: Path, tmp_path: Path) -> None:
    from lib.models.loading import load_tokenizer
    from lib.models.offline_base import TokenizerRecipe, train_tokenizer

    text = ROWS[0]["text"]
    sample = {"text": text, "ids": load_tokenizer(base)(text, add_special_tokens=False)["input_ids"]}
    child._check_tokenizer(base, sample)
    train_tokenizer(["完全不同的文字 abc def"] * 20, ["好", "坏"], tmp_path, TokenizerRecipe(vocabulary=300))
    with pytest.raises(InputError, match="other token ids"):
        child._check_tokenizer(tmp_path, sample)


def test_a_folder_is_no_reference_and_an_empty_one_is_refused(
    compared: tuple[dict, Path, Path], base: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"a \.gguf file"):
        compare_files(Comparison(base, [compared[2]], ROWS, tiny_run.TASK, tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"config\.json"):
        compare_files(Comparison(compared[2], [tmp_path / "empty"], ROWS, tiny_run.TASK, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
