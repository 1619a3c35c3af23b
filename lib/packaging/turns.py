"""A chat template taken apart: what stands before and behind the text of each turn.

So that programs without Jinja (Ollama, the package's own scripts) write the very prompt that the model was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lib.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")

_MARKS = tuple(f"\ue000{i}\ue001" for i in range(4))
_CHECKS = (
    ("你是助手。", "好吗？"),
    ("Line one\nline two {{ .Content }}", "测试 test 123 😀", "好的。", "还有\n\n吗？"),
    ("a", "b", "c", "d", "e", 'say "yes" or <b>no</b>'),
)
"""Texts of conversations (system, user, assistant, user, …) on which both ways of writing must agree."""


@dataclass(frozen=True)
class Turns:
    """A chat template that writes turn behind turn.

    Attributes:
        begin: what stands before the first turn (mostly nothing).
        opening, closing: by role.
        answer: what asks for the answer, behind the last turn.
    """

    begin: str
    opening: dict[str, str]
    closing: dict[str, str]
    answer: str

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for {"role", "content"} messages."""
        turns = (self.opening[m["role"]] + m["content"] + self.closing[m["role"]] for m in messages)
        return self.begin + "".join(turns) + self.answer

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def _messages(texts: Sequence[str]) -> list[dict[str, str]]:
    roles = ("system", *(("user", "assistant") * len(texts)))
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def read_turns(tokenizer: PreTrainedTokenizerBase, thinking: bool) -> Turns:
    """Take the tokenizer's chat template apart, and check on further conversations that nothing was lost.

    Raises:
        InputError: a template that does not write turn behind turn.
    """

    def apply(texts: Sequence[str], prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            _messages(texts), tokenize=False, add_generation_prompt=prompt, enable_thinking=thinking
        )

    turns = _split(apply(_MARKS, True), apply(_MARKS, False), str(tokenizer.bos_token or ""))
    if turns is None or any(turns.render(_messages(texts)) != apply(texts, True) for texts in _CHECKS):
        raise InputError(
            "the model's chat template does not write one turn behind the other.",
            "a template whose turns can be written one by one (Qwen1.5, Qwen2.5, Qwen3, Llama).",
            "use the GGUF file by itself: workbook serve FILE.gguf renders its own template.",
        )
    return turns


def _split(asking: str, closed: str, begin_token: str) -> Turns | None:
    """The pieces around the marks; None where they are missing, repeated or in another order."""
    parts, rest = [], asking
    for mark in _MARKS:
        before, found, rest = rest.partition(mark)
        if not found:
            return None
        parts.append(before)
    closing = closed.rpartition(_MARKS[-1])[2]
    if not rest.startswith(closing) or any(not part.startswith(closing) for part in parts[1:]):
        return None
    first, *others = parts
    begin = begin_token if begin_token and first.startswith(begin_token) else ""
    opening = {"system": first[len(begin) :], "user": others[0][len(closing) :], "assistant": others[1][len(closing) :]}
    if others[2][len(closing) :] != opening["user"]:
        return None
    return Turns(begin, opening, dict.fromkeys(ROLES, closing), rest[len(closing) :])
