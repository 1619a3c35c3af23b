"""What page 06 shows of files at the answers of held-out rows: whether bits were spent well for the task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lib.plots.display import say, table
from lib.plots.formats import with_interval
from lib.plots.mix_rows import beside

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown

NEAR = 0.1
"""Recipes of a mixed file's size: those whose size differs from it by at most this share."""


def against_recipes(effect: Any) -> HTML | Markdown:
    """The mixed file beside every recipe at answers (a MixEffect); a sentence where nothing was compared."""
    if effect is None:
        return say("Nothing to compare at answers: this run has no file under a size budget.")
    content = effect.content
    mixed = content["mixed"]
    rows = [beside(mixed, entry, entry["answers"]) for entry in content["types"]]
    own = with_interval(mixed["answers"]["kld"], mixed["answers"]["kld_interval"])
    caption = (
        f"Task loss: {mixed['type']} ({mixed['bytes'] / 1e6:.2f} MB, KL divergence {own}) beside the recipes where an "
        f"answer's tokens are predicted, in nats a token, on {content['answer_positions']:,} tokens of the answers of "
        f"{content['answer_rows']:,} held-out rows; sizes in units of its own; in brackets 95 % intervals over whole "
        "rows, of differences paired token by token."
    )
    return table(rows, caption)


def against_reading(effect: Any) -> Markdown | None:
    """Whether the mixed file beats recipes of its size in task loss, or that it did not. That its types paid, or did
    not, is said only where size cannot explain it."""
    if effect is None:
        return None
    content = effect.content
    mixed, types = content["mixed"], content["types"]
    near = [e for e in types if abs(e["bytes"] / mixed["bytes"] - 1) <= NEAR]
    which = f"of its size (within {100 * NEAR:.0f} %)"
    if not near:
        near = [min(types, key=lambda e: abs(e["bytes"] - mixed["bytes"]))]
        which = f"nearest to its size ({near[0]['bytes'] / mixed['bytes']:.2f} of it)"
    by = {verdict: [e["type"] for e in near if e["answers"]["verdict"] == verdict] for verdict in _WORDS}
    found = [f"{words} {_listed(by[verdict])}" for verdict, words in _WORDS.items() if by[verdict]]
    recipes = "recipe" if len(near) == 1 else "recipes"
    text = f"Task loss of {mixed['type']} beside the {recipes} {which}: it is {'; '.join(found)}."
    beaten = [e["bytes"] for e in near if e["answers"]["verdict"] == "better"]
    if any(e["answers"]["verdict"] == "worse" and e["bytes"] <= mixed["bytes"] for e in near):
        text += " For the task the choice of types did not pay here."
    elif by["worse"] or by["cannot tell"]:
        text += f" So it does not beat every recipe {which} in task loss, as far as these rows can show."
    elif max(beaten) >= mixed["bytes"]:
        text += " So for the task the choice of types paid."
    else:
        text += " All of these are smaller, so it does not follow that the choice of types paid."
    return say(text)


_WORDS = {
    "better": "shown to lose less than",
    "worse": "shown to lose more than",
    "cannot tell": "not shown to differ from",
}


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
