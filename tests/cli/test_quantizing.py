"""`workbook quantize` under a size budget: the stage's own choice, from a model folder and a text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import pytest

from lib.cli.perplexity import read_text
from lib.errors import InputError
from lib.runs.files import sha256_file
from lib.runs.machine import llama_cpp_problem
from lib.stages.convert.convert import convert
from lib.stages.quantize.files import Options, predict_sizes
from lib.stages.quantize.llama_library import read_imatrix
from lib.stages.quantize.size_budget import budget_bytes
from tests import tiny_run
from tests.cli.test_cli import workbook

pytestmark = [
    pytest.mark.skipif(llama_cpp_problem() is not None, reason="llama-cpp-python does not work here"),
    pytest.mark.usefixtures("forked_children"),
]
BUDGET_MB = 0.12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, m-F32.gguf made from it, other/ (other weights), adapter/, and reviews.txt."""
    folder = tmp_path_factory.mktemp("budget")
    tiny_run.make_base(folder / "base")
    tiny_run.make_base(folder / "other", seed=5)
    tiny_run.make_adapter(folder / "base", folder / "adapter")
    convert(folder / "base", folder / "m-F32.gguf", "f32")
    (folder / "reviews.txt").write_text("\n\n".join(tiny_run.texts(200)), encoding="utf-8")
    return folder


def options(folder: Path, model: str = "base", megabytes: float | str = BUDGET_MB) -> list[str]:
    return [
        *("--size-budget-mb", str(megabytes), "--model", str(folder / model), "--text", str(folder / "reviews.txt")),
        *("--n-ctx", "64"),
    ]


@pytest.fixture(scope="module")
def made(folder: Path) -> dict[str, dict]:
    """What the command reports of m-Q8_0.gguf and m-MIX_120KB.gguf, which it has put into out/."""
    command = ("quantize", str(folder / "m-F32.gguf"), str(folder / "out"), "Q8_0", *options(folder), "--json")
    answer = workbook(*command)
    assert answer.returncode == 0, answer.stderr
    return {report["type"]: report for report in json.loads(answer.stdout)["files"]}


def test_the_file_keeps_the_budget_and_says_how(folder: Path, made: dict[str, dict]) -> None:
    report, out = made["MIX_120KB"], folder / "out" / "m-MIX_120KB.gguf"
    assert sorted(path.name for path in out.parent.iterdir()) == ["m-MIX_120KB.gguf", "m-Q8_0.gguf"]
    assert out.stat().st_size == report["bytes"] <= BUDGET_MB * 1e6 < made["Q8_0"]["bytes"]
    reader = gguf.GGUFReader(out)
    types = {tensor.name: tensor.tensor_type.name.lower() for tensor in reader.tensors}
    assert {name: kind.lower() for name, kind in report["mix"]["types"].items()}.items() <= types.items()
    assert len(set(report["mix"]["types"].values())) > 1 and report["mix"]["predicted_kld"] > 0
    rows = reader.fields["quantize.mix.rows"].contents()
    assert rows == f"reviews.txt, 16 windows of 64 tokens, sha256 {sha256_file(folder / 'reviews.txt')}"
    seen = workbook("inspect", str(out))
    assert "types chosen by measurement under a budget of 120000 bytes" in seen.stdout, seen.stdout + seen.stderr


