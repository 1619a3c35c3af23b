"""The importance matrix of a run: llama.cpp's own numbers, held-out rows left out, said in every file made with it."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

from lib.errors import InputError
from lib.models.loading import load_tokenizer
from lib.prompts.tasks import read_task
from lib.report import quantize_page
from lib.runs.files import read_jsonl, sha256_json, write_json
from lib.runs.machine import llama_cpp_problem
from lib.runs.run import ProductDraft, Run
from lib.scoring.measure import Text
from lib.settings import TENSOR_TYPES, Settings
from lib.stages.convert.convert import convert
from lib.stages.quantize import calibration
from lib.stages.quantize.calibration import importance_matrix, run_options
from lib.stages.quantize.files import Options, QuantizeResult, predict_sizes
from lib.stages.quantize.held_out_kl import Comparison, compared_with_matrix, judge, retyped
from lib.stages.quantize.llama_library import read_imatrix
from lib.stages.quantize.stage import imatrix_effect, quantize
from tests import tiny_gguf, tiny_run
from tests.models.test_language_model import TEXT

pytestmark = [
    pytest.mark.skipif(llama_cpp_problem() is not None, reason="llama-cpp-python does not work here"),
    pytest.mark.usefixtures("forked_children"),
]
LAYERS = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}


def settings(**changes: Any) -> Settings:
    return Settings(
        **{"run_name": "tiny", "imatrix": "auto", "n_ctx": 64, "n_threads": 1, "ladder": ["Q4_0"], **changes}
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imatrix") / "base"
    tiny_run.make_base(folder)
    return folder


@pytest.fixture
def run(base: Path, home: Path) -> Run:
    """A run whose merged model is its base."""
    run = tiny_run.make_run(base)
    run.produce("merged", lambda work: shutil.copytree(base, work.folder, dirs_exist_ok=True) and None, {})
    run.produce("gguf", lambda work: convert(base, work.folder / "tiny-F32.gguf", "f32") and None, {})
    return run


def test_the_numbers_are_those_of_llama_cpp(run: Run) -> None:
    """llama-imatrix's definition on llama.cpp's own activations, weights and cache in 32 bits: within 1e-4 of each."""
    from tests.stages.quantize.llama_inputs import sums_of_squares

    made = importance_matrix(settings(), run)
    chosen = calibration.row_windows(run.folder / "data", "train", 64, Settings().imatrix_chunks, 42)
    sums, counts = sums_of_squares(run.folder / "gguf" / "tiny-F32.gguf", chosen.windows)
    ours = read_imatrix(made.path)
    assert set(ours.values) == set(sums) == {f"blk.{i}.{layer}.weight" for i in range(2) for layer in LAYERS}
    assert set(counts.values()) == {made.record["tokens"]} == {64 * len(chosen.windows)}
    for name, values in ours.values.items():
        assert values == pytest.approx(sums[name] / counts[name], rel=1e-4), name
    assert ours.chunks == made.record["windows"] == len(chosen.windows) > 5


def test_the_file_has_llama_imatrixs_form(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    calibration.write_imatrix(path, {"b": np.array([4.0, 8.0]), "a": np.array([1.0])}, 128, "train.jsonl", 64)
    reader = gguf.GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert values == {
        "general.type": "imatrix",
        "imatrix.datasets": ["train.jsonl"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 64,
    }
    assert [(t.name, t.shape.tolist(), t.tensor_type.name) for t in reader.tensors] == [
        *(("a.in_sum2", [1, 1], "F32"), ("a.counts", [1, 1], "F32")),
        *(("b.in_sum2", [2, 1], "F32"), ("b.counts", [1, 1], "F32")),
    ]
    assert read_imatrix(path).values["b"].tolist() == [4 / 128, 8 / 128]


def test_held_out_rows_are_left_out_and_that_is_recorded(run: Run) -> None:
    data = run.folder / "data"
    train, test = read_jsonl(data / "train.jsonl"), read_jsonl(data / "test.jsonl")
    changed = [dict(row) for row in train]
    changed[3]["text"], changed[3]["label"] = test[5]["text"], 1 - test[5]["label"]
    for i, row in enumerate(changed):
        row["group"] = 1000 + i
    changed[7]["group"] = test[2]["group"]

    def build(work: Any) -> None:
        shutil.copytree(data, work.folder, dirs_exist_ok=True)
        (work.folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed), encoding="utf-8")
        work.facts |= run.manifest.entries()["data"].facts

    run.produce("data", build, {"changed": 1})
    made = calibration.row_windows(data, "train", 64, 1000, 42)
    used = made.used
    assert made.facts["left_out"] == {"text of a held-out row": 1, "nearly the text of a held-out row": 1}
    assert not {"train-00003", "train-00007"} & {row["id"] for row in used} and len(used) >= 20
    held_out = {
        sha256_json([row["text"]]) for name in ("validation", "test") for row in read_jsonl(data / f"{name}.jsonl")
    }
    assert len(held_out) == made.facts["held_out_rows"] == 32 and made.facts["shared_with_held_out"] == 0
    by_id = {row["id"]: row for row in changed}
    for row in used:
        assert row["sha256"] == sha256_json([by_id[row["id"]]["text"]]) and row["sha256"] not in held_out
    assert made.facts["rows_sha256"] == sha256_json([row["sha256"] for row in used])


def test_windows_are_rows_as_training_sees_them(run: Run) -> None:
    from lib.models.loading import load_tokenizer

    data = run.folder / "data"
    few, many = (calibration.row_windows(data, "train", 64, most, 42) for most in (2, 1000))
    assert few.windows == many.windows[:2] and all(len(window) == 64 for window in many.windows)
    assert len(few.used) < len(many.used) and few.used == many.used[: len(few.used)]
    tokenizer, rows = load_tokenizer(data / "tokenizer"), {r["id"]: r for r in read_jsonl(data / "train.jsonl")}
    task, ids = read_task(data), [token for window in many.windows for token in window]
    for row in (rows[used["id"]] for used in many.used[:5]):
        turns = task.messages(row)
        assert turns[-1] == {"role": "assistant", "content": task.label_names[row["label"]]}
        text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
        wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = len(wanted) <= task.max_seq_length  # a longer text is cut at its end, as in training
        same = len(wanted) if whole else 60
        assert ids[:same] == wanted[:same]
        ids = ids[min(len(wanted), task.max_seq_length) :]
    assert calibration.row_windows(data, "train", 64, 2, 43).windows != few.windows
    with pytest.raises(InputError, match="do not fill a window of 32768 tokens"):
        calibration.row_windows(data, "train", 32768, 2, 42)


def test_the_ladder_is_made_with_it_and_says_so(run: Run) -> None:
    result = quantize(settings(ladder=["Q4_0", "IQ3_XXS"]), run)
    assert [file.imatrix for file in result.files] == ["imatrix.gguf"] * 2
    made = importance_matrix(settings(), run)
    assert made.product.made is False and {"n_ctx", "seed"} <= made.product.entry.parameters.keys()
    record, rows = made.record, read_jsonl(made.product.path / "rows.jsonl")
    assert record["rows_sha256"] == sha256_json([row["sha256"] for row in rows]) and record["shared_with_held_out"] == 0
    for file in result.files:
        reader = gguf.GGUFReader(result.product.path / file.file)
        found = {key: field.contents() for key, field in reader.fields.items() if key.startswith("quantize.imatrix")}
        assert found == {
            "quantize.imatrix.file": "imatrix.gguf",
            "quantize.imatrix.dataset": record["dataset"][:127],
            "quantize.imatrix.entries_count": 14,
            "quantize.imatrix.chunks_count": record["windows"],
        }
    plain = quantize(settings(ladder=["Q4_0"], imatrix="none"), run)
    assert plain.files[0].imatrix is None and plain.product.made
    assert (
        importance_matrix(settings(imatrix="none"), run) is None
        and importance_matrix(settings(imatrix=""), run) is None
    )


def test_force_measures_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """`measure` again; the steps that use the matrix take what it has made."""
    made: list[str] = []

    def build(settings: Settings, run: Run, work: ProductDraft) -> dict[str, Any]:
        made.append("once more")
        calibration.write_imatrix(work.folder / "imatrix.gguf", {"blk.0.attn_q.weight": np.ones(64)}, 64, "text", 64)
        return {}

    monkeypatch.setattr(calibration, "_build", build)
    forced = settings(force=True)
    for _ in range(2):
        importance_matrix(forced, run)
    assert len(made) == 2
    assert run_options(forced, run).imatrix == run.folder / "imatrix" / "imatrix.gguf"
    assert len(made) == 2
    importance_matrix(settings(), run)
    assert len(made) == 2


def test_a_text_needs_no_chat_template(base: Path, tmp_path: Path) -> None:
    """Of `workbook imatrix`, and of a budget by --text: a base model without instruction tuning has none."""
    plain, file = Path(shutil.copytree(base, tmp_path / "plain")), tmp_path / "text.txt"
    (plain / "chat_template.jinja").unlink()
    file.write_text("房间很干净。" * 40, encoding="utf-8")
    text = Text.of_file(file.read_text(encoding="utf-8"))
    same = calibration.text_windows(plain, text, file, 16, 4)
    assert same == calibration.text_windows(base, text, file, 16, 4) and len(same.windows) == 4
    with pytest.raises(InputError, match="no chat template"):
        load_tokenizer(plain)


def test_iq_types_need_one() -> None:
    assert Settings(ladder=["IQ2_XS"], imatrix="auto").imatrix == "auto"
    for nothing in ("", "none"):
        with pytest.raises(ValueError, match="set imatrix: auto"):
            Settings(ladder=["IQ2_XS"], imatrix=nothing)


def test_an_unknown_architecture_is_refused() -> None:
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(vocab_size=64, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(InputError, match=r"layer .* of a opt model, whose name in GGUF is not known"):
        calibration.gguf_layers(OPTForCausalLM(config))


def test_layers_with_a_state_have_names_unless_their_columns_move() -> None:
    """GGUF has the columns of `out_proj` in another order where keys and values have different numbers of heads."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    sizes = {key: value for key, value in TEXT.items() if key != "mtp_num_hidden_layers"}
    names = set(calibration.gguf_layers(Qwen3_5ForCausalLM(Qwen3_5TextConfig(**sizes))))
    assert {"blk.0.ssm_out.weight", "blk.0.attn_qkv.weight", "blk.3.attn_output.weight"} <= names
    other = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**sizes | {"linear_num_value_heads": 4}))
    with pytest.raises(InputError, match=r"linear_attn\.out_proj"):
        calibration.gguf_layers(other)


