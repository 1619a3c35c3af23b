"""What is known of the licences of base model and data, and what is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BASES = {
    "Qwen/Qwen2.5-0.5B": "apache-2.0",
    "Qwen/Qwen2.5-0.5B-Instruct": "apache-2.0",
    "Qwen/Qwen3-0.6B": "apache-2.0",
    "X-D-Lab/MindChat-Qwen2-0_5B": "gpl-3.0",
}
"""Hub ids whose licence the parameter files and the README of this project name."""

_OWN = "MIT (the quantization workbook's own)"


def licences(data: Mapping[str, Any], base: str, is_offline: bool, has_text: bool) -> dict[str, str]:
    """The licences of "base" and "data" in words, and "id" for the front matter (an SPDX-like id, or "unknown").

    Args:
        data: facts of the product `data`.
        base: id of the base model.
        has_text: the base brought a file LICENSE, which is in the package.
    """
    plain = base.removeprefix("modelscope:").partition("@")[0]
    sample = bool(data.get("sample_data"))
    if is_offline and sample:
        identifier, model = "mit", _OWN
    elif is_offline:
        identifier, model = "unknown", "made by the workbook from the texts of the data, whose licence applies"
    elif plain in BASES:
        identifier, model = BASES[plain], f"{BASES[plain]}, as the model card of {plain} says; read it"
    elif licence := (data.get("unpacked") or {}).get("license"):
        identifier, model = str(licence), f"{licence}, as the GGUF file of the base model says"
    else:
        identifier, model = "unknown", "see the file LICENSE, which the base model brought"
        model = model if has_text else "unknown to the workbook: read the base model's card before you pass the file on"
    rows = _OWN if sample else "unknown to the workbook: ask where the rows come from"
    return {"id": identifier, "base": model, "data": rows}
