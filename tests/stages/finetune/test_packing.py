"""Packed micro-batches and the chunked output layer against the model's own padded pass and torch's gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib.prompts.conversations import Encoded
from lib.stages.finetune import layout as finetune_layout
from lib.stages.finetune.batches import (
    IGNORED,
    Collator,
    PackedCollator,
    filled_length,
    shared_prefix,
    use_packed_attention,
)
from lib.stages.finetune.batches import PACKED_LENGTH_STEP as LENGTH_STEP
from lib.stages.finetune.layout import answer_loss, choose_layout, head_loss
from tests.stages.finetune.conftest import encoded

PREFIX = [7, 3, 9, 9, 4, 60, 2]


def rows(*tails: list[int]) -> list[Encoded]:
    """Rows of PREFIX, a text and an answer of two tokens."""
    return [encoded([*PREFIX, *tail], len(PREFIX) + len(tail) - 2) for tail in tails]


ROWS = rows([1, 2, 3, 4], [5] * 20, list(range(9)), [8, 1, 8])


def tuned(kind: str = "qwen2", dtype: torch.dtype = torch.float32, **changes):
    """A small model of that architecture with a random adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model(kind, vocab_size=64, **{**sizes, **heads, **changes})
    base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(base, lora).train()


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}


def plain(model, batch: list[Encoded]) -> tuple[float, dict[str, torch.Tensor]]:
    """The model's own loss over a padded batch, before its attention is changed, and its gradients."""
    inputs = Collator(0)(batch)
    loss = model(**{key: inputs[key] for key in ("input_ids", "attention_mask", "labels")}).loss
    return loss.item(), gradients(model, loss)


def packed(model, batch: list[Encoded], prefix: int) -> tuple[float, dict[str, torch.Tensor]]:
    total, count = answer_loss(model, PackedCollator(0, prefix)(batch))
    return total.item() / count, gradients(model, total / count)


def assert_equal(found, expected, loss: float, gradient: float) -> None:
    assert abs(found[0] - expected[0]) < loss
    assert found[1].keys() == expected[1].keys() and len(found[1]) >= 28
    for name, value in expected[1].items():
        assert (found[1][name] - value).norm() <= gradient * value.norm(), name


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_loss_and_gradients_are_those_of_the_padded_batch(kind: str) -> None:
    model = tuned(kind)
    expected = plain(model, ROWS)
    assert use_packed_attention(model.get_base_model())[0] is None
    for prefix in (len(PREFIX), 3, 1, 0):
        assert_equal(packed(model, ROWS, prefix), expected, 1e-4, 1e-5)


def test_bfloat16_agrees_as_closely_as_bfloat16_can() -> None:
    model = tuned(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(model, ROWS)
    use_packed_attention(model.get_base_model())
    total, count = answer_loss(model, PackedCollator(0, len(PREFIX))(ROWS))
    found = gradients(model, total / count)
    assert abs(total.item() / count - expected[0]) < 1e-3 * expected[0]
    whole = torch.cat([g.flatten() for g in expected[1].values()])
    other = torch.cat([found[name].flatten() for name in expected[1]])
    assert (whole - other).norm() <= 1e-2 * whole.norm()


def test_several_answers_in_a_row_and_gradient_checkpointing() -> None:
    talk = Encoded([*PREFIX, *range(20)], [(10, 13), (18, 27)])
    model = tuned()
    expected = plain(model, [*ROWS, talk])
    use_packed_attention(model.get_base_model())
    assert_equal(packed(model, [*ROWS, talk], 5), expected, 1e-4, 1e-5)
    model.get_base_model().enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_equal(packed(model, [*ROWS, talk], 5), expected, 1e-4, 1e-5)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.lists(st.integers(0, 63), min_size=2, max_size=12), min_size=1, max_size=6), st.booleans())
