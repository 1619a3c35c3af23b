"""Which rows are copies of which, found exactly and not by sampling, and the division of rows by clusters of copies."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.progress import Progress

if TYPE_CHECKING:
    from lib.stages.data.cleaning import Row

# Pairs of texts that share most of their character 3-grams, found exactly, not by sampling.
#
# Candidates come from prefix filtering (Chaudhuri 2006, Bayardo 2007): if the rarest grams of a text have nothing in
# common with another one, their similarity cannot reach the threshold.

THRESHOLD = 0.8
"""Least Jaccard similarity of near-duplicates."""

CONTAINED, SHORTEST = 0.9, 12
"""A text of at least SHORTEST characters lies within another one that holds this share of its grams."""

GRAM = 3
_AT_ONCE, _VERIFIED_AT_ONCE = 1000, 20_000
"""Texts whose candidates are looked for together, and candidate pairs that are verified together."""


def close_pairs(texts: Sequence[str], contained: bool = False, threshold: float = THRESHOLD) -> np.ndarray:
    """(pairs, 2) indices i < j of distinct texts that are close.

    That is: the Jaccard similarity of their 3-gram sets is at least `threshold`; with `contained` the larger one holds
    the share `threshold` of the other's, which has at least SHORTEST characters, and as many different grams as they
    can make. A text shorter than three characters is its own only gram.
    """
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import CountVectorizer

    def close(one: np.ndarray, two: np.ndarray, common: np.ndarray) -> np.ndarray:
        """Whether sets of these sizes are, that have so much in common."""
        smaller = np.minimum(one, two)
        whole = smaller if contained else one + two - common
        return (common >= threshold * whole - 1e-9) & (not contained or smaller > SHORTEST - GRAM)

    if len(texts) < 2:
        return np.empty((0, 2), dtype=np.int64)
    grams = CountVectorizer(analyzer=_grams, binary=True, dtype=np.int32).fit_transform(texts)
    indices, starts, n, sizes = grams.indices, grams.indptr, len(texts), np.diff(grams.indptr)
    row = np.repeat(np.arange(n), sizes)
    rare_first = np.lexsort((indices, np.bincount(indices)[indices], row))
    place = np.arange(len(indices)) - starts[:-1][row]
    prefix = sizes - np.ceil(threshold * sizes - 1e-9).astype(np.int64) + 1
    kept = place < prefix[row]
    prefixes = csr_matrix((grams.data[: kept.sum()], (row[kept], indices[rare_first[kept]])), shape=grams.shape)
    # the rarest grams of a text are compared with the other's rarest ones, or with all of a text that may contain it
    transposed, found = (grams if contained else prefixes).T.tocsr(), []
    with Progress("containment audit" if contained else "near-duplicate audit", n) as progress:
        for start in range(0, n, _AT_ONCE):
            candidates = (prefixes[start : start + _AT_ONCE] @ transposed).tocoo()
            i, j = candidates.row + start, candidates.col
            ordered = (i < j) if not contained else (sizes[i] < sizes[j]) | ((sizes[i] == sizes[j]) & (i < j))
            fits = ordered & close(sizes[i], sizes[j], np.minimum(sizes[i], sizes[j]))  # at most that much in common
            possible = np.stack([i[fits], j[fits]], axis=1).astype(np.int64)
            for some in np.array_split(possible, -(-len(possible) // _VERIFIED_AT_ONCE) or 1):
                a, b = some.T
                common = np.asarray(grams[a].multiply(grams[b]).sum(axis=1)).ravel()
                found.append(some[close(sizes[a], sizes[b], common)])
            progress.advance(min(_AT_ONCE, n - start))
    pairs = np.sort(np.concatenate(found), axis=1)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _grams(text: str) -> list[str]:
    return [text[i : i + GRAM] for i in range(max(1, len(text) - GRAM + 1))]


# Which rows are copies of which: verbatim, after normalisation, and nearly; within splits and across them.
#
# Two texts are near-duplicates when the Jaccard similarity of their sets of character 3-grams (after normalisation) is
# at least 0.8. Of openings a text also counts that another one contains (`lib.stages.data.near_duplicates`).

EXAMPLES = 6
"""Most leaked rows, and most texts with several labels, that are shown."""

_NOT_WORD = re.compile(r"[\W_]+")


def normalise(text: str) -> str:
    """Text for comparison: NFKC, without punctuation, symbols and spaces, case folded.

    A text of nothing but punctuation keeps it (without spaces), so that "!!!" and "???" stay different.
    """
    wide = unicodedata.normalize("NFKC", text)
    return _NOT_WORD.sub("", wide).casefold() or "".join(wide.split())


@dataclass(frozen=True)
class Duplicates:
    """Copies among all rows of all splits.

    Attributes:
        near: pairs (i, j), i < j, of indices into `unique` that are near-duplicates.
        contained: further such pairs, one of which contains the other; none where that was not asked for.
        unique: distinct normalised texts, in order of first appearance.
        groups: (rows,) number of each row's cluster: connected by equality, near-duplication or containment; numbered
            by first appearance.
        unique_of: (rows,) index into `unique`.
    """

    unique: list[str]
    near: np.ndarray
    contained: np.ndarray
    unique_of: np.ndarray
    groups: np.ndarray


def find_duplicates(texts: Sequence[str], contained: bool = False) -> Duplicates:
    """Compare all texts with one another. Exact and deterministic; memory grows with the number of grams.

    Args:
        contained: whether a text that another one contains counts too.
    """
    import pandas as pd

    unique_of, distinct = pd.factorize(np.array([normalise(text) for text in texts], dtype=object))
    unique = distinct.tolist()
    near = close_pairs(unique)
    known = set(map(tuple, near.tolist()))
    inside = close_pairs(unique, True, CONTAINED).tolist() if contained else []
    inside = np.array([pair for pair in inside if tuple(pair) not in known], dtype=np.int64).reshape(-1, 2)
    component = _components(np.concatenate([near, inside]), len(unique))
    return Duplicates(unique, near, inside, unique_of, pd.factorize(component[unique_of])[0])


def joined(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """Number of each row's group when rows that are alike in either of two groupings belong together."""
    import pandas as pd

    one = np.array(first, dtype=np.int64)
    two = np.array(second, dtype=np.int64) + max(first, default=0) + 1
    component = _components(np.stack([one, two], axis=1), int(two.max(initial=-1)) + 1)
    return pd.factorize(component[one])[0].tolist()


