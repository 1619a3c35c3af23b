"""A GGUF file as a model folder that `from_pretrained` loads: weights dequantized, configuration and tokenizer rebuilt.

The folder holds `unpacked.json`, which says where the weights come from and which type they had.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import refusal
from lib.models.gguf_file import TABLES, PackedTensor, head_size, unusable
from lib.models.gguf_tokenizer import tokenizer_json, write_tokenizer
from lib.models.unpack_source import Source, ids_beyond, read_source, transformers_config
from lib.models.weights import FLOAT16_MAX, NUMPY, SAFETENSORS, SINGLE, convert, largest_magnitude, pack_header, widen
from lib.progress import Progress, say
from lib.runs import files, machine, manifest
from lib.runs.files import read_json, remembered_sha256, write_json

if TYPE_CHECKING:
    import torch


# A way off the grid of a quantized file: the same function, computed by weights that lie between its steps.
#
# Weights that were dequantized lie on the grid of their type, and the same type rounds W + δ back to W: it undoes a
# fine-tuning, and looks better than other types where nothing was trained. In a transformer some channels can be scaled
# in one tensor and scaled back in the next, without changing what is computed:
#
#     RMSNorm(x)·γs, and the columns of q, k, v (or of gate and up) divided by s,
#     rows of v (and its bias) times s, and the columns of o divided by s (a group of query heads shares one of v),
#     rows of up (and its bias) times s, and the columns of down divided by s.
#
# Blocks of a quantized type run along a row, so dividing columns by different numbers takes every matrix of a layer off
# the grid. The residual stream, and with it the embedding and the output matrix, stays as it is.

SEED = 20261128
RANGE = (0.8, 1.25)
"""Smallest and largest scale; they are log-uniform between. Why these: docs/LOG.md."""


class Rescaling:
    """Scales of every layer of a model, drawn by `seed`."""

    def __init__(self, config: dict[str, Any], seed: int = SEED) -> None:
        self.config, self.seed = config, seed
        self._scales = functools.lru_cache(maxsize=1)(self._draw)  # tensors come sorted by layer

    def apply(self, name: str, first: int, values: np.ndarray) -> np.ndarray:
        """Rows of a tensor, scaled in float32.

        Args:
            name: of the tensor in transformers; first: number of the first row; values: float32 rows, or a vector.
        """
        if not name.startswith("model.layers."):
            return values
        _, _, layer, *_, module, kind = name.split(".")
        rows, columns = TABLES["rescaled"].get(module, (None, None))
        scales = self._scales(int(layer))
        if rows:
            part = scales[rows][first : first + len(values)]
            values = values * (part if values.ndim == 1 else part[:, None])
        return values / scales[columns] if columns and kind == "weight" else values

    def _draw(self, layer: int) -> dict[str, np.ndarray]:
        config, head = self.config, head_size(self.config)
        keys, width = config["num_key_value_heads"], config["hidden_size"]
        random, (low, high) = np.random.default_rng([self.seed, layer]), np.log(RANGE)
        sizes = {"attention": width, "feed_forward": width, "value": keys * head, "up": config["intermediate_size"]}
        scales = {k: np.exp(random.uniform(low, high, n)).astype(np.float32) for k, n in sizes.items()}
        group = config["num_attention_heads"] // keys
        scales["output"] = np.repeat(scales["value"].reshape(keys, head), group, axis=0).reshape(-1)
        return scales


# Weights in the dtype that was asked for.

_LAST_OF_BFLOAT16 = float(np.array(0x7F7F8000, np.uint32).view(np.float32))  # from here on rounding gives infinity


class TooLargeError(Exception):
    """A weight that the asked dtype cannot hold: its tensor and its magnitude."""


def rounded_slabs(
    source: Source, tensor: PackedTensor, dtype: str, scaling: Rescaling | None
) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of a tensor, rescaled if asked, in `dtype` (bfloat16 as its bits).

    Each value is rounded once, to nearest, ties to even.

    Raises:
        InputError: NaN or infinity.
        TooLargeError: a value beyond the largest of the dtype.
    """
    for first, values in tensor.slabs():
        values = np.ascontiguousarray(scaling.apply(tensor.name, first, values) if scaling else values)
        largest = largest_magnitude(values, "F32")
        if not math.isfinite(largest):
            raise unusable(source.path, f"NaN or infinity in tensor {tensor.name}", "finite weights")
        if (dtype == "float16" and largest > FLOAT16_MAX) or (dtype == "bfloat16" and largest >= _LAST_OF_BFLOAT16):
            raise TooLargeError(f"tensor {tensor.name} holds a weight of size {largest:.6g}")
        yield first, convert(values, "F32", SAFETENSORS[dtype])


