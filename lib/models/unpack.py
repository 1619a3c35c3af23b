"""A GGUF file as a model folder that `from_pretrained` loads: weights dequantized, configuration and tokenizer rebuilt.

The folder holds `unpacked.json`, which says where it comes from, and of which type the weights were.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError
from lib.models.gguf_file import unusable
from lib.models.gguf_tokenizer import tokenizer_json
from lib.models.unpack_configuration import transformers_config
from lib.models.unpack_source import PackedTensor, Rescaling, Source
from lib.models.weights import NUMPY, SAFETENSORS, SINGLE, convert, largest_magnitude, pack_header, widen
from lib.progress import Progress

if TYPE_CHECKING:
    import torch


FLOAT16_MAX = 65504.0
_LAST_OF_BFLOAT16 = float(np.array(0x7F7F8000, np.uint32).view(np.float32))  # from here on rounding gives infinity


class TooLargeError(Exception):
    """A weight that the asked dtype cannot hold: its tensor and its magnitude."""


def rounded(values: np.ndarray, dtype: str, name: str, source: Source) -> np.ndarray:
    """float32 values in `dtype` (bfloat16 as its bits), each rounded once, to nearest, ties to even.

    Raises:
        InputError: NaN or infinity.
        TooLargeError: a value beyond the largest of the dtype.
    """
    largest = largest_magnitude(values, "F32")
    if not math.isfinite(largest):
        raise unusable(source.path, f"NaN or infinity in tensor {name}", "finite weights")
    if (dtype == "float16" and largest > FLOAT16_MAX) or (dtype == "bfloat16" and largest >= _LAST_OF_BFLOAT16):
        raise TooLargeError(f"tensor {name} holds a weight of size {largest:.6g}")
    return convert(values, "F32", SAFETENSORS[dtype])


def scaled_slabs(tensor: PackedTensor, scaling: Rescaling | None) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, float32 rows) of a tensor, rescaled if asked."""
    for first, values in tensor.slabs():
        yield first, scaling.apply(tensor.name, first, values) if scaling else values


def write_weights(source: Source, folder: Path, dtype: str, scaling: Rescaling | None) -> None:
    """Write model.safetensors; a few slabs are in memory at a time.

    Raises:
        InputError: NaN or infinity.
        TooLargeError: a weight that `dtype` cannot hold.
    """
    kind = SAFETENSORS[dtype]
    width = np.dtype(NUMPY[kind]).itemsize
    with (folder / SINGLE).open("wb") as stream:
        stream.write(pack_header({t.name: (kind, t.shape, t.size * width) for t in source.tensors}, {}))
        with Progress(f"unpacking {source.path.name} (million weights)", source.parameters // 10**6) as progress:
            done = 0
            for tensor in source.tensors:
                for _, values in scaled_slabs(tensor, scaling):
                    data = rounded(np.ascontiguousarray(values).reshape(-1), dtype, tensor.name, source)
                    stream.write(memoryview(data).cast("B"))
                    before, done = done, done + values.size
                    progress.advance(done // 10**6 - before // 10**6)


# What rounding the unpacked weights costs, by dtype: KL divergence of the next token from the weights in float32.

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
    from lib.runs.machine import available_memory

    need = 4 * source.parameters + (1 << 30)
    if need > available_memory():
        return None, f"not measured: the weights in float32 need {need / 1e9:.1f} GB of memory"
    import torch

    texts = _ids(source)
    model = _empty_model(source)
    with torch.inference_mode():
        exact = _log_probs(model, source, "float32", None, texts)
        if not torch.isfinite(exact).all():
            found = "the model computes numbers that are not finite"
            raise unusable(source.path, found, "weights that give probabilities")
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

    from lib.runs.machine import no_warnings, quiet

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
            data = widen(rounded(values, dtype, tensor.name, source), SAFETENSORS[dtype])
            places[tensor.name].data[first : first + len(values)] = torch.from_numpy(np.ascontiguousarray(data))


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
        `cost.cost_of`, or null), "cost_note"}.

    Raises:
        InputError: a file that cannot be unpacked, or an output folder that is not new; nothing is left there then.
    """
    from lib.models.unpack_source import read_source
    from lib.runs.files import new_folder

    source = read_source(path)  # outside of what is blamed on the output
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} already exists.", "a new or empty folder.", "remove it or choose another name.")
    with new_folder(folder) as temporary:
        return unpack_into(source, temporary, dtype, off_grid)


def unpack_into(source: Source, folder: Path, dtype: str = "auto", off_grid: bool = False) -> dict[str, Any]:
    """As `unpack`, from a file that was looked at, into an empty folder that the caller made and will rename."""
    from lib.models.gguf_tokenizer import write_tokenizer
    from lib.models.unpack_source import RANGE, SEED, Rescaling
    from lib.runs.files import remembered_sha256, require_space, write_json

    if dtype not in CHOICES:
        raise InputError(f"dtype {dtype!r}.", f"one of {', '.join(CHOICES)}.", "choose one of them.")
    if off_grid and source.main_type in PLAIN:
        raise InputError(
            f"{source.path} of {source.main_type} weights, which lie on no grid to leave.",
            "a file of a quantized type.",
            "leave out --off-grid (gguf_off_grid: false).",
        )
    scaling = Rescaling(source.config) if off_grid else None
    require_space(folder, source.parameters * (4 if dtype == "float32" else 2), f"the weights of {source.path.name}")
    tries = ["float16", "bfloat16", "float32"] if dtype == "auto" else [dtype]
    for chosen in tries:
        try:
            write_weights(source, folder, chosen, scaling)
            break
        except TooLargeError as error:
            if chosen == tries[-1]:
                raise InputError(
                    f"{error} of {source.path}, too large for {chosen}.",
                    "weights it can hold.",
                    "--dtype auto (gguf_dtype: auto).",
                ) from None
    write_json(folder / "config.json", {**source.config, "torch_dtype": chosen})
    write_json(folder / "generation_config.json", source.generation)
    write_tokenizer(source.metadata, source.path, folder)
    cost, note = cost_of(source, chosen, scaling)
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
    write_json(folder / RECORD, record)
    return record


def unpacked(path: Path, dtype: str = "auto", off_grid: bool = False) -> tuple[Path, dict[str, Any]]:
    """The model folder of a GGUF file, kept under .cache/unpacked and made only once, and its `unpacked.json`.

    Raises:
        InputError: a file that cannot be unpacked.
    """
    from lib.models.unpack_source import RANGE, SEED, read_source
    from lib.progress import say
    from lib.runs import files, manifest
    from lib.runs.files import read_json, remembered_sha256

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
    """What tells a base from a GGUF file from all others: hash, version of the unpacking, dtype if asked, scales.

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
    """An `identity` but for the number format that was asked for: which weights, not how finely they are stored."""
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
    return (first, *(["channels rescaled so that they leave the source's grid"] if record["off_grid"] else []))
