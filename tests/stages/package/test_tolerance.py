"""test_model.py of a package: what other kernels change passes, what a wrong model changes does not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lib.stages.package.documents import TOLERANCE, TOLERANCE_SHARE

INFO: dict[str, Any] = {
    "tolerance": TOLERANCE,
    "tolerance_share": TOLERANCE_SHARE,
    "labels": [{"name": "negative", "ids": [1]}, {"name": "positive", "ids": [2]}],
}
CHECK = {"prompt_ids": [7], "ids": [1], "log_probs": [-0.1], "labels": [-0.1, -5.0]}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    from lib.stages.package import stage

    path = Path(stage.__file__).parent / "scripts" / "test_model.py"
    spec = importlib.util.spec_from_file_location("packaged_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Model:
    """Answers with these log-probabilities of the two labels."""

    def __init__(self, negative: float, positive: float) -> None:
        self.values = {1: negative, 2: positive}

    def follow(self, prompt: list[int], ids: list[int]) -> list[tuple[int, float, float]]:
        best = max(self.values, key=self.values.get)
        return [(best, self.values[best], self.values[token]) for token in ids]


@pytest.mark.parametrize(
    ("negative", "positive", "passes"),
    [
        (-0.1, -5.33, True),  # as other kernels move an unlikely label in Q4_0
        (-0.1, -5.65, True),
        (-0.1, -5.75, False),  # 0.2 + 0.1 · 4.9
        (-5.0, -0.1, False),  # another label
    ],
)
def test_labels(script: ModuleType, negative: float, positive: float, passes: bool) -> None:
    wrong, _ = script.compare_labels(Model(negative, positive), CHECK, INFO)
    assert (wrong == []) is passes


@pytest.mark.parametrize(("own", "passes"), [(-0.1, True), (-0.3, True), (-0.32, False)])
def test_likely_tokens_stay_strict(script: ModuleType, own: float, passes: bool) -> None:
    """0.2 nats and a tenth of 0.1."""
    assert (script.compare_answer(Model(own, -5.0), CHECK, INFO) == []) is passes
