"""Which rows are copies of which: verbatim, after normalisation, and nearly; within splits and across them.

Near-duplicates are found exactly, not by sampling: two texts are near-duplicates when the Jaccard similarity of their
sets of character 3-grams (after normalisation) is at least 0.8. Candidates come from prefix filtering (Chaudhuri 2006,
Bayardo 2007): if the rarest grams of two texts have nothing in common, the similarity cannot reach the threshold.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lib.data.cleaning import Row
from lib.progress import Progress

THRESHOLD = 0.8
GRAM = 3
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
        unique: distinct normalised texts, in order of first appearance.
        groups: (rows,) number of each row's cluster: connected by equality or near-duplication; numbered by first
            appearance.
        unique_of: (rows,) index into `unique`.
    """

    keys: list[str]
    unique: list[str]
    near: np.ndarray
    unique_of: np.ndarray
    groups: np.ndarray


def find_duplicates(texts: Sequence[str]) -> Duplicates:
    """Compare all texts with one another. Exact and deterministic; memory grows with the number of grams."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    keys = [normalise(text) for text in texts]
    number: dict[str, int] = {}
    unique_of = np.array([number.setdefault(key, len(number)) for key in keys], dtype=np.int64)
    unique = list(number)
    near = near_pairs(unique)
    edges = coo_matrix((np.ones(len(near)), (near[:, 0], near[:, 1])), shape=(len(unique), len(unique)))
    component = connected_components(edges, directed=False)[1]
    first: dict[int, int] = {}
    groups = np.array([first.setdefault(int(component[u]), len(first)) for u in unique_of], dtype=np.int64)
    return Duplicates(keys, unique, near, unique_of, groups)


def near_pairs(texts: Sequence[str], threshold: float = THRESHOLD) -> np.ndarray:
    """(pairs, 2) indices i < j of distinct texts whose 3-gram sets have a Jaccard similarity of at least `threshold`.

    A text shorter than three characters is its own only gram.
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
    prefixes = csr_matrix(
        (np.ones(kept.sum(), dtype=np.int32), (row[kept], indices[rare_first[kept]])), shape=(n, width)
    )
    grams = csr_matrix((np.ones(len(indices), dtype=np.int32), indices, starts), shape=(n, width))
    transposed, found, step = prefixes.T.tocsr(), [], 1000
    with Progress("near-duplicate audit", n) as progress:
        for start in range(0, n, step):
            candidates = (prefixes[start : start + step] @ transposed).tocoo()
            found.append(_verified(candidates.row + start, candidates.col, grams, sizes, threshold))
            progress.advance(min(step, n - start))
    pairs = np.concatenate(found)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _verified(i: np.ndarray, j: np.ndarray, grams, sizes: np.ndarray, threshold: float) -> np.ndarray:
    """The candidate pairs i < j that really are similar enough."""
    fits = (i < j) & (np.minimum(sizes[i], sizes[j]) >= threshold * np.maximum(sizes[i], sizes[j]) - 1e-9)
    i, j = i[fits].astype(np.int64), j[fits].astype(np.int64)
    similar = [np.empty((0, 2), dtype=np.int64)]
    for start in range(0, len(i), 20_000):
        a, b = i[start : start + 20_000], j[start : start + 20_000]
        common = np.asarray(grams[a].multiply(grams[b]).sum(axis=1)).ravel()
        close = common >= threshold * (sizes[a] + sizes[b] - common) - 1e-9
        similar.append(np.stack([a[close], b[close]], axis=1))
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


def audit(splits: Mapping[str, list[Row]], examples: int = 6) -> Audit:
    """Compare all rows, set each row's `group` and `leaked`, and count.

    `leaked`: a validation or test row that is a verbatim, normalised or near copy of a train row.
    """
    rows = [row for split in splits.values() for row in split]
    duplicates = find_duplicates([row.text for row in rows])
    for row, group in zip(rows, duplicates.groups.tolist(), strict=True):
        row.group, row.leaked = group, False
    ends = np.cumsum([len(split) for split in splits.values()])
    place = {name: np.arange(end - len(splits[name]), end) for name, end in zip(splits, ends, strict=True)}
    neighbours: dict[int, set[int]] = {}
    for a, b in duplicates.near.tolist():
        neighbours.setdefault(a, set()).add(b)
        neighbours.setdefault(b, set()).add(a)
    across, leaked = [], []
    for name, base in (("validation", "train"), ("test", "train"), ("test", "validation")):
        if name in splits and base in splits:
            counts, pairs = _overlap(rows, duplicates, place[name], place[base], neighbours)
            across.append({"rows of": name, "also in": base, "rows": len(splits[name]), **counts})
            if base == "train":
                for i in pairs:
                    rows[i].leaked = True
                leaked += [_leak(rows, i, j, name) for i, j in pairs.items() if name == "test" or "test" not in splits]
    within = [{"split": name, **_counts(rows, duplicates, place[name])} for name in splits]
    whole = np.arange(len(rows))
    shown = sorted(leaked, key=lambda leak: (leak["verbatim"], len(leak["text"])))[:examples]
    conflicts = _conflicts(rows, duplicates, whole)
    return Audit(within, across, shown, conflicts[:examples], _counts(rows, duplicates, whole))


def _counts(rows: list[Row], duplicates: Duplicates, place: np.ndarray) -> dict[str, int]:
    texts = [rows[i].text for i in place]
    present = np.zeros(len(duplicates.unique), dtype=bool)
    present[duplicates.unique_of[place]] = True
    labels: dict[str, set[int]] = {}
    for i in place:
        labels.setdefault(rows[i].text, set()).add(rows[i].label)
    near = duplicates.near
    return {
        "rows": len(place),
        "distinct texts": len(labels),
        "surplus verbatim copies": len(texts) - len(labels),
        "surplus copies after normalisation": len(texts) - int(present.sum()),
        "near-duplicate pairs": int(np.sum(present[near[:, 0]] & present[near[:, 1]])),
        "duplicate clusters": len(np.unique(duplicates.groups[place])),
        "texts with conflicting labels": sum(len(found) > 1 for found in labels.values()),
        "texts with conflicting labels after normalisation": len(_conflicts(rows, duplicates, place)),
    }


def _overlap(
    rows: list[Row], duplicates: Duplicates, place: np.ndarray, base: np.ndarray, neighbours: dict[int, set[int]]
) -> tuple[dict[str, int], dict[int, int]]:
    """Counts of copies of `base` rows in `place`, and for each such row the base row it copies."""
    first_verbatim: dict[str, int] = {}
    first_normal: dict[int, int] = {}
    for j in base.tolist():
        first_verbatim.setdefault(rows[j].text, j)
        first_normal.setdefault(int(duplicates.unique_of[j]), j)
    verbatim = normal = 0
    pairs: dict[int, int] = {}
    for i in place.tolist():
        u = int(duplicates.unique_of[i])
        close = sorted(first_normal[v] for v in neighbours.get(u, ()) if v in first_normal)
        if rows[i].text in first_verbatim:
            verbatim += 1
            pairs[i] = first_verbatim[rows[i].text]
        elif u in first_normal:
            pairs[i] = first_normal[u]
        elif close:
            pairs[i] = close[0]
        normal += u in first_normal
    agree = sum(rows[i].label == rows[j].label for i, j in pairs.items())
    counts = {"verbatim": verbatim, "after normalisation": normal, "or near-duplicate": len(pairs)}
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
