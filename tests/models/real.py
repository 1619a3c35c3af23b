"""The really trained model that `make smollm2` puts into .cache/smollm2; it is not part of the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

SMOLLM2 = Path(__file__).resolve().parents[2] / ".cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

needs_smollm2 = pytest.mark.skipif(not SMOLLM2.is_file(), reason=f"no .cache/smollm2/{SMOLLM2.name} (make smollm2)")
