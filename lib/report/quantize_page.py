"""What page 06 shows of the importance matrix and of its effect.
What page 06 shows of the file under a size budget: its types, what they are predicted to cost, what they bought.
What page 06 shows of files at the answers of held-out rows: whether bits were spent well for the task.
The rows and sentences about export formats in notebooks 06 and 07.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lib.report.display import key_values, say, table, with_interval
from lib.report.rows import Row

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown


# What page 06 shows of the importance matrix and of its effect.


def imatrix_card(matrix: Any) -> HTML | Markdown:
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


# What page 06 shows of the file under a size budget: its types, what they are predicted to cost, what they bought.

_NONE = (
    "No size budget in this run: `size_budget_mb` (or `size_budget_bpw`) adds one more file of at most that size, with "
    "a type for every tensor chosen by measurement."
)


def types_table(mix: Any) -> HTML | Markdown:
    """One row a kind of tensor (of a `lib.stages.quantize.files.PlannedFile`); a sentence where there is none."""
    if mix is None:
        return say(_NONE)
    record, at_answers = mix.record, ""
    if record["answers"]:
        answers = record["answers"]
        at_answers = f", and {answers['positions']:,} tokens of the answers of {answers['rows']:,} training rows"
    caption = (
        f"The types chosen for {mix.prediction['type']} (layer by layer, first to last; MB = 10⁶ bytes), and the KL "
        f"divergence that each kind alone is predicted to cost, on {record['positions']:,} positions of training "
        f"text{at_answers}."
    )
    return table(rows(mix.record["tensors"]), caption)


def rows(tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tensors by kind: "kind", "types" in the order of layers, "MB", "bits per weight", "predicted KL" and, where there
    were answers, "predicted KL at answers"."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for tensor in sorted(tensors, key=lambda t: _place(t["tensor"])[0]):
        kinds.setdefault(_place(tensor["tensor"])[1], []).append(tensor)
    return [
        {
            "kind": kind,
            "types": _runs([t["type"] for t in group]),
            "MB": round(sum(t["bytes"] for t in group) / 1e6, 3),
            "bits per weight": round(8 * sum(t["bytes"] for t in group) / sum(t["weights"] for t in group), 2),
            "predicted KL": round(sum(t["kld"] for t in group), 6),
            **_at_answers(group),
        }
        for kind, group in kinds.items()
    ]


def _at_answers(tensors: list[dict[str, Any]]) -> dict[str, float]:
    if "answer_kld" not in tensors[0]:
        return {}
    return {"predicted KL at answers": round(sum(t["answer_kld"] for t in tensors), 6)}


def mix_reading(mix: Any) -> Markdown | None:
    """The budget, the size and the prediction in words; nothing without a budget."""
    if mix is None:
        return None
    record, prediction = mix.record, mix.prediction
    worst = max(record["tensors"], key=lambda t: t["kld"])
    share = worst["kld"] / record["predicted_kld"] if record["predicted_kld"] else 0.0
    return say(
        f"{prediction['bytes']:,} bytes of {record['budget_bytes']:,} allowed, {prediction['bits_per_weight']:.2f} "
        f"bits per weight in {len(set(record['types'].values()))} types. Predicted KL divergence from the unquantized "
        f"file: {record['predicted_kld']:.5f} nats a token, {100 * share:.0f} % of it by {worst['tensor']} as "
        f"{worst['type']}. {_weight(record)} The prediction adds the tensors up and leaves out that llama.cpp rounds "
        f"activations too; below it is measured on held-out rows, in 07 on bare texts."
    )


def _weight(record: dict[str, Any]) -> str:
    """What counted in the choice."""
    if record["predicted_answer_kld"] is None:
        return "Text alone decided: there were no answers."
    loss, weight = f"{record['predicted_answer_kld']:.5f} nats", record["answer_weight"]
    if not weight:
        return f"Text alone decided (`answer_weight` 0); at a token of an answer {loss} are predicted."
    said = f"At a token of an answer {loss} are predicted"
    return f"{said}; answers alone decided." if weight == 1 else f"{said}; answers counted {weight:g} in the choice."


def beside(mixed: Mapping[str, Any], entry: Mapping[str, Any], found: Mapping[str, Any]) -> Row:
    """A recipe (`entry`) beside the mixed file, by what was found on one kind of tokens."""
    return {
        "recipe": entry["type"],
        "its size": f"{entry['bytes'] / mixed['bytes']:.2f}",
        "KLD of the recipe": with_interval(found["kld"], found["kld_interval"]),
        "mixed minus recipe": with_interval(found["difference"], found["difference_interval"], "+.2g"),
        "p (Holm)": f"{found['p_holm']:.2g}",
        "the mixed file is": found["verdict"],
    }


def against_recipes(effect: Any) -> HTML | Markdown:
    """The mixed file beside every recipe (a MixEffect); a sentence where nothing was compared."""
    if effect is None:
        return say("Nothing to compare: this run has no file under a size budget.")
    content = effect.content
    mixed = content["mixed"]
    rows = [beside(mixed, entry, entry) for entry in content["types"]]
    own = f"{mixed['bytes'] / 1e6:.2f} MB, KL divergence {with_interval(mixed['kld'], mixed['kld_interval'])}"
    caption = (
        f"{mixed['type']} ({own}) beside the recipes, in nats a token, on {content['tokens']:,} scored tokens of "
        f"{content['rows']} held-out rows; sizes in units of its own; in brackets 95 % intervals over whole rows, of "
        "differences paired token by token."
    )
    return table(rows, caption)


def against_reading(effect: Any) -> Markdown | None:
    """What the budget bought, in words."""
    if effect is None:
        return None
    content = effect.content
    mixed, types = content["mixed"], content["types"]
    better = [e["type"] for e in types if e["verdict"] == "better"]
    larger = [e["type"] for e in types if e["verdict"] == "better" and e["bytes"] > mixed["bytes"]]
    worse = [e["type"] for e in types if e["verdict"] == "worse" and e["bytes"] <= mixed["bytes"]]
    text = f"{mixed['type']} is shown to be closer to the unquantized file than {', '.join(better) or 'no recipe'}."
    if larger:
        text += f" Larger than it, and still farther: {', '.join(larger)}."
    if worse:
        text += f" No larger, and closer: {', '.join(worse)}; here the choice of types did not pay."
    return say(text)


def _place(name: str) -> tuple[int, str]:
    match = re.match(r"blk\.(\d+)\.(.+)\.weight$", name)
    return (int(match[1]), match[2]) if match else (-1, name.removesuffix(".weight"))


def _runs(types: list[str]) -> str:
    """Types one after another, those alike counted: "q6_K, 3 × q4_K"."""
    parts: list[list[Any]] = []
    for kind in types:
        if parts and parts[-1][1] == kind:
            parts[-1][0] += 1
        else:
            parts.append([1, kind])
    return ", ".join(kind if count == 1 else f"{count} × {kind}" for count, kind in parts)


# What page 06 shows of files at the answers of held-out rows: whether bits were spent well for the task.

NEAR = 0.1
"""Recipes of a mixed file's size: those whose size differs from it by at most this share."""


