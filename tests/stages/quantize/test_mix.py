"""A file under a size budget: exact bytes, types chosen by measured sensitivity, held-out rows left out."""

from __future__ import annotations

import itertools
import json
import operator
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings, strategies

from lib.errors import InputError
from lib.models.gguf_file import row_order
from lib.report import quantize_page
from lib.runs.files import read_json, read_jsonl, sha256_file
from lib.runs.machine import llama_cpp_problem
from lib.runs.run import Run
from lib.settings import Settings, mix_name
from lib.stages.convert.convert import convert
from lib.stages.quantize import calibration, files, held_out_kl, sensitivity, size_budget, stage
from lib.stages.quantize import stage as quantize_stage
from lib.stages.quantize.files import Options, PlannedFile
from lib.stages.quantize.size_budget import MixRequest, choose_types, solve
from lib.stages.quantize.stage import plan, plan_mix, predictions, quantize, tensor_errors
from tests import tiny_gguf, tiny_run

pytestmark = pytest.mark.usefixtures("forked_children")

native_only = pytest.mark.skipif(llama_cpp_problem() is not None, reason="llama-cpp-python does not work here")

options = strategies.lists(
    strategies.fixed_dictionaries(
        {"bytes": strategies.integers(1, 12).map(lambda n: 32 * n), "loss": strategies.floats(0, 1)}
    ),
    min_size=1,
    max_size=4,
)
loss = operator.itemgetter("loss")
instances = strategies.lists(options, min_size=1, max_size=4)


@given(instances, strategies.integers(0, 2000), strategies.integers(0, 100))
@settings(max_examples=200, deadline=None)
def test_the_solver_is_exact(tensors: list[list[dict[str, Any]]], budget: int, fixed: int) -> None:
    """As good as trying everything, never over the budget; refused exactly where nothing fits."""
    fits = [c for c in itertools.product(*tensors) if fixed + sum(t["bytes"] for t in c) <= budget]
    if not fits:
        least = fixed + sum(min(c["bytes"] for c in tensor) for tensor in tensors)
        with pytest.raises(InputError, match=f"at least {least:,} bytes, the smallest file of the types tried"):
            solve(tensors, loss, budget, fixed)
        return
    chosen = solve(tensors, loss, budget, fixed)
    assert all(choice in tensor for choice, tensor in zip(chosen, tensors, strict=True))
    assert fixed + sum(c["bytes"] for c in chosen) <= budget
    best = min(sum(map(loss, combination)) for combination in fits)
    assert sum(map(loss, chosen)) == pytest.approx(best, abs=1e-12)


