"""Reasoning in an answer: the tags around it, taking it apart, putting it together in the base model's own form."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

from lib.textmetrics.thinking import TAG, is_blank

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ESCAPED = re.compile(r"(?:&lt;|＜)\s*/?\s*think(?:ing)?\s*(?:&gt;|＞)", re.IGNORECASE)


@functools.lru_cache(maxsize=8)  # asking a tokenizer of 151,936 tokens for its vocabulary takes 0.1 s
def think_tags(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The tags around reasoning: those that the tokenizer has as single tokens, else <think>, </think> as text."""
    vocabulary = tokenizer.get_vocab()
    found = (name for name in ("think", "thinking") if f"<{name}>" in vocabulary and f"</{name}>" in vocabulary)
    name = next(found, "think")
    return f"<{name}>", f"</{name}>"


def split_thinking(content: str) -> tuple[str, str]:
    """Reasoning (empty where there is none) and answer of an assistant turn, both without outer white space.

    Tags may be in capitals and hold spaces. Characters that nobody sees do not fill a block or an answer.

    Raises:
        ValueError: tags that do not make one closed, filled block in front of an answer, or stand there escaped
            (&lt;think&gt;); the message says what is wrong.
    """
    tags = list(TAG.finditer(content))
    if (escaped := _ESCAPED.search(content)) and is_blank(content[: escaped.start()]):
        raise ValueError("thinking in escaped tags (&lt;think&gt;)")
    if not tags:
        return "", content.strip()
    if len(tags) == 1:
        raise ValueError("thinking not opened" if tags[0][1] else "thinking not closed")
    if len(tags) > 2 or tags[0][1] or not tags[1][1] or tags[0][2].lower() != tags[1][2].lower():
        raise ValueError("thinking nested, repeated or crossed")
    before, reasoning, answer = (
        content[: tags[0].start()].strip(),
        content[tags[0].end() : tags[1].start()].strip(),
        content[tags[1].end() :].strip(),
    )
    if not is_blank(before):
        raise ValueError("text before the thinking")
    if is_blank(reasoning):
        raise ValueError("empty thinking")
    if is_blank(answer):
        raise ValueError("no answer after the thinking")
    return reasoning, answer


def with_thinking(tokenizer: PreTrainedTokenizerBase, reasoning: str, answer: str) -> str:
    """An assistant turn in the form of the tokenizer's own tags."""
    opening, closing = think_tags(tokenizer)
    return f"{opening}\n{reasoning}\n{closing}\n\n{answer}" if reasoning else answer
