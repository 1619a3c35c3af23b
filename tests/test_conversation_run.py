"""Rows without labels through all stages with the offline base: real dialogues, and made ones with thinking."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lib.errors import InputError
from lib.models import offline_base
from lib.models.base_model import base_of
from lib.models.loading import load_model, load_tokenizer
from lib.prompts.tasks import read_task
from lib.runs.files import HOME_VARIABLE, read_json, read_jsonl
from lib.runs.machine import llama_cpp_problem
from lib.runs.run import Run, open_run
from lib.scoring.llama_backend import LlamaCppBackend
from lib.scoring.log_probabilities import AnswerScores
from lib.scoring.metric import ANSWER_PERPLEXITY
from lib.scoring.torch_backend import TransformersBackend
from lib.scoring.word_lists import read_prompts
from lib.settings import Settings, check
from lib.stages.compare import stage as compare_stage
from lib.stages.convert import stage as convert_stage
from lib.stages.data import stage as data_stage
from lib.stages.evaluate import stage as evaluate_stage
from lib.stages.export import stage as export_stage
from lib.stages.finetune import stage as finetune_stage
from lib.stages.merge import stage as merge_stage
from lib.stages.quantize import stage as quantize_stage

pytestmark = [
    pytest.mark.skipif(llama_cpp_problem() is not None, reason="llama-cpp-python does not work here"),
    pytest.mark.usefixtures("unmeasured_children", "forked_children"),
]

TINY = offline_base.BaseRecipe(
    layers=1, hidden=64, intermediate=64, heads=2, kv_heads=1, window=64, batch=4, min_tokens=20_000, max_tokens=20_000
)
SHARED = {
    "system_prompt": "你是助手。",
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 4,
    "save_steps": 10,
    "dtype": "float32",
    "lora_r": 4,
    "generated_rows": 2,
    "max_new_tokens": 8,
    "terms": "counselling",
    "ladder": ["Q8_0"],
    "export_formats": ["bf16"],
    "gate_max_kld": 1.0e-3,
}


def thinking_rows(path: Path) -> Path:
    """Sums with their reasoning, in the seeds' form."""
    rng = random.Random(1)
    rows = []
    for i in range(70):
        a, b = rng.randrange(100), rng.randrange(100)
        output = f"<thinking>\n先算个位，再算十位：{a}和{b}。\n</thinking>\n\n等于{a + b}。"
        rows.append({"instruction": f"第{i}题，{a}加{b}等于多少？", "input": "", "output": output, "difficulty": 1})
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def run_stages(settings: Settings) -> dict:
    """All results by stage."""
    run = open_run(settings.run_name)
    return {
        "run": run,
        "data": data_stage.prepare(settings, run),
        "adapter": finetune_stage.finetune(settings, run),
        "evaluation": evaluate_stage.evaluate(settings, run),
        "merged": merge_stage.merge(settings, run),
        "gguf": convert_stage.export(settings, run),
        "quantized": quantize_stage.quantize(settings, run),
        "exports": export_stage.export(settings, run),
        "comparison": compare_stage.compare(settings, run),
    }


