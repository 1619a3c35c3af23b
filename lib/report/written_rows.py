"""Rows and sentences of notebooks 03 and 07 on answers that models wrote (`lib.scoring.text_metrics`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from lib.report.display import Row
from lib.report.sentences import sentence
from lib.statistics.intervals import estimate_text

if TYPE_CHECKING:
    from lib.stages.evaluate.results import AnswerEvaluation

BASE, TUNED = "base", "fine-tuned"
NONE = sentence("written.nothing")


def shown(found: Mapping[str, Any] | None, form: str = ".3f") -> str | None:
    """An estimate with its interval, {"estimate", "interval"}."""
    if found is None:
        return None
    return estimate_text(found["estimate"], found["interval"], form)


def _form(entry: Mapping[str, Any], signed: bool = False) -> str:
    digits = ".1f" if entry["key"] in ("chrf", "loop") else ".2f"
    return "+" + digits if signed else digits


def metrics(result: AnswerEvaluation) -> list[Row]:
    """Every metric of the written answers, base beside fine-tuned."""
    rows = [
        {
            "metric": entry["name"],
            "n": entry["n"],
            BASE: shown(entry["models"][BASE], _form(entry)),
            TUNED: shown(entry["models"][TUNED], _form(entry)),
            "difference": shown(entry["differences"][TUNED], _form(entry, signed=True)),
            "what it is": entry["meaning"] + _wanted(entry),
        }
        for entry in result.content["answers"]
    ]
    return rows or [{"metric": NONE}]


def _wanted(entry: Mapping[str, Any]) -> str:
    return "" if entry["wanted"] is None else f" ({entry['wanted']:,} terms in these rows)"


def checks(result: AnswerEvaluation) -> list[Row]:
    """The four capability checks with what measures them."""
    found = {entry["key"]: entry for entry in result.content["answers"]}
    named = (("character integrity", "intact"), ("term preservation", "terms"), ("think structure", "think"))
    rows = [{"check": check, **_check(found.get(key), _why_not(key, result))} for check, key in named]
    return [*rows, _perplexity(result), {"check": "semantic coherence", **_check(found.get("chrf"), NONE)}]


def _why_not(key: str, result: AnswerEvaluation) -> str:
    if not result.content["answers"]:
        return NONE
    if key == "think":
        return "does not apply: the task is without thinking"
    return "no term of the list in these rows" if result.content["terms"] else "not measured: set terms to a list"


def _check(entry: Mapping[str, Any] | None, why_not: str) -> Row:
    if entry is None:
        return {"measured by": why_not}
    form = _form(entry)
    own = {name: shown(entry["models"][name], form) for name in (BASE, TUNED)}
    change = shown(entry["differences"][TUNED], "+" + form)
    return {"measured by": entry["name"], "n": entry["n"], **own, "difference": change}


def _perplexity(result: AnswerEvaluation) -> Row:
    part = result.content["parts"]["all"]
    own = {
        shown_as: shown({"estimate": part[key]["perplexity"], "interval": part[key]["perplexity_interval"]}, ".2f")
        for key, shown_as in (("base", BASE), ("finetuned", TUNED))
    }
    ratio = shown({"estimate": part["ratio"], "interval": part["ratio_interval"]})
    by = "its perplexity of the reference answer ↓"
    return {"check": "semantic coherence", "measured by": by, "n": part["n"], **own, "difference": f"factor {ratio}"}


def conditions(result: AnswerEvaluation) -> str:
    """Caption of the metrics."""
    content = result.content
    return sentence("written.conditions", decoding=content["decoding"], chrf=content["chrf"], terms=content["terms"])


def reading(result: AnswerEvaluation) -> str:
    """What the metrics allow to say: which differ, what is damaged, and how far reasoning came."""
    entries = result.content["answers"]
    if not entries:
        return f"{NONE}."
    changes = [(entry, entry["differences"][TUNED]) for entry in entries]
    moved = [
        (_name(entry), format(change["estimate"], _form(entry, True))) for entry, change in changes if _moved(change)
    ]
    broken = []
    for model in (BASE, TUNED):
        measured = [row["measured"][model] for row in result.generated]
        parts = [one["think_parts"] for one in measured if one["think_parts"]]
        problems = [one["problem"] for one in measured if one["problem"]]
        broken.append(
            {
                "model": model,
                "answers": len(measured),
                "problems": problems,
                "split": sum(one["split"] > 0 for one in measured),
                "steps": [sum(step) for step in zip(*parts, strict=True)],
            }
        )
    return sentence("written.reading", metrics=len(entries), rows=entries[0]["n"], moved=moved, broken=broken)


def _name(entry: Mapping[str, Any]) -> str:
    """A metric without its arrow."""
    return entry["name"].rstrip(" ↑↓")


def _moved(found: Mapping[str, Any]) -> bool:
    return found["interval"] is not None and (found["interval"][0] > 0 or found["interval"][1] < 0)


def learned(result: AnswerEvaluation) -> str:
    """One line of conclusions."""
    found = {entry["key"]: entry for entry in result.content["answers"]}
    if not found:
        return f"- {NONE}."
    named = [found[key] for key in ("intact", "stopped", "terms", "think") if key in found]
    estimates = [(_name(one), *(one["models"][model]["estimate"] for model in (BASE, TUNED))) for one in named]
    return sentence("written.learned", n=found["intact"]["n"], estimates=estimates)


def prompts(result: AnswerEvaluation) -> list[Row]:
    """Prompts with both models' answers, a greedy and a drawn line each."""
    rows = []
    for entry in result.prompts["prompts"]:
        reference = {"reference": entry["reference"]} if entry["reference"] else {}
        for way, words in (("greedy", "greedy"), ("sampled", "drawn")):
            answers = {f"{name} answers": _answer(own[way]) for name, own in entry["answers"].items()}
            rows.append({"prompt": entry["prompt"], **reference, "decoding": words, **answers})
    return rows or [{"prompt": NONE}]


