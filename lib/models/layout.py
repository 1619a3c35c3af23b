"""How a chat template writes turns of certain roles: found with marks in place of the texts, known for no model."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lib.errors import InputError
from lib.models.prompting import end_of_turn_id
from lib.models.reasoning import think_tags, with_thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"

_MARK = re.compile("\ue000(\\d+)([ra])\ue001")
_EMPTY_BLOCK = re.compile(r"<think(ing)?>\s*</think(ing)?>\s*")


def apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], thinking: bool, prompt: bool) -> str:
    """The turns as the template writes them; with `prompt` ending as it asks for an answer."""
    return tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=prompt, enable_thinking=thinking
    )


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that closes a turn, as text."""
    return tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer))


def unfit(what: str) -> InputError:
    """The refusal of a template."""
    return InputError(
        f"the model's chat template {what}.",
        "a template that writes each turn as it is, closed by the end-of-turn token.",
        "choose another base_model (Qwen1.5, Qwen2.5 and Qwen3 fit).",
    )


def refusal(tokenizer: PreTrainedTokenizerBase, thinking: bool) -> InputError:
    """Why nothing of a conversation can be learned: no answer stands behind the prompt that asks for it."""
    if not thinking and _opens(tokenizer, True):  # Qwen3 Thinking-2507, QwQ
        return InputError(
            "thinking: false, and a base model that always thinks (its chat template opens <think> in every prompt).",
            "answers of the kind that the template asks for.",
            "set thinking: true for answers with reasoning, or take another base_model.",
        )
    return unfit("asks for an answer otherwise than it writes one")


def _opens(tokenizer: PreTrainedTokenizerBase, thinking: bool) -> bool:
    """Whether the template's own prompt opens the reasoning."""
    asks = apply(tokenizer, [{"role": USER, "content": "?"}], thinking, True)
    return asks.rstrip().endswith(think_tags(tokenizer)[0])


@dataclass(frozen=True)
class Layout:
    """How a template writes turns of certain roles; the texts do not matter.

    Attributes:
        frame: the rendering with marks in place of the texts.
        marks: (turn, "r" for reasoning or "a" for the rest, start, stop) of each mark in the frame, in order.
        starts: turn of an answer -> where in the frame it begins, as the model would have to write it.
        learned: the turns that the template writes behind the prompt by which it asks for them; with `thinking` only
            those with their reasoning, without it also those before the last one where only an empty block of that
            prompt is missing (Qwen3).
    """

    frame: str
    marks: tuple[tuple[int, str, int, int], ...]
    starts: dict[int, int]
    learned: frozenset[int]


@functools.lru_cache(maxsize=256)
def layout_of(
    tokenizer: PreTrainedTokenizerBase, template: str | None, kinds: tuple[tuple[str, bool], ...], thinking: bool
) -> Layout:
    """The layout of turns (role, has reasoning); `template` is only part of the key."""
    end, opening = end_of_turn(tokenizer), think_tags(tokenizer)[0]
    marked = []
    for i, (role, reasons) in enumerate(kinds):
        reasoning = f"\ue000{i}r\ue001" if reasons else ""
        marked.append({"role": role, "content": with_thinking(tokenizer, reasoning, f"\ue000{i}a\ue001")})
    frame = apply(tokenizer, marked, thinking, False)
    marks = [(int(m[1]), m[2], *m.span()) for m in _MARK.finditer(frame)]
    if [turn for turn, kind, *_ in marks if kind == "a"] != list(range(len(kinds))):
        raise unfit("leaves turns out, repeats them or changes their order")
    if marks[-1][0] == len(kinds) - 1 and kinds[-1][0] == ASSISTANT and not frame[marks[-1][3] :].startswith(end):
        frame = frame[: marks[-1][3]] + end + frame[marks[-1][3] :]
    opened = _opens(tokenizer, thinking)
    starts: dict[int, int] = {}
    learned, nearly = set(), set()
    for turn, kind, start, stop in marks:
        if kinds[turn][0] != ASSISTANT:
            continue
        if kind == "r":  # the opening tag is part of the answer, unless the template's own prompt ends with it
            starts[turn] = start if opened else frame.rindex(opening, 0, start)
            continue
        if not frame[stop:].startswith(end):
            raise unfit("does not close an answer")
        shown = turn in starts
        first = starts.setdefault(turn, start)
        asked = apply(tokenizer, marked[:turn], thinking, True)
        missing = asked[first:] if asked.startswith(frame[:first]) else "?"
        if not missing and (shown or not thinking):
            learned.add(turn)
        elif not thinking and _EMPTY_BLOCK.fullmatch(missing):
            nearly.add(turn)
    return Layout(frame, tuple(marks), starts, frozenset(learned | nearly if learned else learned))
