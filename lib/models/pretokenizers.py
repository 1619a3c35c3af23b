"""How byte-level BPE tokenizers cut a text before merging, by the names that GGUF has for it.

The oracle is llama.cpp (`src/llama-vocab.cpp`): its expressions, in the words of the tokenizers library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

PLAIN_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


@dataclass(frozen=True)
class Rules:
    """How a tokenizer works before and beside its merges, in the layout of tokenizer.json.

    Attributes:
        normalizer: None = the text stays as it is.
        steps: of the pre-tokenizer, one after the other.
        ignore_merges: a piece that is a token of its own is not taken apart.
        starts: whether a start token is put before every text when the file does not say it.
    """

    normalizer: dict[str, Any] | None
    steps: tuple[dict[str, Any], ...]
    ignore_merges: bool = False
    starts: bool = False


def _by_pattern(pattern: str) -> tuple[dict[str, Any], ...]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return split, PLAIN_BYTES


_SINGLE_DIGITS = (
    {"type": "Digits", "individual_digits": True},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
)
"""Each digit alone, then GPT-2's expression, which ByteLevel holds."""

RULES = {
    "qwen2": Rules({"type": "NFC"}, _by_pattern(QWEN2_PATTERN)),
    "deepseek-r1-qwen": Rules({"type": "NFC"}, _by_pattern(QWEN2_PATTERN)),
    "llama-bpe": Rules(None, _by_pattern(LLAMA3_PATTERN), ignore_merges=True, starts=True),
    "smollm": Rules(None, _SINGLE_DIGITS),
}
"""Name of the pre-tokenizer in GGUF → rules. Qwen2's bring a text into NFC first, which llama.cpp leaves out."""