def test_the_effect_is_measured_against_the_same_types_without(run: Run) -> None:
    """The pairs differ in the matrix alone, and the numbers are those of `workbook perplexity`'s scorer."""
    wanted = settings(ladder=["Q8_0", "Q4_K_M", "Q4_0"], perplexity_tokens=512)
    result = quantize(wanted, run)
    found = imatrix_effect(wanted, run, result).content
    assert [entry["type"] for entry in found["types"]] == ["Q4_K_M", "Q4_0"], "Q8_0 uses no matrix"
    assert found["windows"] == 8 and found["tokens"] == 8 * 31 and 2 <= found["rows"] <= 16
    entry = found["types"][1]
    plain, folder = (
        tiny_gguf.quantize_file(run.folder / "gguf" / "tiny-F32.gguf", run.folder / "plain.gguf", "Q4_0"),
        run.folder,
    )
    assert plain.bytes == entry["bytes_without"] and plain.imatrix is None
    windows = calibration.row_windows(folder / "data", "test", 64, 8, 42).windows
    table = kl_between(folder / "gguf" / "tiny-F32.gguf", folder / "plain.gguf", windows)
    assert entry["kld_without"] == pytest.approx(table["kld_mean"], rel=1e-6)
    table = kl_between(folder / "gguf" / "tiny-F32.gguf", result.product.path / result.files[2].file, windows)
    assert entry["kld_with"] == pytest.approx(table["kld_mean"], rel=1e-6)
    assert entry["difference"] == pytest.approx(entry["kld_with"] - entry["kld_without"])
    assert imatrix_effect(settings(imatrix="none"), run, result) is None
    shown, reading = quantize_page.effect(Comparison(result.product, found))
    assert "Q4_0" in shown.data and "Q4_0 with the matrix is" in reading.data
    assert found["left_out"] == [] and [entry["retyped"] for entry in found["types"]] == [[], []]
    assert "all tensors of equal types" in reading.data
    assert "0 of 32, by hash" in quantize_page.imatrix_card(importance_matrix(wanted, run)).data


