"""What page 07 shows of a comparison: by labels (`AccuracyPage`) or by the reference answers (`AnswerPage`).

Both have the same parts, so that a cell of the notebook need not know which of the two it shows: `detectable` (what the
rows can show), `sizes` and `quality` (what size buys), `differences` and `tests` (did it get worse), `by_hand` (one
test from the rows' own scores), `margins` or `written` (what the endpoint does not see) and `disagreements` (where the
files differ);
`kept` (what is left of the fine-tuning) and what follows it do not depend on the kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lib.language import retold
from lib.report import charts
from lib.report.display import (
    Entry,
    Row,
    Shown,
    absent,
    as_html,
    mark_names,
    markup,
    rows_of,
    table,
    tabled,
    tell,
    texts,
)
from lib.report.evaluate_page import latencies, metric_text, moved_metrics
from lib.report.looks import axis_label
from lib.report.retention import kept_chart, kept_reading
from lib.report.sentences import sentence
from lib.report.weights_page import MARK
from lib.runs.files import data_file
from lib.scoring.accuracy import ODDS_LIMIT
from lib.scoring.metric import ACCURACY
from lib.settings import GRID_SIZABLE
from lib.stages.compare.recommend import program
from lib.stages.compare.speed import MEMORIES
from lib.statistics.intervals import limits_text
from lib.statistics.losses import KEEPS_LITTLE, keeps_little
from lib.statistics.noninferiority import GOOD_ENOUGH, LEVEL, NO_VERDICT, WORSE, least_margin, rows_for

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown
    from pandas import DataFrame

    from lib.stages.compare.stage import ComparisonResult


def page_of(result: ComparisonResult) -> AccuracyPage | AnswerPage:
    """The page of a result."""
    return AccuracyPage(result) if result.metric is ACCURACY else AnswerPage(result)


class _Page:
    """What both kinds of comparison show alike; the kinds name the tables in which they differ."""

    compared: ClassVar[str]
    """Table of every file's size, quality and verdict."""
    changed: ClassVar[str]
    """Figure of the paired differences from the reference."""

    def __init__(self, result: ComparisonResult) -> None:
        self.result, self.reference = result, result.reference
        self.files, self.others = list(result.files), result.others
        self.n, self.folds = self.files[0]["n"], self.files[0].get("folds")
        mark_names([e["type"] for e in self.files if (e["source_grid"] or 0) >= GRID_SIZABLE], MARK)

    def answer(self) -> HTML:
        """The recommendation."""
        more = sentence("compare.more", verdicts=[entry["verdict"] for entry in self.others])
        return as_html(markup("answer", self.result.recommendation, more))

    def rule(self) -> Markdown:
        """The rule of the verdicts, its formulas, and where the scores lie."""
        values = {"folds": self.folds, "labelled": self.result.metric is ACCURACY}
        return tell("compare.rule", advice=self.result.recommendation, run=self._run, **values)

    @property
    def _run(self) -> str:
        return self.result.product.path.parent.name

    def sizes(self) -> HTML:
        """What size costs, with the verdicts."""
        advice = self.result.recommendation
        return charts.size_loss(self.files, advice["type"], advice["margin"], advice["unit"])

    def quality(self) -> HTML:
        """Size, quality and verdict of each file."""
        apart = [entry for entry in self.others if entry["n"] != self.n]
        caption = sentence(self.compared, n=self.n, apart=apart, reference=self.reference)
        return table(rows_of(self.compared, self.files), caption)

    def differences(self) -> HTML:
        """Paired losses from the reference: accuracy, in points; answer perplexity, in percent."""
        margin = self.result.margin
        return charts.estimates(self.changed, self.others, at=0.0, margin=margin, reference=self.reference)

    def by_hand(self, entry: Entry, pairs: DataFrame) -> Shown:
        """One paired test from the rows' own values.

        Args:
            entry: of the file. pairs: a row a test row, columns: the reference's value and the file's.
        """
        before, after = pairs.columns
        differing = pairs[pairs[before] != pairs[after]]
        first = differing.head(5).assign(difference=differing[after] - differing[before])
        rows = [{"row": name, **values} for name, values in first.to_dict("index").items()]
        caption = sentence(
            "compare.rows_by_hand", n=len(pairs), differing=len(differing), metric=self.result.metric.name
        )
        return table(rows, caption), self._test_by_hand(entry, pairs)

    def divergences(self) -> Shown:
        """KL divergence from the reference and perplexity of each file, and which files are efficient by it."""
        measured = {"tokens": self.files[0]["n_tokens"], "window": self.result.conditions["window_tokens"]}
        rows = rows_of("compare.divergences", self.files)
        if "label_kld" not in self.files[0]:
            rows = [{key: cell for key, cell in row.items() if key != "label_kld"} for row in rows]
        found = table(rows, sentence("compare.divergences", reference=self.reference, **measured))
        return found, charts.size_divergence(self.files, self.result.frontier), charts.frontiers(self.result.files)

    def speeds(self) -> Shown:
        """Load time and token rates with their range, time a row, and memory of each file."""
        where = self.result.conditions
        runs = {kind: sorted(e[f"{kind}_runs"] for e in self.files) for kind in ("load", "prompt", "generation")}
        counts = {"threads": where["n_threads"], "runs": runs}
        rows = rows_of("compare.speeds", self.files, program=program)
        measured = table(rows, sentence("compare.speeds", processor=where["processor"], **counts))
        return charts.speed_and_memory(self.files, self.result.frontier), measured

    def learned(self) -> Markdown:
        """The conclusions."""
        files = sorted((e for e in self.others if e["kld_mean"] > 0), key=lambda e: e["kld_mean"])
        lower = [e for e in files[1:] if e["ppl"] < self.files[0]["ppl"]]
        puzzle = None
        if lower:
            times = round(lower[-1]["kld_mean"] / files[0]["kld_mean"])
            puzzle = {**lower[-1], "times": times, "nearest": files[0]["type"]}
        return tell(
            "compare.learned",
            reference=self.files[0],
            others=self.others,
            worse=[e["type"] for e in self.others if e["verdict"] == WORSE],
            certain=[
                e["type"] for e in self.others if e["verdict"] == GOOD_ENOUGH and e["loss"] > 0 and e["p_holm"] < LEVEL
            ],
            shares=self._changed(),
            no_verdict=all(e["verdict"] == NO_VERDICT for e in self.others),
            puzzle=puzzle if puzzle and puzzle["times"] >= _FAR else None,
            n=self.n,
            folds=self.folds,
            margin=self.result.margin,
            unit=self.result.metric.loss_unit,
            gain=self.result.fine_tuning_gain,
            below_floor=self.result.below_floor,
            written=self._written_otherwise(),
            at_best=self._at_best(),
            little=KEEPS_LITTLE,
            poor=[] if self.result.recommendation["warning"] else [*filter(keeps_little, self.others)],
        )

    def _changed(self) -> str | None:
        """Shares of rows with another answer than the reference's, where files have rows of their own; else None."""
        if "flips" not in self.files[0] or all(e["n"] == self.n for e in self.others):
            return None
        return span([e["flips"] / e["n"] for e in self.others], ".1%")

    def _written_otherwise(self) -> dict[str, Any] | None:
        """The recommended file, answers that it wrote, and how many of them are not the reference's to the letter."""
        name, counts = self.result.recommendation["type"], self.result.written.get("same_text", {})
        if name not in counts:
            return None
        whole = counts[self.result.written["reference"]]
        return {"type": name, "n": whole, "changed": whole - counts[name]}

    def _at_best(self) -> dict[str, float] | None:
        """The least loss that the rows can exclude, and the rows with which the margin could be; None: not known."""
        return None

    def kept(self) -> Shown:
        """How much of what fine-tuning taught is left in each file."""
        return kept_chart(self.files, self.result.data["rows"]), kept_reading(self.files, self.result.retention_note)


