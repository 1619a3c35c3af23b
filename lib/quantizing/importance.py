"""The product `imatrix`: an importance matrix of the run's own training rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.device import available_memory
from lib.quantizing.calibration import choose_windows
from lib.run import Product, Run, Work
from lib.run.child import run_child
from lib.run.files import read_json, write_json, write_jsonl

if TYPE_CHECKING:
    from lib.settings import Settings

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
    answer = run_child("lib.quantizing.collecting:collect", argument, "measuring the importance matrix")
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
