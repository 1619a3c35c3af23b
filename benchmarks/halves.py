"""Does the recommendation hold on rows it has not seen? Recommend on half of the test rows, check on the other half.

    python benchmarks/halves.py RUN… [--json OUT.json] [--times 200] [--margin 2]

RUN: folders of finished runs (with the products `data` and `comparison`). Whole groups of alike rows go to either half,
at random, seed 1. Beside the rule stands the one before it: the smallest file whose two-sided 95 % interval lies inside
the margin. The other half is itself a sample: a loss seen there spreads around the true one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib.runs.files import read_json, read_jsonl, write_json
from lib.scoring.log_probabilities import Scores
from lib.statistics.noninferiority import balanced_weights, good_enough, share_loss
from lib.statistics.paired import clustered_score_interval


def halves(run: Path, margin: float, times: int) -> list[dict[str, Any]]:
    """One entry a rule.

    Returns:
        "recommended" (share of halves with an answer), "megabytes" (mean of it, the reference where there is none),
        "lost" (mean loss on the other half, points), "beyond" (share of the answers that lose more than the margin
        there) and "shown" (share that the other half, too, shows to be good enough).
    """
    files = [entry for entry in read_json(run / "comparison" / "comparison.json")["files"] if entry["kind"] == "gguf"]
    scores = {e["type"]: Scores.load(run / "comparison" / f"scores-{e['type']}.jsonl") for e in files}
    groups = np.array([row["group"] for row in read_jsonl(run / "data" / "test.jsonl")])
    labels, reference = scores[files[0]["type"]].labels, scores[files[0]["type"]].correct
    changes = {e["type"]: scores[e["type"]].correct.astype(int) - reference for e in files[1:]}
    sizes, rng = {e["type"]: e["bytes"] for e in files}, np.random.default_rng(1)
    rules = {"this rule": _new, "the rule before": _old}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in rules}
    for _ in range(times):
        first = np.isin(groups, rng.permutation(np.unique(groups))[: len(np.unique(groups)) // 2])
        for name, rule in rules.items():
            chosen = rule(changes, sizes, labels, groups, first, margin)
            one = {"recommended": float(chosen is not None), "megabytes": sizes[chosen or files[0]["type"]] / 1e6}
            if chosen:
                other = share_loss(changes[chosen][~first], groups[~first], balanced_weights(labels[~first]))
                one |= {"lost": other.estimate, "beyond": other.estimate > margin, "shown": other.high < margin}
            found[name].append(one)
    keys = ("recommended", "megabytes", "lost", "beyond", "shown")
    return [
        {"run": run.name, "rows": len(labels), "margin": margin, "rule": name}
        | {key: float(np.mean([one[key] for one in own if key in one] or [np.nan])) for key in keys}
        for name, own in found.items()
    ]


def _new(
    changes: Mapping[str, np.ndarray],
    sizes: Mapping[str, int],
    labels: np.ndarray,
    groups: np.ndarray,
    rows: np.ndarray,
    margin: float,
) -> str | None:
    weights = balanced_weights(labels[rows])
    entries = [
        {"type": name, "bytes": sizes[name], "loss_limit": share_loss(change[rows], groups[rows], weights).high}
        for name, change in changes.items()
    ]
    return (good_enough(entries, margin) or [None])[-1]


def _old(
    changes: Mapping[str, np.ndarray],
    sizes: Mapping[str, int],
    labels: np.ndarray,
    groups: np.ndarray,
    rows: np.ndarray,
    margin: float,
) -> str | None:
    intervals = {name: clustered_score_interval(change[rows], groups[rows]) for name, change in changes.items()}
    inside = [name for name, one in intervals.items() if -margin / 100 < one.low and one.high < margin / 100]
    return min(inside, key=sizes.__getitem__, default=None)


def main(given: Sequence[str] | None = None) -> None:
    """Print the table; write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--json", type=Path, metavar="OUT.json")
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--margin", type=float, default=2.0, help="accuracy points")
    chosen = parser.parse_args(given)
    rows = [row for run in chosen.runs for row in halves(run, chosen.margin, chosen.times)]
    if chosen.json:
        write_json(chosen.json, {"name": "halves", "times": chosen.times, "halves": rows})
    print(" | ".join(rows[0]))
    for row in rows:
        print(" | ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))


if __name__ == "__main__":
    main()
