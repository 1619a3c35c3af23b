"""Importance matrices: the mean square of every input of every linear layer over a calibration text.
The product `imatrix`: an importance matrix of the run's own training rows.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError
from lib.runs.child import run_child
from lib.runs.files import read_json, write_json, write_jsonl
from lib.runs.machine import available_memory
from lib.runs.run import Product, Run, Work
from lib.stages.quantize.calibration import choose_windows

if TYPE_CHECKING:
    from lib.settings import Settings
    from lib.stages.quantize.llama_library import Header


# Importance matrices: the mean square of every input of every linear layer over a calibration text.
#
# Both formats of llama.cpp are read: GGUF (`general.type` = "imatrix": sums of squares and counts) and the older .dat
# (little-endian: entries of name, calls, values; then chunks and the name of the data set). For child processes only.

_SUMS, _COUNTS = ".in_sum2", ".counts"
_LONGEST_NAME = 4096


@dataclass
class Imatrix:
    """Values by tensor name (float32, one for every input of the layer, experts one after another)."""

    file: str
    values: dict[str, np.ndarray] = field(default_factory=dict)
    dataset: str | None = None
    chunks: int = 0

    def header_texts(self) -> dict[str, str]:
        """Keys of text that llama.cpp adds to a file quantized with an importance matrix (127 bytes at most)."""
        texts = {"quantize.imatrix.file": self.file}
        if self.dataset is not None:
            texts["quantize.imatrix.dataset"] = self.dataset
        return {key: text.encode()[:127].decode("utf-8", "ignore") for key, text in texts.items()}

    def header_numbers(self) -> dict[str, int]:
        """Keys of numbers, likewise."""
        numbers = {"quantize.imatrix.entries_count": len(self.values)}
        return {**numbers, "quantize.imatrix.chunks_count": self.chunks} if self.chunks > 0 else numbers


def _damaged(path: Path, what: str) -> InputError:
    return InputError(
        f"the importance matrix {path}: {what}.", "a file of `workbook imatrix` or llama-imatrix.", "make it again."
    )


def read(path: Path) -> Imatrix:
    """Read an importance matrix.

    Raises:
        InputError: no such file, neither format, or values that no mean square can have: not finite, negative, or 0
            for every input of a layer (llama.cpp would round all its weights to nothing).
    """
    if not path.is_file():
        raise InputError(f"no file {path}.", "an importance matrix.", "correct the path.")
    with path.open("rb") as stream:
        is_gguf = stream.read(4) == b"GGUF"
    result = _read_gguf(path) if is_gguf else _read_legacy(path)
    for name, values in result.values.items():
        if not np.isfinite(values).all():
            raise _damaged(path, f"{name} holds values that are not finite")
        if (values < 0).any():
            raise _damaged(path, f"{name} holds negative values, which no mean square is")
        if not values.any():
            raise _damaged(path, f"{name} holds nothing but zeros")
    return result


def _read_gguf(path: Path) -> Imatrix:
    from lib.stages.quantize.llama_library import open_header

    with open_header(path) as header:
        if header.text("general.type") != "imatrix":
            raise _damaged(path, f"its general.type is {header.text('general.type')!r}, not 'imatrix'")
        names = [name.removesuffix(_SUMS) for name in header.tensors if name.endswith(_SUMS)]
        if not names:
            raise _damaged(path, "it holds no sums")
        result = Imatrix(path.name, {}, header.first_text("imatrix.datasets"))
        result.chunks = header.number("imatrix.chunk_count") or 0
        for name in sorted(names):
            if name + _COUNTS not in header.tensors:
                raise _damaged(path, f"{name} has sums but no counts")
            sums, counts = _floats(path, header, name + _SUMS), np.round(_floats(path, header, name + _COUNTS))
            if not np.isfinite(counts).all() or (counts < 0).any():
                raise _damaged(path, f"{name} has counts that are no numbers of tokens")
            if counts.size == 0 or sums.size % counts.size:
                raise _damaged(path, f"{name} has {sums.size} sums for {counts.size} counts")
            sums, counts = sums.reshape(counts.size, -1), counts[:, None]
            means = np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1))
            result.values[name] = np.ascontiguousarray(means.reshape(-1), dtype=np.float32)
    return result


def _floats(path: Path, header: Header, name: str) -> np.ndarray:
    tensor = header.tensors[name]
    if tensor["type"] != "f32":
        raise _damaged(path, f"{name} is {tensor['type']}, not f32")
    return np.fromfile(path, "<f4", tensor["weights"], offset=tensor["offset"])


def _read_legacy(path: Path) -> Imatrix:
    data = path.read_bytes()
    position = 0

    def integer() -> int:
        nonlocal position
        if position + 4 > len(data):
            raise _damaged(path, "it ends too early or is no importance matrix")
        position += 4
        return struct.unpack_from("<i", data, position - 4)[0]

    def take(size: int, most: int) -> bytes:
        nonlocal position
        if not 0 < size <= most or position + size > len(data):
            raise _damaged(path, "it ends too early or is no importance matrix")
        position += size
        return data[position - size : position]

    result = Imatrix(path.name)
    entries = integer()
    if not 0 < entries <= len(data) // 12:
        raise _damaged(path, "neither GGUF nor the older .dat format")
    for _ in range(entries):
        name = take(integer(), _LONGEST_NAME).decode("utf-8", "replace")
        calls, count = integer(), integer()
        values = np.frombuffer(take(4 * count, len(data)), "<f4")
        result.values[name] = np.ascontiguousarray(values / np.float32(calls) if calls > 0 else values, np.float32)
    if position < len(data):
        result.chunks = integer()
        if position < len(data):
            result.dataset = take(integer(), _LONGEST_NAME).split(b"\0")[0].decode("utf-8", "replace")
    return result


# The product `imatrix`: an importance matrix of the run's own training rows.

AUTO, NONE = "auto", "none"
FILE, RECORD, ROWS = "imatrix.gguf", "imatrix.json", "rows.jsonl"


@dataclass(frozen=True)
class ImatrixResult:
    """The importance matrix of a run.

    Attributes:
        path: the file, which llama-quantize and llama-imatrix read.
        record: "dataset", "rows", "left_out" (training rows by reason), "held_out_rows", "shared_with_held_out" (0),
            "tokens", "windows", "window_tokens", "rows_sha256", "entries", "dtype", "device", "seconds".
    """

    product: Product
    path: Path
    record: dict[str, Any]


def measure(settings: Settings, run: Run) -> ImatrixResult | None:
    """Make the importance matrix, or find it unchanged (but with `force`); None unless the setting `imatrix` is auto.

    Raises:
        InputError: as `existing`.
    """
    return _produce(settings, run, settings.force)


def existing(settings: Settings, run: Run) -> ImatrixResult | None:
    """The same for the steps that use it: what is there and unchanged is never made again, whatever `force` says.

    Raises:
        InputError: products missing, too few training rows, an architecture that is not known.
    """
    return _produce(settings, run, False)


def _produce(settings: Settings, run: Run, force: bool) -> ImatrixResult | None:
    if settings.imatrix != AUTO:
        return None
    product = run.produce(
        "imatrix",
        lambda work: _build(settings, run, work),
        parameters=settings.pick("n_ctx", "seed", "imatrix_chunks"),
        inputs=("data", "merged"),
        force=force,
    )
    return ImatrixResult(product, product.path / FILE, read_json(product.path / RECORD))


def _build(settings: Settings, run: Run, work: Work) -> None:
    data, merged = run.require("data"), run.require("merged")
    chosen = choose_windows(data.path, settings.n_ctx, settings.imatrix_chunks, settings.seed)
    argument = {
        "model": str(merged.path.resolve()),
        "windows": chosen.windows,
        "output": str((work.folder / FILE).resolve()),
        "dataset": chosen.dataset,
        "dtype": computing_dtype(_stored(merged)),
    }
    answer = run_child("lib.stages.quantize.fisher:collect_imatrix", argument, "measuring the importance matrix")
    made = {key: answer[key] for key in ("entries", "seconds", "device")}
    record = {"dataset": chosen.dataset, **chosen.facts, "windows": len(chosen.windows), "dtype": argument["dtype"]}
    write_json(work.folder / RECORD, {**record, **made, "peak_memory_mib": answer["peak_memory_mib"]})
    write_jsonl(work.folder / ROWS, chosen.used)
    work.device = answer["device"]
    work.facts |= {"dataset": chosen.dataset, "shared_with_held_out": chosen.facts["shared_with_held_out"]}
    work.metrics |= {key: record[key] for key in ("rows", "tokens", "windows")}


def _stored(merged: Product) -> int:
    return sum(out["bytes"] for name, out in merged.entry.outputs.items() if name.endswith(".safetensors"))


def computing_dtype(size: int) -> str:
    """float32 as llama.cpp computes, where weights of `size` bytes (16 bits each on the disk) leave room for it."""
    return "float32" if 4 * size < available_memory() else "bfloat16"
