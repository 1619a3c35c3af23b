"""Logits from hidden states: of the output layer alone, divided, capped, or computed on scaled states."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lib.models.head import has_plain_head, output_head

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
FAMILIES: dict[str, tuple[dict[str, Any], bool]] = {
    "qwen3": ({"head_dim": 16}, True),
    "gemma3_text": ({"head_dim": 16}, True),
    "granite": ({"logits_scaling": 8.0}, False),
    "gemma2": ({"head_dim": 16, "final_logit_softcapping": 3.0}, False),
    "minicpm3": ({**MLA, "dim_model_base": 8}, False),
}


def small(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **FAMILIES[kind][0])).eval()


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_and_gradients_are_the_models_own(kind: str) -> None:
    model = small(kind)
    assert has_plain_head(model) is FAMILIES[kind][1]
    ids = torch.tensor([[5, 9, 70, 3, 3, 8]])
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, 2:4].detach()
    own = model(input_ids=ids, use_cache=False).logits[0, 2:4]
    found = output_head(model)(hidden)
    assert torch.allclose(found, own, atol=1e-6)
    hidden.requires_grad_()
    output_head(model)(hidden).logsumexp(-1).sum().backward()
    step = torch.zeros_like(hidden)
    step[0, 3] = 1e-2
    with torch.no_grad():
        up, down = (output_head(model)(hidden + sign * step).logsumexp(-1).sum() for sign in (1, -1))
    assert hidden.grad is not None
    assert float(hidden.grad[0, 3]) == pytest.approx(float(up - down) / 2e-2, rel=2e-2, abs=1e-4)


def test_lora_that_is_put_on_the_output_layer_later_counts() -> None:
    from peft import LoraConfig, get_peft_model

    model = small("qwen3")
    plain, hidden = output_head(model), torch.randn(3, 32)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    torch.nn.init.ones_(model.lm_head.lora_B["default"].weight)
    assert output_head(peft.get_base_model()) is not plain
    assert not torch.allclose(output_head(peft.get_base_model())(hidden), model.lm_head.base_layer(hidden))