def _components(pairs: np.ndarray, count: int) -> np.ndarray:
    """(count,) number of the connected component of each node of a graph with edges `pairs`."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    edges = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return connected_components(edges, directed=False)[1]


def audit(splits: Mapping[str, list[Row]], contained: bool = False) -> dict[str, list[dict]]:
    """Compare all rows, set each row's `group` and `leaked`, and count.

    `leaked`: a validation or test row that is a verbatim, normalised or near copy of a train row.

    Args:
        contained: whether a text that another one contains counts as its copy (in columns of its own).

    Returns:
        Lists of plain dicts, ready to be tables. "duplicates": per split, and over all where there are several, rows,
        distinct texts, surplus copies, copies after normalisation, near pairs, conflicts; "overlaps": per pair of
        splits, rows of the one that are verbatim, normalised or near copies of the other; "leaked_examples" and
        "conflict_examples": as text.
    """
    import pandas as pd

    rows = [row for split in splits.values() for row in split]
    found = find_duplicates([row.text for row in rows], contained)
    table = pd.DataFrame(
        {
            "split": [name for name, split in splits.items() for _ in split],
            "text": pd.Series([row.text for row in rows], dtype=object),
            "label": [row.label for row in rows],
            "unique": found.unique_of,
            "group": found.groups,
        }
    )
    for row, group in zip(rows, found.groups.tolist(), strict=True):
        row.group, row.leaked = group, False
    parts = {name: table[table.split == name] for name in splits}
    duplicates = [{"split": name, **_counts(part, found, contained)} for name, part in parts.items()]
    if len(splits) > 1:
        duplicates.append({"split": "all splits", **_counts(table, found, contained)})
    overlaps, leaked = [], []
    for name, base in (("validation", "train"), ("test", "train"), ("test", "validation")):
        if name not in splits or base not in splits:
            continue
        copied, counts = _copies(parts[name], parts[base], found, contained)
        agree = sum(rows[i].label == rows[j].label for i, j in copied.items())
        overlaps.append({"rows of": name, "also in": base, "rows": len(splits[name]), **counts, "label agrees": agree})
        if base == "train":
            for i in copied:
                rows[i].leaked = True
            leaked += [_leak(rows, i, j, name) for i, j in copied.items() if name == "test" or "test" not in splits]
    leaked.sort(key=lambda leak: (leak["verbatim"], len(leak["text"])))
    return {
        "duplicates": duplicates,
        "overlaps": overlaps,
        "leaked_examples": leaked[:EXAMPLES],
        "conflict_examples": _conflicts(table)[:EXAMPLES],
    }


def _counts(part: Any, found: Duplicates, contained: bool) -> dict[str, int]:
    """What the rows `part` of the table of all rows have in common."""
    by_text, by_normal = (part.groupby(column).label.nunique() for column in ("text", "unique"))
    near, inside = (int(np.isin(pairs, part.unique).all(axis=1).sum()) for pairs in (found.near, found.contained))
    return {
        "rows": len(part),
        "distinct texts": len(by_text),
        "surplus verbatim copies": len(part) - len(by_text),
        "surplus copies after normalisation": len(part) - len(by_normal),
        "near-duplicate pairs": near,
        **({"pairs of which one contains the other": inside} if contained else {}),
        "duplicate clusters": part.group.nunique(),
        "texts with conflicting labels": int((by_text > 1).sum()),
        "texts with conflicting labels after normalisation": int((by_normal > 1).sum()),
    }


def _copies(part: Any, base: Any, found: Duplicates, contained: bool) -> tuple[dict[int, int], dict[str, int]]:
    """For each row of `part` that is a copy the row of `base` it copies, and how many are, from way to way."""
    import pandas as pd

    same_text, same = (dict(zip(base[column][::-1], base.index[::-1], strict=True)) for column in ("text", "unique"))
    ways = {"verbatim": part.text.map(same_text), "after normalisation": part["unique"].map(same)}
    pairs = {"or near-duplicate": found.near} | ({"or one contains the other": found.contained} if contained else {})
    for way, edges in pairs.items():
        both = pd.DataFrame(np.concatenate([edges, edges[:, ::-1]]), columns=["one", "other"])
        nearest = both.other.map(same).groupby(both.one).min()  # the first of the base's rows
        ways[way] = part["unique"].map(nearest)
    table = pd.DataFrame(ways, dtype=float)
    copied = table.bfill(axis=1)["verbatim"].dropna().astype(int).to_dict()
    return copied, table.ffill(axis=1).notna().sum().to_dict()


def _leak(rows: list[Row], i: int, j: int, split: str) -> dict:
    pair = {"split": split, "row": rows[i].index, "text": rows[i].text, "label": rows[i].label}
    twin = {"train row": rows[j].index, "train text": rows[j].text, "train label": rows[j].label}
    return {**pair, **twin, "verbatim": rows[i].text == rows[j].text}


def _conflicts(table: Any) -> list[dict]:
    """Normalised texts that bear more than one label."""
    conflicting = table[table.groupby("unique").label.transform("nunique") > 1]
    return [
        {
            "text": same.text.iloc[0],
            "rows by label": {str(label): int(count) for label, count in same.groupby("label").size().items()},
        }
        for _, same in conflicting.groupby("unique", sort=False)
    ]


# Dividing rows: by duplicate cluster for a split, by label for a subsample; equal seeds give equal rows.


def drop_copies(rows: Sequence[Row]) -> tuple[list[Row], Counter[str]]:
    """Rows without texts that bear two labels and without surplus copies (after normalisation; the first stays)."""
    import pandas as pd

    keys = pd.Series([normalise(row.whole) for row in rows], dtype=object)
    conflicting = pd.Series([row.label for row in rows]).groupby(keys).transform("nunique") > 1
    copies = keys.duplicated() & ~conflicting
    counts = Counter({"dropped: text with conflicting labels": int(conflicting.sum())})
    counts["dropped: copy of an earlier row"] = int(copies.sum())
    return [row for row, gone in zip(rows, conflicting | copies, strict=True) if not gone], +counts


def shares_of(test: float) -> dict[str, float]:
    """Shares of the splits with this one of test rows: a tenth for validation, the rest for training."""
    return {"train": 0.9 - test, "validation": 0.1, "test": test}


def split_by_cluster(rows: Sequence[Row], seed: int, shares: dict[str, float]) -> dict[str, list[Row]]:
    """Whole clusters to splits, each label near the wanted shares; rows keep their order.

    Clusters go, largest first and otherwise in seeded order, to the split that lacks most of the cluster's commonest
    label.

    Args:
        rows: with `group` set.
        shares: wanted share of each split.
    """
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


def split_fold(rows: Sequence[Row], seed: int, folds: int, fold: int) -> dict[str, list[Row]]:
    """The splits of a fold of cross-validation: every row is a test row of one of them; a tenth of the rest validates.

    Args:
        rows: as of `split_by_cluster`. fold: from 1 to `folds`.
    """
    parts = split_by_cluster(rows, seed, {str(number): 1 / folds for number in range(1, folds + 1)})
    test = parts[str(fold)]
    tested = {row.group for row in test}
    rest = [row for row in rows if row.group not in tested]
    return {**split_by_cluster(rest, seed, {"train": 0.9, "validation": 0.1}), "test": test}


def subsample(rows: list[Row], most: int, seed: int) -> list[Row]:
    """At most `most` rows (0 = all), the labels' shares kept as well as whole rows allow, in the given order.

    Every label keeps a row where there is room for one of each.
    """
    if not most or most >= len(rows):
        return rows
    rng = np.random.default_rng(seed)
    by_label: dict[int, list[int]] = {}
    for position, row in enumerate(rows):
        by_label.setdefault(row.label, []).append(position)
    wanted = {label: most * len(places) / len(rows) for label, places in by_label.items()}
    take = {label: max(int(most >= len(wanted)), int(share)) for label, share in wanted.items()}
    while sum(take.values()) > most:
        take[max(take, key=lambda label: take[label])] -= 1
    by_remainder = sorted(wanted, key=lambda label: (take[label] - wanted[label], label))
    for label in by_remainder[: most - sum(take.values())]:
        take[label] += 1
    chosen = [place for label in sorted(by_label) for place in rng.permutation(by_label[label])[: take[label]].tolist()]
    return [rows[place] for place in sorted(chosen)]
