"""What page 03 shows of an evaluation: by labels (`AccuracyPage`) or by the reference answers (`AnswerPage`).

Both have the same parts, so that a cell of the notebook need not know which of the two it shows: `quality` and `parts`
(how good each model is), `compared` and `verdict` (whether the difference is more than chance), `errors`, `error_table`
and `reading` (what goes wrong), `examples` (texts worth reading), `believed` (can the probabilities be believed),
`certainty` and `speed`, `prompts` (what is written to prompts that are no test rows) and `learned`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lib.report import charts, display, written_rows
from lib.report.display import Row, tell
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
from lib.statistics.intervals import limits_text, wilson

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


class AccuracyPage:
    """How often the models are right."""

    def __init__(self, result: LabelEvaluation) -> None:
        self.result, self.names = result, result.task.label_names
        self.part = LEAK_FREE if LEAK_FREE in result.comparisons else ALL

    def quality(self) -> HTML:
        """Accuracies with their intervals."""
        return charts.estimates(
            self.result.accuracies(),
            "accuracy on all test rows",
            "Accuracy with 95 % Wilson intervals; dashed: share of the commonest label.",
            reference=self.result.majority_share,
        )

    def parts(self) -> HTML:
        """Accuracies on parts of the rows."""
        rows = [
            {
                "rows": part.replace("_", " "),
                "model": point["name"],
                "n": point["n"],
                "accuracy": point["estimate"],
                "low": point["low"],
                "high": point["high"],
            }
            for part in self.result.floor
            for point in self.result.accuracies(part)
        ]
        return display.table(rows, "Accuracy on parts of the test rows with 95 % Wilson intervals (n = rows).")

    def compared(self) -> HTML:
        """The fine-tuned model against base and floor."""
        rows = [
            {
                "rows": part.replace("_", " "),
                "fine-tuned against": name,
                "n": test.n,
                "lost": test.losses,
                "won": test.gains,
                "difference_points": 100 * test.difference.estimate,
                "from_points": 100 * test.difference.low,
                "to_points": 100 * test.difference.high,
                "p_holm": test.p_adjusted,
                "verdict": test.verdict,
            }
            for part, pairs in self.result.comparisons.items()
            for name, test in pairs.items()
        ]
        caption = "Fine-tuned model against base and floor on the same rows: rows lost and won, accuracy difference."
        return display.table(rows, caption)

    def verdict(self) -> Markdown:
        """The verdicts in words."""
        base, floor = (self.result.comparisons[self.part][name] for name in (BASE, FLOOR))
        return tell(
            "evaluate.accuracy_verdict",
            n=base.n,
            part=self.part.replace("_", "-"),
            base=base.verdict,
            base_points=100 * base.difference.estimate,
            floor=floor.verdict,
            floor_points=100 * floor.difference.estimate,
        )

    def errors(self) -> HTML:
        """Confusion matrices."""
        matrices = {SHOWN[name]: model.reports[ALL].confusion for name, model in self.result.models.items()}
        return charts.confusion(matrices, self.names)

    def error_table(self) -> HTML:
        """Scores of each class."""
        rows = [
            {
                "model": SHOWN[name],
                "class": scores.name,
                **{key: getattr(scores, key) for key in ("precision", "recall", "f1", "support")},
            }
            for name, model in self.result.models.items()
            for scores in model.reports[ALL].classes
        ]
        return display.table(rows, "Per-class scores on all test rows (support = rows of that class).")

    def reading(self) -> Markdown:
        """Which class is missed most."""
        missed = min(self.result.models[FINETUNED].reports[ALL].classes, key=lambda scores: scores.recall)
        return tell("evaluate.missed", label=missed.name, recall=missed.recall, support=missed.support)

    def examples(self) -> HTML:
        """The most confident mistakes."""
        rows = [
            {
                "row": mistake.id,
                "text": mistake.text,
                "label": self.names[mistake.label],
                "answer": self.names[mistake.prediction],
                "probability": mistake.probability,
                "leaked": mistake.leaked,
            }
            for mistake in self.result.models[FINETUNED].mistakes
        ]
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
        return tell(
            "evaluate.near_ties",
            base=base.near_ties,
            tuned=tuned.near_ties,
            n=len(tuned.ids),
            cut=int(tuned.truncated.sum()),
            seconds=_seconds(self.result),
            notes=[(name, note) for name, note in self.result.scoring.items() if note],
        )

    def prompts(self) -> Markdown:
        """Nothing is written."""
        return tell("evaluate.nothing_written", labels=self.names)

    def learned(self) -> Markdown:
        """The conclusions."""
        points = self.result.accuracies(self.part)
        return tell("evaluate.accuracies", points=points, part=self.part.replace("_", "-"))


def _reliability(bins: Sequence[Any]) -> list[dict[str, float]]:
    """Filled calibration bins, the accuracy with its Wilson interval."""
    rows = []
    for one in bins:
        if one.n:
            found = wilson(round(one.accuracy * one.n), one.n)
            shown = {"confidence": one.confidence, "accuracy": one.accuracy, "n": one.n}
            rows.append({**shown, "low": found.low, "high": found.high})
    return rows


class AnswerPage:
    """How likely the models find the reference answers, and what they write."""

    def __init__(self, result: AnswerEvaluation) -> None:
        self.result, self.content = result, result.content

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
            low, high = own["perplexity_interval"] or (None, None)
            name = f"{model}, {part.replace('_', '-')} rows"
            points.append({"name": name, "estimate": own["perplexity"], "low": low, "high": high, "n": found["n"]})
        caption = "Perplexity with 95 % intervals (Student's, over groups of alike rows)."
        return charts.estimates(points, "perplexity of the reference answers", caption)

    def parts(self) -> HTML:
        """Loss and perplexity of both models on each part of the test rows."""
        rows = [
            {
                "rows": part.replace("_", " "),
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
                "rows": part.replace("_", " "),
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
        found = part["difference_interval"]
        clear = found is not None and part["p"] < ALPHA and not found[0] <= 0 <= found[1]
        return tell("evaluate.answer_verdict", part=part, clear=clear)

    def errors(self) -> HTML:
        """Four checks of what the models write."""
        return display.table(written_rows.checks(self.result), "The four checks; n: rows they could be measured on.")

    def error_table(self) -> HTML:
        """Every metric of the written answers."""
        return display.table(written_rows.metrics(self.result), written_rows.conditions(self.result))

    def reading(self) -> Markdown:
        """What the metrics allow to say."""
        return display.say(written_rows.reading(self.result))

    def examples(self) -> HTML:
        """Written answers, the first rows."""
        rows = []
        for row in self.result.generated[:READABLE]:
            cut = {name: "" if ended else " [cut at the limit]" for name, ended in row["ended"].items()}
            answers = {f"{name} answers": row[name] + cut[name] for name in SHOWN.values()}
            rows.append({"row": row["id"], "question": row["question"], "reference": row["reference"], **answers})
        made = self.content["decoding"]
        caption = sentence("evaluate.decoding", rows=made["rows"], first=READABLE, most=made["max_new_tokens"])
        return display.texts(rows or [{"row": "none", "question": written_rows.NONE}], caption, longest=400)

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
        """Latency, and answers to prompts that are no test rows."""
        caption = "Latency of the greedy answers on this machine: median and range over the prompts."
        texts, told = written_rows.prompts(self.result), written_rows.prompts_caption(self.result)
        latencies = display.table(written_rows.latencies(self.result), caption)
        return display.stacked(latencies, display.texts(texts, told, longest=400))

    def learned(self) -> Markdown:
        """The conclusions."""
        rest = sentence("evaluate.answers_learned", part=self.result.part, turns_cut=self.content["turns_cut"])
        return display.say(f"{written_rows.learned(self.result)}\n{rest}")
