"""What page 03 shows of an evaluation: by labels (`AccuracyPage`) or by the reference answers (`AnswerPage`).

Both have the same parts, so that a cell of the notebook need not know which of the two it shows: `quality` and `parts`
(how good each model is), `compared` and `verdict` (whether the difference is more than chance), `errors`, `error_table`
and `reading` (what goes wrong), `examples` (texts worth reading), `believed` (can the probabilities be believed),
`certainty` and `speed`, `prompts` (what is written to prompts that are no test rows) and `learned`.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lib.language import retold
from lib.report import charts, display
from lib.report.display import Row, absent, tabled, tell
from lib.report.looks import axis_label, word
from lib.report.sentences import in_markdown, sentence, word_rows
from lib.scoring.answer_metrics import ENTITY_F1, RIGHT
from lib.stages.evaluate.results import (
    ALL,
    BASE,
    FINETUNED,
    FLOOR,
    LEAK_FREE,
    SEEN,
    SHOWN,
    UNSEEN,
    LabelEvaluation,
    told_apart,
)
from lib.statistics.intervals import estimate_text, wilson

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown

    from lib.stages.evaluate.results import AnswerEvaluation, EvaluationResult

READABLE = 8
"""Written answers that a page shows; all of them are in generated.jsonl."""
ALPHA = 0.05


def page_of(result: EvaluationResult) -> AccuracyPage | AnswerPage:
    """The page of a result."""
    return AccuracyPage(result) if isinstance(result, LabelEvaluation) else AnswerPage(result)


def _seconds(result: EvaluationResult) -> str:
    base, tuned = (result.scores[name].seconds_per_sample for name in (BASE, result.judged))
    device = result.product.entry.device
    return sentence("evaluate.seconds", base=base, tuned=tuned, device=device, trained=result.trained)


def _columns(result: EvaluationResult) -> dict[str, str]:
    """The models as headings of tables call them; where nothing was trained, both columns are one."""
    return {"base": SHOWN[BASE], "tuned": SHOWN[result.judged]}


class AccuracyPage:
    """How often the models are right."""

    def __init__(self, result: LabelEvaluation) -> None:
        self.result, self.names = result, result.task.label_names
        self.judged = {"judged": SHOWN[result.judged]}
        self.apart = told_apart({part: floor.n for part, floor in result.floor.items()})
        self.part = LEAK_FREE if LEAK_FREE in self.apart and LEAK_FREE in result.comparisons else ALL

    def quality(self) -> HTML:
        """Accuracies with their intervals, on all rows and on parts of them."""
        patterns = UNSEEN in self.result.floor
        return charts.grouped_estimates(
            "evaluate.wilson", self._points(), at=self.result.majority_share, patterns=patterns
        )

    def parts(self) -> HTML:
        """The same with further measures."""
        return tabled("evaluate.accuracy_parts", self._points())

    def _points(self) -> list[Row]:
        """Every model's accuracy on all rows and on parts of them."""
        return [{"part": part, "point": point} for part in self.apart for point in self.result.accuracies(part)]

    def compared(self) -> HTML:
        """The judged model against base and floor."""
        found = [
            {"part": part, "against": name, "test": test}
            for part, pairs in self.result.comparisons.items()
            if part in self.apart
            for name, test in pairs.items()
        ]
        return tabled("evaluate.accuracy_compared", found, **self.judged)

    def verdict(self) -> Markdown:
        """The verdicts in words."""
        base, floor = (self.result.comparisons[self.part].get(name) for name in (BASE, FLOOR))
        reports = {SHOWN[name]: model.reports[ALL] for name, model in self.result.models.items()}
        constant = [name for name, report in reports.items() if report.labels_given == 1]
        own = reports[SHOWN[self.result.judged]]
        values = {"part": self.part.replace("_", "-"), "constant": constant, "own": own, **self.judged}
        return tell("evaluate.accuracy_verdict", base=base, floor=floor, **values)

    def errors(self) -> HTML:
        """Confusion matrices."""
        matrices = {SHOWN[name]: model.reports[ALL].confusion for name, model in self.result.models.items()}
        return charts.confusion(matrices, self.names)

    def error_table(self) -> HTML:
        """Scores of each class."""
        found = [
            {"model": SHOWN[name], "scores": scores}
            for name, model in self.result.models.items()
            for scores in model.reports[ALL].classes
        ]
        return tabled("evaluate.classes", found)

    def reading(self) -> Markdown:
        """Which class is missed most."""
        missed = min(self.result.models[self.result.judged].reports[ALL].classes, key=lambda scores: scores.recall)
        return tell("evaluate.missed", missed=missed, **self.judged)

    def examples(self) -> HTML:
        """The most confident mistakes."""
        mistakes = self.result.models[self.result.judged].mistakes
        rows = display.rows_of("evaluate.mistakes", mistakes, names=self.names)
        return display.texts(rows, sentence("evaluate.mistakes", **self.judged))

    def believed(self) -> HTML:
        """Confidence against accuracy."""
        found = {SHOWN[name]: model.calibration for name, model in self.result.models.items()}
        bins = {name: _reliability(own.bins) for name, own in found.items()}
        errors = {name: own.ece for name, own in found.items()}
        return charts.reliability(bins, sentence("evaluate.reliability", n=found[SHOWN[BASE]].n, errors=errors))

    def certainty(self) -> HTML:
        """Margins of the rows."""
        margins = {SHOWN[name]: scores.margins for name, scores in self.result.scores.items()}
        axis = axis_label("charts.margins_axis", labels=len(self.names))
        return charts.overlay_histogram(margins, axis, sentence("evaluate.margins", names=charts.replaced(self.names)))

    def speed(self) -> Markdown:
        """Near ties, cut rows, time, and what was done otherwise than usual."""
        base = self.result.scores[BASE]
        ties = {SHOWN[name]: scores.near_ties for name, scores in self.result.scores.items()}
        told = {"seconds": _seconds(self.result), "notes": self.result.scoring, "rows": len(base.ids)}
        return tell("evaluate.near_ties", ties=ties, cut=int(base.truncated.sum()), **told)

    def prompts(self) -> Markdown:
        """Nothing is written."""
        return tell("evaluate.nothing_written", labels=self.names)

    def learned(self) -> Markdown:
        """The conclusions."""
        told = {"part": self.part.replace("_", "-"), "trained": self.result.trained, "judged": self.judged["judged"]}
        of_patterns = [self.result.accuracies(part) for part in (SEEN, UNSEEN) if part in self.result.floor]
        classes = sorted(self.result.models[self.result.judged].reports[ALL].classes, key=lambda scores: scores.recall)
        return tell(
            "evaluate.accuracies",
            points=self.result.accuracies(self.part),
            patterns=of_patterns if len(of_patterns) == 2 else [],
            chance=self.result.majority_share,
            weakest=classes[0],
            strongest=classes[-1],
            mistakes=self._mistakes(),
            **told,
        )

    def _mistakes(self) -> dict[str, Any] | None:
        """What the most confident mistakes share: the commonest exchange of labels, words that most of them hold."""
        shown = self.result.models[self.result.judged].mistakes
        if len(shown) < _FEW_MISTAKES:
            return None
        (label, given), count = Counter((one["label"], one["prediction"]) for one in shown).most_common(1)[0]
        texts = [one["text"] for one in shown]
        words = shared_words(texts)
        if words.isascii() and " " not in words:  # a single word such as "the" is shared by all texts of a language
            words = ""
        names = [self.names[place] for place in (label, given)]
        holding = sum(words in text for text in texts) if words else 0
        return {"n": len(shown), "count": count, "names": names, "words": words, "holding": holding}


