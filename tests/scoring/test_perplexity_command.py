"""`workbook perplexity` against the printed output of the real llama-perplexity; its texts, intervals, errors."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from lib.cli import perplexity as command
from lib.errors import InputError
from lib.scoring import perplexity
from lib.scoring.measure import FEWEST_DOCUMENTS, Text, measure_in_child, summarize, tokenize_with_transformers
from lib.scoring.perplexity import Positions, percentiles, positions, table_of
from tests import tiny_gguf
from tests.scoring import tiny

pytestmark = pytest.mark.usefixtures("forked_children")

PROJECT = Path(__file__).resolve().parents[2]


def golden_text() -> str:
    """60 documents of 16 printable characters, made by integer arithmetic."""
    characters = [chr(34 + (i * i * 7 + i * 13 + (i >> 3) * 5) % 90) for i in range(960)]
    return "\n\n".join("".join(characters[i : i + 16]) for i in range(0, 960, 16)) + "\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("perplexity")
    tiny.golden_pair(folder / "a.gguf", folder / "b.gguf")
    (folder / "text.txt").write_text(golden_text(), encoding="utf-8")
    return folder


def workbook(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lib.cli", "perplexity", *arguments, "--n-threads", "1"]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120)


# Printed by llama-perplexity of the llama.cpp in llama-cpp-python 0.3.36 (its sources, linked against the wheel's
# libraries), default cache and flash attention, for the files of tiny.golden_pair and golden_text():
#   llama-perplexity -m a.gguf -f text.txt -c 128 -t 1 --kl-divergence-base base.kld
#   llama-perplexity -m b.gguf -f text.txt -c 128 -t 1 --kl-divergence-base base.kld --kl-divergence
# key: (printed, decimals); what the tool prints in percent is a fraction here.
PRINTED = {
    "ppl": (457.358651, 6),
    "ppl_uncertainty": (23.429419, 6),
    "ppl_reference": (456.937044, 6),
    "ppl_reference_uncertainty": (23.309100, 6),
    "ln_ppl_ratio": (0.000922, 6),
    "ln_ppl_ratio_uncertainty": (0.003135, 6),
    "ppl_ratio": (1.000923, 6),
    "ppl_ratio_uncertainty": (0.003137, 6),
    "ppl_difference": (0.421607, 6),
    "ppl_difference_uncertainty": (1.434616, 6),
    "kld_mean": (0.002647, 6),
    "kld_uncertainty": (0.000040, 6),
    "kld_max": (0.006917, 6),
    "kld_p999": (0.006799, 6),
    "kld_p99": (0.006039, 6),
    "kld_p95": (0.004311, 6),
    "kld_p90": (0.003721, 6),
    "kld_median": (0.002493, 6),
    "kld_p10": (0.001715, 6),
    "kld_p05": (0.001570, 6),
    "kld_p01": (0.001322, 6),
    "kld_p001": (0.001155, 6),
    "kld_min": (0.001145, 6),
    "ppl_correlation": (0.9981, 4),
    "mean_dp": (0.00002, 5),
    "mean_dp_uncertainty": (0.00002, 5),
    "dp_max": (0.00314, 5),
    "dp_p999": (0.00291, 5),
    "dp_p99": (0.00171, 5),
    "dp_p95": (0.00067, 5),
    "dp_p90": (0.00033, 5),
    "dp_p75": (0.00009, 5),
    "dp_median": (-0.000, 5),
    "dp_p25": (-0.00008, 5),
    "dp_p10": (-0.00028, 5),
    "dp_p05": (-0.00059, 5),
    "dp_p01": (-0.00111, 5),
    "dp_p001": (-0.00274, 5),
    "dp_min": (-0.00282, 5),
    "rms_dp": (0.00047, 5),
    "rms_dp_uncertainty": (0.00004, 5),
    "same_top": (0.89683, 5),
    "same_top_uncertainty": (0.01356, 5),
}
"""Other processors round differently in the model itself: three of the last digits for the large numbers."""
OTHER = {"ppl_difference": 1.5e-3, "ppl_difference_uncertainty": 5e-5}
"""What that leaves of the small numbers, by key (1e-5 for all others): with AVX2 alone the perplexities are 2e-6 of
themselves off, so their difference is 0.0008, and single positions' KL divergence 9e-6. Where the perplexity is the
printed one to the last digits, every other number must be, too."""


def test_prints_what_llama_perplexity_prints(files: Path):
    text = str(files / "text.txt")
    answer = workbook(
        *(str(files / "b.gguf"), "--reference", str(files / "a.gguf")), "--text", text, "--n-ctx", "128", "--json"
    )
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    for key, (printed, decimals) in PRINTED.items():
        strict = 1.5 * 10.0**-decimals
        last = (
            strict if found["ppl"] == pytest.approx(PRINTED["ppl"][0], abs=2e-6) else max(strict, OTHER.get(key, 1e-5))
        )
        assert found[key] == pytest.approx(printed, abs=last, rel=3e-6), key
    assert (found["n_tokens"], found["n_windows"], found["n_documents"]) == (504, 8, 36)
    for key, inside in (("ppl_interval", "ppl"), ("kld_mean_interval", "kld_mean"), ("same_top_interval", "same_top")):
        low, high = found[key]
        assert low < found[inside] < high
    assert found["note"] == ""


def test_alone_and_as_text(files: Path):
    answer = workbook(str(files / "b.gguf"), "--text", str(files / "text.txt"), "--n-ctx", "128", "--chunks", "3")
    assert answer.returncode == 0, answer.stderr
    head, line, note = answer.stdout.splitlines()
    assert head == "tokens scored: 189 of 15 documents, 3 windows of 128"
    assert line.startswith("PPL   ") and "[" not in line
    assert note == f"15 documents scored; intervals over documents need {FEWEST_DOCUMENTS}"


@pytest.mark.parametrize(
    ("model", "text", "words"),
    [
        ("a.gguf", "short.txt", "Found: a text of 100 tokens. Expected: at least one window of 512 tokens (--n-ctx)"),
        ("a.gguf", "no.txt", "no file"),
        ("a.gguf", "latin.txt", "is not UTF-8: line 1, byte 3"),
        ("a.gguf", "empty.txt", "holds no text"),
        ("a.gguf", "table.csv", "one with the text"),
        ("no.gguf", "text.txt", "no file or folder"),
        ("text.txt", "text.txt", "text.txt"),
    ],
)
def test_refused_in_one_paragraph(files: Path, model: str, text: str, words: str):
    (files / "short.txt").write_text("x" * 100, encoding="utf-8")
    (files / "latin.txt").write_bytes("caf\xe9 \xe9".encode("latin-1") + b" x")
    (files / "empty.txt").write_text(" \n\n", encoding="utf-8")
    (files / "table.csv").write_text("number,label\n1,0\n", encoding="utf-8")
    answer = workbook(str(files / model), "--text", str(files / text), "--json")
    assert answer.returncode == 2 and answer.stdout == ""
    assert words in answer.stderr and "Do this:" in answer.stderr and "Traceback" not in answer.stderr


def test_documents_end_at_blank_lines():
    text = Text.of_file("eins\nzwei\n\n \n好的\n\n\nvier\n")
    assert text.content == "eins\nzwei\n\n \n好的\n\n\nvier"
    assert [text.content[a:][:4].strip() for a in text.starts] == ["eins", "好的", "vier"]
    assert text.documents_at(np.array([0, 11, 13, 14, 19]), "characters").tolist() == [0, 0, 1, 1, 2]
    assert text.documents_at(np.array([13, 18, 19, 22]), "bytes").tolist() == [1, 1, 1, 2]


def test_one_document_a_row(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "好\n\n好"}, {"text": " "}, {"text": "b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = command.read_text(path)
    assert text.content == "好\n\n好\n\nb" and text.starts == (0, 6)
    path.write_text("".join(json.dumps({"body": "c", "n": 1}) + "\n"), encoding="utf-8")
    assert command.read_text(path, "body").content == "c"
    with pytest.raises(InputError, match="text_column"):
        command.read_text(path)


def test_rows_of_all_splits_or_of_one(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"text": f"row {i} of {split}" if i else None, "split": split} for split in ("test", "train") for i in range(3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert command.read_text(path).content == "\n\n".join(
        f"row {i} of {split}" for split in ("test", "train") for i in (1, 2)
    )
    assert "2 of 6 rows left out (2 without a text)" in capsys.readouterr().err
    assert command.read_text(path, split="train").content == "row 1 of train\n\nrow 2 of train"
    assert "4 of 6 rows left out (3 of test, 1 without a text)" in capsys.readouterr().err
    (tmp_path / "text.txt").write_text("a")
    with pytest.raises(InputError, match="is no table"):
        command.read_text(tmp_path / "text.txt", "text")


def test_an_importance_matrix_is_measured_on_training_rows(tmp_path, monkeypatch):
    from lib.cli import quantize
    from lib.stages.quantize import calibration

    path, asked = tmp_path / "rows.jsonl", []
    rows = [{"text": f"a row of {split}", "split": split} for split in ("test", "train")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = dict.fromkeys(("rows", "entries", "tokens"), 0) | {"dataset": ""}
    monkeypatch.setattr(calibration, "measure_imatrix", lambda model, output, text, *more: asked.append(text) or made)
    quantize.imatrix(tmp_path, tmp_path / "x.gguf", path)
    budget = quantize.BudgetOptions(size_budget_mb=1.0, model=tmp_path, text=path)
    asked.append(budget.budget(tiny_gguf.write(tmp_path / "m.gguf")).text)
    assert [text.content for text in asked] == ["a row of train", "a row of train"]


def test_a_folder_beside_its_file(small):
    """The same weights in transformers and in llama.cpp: the same ids, documents and numbers."""
    text = Text.of_rows(tiny.texts(150))
    small.model.save_pretrained(small.folder)
    shared = {"text": asdict(text), "n_ctx": 64, "chunks": 0, "n_threads": 1}
    shared["n_gpu_layers"] = 0
    gguf, folder = str(small.gguf), str(small.folder)
    file = measure_in_child({"model": gguf, "reference": None, **shared})
    both = measure_in_child({"model": folder, "reference": gguf, **shared})
    alone = measure_in_child({"model": folder, "reference": None, **shared})
    assert file["n_documents"] == alone["n_documents"] == both["n_documents"] > FEWEST_DOCUMENTS
    assert alone["ppl"] == pytest.approx(file["ppl"], rel=2e-4)  # beside a 16-bit cache
    assert both["ppl"] == pytest.approx(alone["ppl"], rel=1e-6) and 0 <= both["kld_mean"] < 2e-5
    assert alone["note"] == both["note"] == ""
    assert alone["kld_mean"] is None and alone["same_top_interval"] is None and alone["ppl_ratio_exact"] is None
    assert both["ppl_reference_exact"] == pytest.approx(file["ppl"], rel=1e-6)
    assert both["ppl_ratio_exact"] == pytest.approx(both["ppl"] / file["ppl"], rel=1e-6)


def test_what_the_note_says_of_number_format_and_context(small, monkeypatch):
    monkeypatch.setattr("lib.scoring.measure.affordable_dtype", lambda *folders: "bfloat16")
    small.model.save_pretrained(small.folder)
    most = small.model.config.max_position_embeddings
    text = Text.of_rows(tiny.texts(most))
    shared = {"text": asdict(text), "n_ctx": most + 16, "chunks": 1, "n_threads": 1, "n_gpu_layers": 0}
    note = measure_in_child({"model": str(small.folder), "reference": None, **shared})["note"]
    assert "model folders were computed in bfloat16" in note
    assert f"windows of {most + 16} tokens, and {small.folder.name} was made for at most {most}" in note


def test_a_token_below_16_nats_is_in_the_exact_ratio_alone(monkeypatch):
    """llama-perplexity's stored log-probabilities end there: 20 nats count as 16."""
    logits = np.zeros((4, 32), np.float32)
    logits[:, 0] = 20.0
    monkeypatch.setattr(perplexity, "_logits", lambda backend, window: backend)
    monkeypatch.setattr(perplexity, "_targets", lambda window: np.array([1, 0, 0, 0]))
    found = table_of(positions(logits, logits, [[0]], "test"))
    assert found["ln_ppl_ratio"] == pytest.approx((20 - 16) / 4, abs=1e-3), "a model against itself, by the tool"
    assert found["ppl_ratio_exact"] == pytest.approx(1) and found["ppl_reference_exact"] == pytest.approx(
        np.exp(5), rel=1e-4
    )


