"""How large a model becomes in every export format, told from the headers of its files or from its configuration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from lib.models.configurations import LAYER
from lib.runs.files import data_file

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of every weight by its name in transformers; tied weights once."""

GROUPS = (128, 64, 32, 16)
"""Weights that share a scale in GPTQ, the most that fit: 128 in llm-compressor's scheme W4A16."""


def group_size(widths: Iterable[int]) -> int | None:
    """The largest of `GROUPS` that divides the rows of every layer; None where none does."""
    widths = set(widths)
    return next((size for size in GROUPS if all(width % size == 0 for width in widths)), None)


def predict_folder(shapes: Shapes, name: str) -> int:
    """Bytes of the weights of an export format.

    Sources: bitsandbytes' state dicts (INT8: a float32 scale a row; NF4: a byte a block of 64, those scaled by a
    float32 a 256), compressed-tensors (`pack-quantized`: 4 bits, a 16-bit scale a group), torchao (a scale a row), ONNX
    Runtime (MatMulNBits: a float32 scale a block of 32, INT4 with a zero point; the output layer is rounded, too), MNN
    (float32 scale and zero point a block of 64; a separate embedding in bfloat16).
    """
    if name == "mnn-int4":
        return _mnn(shapes)
    if name.startswith("onnx-"):
        return _onnx(shapes, 8 if name == "onnx-int8" else 4)
    linear = [shape for key, shape in shapes.items() if LAYER.fullmatch(key) and len(shape) == 2]
    packed, rows = sum(map(math.prod, linear)), sum(shape[0] for shape in linear)
    rest = 2 * (sum(map(math.prod, shapes.values())) - packed)
    if name in ("fp16", "bf16"):
        return rest + 2 * packed
    if name == "int8":
        return rest + packed + 4 * rows
    if name == "torchao-int8":
        return rest + packed + 2 * rows
    if name == "nf4":
        tables = 4 * (16 + 256) + 100  # the code of NF4, that of its scales, and a few words
        return (
            rest + sum(math.prod(s) // 2 + math.ceil(math.prod(s) / 64) * (1 + 4 / 256) + tables for s in linear) // 1
        )
    size = group_size(shape[1] for shape in linear) or GROUPS[-1]
    return rest + packed // 2 + 2 * packed // size + 16 * len(linear)


_HEAD, _EMBEDDING = ("lm_head", "output."), ("model.embed", "token_embd")
"""Beginnings of names in transformers and in GGUF."""


def _onnx(shapes: Shapes, bits: int) -> int:
    """INT4 rounds the embedding, which a tied output layer shares; INT8 keeps it in float32 beside that layer."""
    rounded = sum(math.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and LAYER.fullmatch(name))
    vectors = sum(math.prod(shape) for shape in shapes.values() if len(shape) == 1)
    embedding = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(_EMBEDDING))
    head = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(_HEAD))
    whole = embedding if bits == 8 else 0
    rounded += (head or embedding) if bits == 8 else embedding + head
    return round(rounded * (bits + 1 + (4 / 32 if bits == 4 else 0)) / 8) + 4 * (vectors + whole)


def _mnn(shapes: Shapes) -> int:
    """INT4 rounds the output layer, too; an embedding that it does not share is kept in bfloat16."""
    rounded = sum(math.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and LAYER.fullmatch(name))
    vectors = sum(math.prod(shape) for shape in shapes.values() if len(shape) == 1)
    embedding = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(_EMBEDDING))
    head = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(_HEAD))
    return round((rounded + (head or embedding)) * (4 + 64 / 64) / 8) + 4 * vectors + (2 * embedding if head else 0)


_BYTES_PER_TOKEN = 30
"""Of a vocabulary with its merges, in the header of a GGUF file; that of Qwen has 39, of Llama 20."""


def about_gguf(shapes: Shapes, recipe: str) -> int:
    """Bytes of a GGUF file, within a tenth, from shapes alone: `about_bits` in quantize/recipes.yaml.

    K- and IQ-types store rows in blocks of 256; rows of another length fall back to types with blocks of 32. The token
    embedding is stored in Q6_K where it is the output matrix, too.
    """
    tables = data_file("stages/quantize/recipes.yaml")
    bits, any_length = tables["about_bits"][recipe], recipe in tables["blocks_of_32"]
    fallback = next(other for least, other in ((6, 8.5), (5, 6.0), (4, 5.5), (0, 4.5)) if bits >= least)
    untied, total = any(name.startswith(_HEAD) for name in shapes), 0.0
    for name, shape in shapes.items():
        fits = any_length or shape[-1] % 256 == 0
        if len(shape) == 1:
            each = 32.0
        elif name.startswith(_HEAD) or (name.startswith(_EMBEDDING) and not untied):
            each = max(bits, 6.5625 if fits else 8.5)
        else:
            each = bits if fits else max(bits, fallback)
        total += each / 8 * math.prod(shape)
    vocabulary = max((shape[0] for name, shape in shapes.items() if name.startswith(_EMBEDDING)), default=0)
    return round(total) + _BYTES_PER_TOKEN * vocabulary
