"""Chat templates and the reasoning inside answers: think tags, how a template writes turns, foreign templates tried.

How a template writes turns of certain roles is found by rendering it with marks in place of the texts, so that no
template has to be known here.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lib.errors import InputError, one_line, refusal
from lib.runs.child import limit_computing, run_child
from lib.runs.files import data_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


# The reasoning block of a generated answer: how far it got, and what stands behind it.

TAG = re.compile(r"<\s*(/?)\s*(think|thinking)\s*>", re.IGNORECASE)
"""A tag around reasoning; group 1 is "/" for a closing one, group 2 its name as written."""

FILLERS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
"""Characters of other categories that show nothing."""


def is_blank(text: str) -> bool:
    """True where there is nothing to see: white space, zero-width and other format characters, fillers."""
    return all(c.isspace() or c in FILLERS or unicodedata.category(c) in ("Cf", "Zl", "Zp") for c in text)


@dataclass(frozen=True)
class Block:
    """A reasoning block.

    Attributes:
        parts: whether the answer begins with an opening tag, the next tag closes it, there is text between the two,
            and behind it. Each implies the one before.
        complete: all of that, and no further tag.
        answer: what stands behind the block; nothing where the block was opened and not closed.
    """

    parts: list[bool]
    complete: bool
    answer: str


def read_block(text: str) -> Block:
    """Read the block that an answer begins with; without an opening tag the whole text is the answer."""
    tags = list(TAG.finditer(text))
    opened = bool(tags) and not tags[0][1] and is_blank(text[: tags[0].start()])
    closed = opened and len(tags) > 1 and bool(tags[1][1]) and tags[0][2].lower() == tags[1][2].lower()
    filled = closed and not is_blank(text[tags[0].end() : tags[1].start()])
    answer = (text[tags[1].end() :] if closed else "" if opened else text).strip()
    answered = filled and not is_blank(answer)
    return Block([opened, closed, filled, answered], answered and len(tags) == 2, answer)


# Reasoning in an answer: the tags around it, taking it apart, putting it together in the base model's own form.

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
    places = (content[: tags[0].start()], content[tags[0].end() : tags[1].start()], content[tags[1].end() :])
    before, reasoning, answer = map(str.strip, places)
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


RENAMED = "changed: tags that a turn asks for, named as the base model writes them"


def in_tags_of(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], changed: Counter[str]) -> list[Message]:
    """The turns with thinking in the form of the base model's own tags; answers that this changes are counted."""
    tags, made = think_tags(tokenizer), []
    thinking = "changed: thinking brought into the base model's form (tags, white space)"
    changed[thinking] += 0  # the first of the two in the table
    for message in messages:
        if message["role"] == ASSISTANT:
            content, what = with_thinking(tokenizer, *split_thinking(message["content"])), thinking
        else:  # a system turn that asks for <thinking> where answers have <think>
            content = TAG.sub(lambda found: tags["/" in found[0]], message["content"])
            what = RENAMED
        changed[what] += content != message["content"]
        made.append({**message, "content": content})
    return made


# How a chat template writes turns of certain roles: found with marks in place of the texts, known for no model.

_MARK = re.compile("\ue000(\\d+)([ra])\ue001")
_EMPTY_BLOCK = re.compile(r"<think(ing)?>\s*</think(ing)?>\s*")


def apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], thinking: bool, prompt: bool) -> str:
    """The turns as the template writes them; with `prompt` ending as it asks for an answer.

    Raises:
        InputError: the template fails on them.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt, enable_thinking=thinking
        )
    except (TemplateError, TypeError, AttributeError, KeyError, OverflowError) as error:
        raise unfit(f"fails on turns of system, user and assistant ({one_line(error)})") from None


END_OF_TURN = "<|im_end|>"


@functools.lru_cache(maxsize=8)  # asking a tokenizer of 151,936 tokens for its vocabulary takes 0.1 s
def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer: <|im_end|> where the vocabulary has it, else the end-of-text token."""
    vocabulary = tokenizer.get_vocab()
    return vocabulary.get(END_OF_TURN, tokenizer.eos_token_id)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that closes a turn, as text."""
    return tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer))


def up_to_last_question(messages: Sequence[Message]) -> list[Message]:
    """The turns up to the user's last one."""
    last = max(i for i, message in enumerate(messages) if message["role"] == USER)
    return list(messages[: last + 1])


def unfit(what: str) -> InputError:
    """The refusal of a template."""
    return refusal("prompts/unfit-template", what=what)


def unlearnable(tokenizer: PreTrainedTokenizerBase, thinking: bool) -> InputError:
    """Why nothing of a conversation can be learned: no answer stands behind the prompt that asks for it."""
    if not thinking and _opens(tokenizer, True):  # Qwen3 Thinking-2507, QwQ
        return refusal("prompts/always-thinks")
    return unfit("asks for an answer otherwise than it writes one")


