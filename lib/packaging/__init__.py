"""Stage 08: the chosen file with card, guide, examples and a test of its own, as a folder and a zip."""

from __future__ import annotations

from lib.packaging.stage import PackageResult, package

__all__ = ["PackageResult", "package"]