def test_any_rows(tails: list[list[int]], whole: bool) -> None:
    model = tuned(num_hidden_layers=2)
    batch = rows(*tails)
    prefix = shared_prefix(batch)
    expected = plain(model, batch)
    use_packed_attention(model.get_base_model())
    assert_equal(packed(model, batch, prefix if whole else prefix // 2), expected, 1e-4, 1e-4)


def test_a_row_sees_nothing_of_its_neighbours() -> None:
    """Changing one row's text leaves the other rows' loss as it is to the last bit."""
    model = tuned().eval()
    use_packed_attention(model.get_base_model())
    collate = PackedCollator(0, len(PREFIX))

    def first_two(batch: list[Encoded]) -> float:
        inputs = collate(batch)
        start = len(PREFIX) + sum(len(e) - len(PREFIX) for e in batch[:2])
        inputs["labels"][0, start:] = IGNORED
        with torch.no_grad():
            return answer_loss(model, inputs)[0].item()

    changed = [*ROWS[:2], *rows([63] * 9, [62] * 3)]
    assert first_two(ROWS) == first_two(changed)


def test_the_sequence_holds_the_prefix_once() -> None:
    batch = PackedCollator(63, len(PREFIX))(ROWS)
    tails = [e.ids[len(PREFIX) :] for e in ROWS]
    used = len(PREFIX) + sum(map(len, tails))
    assert batch["input_ids"].shape == (1, LENGTH_STEP) and used < LENGTH_STEP
    assert batch["input_ids"][0].tolist() == PREFIX + [i for tail in tails for i in tail] + [63] * (LENGTH_STEP - used)
    assert batch["row_tokens"] == sum(map(len, ROWS))
    positions = [*range(7)] + [i + 7 for tail in tails for i in range(len(tail))]
    assert batch["position_ids"][0, :used].tolist() == positions
    assert (batch["labels"] != IGNORED).sum() == 8


def test_sequences_have_few_lengths() -> None:
    lengths = {n: filled_length(n) for n in range(1, 4097)}
    assert all(n <= length <= max(n + LENGTH_STEP, 1.25 * n) for n, length in lengths.items())
    assert len(set(lengths.values())) <= 8 + 4 * 3 + 4


def test_prefix_ends_before_the_last_prompt_token() -> None:
    assert shared_prefix(ROWS[:3]) == len(PREFIX)
    assert shared_prefix(rows([1, 2, 3, 4], [1, 2, 5, 6])) == len(PREFIX) + 1  # the token behind it predicts 3 or 5
    assert shared_prefix([encoded([1, 2], 1), encoded([1, 3], 1)]) == 0
    assert shared_prefix([]) == 0


@pytest.mark.parametrize("positions", [1, 4, 9])
def test_chunked_output_layer(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune_layout, "HEAD_ROWS", 4)
    torch.manual_seed(1)
    head = torch.nn.Linear(8, 50, bias=False).requires_grad_(False)
    hidden = torch.randn(positions, 8, requires_grad=True)
    targets = torch.randint(50, (positions,))
    expected = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum") * 0.3
    (wanted,) = torch.autograd.grad(expected, hidden)
    found = head_loss(head, hidden, targets) * 0.3
    (gradient,) = torch.autograd.grad(found, hidden)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)


def test_an_output_layer_that_learns_gets_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune_layout, "HEAD_ROWS", 2)
    head = torch.nn.Linear(8, 50, bias=False)
    head_loss(head, torch.randn(5, 8), torch.arange(5)).backward()
    assert head.weight.grad.abs().sum() > 0


def test_layout_says_what_it_does() -> None:
    collate, words = choose_layout(tuned(), ROWS, 0)
    assert isinstance(collate, PackedCollator) and "the 7 tokens" in words


def test_layout_falls_back_where_attention_has_a_window() -> None:
    model = tuned(use_sliding_window=True, sliding_window=4, max_window_layers=0)
    collate, words = choose_layout(model, ROWS, 0)
    assert isinstance(collate, Collator) and "sliding window" in words


@pytest.mark.parametrize("kind", ["mistral", "phi3", "gemma3_text"])
def test_layout_falls_back_where_the_longest_row_is_longer_than_the_window(kind: str) -> None:
    odd = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    batch = [*ROWS, *rows([6] * 33)]  # the others, and twice the shortest, would fit into the window
    assert "window of 32" in choose_layout(tuned(kind, sliding_window=32, **odd), batch, 0)[1]
    assert choose_layout(tuned(kind, sliding_window=40, **odd), batch, 0)[1].startswith("packed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layout_falls_back_where_a_state_goes_from_row_to_row(dtype: torch.dtype, monkeypatch) -> None:
    """As in Qwen3.5: by the configuration, and, had it said nothing, by what the rows see."""
    kinds = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2}
    sizes = {"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    model = tuned("qwen3_5_text", dtype, **kinds, **sizes)
    assert "linear_attention" in choose_layout(model, ROWS, 0)[1]
    monkeypatch.setattr(finetune_layout.batches, "unpackable", lambda *_: None)
    before = model.config._attn_implementation
    collate, words = choose_layout(model, ROWS, 0)
    assert isinstance(collate, Collator) and ("differs" in words or "see one another" in words)
    assert model.config._attn_implementation == before


def test_layout_falls_back_where_the_packed_loss_is_not_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned()
    before = model.config._attn_implementation
    wrong = PackedCollator.__call__

    def misplaced(self, batch):
        made = wrong(self, batch)
        return {**made, "position_ids": made["position_ids"].flip(1)}

    monkeypatch.setattr(PackedCollator, "__call__", misplaced)
    collate, words = choose_layout(model, ROWS, 0)
    assert isinstance(collate, Collator) and "differs" in words
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [("gemma2", {"final_logit_softcapping": 30.0}), ("granite", {"logits_scaling": 1.02})],
)
def test_a_model_that_scales_or_caps_its_logits_is_padded(kind: str, changes: dict, dtype: torch.dtype) -> None:
    odd = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    model = tuned(kind, dtype, **changes, **odd)
    collate, words = choose_layout(model, ROWS, 0)
    assert words == "padded to the longest of like length (the model scales or caps its logits)"
    batch = collate(ROWS[:3])
    with torch.no_grad():
        total, count = answer_loss(model, batch)
        own = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).loss
    assert float(total) / count == pytest.approx(float(own), rel=1e-5 if dtype == torch.float32 else 2e-2)
    assert choose_layout(tuned(dtype=dtype), ROWS, 0)[1].startswith("packed")


@pytest.mark.parametrize(
    ("dtype", "difference", "close"),
    [("float32", 0.9e-4, True), ("float32", 1.1e-4, False), ("bfloat16", 0.02, True), ("bfloat16", 0.06, False)],
)
def test_losses_count_as_equal_by_number_format(dtype: str, difference: float, close: bool) -> None:
    """2 % is what bfloat16 makes of SmolLM2's losses; random weights showed less than half a percent."""
    from types import SimpleNamespace

    from lib.stages.finetune import layout as finetune_layout

    weight = torch.zeros(1, dtype=getattr(torch, dtype))
    inner = SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(weight=weight))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(finetune_layout, "causal_model", lambda model: model)
        assert finetune_layout._close(inner, 3.0 + 4.0 * difference, 3.0) is close