class AccuracyPage(_Page):
    """How many labels the files get right, and how sure they are of them."""

    compared, changed = "compare.accuracies", "compare.accuracy_differences"

    @property
    def _independent(self) -> float:
        """Independent rows that the test rows are worth."""
        return self.n / self.files[0]["copies_effect"]

    def detectable(self) -> Shown:
        """What this many rows can show: known before any result is."""
        margin, independent = self.result.margin, self._independent
        words = tell(
            "compare.accuracy_power",
            n=self.n,
            folds=self.folds,
            independent=round(independent),
            margin=margin,
            least=100 * least_margin(independent),
            rows=[(share, rows_for(share, margin / 100)) for share in charts.CHANGED],
            changed=span([(e["mcnemar_b"] + e["mcnemar_c"]) / e["n"] for e in self.others], ".1%"),
        )
        return charts.power(independent, margin), words

    def tests(self) -> Shown:
        """The paired test of each file's accuracy, beside it macro-F1 and log-odds, and the label it lost most of."""
        tests = tabled("compare.accuracy_tests", self.others, files=len(self.others), folds=self.folds)
        beside = tabled("compare.accuracy_beside", self.others, odds_limit=ODDS_LIMIT, folds=self.folds)
        return tests, beside, tabled("compare.lost_labels", map(self._most_lost, self.others))

    def _most_lost(self, entry: Entry) -> Row:
        """The label whose recall fell most from the reference's, on the rows of this file."""
        own, reference = entry["per_class"], self.files[0] if entry["n"] == self.n else self.files[0]["own"]
        before = {name: scores["recall"] for name, scores in reference["per_class"].items()}
        change, name = min((scores["recall"] - before[name], name) for name, scores in own.items())
        found = {**own[name], "label": name, "before": before[name], "change": change} if change < 0 else {}
        return {"type": entry["type"], **found}

    def _test_by_hand(self, entry: Entry, pairs: DataFrame) -> Markdown:
        from scipy.stats import binomtest

        before, after = (pairs[name].astype(bool) for name in pairs.columns)
        counts = {"both": before & after, "lost": before & ~after, "won": ~before & after, "none": ~before & ~after}
        counts = {name: int(rows.sum()) for name, rows in counts.items()}
        discordant = counts["lost"] + counts["won"]
        p = float(binomtest(counts["lost"], discordant, 0.5).pvalue) if discordant else 1.0
        return tell("compare.mcnemar_by_hand", names=list(pairs.columns), counts=counts, p=p, page=entry["mcnemar_p"])

    def written(self) -> Shown:
        """Nothing: labels are no texts."""
        return ()

    def _at_best(self) -> dict[str, float]:
        return {
            "least": 100 * least_margin(self._independent),
            "rows": rows_for(charts.CHANGED[1], self.result.margin / 100),
        }

    def margins(self) -> Shown:
        """The margins behind the labels, drawn."""
        smallest = min(self.others, key=lambda e: e["bytes"])["type"]
        names = dict.fromkeys([self.reference, self.others[0]["type"], smallest])
        margins = {name: self.result.scores(name).margins for name in names}
        labels = self.result.scores(self.reference).log_probs.shape[1]
        axis = axis_label("charts.margins_axis", labels=labels)
        histogram = charts.overlay_histogram(margins, axis, sentence("compare.margin_histogram", n=self.n))
        return (histogram,)

    def disagreements(self) -> Shown:
        """Where labels flip: equal labels of each pair of models by the first one's margin."""
        pairs = self.result.agreement
        near = {entry["type"]: self.result.own_scores(entry["type"]).near_ties for entry in self.files}
        return table(agreement(pairs, near), sentence("compare.agreement")), agreement_reading(pairs)


