"""`workbook doctor PARAMS`: which way of training fits this machine, with the arithmetic shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lib.cli.output import show, table

if TYPE_CHECKING:
    from lib.settings import Settings
    from lib.training.strategy import Plan, Strategy

GIB = 2**30
PARTS = ("process", "weights", "adapter", "gradients", "optimizer", "activations", "logits")


def tell(params_file: Path | None, model: str | None, pairs: list[str], as_json: bool) -> None:
    """Print the strategy for a parameter file (else the defaults) and its base model (else `model`)."""
    from lib import settings as schema
    from lib.training.strategy import recommend

    texts = [text.partition("=") for text in pairs]
    overrides = {key: schema.parse_override(key, value) for key, _, value in texts}
    settings = schema.load(params_file, overrides) if params_file else schema.check(overrides, "-p", overrides)
    found = recommend(settings, model)
    show(found.to_json(), as_json, as_text(found, settings))


def as_text(found: Strategy, settings: Settings) -> str:
    """The plans as a table, the recommended one with the settings it needs."""
    gib = found.free / GIB
    lines = [
        f"Strategy for {found.model}: {found.weights / 1e6:,.0f} M weights in {found.dtype}, "
        f"rows of up to {found.tokens} tokens",
        f"Device: {found.device}; {gib:.1f} GiB free"
        + (f" on each of {found.devices} GPUs" if found.devices > 1 else ""),
        "",
        table([_row(plan) for plan in found.plans], ("plan", *PARTS, "need", "fits")),
        "GiB. A trained weight takes 4 bytes in the adapter, 4 as gradient, 8 in AdamW; activations grow with rows ×",
        "tokens; a plan fits when its need is at most nine tenths of what is free.",
        "",
        _advice(found, settings),
    ]
    return "\n".join(lines)


def _row(plan: Plan) -> dict[str, str]:
    sizes = plan.estimate.to_json()
    parts = {part: f"{sizes[part] / GIB:.2f}" for part in PARTS}
    return {"plan": plan.name, **parts, "need": f"{plan.need / GIB:.2f}", "fits": "yes" if plan.fits else "no"}


def _advice(found: Strategy, settings: Settings) -> str:
    from lib.training.strategy import OFFLOAD

    if found.chosen is None:
        return (
            "Recommended: none of these fits. Take a smaller base_model or max_seq_length, or a device with "
            f"{min(plan.need for plan in found.plans if plan.possible) / 0.9 / GIB:.1f} GiB free. {OFFLOAD}"
        )
    changes = found.chosen.changes
    asked = settings.model_copy(update=changes)
    kind = "QLoRA" if asked.load_in_4bit else "LoRA"
    processes = asked.num_processes
    way = f"data parallel on {processes} processes, one GPU each" if found.devices > 1 else f"{processes} processes"
    way = way if processes > 1 else "a single process"
    change = ", ".join(f"{key}: {str(value).lower()}" for key, value in changes.items())
    note = "" if found.devices > 1 else " Several processes on one device share its memory and its speed."
    todo = f"Set {change}." if change else "Nothing needs to be changed."
    way += "".join(found.chosen.name.partition(" (")[1:])  # an update of another size
    return f"Recommended: {kind} in {way}. {todo}{note} {OFFLOAD}"
