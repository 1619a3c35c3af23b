"""Distillation: another run's model is imitated at the answer tokens, and what cannot teach is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lib.errors import InputError
from lib.models.base_model import base_of
from lib.models.loading import load_model, load_tokenizer
from lib.prompts.tasks import read_task
from lib.report.runner import ready
from lib.runs.files import read_jsonl
from lib.runs.run import Run
from lib.stages.finetune import layout, teacher
from lib.stages.finetune.batches import Collator
from lib.stages.finetune.layout import answer_loss, choose_layout
from lib.stages.finetune.session import _new_model
from lib.stages.finetune.stage import finetune
from lib.stages.finetune.teacher import FILE, Imitating, Teacher
from tests.stages.finetune.conftest import interrupted, make_data, tiny_settings
from tests.stages.finetune.test_methods import weights

TAUGHT = {"teacher": "straight", "distillation_weight": 0.7}


def encoded_rows(run: Run, name: str = "train") -> list[Any]:
    data = run.require("data").path
    task, tokenizer = read_task(data), load_tokenizer(data / "tokenizer")
    return [task.encode(tokenizer, row) for row in read_jsonl(data / f"{name}.jsonl")]


def written(run: Run, folder: Path, vocabulary: int = 10**6) -> dict[str, np.ndarray]:
    found = Teacher.of(tiny_settings(**TAUGHT), run)
    assert found is not None
    found.write_answers(folder, run.require("data").path, "float32", vocabulary)
    return dict(np.load(folder / FILE))


def test_the_teacher_is_the_trained_model_of_the_other_run(runs, tmp_path: Path) -> None:
    """Its likeliest tokens at every answer token, as transformers and peft give them."""
    run = runs("fresh")
    found, rows = written(run, tmp_path), encoded_rows(run)
    model = load_model(base_of(run).path, dtype="float32", adapter=runs("straight").folder / "adapter")
    line = 0
    for row in rows[:8]:
        with torch.no_grad():
            expected = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        for start, stop in row.spans:
            for place in range(start, stop):
                ids, told = torch.from_numpy(found["ids"][line]).long(), torch.from_numpy(found["log_probs"][line])
                torch.testing.assert_close(told, expected[place - 1][ids], rtol=0, atol=1e-4)
                assert told.shape == (teacher.KEPT,) and told[0] == told.max() and len(set(ids.tolist())) == len(ids)
                line += 1
    assert len(found["ids"]) == sum(stop - start for row in rows for start, stop in row.spans)
    before = (tmp_path / FILE).stat().st_mtime_ns
    written(run, tmp_path)  # asked once
    assert (tmp_path / FILE).stat().st_mtime_ns == before


@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_is_the_mixture_over_the_whole_vocabulary(packed: bool, runs, tmp_path: Path, monkeypatch) -> None:
    """With every token kept it is torch's own cross-entropy and divergence, with their gradients."""
    run = runs("fresh")
    rows = encoded_rows(run)
    model = _new_model(base_of(run), tiny_settings(lora_dropout=0.0), "float32")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    vocabulary = model.config.vocab_size
    monkeypatch.setattr(teacher, "KEPT", vocabulary)
    monkeypatch.setattr(layout, "HEAD_ROWS", 3)
    written(run, tmp_path)
    collate = choose_layout(model, rows, 0)[0] if packed else Collator(0)
    batch = Imitating(collate, rows, tmp_path, 0.7)(rows[3:9])
    assert ("gather" in batch) == packed
    total, count = answer_loss(model, batch)
    total.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    big = load_model(base_of(run).path, dtype="float32", adapter=runs("straight").folder / "adapter")
    expected = torch.zeros(())
    for row in rows[3:9]:
        places = torch.tensor([place for start, stop in row.spans for place in range(start, stop)])
        logits = model(torch.tensor([row.ids])).logits[0][places - 1]
        with torch.no_grad():
            told = big(torch.tensor([row.ids])).logits[0][places - 1].softmax(-1)
        plain = torch.nn.functional.cross_entropy(logits, torch.tensor(row.ids)[places], reduction="sum")
        divergence = torch.nn.functional.kl_div(logits.log_softmax(-1), told, reduction="sum")
        expected = expected + 0.3 * plain + 0.7 * divergence
    expected.backward()
    assert count == 12 and total.item() == pytest.approx(expected.item(), rel=1e-3)
    for name, gradient in found.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, rtol=2e-3, atol=2e-4)


