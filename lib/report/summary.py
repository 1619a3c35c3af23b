"""What the manifest and the product folders say about a run, as plain values for page heads and indexes.
What the words of the table of files mean, for readers of the overview alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.runs.files import read_json
from lib.runs.manifest import NOTEBOOK_OF, Entry
from lib.runs.run import Run

# What the manifest and the product folders say about a run, as plain values for page heads and indexes.
#
# Later products may be missing and their files may lack keys: what is not there is left out, nothing is guessed.

ALL, LEAK_FREE = "all", "leak_free"
"""Subsets of the test rows."""


@dataclass(frozen=True)
class Quality:
    """An accuracy (without labels: a perplexity of answers) with its interval; n rows."""

    accuracy: float
    interval: tuple[float, float] | None
    n: int | None

    def __str__(self) -> str:
        text = f"{self.accuracy:.3f}"
        return f"{text} [{self.interval[0]:.3f}, {self.interval[1]:.3f}]" if self.interval else text


@dataclass(frozen=True)
class Summary:
    """A run in plain values.

    Attributes:
        entries: manifest entries by product, in the order of the stages.
        stamps: what every page must say.
        qualities: accuracy (without labels: perplexity of the reference answers) on "all" and on "leak_free" test rows,
            by "linear floor", "base" and "fine-tuned".
        files: one dict a quantized file, with the keys of comparison.json.
        recommendation, rule: the comparison's answer in words, and the rule behind it; empty when there is none.
    """

    name: str
    entries: dict[str, Entry]
    stamps: list[str]
    qualities: dict[str, dict[str, Quality]] = field(default_factory=dict)
    files: list[dict[str, Any]] = field(default_factory=list)
    recommendation: str = ""
    rule: str = ""

    @property
    def labelled(self) -> bool:
        return self.facts.get("task", "classification") == "classification"

    @property
    def facts(self) -> dict[str, Any]:
        """Facts of the data product."""
        entry = self.entries.get("data")
        return entry.facts if entry else {}

    @property
    def model(self) -> str:
        if self.facts.get("offline_base"):
            return "offline base (trained here)"
        name, revision = self.facts.get("base_model", ""), str(self.facts.get("base_revision", ""))
        return f"{name} @ {revision[:12]}" if revision else str(name) or "not chosen yet"

    @property
    def data(self) -> str:
        return str(self.facts.get("source", "")) or "not read yet"

    @property
    def date(self) -> str:
        finished = [entry.finished for entry in self.entries.values()]
        return max(finished)[:16].replace("T", " ") if finished else ""

    @property
    def commit(self) -> str:
        git = [entry.git for entry in self.entries.values() if entry.git]
        return commit_words(git[-1]) if git else "unknown"

    @property
    def recommended(self) -> str:
        """Type of the recommended file, if the comparison names one."""
        chosen = next((f for f in self.files if f.get("recommended")), None)
        return str(chosen.get("type")) if chosen else ""

    def parameters(self, *notebooks: str) -> dict[str, Any]:
        """Parameters of the products of these notebooks (of all without an argument)."""
        merged: dict[str, Any] = {}
        for product, entry in self.entries.items():
            if not notebooks or NOTEBOOK_OF.get(product) in notebooks:
                merged |= entry.parameters
        return merged

    def products(self, notebook: str) -> dict[str, Entry]:
        """The products that a notebook makes."""
        return {p: e for p, e in self.entries.items() if NOTEBOOK_OF.get(p) == notebook}


def commit_words(git: dict[str, Any]) -> str:
    """A manifest's git entry in words."""
    return f"{str(git.get('commit', 'unknown'))[:12]}{' (changed files)' if git.get('dirty') else ''}"


def _json(path: Path) -> dict[str, Any]:
    """A product's JSON object; empty when it is absent or damaged (its page says so, not the index)."""
    try:
        value = read_json(path)
    except (OSError, InputError):
        return {}
    return value if isinstance(value, dict) else {}


def _interval(value: Any) -> tuple[float, float] | None:
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return float(value[0]), float(value[1])
    return None


def _floor(folder: Path) -> dict[str, Quality]:
    """The linear floor on the test rows, from the data product: all that is known before the evaluation."""
    block = _json(folder / "data" / "floor.json").get("test")
    if not isinstance(block, dict) or not isinstance(block.get("accuracy"), (int, float)):
        return {}
    interval, n = _interval(block.get("accuracy_interval")), block.get("n")
    if n is None and isinstance(block.get("predictions"), list):
        n = len(block["predictions"])
    if interval is None and n:
        from lib.statistics.intervals import wilson

        interval = _interval(wilson(round(block["accuracy"] * n), n).to_json())
    return {ALL: Quality(float(block["accuracy"]), interval, n)}