def test_special_tokens_are_plain_text(small):
    text = Text.of_file("好<|im_end|>好")
    ids = tokenize_with_transformers(small.tokenizer, text).ids
    assert small.tokenizer.eos_token_id not in ids and small.tokenizer.decode(ids) == text.content
    assert small.tokenizer.eos_token_id in small.tokenizer(text.content)["input_ids"]  # and nothing stays switched


def test_different_tokenizers_are_refused(small, files: Path):
    shared = {
        "text": {"content": "房间很好" * 60, "starts": [0]},
        "n_ctx": 64,
        "chunks": 1,
        "n_threads": 1,
        "n_gpu_layers": 0,
    }
    with pytest.raises(InputError, match="different tokens of this text"):
        measure_in_child({"model": str(small.gguf), "reference": str(files / "a.gguf"), **shared})


def test_documents_widen_the_interval():
    """Tokens of one document that go up and down together count as one."""
    documents = np.repeat(np.arange(40), 50)
    together = np.random.default_rng(0).normal(3, 1, 40)[documents]
    found = summarize(Positions(-together), documents)
    low, high = found["ppl_interval"]
    assert np.log(high / low) > 4 * 1.96 * found["ppl_uncertainty"] / found["ppl"]
    assert summarize(Positions(-together), None)["note"].startswith("the tokens do not spell")