_FEW_MISTAKES, _MOST_OF, _SHORTEST = 5, 0.7, 3


def shared_words(texts: Sequence[str]) -> str:
    """The longest run of at least three characters that 70 % of the texts hold; "" where there is none.

    >>> shared_words(["就算物流慢一点我也认了", "就算床塌一点我也认了。", "一点我也认了"])
    '一点我也认了'
    """
    holding = Counter(
        run
        for text in texts
        for run in {text[i:j] for i in range(len(text)) for j in range(i + _SHORTEST, min(i + 40, len(text)) + 1)}
    )
    common = [run for run, count in holding.items() if count >= _MOST_OF * len(texts)]
    longest = max(common, key=lambda run: (len(run), holding[run]), default="")
    words = longest.strip(f" {string.punctuation}，。！？、；：")
    return words if len(words) >= _SHORTEST else ""


def _reliability(bins: Sequence[Any]) -> list[Row]:
    """Filled calibration bins, the accuracy with its Wilson interval."""
    rows = []
    for one in filter(lambda one: one.n, bins):
        found = wilson(round(one.accuracy * one.n), one.n)
        limits = {"low": found.low, "high": found.high}
        rows.append({"confidence": one.confidence, "accuracy": one.accuracy, "n": one.n, **limits})
    return rows


