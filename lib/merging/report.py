"""What a merge did, and how much memory of its own it took."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lib.merging.adapter import RULES


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        dtype: of the weights written ("bfloat16"; "mixed" when the base has several).
        tensors_changed, tensors_copied: numbers of weights of the base.
        parameters, parameters_changed: numbers of weights in them.
        bytes_base, bytes_adapter, bytes_merged: of the tensors.
        scalings: distinct factors of B·A, with the number of modules that have them.
        peak_anonymous_mib: growth of this process's own memory (without mapped files); None where it is unknown.
        rules: what was checked; a violation would have refused the merge.
    """

    base: str
    adapter: str
    output: str
    dtype: str
    tensors_changed: int
    tensors_copied: int
    parameters: int
    parameters_changed: int
    bytes_base: int
    bytes_adapter: int
    bytes_merged: int
    scalings: dict[str, int]
    peak_anonymous_mib: float | None
    seconds: float
    rules: tuple[str, ...] = field(default=RULES)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "rules": list(self.rules)}


class AnonymousMemory:
    """Largest growth of this process's anonymous memory, looked at after every tensor (Linux)."""

    def __init__(self) -> None:
        self.start = self._now()
        self.peak = self.start

    @staticmethod
    def _now() -> int | None:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:")), None)

    def look(self) -> None:
        if self.peak is not None:
            self.peak = max(self.peak, self._now() or 0)

    @property
    def mib(self) -> float | None:
        return None if self.peak is None or self.start is None else round((self.peak - self.start) / 2**20, 1)