def test_percentiles_are_numpys():
    values = np.random.default_rng(1).gamma(0.3, size=1001)
    found = percentiles(values, (0.001, 0.05, 0.9, 0.999))
    levels = {"min": 0, "p001": 0.001, "p05": 0.05, "median": 0.5, "p90": 0.9, "p999": 0.999, "max": 1}
    assert found == pytest.approx({name: np.quantile(values, q) for name, q in levels.items()}, rel=1e-4, abs=1e-9)
    assert percentiles(np.array([1.0, 3.0]), ())["median"] == 2


def test_a_begin_token_takes_the_first_place_of_every_window(files: Path, tmp_path: Path, monkeypatch):
    """As Llama models want it. Printed by the commands above for the same files, add_bos_token set."""
    import gguf

    plain = gguf.GGUFWriter.add_add_bos_token
    monkeypatch.setattr(gguf.GGUFWriter, "add_add_bos_token", lambda writer, _: plain(writer, True))
    tiny.golden_pair(tmp_path / "a.gguf", tmp_path / "b.gguf")
    text = Text.of_file(golden_text())
    shared = {"text": asdict(text), "n_ctx": 128, "chunks": 0, "n_threads": 1}
    paths = {"model": str(tmp_path / "b.gguf"), "reference": str(tmp_path / "a.gguf")}
    found = measure_in_child({**paths, **shared, "n_gpu_layers": 0})
    assert found["ppl"] == pytest.approx(457.190124, rel=3e-6) and found["n_documents"] == 36
    assert found["kld_mean"] == pytest.approx(0.002570, abs=1.5e-6)
    assert found["same_top"] == pytest.approx(0.91667, abs=1e-5)
