"""What page 06 shows before anything is scored: the grid of the base's weights, and what is left of the fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lib.plots.display import say, table
from lib.plots.errormap import kinds_of
from lib.plots.marks import mark_names
from lib.statistics import KEEPS_LITTLE

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown

MARK = "on the grid of the base's weights: can round the fine-tuning away, so do not compare it with other types."
_ALL = "all matrices"


def mark(grid: Any, plan: Sequence[Mapping[str, Any]] = ()) -> None:
    """From now on tables mark such types and files (a SourceGrid; "type" and "histogram" of planned files)."""
    mark_names(grid.marked([(p["type"], p["histogram"]) for p in plan]), MARK)


def grid_table(grid: Any) -> HTML | Markdown:
    """Share of blocks that each type gives back (a SourceGrid); why there is none."""
    if grid.product is None:
        return say(f"Not measured. {grid.reason}")
    shares = sorted(grid.shares.items(), key=lambda pair: -pair[1])
    caption = (
        f"Share of {grid.blocks:,} blocks of 32 of the base's own weights that a type gives back but for the last "
        f"places of 16 bits: rows at even distances of the {grid.matrices:,} matrices that fine-tuning moved, constant "
        "blocks left out."
    )
    rows = [{"tensor type": kind, "given back": share} for kind, share in shares]
    return table(rows, caption, {"given back": ".1%"})


def grid_reading(grid: Any) -> Markdown | None:
    """What that means (a SourceGrid)."""
    if grid.product is None:
        return None
    if notes := grid.product.entry.notes:
        return say(f"**{notes[0][0].upper()}{notes[0][1:]}.**")
    if grid.distinct is None:
        return say("No row of the base fills blocks of 32 weights, so nothing can be told of its grid.")
    most = max(grid.shares.values(), default=0.0)
    return say(
        f"The base's weights lie on the grid of none of the {len(grid.shares)} types tried (at most {100 * most:.1f} % "
        f"given back; {grid.distinct:.1f} different values in a block of 32)."
    )


def kept_table(kept: Any) -> HTML | Markdown:
    """One row a kind of tensor, a column a file: the share of the change that is left (a Retention)."""
    if kept.product is None:
        return say(f"Not measured. {kept.reason}")
    caption = (
        "⟨file − base, δ⟩ / ‖δ‖² with δ = tuned − base: 1 where a file keeps what fine-tuning changed in the weights, "
        "0 where it gives the base back, above 1 where it exaggerates the change; in brackets the share of changed "
        "blocks of 32 that are the base's again. Exact, over all quantized matrices that fine-tuning moved; "
        f"‖δ‖ / ‖base‖ is {kept.moved:.2g}."
    )
    if kept.left_out:
        caption += f" Not in the base and left out: {', '.join(kept.left_out)}."
    rows = [_row(_ALL, kept, None), *(_row(kind, kept, kind) for kind in kinds_of(kept))]
    return table(rows, caption)


def _row(name: str, kept: Any, kind: str | None) -> dict[str, Any]:
    return {"kind": name, **{file: _words(kept, file, kind) for file in kept.files}}


def _words(kept: Any, file: str, kind: str | None = None) -> str | None:
    share, back = kept.kept(file, kind), kept.returned(file, kind)
    if share is None:
        return None
    return f"{share:.2f}" if back is None else f"{share:.2f} ({100 * back:.0f} %)"


def kept_reading(kept: Any) -> Markdown | None:
    """The files that lose more than a tenth of the change, in words (a Retention)."""
    if kept.product is None:
        return None
    found = {name: share for name in kept.files if (share := kept.kept(name)) is not None}
    if not found:
        return say("Fine-tuning moved no matrix that a file quantizes, so there is nothing to keep.")
    poor = sorted((name for name in found if found[name] < KEEPS_LITTLE), key=found.get)
    if poor:
        listed = "; ".join(f"{name} {_words(kept, name)}" for name in poor)
        text = (
            f"**These files keep less than {KEEPS_LITTLE:g} of what fine-tuning changed in the weights: {listed}.** In "
            "brackets: changed blocks that are the base's again. What it costs the answers is measured in 07."
        )
    else:
        least = min(found, key=found.get)
        text = f"Every file keeps at least {KEEPS_LITTLE:g} of the change; least {least}, {_words(kept, least)}."
    return say(f"{text} Export folders are not turned back here; 07 measures what their answers keep.")
