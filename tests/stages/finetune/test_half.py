"""Training in float16: the loss scale, what overflows, and which machines compute in it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from lib.errors import InputError
from lib.runs import machine
from lib.runs.run import Run
from lib.stages.finetune import layout, trainer
from lib.stages.finetune.stage import FinetuneResult, finetune
from lib.stages.finetune.trainer import AnswerTrainer
from tests.stages.finetune.conftest import tiny_settings


def losses(result: FinetuneResult) -> list[float]:
    return [row["eval_loss"] for row in result.history if "eval_loss" in row]


def test_it_learns_as_in_float32(runs: Callable[[str], Run]) -> None:
    single = finetune(tiny_settings(), runs("straight"))
    half = finetune(tiny_settings(dtype="float16"), runs("fresh"))
    assert half.dtype == "float16" and half.messages == []
    assert losses(half) == pytest.approx(losses(single), rel=0.02) and losses(half)[-1] < losses(half)[0]
    tensors = load_file(half.product.path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert (half.product.path / "checkpoints" / f"checkpoint-{half.steps}" / "scaler.pt").is_file()


def overflowing(updates: set[int], monkeypatch: pytest.MonkeyPatch) -> tuple[list, list]:
    """Gradients of these updates overflow; gives the adapter's weights and the loss scale before every update."""
    weights, scales, original = [], [], AnswerTrainer.compute_loss

    def compute(self, *arguments, **options):
        weights.append([w.detach().clone() for w in self._trained()])
        scales.append(self.accelerator.scaler.get_scale())
        return original(self, *arguments, **options) * (1e30 if len(weights) in updates else 1.0)

    monkeypatch.setattr(AnswerTrainer, "compute_loss", compute)
    return weights, scales


def test_an_update_that_overflows_is_skipped_and_halves_the_scale(runs, monkeypatch) -> None:
    weights, scales = overflowing({3}, monkeypatch)
    result = finetune(tiny_settings(dtype="float16"), runs("fresh"))
    same = [all(torch.equal(*pair) for pair in zip(a, b, strict=True)) for a, b in itertools.pairwise(weights)]
    assert same == [False, False, True, False, False, False, False]
    assert scales == [4096.0] * 3 + [2048.0] * 5
    (message,) = result.messages
    assert message.startswith("1 of 8 updates were skipped") and math.isfinite(losses(result)[-1])
    assert all(math.isfinite(row.get("grad_norm", 0.0)) for row in result.history)


def test_the_scale_grows_again(runs, monkeypatch) -> None:
    monkeypatch.setattr(trainer, "_SCALER", {"init_scale": 4.0, "growth_interval": 2})
    _, scales = overflowing(set(), monkeypatch)
    finetune(tiny_settings(dtype="float16"), runs("fresh"))
    assert scales == [4.0, 4.0, 8.0, 8.0, 16.0, 16.0, 32.0, 32.0]


def test_a_continued_training_goes_on_with_its_scale(runs, monkeypatch) -> None:
    monkeypatch.setattr(trainer, "_SCALER", {"init_scale": 4.0, "growth_interval": 2})
    run, original, done = runs("fresh"), AnswerTrainer.compute_loss, []

    def die(self, *arguments, **options):
        done.append(self.accelerator.scaler.get_scale())
        if len(done) == 6:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerTrainer, "compute_loss", die)
        with pytest.raises(KeyboardInterrupt):
            finetune(tiny_settings(dtype="float16"), run)
    _, scales = overflowing(set(), monkeypatch)
    assert finetune(tiny_settings(dtype="float16"), run).resumed_from == 4
    assert scales == [16.0, 16.0, 32.0, 32.0]


def test_what_overflows_at_every_scale_is_refused(runs, monkeypatch) -> None:
    monkeypatch.setattr(trainer, "_SCALER", {"init_scale": 2.0**-3, "growth_interval": 2})
    overflowing({*range(99)}, monkeypatch)
    with pytest.raises(InputError, match=r"overflows in float16.*dtype: float32"):
        finetune(tiny_settings(dtype="float16"), runs("fresh"))


def test_a_base_that_overflows_is_refused_before_it_is_trained(runs, monkeypatch) -> None:
    monkeypatch.setattr(layout, "answer_loss", lambda *_: (torch.tensor(math.nan), 1))
    monkeypatch.setattr(layout, "choose_layout", lambda model, rows, pad, problem: (layout.Collator(pad), "padded"))
    with pytest.raises(InputError, match="overflows in float16"):
        finetune(tiny_settings(dtype="float16"), runs("fresh"))


def test_the_gradient_of_the_output_layer_survives_float16() -> None:
    """Chunked, against float64: probabilities of a large vocabulary are below what float16 holds."""
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 20_000, bias=False).to(torch.float16).requires_grad_(False)
    hidden = torch.randn(layout.HEAD_ROWS + 3, 32).to(torch.float16).requires_grad_()
    targets = torch.randint(0, 20_000, (len(hidden),))
    exact = hidden.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(exact @ head.weight.double().T, targets, reduction="sum").backward()
    with torch.autocast("cpu", torch.float16):
        loss = layout.head_loss(head, hidden, targets)
    (loss * 4096.0).backward()
    error = (hidden.grad.double() / 4096.0 - exact.grad).norm() / exact.grad.norm()
    assert hidden.grad.dtype == torch.float16 and error < 0.01


@pytest.mark.parametrize(
    ("native", "capability", "dtype", "why"),
    [
        (True, (8, 0), "bfloat16", "natively"),
        (False, (7, 5), "float16", "no native bfloat16, and fast float16 products"),
        (False, (7, 0), "float16", "no native bfloat16"),
        (False, (6, 1), "float32", "no fast float16"),
    ],
)
def test_which_gpu_computes_in_what(monkeypatch, native: bool, capability: tuple, dtype: str, why: str) -> None:
    monkeypatch.setattr(machine, "torch_device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    found, reason = machine.compute_dtype()
    assert found == dtype and why in reason
    assert machine.compute_dtype("float32")[0] == "float32"


@pytest.mark.gpu
def test_on_a_gpu(runs: Callable[[str], Run]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    half = finetune(tiny_settings(dtype="float16"), runs("fresh"))
    assert half.dtype == "float16" and losses(half)[-1] < losses(half)[0]
    assert half.product.entry.device.startswith("cuda")
