"""Tiny Qwen2 models as GGUF files, made without a model library, the same on every machine."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lib.stages.quantize.files import Options, QuantizationReport, quantize_files


def byte_tokens() -> list[str]:
    """The 256 tokens of byte-level BPE, in the order of GPT-2's table."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return [chr(b) for b in shown] + [chr(256 + i) for i in range(len(hidden))]


SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGED = "!!"
WITH_MERGE = [*(MERGED if token == "ÿ" else token for token in byte_tokens()), *SPECIAL_TOKENS]
"""Tokens as `write` has them by default, but with the one that its only merge makes in place of byte 255 (in no text):
the files for `quantize`, whose bytes are compared, have a merge of no token; `serve` and `perplexity` refuse those."""


def noise(shape: tuple[int, ...], seed: int, scale: float = 0.05) -> np.ndarray:
    """Weights by integer arithmetic alone: no library or processor can change them."""
    x = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(seed * 1_000_003 + 1)
    for _ in range(2):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = (x >> np.uint64(40)).astype(np.float64) / 2**24
    return ((2 * x - 1) * scale).astype(np.float32).reshape(shape)


def tensors(width: int, layers: int, seed: int, vocabulary: int, hidden: int, kv_width: int) -> dict[str, np.ndarray]:
    """All tensors of a Qwen2 model with tied embeddings; matrices as (rows, columns)."""
    result = {
        "token_embd.weight": noise((vocabulary, width), seed, 0.5),
        "output_norm.weight": np.ones(width, np.float32),
    }
    shapes = {
        "attn_q.weight": (width, width),
        "attn_k.weight": (kv_width, width),
        "attn_v.weight": (kv_width, width),
        "attn_output.weight": (width, width),
        "ffn_gate.weight": (hidden, width),
        "ffn_up.weight": (hidden, width),
        "ffn_down.weight": (width, hidden),
        "attn_q.bias": (width,),
        "attn_k.bias": (kv_width,),
        "attn_v.bias": (kv_width,),
    }
    for layer in range(layers):
        for i, (name, shape) in enumerate(shapes.items()):
            result[f"blk.{layer}.{name}"] = noise(shape, seed + 100 * (layer + 1) + i, 0.1)
        for name in ("attn_norm.weight", "ffn_norm.weight"):
            result[f"blk.{layer}.{name}"] = np.ones(width, np.float32)
    return result