class AnswerPage:
    """How likely the models find the reference answers, and what they write."""

    def __init__(self, result: AnswerEvaluation) -> None:
        self.result, self.content = result, result.content

    @property
    def written(self) -> dict[str, Metric]:
        """Metrics of the written answers by key; none where nothing was written."""
        return {entry["key"]: entry for entry in self.content["answers"]}

    @property
    def _parts(self) -> dict[str, Any]:
        """What was found on all rows and on the parts of them that are told apart."""
        parts = self.content["parts"]
        return {part: parts[part] for part in told_apart({part: found["n"] for part, found in parts.items()})}

    def _figures(self) -> list[Row]:
        """Part of the rows, model, and the figures found of the part and the model's own on it."""
        return [
            {"part": part, "model": shown, "found": found, "own": found[name]}
            for part, found in self._parts.items()
            for name, shown in self.result.shown.items()
        ]

    def quality(self) -> HTML:
        """Perplexities with their intervals."""
        return charts.estimates("evaluate.perplexities", self._figures())

    def parts(self) -> HTML:
        """Loss and perplexity of both models on each part of the test rows."""
        return tabled("evaluate.answer_parts", self._figures())

    def compared(self) -> HTML | Markdown:
        """The fine-tuned model against the base."""
        if not self.result.trained:
            return tell("evaluate.alone")
        found = [{"part": part, "against": SHOWN[BASE], "found": found} for part, found in self._parts.items()]
        return tabled("evaluate.answers_compared", found)

    def verdict(self) -> Markdown | None:
        """The paired comparison in words."""
        if not self.result.trained:
            return None
        part = self.result.part
        clear = beyond_chance(part["difference_interval"]) and part["p"] < ALPHA
        return tell("evaluate.answer_verdict", part=part, clear=clear)

    def errors(self) -> HTML:
        """Four checks of what the models write, with what measures them."""
        part, rows = self.content["parts"][ALL], []
        for check, key, why_not in word_rows("written.checks", written=self.written, terms=self.content["terms"]):
            entry = self.written.get(key)
            found = {"measured by": why_not}
            if entry is not None:
                found = {"measured by": entry["name"], "n": entry["n"], **_of_every_model(entry)}
            rows.append({"check": check, **found})
        own = {
            shown: estimate_text(part[name]["perplexity"], part[name]["perplexity_interval"], ".2f")
            for name, shown in self.result.shown.items()
        }
        if self.result.trained:
            own["difference"] = f"× {estimate_text(part['ratio'], part['ratio_interval'])}"
        perplexity = {"check": "semantic coherence", "measured by": "its perplexity of the reference answer ↓"}
        perplexity |= {"n": part["n"], **own}
        return display.table([*rows[:3], perplexity, rows[3]], "The four checks; n: rows they could be measured on.")

    def error_table(self) -> HTML:
        """Every metric of the written answers, the models side by side."""
        rows = []
        for entry in self.written.values():
            wanted = "" if entry["wanted"] is None else f" ({entry['wanted']:,} terms in these rows)"
            found = {"metric": entry["name"], "n": entry["n"], **_of_every_model(entry)}
            rows.append({**found, "what it is": retold(entry["meaning"]) + retold(wanted)})
        told = {key: self.content[key] for key in ("decoding", "chrf", "terms")}
        nothing = [{"metric": sentence("written.nothing")}]
        metrics = display.table(rows or nothing, sentence("written.conditions", **told, trained=self.result.trained))
        types = self.written.get(ENTITY_F1, {}).get("types", {}).items()
        found = [{"model": model, "kind": line} for model, lines in types for line in lines]
        return display.stacked(metrics, *([tabled("evaluate.entity_types", found)] if found else []))

    def reading(self) -> Markdown:
        """What the metrics allow to say: which differ, what is damaged, and how far reasoning came."""
        if not self.written:
            return display.say(f"{sentence('written.nothing')}.")
        trained, broken = self.result.trained, []
        for model in self.result.shown.values():
            measured = [row["measured"][model] for row in self.result.generated]
            parts = [one["think_parts"] for one in measured if one["think_parts"]]
            broken.append(
                {
                    "model": model,
                    "answers": len(measured),
                    "problems": [one["problem"] for one in measured if one["problem"]],
                    "split": sum(one["split"] > 0 for one in measured),
                    "steps": [sum(step) for step in zip(*parts, strict=True)],
                }
            )
        entries = list(self.written.values())
        moved, rows = moved_metrics(entries, SHOWN[FINETUNED]) if trained else None, entries[0]["n"]
        return tell("written.reading", metrics=len(self.written), rows=rows, moved=moved, broken=broken)

    def examples(self) -> HTML:
        """Written answers, the first rows."""
        rows = display.rows_of("evaluate.written", self.result.generated[:READABLE], **_columns(self.result))
        made = self.content["decoding"]
        caption = sentence("evaluate.decoding", rows=made["rows"], first=READABLE, most=made["max_new_tokens"])
        return display.texts(rows or [{"row": "none", "question": sentence("written.nothing")}], caption, longest=400)

    def believed(self) -> Markdown:
        """There is no calibration curve of free text."""
        return absent("evaluate.no_calibration")

    def certainty(self) -> HTML:
        """Losses of the rows."""
        losses = {SHOWN[name]: scores.row_losses for name, scores in self.result.scores.items()}
        axis = word("loss of a row's answers, nats a token")
        return charts.overlay_histogram(losses, axis, word("Losses of the test rows (outliers in the outermost bins)."))

    def speed(self) -> Markdown:
        """Cut turns and time."""
        return tell("evaluate.reading_speed", turns_cut=self.content["turns_cut"], seconds=_seconds(self.result))

    def prompts(self) -> HTML | Markdown:
        """Latency, and answers to prompts that are no test rows: a greedy and a drawn line each."""
        asked = self.result.prompts
        if not asked["prompts"]:
            return absent("written.no_prompts" if self.written else "written.nothing")
        lines = [{**entry, "way": way} for entry in asked["prompts"] for way in ("greedy", "sampled")]
        rows = display.rows_of("evaluate.prompted", lines, **_columns(self.result))
        texts = [{key: cell for key, cell in row.items() if cell is not None} for row in rows]
        models = self.result.shown.values()
        greedy = {name: [entry["answers"][name]["greedy"] for entry in asked["prompts"]] for name in models}
        told = sentence("written.prompts", sampled=asked["decoding"]["sampled"], system=asked["system_prompt"])
        return display.stacked(
            display.table(latencies(greedy), sentence("evaluate.latency", reference=SHOWN[BASE])),
            display.texts(texts, told, longest=400),
        )

    def learned(self) -> Markdown:
        """The conclusions."""
        written = f"- {sentence('written.nothing')}."
        if self.written:
            keys = (*RIGHT, "intact", "stopped", "terms", "think")
            named = [self.written[key] for key in keys if key in self.written]
            models = self.result.shown.values()
            estimates = [(bare_name(e), {model: e["models"][model]["estimate"] for model in models}) for e in named]
            written = in_markdown("written.learned", n=self.written["intact"]["n"], estimates=estimates)
        told = {"part": self.result.part, "models": self.result.shown, "turns_cut": self.content["turns_cut"]}
        rest = in_markdown("evaluate.answers_learned", **told)
        return display.say(f"{written}\n{rest}")


