"""What rounding the unpacked weights costs, by dtype: KL divergence of the next token from the weights in float32."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError
from lib.models.floats import widen
from lib.models.gguf_tokenizer import tokenizer_json
from lib.models.unpacking.configuration import transformers_config
from lib.models.unpacking.rescaling import Rescaling
from lib.models.unpacking.source import Source
from lib.models.unpacking.writing import DTYPES, TooLargeError, rounded, scaled_slabs

if TYPE_CHECKING:
    import torch

TEXTS = (
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "A wonderfully acted drama that never quite finds its ending; still, I was moved.",
    "In 1969 three astronauts flew 384,400 km to the Moon and came back after eight days.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "酒店的位置很好，房间干净，服务员也很热情，下次还会再来。",
    "Water boils at 100 degrees Celsius at sea level; on a mountain it boils earlier, because",
)
"""Texts of several kinds; a figure of some two hundred positions, which shows the size of the cost, not its digits."""


def cost_of(source: Source, dtype: str, scaling: Rescaling | None) -> tuple[dict[str, float] | None, str]:
    """Mean KL divergence, nats a token, of float16, bfloat16 and float32 from the file's weights in float32.

    The weights are those that are written (with their scales); float32 shows whether the scales change the function.

    Returns:
        The figures by dtype (those that can hold the weights), and what was measured; None and why not, when there is
        not enough memory.

    Raises:
        InputError: the model computes infinities or no numbers.
    """
    from lib.device import available_memory

    need = 4 * source.parameters + (1 << 30)
    if need > available_memory():
        return None, f"not measured: the weights in float32 need {need / 1e9:.1f} GB of memory"
    import torch

    texts = _ids(source)
    model = _empty_model(source)
    with torch.inference_mode():
        exact = _log_probs(model, source, "float32", None, texts)
        if not torch.isfinite(exact).all():
            raise InputError(
                f"the model in {source.path} computes numbers that are not finite.",
                "weights that give probabilities.",
                "make or download the file again.",
            )
        found = {}
        for kind in ("float16", "bfloat16", "float32"):
            try:
                other = exact if kind == "float32" and not scaling else _log_probs(model, source, kind, scaling, texts)
            except TooLargeError:
                continue
            found[kind] = float((exact.exp() * (exact - other)).sum(-1).mean().clamp(min=0))
    return found, f"mean KL divergence from float32, nats a token, over {len(exact)} positions of {len(texts)} texts"


def _ids(source: Source) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(source.metadata, source.path)))
    return [ids for text in TEXTS if len(ids := tokenizer.encode(text).ids) > 1]


def _empty_model(source: Source) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from lib.models.quiet import no_warnings, quiet

    quiet()
    config = transformers_config(source.config, source.path)
    with no_warnings():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        model.to_empty(device="cpu")  # weights are put in place, tensor by tensor; only the frequencies are computed
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
        model.tie_weights()
    return model.eval()


def _log_probs(
    model: Any, source: Source, dtype: str, scaling: Rescaling | None, texts: list[list[int]]
) -> torch.Tensor:
    """Log-probabilities of every next token, float32 (positions, vocabulary), with weights rounded to `dtype`."""
    import torch

    _fill(model, source, dtype, scaling)
    logits = [model(torch.tensor([ids])).logits[0] for ids in texts]
    return torch.cat(logits).log_softmax(-1)


def _fill(model: Any, source: Source, dtype: str, scaling: Rescaling | None) -> None:
    import torch

    places = dict(model.named_parameters())
    if odd := places.keys() ^ {tensor.name for tensor in source.tensors}:
        raise RuntimeError(f"transformers has other tensors: {sorted(odd)[:3]}")
    for tensor in source.tensors:
        for first, values in scaled_slabs(tensor, scaling):
            data = widen(rounded(values, dtype, tensor.name, source), DTYPES[dtype])
            places[tensor.name].data[first : first + len(values)] = torch.from_numpy(np.ascontiguousarray(data))
