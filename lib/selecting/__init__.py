"""Choosing among runs by a stated rule: what they share is compared, what the rows cannot tell is decided by cost."""

from __future__ import annotations

from lib.selecting.analysis import BEST_OF, FILE, Analysis, Best, best_of, outdated, read_analysis, select

__all__ = ["BEST_OF", "FILE", "Analysis", "Best", "best_of", "outdated", "read_analysis", "select"]
