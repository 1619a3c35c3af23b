"""Sensitivities at answers: the right information, the right rows, a choice that counts them; files scored there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lib.prompts.tasks import ConversationTask
from lib.report import charts, quantize_page, steps_page
from lib.runs.files import read_json, read_jsonl
from lib.runs.machine import llama_cpp_problem
from lib.runs.run import Run
from lib.settings import Settings
from lib.stages.convert.convert import convert
from lib.stages.quantize import calibration
from lib.stages.quantize.size_budget import MixRequest, choose_types, solve
from lib.stages.quantize.stage import mix_effect, plan, plan_mix, predictions, quantize, tensor_errors
from tests import tiny_gguf, tiny_run

pytestmark = pytest.mark.usefixtures("forked_children")

native_only = pytest.mark.skipif(llama_cpp_problem() is not None, reason="llama-cpp-python does not work here")


def wanted(**changes: Any) -> Settings:
    given = {"run_name": "tiny", "n_ctx": 64, "n_threads": 1, "ladder": ["Q8_0", "Q4_0"], "size_budget_mb": 0.12}
    return Settings(**{**given, "perplexity_tokens": 512, **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers") / "base"
    tiny_run.make_base(folder)
    return folder


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBOOK_HOME", str(tmp_path_factory.mktemp("home")))
        run = tiny_run.make_run(base)
        run.produce("merged", lambda work: shutil.copytree(base, work.folder, dirs_exist_ok=True) and None, {})
        run.produce("gguf", lambda work: convert(base, work.folder / "tiny-F32.gguf", "f32") and None, {})
        yield run


def test_random_labels_have_the_covariance_of_drawn_ones() -> None:
    """E[u] = 0 and E[u u'] = diag(p) - p p', also where the model is nearly sure; there they scatter far less."""
    import torch

    from lib.stages.quantize.sensitivity import _random_labels

    draw = torch.Generator().manual_seed(0)
    for logits in (torch.tensor([0.3, -0.5, 1.0, 0.1]), torch.tensor([8.0, 1.0, -3.0, 0.0])):
        p = logits.softmax(-1).double()
        u = _random_labels(logits.expand(200_000, 4), draw).double()
        exact = torch.diag(p) - torch.outer(p, p)
        assert (u.T @ u / len(u)).numpy() == pytest.approx(exact.numpy(), abs=4e-3 * float(exact.diag().max()) + 1e-9)
        assert float(u.sum(-1).abs().max()) < 1e-5, "logits have no common level"
    sure = float(p[0])
    drawn = (((1 - sure) ** 3 / sure + sure**3 / (1 - sure)) - 1) ** 0.5  # of a drawn label's square, in its means
    assert float(u[:, 0].square().std() / u[:, 0].square().mean()) < 1 < 20 < drawn


def test_information_at_answers_is_that_of_single_gradients(base: Path) -> None:
    """Against Σ p(y) (∇ log p(y))², one gradient a position and a token of the vocabulary; padding changes nothing."""
    import torch

    from lib.models.loading import load_model
    from lib.stages.quantize.sensitivity import answer_information, groups, matrices

    model = load_model(base, dtype="float32", device="cpu")
    draw = np.random.default_rng(0)
    rows = [
        {
            "ids": draw.integers(3, 500, length).tolist(),
            "positions": positions,
            "row": 0,
            "targets": [3] * len(positions),
        }
        for length, positions in ((9, [7, 8]), (12, [11]), (6, [3, 5]))
    ]
    assert [[len(row["ids"]) for row in group] for group in groups(rows)] == [[6, 9, 12]]
    names = ("blk.0.attn_q.weight", "blk.1.ffn_down.weight")
    exact, common = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    weights = matrices(model)
    for weight in weights.values():
        weight.requires_grad_(True)
    for row in rows:
        logs = model(input_ids=torch.tensor([row["ids"]])).logits[0, row["positions"]].log_softmax(-1)
        for log in logs:
            for y in range(512):
                found = torch.autograd.grad(log[y], [weights[name] for name in names], retain_graph=True)
                for name, gradient in zip(names, found, strict=True):
                    exact[name] = exact[name] + float(log[y].exp()) / 5 * gradient.square()
                    common[name] += float(log[y].exp()) / 5 * float((gradient * weights[name].detach()).sum()) ** 2
    tries = 400
    means = {name: np.zeros(weights[name].shape) for name in names}
    scales = dict.fromkeys(names, 0.0)
    for seed in range(tries):
        found, factors = answer_information(model, rows, seed)
        for name in names:
            means[name] += found[name] / tries
            scales[name] += factors[name] / tries
    for name in names:
        assert means[name].sum() == pytest.approx(float(exact[name].sum()), rel=0.1), name
        assert np.corrcoef(means[name].ravel(), exact[name].numpy().ravel())[0, 1] > 0.95, name
        assert scales[name] == pytest.approx(common[name], rel=0.3), name
    assert answer_information(model, rows, 1)[1] == answer_information(model, rows, 1)[1], "no chance but the seed's"


def test_the_text_is_measured_as_before(base: Path) -> None:
    """By the loop that measured it when there were no answers; to the last places, for sums are fused today."""
    import torch

    from lib.models.loading import load_model
    from lib.stages.quantize.sensitivity import answer_information, information, matrices

    windows = np.random.default_rng(1).integers(3, 500, (4, 16)).tolist()
    model = load_model(base, dtype="float32", device="cpu")
    answer_information(model, [{"ids": windows[0], "positions": [15], "targets": [3], "row": 0}], 0)
    found, scales = information(model, windows, 7)
    weights = matrices(model)
    sums, factors = {name: torch.zeros(w.shape) for name, w in weights.items()}, dict.fromkeys(weights, 0.0)
    draw = torch.Generator().manual_seed(7)
    for window in windows:
        logits = model(input_ids=torch.tensor([window]), use_cache=False).logits[0].float()
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)[:, 0]
        torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
        for name, weight in weights.items():
            sums[name].add_(weight.grad.square())
            factors[name] += float((weight.grad * weight.detach()).sum()) ** 2
            weight.grad = None
    for name, total in sums.items():
        np.testing.assert_allclose(found[name], total.div_(64).numpy(), rtol=1e-6)
    assert scales == pytest.approx({name: total / 64 for name, total in factors.items()}, rel=1e-4)


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model of one block with 256 or 512 rows a matrix, and sensitivities of a heavy tail, others at answers."""
    folder = tmp_path_factory.mktemp("tried")
    weights = tiny_gguf.tensors(256, 1, 1, 259, 512, 128)
    source = tiny_gguf.write(folder / "a-F32.gguf", layers=1, weights=weights, outtype="f32")
    draw = np.random.default_rng(0)
    scales: dict[str, dict[str, float]] = {"kld": {}, "answer_kld": {}}
    for loss in scales:
        (folder / loss).mkdir()
    for name in (name for name in weights if weights[name].ndim == 2):
        for loss, scale in scales.items():
            rows = draw.gamma(0.5, 1, (len(weights[name]), 1)) ** 2
            values = (rows * draw.gamma(0.5, 1, weights[name].shape)).astype(np.float32)
            np.save(folder / loss / f"{name}.npy", values)
            scale[name] = float(draw.gamma(1, 10))
    return {"source": str(source), "folder": str(folder), "imatrix": None, "n_threads": 1, "scales": scales}


@native_only
def test_all_rows_give_the_losses_of_before(tried: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, by the formula written out; the answers change nothing of the text."""
    from lib.stages.quantize import llama_library, type_costs

    monkeypatch.setattr(type_costs, "_DRAWN", 10**6)
    found = type_costs.measure(tried)["tensors"]
    alone = type_costs.measure({**tried, "scales": {"kld": tried["scales"]["kld"]}})["tensors"]
    assert [[t["kld"] for t in row["types"]] for row in alone] == [[t["kld"] for t in row["types"]] for row in found]
    assert "answer_kld" not in alone[0]["types"][0]
    row = next(row for row in found if row["tensor"] == "blk.0.ffn_down.weight")
    assert row["rows_drawn"] == row["rows_tried"] == 256
    weights = tiny_gguf.tensors(256, 1, 1, 259, 512, 128)[row["tensor"]].astype(np.float32)
    for entry in row["types"]:
        kind = entry["type"]
        error = llama_library.dequantize_rows(kind, llama_library.quantize_rows(kind, weights, None)) - weights
        shrunk = float(np.sum(error * weights, dtype=np.float64)) / float(np.sum(weights * weights, dtype=np.float64))
        for loss, scales in tried["scales"].items():
            fisher = np.load(f"{tried['folder']}/{loss}/{row['tensor']}.npy")
            lost = float(np.sum(fisher * error * error, dtype=np.float64))
            assert entry[loss] == 0.5 * (lost + scales[row["tensor"]] * shrunk**2), (kind, loss)


@native_only
def test_few_rows_choose_as_well_as_all(tried: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Six budgets, three weights: judged by all rows, the choice of drawn rows loses at most 1 % more."""
    from lib.stages.quantize import type_costs

    monkeypatch.setattr(type_costs, "_DRAWN", 64)
    few = type_costs.measure(tried)["tensors"]
    monkeypatch.setattr(type_costs, "_DRAWN", 10**6)
    every = type_costs.measure(tried)["tensors"]
    assert {row["rows_drawn"] < row["rows_tried"] for row in few if row["rows"] > 128} == {True}
    sizes = [[t["bytes"] for t in row["types"]] for row in every]
    low, high = (sum(pick(row) for row in sizes) for pick in (min, max))
    for part in (0.1, 0.25, 0.4, 0.55, 0.7, 0.85):
        for weight in (0.0, 0.5, 1.0):

            def value(kind: dict[str, Any], weight: float = weight) -> float:
                return (1 - weight) * kind["kld"] + weight * kind["answer_kld"]

            budget = round(low + part * (high - low))
            lost = []
            for table in (few, every):
                types = [kind["type"] for kind in solve([row["types"] for row in table], value, budget)]
                truth = [{t["type"]: value(t) for t in row["types"]} for row in every]
                lost.append(sum(row[kind] for row, kind in zip(truth, types, strict=True)))
            assert lost[0] <= 1.01 * lost[1], (part, weight)


def test_answer_rows_are_training_rows_at_the_positions_of_the_loss(run: Run) -> None:
    from lib.models.loading import load_tokenizer

    data = run.folder / "data"
    chosen = calibration.row_answers(data, "train", 6, 10_000, 42)
    rows, tokenizer = {r["id"]: r for r in read_jsonl(data / "train.jsonl")}, load_tokenizer(data / "tokenizer")
    assert len(chosen.rows) == len(chosen.used) == chosen.facts["rows"] == 6
    windows = calibration.row_windows(data, "train", 64, 4, 42)
    assert chosen.used[:3] == windows.used[:3], "the same order"
    for row, used in zip(chosen.rows, chosen.used, strict=True):
        answer = tokenizer(tiny_run.LABELS[rows[used["id"]]["label"]], add_special_tokens=False)["input_ids"]
        assert row["targets"][:-1] == answer and tokenizer.decode(row["targets"][-1:]) == "<|im_end|>"
        assert row["positions"][-1] == len(row["ids"]) - 1, "nothing is run that nothing is read from"
        assert (row["ids"] + row["targets"][-1:])[-len(row["targets"]) :] == row["targets"]
    tokens = sum(len(row["ids"]) for row in chosen.rows[:3])
    assert len(calibration.row_answers(data, "train", 6, tokens, 42).rows) == 3
    assert len(calibration.row_answers(data, "train", 6, 1, 42).rows) == 1
    test = calibration.row_answers(data, "test", 5, 10_000, 42)
    ids = [row["id"] for row in read_jsonl(data / "test.jsonl")]
    assert [used["id"] for used in test.used] == [ids[row["row"]] for row in test.rows]


def test_conversations_have_answers_too(base: Path, tmp_path: Path) -> None:
    """All learned turns, with their ends; a row that equals a held-out one is left out."""
    from lib.models.loading import load_model, load_tokenizer
    from lib.stages.quantize.sensitivity import answer_information

    def conversation(i: int, said: str) -> dict[str, Any]:
        turns = [("user", said), ("assistant", "很好。"), ("user", "早餐？"), ("assistant", "一般，贵。")]
        messages = [{"role": role, "content": text} for role, text in (("system", "你是助手。"), *turns)]
        return {"id": f"r{i}", "messages": messages, "group": i, "leaked": False}

    tiny_run.make_tokenizer(tmp_path / "tokenizer")
    task = ConversationTask("dialogue", "你是助手。", 128, False)
    (tmp_path / "task.json").write_text(json.dumps(task.to_json()), encoding="utf-8")
    splits = {"train": [conversation(i, f"房间{i}怎么样？") for i in range(9)], "validation": []}
    splits["test"] = [conversation(20, "房间7怎么样？")]
    for name, rows in splits.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    chosen = calibration.row_answers(tmp_path, "train", 100, 10_000, 42)
    assert len(chosen.rows) == 8 and "r7" not in {row["id"] for row in chosen.used}
    tokenizer, by_id = load_tokenizer(tmp_path / "tokenizer"), {row["id"]: row for row in splits["train"]}
    for row, used in zip(chosen.rows, chosen.used, strict=True):
        encoded = task.encode(tokenizer, by_id[used["id"]])
        assert [p + 1 for p in row["positions"]] == encoded.loss and len(encoded.spans) == 2
        assert row["targets"] == [encoded.ids[p] for p in encoded.loss]
    found, scales = answer_information(load_model(base, dtype="float32", device="cpu"), chosen.rows, 0)
    assert all(np.isfinite(values).all() and values.sum() > 0 for values in found.values()) and min(scales.values()) > 0


@native_only
def test_the_weight_decides_and_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both losses are kept, another weight above 0 measures nothing again, and one page chooses once."""
    from lib.stages.quantize import size_budget

    calls: list[float] = []
    real = size_budget.run_child

    def counted(function: str, argument: dict[str, Any], what: str) -> Any:
        if "request" in argument:
            calls.append(argument["request"].answer_weight)
        return real(function, argument, what)

    monkeypatch.setattr(size_budget, "run_child", counted)
    made = {}
    for weight in (0.0, 1.0, 0.5):
        asked = wanted(answer_weight=weight)
        made[weight] = plan_mix(asked, run)
        assert plan(asked, run)[-1] == made[weight].prediction
    assert calls == [0.0, 1.0, 0.5]
    record = read_json(run.folder / "sensitivity" / "sensitivity.json")
    rows = read_jsonl(run.folder / "sensitivity" / "answer_rows.jsonl")
    assert record["answers"]["rows"] == len(rows) == 8, "the other 16 are near copies of held-out rows"
    held_out = {
        calibration.text_hash(r) for s in ("validation", "test") for r in read_jsonl(run.folder / f"data/{s}.jsonl")
    }
    assert not held_out & {row["sha256"] for row in rows}
    source, budget = run.folder / "gguf" / "tiny-F32.gguf", made[0.5].record["budget_bytes"]
    text, both, answers = (
        choose_types(record, MixRequest(budget, source, None, "rows", w)).record for w in (0.0, 0.5, 1.0)
    )
    assert text["predicted_kld"] <= both["predicted_kld"] <= answers["predicted_kld"]
    assert text["predicted_answer_kld"] >= both["predicted_answer_kld"] >= answers["predicted_answer_kld"]
    assert "quantize.mix.answer_weight" not in dict(made[0.0].options.notes)
    assert dict(made[0.5].options.notes)["quantize.mix.answer_weight"] == "0.5"
    plain = {**record, "answers": None}  # as of a text, which has none
    alone = choose_types(plain, MixRequest(budget, source, None, "rows", 0.5))
    assert alone.record["types"] == text["types"] and alone.record["predicted_answer_kld"] is None
    assert alone.record["predicted_kld"] == text["predicted_kld"] and alone.record["answer_weight"] == 0


@native_only
def test_files_are_scored_once_and_at_answers(run: Run) -> None:
    """The divergence at answers is that of the two files' own distributions there; predictions of both losses."""
    from lib.scoring.llama_backend import LlamaCppBackend

    asked = wanted()
    result = quantize(asked, run)
    content = mix_effect(asked, run, result).content
    assert content["answer_rows"] == 16 and content["answer_positions"] >= 32
    rows = calibration.row_answers(run.folder / "data", "test", 128, 8192, 42).rows
    files = {file.type: result.product.path / file.file for file in result.files}
    with (
        closing(LlamaCppBackend(run.folder / "gguf" / "tiny-F32.gguf", 128, 1, 0)) as reference,
        closing(LlamaCppBackend(files["Q4_0"], 128, 1, 0)) as other,
    ):
        found = []
        for row in rows:
            p, q = (b.window_log_probs(row["ids"])[row["positions"]].astype(np.float64) for b in (reference, other))
            found += (np.exp(p) * (p - q)).sum(axis=1).tolist()
    entry = next(e for e in content["types"] if e["type"] == "Q4_0")
    assert entry["answers"]["kld"] == pytest.approx(np.mean(found), rel=0.02)
    for e in content["types"]:
        own = e["answers"]
        assert own["difference"] == pytest.approx(content["mixed"]["answers"]["kld"] - own["kld"], rel=1e-9)
        assert own["p_holm"] >= own["p"] and own["verdict"] in ("better", "worse", "cannot tell")
    tensor_errors(asked, run, result)
    at_answers = predictions(run, "answer_kld")
    assert at_answers.keys() == predictions(run).keys() == {file.file for file in result.files}
    assert at_answers[files["Q8_0"].name] < at_answers[files["Q4_0"].name] != predictions(run)[files["Q4_0"].name]
    mixed = result.files[-1]
    assert at_answers[mixed.file] == pytest.approx(mixed.mix["predicted_answer_kld"], rel=1e-12)
    shown = steps_page.on_answers(at_answers, SimpleNamespace(content=content))
    assert shown.counted["n"] == content["answer_positions"]
    assert "16 held-out rows" in steps_page.forecast_table(shown).data


def compared(verdicts: dict[str, tuple[int, str]]) -> SimpleNamespace:
    """Of mix_effect.json: {recipe: (bytes, verdict at answers)}, the mixed file has 1,000,000."""

    def entry(size: int, verdict: str) -> dict[str, Any]:
        answers = {"kld": 0.1, "kld_interval": [0.05, 0.2], "difference": 0.01, "difference_interval": [-0.1, 0.1]}
        return {"bytes": size, "answers": {**answers, "p_holm": 0.5, "verdict": verdict}}

    content = {"answer_rows": 60, "answer_positions": 120, "mixed": {"type": "MIX_1MB", **entry(10**6, "")}}
    content["types"] = [{"type": name, **entry(*value)} for name, value in verdicts.items()]
    return SimpleNamespace(content=content)


def task_loss(verdicts: dict[str, tuple[int, str]]) -> str:
    """What the page says of the mixed file beside these recipes."""
    return quantize_page.against_recipes_at_answers(compared(verdicts))[1].data


def test_the_page_says_when_the_mixed_file_does_not_win() -> None:
    lost = task_loss({"Q4_0": (950_000, "worse"), "Q2_K": (600_000, "better")})
    assert lost == (
        "Task loss of MIX_1MB beside the recipe of its size (within 10 %): it is shown to lose more than Q4_0. For the "
        "task the choice of types did not pay here."
    )
    larger = task_loss({"Q4_0": (1_050_000, "worse")})
    assert "did not pay" not in larger and "does not beat every recipe of its size" in larger
    smaller = task_loss({"Q4_0": (950_000, "better")})
    assert "All of these are smaller, so it does not follow that the choice of types paid." in smaller
    open_ = {"Q4_0": (1_050_000, "cannot tell"), "Q4_K_M": (1_090_000, "better")}
    said = task_loss(open_)
    assert "shown to lose less than Q4_K_M; not shown to differ from Q4_0. So it does not beat every recipe" in said
    won = task_loss({"Q4_0": (1_400_000, "better"), "Q8_0": (2 * 10**6, "worse")})
    assert "the recipe nearest to its size (1.40 of it): it is shown to lose less than Q4_0. So for the task" in won
    table = quantize_page.against_recipes_at_answers(compared(open_))[0].data
    assert "120 tokens of the answers of 60 held-out rows" in table and "cannot tell" in table
    (nothing,) = quantize_page.against_recipes_at_answers(None)
    assert "Nothing to compare" in nothing.data


def test_a_forced_page_scores_again_unless_it_just_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """The effect of the matrix scores first; where it has nothing to compare, this must."""
    from lib.stages.quantize import held_out_kl

    class ScoredError(Exception):
        pass

    def scores(*_: Any, force: bool) -> None:
        raise ScoredError(force)

    files = tuple(SimpleNamespace(type=name, mix=mix) for name, mix in (("Q4_0", None), ("MIX_1MB", {"types": {}})))
    monkeypatch.setattr(held_out_kl, "score_files", scores)
    asked = wanted(imatrix="auto", force=True)
    for compared_now, again in (([], "True"), (["Q4_0"], "False")):
        monkeypatch.setattr(held_out_kl, "compared_with_matrix", lambda *_, found=compared_now: (found, ["Q4_0"]))
        with pytest.raises(ScoredError, match=again):
            held_out_kl.mix_effect(asked, None, SimpleNamespace(files=files))


def test_what_is_scored_and_how_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from lib.stages.quantize import held_out_kl as quantize_held_out

    few, many = (quantize_held_out._most_windows(wanted(n_ctx=256, perplexity_tokens=most)) for most in (512, 10**6))
    assert (few, many) == (2, 8), "more tokens than are used change nothing"
    monkeypatch.setattr(quantize_held_out, "available_memory", lambda: 4 << 30)
    assert quantize_held_out._at_once([1 << 20] * 5, 8, 1 << 30) == 3
    assert quantize_held_out._at_once([1 << 20] * 5, 8, (1 << 30) + 2 * 4 * 900 * 151_936) == 1, (
        "long answers of a large vocabulary"
    )


LOSSES = [("F16", 9, 0.0, None), ("Q8_0", 5, 0.01, 0.002), ("Q4_0", 3, 0.1, -0.001)]


def test_who_is_efficient_for_the_task() -> None:
    def entry(name: str, size: int, text: float, task: float | None) -> dict[str, Any]:
        return {"type": name, "file": f"m-{name}.gguf", "bytes": size, "kld_mean": text, "label_kld": task}

    files = [entry("F16", 9, 0.0, 0.0), entry("Q8_0", 5, 0.01, 0.01), entry("Q5_K_M", 4, 0.02, 0.5)]
    files += [entry("Q4_0", 3, 0.1, 0.3), {**entry("nf4", 2, 0.1, 0.1), "file": "nf4"}]
    said = charts.frontiers(files).data
    assert "text: Q4_0, Q5_K_M, Q8_0; by size and that of the answer words: Q4_0, Q8_0." in said
    assert "Efficient on text alone, so not for this task: Q5_K_M." in said
    assert charts.frontiers([entry("Q4_0", 3, 0.1, None)]) is None
    unlabelled = [{**entry(n, s, t, None), "loss_difference": d} for n, s, t, d in LOSSES]
    said = charts.frontiers(unlabelled).data
    assert "text: Q4_0, Q8_0; by size and loss of the reference answers: Q4_0." in said
    labels = [{**e, "label_kld_interval": [0.1, 0.6], "n": 60} for e in files]
    shown = steps_page.on_label_words({"m-Q4_0.gguf": 0.2, "m-Q8_0.gguf": 0.1}, labels)
    assert [point["type"] for point in shown.points] == ["Q8_0", "Q4_0"]
    assert "60 test rows, on their answer words alone" in steps_page.forecast_table(shown).data
