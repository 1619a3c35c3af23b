"""How many rows would decide about a file, if what was seen of it is the truth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lib.statistics import rows_for_inside


def rows_needed(entry: Mapping[str, Any], margin_points: float, one_sided: bool = False) -> int | None:
    """Rows with which the interval of the accuracy difference would lie inside the margin in 80 % of tests.

    The share of rows on which exactly one of the two is right (none seen is taken as one) and the difference are taken
    as the true ones, the design effect as that of the new rows too. The number is of the interval that is used, counted
    (`lib.statistics.rows_for_inside`), and never less than a row more than were tested.

    Args:
        entry: an undecided file's, of comparison.json.
        one_sided: ask only that it is not worse by more than the margin.

    Returns:
        None when the difference seen is as large as the margin: more rows would then not show it to be inside.
    """
    difference, n = entry["accuracy_difference"], entry["n"]
    if difference <= -margin_points / 100 or (difference >= margin_points / 100 and not one_sided):
        return None
    share = max(entry["mcnemar_b"] + entry["mcnemar_c"], 1) / n
    rows = rows_for_inside(max(share, abs(difference)), difference, margin_points / 100, one_sided)
    return max(math.ceil(rows * entry["design_effect"]), n + 1)


def rows_needed_losses(entry: Mapping[str, Any], limit_percent: float) -> int | None:
    """Rows without labels with which the interval of the perplexity ratio would reach no further than the limit.

    Its half-width on the log scale shrinks with the square root of the rows: n · (half-width / room)², room being what
    is left between the ratio that was seen and the limit. With that many rows it does so in one test of two.

    Args:
        entry: of comparison.json, with "loss_difference" and its interval.

    Returns:
        None when the ratio seen is as large as the limit, or there is no interval.
    """
    seen, high = entry["loss_difference"], entry["loss_difference_interval"][1]
    room = math.log1p(limit_percent / 100) - seen
    if high is None or room <= 0:
        return None
    return max(math.ceil(entry["n"] * ((high - seen) / room) ** 2), entry["n"] + 1)
