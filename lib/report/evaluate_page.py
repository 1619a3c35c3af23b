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
from lib.report.rows import Row
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
from lib.statistics import intervals

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown

READABLE = 8
"""Written answers that a page shows; all of them are in generated.jsonl."""
ALPHA = 0.05
ONE_SEED = "- One training run, one seed: another seed would move the fine-tuned model by an unmeasured amount."


def page_of(result: EvaluationResult) -> AccuracyPage | AnswerPage:
    """The page of a result."""
    return AccuracyPage(result) if isinstance(result, LabelEvaluation) else AnswerPage(result)


def limits(values: Sequence[float] | None, form: str = ".3f") -> str | None:
    """An interval as text; None where there is none."""
    return None if values is None or None in values else f"[{values[0]:{form}},\u00a0{values[1]:{form}}]"


def _part_words(part: str) -> str:
    return part.replace("_", " ")


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
                "rows": _part_words(part),
                "model": point["name"],
                "n": point["n"],
                "accuracy ↑": point["estimate"],
                "95 % low": point["low"],
                "95 % high": point["high"],
            }
            for part in self.result.floor
            for point in self.result.accuracies(part)
        ]
        return display.table(rows, "Accuracy on parts of the test rows with 95 % Wilson intervals (n = rows).")

    def compared(self) -> HTML:
        """The fine-tuned model against base and floor."""
        rows = [
            {
                "rows": _part_words(part),
                "fine-tuned against": name,
                "n": test.n,
                "lost": test.losses,
                "won": test.gains,
                "difference, points": 100 * test.difference.estimate,
                "from, points": 100 * test.difference.low,
                "to, points": 100 * test.difference.high,
                "p (Holm)": test.p_adjusted,
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
        return display.say(
            f"On {base.n:,} {self.part.replace('_', '-')} rows the verdict on the fine-tuned model is "
            f"**{base.verdict}** against its base ({100 * base.difference.estimate:+.1f} points) and "
            f"**{floor.verdict}** against the linear floor ({100 * floor.difference.estimate:+.1f} points)."
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
                "precision": scores.precision,
                "recall": scores.recall,
                "F1": scores.f1,
                "support": scores.support,
            }
            for name, model in self.result.models.items()
            for scores in model.reports[ALL].classes
        ]
        return display.table(rows, "Per-class scores on all test rows (support = rows of that class).")

    def reading(self) -> Markdown:
        """Which class is missed most."""
        classes = self.result.models[FINETUNED].reports[ALL].classes
        missed = min(classes, key=lambda scores: scores.recall)
        return display.say(
            f"The fine-tuned model finds {100 * missed.recall:.1f} % of the {missed.support:,} rows of "
            f"{missed.name}, its least recognized class."
        )

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
        return charts.reliability(
            {SHOWN[name]: _reliability(model.calibration.bins) for name, model in self.result.models.items()},
            f"Reliability by confidence bin with 95 % Wilson intervals, all test rows (n = {tuned.n:,}). Expected "
            f"calibration error: base {base.ece:.3f}, fine-tuned {tuned.ece:.3f}.",
        )

    def certainty(self) -> HTML:
        """Margins of the rows."""
        names = display.readable(self.names)
        margins = {SHOWN[name]: scores.margins for name, scores in self.result.scores.items()}
        axis = f"margin, nats: log-odds of {names[1]} against {names[0]}"
        caption = "Margins of the test rows (outliers in the outermost bins)." + display.font_note(self.names)
        return charts.overlay_histogram(margins, axis, caption)

    def speed(self) -> Markdown:
        """Near ties, cut rows, time, and what was done otherwise than usual."""
        base, tuned = (self.result.scores[name] for name in (BASE, FINETUNED))
        told = [f"- {name}: {note}" for name, note in self.result.scoring.items() if note]
        text = (
            f"Near ties (|margin| < 0.1): base {base.near_ties}, fine-tuned {tuned.near_ties} of {len(tuned.ids):,} "
            f"rows. Texts cut at the token limit: {int(tuned.truncated.sum())}. {_speed(self.result)}"
        )
        return display.say("\n".join([text, "", *told]))

    def prompts(self) -> Markdown:
        """Nothing is written."""
        return display.say(
            f"The answer is one of the words {', '.join(self.names)}, read off the scores above: nothing is written."
        )

    def learned(self) -> Markdown:
        """The conclusions."""
        lines = [
            f"- {point['name']}: {100 * point['estimate']:.1f} % [{100 * point['low']:.1f}, {100 * point['high']:.1f}] "
            f"on {point['n']:,} {self.part.replace('_', '-')} rows"
            for point in self.result.accuracies(self.part)
        ]
        return display.say("\n".join([*lines, ONE_SEED]))


def _reliability(bins: Sequence[Any]) -> list[dict[str, float]]:
    """Filled calibration bins, the accuracy with its Wilson interval."""
    rows = []
    for one in bins:
        if one.n:
            found = intervals.wilson(round(one.accuracy * one.n), one.n)
            shown = {"confidence": one.confidence, "accuracy": one.accuracy, "n": one.n}
            rows.append({**shown, "low": found.low, "high": found.high})
    return rows


def _speed(result: EvaluationResult) -> str:
    base, tuned = (1000 * result.scores[name].seconds_per_sample for name in (BASE, FINETUNED))
    return (
        f"One row took {base:.1f} ms with the base and {tuned:.1f} ms with the adapter, on "
        f"{result.product.entry.device}."
    )


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
                "rows": _part_words(part),
                "model": model,
                "n": found["n"],
                "answer tokens": found["tokens"],
                "loss, nats a token": round(own["loss"], 4),
                "95 % interval": limits(own["loss_interval"]),
                "perplexity ↓": own["perplexity"],
            }
            for part, model, found, own in self._figures()
        ]
        return display.table(rows, "Loss of the reference answers (n: rows), with 95 % intervals.")

    def compared(self) -> HTML:
        """The fine-tuned model against the base."""
        rows = [
            {
                "rows": _part_words(part),
                "fine-tuned against": SHOWN[BASE],
                "n": found["n"],
                "groups": found["groups"],
                "loss difference, nats a token": f"{found['difference']:+.4f}",
                "95 % interval": limits(found["difference_interval"], "+.4f"),
                "p": found["p"],
                "perplexity, factor": f"{found['ratio']:.3f}",
                "its 95 % interval": limits(found["ratio_interval"]),
            }
            for part, found in self.content["parts"].items()
        ]
        caption = "Fine-tuned model against its base on the same answers (n: rows; t-test over groups of alike rows)."
        return display.table(rows, caption)

    def verdict(self) -> Markdown:
        """The paired comparison in words."""
        return display.say(difference(self.result.part))

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
        first = f"the first {READABLE} of " if made["rows"] > READABLE else ""
        caption = (
            f"Answers to {first}{made['rows']} test rows, greedy, at most {made['max_new_tokens']} tokens each; long "
            f"texts are cut."
        )
        return display.texts(rows or [{"row": "none", "question": "generated_rows is 0"}], caption, longest=400)

    def believed(self) -> Markdown:
        """There is no calibration curve of free text."""
        return display.say(
            "A reliability curve needs answers that are right or wrong. Of free text the loss itself is the check: a "
            "proper score it is lowest where the probabilities are those of the answers."
        )

    def certainty(self) -> HTML:
        """Losses of the rows."""
        losses = {SHOWN[name]: scores.row_losses for name, scores in self.result.scores.items()}
        axis = "loss of a row's answers, nats a token"
        return charts.overlay_histogram(losses, axis, "Losses of the test rows (outliers in the outermost bins).")

    def speed(self) -> Markdown:
        """Cut turns and time."""
        return display.say(
            f"Turns cut at the token limit: {self.content['turns_cut']:,}. Reading the reference answers: "
            f"{_speed(self.result)}"
        )

    def prompts(self) -> HTML:
        """Latency, and answers to prompts that are no test rows."""
        caption = "Latency of the greedy answers on this machine: median and range over the prompts."
        return display.stacked(
            display.table(written_rows.latencies(self.result), caption),
            display.texts(written_rows.prompts(self.result), written_rows.prompts_caption(self.result), longest=400),
        )

    def learned(self) -> Markdown:
        """The conclusions."""
        part = self.result.part
        return display.say(
            f"{written_rows.learned(self.result)}\n"
            f"- Perplexity of the reference answers: base {part[BASE]['perplexity']:.2f}, fine-tuned "
            f"{part[FINETUNED]['perplexity']:.2f} on {part['n']:,} rows.\n"
            f"- {self.content['turns_cut']:,} turns of the test rows were cut at the token limit.\n"
            "- A likely answer is not yet a good one: perplexity does not see whether advice is right, safe or kind.\n"
            f"{ONE_SEED}"
        )


def difference(part: Row) -> str:
    """The paired comparison of one part of the rows, in words."""
    found = part["difference_interval"]
    tested, times = "(no interval)", ""
    if found is None:
        words = "So few groups of rows, or rows that all say the same, show nothing."
    else:
        tested = f"{limits(found, '+.4f')} (p = {part['p']:.2g}, t-test over groups)"
        times = f" {limits(part['ratio_interval'])}"
        if part["p"] < ALPHA and not found[0] <= 0 <= found[1]:
            direction = "likelier" if found[1] < 0 else "less likely"
            words = f"The fine-tuned model finds the reference answers **{direction}**."
        else:
            words = (
                f"These rows do not show a difference; one below {part['mde']:.2g} nats a token they would miss more "
                f"often than one time in five."
            )
    return (
        f"On {part['n']:,} rows in {part['groups']:,} groups ({part['tokens']:,} answer tokens) the loss differs by "
        f"{part['difference']:+.4f} nats a token {tested}, the perplexity by a factor of {part['ratio']:.3f}{times}. "
        f"{words}"
    )