def write_weights(source: Source, folder: Path, dtype: str, scaling: Rescaling | None) -> None:
    """Write model.safetensors; a few slabs are in memory at a time.

    Raises:
        InputError: NaN or infinity.
        TooLargeError: a weight that `dtype` cannot hold.
    """
    kind = SAFETENSORS[dtype]
    width = np.dtype(NUMPY[kind]).itemsize
    what, million = f"unpacking {source.path.name} (million weights)", 10**6
    progress = Progress(what, source.parameters // million, pieces=million)
    with (folder / SINGLE).open("wb") as stream, progress:
        stream.write(pack_header({t.name: (kind, t.shape, t.size * width) for t in source.tensors}, {}))
        for tensor in source.tensors:
            for _, values in rounded_slabs(source, tensor, dtype, scaling):
                stream.write(memoryview(values).cast("B"))
                progress.advance(values.size)


# What rounding the unpacked weights costs, by dtype: KL divergence of the next token from the weights in float32.


def cost_of(source: Source, scaling: Rescaling | None) -> tuple[dict[str, float] | None, str]:
    """Mean KL divergence, nats a token, of float16, bfloat16 and float32 from the file's weights in float32.

    The weights are those that are written (with their scales); float32 shows whether the scales change the function.

    Returns:
        The figures by dtype (those that can hold the weights), and what was measured; None and why not, when there is
        not enough memory.

    Raises:
        InputError: the model computes infinities or no numbers.
    """
    need = 4 * source.parameters + (1 << 30)
    if need > machine.available_memory():
        return None, f"not measured: the weights in float32 need {need / 1e9:.1f} GB of memory"
    import torch
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(source.metadata, source.path)))
    samples = files.data_file("models/unpack_texts.yaml")
    texts = [ids for text in samples if len(ids := tokenizer.encode(text).ids) > 1]
    exact = _log_probs(source, "float32", None, texts)
    if not torch.isfinite(exact).all():
        raise refusal("models/gguf-computes-nothing", source=source)
    cost = {}
    for kind in ("float16", "bfloat16", "float32"):
        try:
            other = exact if kind == "float32" and not scaling else _log_probs(source, kind, scaling, texts)
        except TooLargeError:
            continue
        cost[kind] = float((exact.exp() * (exact - other)).sum(-1).mean().clamp(min=0))
    return cost, f"mean KL divergence from float32, nats a token, over {len(exact)} positions of {len(texts)} texts"


def _log_probs(source: Source, dtype: str, scaling: Rescaling | None, texts: list[list[int]]) -> torch.Tensor:
    """Log-probabilities of every next token, float32 (positions, vocabulary), with weights rounded to `dtype`."""
    machine.quiet()
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config, weights = transformers_config(source.config, source.path), {}
    for tensor in source.tensors:
        weights[tensor.name] = torch.empty(tensor.shape)
        for first, values in rounded_slabs(source, tensor, dtype, scaling):
            rows = torch.from_numpy(widen(values, SAFETENSORS[dtype]))
            weights[tensor.name][first : first + len(values)] = rows
    with machine.no_warnings(), torch.inference_mode():
        model, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None,
            config=config,
            state_dict=weights,  # not copied
            dtype=torch.float32,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
        if odd := {*report["missing_keys"], *report["unexpected_keys"]}:
            raise RuntimeError(f"transformers has other tensors: {sorted(odd)[:3]}")
        logits = [model.eval()(torch.tensor([ids])).logits[0] for ids in texts]
        return torch.cat(logits).log_softmax(-1)


# The folder.

RECORD = "unpacked.json"
OFF_GRID = "off-grid"
CHOICES = ("auto", "float16", "bfloat16", "float32")
PLAIN = ("F64", "F32", "F16", "BF16")
"""Types that are no quantized ones."""

VERSION = 2
"""Raised when other weights, configuration or tokenizer come out of the same file."""


def unpack(path: Path | str, folder: Path | str, dtype: str = "auto", off_grid: bool = False) -> dict[str, Any]:
    """Write the model of a GGUF file as the new folder `folder`.

    Args:
        dtype: of the weights; auto = float16, or bfloat16 where a weight is too large for it.
        off_grid: scale channels, without changing the function, so that the weights leave the grid of their type.

    Returns:
        What unpacked.json holds: {"source": file name, "sha256", "version" (of this unpacking), "types": {type:
        weights}, "main_type", "dtype", "dtype_asked", "off_grid", "seed" and "scales" (smallest, largest; both null on
        the grid), "parameters", "license" (as the file says, or null), "cost" (mean KL divergence by dtype, see
        `cost_of`, or null), "cost_note"}, and of special tokens that the vocabulary does not have "left_out".

    Raises:
        InputError: a file that cannot be unpacked, or an output folder that is not new; nothing is left there then.
    """
    source = read_source(path)  # outside of what is blamed on the output
    folder = Path(folder).resolve()
    files.require_new(folder)
    with files.new_folder(folder) as temporary:
        return unpack_into(source, temporary, dtype, off_grid)