def _answer(answer: Mapping[str, Any]) -> str:
    text = answer["text"] or "(nothing)"
    return text if answer["ended"] else f"{text} [cut at the limit]"


def latencies(result: AnswerEvaluation) -> list[Row]:
    """Latency of the greedy answers to the prompts, by model."""
    entries = result.prompts["prompts"]
    return [
        _latency(name, [entry["answers"][name]["greedy"] for entry in entries]) for name in (BASE, TUNED) if entries
    ] or [{"model": NONE}]


def _latency(name: str, answers: Sequence[Mapping[str, Any]]) -> Row:
    firsts = [1000 * answer["first_token_seconds"] for answer in answers]
    rates = [answer["tokens_per_second"] for answer in answers if answer["tokens_per_second"] is not None]
    return {
        "model": name,
        "prompts": len(answers),
        "first token, ms": _middle(firsts),
        "then, tokens/s": _middle(rates),
        "tokens an answer": _middle([answer["tokens"] for answer in answers]),
        "characters intact": f"{sum(answer['measured']['intact'] for answer in answers)} of {len(answers)}",
    }


def _middle(values: Sequence[float]) -> str | None:
    """Median and range."""
    return f"{median(values):,.1f} ({min(values):,.1f} to {max(values):,.1f})" if values else None


def prompts_caption(result: AnswerEvaluation) -> str:
    """How the prompts were answered."""
    written = result.prompts
    return sentence("written.prompts", sampled=written["decoding"]["sampled"], system=written["system_prompt"])


SHORT = {
    "intact": "characters intact ↑",
    "terms": "terms kept ↑",
    "think": "think complete ↑",
    "chrf": "chrF ↑",
    "stopped": "stopped ↑",
    "repetition": "repeated ↓",
}
"""Columns of the tables of 07."""


def file_metrics(result: Any) -> list[Row]:
    """What each file's answers are worth, one line a file (a ComparisonResult without labels)."""
    if not result.written:
        return [{"type": NONE}]
    found = [entry for entry in result.written["metrics"] if entry["key"] in SHORT]
    return [
        {"type": name, "same text": same, **{SHORT[e["key"]]: shown(e["models"][name], _form(e)) for e in found}}
        for name, same in result.written["same_text"].items()
    ]


def file_differences(result: Any) -> list[Row]:
    """The same as differences from the reference (a ComparisonResult without labels)."""
    if not result.written:
        return [{"type": NONE}]
    reference = result.written["reference"]
    names = [name for name in result.written["same_text"] if name != reference]
    found = [entry for entry in result.written["metrics"] if entry["key"] in SHORT]
    return [
        {"type": name, **{SHORT[e["key"]]: shown(e["differences"][name], _form(e, signed=True)) for e in found}}
        for name in names
    ]


def file_conditions(result: Any) -> str:
    """Caption of the table of 07 (a ComparisonResult without labels)."""
    if not result.written:
        return NONE
    made, terms = result.written["decoding"], result.written["terms"]
    with_terms = next((e for e in result.written["metrics"] if e["key"] == "terms"), None)
    counted = f", {with_terms['wanted']:,} in {with_terms['n']:,} of these references" if with_terms else ""
    listed = f"terms: list {terms['name']}{counted}" if terms else "no list of terms"
    return (
        f"Greedy answers of every GGUF file to the same {made['rows']:,} test rows, at most {made['max_new_tokens']:,} "
        f"tokens each, with 95 % intervals; same text: answers that are {result.written['reference']}'s to the letter; "
        f"{listed}; chrF: {result.written['chrf'].replace('|', ' | ')}."
    )


def file_reading(result: Any) -> str:
    """Which files write differently from the reference (a ComparisonResult without labels)."""
    if not result.written:
        return f"{NONE}."
    rows, reference = result.written["decoding"]["rows"], result.written["reference"]
    lines = []
    for name, same in result.written["same_text"].items():
        if name == reference:
            continue
        moved = [e for e in result.written["metrics"] if _moved(e["differences"][name])]
        words = ", ".join(
            f"{e['name'].rstrip(' ↑↓')} {e['differences'][name]['estimate']:{_form(e, True)}}" for e in moved
        )
        lines.append(f"- {name}: {same:,} of {rows:,} answers are {reference}'s; beyond chance: {words or 'nothing'}.")
    note = "Intervals at 95 % each, not corrected for the number of metrics and files: these are checks, no verdicts."
    return "\n".join([*lines, "", note])
