"""A chat template taken apart: what stands before and behind the text of each turn.
model_info.json: how the model is asked, and what it answered here to five prompts, for test_model.py.
What the packaged file answers here: greedy tokens, their log-probabilities, label scores. For child processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError
from lib.prompts.conversations import escape
from lib.prompts.templates import end_of_turn_id
from lib.runs.child import run_child
from lib.scoring.generation import end_ids, llama_feed, write
from lib.scoring.llama_backend import LlamaCppBackend
from lib.stages.package.facts import Facts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# A chat template taken apart: what stands before and behind the text of each turn.
#
# So that programs without Jinja (Ollama, the package's own scripts) write the very prompt that the model was trained
# on.

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


# model_info.json: how the model is asked, and what it answered here to five prompts, for test_model.py.

TOLERANCE, TOLERANCE_SHARE = 0.2, 0.1
"""By how much log-probabilities and margins may differ on another processor: nats, and on top a share of the stored
value. Kernels round the quantized products differently, and unlikely tokens feel it most: on SmolLM2-135M in Q4_0
other kernels of one processor move a label's log-probability by 0.31, its margin by 0.33, likely tokens by 0.09."""

CHECKED_TOKENS = 24

REVIEWS = (
    "房间很干净，服务也好，下次还会来。",
    "等了一个小时才上菜，味道很一般。",
    "屏幕清楚，可是电池太不耐用了。",
    "书的内容很好，就是送来的时候封面破了。",
    "价格便宜，质量对得起这个价。",
)
QUESTIONS = (
    "请介绍一下你自己。",
    "怎样才能睡得好一些？",
    "请用一句话说明什么是公钥加密。",
    "明天要考试了，我很紧张，怎么办？",
    "一加一等于几？为什么？",
)
"""The project's own sentences: a package holds no row of anybody's data."""


def model_info(
    facts: Facts, turns: Turns, tokenizer: PreTrainedTokenizerBase, gguf: Path, sha256: str, n_threads: int
) -> dict[str, Any]:
    """The content of model_info.json; the file is asked here, in a process of its own.

    Raises:
        InputError: llama.cpp refuses the file or dies of it.
    """
    task = facts.task
    texts = REVIEWS if task.label_names else QUESTIONS
    names, labels = task.label_names, task.answer_words(tokenizer)
    prompts = [
        prompt_of(tokenizer, turns, task.system_prompt, task.user_prompt.replace("{text}", text)) for text in texts
    ]
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    request = {"prompts": ids, "labels": labels, "most": min(CHECKED_TOKENS, facts.most), "n_threads": n_threads}
    request |= {"path": str(gguf.resolve()), "ends": sorted(end_ids(tokenizer))}
    answers = run_child("lib.stages.package.self_test:answer", request, f"asking {gguf.name}")["answers"]
    checked = zip(texts, prompts, ids, answers, strict=True)
    return {
        "format": 1,
        "file": facts.file,
        "sha256": sha256,
        "system": task.system_prompt,
        "user": task.user_prompt,
        "labels": [{"name": name, "ids": own} for name, own in zip(names, labels, strict=True)],
        "turns": turns.to_json(),
        "special_tokens": list(tokenizer.all_special_tokens),
        "stops": stops(tokenizer),
        "n_ctx": facts.n_ctx,
        "max_tokens": facts.most,
        "tolerance": TOLERANCE,
        "tolerance_share": TOLERANCE_SHARE,
        "examples": list(texts[:3]),
        "folders": [name for name in facts.tree if name != "gguf"],
        "checks": [
            {"text": text, "prompt": prompt, "prompt_ids": own, **answer} for text, prompt, own, answer in checked
        ],
    }


def stops(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of the tokens that end an answer, the end of a turn first."""
    first = end_of_turn_id(tokenizer)
    ends = [first, *sorted(end_ids(tokenizer) - {first})]
    return [tokenizer.convert_ids_to_tokens(number) for number in ends]


def prompt_of(tokenizer: PreTrainedTokenizerBase, turns: Turns, system: str, user: str) -> str:
    """The prompt for one question, names of special tokens inside the texts made harmless."""
    texts = (("system", system), ("user", user))
    return turns.render([{"role": role, "content": escape(tokenizer, text)} for role, text in texts])


# What the packaged file answers here: greedy tokens, their log-probabilities, label scores. For child processes.


def answer(argument: dict[str, Any]) -> dict[str, Any]:
    """Open a GGUF file and answer prompts.

    Args:
        argument: "path"; "prompts": token ids; "labels": token ids of the answer words, or []; "most": tokens of an
            answer; "ends": ids that end it; "n_threads".

    Returns:
        "answers": for every prompt {"ids" (without the ending token), "log_probs" (of each id, nats), "labels"
        (log-probability of each label)}.
    """
    prompts, labels = argument["prompts"], argument["labels"]
    longest = max(map(len, prompts)) + max([argument["most"], *map(len, labels)]) + 1
    options = {"n_ctx": longest, "n_threads": argument["n_threads"], "flash_attention": True}
    with LlamaCppBackend(Path(argument["path"]), **options) as backend:
        scores = [[_score(backend, ids, label) for label in labels] for ids in prompts]
        answers = [_greedy(backend, ids, argument["most"], argument["ends"]) for ids in prompts]
    return {"answers": [{**written, "labels": own} for written, own in zip(answers, scores, strict=True)]}


def _score(backend: LlamaCppBackend, prompt: Sequence[int], label: Sequence[int]) -> float:
    """Log-probability of a label, one sequence at a time as programs do: batches of many round otherwise."""
    feed, given, total = llama_feed(backend), list(prompt), 0.0
    for token in label:
        logits = feed(given)
        top = logits.max()
        total += float(logits[token] - top - np.log(np.exp(logits - top).sum()))
        given = [token]
    return total


def _greedy(backend: LlamaCppBackend, prompt: Sequence[int], most: int, ends: Sequence[int]) -> dict[str, Any]:
    feed, found = llama_feed(backend), []

    def remember(ids: Sequence[int]) -> np.ndarray:
        logits = feed(ids)
        top = logits.max()
        found.append(float(-np.log(np.exp(logits - top).sum())))  # of the likeliest token, which greedy takes
        return logits

    written = write(remember, prompt, most, set(ends))
    return {"ids": written.ids, "log_probs": found[: len(written.ids)]}