@given(strategies.integers(0, 2**31), strategies.integers(0, 10**6), strategies.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_more_bytes_never_predict_more_loss(seed: int, one: int, other: int) -> None:
    """Also where the grid is coarser than the bytes: 30 tensors whose sizes have no common factor."""
    draw = np.random.default_rng(seed)
    tensors = [
        [{"bytes": int(draw.integers(1, 40_000)), "loss": float(draw.gamma(1, 10.0**-k))} for k in range(5)]
        for _ in range(30)
    ]
    least = sum(min(c["bytes"] for c in tensor) for tensor in tensors)
    small, large = (solve(tensors, loss, least + extra) for extra in sorted((one, other)))
    assert sum(c["bytes"] for c in small) <= least + min(one, other)
    assert sum(map(loss, large)) <= sum(map(loss, small)) + 1e-12


def test_names() -> None:
    assert [mix_name(n) for n in (300_000_000, 1_967_840, 1_500_000)] == ["MIX_300MB", "MIX_1968KB", "MIX_1500KB"]


@native_only
def test_the_comparison_calls_it_by_its_budget() -> None:
    """The header of such a file names the recipe of its main type, which another file may have too."""
    from lib.stages.compare.files import _names

    paths = [Path(f"base-{name}.gguf") for name in ("F16", "Q6_K", "small")]
    assert _names(paths, [1, 18, 18], [None, None, 300_000_000]) == ["F16", "Q6_K", "MIX_300MB"]


def wanted(**changes: Any) -> Settings:
    return Settings(
        **{"run_name": "tiny", "imatrix": "auto", "n_ctx": 64, "n_threads": 1, "ladder": ["Q4_0"], **changes}
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mix") / "base"
    tiny_run.make_base(folder, tied=False)
    return folder


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run whose merged model is its base; all tests share it, because measuring takes most of their time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBOOK_HOME", str(tmp_path_factory.mktemp("home")))
        yield make(base)


def make(base: Path) -> Run:
    run = tiny_run.make_run(base)
    run.produce("merged", lambda work: shutil.copytree(base, work.folder, dirs_exist_ok=True) and None, {})
    run.produce("gguf", lambda work: convert(base, work.folder / "tiny-F32.gguf", "f32") and None, {})
    return run


@native_only
def test_the_written_file_is_what_was_chosen(run: Run) -> None:
    """Bytes, types, provenance in header and summary; other budgets cost no new measurement; 0 removes the file."""
    stock = quantize(wanted(ladder=["Q5_0"]), run).files[0]
    asked = wanted(size_budget_mb=stock.bytes / 1e6)
    made = plan_mix(asked, run)
    assert [p["type"] for p in plan(asked, run)] == ["Q4_0", made.prediction["type"]]
    result = quantize(asked, run)
    report, path = result.files[1], result.product.path / result.files[1].file
    assert path.name == f"tiny-{mix_name(stock.bytes)}.gguf" and report.type == mix_name(stock.bytes)
    assert path.stat().st_size == report.bytes == made.prediction["bytes"] <= stock.bytes
    reader = gguf.GGUFReader(path)
    types = {t.name: t.tensor_type.name.lower() for t in reader.tensors}
    assert {name: types[name] for name in made.record["types"]} == {
        n: t.lower() for n, t in made.record["types"].items()
    }
    assert {name for name in types if not name.endswith(("norm.weight", "bias"))} == made.record["types"].keys()
    texts = {k: f.contents() for k, f in reader.fields.items() if k.startswith("quantize.mix")}
    record = read_json(run.folder / "sensitivity" / "sensitivity.json")
    assert texts == {
        "quantize.mix.method": made.record["method"],
        "quantize.mix.budget_bytes": str(stock.bytes),
        "quantize.mix.answer_weight": "0.5",
        "quantize.mix.rows": f"train.jsonl, {record['rows']} rows, sha256 {record['rows_sha256']}",
    }
    assert read_json(result.product.path / "quantized.json")["files"][1]["mix"] == report.mix == made.record
    measured = tensor_errors(asked, run, result).files[report.type]
    assert {row["tensor"]: row["type"] for row in measured} == made.record["types"]
    before = sha256_file(run.folder / "sensitivity" / "sensitivity.json")
    larger = quantize(wanted(size_budget_mb=1.05 * asked.size_budget_mb), run)
    assert larger.files[1].mix["predicted_kld"] < made.record["predicted_kld"] and not path.is_file()
    assert larger.product.entry.facts["reused"] == ["Q4_0"]
    assert sha256_file(run.folder / "sensitivity" / "sensitivity.json") == before
    assert [f.type for f in quantize(wanted(), run).files] == ["Q4_0"] and plan_mix(wanted(), run) is None


@native_only
def test_every_file_of_the_ladder_is_predicted_by_the_same_sensitivities(run: Run) -> None:
    """The mixed file as it was chosen, recipes by the types that they really have; other files are refused."""
    asked = wanted(ladder=["Q8_0", "Q4_K_M"], size_budget_mb=1.0)
    result = quantize(asked, run)
    with pytest.raises(InputError, match=r"sensitivities or errors of other files|tensor_errors"):
        predictions(run)
    tensor_errors(asked, run, result)
    found = predictions(run)
    paths = {file.type: file.file for file in result.files}
    assert found.keys() == set(paths.values()) == {f"tiny-{name}.gguf" for name in ("Q8_0", "Q4_K_M", "MIX_1MB")}
    assert found[paths["MIX_1MB"]] == pytest.approx(result.files[2].mix["predicted_kld"], rel=1e-12)
    table = read_json(run.folder / "sensitivity" / "sensitivity.json")["tensors"]
    by_hand = {
        name: sum(
            next(k["kld"] for k in row["types"] if k["type"].lower() == tensor.tensor_type.name.lower())
            for tensor in gguf.GGUFReader(result.product.path / paths[name]).tensors
            for row in table
            if row["tensor"] == tensor.name
        )
        for name in ("Q8_0", "Q4_K_M")
    }
    assert {name: found[paths[name]] for name in by_hand} == pytest.approx(by_hand, rel=1e-12)
    assert by_hand["Q8_0"] < by_hand["Q4_K_M"]
    quantize(wanted(ladder=["Q8_0"]), run)
    assert predictions(run) == {}, "made without sensitivities"


@native_only
def test_a_finished_page_starts_no_child(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that page 06 asks for, twice: the second time all is read from products, the solved mix too."""
    asked, started = wanted(ladder=["Q8_0", "Q4_0"], size_budget_bpw=6.0, perplexity_tokens=512), []

    def page() -> list[Any]:
        result = quantize(asked, run)
        return [
            quantize_stage.importance_matrix(asked, run).record,
            quantize_stage.source_grid(asked, run).shares,
            plan_mix(asked, run).record,
            [row["bytes"] for row in plan(asked, run)],
            [file.bytes for file in result.files],
            tensor_errors(asked, run, result).files,
            quantize_stage.retention(asked, run, result).files,
            quantize_stage.imatrix_effect(asked, run, result).content,
            quantize_stage.mix_effect(asked, run, result).content,
            predictions(run),
        ]

    first = page()
    for module in (calibration, files, held_out_kl, sensitivity, size_budget, stage):
        monkeypatch.setattr(module, "run_child", lambda function, *_: started.append(function))
    assert page() == first and started == []


@native_only
def test_the_rows_are_those_of_the_importance_matrix(run: Run) -> None:
    """The first of the same order, held-out rows provably absent."""
    plan_mix(wanted(size_budget_mb=1.0), run)
    ours, theirs = (read_jsonl(run.folder / name / "rows.jsonl") for name in ("sensitivity", "imatrix"))
    assert ours and ours == theirs[: len(ours)]
    record = read_json(run.folder / "sensitivity" / "sensitivity.json")
    assert record["shared_with_held_out"] == 0 and record["held_out_rows"] == 32
    assert run.manifest.entries()["sensitivity"].inputs.keys() == {"data", "merged", "gguf"}


@native_only
def test_an_impossible_budget_is_refused(run: Run) -> None:
    """In one sentence that names the smallest size, which then works."""
    before = run.manifest.entries().get("quantized")
    with pytest.raises(InputError, match=r"a size budget of 0.01 MB.*at least [0-9,]+ bytes, the smallest") as caught:
        quantize(wanted(size_budget_mb=0.01), run)
    least = int(caught.value.expected.split()[2].replace(",", ""))
    assert plan_mix(wanted(size_budget_mb=least / 1e6), run).prediction["bytes"] == least
    assert run.manifest.entries().get("quantized") == before


@native_only
def test_a_budget_in_bits_per_weight(run: Run) -> None:
    """As the pages count them; the whole file is what the name and the header say."""
    made = plan_mix(wanted(size_budget_bpw=5.5), run)
    budget = made.record["budget_bytes"]
    assert 5.0 < made.prediction["bits_per_weight"] <= 5.5 and made.prediction["bytes"] <= budget
    assert made.prediction["type"] == mix_name(budget) and f"{budget}" in dict(made.options.notes).values()
    weights, header = made.prediction["weights"], made.prediction["header_bytes"]
    assert 0 < header - (budget - int(5.5 * weights / 8)) < 1000, "the keys that tell of the choice"
    with pytest.raises(ValueError, match="one budget in two units"):
        wanted(size_budget_mb=1.0, size_budget_bpw=4.0)


@native_only
def test_a_gguf_of_another_model_is_refused(base: Path, home: Path) -> None:
    other, run = home / "other", make(base)
    tiny_run.make_base(other, tied=False, seed=5)
    run.produce("gguf", lambda work: convert(other, work.folder / "tiny-F32.gguf", "f32") and None, {"changed": 1})
    with pytest.raises(InputError, match="has other rows than in the model folder"):
        plan_mix(wanted(size_budget_mb=1.0, imatrix="none"), run)
    assert not [path for path in run.folder.iterdir() if path.name.startswith(".sens")], "nothing half-written"


def test_information_is_the_mean_squared_gradient_of_drawn_labels(base: Path) -> None:
    """½ Σ F d² is the KL divergence of a small random change, also of matrices that are tied."""
    import torch

    from lib.models.loading import load_model
    from lib.stages.quantize.sensitivity import information, matrices

    model = load_model(base, dtype="float32", device="cpu")
    draw = torch.Generator().manual_seed(0)
    windows = torch.randint(3, 500, (48, 24), generator=draw).tolist()
    found, scales = information(model, windows, 0)
    weights = matrices(model)
    assert found.keys() == weights.keys() and {"token_embd.weight", "output.weight"} <= found.keys()
    batch = torch.tensor(windows)

    @torch.no_grad()
    def predicted() -> torch.Tensor:
        return model(input_ids=batch).logits.log_softmax(-1).double()

    plain = predicted()
    for name in ("blk.0.attn_v.weight", "blk.1.ffn_down.weight", "output.weight"):
        klds = []
        weight, kept = weights[name].data, weights[name].data.clone()
        for _ in range(6):
            change = 2e-3 * torch.randn(weight.shape, generator=draw)
            weight += change
            klds.append(float((plain.exp() * (plain - predicted())).sum(-1).mean()))
            weight.copy_(kept)
        expected = 0.5 * 4e-6 * float(found[name].sum(dtype=np.float64))
        assert np.mean(klds) == pytest.approx(expected, rel=0.25), name
        weight.mul_(1.02)  # a common factor, which the diagonal does not see
        measured = float((plain.exp() * (plain - predicted())).sum(-1).mean())
        weight.copy_(kept)
        assert measured == pytest.approx(0.5 * 0.02**2 * scales[name], rel=0.5), name


@native_only
def test_rows_that_fill_no_block_stay_in_f16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no choice for them; the size is exact all the same. A model of such rows alone is refused."""
    from lib.stages.quantize import type_costs

    odd = tiny_gguf.tensors(256, 1, 1, 259, 100, 128)  # the columns of ffn_down
    source = tiny_gguf.write(tmp_path / "odd-F32.gguf", layers=1, weights=odd, outtype="f32")
    matrices = [name for name in odd if odd[name].ndim == 2]
    (tmp_path / "kld").mkdir()
    for name in matrices:
        np.save(tmp_path / "kld" / f"{name}.npy", np.ones_like(odd[name]))
    asked = {"source": str(source), "folder": str(tmp_path), "imatrix": None, "scales": {"kld": {}}, "n_threads": 1}
    found = type_costs.measure(asked)["tensors"]
    assert {row["tensor"] for row in found} == {name for name in matrices if "ffn_down" not in name}
    least = size_budget.least_in_child({"source": str(source), "options": vars(Options())})["bytes"]
    threads, done, losses = [], [], type_costs._Trial.losses

    class Pool(ThreadPoolExecutor):
        def __init__(self, n: int) -> None:
            threads.append(n)
            super().__init__(1)

    def noted(trial: Any, kind: str) -> dict[str, float]:
        done.append(trial.seconds(kind))
        return losses(trial, kind)

    monkeypatch.setattr(type_costs, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(type_costs._Trial, "losses", noted)
    assert type_costs.measure({**asked, "n_threads": 3})["tensors"] == found and threads == [3]
    assert done == sorted(done, reverse=True) and done[0] > 2 * done[-1], "the longest first"
    record = {"tensors": found, "positions": 1, "answers": None, "rows_sha256": ""}
    request = MixRequest(source.stat().st_size // 4, source, None, "rows")
    made = choose_types(record, request)  # raises if bytes are not as predicted
    assert "f16" in {part["type"] for part in made.prediction["histogram"]}
    with pytest.raises(InputError, match="the smallest file of the types tried"):
        choose_types(record, MixRequest(least - 100, source, None, "rows"))
    none = tiny_gguf.tensors(48, 1, 1, 259, 100, 24)
    source = tiny_gguf.write(tmp_path / "none-F16.gguf", layers=1, weights=none)
    with pytest.raises(InputError, match=r"no tensor of none-F16\.gguf has rows that fill blocks"):
        size_budget.least_in_child({"source": str(source), "options": vars(Options())})


def test_llama_rows_stand_as_in_gguf() -> None:
    """Queries and keys of Llama: by the formula of llama.cpp's converter, written the other way round."""
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
    order = row_order("blk.0.attn_k.weight", config, 16)
    assert order.tolist() == [head * 8 + half * 4 + i for head in range(2) for i in range(4) for half in range(2)]
    assert row_order("blk.0.attn_q.weight", config, 32).tolist()[:4] == [0, 4, 1, 5]
    assert row_order("blk.0.attn_v.weight", config, 16).tolist() == list(range(16))
    config["model_type"] = "qwen2"
    assert row_order("blk.0.attn_k.weight", config, 16).tolist() == list(range(16))


def test_the_page() -> None:
    tensors = [
        {"tensor": f"blk.{i}.attn_q.weight", "type": kind, "weights": 1000, "bytes": 500, "kld": 0.001}
        for i, kind in ((2, "q4_K"), (0, "q6_K"), (10, "q4_K"))
    ]
    (row,) = quantize_page.kinds_of_mix(tensors)
    assert row == {
        "kind": "attn_q",
        "types": "q6_K, 2 × q4_K",
        "size_mb": 0.0015,
        "bits_per_weight": 4.0,
        "predicted_kld": 0.003,
    }
    (without,) = quantize_page.chosen_types(None)
    assert "size_budget_mb" in without.data
    record = {"positions": 64, "predicted_kld": 0.003, "budget_bytes": 2000, "tensors": tensors, "types": {"a": "q4_K"}}
    record |= {"answers": None, "answer_weight": 0.0, "predicted_answer_kld": None}
    prediction = {"type": "MIX_2KB", "bytes": 1900, "bits_per_weight": 4.0}
    made = PlannedFile({**prediction, "mix": record}, Options())
    shown, reading = quantize_page.chosen_types(made)
    assert "0.002 MB of 0.002 MB allowed, 4.00 bits per weight in 1 types. Predicted" in reading.data
    assert "MIX_2KB" in shown.data and "Text alone decided: there were no answers. The prediction" in reading.data
    counted = {"answers": {"rows": 8, "positions": 16}, "answer_weight": 0.5, "predicted_answer_kld": 0.25}
    record |= {**counted, "tensors": [{**t, "answer_kld": 0.1} for t in tensors]}
    made = PlannedFile({**prediction, "mix": record}, Options())
    shown, reading = quantize_page.chosen_types(made)
    assert "At a token of an answer 0.25000 nats are predicted; answers counted 0.5 in the choice. The" in reading.data
    assert "16 tokens of the answers of 8 training rows" in shown.data and "predicted KL at answers" in shown.data
    assert json.dumps(record)
