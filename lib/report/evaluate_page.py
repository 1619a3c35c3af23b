"""What page 03 shows of an evaluation: by labels (`AccuracyPage`) or by the reference answers (`AnswerPage`).

Both have the same parts, so that a cell of the notebook need not know which of the two it shows: `quality` and `parts`
(how good each model is), `compared` and `verdict` (whether the difference is more than chance), `errors`, `error_table`
and `reading` (what goes wrong), `examples` (texts worth reading), `believed` (can the probabilities be believed),
`certainty` and `speed`, `prompts` (what is written to prompts that are no test rows) and `learned`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from lib.report import charts, display
from lib.report.display import Row, row_of, rows_of, tell
from lib.report.sentences import sentence
from lib.stages.evaluate.results import (
    ALL,
    BASE,
    FINETUNED,
    FLOOR,
    LEAK_FREE,
    SHOWN,
    AnswerEvaluation,
    EvaluationResult,
    LabelEvaluation,
)
from lib.statistics.intervals import estimate_text, limits_text, wilson

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown

READABLE = 8
"""Written answers that a page shows; all of them are in generated.jsonl."""
ALPHA = 0.05


def page_of(result: EvaluationResult) -> AccuracyPage | AnswerPage:
    """The page of a result."""
    return AccuracyPage(result) if isinstance(result, LabelEvaluation) else AnswerPage(result)


def _seconds(result: EvaluationResult) -> str:
    base, tuned = (result.scores[name].seconds_per_sample for name in (BASE, FINETUNED))
    return sentence("evaluate.seconds", base=base, tuned=tuned, device=result.product.entry.device)


def _spoken(part: str) -> str:
    """A part of the rows in a table: "leak free"."""
    return part.replace("_", " ")


class AccuracyPage:
    """How often the models are right."""

    def __init__(self, result: LabelEvaluation) -> None:
        self.result, self.names = result, result.task.label_names
        self.part = LEAK_FREE if LEAK_FREE in result.comparisons else ALL

    def quality(self) -> HTML:
        """Accuracies with their intervals."""
        caption = "Accuracy with 95 % Wilson intervals; dashed: share of the commonest label."
        points, reference = self.result.accuracies(), self.result.majority_share
        return charts.estimates(points, "accuracy on all test rows", caption, reference=reference)

    def parts(self) -> HTML:
        """Accuracies on parts of the rows."""
        rows = [
            {"rows": _spoken(part), **row_of(point, "model=name n accuracy=estimate low high")}
            for part in self.result.floor
            for point in self.result.accuracies(part)
        ]
        return display.table(rows, "Accuracy on parts of the test rows with 95 % Wilson intervals (n = rows).")

    def compared(self) -> HTML:
        """The fine-tuned model against base and floor."""
        columns = "n lost=losses won=gains difference_points=difference.estimate from_points=difference.low"
        columns += " to_points=difference.high p_holm=p_adjusted verdict"
        rows = [
            {"rows": _spoken(part), "fine-tuned against": name, **row_of(test, columns)}
            for part, pairs in self.result.comparisons.items()
            for name, test in pairs.items()
        ]
        caption = "Fine-tuned model against base and floor on the same rows: rows lost and won, accuracy difference."
        return display.table(rows, caption)

    def verdict(self) -> Markdown:
        """The verdicts in words."""
        base, floor = (self.result.comparisons[self.part][name] for name in (BASE, FLOOR))
        return tell("evaluate.accuracy_verdict", part=self.part.replace("_", "-"), base=base, floor=floor)

    def errors(self) -> HTML:
        """Confusion matrices."""
        matrices = {SHOWN[name]: model.reports[ALL].confusion for name, model in self.result.models.items()}
        return charts.confusion(matrices, self.names)

    def error_table(self) -> HTML:
        """Scores of each class."""
        rows = [
            {"model": SHOWN[name], **row_of(scores, "class=name precision recall f1 support")}
            for name, model in self.result.models.items()
            for scores in model.reports[ALL].classes
        ]
        return display.table(rows, "Per-class scores on all test rows (support = rows of that class).")

    def reading(self) -> Markdown:
        """Which class is missed most."""
        missed = min(self.result.models[FINETUNED].reports[ALL].classes, key=lambda scores: scores.recall)
        return tell("evaluate.missed", missed=missed)

    def examples(self) -> HTML:
        """The most confident mistakes."""
        rows = rows_of(
            self.result.models[FINETUNED].mistakes,
            "row=id text label answer probability leaked",
            label=lambda mistake: self.names[mistake.label],
            answer=lambda mistake: self.names[mistake.prediction],
        )
        caption = "The most confident mistakes of the fine-tuned model (probability among the answer words)."
        return display.texts(rows, caption)

    def believed(self) -> HTML:
        """Confidence against accuracy."""
        base, tuned = (self.result.models[name].calibration for name in (BASE, FINETUNED))
        bins = {SHOWN[name]: _reliability(model.calibration.bins) for name, model in self.result.models.items()}
        return charts.reliability(bins, sentence("evaluate.reliability", n=tuned.n, base=base.ece, tuned=tuned.ece))

    def certainty(self) -> HTML:
        """Margins of the rows."""
        names = display.readable(self.names)
        margins = {SHOWN[name]: scores.margins for name, scores in self.result.scores.items()}
        axis = f"margin, nats: log-odds of {names[1]} against {names[0]}"
        return charts.overlay_histogram(margins, axis, sentence("evaluate.margins", names=display.replaced(self.names)))

    def speed(self) -> Markdown:
        """Near ties, cut rows, time, and what was done otherwise than usual."""
        base, tuned = (self.result.scores[name] for name in (BASE, FINETUNED))
        told = {"seconds": _seconds(self.result), "notes": self.result.scoring}
        return tell("evaluate.near_ties", base=base, tuned=tuned, cut=int(tuned.truncated.sum()), **told)

    def prompts(self) -> Markdown:
        """Nothing is written."""
        return tell("evaluate.nothing_written", labels=self.names)

    def learned(self) -> Markdown:
        """The conclusions."""
        points = self.result.accuracies(self.part)
        return tell("evaluate.accuracies", points=points, part=self.part.replace("_", "-"))


def _reliability(bins: Sequence[Any]) -> list[Row]:
    """Filled calibration bins, the accuracy with its Wilson interval."""
    rows = []
    for one in filter(lambda one: one.n, bins):
        found = wilson(round(one.accuracy * one.n), one.n)
        rows.append({**row_of(one, "confidence accuracy n"), "low": found.low, "high": found.high})
    return rows


class AnswerPage:
    """How likely the models find the reference answers, and what they write."""

    def __init__(self, result: AnswerEvaluation) -> None:
        self.result, self.content = result, result.content

    @property
    def written(self) -> dict[str, Metric]:
        """Metrics of the written answers by key; none where nothing was written."""
        return {entry["key"]: entry for entry in self.content["answers"]}

    def _figures(self) -> list[tuple[str, str, Row, Row]]:
        """Part of the rows, model, and the figures of the part and of the model on it."""
        return [
            (part, shown, found, found[name])
            for part, found in self.content["parts"].items()
            for name, shown in SHOWN.items()
        ]

    def quality(self) -> HTML:
        """Perplexities with their intervals."""
        points = []
        for part, model, found, own in self._figures():
            name = f"{model}, {part.replace('_', '-')} rows"
            points.append(charts.point(name, own["perplexity"], own["perplexity_interval"], found["n"]))
        caption = "Perplexity with 95 % intervals (Student's, over groups of alike rows)."
        return charts.estimates(points, "perplexity of the reference answers", caption)

    def parts(self) -> HTML:
        """Loss and perplexity of both models on each part of the test rows."""
        rows = [
            {
                "rows": _spoken(part),
                "model": model,
                "n": found["n"],
                "answer tokens": found["tokens"],
                "loss, nats a token": round(own["loss"], 4),
                "interval": limits_text(own["loss_interval"]),
                "perplexity": own["perplexity"],
            }
            for part, model, found, own in self._figures()
        ]
        return display.table(rows, "Loss of the reference answers (n: rows), with 95 % intervals.")

    def compared(self) -> HTML:
        """The fine-tuned model against the base."""
        rows = [
            {
                "rows": _spoken(part),
                "fine-tuned against": SHOWN[BASE],
                "n": found["n"],
                "groups": found["groups"],
                "loss difference, nats a token": f"{found['difference']:+.4f}",
                "interval": limits_text(found["difference_interval"], "+.4f"),
                "p": found["p"],
                "perplexity, factor": found["ratio"],
                "its 95 % interval": limits_text(found["ratio_interval"]),
            }
            for part, found in self.content["parts"].items()
        ]
        caption = "Fine-tuned model against its base on the same answers (n: rows; t-test over groups of alike rows)."
        return display.table(rows, caption)

    def verdict(self) -> Markdown:
        """The paired comparison in words."""
        part = self.result.part
        clear = beyond_chance(part["difference_interval"]) and part["p"] < ALPHA
        return tell("evaluate.answer_verdict", part=part, clear=clear)

    def errors(self) -> HTML:
        """Four checks of what the models write, with what measures them."""
        nothing, part = sentence("written.nothing"), self.content["parts"][ALL]
        no_terms = "no term of the list in these rows" if self.content["terms"] else "not measured: set terms to a list"
        checks = (
            ("character integrity", "intact", nothing),
            ("term preservation", "terms", no_terms),
            ("think structure", "think", "does not apply: the task is without thinking"),
            ("semantic coherence", "chrf", nothing),
        )
        rows = []
        for check, key, why_not in checks:
            entry = self.written.get(key)
            found = {"measured by": why_not if self.written else nothing}
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
        rows = []
        for row in self.result.generated[:READABLE]:
            cut = {name: "" if ended else " [cut at the limit]" for name, ended in row["ended"].items()}
            answers = {f"{name} answers": row[name] + cut[name] for name in SHOWN.values()}
            rows.append({"row": row["id"], "question": row["question"], "reference": row["reference"], **answers})
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
        asked, nothing, texts = self.result.prompts, sentence("written.nothing"), []
        for entry in asked["prompts"]:
            reference = {"reference": entry["reference"]} if entry["reference"] else {}
            for way, words in (("greedy", "greedy"), ("sampled", "drawn")):
                answers = {f"{name} answers": _answer(own[way]) for name, own in entry["answers"].items()}
                texts.append({"prompt": entry["prompt"], **reference, "decoding": words, **answers})
        greedy = {name: [entry["answers"][name]["greedy"] for entry in asked["prompts"]] for name in SHOWN.values()}
        latencies = [_latency(name, answers) for name, answers in greedy.items() if answers]
        caption = "Latency of the greedy answers on this machine: median and range over the prompts."
        told = sentence("written.prompts", sampled=asked["decoding"]["sampled"], system=asked["system_prompt"])
        return display.stacked(
            display.table(latencies or [{"model": nothing}], caption),
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


def _answer(answer: Mapping[str, Any]) -> str:
    text = answer["text"] or "(nothing)"
    return text if answer["ended"] else f"{text} [cut at the limit]"


def _latency(name: str, answers: Sequence[Mapping[str, Any]]) -> Row:
    """Latency of a model's answers."""
    rates = [answer["tokens_per_second"] for answer in answers if answer["tokens_per_second"] is not None]
    return {
        "model": name,
        "prompts": len(answers),
        "first token, ms": _middle([1000 * answer["first_token_seconds"] for answer in answers]),
        "then, tokens/s": _middle(rates),
        "tokens an answer": _middle([answer["tokens"] for answer in answers]),
        "characters intact": f"{sum(answer['measured']['intact'] for answer in answers)} of {len(answers)}",
    }


def _middle(values: Sequence[float]) -> str | None:
    """Median and range."""
    return f"{median(values):,.1f} ({min(values):,.1f} to {max(values):,.1f})" if values else None


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