def answers_against_recipes(effect: Any) -> HTML | Markdown:
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


def answers_against_reading(effect: Any) -> Markdown | None:
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


# The rows and sentences about export formats in notebooks 06 and 07.


def exports(made: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Size, cost and self-check of each format (records of exports.json); one row saying so where there is none."""
    rows = [
        {
            "format": record["format"],
            "what": record["title"],
            "MB": record["bytes"] / 1e6,
            "bits per weight": record["bits_per_weight"],
            "weights a scale": record.get("group_size"),
            "KL from merged, nats": record["check"]["mean_kld"],
            "same top": record["check"]["same_top"],
            "seconds": record["seconds"],
            "peak memory, MiB": record["peak_memory_mib"],
        }
        for record in made
    ]
    return rows or [{"format": "none", "what": "no format was made"}]


def skipped(formats: Iterable[Mapping[str, str]]) -> str:
    """Why formats that were asked for are absent, in words."""
    reasons = [f"**{entry['format']}** ({entry['reason'].rstrip('.')})" for entry in formats]
    return f"Skipped: {'; '.join(reasons)}." if reasons else "Every format that was asked for was made."


def compared(files: Iterable[Mapping[str, Any]], formats: Iterable[Mapping[str, str]]) -> str:
    """What stands in the tables of 07 beside GGUF files, and what is not there."""
    entries = [entry for entry in files if entry["kind"] == "folder"]
    folders = [entry["type"] for entry in entries]
    if folders:
        where = ", ".join(dict.fromkeys(entry["device"] for entry in entries))
        text = (
            f"{', '.join(folders)}: folders for transformers, made in 06 from the same merged model and scored by the "
            f"same scorer on the same token ids (on: {where}); MB are those of their weights, without the "
            "tokenizer that a GGUF file contains. llama.cpp does not run them, so the recommendation leaves them out."
        )
    else:
        text = "Only GGUF files were compared."
    return f"{text} {skipped(formats)}" if formats else text