class AnswerPage(_Page):
    """How likely the files find the reference answers, and what they write."""

    compared, changed = "compare.answers", "compare.answer_differences"

    def detectable(self) -> Shown:
        """What the answers can show at all."""
        seen = [e["loss_limit"] - e["loss"] for e in self.others if e["loss_limit"] is not None]
        words = tell(
            "compare.answer_power",
            n=self.n,
            others=self.others,
            excess=span(seen, ".2f") if seen else None,
            margin=self.result.margin,
            floor=self.result.conditions["floor"],
        )
        return (words,)

    def tests(self) -> Shown:
        """The paired test of each file's loss, and what the leak-free rows alone say."""
        counts = {"files": len(self.others), "groups": self.files[0]["groups"]}
        return (tabled("compare.answer_tests", self.others, **counts),)

    def _test_by_hand(self, entry: Entry, pairs: DataFrame) -> Markdown:
        tokens = self.result.metric.row_values(self.result.scores(entry["type"]))[1]
        before, after = pairs.columns
        mean = float(np.average(pairs[after] - pairs[before], weights=tokens))
        page = entry["loss_difference"]
        return tell("compare.losses_by_hand", names=[before, after], tokens=int(tokens.sum()), mean=mean, page=page)

    def margins(self) -> Shown:
        """Nothing: answers without labels have no margin."""
        return ()

    def written(self) -> Shown:
        """What the files write: the checks of their answers, the differences from the reference's, and the texts."""
        caption, written = sentence("compare.written_differences", reference=self.reference), self.result.written
        if not written:
            return ()
        short = [entry for entry in written["metrics"] if entry["key"] in SHORT]

        def cells(kind: str, name: str) -> Row:
            return {SHORT[entry["key"]]: metric_text(entry, kind, name) for entry in short}

        metrics = [{"type": retold(name), **cells("models", name)} for name in written["same_text"]]
        others = [name for name in written["same_text"] if name != written["reference"]]
        differences = [{"type": retold(name), **cells("differences", name)} for name in others]
        terms = next((entry for entry in written["metrics"] if entry["key"] == "terms"), None)
        types = next((entry["types"] for entry in written["metrics"] if "types" in entry), {})
        by_type = [
            {"type": retold(name), **{f"F1, {line['type']} ({line['wanted']})": f"{line['f1']:.2f}" for line in lines}}
            for name, lines in types.items()
        ]
        return (
            table(metrics, sentence("written.file_conditions", written=written, terms=terms)),
            table(differences, caption),
            *([table(by_type, sentence("written.file_types"))] if by_type else []),
            *self._side_by_side(),
        )

    def _side_by_side(self) -> Shown:
        """Latency of the answers to rows and prompts, how alike they are to the reference's, and some of them."""
        rows, prompts = self.result.generated, self.result.prompts["prompts"]
        names, shown = self.result.written["same_text"], (prompts or rows)[:SIDE_BY_SIDE]
        models = {name: [one["answers"][name] for one in (*rows, *prompts)] for name in names}
        lines, cut = [], f" {retold('[cut at the limit]')}"
        for one in shown:
            said: dict[str, list[str]] = {one["reference"]: [sentence("written.reference")]} if one["reference"] else {}
            for name, answer in one["answers"].items():
                said.setdefault(answer["text"] + ("" if answer["ended"] else cut), []).append(name)
            asked = {"prompt": one.get("question") or one.get("prompt")}
            lines += [
                {**asked, "by": retold(", ").join(map(retold, by)), "answer": text or retold("(nothing)")}
                for text, by in said.items()
            ]
        told = {"shown": len(shown), "rows": len(rows), "prompts": len(prompts)}
        return (
            table(latencies(models), sentence("evaluate.latency", reference=self.reference)),
            texts(lines, sentence("written.side_by_side", **told), longest=400),
        )

    def disagreements(self) -> Shown:
        """Which files write differently from the reference."""
        written = self.result.written
        if not written:
            return ()
        names = [name for name in written["same_text"] if name != written["reference"]]
        moved = {name: moved_metrics(written["metrics"], name) for name in names}
        return (tell("written.file_reading", written=written, moved=moved),)