def latencies(greedy: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Row]:
    """Latency of the answers of each model, and how alike they are to the first model's."""
    found = []
    for name, answers in greedy.items():
        known = {key: [one[key] for one in answers if one.get(key) is not None] for key in _ALIKE}
        first = [1000 * answer["first_token_seconds"] for answer in answers]
        found.append({"model": name, "answers": answers, "first": first, **known})
    return display.rows_of("evaluate.latency", [one for one in found if one["answers"]])


_ALIKE = ("tokens_per_second", "same_text", "same_start", "chrf")
"""What is not known of every answer: of one token, of the first model, of an older version."""


# Metrics of written answers: entries of `lib.scoring.text_metrics`, here of two models, on page 07 of all files.

Metric = Mapping[str, Any]


def metric_text(entry: Metric, kind: str, name: str) -> str | None:
    """A metric's estimate with its interval.

    Args:
        kind: "models", or "differences" (with a sign).
        name: of the model.
    """
    found = entry[kind][name]
    return None if found is None else estimate_text(found["estimate"], found["interval"], _form(entry, kind))


def _form(entry: Metric, kind: str) -> str:
    digits = ".1f" if entry["key"] in ("chrf", "loop") else ".2f"
    return "+" + digits if kind == "differences" else digits


def _of_every_model(entry: Metric) -> Row:
    own = {model: metric_text(entry, "models", model) for model in entry["models"]}
    against = [metric_text(entry, "differences", model) for model in entry["differences"]]
    return {**own, **dict(zip(("difference",), against, strict=False))}


def moved_metrics(entries: Iterable[Metric], name: str) -> list[tuple[str, str]]:
    """Name and difference of the metrics in which a model differs from the reference by more than chance."""
    return [
        (bare_name(entry), format(entry["differences"][name]["estimate"], _form(entry, "differences")))
        for entry in entries
        if beyond_chance(entry["differences"][name]["interval"])
    ]


def bare_name(entry: Metric) -> str:
    """A metric's name without its arrow."""
    return entry["name"].rstrip(" ↑↓")


def beyond_chance(limits: Sequence[float] | None) -> bool:
    """Whether an interval leaves out 0."""
    return limits is not None and not limits[0] <= 0 <= limits[1]