def test_types_that_need_the_matrix_are_left_out_and_said(run: Run) -> None:
    wide = tiny_gguf.write(run.folder / "wide-F16.gguf")

    def reports(tensor: str, kind: str) -> tuple[SimpleNamespace, ...]:
        common = {"imatrix": "imatrix.gguf", "mix": None, "set_by_hand": [{"tensor": tensor, "type": kind}]}
        return tuple(SimpleNamespace(type=name, bytes=n, **common) for n, name in enumerate(("Q4_0", "Q4_K_M")))

    value = "blk.0.attn_v.weight"
    for kind in TENSOR_TYPES:  # as llama.cpp's dry run says
        (told,) = predict_sizes(wide, ["Q4_0"], Options(tensor_types=(f"attn_v={kind}",)))
        assert bool(compared_with_matrix(reports(value, kind))[1]) == told["needs_imatrix"], kind
    assert compared_with_matrix(reports("token_embd.weight", "iq2_xs"))[1] == ["Q4_0", "Q4_K_M"]
    free, needing = reports(value, "q8_0"), reports(value, "iq3_xxs")
    assert compared_with_matrix(free) == ([*reversed(free)], [])
    product = run.produce("quantized", lambda work: write_json(work.folder / "quantized.json", {}), {})
    found = imatrix_effect(settings(), run, QuantizeResult(product, {}, needing))
    assert found.content == {"types": [], "left_out": ["Q4_0", "Q4_K_M"]}
    why, reading = quantize_page.effect(found)
    assert "Q4_0, Q4_K_M cannot be made without a matrix" in why.data and "does not say" in reading.data


