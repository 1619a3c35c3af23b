"""Which rows are copies of which, found exactly and not by sampling, and the division of rows by clusters of copies."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
_AT_ONCE = 1000


def near_pairs(texts: Sequence[str], threshold: float = THRESHOLD) -> np.ndarray:
    """(pairs, 2) indices i < j of distinct texts whose 3-gram sets have a Jaccard similarity of at least `threshold`.

    A text shorter than three characters is its own only gram.
    """

    def close(one: np.ndarray, two: np.ndarray, common: np.ndarray | None) -> np.ndarray:
        if common is None:
            return np.minimum(one, two) >= threshold * np.maximum(one, two) - 1e-9
        return common >= threshold * (one + two - common) - 1e-9

    return _pairs(texts, threshold, False, close, "near-duplicate audit")


def contained_pairs(texts: Sequence[str], threshold: float = CONTAINED) -> np.ndarray:
    """(pairs, 2) indices i < j of distinct texts of which the larger one holds the share `threshold` of the other.

    The smaller one has at least SHORTEST characters, and as many different grams as they can make.
    """
    fewest = SHORTEST - GRAM + 1

    def close(one: np.ndarray, two: np.ndarray, common: np.ndarray | None) -> np.ndarray:
        smaller = np.minimum(one, two)
        return smaller >= fewest if common is None else common >= threshold * smaller - 1e-9

    return _pairs(texts, threshold, True, close, "containment audit")


def _pairs(
    texts: Sequence[str],
    threshold: float,
    whole: bool,
    close: Callable[[np.ndarray, np.ndarray, np.ndarray | None], np.ndarray],
    what: str,
) -> np.ndarray:
    """Pairs of texts that are close.

    Args:
        whole: compare the rarest grams of a text with all grams of the other one, not with its rarest ones.
        close: from the sizes of the two sets, and from those and what they have in common, whether they are.
    """
    from scipy.sparse import csr_matrix

    if len(texts) < 2:
        return np.empty((0, 2), dtype=np.int64)
    indices, starts, width = _grams(texts)
    n, sizes = len(texts), np.diff(starts)
    row = np.repeat(np.arange(n), sizes)
    rare_first = np.lexsort((indices, np.bincount(indices)[indices], row))
    place = np.arange(len(indices)) - starts[:-1][row]
    prefix = sizes - np.ceil(threshold * sizes - 1e-9).astype(np.int64) + 1
    kept = place < prefix[row]
    ones = np.ones(len(indices), dtype=np.int32)
    prefixes = csr_matrix((ones[: kept.sum()], (row[kept], indices[rare_first[kept]])), shape=(n, width))
    grams = csr_matrix((ones, indices, starts), shape=(n, width))
    transposed, found = (grams if whole else prefixes).T.tocsr(), []
    with Progress(what, n) as progress:
        for start in range(0, n, _AT_ONCE):
            candidates = (prefixes[start : start + _AT_ONCE] @ transposed).tocoo()
            i, j = candidates.row + start, candidates.col
            ordered = (i < j) if not whole else (sizes[i] < sizes[j]) | ((sizes[i] == sizes[j]) & (i < j))
            fits = ordered & close(sizes[i], sizes[j], None)
            found.append(_verified(i[fits].astype(np.int64), j[fits].astype(np.int64), grams, sizes, close))
            progress.advance(min(_AT_ONCE, n - start))
    pairs = np.sort(np.concatenate(found), axis=1)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _verified(i: np.ndarray, j: np.ndarray, grams: Any, sizes: np.ndarray, close: Any) -> np.ndarray:
    """The candidate pairs that really are close."""
    similar = [np.empty((0, 2), dtype=np.int64)]
    for start in range(0, len(i), 20_000):
        a, b = i[start : start + 20_000], j[start : start + 20_000]
        common = np.asarray(grams[a].multiply(grams[b]).sum(axis=1)).ravel()
        fits = close(sizes[a], sizes[b], common)
        similar.append(np.stack([a[fits], b[fits]], axis=1))
    return np.concatenate(similar)


def _grams(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, int]:
    """Each text's set of gram numbers: concatenated, where each text starts, and how many grams there are."""
    vocabulary: dict[str, int] = {}
    indices: list[int] = []
    starts = [0]
    for text in texts:
        grams = dict.fromkeys(text[i : i + GRAM] for i in range(max(1, len(text) - GRAM + 1)))
        indices.extend(sorted(vocabulary.setdefault(gram, len(vocabulary)) for gram in grams))
        starts.append(len(indices))
    return np.array(indices, dtype=np.int64), np.array(starts, dtype=np.int64), len(vocabulary)


