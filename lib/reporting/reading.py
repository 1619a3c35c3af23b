"""What the words of the table of files mean, for readers of the overview alone."""

from __future__ import annotations

from lib.reporting.summary import Summary
from lib.run.manifest import NOTEBOOK_OF


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
