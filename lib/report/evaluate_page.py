"""What page 03 shows of an evaluation: by labels (`AccuracyPage`) or by the reference answers (`AnswerPage`).

Both have the same parts, so that a cell of the notebook need not know which of the two it shows: `quality` and `parts`
(how good each model is), `compared` and `verdict` (whether the difference is more than chance), `errors`, `error_table`
and `reading` (what goes wrong), `examples` (texts worth reading), `believed` (can the probabilities be believed),
`certainty` and `speed`, `prompts` (what is written to prompts that are no test rows) and `learned`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lib.report import charts, display
from lib.report.display import Row, tabled, tell
from lib.report.sentences import sentence, word_rows
from lib.stages.evaluate.results import ALL, BASE, FINETUNED, FLOOR, LEAK_FREE, SHOWN, LabelEvaluation
from lib.statistics.intervals import estimate_text, wilson

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown

    from lib.stages.evaluate.results import AnswerEvaluation, EvaluationResult

READABLE = 8
"""Written answers that a page shows; all of them are in generated.jsonl."""
ALPHA = 0.05

_NAMES = {"base": SHOWN[BASE], "tuned": SHOWN[FINETUNED]}
"""The models as tables call them."""


def page_of(result: EvaluationResult) -> AccuracyPage | AnswerPage:
    """The page of a result."""
    return AccuracyPage(result) if isinstance(result, LabelEvaluation) else AnswerPage(result)


def _seconds(result: EvaluationResult) -> str:
    base, tuned = (result.scores[name].seconds_per_sample for name in (BASE, FINETUNED))
    return sentence("evaluate.seconds", base=base, tuned=tuned, device=result.product.entry.device)


class AccuracyPage:
    """How often the models are right."""

    def __init__(self, result: LabelEvaluation) -> None:
        self.result, self.names = result, result.task.label_names
        self.part = LEAK_FREE if LEAK_FREE in result.comparisons else ALL

    def quality(self) -> HTML:
        """Accuracies with their intervals."""
        return charts.estimates("evaluate.wilson", self.result.accuracies(), at=self.result.majority_share)

    def parts(self) -> HTML:
        """Accuracies on parts of the rows."""
        parts = self.result.floor
        found = [{"part": part, "point": point} for part in parts for point in self.result.accuracies(part)]
        return tabled("evaluate.accuracy_parts", found)

    def compared(self) -> HTML:
        """The fine-tuned model against base and floor."""
        found = [
            {"part": part, "against": name, "test": test}
            for part, pairs in self.result.comparisons.items()
            for name, test in pairs.items()
        ]
        return tabled("evaluate.accuracy_compared", found)

    def verdict(self) -> Markdown:
        """The verdicts in words."""
        base, floor = (self.result.comparisons[self.part][name] for name in (BASE, FLOOR))
        reports = {SHOWN[name]: model.reports[ALL] for name, model in self.result.models.items()}
        constant = [name for name, report in reports.items() if report.labels_given == 1]
        values = {"part": self.part.replace("_", "-"), "constant": constant, "tuned": reports[SHOWN[FINETUNED]]}
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
        missed = min(self.result.models[FINETUNED].reports[ALL].classes, key=lambda scores: scores.recall)
        return tell("evaluate.missed", missed=replace(missed, name=display.as_written(missed.name)))

    def examples(self) -> HTML:
        """The most confident mistakes."""
        rows = display.rows_of("evaluate.mistakes", self.result.models[FINETUNED].mistakes, names=self.names)
        return display.texts(rows, sentence("evaluate.mistakes"))

    def believed(self) -> HTML:
        """Confidence against accuracy."""
        base, tuned = (self.result.models[name].calibration for name in (BASE, FINETUNED))
        bins = {SHOWN[name]: _reliability(model.calibration.bins) for name, model in self.result.models.items()}
        return charts.reliability(bins, sentence("evaluate.reliability", n=tuned.n, base=base.ece, tuned=tuned.ece))

    def certainty(self) -> HTML:
        """Margins of the rows."""
        margins = {SHOWN[name]: scores.margins for name, scores in self.result.scores.items()}
        axis = sentence("charts.margins_axis", labels=len(self.names))
        return charts.overlay_histogram(margins, axis, sentence("evaluate.margins", names=charts.replaced(self.names)))

    def speed(self) -> Markdown:
        """Near ties, cut rows, time, and what was done otherwise than usual."""
        base, tuned = (self.result.scores[name] for name in (BASE, FINETUNED))
        told = {"seconds": _seconds(self.result), "notes": self.result.scoring}
        return tell("evaluate.near_ties", base=base, tuned=tuned, cut=int(tuned.truncated.sum()), **told)

    def prompts(self) -> Markdown:
        """Nothing is written."""
        return tell("evaluate.nothing_written", labels=list(map(display.as_written, self.names)))

    def learned(self) -> Markdown:
        """The conclusions."""
        points = self.result.accuracies(self.part)
        return tell("evaluate.accuracies", points=points, part=self.part.replace("_", "-"))


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

    def _figures(self) -> list[Row]:
        """Part of the rows, model, and the figures found of the part and the model's own on it."""
        return [
            {"part": part, "model": shown, "found": found, "own": found[name]}
            for part, found in self.content["parts"].items()
            for name, shown in SHOWN.items()
        ]

    def quality(self) -> HTML:
        """Perplexities with their intervals."""
        return charts.estimates("evaluate.perplexities", self._figures())

    def parts(self) -> HTML:
        """Loss and perplexity of both models on each part of the test rows."""
        return tabled("evaluate.answer_parts", self._figures())

    def compared(self) -> HTML:
        """The fine-tuned model against the base."""
        parts = self.content["parts"].items()
        found = [{"part": part, "against": SHOWN[BASE], "found": found} for part, found in parts]
        return tabled("evaluate.answers_compared", found)

    def verdict(self) -> Markdown:
        """The paired comparison in words."""
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
                found = {"measured by": entry["name"], "n": entry["n"], **_of_both_models(entry)}
            rows.append({"check": check, **found})
        own = {
            shown: estimate_text(part[name]["perplexity"], part[name]["perplexity_interval"], ".2f")
            for name, shown in SHOWN.items()
        }
        ratio = estimate_text(part["ratio"], part["ratio_interval"])
        perplexity = {"check": "semantic coherence", "measured by": "its perplexity of the reference answer ↓"}
        perplexity |= {"n": part["n"], **own, "difference": f"factor {ratio}"}
        return display.table([*rows[:3], perplexity, rows[3]], "The four checks; n: rows they could be measured on.")

    def error_table(self) -> HTML:
        """Every metric of the written answers, base beside fine-tuned."""
        rows = []
        for entry in self.written.values():
            wanted = "" if entry["wanted"] is None else f" ({entry['wanted']:,} terms in these rows)"
            found = {"metric": entry["name"], "n": entry["n"], **_of_both_models(entry)}
            rows.append({**found, "what it is": entry["meaning"] + wanted})
        told = {key: self.content[key] for key in ("decoding", "chrf", "terms")}
        nothing = [{"metric": sentence("written.nothing")}]
        return display.table(rows or nothing, sentence("written.conditions", **told))

    def reading(self) -> Markdown:
        """What the metrics allow to say: which differ, what is damaged, and how far reasoning came."""
        if not self.written:
            return display.say(f"{sentence('written.nothing')}.")
        tuned, broken = SHOWN[FINETUNED], []
        for model in SHOWN.values():
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
        moved, rows = moved_metrics(entries, tuned), entries[0]["n"]
        return tell("written.reading", metrics=len(self.written), rows=rows, moved=moved, broken=broken)

    def examples(self) -> HTML:
        """Written answers, the first rows."""
        rows = display.rows_of("evaluate.written", self.result.generated[:READABLE], **_NAMES)
        made = self.content["decoding"]
        caption = sentence("evaluate.decoding", rows=made["rows"], first=READABLE, most=made["max_new_tokens"])
        return display.texts(rows or [{"row": "none", "question": sentence("written.nothing")}], caption, longest=400)

    def believed(self) -> Markdown:
        """There is no calibration curve of free text."""
        return tell("evaluate.no_calibration")

    def certainty(self) -> HTML:
        """Losses of the rows."""
        losses = {SHOWN[name]: scores.row_losses for name, scores in self.result.scores.items()}
        axis = "loss of a row's answers, nats a token"
        return charts.overlay_histogram(losses, axis, "Losses of the test rows (outliers in the outermost bins).")

    def speed(self) -> Markdown:
        """Cut turns and time."""
        return tell("evaluate.reading_speed", turns_cut=self.content["turns_cut"], seconds=_seconds(self.result))

    def prompts(self) -> HTML:
        """Latency, and answers to prompts that are no test rows: a greedy and a drawn line each."""
        asked, nothing = self.result.prompts, sentence("written.nothing")
        lines = [{**entry, "way": way} for entry in asked["prompts"] for way in ("greedy", "sampled")]
        rows = display.rows_of("evaluate.prompted", lines, **_NAMES)
        texts = [{key: cell for key, cell in row.items() if cell is not None} for row in rows]
        greedy = {name: [entry["answers"][name]["greedy"] for entry in asked["prompts"]] for name in SHOWN.values()}
        latencies = [_latency(name, answers) for name, answers in greedy.items() if answers]
        speeds = display.rows_of("evaluate.latency", latencies) or [{"model": nothing}]
        told = sentence("written.prompts", sampled=asked["decoding"]["sampled"], system=asked["system_prompt"])
        return display.stacked(
            display.table(speeds, sentence("evaluate.latency")),
            display.texts(texts or [{"prompt": nothing}], told, longest=400),
        )

    def learned(self) -> Markdown:
        """The conclusions."""
        written = f"- {sentence('written.nothing')}."
        if self.written:
            named = [self.written[key] for key in ("intact", "stopped", "terms", "think") if key in self.written]
            models = SHOWN.values()
            estimates = [(bare_name(e), *(e["models"][model]["estimate"] for model in models)) for e in named]
            written = sentence("written.learned", n=self.written["intact"]["n"], estimates=estimates)
        rest = sentence("evaluate.answers_learned", part=self.result.part, turns_cut=self.content["turns_cut"])
        return display.say(f"{written}\n{rest}")


def _latency(name: str, answers: Sequence[Mapping[str, Any]]) -> Row:
    """Latency of a model's answers."""
    rates = [answer["tokens_per_second"] for answer in answers if answer["tokens_per_second"] is not None]
    first = [1000 * answer["first_token_seconds"] for answer in answers]
    return {"model": name, "answers": answers, "first": first, "rates": rates}


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


def _of_both_models(entry: Metric) -> Row:
    own = {model: metric_text(entry, "models", model) for model in SHOWN.values()}
    return {**own, "difference": metric_text(entry, "differences", SHOWN[FINETUNED])}


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