# Which rows are copies of which: verbatim, after normalisation, and nearly; within splits and across them.
#
# Two texts are near-duplicates when the Jaccard similarity of their sets of character 3-grams (after normalisation) is
# at least 0.8. Of openings a text also counts that another one contains (`lib.stages.data.near_duplicates`).

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
        keys: normalised text of each row, splits one behind the other.
        near: pairs (i, j), i < j, of indices into `unique` that are near-duplicates.
        contained: further such pairs, one of which contains the other; none where that was not asked for.
        unique: distinct normalised texts, in order of first appearance.
        groups: (rows,) number of each row's cluster: connected by equality, near-duplication or containment; numbered
            by first appearance.
        unique_of: (rows,) index into `unique`.
    """

    keys: list[str]
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
    keys = [normalise(text) for text in texts]
    number: dict[str, int] = {}
    unique_of = np.array([number.setdefault(key, len(number)) for key in keys], dtype=np.int64)
    unique = list(number)
    near = near_pairs(unique)
    inside = _without(contained_pairs(unique), near) if contained else np.empty((0, 2), dtype=np.int64)
    component = _components(np.concatenate([near, inside]), len(unique))
    groups = np.array(_by_appearance(component[unique_of]), dtype=np.int64)
    return Duplicates(keys, unique, near, inside, unique_of, groups)


def joined(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """Number of each row's group when rows that are alike in either of two groupings belong together."""
    one = np.array(first, dtype=np.int64)
    two = np.array(second, dtype=np.int64) + max(first, default=0) + 1
    component = _components(np.stack([one, two], axis=1), int(two.max(initial=-1)) + 1)
    return _by_appearance(component[one])


def _components(pairs: np.ndarray, count: int) -> np.ndarray:
    """(count,) number of the connected component of each node of a graph with edges `pairs`."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    edges = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return connected_components(edges, directed=False)[1]


def _by_appearance(numbers: np.ndarray) -> list[int]:
    """The same numbers, counted from 0 in the order of their first appearance."""
    first: dict[int, int] = {}
    return [first.setdefault(number, len(first)) for number in numbers.tolist()]


def _without(pairs: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The pairs that are not among the known ones."""
    seen = set(map(tuple, known.tolist()))
    return np.array([pair for pair in pairs.tolist() if tuple(pair) not in seen], dtype=np.int64).reshape(-1, 2)


@dataclass(frozen=True)
class Audit:
    """What the comparison says about the splits; lists of plain dicts, ready to be a table.

    Attributes:
        within: per split: rows, distinct texts, surplus copies, copies after normalisation, near pairs, conflicts.
        across: per pair of splits: rows of the one that are verbatim, normalised or near copies of the other.
        leaked_examples, conflict_examples: as text.
        total: the same counts over all rows.
    """

    within: list[dict]
    across: list[dict]
    leaked_examples: list[dict]
    conflict_examples: list[dict]
    total: dict

    @property
    def with_total(self) -> list[dict]:
        """`within`, and where there are several splits a line of all of them."""
        return [*self.within, *([{"split": "all splits", **self.total}] if len(self.within) > 1 else [])]


def audit(splits: Mapping[str, list[Row]], examples: int = 6, contained: bool = False) -> Audit:
    """Compare all rows, set each row's `group` and `leaked`, and count.

    `leaked`: a validation or test row that is a verbatim, normalised or near copy of a train row.

    Args:
        contained: whether a text that another one contains counts as its copy (in columns of its own).
    """
    rows = [row for split in splits.values() for row in split]
    duplicates = find_duplicates([row.text for row in rows], contained)
    for row, group in zip(rows, duplicates.groups.tolist(), strict=True):
        row.group, row.leaked = group, False
    ends = np.cumsum([len(split) for split in splits.values()])
    place = {name: np.arange(end - len(splits[name]), end) for name, end in zip(splits, ends, strict=True)}
    near, inside = _neighbours(duplicates.near), _neighbours(duplicates.contained) if contained else None
    across, leaked = [], []
    for name, base in (("validation", "train"), ("test", "train"), ("test", "validation")):
        if name in splits and base in splits:
            counts, pairs = _overlap(rows, duplicates, place[name], place[base], near, inside)
            across.append({"rows of": name, "also in": base, "rows": len(splits[name]), **counts})
            if base == "train":
                for i in pairs:
                    rows[i].leaked = True
                leaked += [_leak(rows, i, j, name) for i, j in pairs.items() if name == "test" or "test" not in splits]
    whole = np.arange(len(rows))
    within = [{"split": name, **_counts(rows, duplicates, place[name], contained)} for name in splits]
    total = _counts(rows, duplicates, whole, contained)
    shown = sorted(leaked, key=lambda leak: (leak["verbatim"], len(leak["text"])))[:examples]
    conflicts = _conflicts(rows, duplicates, whole)
    return Audit(within, across, shown, conflicts[:examples], total)