def test_tensors_of_other_types_are_named(tmp_path: Path) -> None:
    """With a matrix llama.cpp gives some tensors of Q4_0 a larger type, where there are enough layers."""
    source = tiny_gguf.write(tmp_path / "a-F16.gguf", layers=8)
    names = tiny_gguf.tensors(256, 8, 1, 259, 512, 128)
    values = {n: np.ones(v.shape[1]) for n, v in names.items() if n.startswith("blk.") and v.ndim == 2}
    calibration.write_imatrix(tmp_path / "a.imatrix", values, 64, "text", 64)
    one, other = (
        tiny_gguf.quantize_file(source, tmp_path / f"{name}.gguf", "Q4_0", Options(matrix))
        for name, matrix in (("with", tmp_path / "a.imatrix"), ("without", None))
    )
    found = retyped(tmp_path / "with.gguf", tmp_path / "without.gguf")
    assert found == [{"tensor": "blk.0.ffn_down.weight", "with": "q4_1", "without": "q4_0"}]
    entry = {"type": "Q4_0", "bytes": one.bytes, "bytes_without": other.bytes, "retyped": found, "verdict": "better"}
    numbers = {"difference": -0.1, "difference_interval": None, "p_holm": 0.5, "verdict": "cannot tell"}
    measured = {"kld_with": 0.9, "kld_with_interval": None, "kld_without": 1.0, "kld_without_interval": None}
    entry = {**numbers, **measured, **entry, "answers": numbers}
    content = {"types": [entry], "left_out": ["Q2_K"], "tokens": 1, "rows": 1, "answer_positions": 1, "answer_rows": 1}
    reading = quantize_page.effect(SimpleNamespace(content=content))[1].data
    assert f"1 tensor q4_1 instead of q4_0 (blk.0.ffn_down), {one.bytes - other.bytes:+,} bytes" in reading
    assert "Q2_K cannot be made without a matrix" in reading and "(-10 % KL divergence), at answers not" in reading