def _saved(folder: Path) -> tuple[list[str], list[str]]:
    """Tokens in the order of their ids, and merges, of a saved tokenizer."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {**content["model"]["vocab"], **{token["content"]: token["id"] for token in content["added_tokens"]}}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    return sorted(ids, key=ids.get), merges


def write(
    path: Path,
    width: int = 256,
    layers: int = 2,
    seed: int = 1,
    tokens: list[str] | None = None,
    weights: dict[str, np.ndarray] | None = None,
    tokenizer: Path | None = None,
    outtype: str = "f16",
    half: tuple[str, ...] = (),
) -> Path:
    """Write a tiny Qwen2 GGUF.

    Args:
        width: hidden size; 256 fills super-blocks, 896 (as Qwen2.5-0.5B) does not.
        tokens: vocabulary; default the 256 bytes and three special tokens.
        tokenizer: folder of a saved tokenizer to use instead, with its merges and chat template.
        weights: tensors to use instead of noise.
        outtype: "f16" or "f32" for the matrices.
        half: vectors that are float16, too.
    """
    merges = [" ".join(MERGED)]
    if tokenizer is not None:
        tokens, merges = _saved(tokenizer)
    tokens = tokens or [*byte_tokens(), *SPECIAL_TOKENS]
    heads, hidden = width // 64, 512
    weights = weights or tensors(width, layers, seed, len(tokens), hidden, 128)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_name("tiny")
    writer.add_block_count(layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if outtype == "f16" else gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token in tokens])
    writer.add_token_merges(merges)
    if tokenizer is not None:
        writer.add_chat_template((tokenizer / "chat_template.jinja").read_text(encoding="utf-8"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    for name, values in weights.items():
        short = (outtype == "f16" and values.ndim > 1) or name in half
        writer.add_tensor(name, values.astype(np.float16 if short else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _importance(model: dict[str, np.ndarray], calls: int) -> dict[str, np.ndarray]:
    """Sums of squares for every linear layer of the blocks: positive, and different for every input."""
    linear = {k: v for k, v in model.items() if k.startswith("blk.") and k.endswith(".weight") and v.ndim == 2}
    return {k: (noise((v.shape[1],), 900 + i, 1.0) ** 2 + 0.01) * calls for i, (k, v) in enumerate(linear.items())}


def write_imatrix(path: Path, width: int = 256, calls: int = 4, legacy: bool = False) -> Path:
    """Write an importance matrix for the model that `write` makes; `legacy` = the older .dat format."""
    sums = _importance(tensors(width, 2, 1, 259, 512, 128), calls)
    if legacy:
        with path.open("wb") as stream:
            stream.write(np.int32(len(sums)).tobytes())
            for name, values in sums.items():
                stream.write(np.int32(len(name)).tobytes() + name.encode())
                stream.write(np.array([calls, len(values)], np.int32).tobytes() + values.astype(np.float32).tobytes())
            text = b"calibration.txt"
            stream.write(np.int32(calls).tobytes() + np.int32(len(text)).tobytes() + text)
        return path
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["calibration.txt"])
    writer.add_uint32("imatrix.chunk_count", calls)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in sums.items():
        writer.add_tensor(f"{name}.in_sum2", values.astype(np.float32).reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.array([[float(calls)]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def with_number(source: Path, target: Path, key: str, value: int) -> Path:
    """A copy of a GGUF file with one unsigned 32-bit header value replaced."""
    data, name = bytearray(source.read_bytes()), key.encode()
    place = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4
    data[place : place + 4] = struct.pack("<I", value)
    target.write_bytes(data)
    return target


def with_values(source: Path, target: Path, values: Mapping[str, Any]) -> Path:
    """A copy of a GGUF file with other values of some keys, or further small numbers."""
    reader, new = gguf.GGUFReader(source), dict(values)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, held in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = new.pop(key) if key in new else held.contents()
        if value != []:  # the library writes no empty list
            writer.add_key_value(key, value, held.types[0], held.types[1] if len(held.types) > 1 else None)
    for key, value in new.items():
        writer.add_uint16(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def write_shapes_of_qwen25_05b(path: Path) -> Path:
    """A sparse F16 file with the header and shapes of Qwen2.5-0.5B (494 M weights) and no data."""
    width, hidden, kv_width, layers, vocabulary = 896, 4864, 128, 24, 151_936
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(layers)
    writer.add_context_length(32768)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(14)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    shapes = {"token_embd.weight": (vocabulary, width), "output_norm.weight": (width,)}
    for layer in range(layers):
        block = {
            "attn_q.weight": (width, width),
            "attn_k.weight": (kv_width, width),
            "attn_v.weight": (kv_width, width),
            "attn_output.weight": (width, width),
            "ffn_gate.weight": (hidden, width),
            "ffn_up.weight": (hidden, width),
            "ffn_down.weight": (width, hidden),
            "attn_q.bias": (width,),
            "attn_k.bias": (kv_width,),
            "attn_v.bias": (kv_width,),
            "attn_norm.weight": (width,),
            "ffn_norm.weight": (width,),
        }
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        kind = np.dtype(np.float16 if len(shape) > 1 else np.float32)
        writer.add_tensor_info(name, shape, kind, int(np.prod(shape)) * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size + 32 * len(shapes) + 989_000_000)
    return path


def quantize_file(
    source: Path, output: Path, name: str, options: Options | None = None, n_threads: int = 0
) -> QuantizationReport:
    """One file of one type."""
    return quantize_files(source, output, [name], options, n_threads)[0]