def test_what_is_not_kept_counts_as_one_token() -> None:
    """Of a teacher with two kept tokens and half of its probability behind them, computed by hand."""
    head, hidden = torch.nn.Identity(), torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    own = hidden.softmax(-1)[0]
    told = torch.tensor([[0.3, 0.2]])
    loss = layout._taught_loss(
        head, hidden, torch.tensor([2]), torch.tensor([[1, 3]]), told.log(), torch.tensor(1.0)
    ).item()
    left = 1 - own[1] - own[3]
    expected = 0.3 * (0.3 / own[1]).log() + 0.2 * (0.2 / own[3]).log() + 0.5 * (0.5 / left).log()
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_a_taught_training_comes_nearer_to_its_teacher_and_goes_on_exactly(runs, monkeypatch) -> None:
    plain = finetune(tiny_settings(), runs("straight"))
    settings = tiny_settings(**TAUGHT | {"distillation_weight": 1.0})
    shutil.copytree(runs("fresh").folder, runs("again").folder)
    result = finetune(settings, runs("fresh"))
    assert 'teacher: "straight"' in result.method and "divergence from the model of run straight" in result.messages[0]
    assert not (result.product.path / FILE).exists()
    assert result.product.entry.parameters["teacher_weights"] == plain.product.entry.digest
    interrupted(settings, runs("again"))
    again = finetune(settings, runs("again"))
    assert again.resumed_from == 6
    for name, tensor in weights(again.product.path).items():
        assert np.array_equal(tensor, weights(result.product.path)[name]), name
    made = again.product.path.stat().st_mtime_ns
    assert finetune(settings, runs("again")).product.path.stat().st_mtime_ns == made  # nothing to do
    base = base_of(runs("fresh")).path
    rows = encoded_rows(runs("fresh"), "test")

    def answers(adapter: Path | None) -> torch.Tensor:
        model = load_model(base, dtype="float32", adapter=adapter)
        with torch.no_grad():
            return torch.stack(
                [model(torch.tensor([row.ids])).logits[0, row.spans[0][0] - 1].log_softmax(-1) for row in rows]
            )

    told = answers(plain.product.path)
    away = [
        torch.nn.functional.kl_div(answers(path), told, log_target=True, reduction="batchmean").item()
        for path in (None, result.product.path)
    ]
    assert away[1] < 0.2 * away[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher": "nobody"}, "nobody"),
        ({"teacher": "fresh"}, "which is this run"),
        ({"teacher": "unfinished"}, "adapter"),
        ({"teacher": "others"}, "rows are not those of this run"),
    ],
)
def test_what_cannot_teach_is_refused(change: dict[str, Any], words: str, runs) -> None:
    shutil.copytree(runs("fresh").folder, runs("unfinished").folder)
    make_data(runs("others"), train=40)
    with pytest.raises(InputError, match=words):
        finetune(tiny_settings(**change), runs("fresh"))
    assert "adapter" not in runs("fresh").manifest.entries()


def test_a_teacher_with_other_tokens_is_refused(runs, monkeypatch) -> None:
    monkeypatch.setattr(teacher, "differences", lambda *_: {"vocabulary": "its tokenizer has other tokens"})
    with pytest.raises(InputError, match="of the same family"):
        finetune(tiny_settings(**TAUGHT), runs("fresh"))


def test_a_report_asks_for_the_teacher_before_anything_is_done(runs) -> None:
    assert ready(tiny_settings(**TAUGHT)).teacher == "straight"
    with pytest.raises(InputError, match="nobody"):
        ready(tiny_settings(teacher="nobody"))