def _neighbours(pairs: np.ndarray) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for a, b in pairs.tolist():
        found.setdefault(a, set()).add(b)
        found.setdefault(b, set()).add(a)
    return found


def _counts(rows: list[Row], duplicates: Duplicates, place: np.ndarray, contained: bool) -> dict[str, int]:
    texts = [rows[i].text for i in place]
    present = np.zeros(len(duplicates.unique), dtype=bool)
    present[duplicates.unique_of[place]] = True
    labels: dict[str, set[int]] = {}
    for i in place:
        labels.setdefault(rows[i].text, set()).add(rows[i].label)
    near, inside = (
        int(np.sum(present[pairs[:, 0]] & present[pairs[:, 1]])) for pairs in (duplicates.near, duplicates.contained)
    )
    return {
        "rows": len(place),
        "distinct texts": len(labels),
        "surplus verbatim copies": len(texts) - len(labels),
        "surplus copies after normalisation": len(texts) - int(present.sum()),
        "near-duplicate pairs": near,
        **({"pairs of which one contains the other": inside} if contained else {}),
        "duplicate clusters": len(np.unique(duplicates.groups[place])),
        "texts with conflicting labels": sum(len(found) > 1 for found in labels.values()),
        "texts with conflicting labels after normalisation": len(_conflicts(rows, duplicates, place)),
    }


def _overlap(
    rows: list[Row],
    duplicates: Duplicates,
    place: np.ndarray,
    base: np.ndarray,
    near: dict[int, set[int]],
    inside: dict[int, set[int]] | None,
) -> tuple[dict[str, int], dict[int, int]]:
    """Counts of copies of `base` rows in `place`, and for each such row the base row it copies.

    Args:
        near, inside: neighbours of each distinct text; `inside` is None where containment does not count.
    """
    first_verbatim: dict[str, int] = {}
    first_normal: dict[int, int] = {}
    for j in base.tolist():
        first_verbatim.setdefault(rows[j].text, j)
        first_normal.setdefault(int(duplicates.unique_of[j]), j)
    verbatim = normal = within = 0
    pairs: dict[int, int] = {}
    for i in place.tolist():
        u = int(duplicates.unique_of[i])
        close = sorted(first_normal[v] for v in near.get(u, ()) if v in first_normal)
        whole = sorted(first_normal[v] for v in (inside or {}).get(u, ()) if v in first_normal)
        if rows[i].text in first_verbatim:
            verbatim += 1
            pairs[i] = first_verbatim[rows[i].text]
        elif u in first_normal:
            pairs[i] = first_normal[u]
        elif close:
            pairs[i] = close[0]
        elif whole:
            pairs[i], within = whole[0], within + 1
        normal += u in first_normal
    agree = sum(rows[i].label == rows[j].label for i, j in pairs.items())
    counts = {"verbatim": verbatim, "after normalisation": normal, "or near-duplicate": len(pairs) - within}
    counts |= {} if inside is None else {"or one contains the other": len(pairs)}
    return {**counts, "label agrees": agree}, pairs


def _leak(rows: list[Row], i: int, j: int, split: str) -> dict:
    pair = {"split": split, "row": rows[i].index, "text": rows[i].text, "label": rows[i].label}
    twin = {"train row": rows[j].index, "train text": rows[j].text, "train label": rows[j].label}
    return {**pair, **twin, "verbatim": rows[i].text == rows[j].text}


def _conflicts(rows: list[Row], duplicates: Duplicates, place: np.ndarray) -> list[dict]:
    """Normalised texts that bear more than one label."""
    seen: dict[int, dict[int, int]] = {}
    text: dict[int, str] = {}
    for i in place.tolist():
        u = int(duplicates.unique_of[i])
        text.setdefault(u, rows[i].text)
        counts = seen.setdefault(u, {})
        counts[rows[i].label] = counts.get(rows[i].label, 0) + 1
    return [
        {"text": text[u], "rows by label": {str(k): v for k, v in sorted(counts.items())}}
        for u, counts in seen.items()
        if len(counts) > 1
    ]


# Dividing rows: by duplicate cluster for a split, by label for a subsample; equal seeds give equal rows.

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


def drop_copies(rows: Sequence[Row]) -> tuple[list[Row], Counter[str]]:
    """Rows without texts that bear two labels and without surplus copies (after normalisation; the first stays)."""
    keys = [normalise(row.whole) for row in rows]
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
