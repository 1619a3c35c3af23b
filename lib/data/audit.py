"""Which rows are copies of which: verbatim, after normalisation, and nearly; within splits and across them.

Two texts are near-duplicates when the Jaccard similarity of their sets of character 3-grams (after normalisation) is at
least 0.8. Of openings a text also counts that another one contains (`lib.data.grams`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lib.data.cleaning import Row
from lib.data.grams import contained_pairs, near_pairs

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
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    keys = [normalise(text) for text in texts]
    number: dict[str, int] = {}
    unique_of = np.array([number.setdefault(key, len(number)) for key in keys], dtype=np.int64)
    unique = list(number)
    near = near_pairs(unique)
    inside = _without(contained_pairs(unique), near) if contained else np.empty((0, 2), dtype=np.int64)
    pairs = np.concatenate([near, inside])
    edges = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(unique), len(unique)))
    component = connected_components(edges, directed=False)[1]
    first: dict[int, int] = {}
    groups = np.array([first.setdefault(int(component[u]), len(first)) for u in unique_of], dtype=np.int64)
    return Duplicates(keys, unique, near, inside, unique_of, groups)


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
