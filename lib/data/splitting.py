"""Dividing rows: by duplicate cluster for a split, by label for a subsample; equal seeds give equal rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from lib.data.audit import normalise
from lib.data.cleaning import Row

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


def drop_copies(rows: Sequence[Row]) -> tuple[list[Row], Counter[str]]:
    """Rows without texts that bear two labels and without surplus copies (after normalisation; the first stays)."""
    keys = [normalise(row.text) for row in rows]
    labels: dict[str, set[int]] = {}
    for row, key in zip(rows, keys, strict=True):
        labels.setdefault(key, set()).add(row.label)
    kept, counts, seen = [], Counter[str](), set()
    for row, key in zip(rows, keys, strict=True):
        if len(labels[key]) > 1:
            counts["dropped: text with conflicting labels"] += 1
        elif key in seen:
            counts["dropped: copy of an earlier row"] += 1
        else:
            seen.add(key)
            kept.append(row)
    return kept, counts


def split_by_cluster(rows: Sequence[Row], seed: int, shares: dict[str, float] | None = None) -> dict[str, list[Row]]:
    """Whole clusters to splits, each label near the wanted shares; rows keep their order.

    Clusters go, largest first and otherwise in seeded order, to the split that lacks most of the cluster's commonest
    label.

    Args:
        rows: with `group` set.
        shares: wanted share of each split; default 8 : 1 : 1.
    """
    shares = shares or SHARES
    clusters: dict[int, list[Row]] = {}
    for row in rows:
        clusters.setdefault(row.group, []).append(row)
    totals = Counter(row.label for row in rows)
    room = {name: {label: share * n for label, n in totals.items()} for name, share in shares.items()}
    order = np.random.default_rng(seed).permutation(len(clusters))
    members = list(clusters.values())
    split_of: dict[int, str] = {}
    for at in sorted(order.tolist(), key=lambda i: -len(members[i])):
        labels = Counter(row.label for row in members[at])
        commonest = min(labels, key=lambda label: (-labels[label], label))
        name = max(shares, key=lambda split: room[split][commonest])
        split_of[members[at][0].group] = name
        for label, count in labels.items():
            room[name][label] -= count
    return {name: [row for row in rows if split_of[row.group] == name] for name in shares}


def subsample(rows: list[Row], most: int, seed: int) -> list[Row]:
    """At most `most` rows (0 = all), the labels' shares kept as well as whole rows allow, in the given order."""
    if not most or most >= len(rows):
        return rows
    rng = np.random.default_rng(seed)
    by_label: dict[int, list[int]] = {}
    for position, row in enumerate(rows):
        by_label.setdefault(row.label, []).append(position)
    wanted = {label: most * len(places) / len(rows) for label, places in by_label.items()}
    take = {label: int(share) for label, share in wanted.items()}
    by_remainder = sorted(wanted, key=lambda label: (take[label] - wanted[label], label))
    for label in by_remainder[: most - sum(take.values())]:
        take[label] += 1
    chosen = [place for label in sorted(by_label) for place in rng.permutation(by_label[label])[: take[label]].tolist()]
    return [rows[place] for place in sorted(chosen)]
