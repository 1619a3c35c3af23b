"""A device that is full: smaller micro-batches, the same updates, and the page says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.errors import InputError
from lib.report import finetune_page
from lib.runs.files import read_json
from lib.runs.run import Run
from lib.stages.finetune import session
from lib.stages.finetune.stage import finetune
from lib.stages.finetune.trainer import AnswerTrainer
from tests.stages.finetune.conftest import die_after, tiny_settings
from tests.stages.finetune.test_stage import same, weights


def fill_memory(patch: pytest.MonkeyPatch, most: int, update: int = 0, error: type = torch.OutOfMemoryError) -> None:
    """A device without room for more than `most` rows a forward pass, from that update on."""
    original = AnswerTrainer.compute_loss

    def compute(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.args.per_device_train_batch_size > most and self.state.global_step >= update:
            raise error("CUDA out of memory. Tried to allocate 96.00 MiB.\nGPU 0 has a total capacity of …")
        return original(self, *arguments, **options)

    patch.setattr(AnswerTrainer, "compute_loss", compute)


@given(st.integers(1, 64), st.integers(1, 16))
def test_smaller_keeps_the_rows_of_an_update(rows: int, passes: int) -> None:
    found = session.smaller(rows, passes)
    if rows == 1:
        assert found is None
    else:
        assert found[0] * found[1] == rows * passes and 1 <= found[0] <= rows / 2


def test_at_the_start_it_trains_as_if_asked_for_less(runs: Callable[[str], Run], monkeypatch) -> None:
    expected = finetune(tiny_settings(per_device_train_batch_size=4, gradient_accumulation_steps=4), runs("straight"))
    fill_memory(monkeypatch, most=4)
    run = runs("fresh")
    result = finetune(tiny_settings(), run)
    assert same(weights(result.product.path), weights(expected.product.path))
    assert [row.get("loss") for row in result.history] == [row.get("loss") for row in expected.history]
    sizes = run.manifest.entries()["adapter"].facts["micro_batch"]
    assert sizes["asked"] == {"rows": 16, "passes": 1} and sizes["used"] == {"rows": 4, "passes": 4}
    assert [(f["rows"], f["from_step"]) for f in sizes["out_of_memory"]] == [(16, 0), (8, 0)]
    assert expected.product.entry.facts["micro_batch"]["out_of_memory"] == []
    assert result.notes == run.stamps() and len(result.notes) == 2
    assert (
        "out of memory with 16 rows a forward pass: the training started again with 8 and 2 passes" in result.notes[0]
    )
    card = finetune_page.card(result).data
    assert "4 rows × 4 forward passes (asked for: 16 rows × 1 forward pass; the device was full)" in card
    assert "asked for" not in finetune_page.card(expected).data
    assert "16 rows" in (result.product.path / "training.log").read_text()


def test_later_it_goes_on_from_the_newest_checkpoint(runs: Callable[[str], Run], monkeypatch) -> None:
    settings, run = tiny_settings(lora_dropout=0.0), runs("fresh")
    expected = finetune(settings, runs("straight"))
    with monkeypatch.context() as patch:
        fill_memory(patch, most=8, update=5)
        result = finetune(settings, run)
    assert result.resumed_from == 4 and result.micro_batch["used"] == {"rows": 8, "passes": 2}
    assert "went on from update 4 with 8 and 2 passes" in result.notes[0]
    for name, value in weights(expected.product.path).items():
        np.testing.assert_allclose(weights(result.product.path)[name], value, atol=2e-4)


def test_a_continued_training_begins_with_what_fitted(runs: Callable[[str], Run], monkeypatch) -> None:
    run = runs("fresh")
    with monkeypatch.context() as patch:
        fill_memory(patch, most=8)
        die_after(7, patch)
        with pytest.raises(KeyboardInterrupt):
            finetune(tiny_settings(), run)
    record = read_json(run.folder / ".adapter.part" / session.MEMORY_RECORD)
    assert [failure["next"] for failure in record] == [{"rows": 8, "passes": 2}]
    result = finetune(tiny_settings(), run)  # now there would be room for 16
    assert result.resumed_from == 2 and result.micro_batch["used"] == {"rows": 8, "passes": 2}
    asked = tiny_settings(per_device_train_batch_size=8, gradient_accumulation_steps=2)
    assert same(weights(result.product.path), weights(finetune(asked, runs("straight")).product.path))


def test_one_row_that_does_not_fit_is_refused(runs: Callable[[str], Run], monkeypatch) -> None:
    run = runs("fresh")
    fill_memory(monkeypatch, most=0)
    with pytest.raises(InputError, match=r"one row a forward pass.*gradient_checkpointing: true"):
        finetune(tiny_settings(per_device_train_batch_size=2), run)
    assert "adapter" not in run.manifest.entries()
    assert not (run.folder / ".adapter.part" / session.MEMORY_RECORD).exists()


def test_other_errors_are_not_taken_for_a_full_device(runs: Callable[[str], Run], monkeypatch) -> None:
    fill_memory(monkeypatch, most=4, error=RuntimeError)
    with pytest.raises(RuntimeError, match="out of memory"):
        finetune(tiny_settings(), runs("fresh"))


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "MPS backend out of memory (MPS allocated: 8.00 GB)",
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 9 bytes.",
    ],
)
def test_other_words_for_a_full_device(words: str) -> None:
    with pytest.raises(torch.OutOfMemoryError), session.full_memory():
        raise RuntimeError(words)
    with pytest.raises(InputError, match="base model itself"), session.base_fits():
        raise RuntimeError(words)


def test_a_base_that_does_not_fit_is_not_blamed_on_the_rows(runs: Callable[[str], Run], monkeypatch) -> None:
    def loads(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    monkeypatch.setattr("lib.stages.finetune.session.load_model", loads)
    with pytest.raises(InputError, match=r"no room for the base model itself.*9\.00 GiB"):
        finetune(tiny_settings(), runs("fresh"))
    assert not (runs("fresh").folder / ".adapter.part" / session.MEMORY_RECORD).exists()


def test_a_full_device_by_another_name_and_a_full_disk_in_a_training(runs: Callable[[str], Run], monkeypatch) -> None:
    run, original = runs("fresh"), AnswerTrainer.compute_loss

    def compute(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.args.per_device_train_batch_size > 8:
            raise RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)")
        return original(self, *arguments, **options)

    def full_disk(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(AnswerTrainer, "compute_loss", compute)
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"disk of .* is full"):
        patch.setattr(torch, "save", full_disk)
        finetune(tiny_settings(), run)
    record = read_json(run.folder / ".adapter.part" / session.MEMORY_RECORD)
    assert [failure["next"] for failure in record] == [{"rows": 8, "passes": 2}]
