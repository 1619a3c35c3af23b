"""The shared beginning of all prompts changes nothing: against the plain forward pass of the whole model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lib.scoring import torch_backend
from lib.scoring.backend import common_prefix, cut, make_jobs
from lib.scoring.torch_backend import TransformersBackend
from tests.scoring.test_backends import ANSWERS, brute_force, prompts_of

KINDS = ("Qwen2", "Qwen3", "Llama")


def model_of(kind: str):
    """A random model of the family, float32, as from_pretrained would give it."""
    import transformers

    torch.manual_seed(3)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
    more = {"head_dim": 16} if kind == "Qwen3" else {}
    config = getattr(transformers, f"{kind}Config")(hidden_size=32, intermediate_size=64, **sizes, **more)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3) if weight.ndim > 1 else None
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS.keys())
def test_equals_the_plain_forward_pass(small, kind, answers):
    model, prompts = model_of(kind), prompts_of(small)
    prefix = common_prefix(make_jobs(prompts, answers))
    assert len(prefix) >= 8, "there is something to share"
    backend = TransformersBackend(model, 4)
    found, expected = backend.label_log_probs(prompts, answers), brute_force(model, prompts, answers)
    assert backend.note == ""
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert (found.argmax(1) == expected.argmax(1)).all()


def test_the_beginning_is_computed_once(small):
    model, prompts = model_of("Qwen2"), prompts_of(small)
    seen: list[int] = []
    backend = TransformersBackend(model, 4)
    backend.label_log_probs(prompts, ANSWERS["single"])
    model.model.register_forward_hook(
        lambda _, args, kwargs, out: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    backend.label_log_probs(prompts, ANSWERS["single"])
    jobs = make_jobs(prompts, ANSWERS["single"])
    shared = len(common_prefix(jobs))
    batches = list(backend._batches(jobs, shared))
    assert [job for batch in batches for job in batch] == jobs and max(map(len, batches)) == 4
    padded = [len(batch) * (len(batch[-1].ids) - shared) for batch in batches]
    assert seen == [shared, *padded]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("overhead", [0, 20, 1000])
def test_batches_cost_least(seed, overhead):
    """Against every way to cut a row of sequences into batches."""
    draw = np.random.default_rng(seed)
    widths, most = sorted(draw.integers(1, 90, 9).tolist()), 4

    def cost(sizes):
        ends = np.cumsum(sizes)
        return sum(overhead + size * widths[end - 1] for size, end in zip(sizes, ends, strict=True))

    def ways(n):
        return [[]] if n == 0 else [[k, *rest] for k in range(1, min(n, most) + 1) for rest in ways(n - k)]

    sizes = cut(widths, most, overhead)
    assert sum(sizes) == 9 and max(sizes) <= most
    assert cost(sizes) == min(map(cost, ways(9)))


def test_a_long_row_does_not_make_short_ones_long(small):
    prompts = [[1] * n for n in (9, 10, 40, 41, 42, 43, 44, 200, 201, 202)]
    batches = TransformersBackend(small.model, 8)._batches(make_jobs(prompts, ANSWERS["single"]), 0)
    assert [[len(job.ids) for job in batch] for batch in batches] == [[9, 10], [40, 41, 42, 43, 44], [200, 201, 202]]


def test_a_wrong_position_is_noticed(small, monkeypatch):
    """The trial has teeth: a cache that forgets one token makes the backend compute whole prompts, and say so."""
    from lib.scoring.torch_backend import SharedPrefix

    compute = SharedPrefix._compute
    monkeypatch.setattr(
        SharedPrefix, "_compute", lambda self, ids: [(k[:, :, 1:], v[:, :, 1:]) for k, v in compute(self, ids)]
    )
    model, prompts = model_of("Qwen2"), prompts_of(small)
    backend = TransformersBackend(model, 4)
    found = backend.label_log_probs(prompts, ANSWERS["single"])
    assert "computed whole" in backend.note and "off" in backend.note
    np.testing.assert_allclose(found, brute_force(model, prompts, ANSWERS["single"]), atol=1e-4)


def test_a_cache_of_another_kind_is_not_shared(small):
    import transformers

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
    window = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True}
    config = transformers.Qwen2Config(hidden_size=32, intermediate_size=64, **sizes, **window)
    model, prompts = transformers.Qwen2ForCausalLM(config).eval(), prompts_of(small)
    backend = TransformersBackend(model, 4)
    found = backend.label_log_probs(prompts, ANSWERS["single"])
    assert "DynamicSlidingWindowLayer" in backend.note
    np.testing.assert_allclose(found, brute_force(model, prompts, ANSWERS["single"]), atol=1e-4)


@pytest.mark.parametrize("method", ["bfloat16", "nf4", "int8"])
def test_reduced_precision_shares_too(small, method, monkeypatch):
    from lib.models.loading import load_model
    from lib.runs.machine import bitsandbytes_problem

    if method != "bfloat16" and (problem := bitsandbytes_problem()):
        pytest.skip(problem)
    if method == "int8":
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        quantized = BitsAndBytesConfig(load_in_8bit=True)
        model = AutoModelForCausalLM.from_pretrained(small.folder, quantization_config=quantized).eval()
    else:
        model = load_model(small.folder, dtype="bfloat16", load_in_4bit=method == "nf4", device="cpu")
    prompts = prompts_of(small)
    backend = TransformersBackend(model, 8)
    shared = backend.label_log_probs(prompts, ANSWERS["several"])
    monkeypatch.setattr(torch_backend, "_SHORTEST", 1 << 20)
    whole = TransformersBackend(model, 8).label_log_probs(prompts, ANSWERS["several"])
    assert backend.note == ""
    assert np.abs(shared - whole).max() < 0.15
    margins = np.abs(whole[:, 0] - whole[:, 1])
    assert (shared.argmax(1) == whole.argmax(1))[margins > 0.3].all()


@pytest.mark.parametrize(("in_8bit", "passes"), [(True, 3), (False, 0)])
def test_freed_memory_is_given_back_after_every_pass_of_an_8bit_model_alone(
    monkeypatch: pytest.MonkeyPatch, in_8bit: bool, passes: int
) -> None:
    model = model_of("Qwen2")
    model.is_loaded_in_8bit = in_8bit
    given = []
    monkeypatch.setattr(torch_backend, "return_freed_memory", lambda: given.append(1))
    backend = TransformersBackend(model, batch_size=1)
    backend.label_log_probs([[1, 2], [3, 4, 5], [6]], [[7], [8]])
    assert len(given) == passes
