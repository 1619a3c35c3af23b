"""What page 06 shows of the importance matrix and of its effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lib.plots.display import key_values, say, table
from lib.plots.formats import with_interval

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown


def card(matrix: Any) -> HTML | Markdown:
    """From which rows the matrix was made (an ImatrixResult); a sentence where there is none."""
    if matrix is None:
        return say(
            "No importance matrix was measured in this run: `imatrix: auto` measures one on the training rows, and "
            "then types below 3 bits (IQ2_XS and others) can be in the ladder."
        )
    record = matrix.record
    left = "; ".join(f"{count:,} with {why}" for why, count in record["left_out"].items())
    values = {
        "training rows used": record["rows"],
        "training rows left out": left,
        "held-out rows among those used": f"{record['shared_with_held_out']} of {record['held_out_rows']:,}, by hash",
        "tokens": f"{record['tokens']:,} in {record['windows']} windows of {record['window_tokens']}",
        "layers": record["entries"],
        "computed in": f"{record['dtype']} on {record['device']}",
        "hash over the rows": record["rows_sha256"],
        "name in the files": record["dataset"],
    }
    return key_values(values, "The importance matrix of this run")


def effect_table(effect: Any) -> HTML | Markdown:
    """With and without the matrix (an EffectResult); a sentence where nothing was compared."""
    if effect is None:
        return say("Nothing to compare: no file of this ladder was made with an importance matrix of this run.")
    content = effect.content
    if not content["types"]:
        return say(f"Nothing to compare: {_left_out(content['left_out'])}")
    rows = [
        {
            "type": entry["type"],
            "MB with": entry["bytes"] / 1e6,
            "MB without": entry["bytes_without"] / 1e6,
            "tensors of other types": len(entry["retyped"]),
            "KLD with, nats ↓": _limits(entry, "kld_with"),
            "KLD without, nats ↓": _limits(entry, "kld_without"),
            "with minus without": _limits(entry, "difference", "+.2g"),
            "p (Holm)": f"{entry['p_holm']:.2g}",
            "with it": entry["verdict"],
            "at answers, with minus without": _limits(entry["answers"], "difference", "+.2g"),
            "p at answers (Holm)": f"{entry['answers']['p_holm']:.2g}",
            "with it, at answers": entry["answers"]["verdict"],
        }
        for entry in content["types"]
    ]
    caption = (
        f"KL divergence from the source on {content['tokens']:,} scored tokens of {content['rows']} held-out rows, and "
        f"at the {content['answer_positions']:,} tokens of the answers of {content['answer_rows']:,}; in brackets 95 % "
        "intervals over whole rows, of the difference paired token by token."
    )
    return table(rows, caption)


def effect_reading(effect: Any) -> Markdown:
    """What the table says, with its numbers."""
    if effect is None or not effect.content["types"]:
        return say("So this page does not say what an importance matrix would change.")
    words = {"better": "closer to the source", "worse": "farther from the source", "cannot tell": "not shown to differ"}
    sentences = []
    for entry in effect.content["types"]:
        change = 100 * entry["difference"] / entry["kld_without"]
        sentences.append(
            f"{entry['type']} with the matrix is {words[entry['verdict']]} ({change:+.0f} % KL divergence), at answers "
            f"{words[entry['answers']['verdict']]}"
        )
    differing = "; ".join(f"{entry['type']}: {_beside(entry)}" for entry in effect.content["types"])
    left_out = effect.content["left_out"]
    return say(
        f"{'; '.join(sentences)}. Source, llama.cpp and rows are the same. What differs beside the matrix, against the "
        f"file without it: {differing}.{' Not compared: ' + _left_out(left_out) if left_out else ''}"
    )


def _beside(entry: Mapping[str, Any]) -> str:
    """What the matrix changed of a file but its rounding: types of tensors, which llama.cpp chooses, and bytes."""
    changes: dict[tuple[str, str], list[str]] = {}
    for tensor in entry["retyped"]:
        changes.setdefault((tensor["with"], tensor["without"]), []).append(tensor["tensor"].removesuffix(".weight"))
    parts = []
    for (new, old), names in changes.items():
        which = ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
        parts.append(f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} {new} instead of {old} ({which})")
    size = f"{entry['bytes'] - entry['bytes_without']:+,} bytes"
    return (
        f"{', '.join(parts)}, {size}" if parts else f"{size} (the header names the matrix), all tensors of equal types"
    )


def _left_out(types: Sequence[str]) -> str:
    return (
        f"{', '.join(types)} cannot be made without a matrix here, because `tensor_types` or its companions want a "
        "type that needs one."
    )


def _limits(entry: Mapping[str, Any], key: str, form: str = ".2g") -> str:
    return with_interval(entry[key], entry[f"{key}_interval"], form)
