"""What page 01 shows of the rows: with labels (`LabelPage`) or conversations (`ConversationPage`).

Both have the same parts, so that a cell of the notebook need not know which of the two it shows.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.language import CHINESE, language, translated
from lib.report import charts, display
from lib.report.display import Row, Shown, absent, tell
from lib.report.sentences import sentence
from lib.report.weights_page import unpacked
from lib.runs import machine
from lib.runs.files import free_space
from lib.statistics.noninferiority import FEWEST_GROUPS, POWER, balanced_weights, least_margin, rows_for
from lib.statistics.paired import copies_effect

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown

    from lib.stages.data.stage import DataResult

_OLD = "made before there was this audit; force: true makes it"


def machine_card(disk: Path) -> HTML:
    """What ran everything; `disk`: a folder on the disk that runs are written to."""
    return display.card("data.machine", machine=machine, system=platform, free=free_space(disk))


def page_of(result: DataResult) -> LabelPage | ConversationPage:
    """The page of a result."""
    return LabelPage(result) if result.task.label_names else ConversationPage(result)


class DataPage:
    """What both kinds of rows have in common; some of its sentences differ between them."""

    labelled = False

    def __init__(self, result: DataResult) -> None:
        self.result, self.task, self.facts = result, result.task, result.product.entry.facts

    @property
    def leaked(self) -> list[bool]:
        """Of every test row, of all folds, whether it is leaked."""
        return [row["leaked"] for row in self.result.tested()]

    def source(self) -> HTML:
        """Where rows and base model come from, with what tells them from all others."""
        card = {
            "source actually used": self.result.source,
            "split": self.result.split_rule,
            "base model": self.facts["base_model"],
            "base model's commit or hash": self.facts["base_revision"],
            "prompt hash": f"{self.facts['prompt_hash'][:12]}…",
            **unpacked(self.facts),
        }
        return display.key_values(card, "Where the rows come from")

    def flow(self) -> HTML:
        """What became of every row."""
        return display.table(self.result.flow, "Rows read, rows dropped and why, rows used.")

    def changes(self) -> HTML:
        """What was changed."""
        what = "what was changed in the texts"
        lines = [{what: change, "rows": count} for change, count in self.result.changes.items()]
        return display.table(lines or [{what: "nothing", "rows": 0}], "Repairs, counted.")

    def characters(self) -> HTML:
        """Kinds of characters that deserve a look."""
        return display.table(text_findings(self.result.text_audit), sentence("data.odd_characters"))

    def scripts(self) -> HTML | Markdown:
        """Simplified and traditional rows of each split."""
        lines = self.result.text_audit.get("scripts", [{"split": _OLD}])
        if all(line.get("neither") == line.get("rows") is not None for line in lines):
            return tell("data.no_scripts")
        rows = [{("traditional forms" if "share" in key else key): v for key, v in line.items()} for line in lines]
        return display.table(rows, sentence("data.scripts"), {"traditional forms": ".3%"})

    def reading(self) -> Markdown:
        """What the audit of the characters says."""
        audit = self.result.text_audit
        if not audit:
            return tell("data.no_audit", why=_OLD)
        return tell("data.characters", audit=audit)

    def copies(self) -> HTML:
        """Duplicates, and what one split had of another before the rows were divided anew."""
        found = display.table(self.result.duplicates, sentence("data.copies", labelled=self.labelled))
        if self.result.overlaps == self.result.overlaps_used or not _any_copies(self.result.overlaps):
            return found
        caption = sentence("data.overlaps", as_read=True, left=_any_copies(self.result.overlaps_used))
        return display.stacked(found, display.table(self.result.overlaps, caption))

    def overlaps(self) -> HTML | Markdown:
        """Leaks between splits."""
        if not _any_copies(self.result.overlaps_used):
            return absent("data.no_overlaps")
        return display.table(self.result.overlaps_used, sentence("data.overlaps", as_read=False, left=True))

    def leaks(self) -> Markdown:
        """How many test rows are leaked."""
        return tell("data.leaks", leaked=sum(self.leaked), rows=len(self.leaked), labelled=self.labelled)

    def leak_examples(self) -> HTML | Markdown:
        """Leaked rows as text."""
        if not self.result.leaked_examples:
            return absent("data.no_leaks")
        return display.texts(self.result.leaked_examples, "Examples of leaked rows, least obvious first.")

    def lengths(self) -> HTML:
        """Tokens a row."""
        return charts.length_histogram(self.result.lengths, self.task.max_seq_length)

    def example(self) -> HTML:
        """One row as token pieces."""
        pieces = self.result.example["pieces"]
        told = sentence("data.example", example=self.result.example, prompt_hash=self.facts["prompt_hash"])
        return display.tokens([piece["text"] for piece in pieces], [piece["loss"] for piece in pieces], told)

    def length_table(self) -> HTML:
        """Percentiles of the lengths."""
        rows = [
            {(f"{key[1:]} %" if key.startswith("p") else key): value for key, value in line.items()}
            for line in self.result.length_table
        ]
        return display.table(rows, sentence("data.lengths", labelled=self.labelled), {"truncated share": ".2%"})

    def _totals(self) -> dict[str, int]:
        """For the conclusions: the longest row, rows that are cut, and the limit."""
        return {
            "longest": max(max(values) for values in self.result.lengths.values()),
            "cut": sum(line["truncated rows"] for line in self.result.length_table),
            "limit": self.task.max_seq_length,
            "leaked": sum(self.leaked),
        }


class LabelPage(DataPage):
    """Texts with labels."""

    labelled = True

    def shape(self) -> HTML:
        """Rows of each label."""
        names = self.task.label_names
        counts = {line["split"]: [line[name] for name in names] for line in self.result.balance}
        return charts.label_balance(counts, names)

    def conflicts(self) -> HTML:
        """Texts that carry both labels."""
        named = [
            {**line, "rows by label": self._named(line["rows by label"])} for line in self.result.conflict_examples
        ]
        return display.texts(named or [{"text": "no conflicting text"}], sentence("data.conflicts"))

    def leak_examples(self) -> HTML | Markdown:
        """Leaked rows as text, labels by their names."""
        if not self.result.leaked_examples:
            return absent("data.no_leaks")
        names = self.task.label_names
        keys = ("label", "train label")
        found = [{**row, **{key: names[int(row[key])] for key in keys}} for row in self.result.leaked_examples]
        return display.texts(found, "Examples of leaked rows, least obvious first.")

    def _named(self, rows: Mapping[str, int]) -> dict[str, int]:
        """Rows by a label's name instead of its place."""
        return {self.task.label_names[int(place)]: count for place, count in rows.items()}

    def floor(self) -> HTML:
        """The linear floor."""
        test = self.result.floor["test"]
        parts = {"all test rows": test["all"], "leak-free test rows": test["leak_free"]}
        parts |= {f"{name} patterns": report for name, report in (test["by_pattern"] or {}).items()}
        made = {key: self.result.floor[key] for key in ("model", "trained_on")}
        return charts.estimates("data.floor", [part for part in parts.items() if part[1]], **made)

    def detectable(self) -> Shown:
        """What so many test rows can show of a quantized file, before anything is trained."""
        over = sum(
            line["rows"]
            for line in self.result.flow
            if line["split"] == "test" and line["step"] == "left out: over max_eval_rows"
        )
        words = tell("data.detectable", **detectable(self.result.tested()), over=over)
        margins = [{"margin_points": margin, **_rows_needed(margin)} for margin in (1, 2, 3, 5)]
        return words, display.table(margins, sentence("data.rows_needed", power=POWER))

    def learned(self) -> Markdown:
        """The conclusions."""
        test = self.result.floor["test"]
        clean = test["leak_free"] or test["all"]
        rows, commonest = len(self.leaked), max(map(sum, test["all"]["confusion"])) / test["all"]["n"]
        told = {"rows": rows, "clean": clean, "floor": test["all"], "commonest": commonest}
        return tell("data.labels_learned", **told, **self._totals())


