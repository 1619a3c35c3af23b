"""From a row to token ids: the one place where a prompt is made, for training, scoring and every backend.

The text is rendered by the tokenizer's own chat template with an explicit system turn and thinking switched off,
tokenized once, and only token ids are passed on: llama.cpp does not apply NFC as the Hugging Face tokenizer does, so
text must never be tokenized a second time.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lib.errors import InputError
from lib.runs.files import sha256_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


END_OF_TURN = "<|im_end|>"


@dataclass(frozen=True)
class Task:
    """What the model is asked: two turns, the answer words, and the most tokens a row may have."""

    label_names: tuple[str, ...]
    system_prompt: str
    user_prompt: str
    max_seq_length: int

    def messages(self, text: str) -> list[dict[str, str]]:
        """System and user turn for one text."""
        return [
            {"role": "system", "content": self.system_prompt},
            {"role": "user", "content": self.user_prompt.replace("{text}", text)},
        ]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "label_names": list(self.label_names)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Task:
        """The reverse of `to_json`."""
        return cls(**{**value, "label_names": tuple(value["label_names"])})


@dataclass(frozen=True)
class Encoded:
    """Token ids of one row.

    Attributes:
        prompt_ids: everything up to the point where the answer starts.
        answer_ids: the answer word and the end-of-turn token; empty when no label was given.
        truncated: True when the end of the text had to be cut to respect `max_seq_length`.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    truncated: bool


def escape(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text with a space inside every special token: a review must not be able to close its own turn."""
    for token in tokenizer.all_special_tokens:
        if token in text:
            text = text.replace(token, token[:1] + " " + token[1:])
    return text


def render(tokenizer: PreTrainedTokenizerBase, task: Task, text: str) -> str:
    """The prompt as a string, ending where the answer starts."""
    return tokenizer.apply_chat_template(
        task.messages(escape(tokenizer, text)), tokenize=False, add_generation_prompt=True, enable_thinking=False
    )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@functools.lru_cache(maxsize=8)  # asking a tokenizer of 151,936 tokens for its vocabulary takes 0.1 s
def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer: <|im_end|> where the vocabulary has it, else the end-of-text token."""
    vocabulary = tokenizer.get_vocab()
    return vocabulary.get(END_OF_TURN, tokenizer.eos_token_id)


@functools.lru_cache(maxsize=8)
def label_ids(tokenizer: PreTrainedTokenizerBase, task: Task) -> list[list[int]]:
    """Token ids of each answer word, as they follow the prompt (no leading space); do not change the lists.

    Raises:
        InputError: a word with white space around it; or one answer's ids begin with another's, so their probabilities
            could not be compared.
    """
    if spaced := [name for name in task.label_names if name != name.strip()]:
        raise InputError(
            f"label_names holds {spaced[0]!r}.",
            "words without leading or trailing white space: the answer follows the prompt directly.",
            f"write {spaced[0].strip()!r}.",
        )
    answers = [_ids(tokenizer, name) for name in task.label_names]
    for i, first in enumerate(answers):
        for j, second in enumerate(answers):
            if i != j and second[: len(first)] == first:
                raise InputError(
                    f"label_names {task.label_names[i]!r} and {task.label_names[j]!r} begin with the same tokens.",
                    "answer words of which none starts another.",
                    "choose other label_names, e.g. 负面 and 正面.",
                )
    return answers


def label_note(tokenizer: PreTrainedTokenizerBase, task: Task) -> str:
    """What must be said of answer words that are not one token each; empty where they are."""
    counts = [len(ids) for ids in label_ids(tokenizer, task)]
    if max(counts) == 1:
        return ""
    words = ", ".join(f"{name} {count}" for name, count in zip(task.label_names, counts, strict=True))
    note = f"tokens of the answer words: {words}; each score is the exact sum of log-probabilities over them"
    return note if len(set(counts)) == 1 else f"{note}, so a longer word has more to lose"


def encode(tokenizer: PreTrainedTokenizerBase, task: Task, text: str, label: int | None = None) -> Encoded:
    """Token ids of one row, the text cut from its end where prompt and longest answer exceed `max_seq_length`."""
    answers = label_ids(tokenizer, task)
    room = task.max_seq_length - max(len(ids) for ids in answers) - 1
    answer = [] if label is None else [*answers[label], end_of_turn_id(tokenizer)]
    prompt = _ids(tokenizer, render(tokenizer, task, text))
    if len(prompt) <= room:
        return Encoded(prompt, answer, False)
    frame = len(_ids(tokenizer, render(tokenizer, task, "")))
    if frame >= room:
        raise InputError(
            f"max_seq_length {task.max_seq_length}; the prompt alone takes {frame} tokens.",
            f"at least {frame + task.max_seq_length - room + 16}.",
            "raise max_seq_length or shorten system_prompt and user_prompt.",
        )
    # What is cut is the escaped text: the prompt holds its tokens, and no prefix of it is a special token.
    text = escape(tokenizer, text)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    keep = room - frame
    while len(prompt) > room:
        keep = max(0, keep)  # nothing of the text fits in any case: frame < room
        cut = text[: offsets[keep][0]] if keep < len(offsets) else text
        prompt = _ids(tokenizer, render(tokenizer, task, cut))
        keep -= max(1, len(prompt) - room)
    return Encoded(prompt, answer, True)


def template_hash(tokenizer: PreTrainedTokenizerBase, task: Task) -> str:
    """SHA-256 of a rendered and tokenized fixed prompt: equal hash, equal prompting."""
    text = "测试 test 123 😀"
    rendered = render(tokenizer, task, text)
    return sha256_json({"text": rendered, "ids": _ids(tokenizer, rendered), "labels": label_ids(tokenizer, task)})
