"""An adapter that somebody else trained becomes the run's product `adapter`: checked, copied, and said so."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.models.adapters import AdapterShape, adapter_config, check_fit
from lib.models.base_model import Base, GivenAdapter, base_of, called, refuse_other_weights, resolve_adapter
from lib.models.weights import open_weights
from lib.runs.files import read_json, user_path, write_json, write_jsonl, write_text
from lib.runs.machine import bitsandbytes_problem
from lib.select.choice import BEST_OF, Best, best_of

if TYPE_CHECKING:
    from lib.runs.run import Product, Run, Work
    from lib.settings import Settings


def take(settings: Settings, run: Run, force: bool = False) -> Product:
    """The product `adapter` by the setting `adapter`: a folder, an id, or `best-of:RUN,RUN,…`, chosen now.

    Raises:
        InputError: it cannot be had, does not fit the base model, or the runs cannot be compared.
    """
    best = best_of(settings.adapter, run) if settings.adapter.startswith(BEST_OF) else None
    given = best.given if best else resolve_adapter(settings.adapter)
    return run.produce(
        "adapter",
        lambda work: adopt(given, run, work, best),
        parameters={"adapter": given.id, "adapter_revision": given.revision},
        inputs=("data",),
        force=force,
    )


def adopt(given: GivenAdapter, run: Run, work: Work, best: Best | None = None) -> None:
    """Fill in the product from an adapter that fits the run's base model.

    Args:
        best: how it was chosen among runs; None for one that was simply given.

    Raises:
        InputError: it does not fit, or is not a LoRA in safetensors.
    """
    base = base_of(run)
    refuse_other_weights(given.path, base)
    shape = check_fit(given.path, base.path)
    method, trained_on = (best.method, f"as run {best.run} says") if best else trained_as(given.path)
    if method == "QLoRA" and (problem := bitsandbytes_problem()):
        work.notes.append(
            f"the adapter was trained on a 4-bit base, which does not work here ({problem}): 16 bits instead"
        )
        method = "LoRA"
    work.notes += _chosen_note(best) if best else _notes(given, base, shape)
    shutil.copyfile(given.path / "adapter_model.safetensors", work.folder / "adapter_model.safetensors")
    write_config(work.folder, adapter_config(given.path), base)
    write_jsonl(work.folder / "history.jsonl", [])
    total = open_weights(base.path).parameters + shape.parameters
    write_json(work.folder / "training.json", _facts(given, base, shape, total, trained_on))
    write_text(work.folder / "README.md", _readme(given, base, shape) + (f"\n{best.analysis.text}\n" if best else ""))
    if best:
        best.analysis.write(work.folder)
        work.facts["chosen"] = {"run": best.run, "test_rows_seen": best.test_rows_seen, "text": best.analysis.text}
    work.facts |= {
        "base_model": base.id,
        "base_revision": base.revision,
        "offline_base": base.offline,
        "method": method,
        "adopted": {"id": given.id, "revision": given.revision},
        "trainable": shape.parameters,
        "total": total,
    }


def trained_as(folder: Path) -> tuple[str, str]:
    """ "QLoRA" or "LoRA", and in words what an adapter's files say of the base that it was trained on.

    adapter_config.json has no field for it. This workbook's training.json has; peft writes the quantization into the
    model card, and so do tools whose card holds their configuration. Where nothing is said it is taken for a LoRA.
    """
    record = folder / "training.json"
    if record.is_file() and isinstance(facts := read_json(record), dict) and isinstance(facts.get("method"), str):
        four = facts["method"].startswith("QLoRA")
        return ("QLoRA", "a 4-bit base (training.json)") if four else ("LoRA", "a 16- or 32-bit base (training.json)")
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if found := re.search(r"load_in_4bit\W+(true|false)", text, re.IGNORECASE):
        four = found[1].lower() == "true"
        return ("QLoRA", "a 4-bit base (its model card)") if four else ("LoRA", "no 4-bit base (its model card)")
    return "LoRA", "not known: its files do not say; taken for a 16-bit base"


def write_config(folder: Path, config: dict[str, Any], base: Base) -> None:
    """adapter_config.json that names the run's base model: by id and commit, by its folder, or by its GGUF file.

    A GGUF file is named with its identity as revision: `unpacking_of` reads there how the file was unpacked.
    """
    hub = not base.offline and not base.revision.startswith("sha256:")  # that one is a local folder's
    gguf = base.unpacked is not None
    name = base.id if hub else str(user_path(base.id) if gguf else base.path)
    revision = base.revision if hub or gguf else None
    write_json(folder / "adapter_config.json", {**config, "base_model_name_or_path": name, "revision": revision})


def _notes(given: GivenAdapter, base: Base, shape: AdapterShape) -> list[str]:
    notes = [
        f"nothing was trained in this run: the adapter ({called(given.id)}) was adopted, "
        "and whether it has seen the test rows is not known"
    ]
    if shape.base and _last(shape.base) not in (_last(base.id), _last(str(base.path))):
        notes.append(f"the adopted adapter names {shape.base} as its base model; here it is put on {called(base.id)}")
    return notes


def _chosen_note(best: Best) -> list[str]:
    seen = f"{best.test_rows_seen} test rows" if best.test_rows_seen else "no test row"
    return [
        f"nothing was trained in this run: the adapter of run {best.run} was taken, by the rule of `workbook select` "
        f"({best.given.id}); that run has used {seen} of this one for training or for choosing its checkpoint"
    ]


def _last(name: str) -> str:
    return name.partition("@")[0].rstrip("/").rpartition("/")[2].lower()


def _facts(given: GivenAdapter, base: Base, shape: AdapterShape, total: int, trained_on: str) -> dict[str, Any]:
    """training.json in the form of a trained adapter's; what only a training has is zero or empty."""
    return {
        "adopted": {"id": given.id, "revision": given.revision, **shape.to_json(), "trained_on": trained_on},
        "method": f"{shape.variant} r={shape.rank}, alpha={shape.alpha} on {shape.modules} linear layers",
        "trainable": shape.parameters,
        "total": total,
        "estimate": {},
        "memory": {},
        "advice": [],
        "chosen_step": 0,
        "steps": 0,
        "throughput": 0.0,
        "resumed_from": None,
        "layout": "",
        "messages": [],
        "seconds": 0.0,
        "peak_memory_mib": 0.0,
        "train_rows": 0,
        "validation_rows": 0,
        "dtype": shape.dtype,
        "dtype_reason": "as it came",
        "micro_batch": {},
        "base": {"id": base.id, "revision": base.revision, "offline": base.offline},
    }


def _readme(given: GivenAdapter, base: Base, shape: AdapterShape) -> str:
    return f"""# Adapter adopted from {given.id}

Not trained by the workbook: copied from {given.id} (revision {given.revision}) after a check that every tensor has its
place in base model {base.id} (revision {base.revision}). {shape.variant} of rank {shape.rank}, alpha {shape.alpha}, on
{shape.modules} modules ({", ".join(shape.targets)}), {shape.parameters:,} weights. What it was trained on is not known
here; its own licence applies.
"""