def test_rows_of_a_run_have_answers_and_a_text_has_none(
    folder: Path, tmp_path: Path, made: dict[str, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the weight that was asked for; a text decides alone, and both are said."""
    monkeypatch.setenv("WORKBOOK_HOME", str(tmp_path / "home"))
    data = tiny_run.make_run(folder / "base").folder / "data"
    common = ("quantize", str(folder / "m-F32.gguf"), str(tmp_path / "a.gguf"), "--size-budget-mb", str(BUDGET_MB))
    command = (*common, "--model", str(folder / "base"), "--n-ctx", "64", "--dry-run")
    told = workbook(*command, "--data", str(data), "--answer-weight", "0.75", "--json")
    assert told.returncode == 0, told.stderr
    mix = json.loads(told.stdout)["files"][0]["mix"]
    assert mix["answer_weight"] == 0.75 and mix["answers"]["rows"] > 0 and mix["predicted_answer_kld"] > 0
    assert made["MIX_120KB"]["mix"]["answers"] is None and made["MIX_120KB"]["mix"]["answer_weight"] == 0
    refused(workbook(*command, "--data", str(data), "--text", str(folder / "reviews.txt")), "one of the two", None)
    refused(workbook(*command, "--data", str(folder / "base")), "no train.jsonl and task.json", None)


def test_the_dry_run_tells_its_size_and_writes_nothing(folder: Path, tmp_path: Path, made: dict[str, dict]) -> None:
    command = ("quantize", str(folder / "m-F32.gguf"), str(tmp_path / "small.gguf"), *options(folder), "--dry-run")
    told = workbook(*command)
    assert told.returncode == 0 and not any(tmp_path.iterdir()), told.stderr
    assert "MIX_120KB: predicted KL divergence from the source" in told.stdout
    assert "of text alone: it has no answers" in told.stdout
    assert str(made["MIX_120KB"]["bytes"]) in re.sub(r"(?<=\d),(?=\d)", "", told.stdout)


def test_an_importance_matrix_of_a_text(folder: Path, tmp_path: Path) -> None:
    """It names the text, covers every layer, and quantize takes it."""
    out, text = tmp_path / "own.gguf", folder / "reviews.txt"
    command = ("imatrix", str(folder / "base"), str(out), "--text", str(text), "--n-ctx", "64", "--chunks", "4")
    made = workbook(*command, "--json")
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stdout)
    dataset = f"reviews.txt, 4 windows of 64 tokens, sha256 {sha256_file(text)}"
    assert told["dataset"] == dataset and told["text_sha256"] == sha256_file(text)
    assert told["entries"] == 14 and told["tokens"] == 256 and 4 < told["rows"] < 200
    matrix = read_imatrix(out)
    assert matrix.dataset == dataset and matrix.chunks == 4
    layers = {t.name for t in gguf.GGUFReader(folder / "m-F32.gguf").tensors if t.name.startswith("blk.")}
    assert matrix.values.keys() == {name for name in layers if not name.endswith(("norm.weight", "bias"))}
    (row,) = predict_sizes(folder / "m-F32.gguf", ["Q4_0"], Options(out))
    assert row["bytes"] > 0 and sorted(path.name for path in tmp_path.iterdir()) == ["own.gguf"]


REFUSED = {
    "no model": (("--size-budget-mb", "1"), "--size-budget-mb without --model and --text"),
    "no budget": (("--model", "x"), "--model without --size-budget-mb and --text"),
    "a column alone": (("Q4_0", "--text-column", "a"), "--text-column without --text"),
    "windows alone": (("Q4_0", "--n-ctx", "64"), "--n-ctx without --text or --data"),
    "a weight alone": (("Q4_0", "--answer-weight", "0.3"), "--answer-weight without --data"),
    "two budgets": (("--size-budget-mb", "1", "--bits-per-weight", "4"), "one budget in two units"),
    "bits alone": (("--bits-per-weight", "4"), "--bits-per-weight without --model and --text"),
    "nothing": ((), "no type"),
    "single tensors alone": (("--tensor-type", "attn_v=q8_0"), "without a TYPE"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_lacks_is_named(case: str, folder: Path, tmp_path: Path) -> None:
    arguments, words = REFUSED[case]
    refused(workbook("quantize", str(folder / "m-F32.gguf"), str(tmp_path / "a.gguf"), *arguments), words, tmp_path)


@pytest.mark.parametrize(
    ("model", "megabytes", "words"),
    [
        ("other", BUDGET_MB, "has other rows than in the model folder"),
        ("adapter", BUDGET_MB, "is a LoRA adapter"),
        ("base", 0.02, "the smallest file of the types tried"),
    ],
)
def test_what_cannot_be_is_refused(model: str, megabytes: float, words: str, folder: Path, tmp_path: Path) -> None:
    command = ("quantize", str(folder / "m-F32.gguf"), str(tmp_path / "a.gguf"), *options(folder, model, megabytes))
    refused(workbook(*command), words, tmp_path)


def test_a_budget_that_is_no_size(folder: Path, tmp_path: Path) -> None:
    arguments = options(folder, "base", "inf")
    made = workbook("quantize", str(folder / "m-F32.gguf"), str(tmp_path / "a.gguf"), *arguments)
    assert made.returncode == 2 and "--size-budget-mb" in made.stderr and "Traceback" not in made.stderr, made.stderr
    for nothing in ((float("nan"), 0.0), (float("inf"), 0.0), (0.0, 0.0), (0.0, float("nan")), (0.0, 33.0)):
        with pytest.raises(InputError, match="a size budget of"):
            budget_bytes(folder / "m-F32.gguf", *nothing)


def test_a_missing_text_is_named_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"no file {tmp_path / 'nofile.txt'}"):
        read_text(Path("nofile.txt"))


def test_another_suffix_is_no_folder(folder: Path, tmp_path: Path) -> None:
    command = ("quantize", str(folder / "m-F32.gguf"), str(tmp_path / "out.bin"), "Q8_0")
    refused(workbook(*command), "a name that ends with .gguf, or a folder", tmp_path)


def refused(answer, words: str, folder: Path | None) -> None:
    assert answer.returncode == 2 and answer.stdout == "" and words in answer.stderr, answer.stderr
    assert "Traceback" not in answer.stderr and "Do this: " in answer.stderr
    assert folder is None or list(folder.iterdir()) == []