def _qualities(folder: Path, entries: dict[str, Entry]) -> dict[str, dict[str, Quality]]:
    """Accuracies by model and subset of the rows: from the evaluation's metrics, else the floor alone."""
    if "evaluation" not in entries:
        floor = _floor(folder)
        return {"linear floor": floor} if floor else {}
    metrics = entries["evaluation"].metrics
    evaluation = _json(folder / "evaluation" / "evaluation.json")
    if "parts" in evaluation:
        return _perplexities(evaluation["parts"])
    found: dict[str, dict[str, Quality]] = {}
    for name, key in (("linear floor", "linear_floor"), ("base", "base"), ("fine-tuned", "finetuned")):
        for subset, ending in ((ALL, ""), (LEAK_FREE, "_leak_free")):
            accuracy = metrics.get(f"accuracy_{key}{ending}")
            if isinstance(accuracy, (int, float)):
                interval = _interval(metrics.get(f"accuracy_{key}{ending}_interval"))
                n = metrics.get("n") if subset == ALL else _rows(evaluation, subset)
                found.setdefault(name, {})[subset] = Quality(float(accuracy), interval, n)
    return found


def _perplexities(parts: dict[str, Any]) -> dict[str, dict[str, Quality]]:
    """Perplexity of the reference answers by model and subset of the rows."""
    return {
        name: {
            subset: Quality(part[key]["perplexity"], _interval(part[key]["perplexity_interval"]), part["n"])
            for subset, part in parts.items()
        }
        for name, key in (("base", "base"), ("fine-tuned", "finetuned"))
    }


def _rows(evaluation: dict[str, Any], subset: str) -> int | None:
    """Number of rows of a subset, where evaluation.json gives it."""
    try:
        return int(evaluation["models"]["base"][subset]["n"])
    except (KeyError, TypeError, ValueError):
        return None


def summarise(run: Run) -> Summary:
    """Read a run; never fails on a product that is not there yet."""
    entries = run.manifest.entries()
    known = {product: entry for product, entry in entries.items() if (run.folder / product).is_dir()}
    comparison = _json(run.folder / "comparison" / "comparison.json") if "comparison" in known else {}
    recommendation = comparison.get("recommendation", {})
    files = [{**f, "recommended": f["type"] == recommendation.get("type")} for f in comparison.get("files", [])]
    return Summary(
        name=run.name,
        entries=known,
        stamps=run.stamps(),
        qualities=_qualities(run.folder, known),
        files=files,
        recommendation=recommendation.get("text", ""),
        rule=recommendation.get("rule", ""),
    )


# What the words of the table of files mean, for readers of the overview alone.


def reading(summary: Summary) -> list[tuple[str, str]]:
    """(word, meaning) for a run's verdicts, with its own margin and seed; empty when nothing was compared."""
    if not summary.files:
        return []
    given = summary.parameters(NOTEBOOK_OF["comparison"])
    words = (
        _of_labels(given.get("equivalence_margin")) if summary.labelled else _of_answers(given.get("perplexity_margin"))
    )
    seed = f" Resampling begins with seed {given['seed']}." if "seed" in given else ""
    words = [*words[:-1], (words[-1][0], words[-1][1] + seed)]
    kld = (
        "Kullback–Leibler divergence: how far the file's probabilities of the next token are from the reference's on "
        "held-out text; 0 = the same. It is more sensitive than the verdict, and does not say that answers got worse."
    )
    rule = [("the recommendation (★)", summary.rule)] if summary.rule else []
    return [*words, ("KLD", kld), *rule]


def _shown(margin: object) -> str:
    return f"{margin:g}" if isinstance(margin, (int, float)) else "the margin"


def _of_labels(margin: object) -> list[tuple[str, str]]:
    return [
        (
            "equivalent within δ",
            "the whole 95 % interval of the difference in accuracy to the reference lies inside "
            f"±δ = {_shown(margin)} accuracy points (equivalence_margin).",
        ),
        (
            "worse, better",
            "the corrected p-value is below 0.05, and the interval of the difference holds no zero. “By the margins”: "
            "accuracy could not tell, the log-odds of the right answers could.",
        ),
        (
            "cannot tell (MDE x)",
            "none of these. It does not mean “equal”: differences below the minimum detectable effect x would be "
            "missed more often than one time in five on this many rows.",
        ),
        ("flips", "rows that get another label than the reference gives them, whether right or wrong."),
        (
            "how it is tested",
            "exact McNemar test on the rows that only one of the two files got right, near-duplicate rows counted "
            "together; margins by exchanging signs of whole groups; Holm correction over all files and both tests.",
        ),
    ]


def _of_answers(margin: object) -> list[tuple[str, str]]:
    return [
        (
            "equivalent within δ",
            "the whole 95 % interval of the ratio of perplexities to the reference lies inside "
            f"±δ = {_shown(margin)} % (perplexity_margin).",
        ),
        ("worse, better", "the corrected p-value is below 0.05, and the interval of the ratio holds no 1."),
        (
            "cannot tell (MDE x)",
            "neither. It does not mean “equal”: changes below the minimum detectable effect x would be missed more "
            "often than one time in five on this many rows.",
        ),
        (
            "answer perplexity",
            "how unlikely the reference answers are to the file, a token; lower is better. Likely answers are not yet "
            "good ones: read some in 07.",
        ),
        (
            "how it is tested",
            "the difference of the losses on the same answers, over groups of alike rows; Holm correction over files.",
        ),
    ]