def always_reasons(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template opens <think> also where no reasoning is asked for."""
    return _opens(tokenizer, False)


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


def _marked(tokenizer: PreTrainedTokenizerBase, kinds: Sequence[tuple[str, bool]]) -> list[Message]:
    """Turns (role, has reasoning) with marks in place of their texts, which `_MARK` finds again."""
    messages = []
    for i, (role, reasons) in enumerate(kinds):
        reasoning = f"\ue000{i}r\ue001" if reasons else ""
        messages.append({"role": role, "content": with_thinking(tokenizer, reasoning, f"\ue000{i}a\ue001")})
    return messages


@functools.lru_cache(maxsize=256)
def layout_of(
    tokenizer: PreTrainedTokenizerBase, template: str | None, kinds: tuple[tuple[str, bool], ...], thinking: bool
) -> Layout:
    """The layout of turns (role, has reasoning); `template` is only part of the key."""
    end, opening = end_of_turn(tokenizer), think_tags(tokenizer)[0]
    marked = _marked(tokenizer, kinds)
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


# A chat template taken apart: what stands before and behind the text of each turn, so that programs without Jinja
# (Ollama, the scripts of a package) write the very prompt that the model was trained on.

ROLES = (SYSTEM, USER, ASSISTANT)

_CONVERSATIONS: list[list[str]] = data_file("prompts/conversations.yaml")
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

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt for these turns."""
        turns = (self.opening[m["role"]] + m["content"] + self.closing[m["role"]] for m in messages)
        return self.begin + "".join(turns) + self.answer


def read_turns(tokenizer: PreTrainedTokenizerBase, thinking: bool) -> Turns:
    """Take the tokenizer's chat template apart, and check on further conversations that nothing was lost.

    Raises:
        InputError: a template that does not write turn behind turn.
    """
    marked = _marked(tokenizer, [(role, False) for role in (*ROLES, USER)])
    asking, closed = (apply(tokenizer, marked, thinking, prompt) for prompt in (True, False))
    first, *others = _MARK.split(asking)[::3]  # between the marks, of which split also gives both groups
    start, closing = str(tokenizer.bos_token or ""), closed.rpartition("\ue001")[2]
    begin, turns = start if first.startswith(start) else "", None
    if len(others) == len(marked):  # no mark is lost; whether it is so of all turns, the conversations show
        user, assistant, _, answer = (part.removeprefix(closing) for part in others)
        opening = {SYSTEM: first.removeprefix(begin), USER: user, ASSISTANT: assistant}
        turns = Turns(begin, opening, dict.fromkeys(ROLES, closing), answer)
    for texts in _CONVERSATIONS:
        roles = (SYSTEM, *((USER, ASSISTANT) * len(texts)))
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        if turns is None or turns.render(messages) != apply(tokenizer, messages, thinking, True):
            raise refusal("prompts/no-turns")
    return turns


# A chat template tried out: in a process of its own, with little memory and time, because it is foreign code.

SECONDS, BYTES, PATIENCE = 20, 1 << 30, 300.0
"""What the trial may take: computing time besides its imports, address space; wall time, where others compute, too."""
_QUESTION = [{"role": USER, "content": "QUESTION-7391"}]
_TURNS = [{"role": role, "content": f"{role}-7391"} for role in (SYSTEM, USER, ASSISTANT, USER)]


def describe_template(template: str) -> dict[str, Any]:
    """Hash and length of a template, what it does about system turns, and why it cannot be used, if so.

    Returns:
        {"sha256", "characters", "own_system_turn": whether it adds one (None: it cannot be used), "no_system_turn": why
        it can only be used without one, or None, "problem": why it cannot be used at all, or None}.
    """
    text, what = template.encode("utf-8", "surrogatepass"), "trying the chat template"
    found: dict[str, Any] = {"sha256": hashlib.sha256(text).hexdigest(), "characters": len(template)}
    found |= {"own_system_turn": None, "no_system_turn": None, "problem": None}
    argument = {"template": template, "seconds": SECONDS}
    try:
        tried = run_child("lib.prompts.templates:try_out", argument, what, PATIENCE, heard=lambda _: None)
    except InputError as error:
        tried = {"problem": f"the chat template cannot be rendered: {error.found}"}
    return found | {key: value for key, value in tried.items() if key in found}


def try_out(argument: dict[str, Any]) -> dict[str, Any]:
    """Render a question and a conversation as transformers does; runs in the child process."""
    import transformers.utils.chat_template_utils  # noqa: F401 (the limits are for the template)

    if os.name != "nt":  # there the parent's clock alone ends it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        limit_computing(argument["seconds"])
    template = argument["template"]
    text, problem = _render(template, _QUESTION)
    if problem:
        return {"problem": problem}
    found = {"own_system_turn": "system" in text.partition(_QUESTION[0]["content"])[0]}
    _, problem = _render(template, _TURNS)
    if problem and _render(template, _TURNS[1:])[1] is None:
        return {**found, "no_system_turn": problem}
    return {"problem": problem} if problem else found


def _render(template: str, turns: Sequence[Message]) -> tuple[str, str | None]:
    """The turns as a template writes them, and what is wrong with that, if anything."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    options = {"add_generation_prompt": True, "bos_token": "", "eos_token": ""}
    try:
        (text,), _ = render_jinja_template([list(turns)], chat_template=template, **options)
    except (TemplateError, MemoryError, RecursionError, SystemError, OverflowError, TypeError, ValueError) as error:
        return "", f"the chat template cannot be rendered: {one_line(error, 120) or type(error).__name__}"
    lost = [turn["role"] for turn in turns if turn["content"] not in text]
    return text, f"the chat template leaves the turn of the {lost[0]} out" if lost else None