def _any_copies(overlaps: Iterable[Row]) -> bool:
    """Whether any of the counts of copies is more than 0."""
    return any(line[key] for line in overlaps for key in line if key not in ("rows of", "also in", "rows", "compared"))


def independent_rows(rows: Sequence[Mapping[str, Any]]) -> float:
    """Independent rows that these are worth in a comparison of files: copies and unequal labels count less."""
    weights = balanced_weights([row["label"] for row in rows])
    return len(rows) / copies_effect([row["group"] for row in rows], len(rows), weights)


def detectable(test: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """What test rows ("label", "group", "leaked") can show, of all and of the leak-free rows.

    Returns:
        "counts", "worth" (independent rows), "least" (loss, points, that they exclude when no answer changes).
    """
    parts = {"all": test, "leak-free": [row for row in test if not row["leaked"]]}
    worth = {name: independent_rows(rows) for name, rows in parts.items() if rows}
    least = {name: 100 * least_margin(rows) for name, rows in worth.items()}
    return {"counts": {name: len(rows) for name, rows in parts.items()}, "worth": worth, "least": least}


def _rows_needed(margin: float) -> dict[str, str]:
    return {f"{100 * share:g} % changed": f"{rows_for(share, margin / 100):,}" for share in charts.CHANGED[:3]}


class ConversationPage(DataPage):
    """Conversations."""

    def shape(self) -> HTML:
        """Rows and turns."""
        return display.table(self.result.balance, "Rows and turns (without the system's) of each split.")

    def conflicts(self) -> Markdown:
        """There are none."""
        return absent("data.no_conflicts")

    def detectable(self) -> Shown:
        """Nothing, before anything is measured."""
        return (absent("data.no_plan", fewest=FEWEST_GROUPS),)

    def floor(self) -> Markdown:
        """There is none."""
        return absent("data.no_floor")

    def learned(self) -> Markdown:
        """The conclusions."""
        shape = {line["split"]: line for line in self.result.balance}
        counts = {
            name: sum(line.get(key, 0) for line in self.result.length_table)
            for name, key in (("learned", "answers learned"), ("read", "answers only read"))
        }
        return tell("data.answers_learned", shape=shape, thinking=self.task.thinking, **counts, **self._totals())


def _listed(parts: Iterable[str]) -> str:
    return ("、" if language() == CHINESE else ", ").join(map(translated, parts))


def text_findings(audit: Row) -> list[Row]:
    """One line a kind of character that occurs."""
    if not audit:
        return [{"what": _OLD}]
    splits = [line["split"] for line in audit["scripts"]]
    rows = [
        {
            "what": line["what"],
            f"{translated('rows')}{translated(': ')}{_listed(splits)}": _listed(f"{line[name]:,}" for name in splits),
            **{key: line[key] for key in ("characters", "most frequent", "example")},
        }
        for line in audit["findings"]
    ]
    return rows or [{"what": "nothing: every character is ordinary, and NFKC would change none"}]