@pytest.fixture(scope="module", params=["thinking", "smile"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOME_VARIABLE, str(home))
        patch.setattr(offline_base, "BaseRecipe", lambda **changes: replace(TINY, **changes))
        values = {**SHARED, "run_name": request.param}
        if request.param == "thinking":
            source = thinking_rows(home / "sums.json")
            values |= {"task": "instruction", "thinking": True, "max_seq_length": 192, "export_formats": []}
        else:
            shared = request.getfixturevalue("shared_data") / "smile_chat" / "smile_student_3000.jsonl"
            source = home / "smile.jsonl"
            source.write_text("\n".join(shared.read_text(encoding="utf-8").splitlines()[:70]), encoding="utf-8")
            values |= {"task": "dialogue", "max_seq_length": 384}
        yield run_stages(check({**values, "dataset": str(source)}, "the test"))


def formats(results: dict) -> list[str]:
    """Folders beside the GGUF files: one run has them, the other does without."""
    return [] if results["run"].name == "thinking" else ["bf16"]


def encoded_rows(run: Run, split: str) -> tuple[list[dict], list]:
    folder = run.require("data").path
    task, tokenizer = read_task(folder), load_tokenizer(folder / "tokenizer")
    rows = read_jsonl(folder / f"{split}.jsonl")
    return rows, [task.encode(tokenizer, row) for row in rows]


def test_training_lowers_the_loss_of_the_answers(results: dict) -> None:
    history = [row["eval_loss"] for row in results["adapter"].history if "eval_loss" in row]
    part = results["evaluation"].content["parts"]["all"]
    assert part["finetuned"]["loss"] < part["base"]["loss"]
    assert np.isfinite(history).all()


def test_scores_are_those_of_the_model_itself(results: dict) -> None:
    """Oracle: transformers' own loss over the labels, one row at a time."""
    import torch

    run, result = results["run"], results["evaluation"]
    rows, encoded = encoded_rows(run, "test")
    model = load_model(base_of(run).path, dtype="float32")
    scores = result.scores["base"]
    assert scores.ids == [row["id"] for row in rows]
    for i, conversation in enumerate(encoded):
        ids = torch.tensor([conversation.ids])
        labels = torch.full_like(ids, -100)
        for place in conversation.loss:
            labels[0, place] = ids[0, place]
        with torch.inference_mode():
            loss = model(input_ids=ids, labels=labels).loss.item()
        assert scores.row_losses[i] == pytest.approx(loss, rel=1e-4)
        assert scores.tokens[i] == len(conversation.loss)
    part = result.content["parts"]["all"]
    assert part["base"]["perplexity"] == pytest.approx(np.exp(-scores.log_probs.sum() / scores.tokens.sum()))
    assert part["ratio"] == pytest.approx(part["finetuned"]["perplexity"] / part["base"]["perplexity"])
    low, high = part["difference_interval"]
    assert low <= part["difference"] <= high


def test_a_few_answers_can_be_read(results: dict) -> None:
    generated = results["evaluation"].generated
    assert len(generated) == 2 and results["evaluation"].content["decoding"]["method"] == "greedy"
    for row in generated:
        assert row["question"] and row["reference"]
        assert all(row["tokens"][name] <= 8 for name in ("base", "fine-tuned"))


def test_what_the_models_write_is_measured_and_prompts_are_answered(results: dict) -> None:
    result = results["evaluation"]
    found = {entry["key"]: entry for entry in result.content["answers"]}
    thinking = results["data"].task.thinking
    assert ("think" in found) == thinking and found["intact"]["n"] == 2
    assert result.content["terms"]["name"] == "counselling" and result.content["chrf"].startswith("nrefs:1|")
    for row in result.generated:
        assert row["measured"]["base"]["stopped"] == row["ended"]["base"]
    assert [entry["prompt"] for entry in result.prompts["prompts"]] == [
        e["prompt"] for e in read_prompts("counselling")
    ]
    for entry in result.prompts["prompts"]:
        for own in entry["answers"].values():
            assert own["greedy"]["first_token_seconds"] > 0 and own["sampled"]["tokens"] <= 8
        alike = [own["greedy"]["same_start"] for own in entry["answers"].values()]
        assert alike[0] is None and 0 <= alike[1] <= 1
    kept = read_json(result.product.path / "prompts.json")
    assert kept == result.prompts and kept["system_prompt"] == "你是助手。" and kept["set"] == "counselling"


def test_every_gguf_file_writes_answers_to_the_same_rows(results: dict) -> None:
    from lib.report.compare_page import AnswerPage

    result, before = results["comparison"], results["evaluation"]
    models = ["F16", "Q8_0", "merged"]
    assert list(result.written["same_text"]) == models and result.written["same_text"]["F16"] == 2
    assert [row["id"] for row in result.generated] == [row["id"] for row in before.generated]
    assert [row["question"] for row in result.generated] == [row["question"] for row in before.generated]
    metrics = {entry["key"]: entry for entry in result.written["metrics"]}
    assert set(metrics["chrf"]["differences"]) == {"Q8_0", "merged"}
    assert result.prompts["set"] == "counselling" and len(result.prompts["prompts"]) == 5
    for one in (*result.generated, *result.prompts["prompts"]):
        assert list(one["answers"]) == models
        assert one["answers"]["F16"]["chrf"] is None and one["answers"]["merged"]["first_token_seconds"] > 0
        texts = [answer["text"] for answer in one["answers"].values()]
        assert [answer["same_text"] for answer in one["answers"].values()][1:] == [
            text == texts[0] for text in texts[1:]
        ]
    page = AnswerPage(result)
    values, differences, alike, _ = (re.findall(r"<tr><td>([^<]+)</td>", table.data) for table in page.written())
    assert values == alike == models and differences == models[1:]
    assert "counselling" not in page.written()[3].data and "5 prompts" in page.written()[3].data
    assert "2 test rows, at most 8 tokens" in page.written()[0].data
    assert page.disagreements()[0].data.startswith("- Q8_0: ")
    assert result.prompts["prompts"][0]["prompt"] in page.written()[3].data


def test_the_gate_compares_answers_without_labels(results: dict) -> None:
    gate = results["gguf"].gate
    assert gate.label_agreement is None and gate.rows == 0 and gate.positions > 20
    assert gate.mean_kld < 1e-3 and gate.same_top > 0.9
    assert results["merged"].check.mean_kld < results["merged"].check.max_kld


def test_files_and_exports_are_made(results: dict) -> None:
    assert [file.type for file in results["quantized"].files] == ["Q8_0"]
    assert [made["format"] for made in results["exports"].made] == formats(results)


def test_the_comparison_judges_by_answer_perplexity(results: dict) -> None:
    result = results["comparison"]
    assert result.metric is ANSWER_PERPLEXITY and [e["type"] for e in result.files] == [
        "F16",
        "Q8_0",
        *formats(results),
    ]
    reference, q8, *_ = result.files
    part = results["evaluation"].content["parts"]["all"]
    assert reference["answer_ppl"] == pytest.approx(part["finetuned"]["perplexity"], rel=0.02)
    assert reference["n"] == part["n"] and reference["answer_tokens"] == part["tokens"]
    assert q8["answer_ratio"] == pytest.approx(q8["answer_ppl"] / reference["answer_ppl"])
    low, high = q8["answer_ratio_interval"]
    assert low <= q8["answer_ratio"] <= high and 0.97 < q8["answer_ratio"] < 1.03
    assert q8["kld_mean"] > 0 and q8["same_top"] > 0.8
    assert q8["verdict"].startswith(("good enough", "not shown", "worse", "no verdict"))
    _, train = encoded_rows(results["run"], "train")
    _, test = encoded_rows(results["run"], "test")
    seen = Counter(conversation.ids[i] for conversation in train for i in conversation.loss)
    size = len(load_tokenizer(results["run"].require("data").path / "tokenizer"))
    total = sum(seen.values()) + size
    losses = [-np.log((seen[c.ids[i]] + 1) / total) for c in test for i in c.loss]
    assert result.conditions["unigram_ppl"] == pytest.approx(np.exp(np.mean(losses)))
    if result.conditions["unigram_ppl"] <= reference["answer_ppl_interval"][1]:
        assert result.recommendation["reason"] in ("unlearned", "few") and result.recommendation["type"] is None
    assert "perplexity" in result.recommendation["rule"] and "accuracy" not in result.recommendation["text"]


def test_the_error_ladder_goes_from_the_adapter_to_the_quantized_file(results: dict) -> None:
    """Every step's loss against the scores of 03 and 07, and the two models that only the ladder needs."""
    from lib.report import steps_page

    result, folder = results["comparison"], results["comparison"].product.path
    dtype = results["merged"].product.entry.facts["dtype"]
    assert [step["name"] for step in result.steps] == [
        "adapter (LoRA), transformers (float32)",
        f"merged, transformers ({dtype})",
        *(["merged, transformers (float32)"] if dtype != "float32" else []),
        "GGUF F16, llama.cpp",
        "weights of Q8_0, transformers (float32)",
        "Q8_0, llama.cpp",
    ]
    adapter, merged, *_, f16, _, q8 = result.steps
    assert result.steps_note == ""
    if dtype != "float32":
        assert result.steps[2]["before"]["moved"] > 10 * f16["before"]["moved"], "16-bit arithmetic, not the runtime"
    part = results["evaluation"].content["parts"]["all"]
    assert {key: adapter[key] for key in part["finetuned"]} == part["finetuned"]
    assert adapter["before"] is None and adapter["n"] == part["n"] and adapter["tokens"] == part["tokens"]
    assert f16["loss"] == result.files[0]["answer_loss"] and q8["loss"] == result.files[1]["answer_loss"]
    assert q8["loss"] - f16["loss"] == pytest.approx(result.files[1]["loss_difference"], abs=1e-12)
    for before, step in zip(result.steps, result.steps[1:], strict=False):
        assert step["before"]["loss_difference"] == pytest.approx(step["loss"] - before["loss"], abs=1e-9)
        assert step["first"]["loss_difference"] == pytest.approx(step["loss"] - adapter["loss"], abs=1e-9)
        low, high = step["before"]["loss_difference_interval"]
        assert low <= step["before"]["loss_difference"] <= high and 0 < step["before"]["moved"] < 0.05
    assert merged["before"]["agreement"] == 1
    _, encoded = encoded_rows(results["run"], "test")
    model = TransformersBackend(load_model(results["merged"].product.path, dtype=dtype), 4)
    wanted = model.token_log_probs([e.ids for e in encoded], [e.spans for e in encoded])
    saved = AnswerScores.load(folder / "scores-merged.jsonl")
    np.testing.assert_allclose(saved.log_probs, [values.sum() for values in wanted], rtol=1e-4)
    ladder, table, reading = (shown.data for shown in steps_page.shown(result.steps, ""))
    assert re.findall(r"<tr><td>([^<]+)</td>", table) == [step["name"] for step in result.steps]
    assert "less than 1 %" in table and " → " in reading and "<figcaption>" in ladder


def test_what_the_pages_show(results: dict) -> None:
    from lib.report import compare_page, data_page, evaluate_page, weights_page

    made, result = results["data"], results["evaluation"]
    shown = data_page.page_of(made)
    assert f"of {len(made.rows('test'))} test row" in shown.leaks().data
    assert str(made.example["loss_tokens"]) in shown.example().data
    assert f"thinking is {'on' if made.task.thinking else 'off'}" in shown.learned().data
    assert "cannot write an answer" in shown.floor().data and "contradict" in shown.conflicts().data
    assert "turns" in shown.shape().data and shown.source().data and shown.flow().data and shown.changes().data
    page = evaluate_page.page_of(result)
    assert all(name in page.parts().data for name in ("base", "fine-tuned")) and "<img" in page.quality().data
    assert (
        f"{result.part['ratio']:.3f}" in page.verdict().data
        and f"{result.part['ratio']:.3f}"[:4] in page.compared().data
    )
    assert page.examples().data.count("test-0") == 2 and "greedy" in page.examples().data
    assert f"{result.part['base']['perplexity']:.2f}" in page.learned().data
    parts = (page.errors, page.error_table, page.reading, page.believed, page.certainty, page.speed, page.prompts)
    assert all(part().data for part in parts)
    compared = compare_page.page_of(results["comparison"])
    (power,) = compared.detectable()
    assert "the margin is 1 %" in power.data and "answer perplexity" in compared.sizes().data
    assert all(entry["type"] in compared.quality().data for entry in results["comparison"].others)
    parts = (
        compared.tests,
        compared.written,
        compared.speeds,
        compared.divergences,
        compared.disagreements,
        compared.kept,
    )
    assert all(shown.data for part in parts for shown in part() if shown)
    assert "does not apply" in str(weights_page.gate(results["gguf"].gate))


def test_the_command_line_evaluates_and_compares_answers(results: dict, tmp_path: Path) -> None:
    from lib.cli.evaluate import OpeningOptions, RowOptions, compare, evaluate

    name, part = results["run"].name, results["evaluation"].content["parts"]["all"]
    output, options = tmp_path / "evaluation.json", {"rows_from": RowOptions(run_name=name), "as_json": True}
    opening = OpeningOptions(n_threads=1, dtype="float32")
    merged, f16 = results["merged"].product.path, results["gguf"].path
    evaluate([str(merged), str(f16)], opening=opening, output=output, batch_size=2, **options)
    ours, llama = read_json(output)["models"]
    assert ours["perplexity"] == pytest.approx(part["finetuned"]["perplexity"], rel=1e-2)
    assert ours["perplexity_interval"] == pytest.approx(part["finetuned"]["perplexity_interval"], rel=2e-2)
    assert llama["perplexity"] == pytest.approx(ours["perplexity"], rel=0.02)
    assert ours["n"] == part["n"] and ours["answer_tokens"] == llama["answer_tokens"] == part["tokens"]
    cut, encoded = encoded_rows(results["run"], "test")
    said = [[m["content"] for m in row["messages"] if m["role"] == "assistant"] for row in cut]
    characters = sum(sum(len(texts[i]) for i in e.answers) for texts, e in zip(said, encoded, strict=True))
    assert ours["bits_per_character"] == pytest.approx(ours["loss"] * part["tokens"] / np.log(2) / characters)
    q8 = next(results["quantized"].product.path.glob("*.gguf"))
    compare(f16, [q8], tmp_path / "compared", n_threads=1, **options)
    made, product = read_json(tmp_path / "compared" / "comparison.json"), results["comparison"]
    assert made["files"][1]["answer_ppl"] == pytest.approx(product.files[1]["answer_ppl"])
    assert made["conditions"]["unigram_ppl"] == product.conditions["unigram_ppl"]


def test_conversations_in_a_file_are_scored_as_those_of_the_run(
    results: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lib.cli.evaluate import OpeningOptions, RowOptions, compare, evaluate

    test = results["run"].folder / "data" / "test.jsonl"
    rows = [json.loads(line)["messages"] for line in test.read_text(encoding="utf-8").splitlines()]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    f16, part = results["gguf"].path, results["evaluation"].content["parts"]["all"]
    most = results["data"].task.max_seq_length
    options: dict = {"rows_from": RowOptions(str(data), max_seq_length=most), "as_json": True}
    evaluate([str(f16)], opening=OpeningOptions(n_threads=1), output=tmp_path / "evaluation.json", **options)
    (made,) = read_json(tmp_path / "evaluation.json")["models"]
    assert made["perplexity"] == pytest.approx(part["finetuned"]["perplexity"], rel=0.02)
    assert made["answer_tokens"] == part["tokens"] and made["leak_free"] is None
    q8 = next(results["quantized"].product.path.glob("*.gguf"))
    compare(f16, [q8], tmp_path / "compared", n_threads=1, **options)
    entry, known = read_json(tmp_path / "compared" / "comparison.json")["files"][1], results["comparison"].files[1]
    assert entry["answer_ppl"] == pytest.approx(known["answer_ppl"])
    assert "rows.jsonl: conversations (task " in capsys.readouterr().err


def test_the_command_line_says_that_there_are_no_labels(results: dict) -> None:
    from lib.cli.evaluate import RowOptions

    name = results["run"].name
    with pytest.raises(InputError, match=r"--label-names, --text-column for run .*rows without labels"):
        RowOptions("rows.csv", name, label_names="a,b", text_column="c").task()
    with pytest.raises(InputError, match=r"--system-prompt for run"):
        RowOptions(None, name, system_prompt="a").task()
    assert RowOptions(None, name, max_seq_length=99).task().max_seq_length == 99


def test_llama_cpp_scores_the_same_answers(results: dict) -> None:
    _, encoded = encoded_rows(results["run"], "test")
    chosen = encoded[:4]
    ids, spans = [e.ids for e in chosen], [e.spans for e in chosen]
    merged = TransformersBackend(load_model(results["merged"].product.path, dtype="float32"), 2)
    wanted = merged.token_log_probs(ids, spans)
    with LlamaCppBackend(results["gguf"].path, 512, 1, cache_type="f32", flash_attention=False) as backend:
        found = backend.token_log_probs(ids, spans)
    for one, other in zip(wanted, found, strict=True):
        assert len(one) == len(other) and np.abs(one - other).max() < 0.05
    assert sum(map(len, wanted)) == sum(len(e.loss) for e in chosen)