def kl_between(reference: Path, other: Path, windows: list[list[int]]) -> Any:
    """The KL table of two files, both open at once."""
    from lib.scoring.llama_backend import LlamaCppBackend
    from tests.scoring.tiny import kl_table

    with closing(LlamaCppBackend(reference, 64, 1, 0)) as one, closing(LlamaCppBackend(other, 64, 1, 0)) as two:
        return kl_table(one, two, windows)


def test_verdicts_of_the_effect() -> None:
    draw = np.random.default_rng(0)
    rows = np.repeat(np.arange(40), 25)
    plain = draw.gamma(2, 0.01, 1000)
    better, same = judge([(plain * 0.7, plain), (plain * draw.normal(1, 0.05, 1000), plain)], rows)
    assert better["verdict"] == "better" and better["difference_interval"][1] < 0 and better["p_holm"] < 0.01
    assert same["verdict"] == "cannot tell" and same["p_holm"] == same["p"]
    assert judge([(plain * 1.3, plain)], rows)[0]["verdict"] == "worse"


def test_held_out_windows_are_test_rows_leak_free_first(run: Run, tmp_path: Path) -> None:
    from lib.models.loading import load_tokenizer

    data = shutil.copytree(run.folder / "data", tmp_path / "data")
    rows = read_jsonl(data / "test.jsonl")
    for i, row in enumerate(rows):
        row["leaked"] = i not in (3, 8)
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    chosen = calibration.row_windows(data, "test", 64, 4, 42)
    windows, owners = chosen.windows, chosen.owners
    ids = [token for window in windows for token in window]
    assert len(ids) == len(owners) == 256 and set(owners[:100]) <= {3, 8} < set(owners)
    tokenizer, task = load_tokenizer(data / "tokenizer"), read_task(data)
    for owner in set(owners):
        mine = [token for token, of in zip(ids, owners, strict=True) if of == owner]
        assert mine == task.encode(tokenizer, rows[owner]).ids[: len(mine)]
    with pytest.raises(InputError, match="test rows of"):
        calibration.row_windows(data, "test", 32768, 4, 42)


def test_conversations_too(tmp_path: Path) -> None:
    """Rows without labels: whole conversations; one whose turns are those of a test row is left out."""
    from lib.models.loading import load_tokenizer
    from lib.prompts.tasks import ConversationTask

    def conversation(i: int, said: str, system: str = "你是助手。") -> dict[str, Any]:
        turns = [("system", system), ("user", said), ("assistant", "很好，谢谢。")]
        return {"id": f"r{i}", "messages": [{"role": r, "content": c} for r, c in turns], "group": i, "leaked": False}

    tiny_run.make_tokenizer(tmp_path / "tokenizer")
    task = ConversationTask("dialogue", "你是助手。", 128, False)
    (tmp_path / "task.json").write_text(json.dumps(task.to_json()), encoding="utf-8")
    splits = {
        "train": [conversation(i, f"房间{i}怎么样？") for i in range(30)],
        "validation": [conversation(100, "早餐好吗？")],
        "test": [conversation(200, "房间7怎么样？", "另一个系统提示。")],
    }
    for name, rows in splits.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    chosen = calibration.row_windows(tmp_path, "train", 64, 1000, 42)
    assert chosen.facts["left_out"]["text of a held-out row"] == 1 and "r7" not in {row["id"] for row in chosen.used}
    tokenizer, by_id = load_tokenizer(tmp_path / "tokenizer"), {row["id"]: row for row in splits["train"]}
    wanted = [token for used in chosen.used for token in task.encode(tokenizer, by_id[used["id"]]).ids]
    assert [token for window in chosen.windows for token in window] == wanted[: 64 * len(chosen.windows)]
