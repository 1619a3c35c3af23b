"""Pairs of texts that share most of their character 3-grams, found exactly, not by sampling.

Candidates come from prefix filtering (Chaudhuri 2006, Bayardo 2007): if the rarest grams of a text have nothing in
common with another one, their similarity cannot reach the threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lib.progress import Progress

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