_FAR = 10
"""Times that the largest KL divergence must be the smallest one before a lower perplexity is called no gain."""

SIDE_BY_SIDE = 5
"""Prompts, or without a set test rows, whose answers page 07 shows."""

SHORT: dict[str, str] = data_file("report/written.yaml")
"""Metrics of written answers in the tables, and their headings."""


# Rows of tables: one row a file.


def ceilings(limits: Sequence[Mapping[str, Any]]) -> HTML | Markdown:
    """The most tokens a second that a memory can feed (`lib.stages.compare.speed`)."""
    if not limits:
        return absent("compare.no_ceilings")
    most = f"≤ tokens/s{retold(', ')}"
    rows = [
        {
            "type": limit["type"],
            "read_mb": limit["megabytes"],
            **{f"{most}{name.split(',')[0]}": f"{r:,.0f}" for name, r in limit["tokens_per_second"].items()},
        }
        for limit in limits
    ]
    return table(rows, sentence("compare.ceilings", memories=MEMORIES))


def agreement(pairs: Iterable[Mapping[str, Any]], near: Mapping[str, int]) -> list[Row]:
    """Equal labels of each pair of models by the first one's margin (`agreement` of comparison.json).

    Args:
        near: near ties of the second of each pair.
    """
    return [
        {
            "model": pair["second"],
            "against": pair["first"],
            "near_ties": near[pair["second"]],
            **{sentence("compare.margin_bin", bin=part): _share(part) for part in pair["bins"]},
        }
        for pair in pairs
    ]


def _share(part: Mapping[str, Any]) -> str | None:
    if not part["n"]:
        return None
    return f"{part['agree']:,}/{part['n']:,} {limits_text(part['interval'], '.0f', 100)}"


def agreement_reading(pairs: Sequence[Mapping[str, Any]]) -> Markdown:
    """What the first pair says: the backends on one model where there is a merged model, else the first file."""
    return tell("compare.agreement_reading", pair=pairs[0])


def span(values: Iterable[float], form: str) -> str:
    """The smallest and the largest number, or the one if both read alike."""
    ordered = sorted(values)
    low, high = (f"{limit:{form}}".replace("%", " %") for limit in (ordered[0], ordered[-1]))
    return low if low == high else f"{low} – {high}"