def unpack_into(source: Source, folder: Path, dtype: str = "auto", off_grid: bool = False) -> dict[str, Any]:
    """As `unpack`, from a file already checked, into an empty folder that the caller made and will rename."""
    if dtype not in CHOICES:
        raise refusal("models/unknown-dtype", dtype=dtype, known=", ".join(CHOICES))
    if off_grid and source.main_type in PLAIN:
        raise refusal("models/no-grid", source=source)
    scaling = Rescaling(source.config) if off_grid else None
    nbytes = source.parameters * (4 if dtype == "float32" else 2)
    files.require_space(folder, nbytes, f"the weights of {source.path.name}")
    tries = ["float16", "bfloat16", "float32"] if dtype == "auto" else [dtype]
    for chosen in tries:
        try:
            write_weights(source, folder, chosen, scaling)
            break
        except TooLargeError as error:
            if chosen == tries[-1]:
                raise refusal("models/too-large", error=error, source=source, chosen=chosen) from None
    write_json(folder / "config.json", {**source.config, "torch_dtype": chosen})
    write_json(folder / "generation_config.json", source.generation)
    write_tokenizer(source.metadata, source.path, folder)
    cost, note = cost_of(source, scaling)
    record = {
        "source": source.path.name,
        "sha256": remembered_sha256(source.path),
        "version": VERSION,
        "types": source.types,
        "main_type": source.main_type,
        "dtype": chosen,
        "dtype_asked": dtype,
        "off_grid": off_grid,
        "seed": SEED if off_grid else None,
        "scales": list(RANGE) if off_grid else None,
        "parameters": source.parameters,
        "license": name if isinstance(name := source.metadata.get("general.license"), str) else None,
        "cost": cost,
        "cost_note": note,
    }
    record |= {"left_out": odd} if (odd := ids_beyond(source.metadata)) else {}
    write_json(folder / RECORD, record)
    return record


def unpacked(path: Path, dtype: str = "auto", off_grid: bool = False) -> tuple[Path, dict[str, Any]]:
    """The model folder of a GGUF file, kept under .cache/unpacked and made only once, and its `unpacked.json`.

    Raises:
        InputError: a file that cannot be unpacked.
    """
    key: dict[str, Any] = {"sha256": remembered_sha256(path), "dtype": dtype, "off_grid": off_grid}
    key |= {"version": VERSION} | ({"seed": SEED, "scales": list(RANGE)} if off_grid else {})
    made = []

    def build(folder: Path) -> dict[str, Any]:
        made.append(folder)
        record = unpack_into(read_source(path), folder, dtype, off_grid)
        if record["sha256"] != key["sha256"]:
            raise unusable(path, "it changed while it was read", "a file that stays as it is", "run it again")
        return record

    folder = manifest.ensure("gguf", key, build, files.home() / ".cache" / "unpacked")
    say(f"{path.name}: {'unpacked into' if made else 'unpacked before, found in'} {folder}")
    return folder, {**read_json(folder / RECORD), "source": path.name}  # a copy under another name finds it too


def identity(record: Mapping[str, Any]) -> str:
    """What identifies a base that came out of a GGUF file: hash, version of the unpacking, dtype if asked for, scales.

    For example sha256:0123456789abcdef+v2+bfloat16+off-grid-20261128-0.8-1.25 (seed, smallest and largest scale).
    """
    asked = record["dtype_asked"]
    more = [f"v{record['version']}", *([asked] if asked != "auto" else [])]
    if record["off_grid"]:
        more.append("-".join(map(str, [OFF_GRID, record["seed"], *record["scales"]])))
    return "+".join([f"sha256:{record['sha256'][:16]}", *more])


def is_identity(revision: str) -> bool:
    """Whether a revision is the `identity` of a base from a GGUF file, not a hub's commit or the hash of a folder."""
    return revision.startswith("sha256:") and "+" in revision


def asked_in(revision: str) -> dict[str, Any]:
    """How the base of this identity was unpacked, as keywords of `resolve_base`; empty where it says nothing."""
    _, *more = revision.split("+") if revision.startswith("sha256:") else [revision]
    dtype = next((part for part in more if part in CHOICES), None)
    off_grid = any(part.startswith(OFF_GRID) for part in more)
    return ({"gguf_dtype": dtype} if dtype else {}) | ({"gguf_off_grid": True} if off_grid else {})


def without_dtype(revision: str) -> str:
    """An `identity` without the number format that was asked for: which weights, not how finely they are stored."""
    return "+".join(part for part in revision.split("+") if part not in CHOICES)


def plain_name(name: str) -> str:
    """A GGUF file's name without its type: SmolLM2-135M-Instruct.Q4_1.gguf → SmolLM2-135M-Instruct.

    Other names stay as they are.
    """
    if not name.lower().endswith(".gguf"):
        return name
    return re.sub(r"[.-](I?Q\d\w*|TQ\d\w*|MXFP4\w*|B?F16|F32)$", "", name[:-5], flags=re.IGNORECASE) or name


def notes_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """What every page must say of a base that comes from a GGUF file."""
    kind, source = record["main_type"], record["source"]
    first = f"weights {'read' if kind in PLAIN else 'dequantized'} from {kind} ({source})"
    grid = ["channels rescaled so that they leave the source's grid"] if record["off_grid"] else []
    return (first, *grid, *record.get("left_out", ()))
