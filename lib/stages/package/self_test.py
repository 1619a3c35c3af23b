"""model_info.json: how the packaged file is asked, and what it answered here to five prompts, for test_model.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.prompts.conversations import escape
from lib.prompts.tasks import Task
from lib.prompts.templates import Turns, end_of_turn_id
from lib.runs.child import run_child
from lib.scoring.generation import end_ids, llama_feed, write
from lib.scoring.llama_backend import LlamaCppBackend
from lib.stages.package.facts import Facts

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

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


def sentences_for(task: Task) -> tuple[str, ...]:
    """The project's own sentences: a package holds no row of anybody's data."""
    return REVIEWS if task.label_names else QUESTIONS


def model_info(
    facts: Facts, turns: Turns, tokenizer: PreTrainedTokenizerBase, gguf: Path, sha256: str, n_threads: int
) -> dict[str, Any]:
    """The content of model_info.json; the file is asked here, in a process of its own.

    Raises:
        InputError: llama.cpp refuses the file or dies of it.
    """
    task = facts.task
    texts, labels = sentences_for(task), task.answer_words(tokenizer)
    prompts = [prompt_of(tokenizer, turns, task, text) for text in texts]
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
        "labels": [{"name": name, "ids": own} for name, own in zip(task.label_names, labels, strict=True)],
        "turns": asdict(turns),
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


def prompt_of(tokenizer: PreTrainedTokenizerBase, turns: Turns, task: Task, text: str) -> str:
    """The prompt for one text, names of special tokens inside it made harmless."""
    texts = {"system": task.system_prompt, "user": task.user_prompt.replace("{text}", text)}
    return turns.render([{"role": role, "content": escape(tokenizer, text)} for role, text in texts.items()])


# What the packaged file answers here: greedy tokens, their log-probabilities, label scores. For a child process.


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
    from scipy.special import log_softmax

    feed, given, total = llama_feed(backend), list(prompt), 0.0
    for token in label:
        total += float(log_softmax(feed(given))[token])
        given = [token]
    return total


def _greedy(backend: LlamaCppBackend, prompt: Sequence[int], most: int, ends: Sequence[int]) -> dict[str, Any]:
    from scipy.special import log_softmax

    feed, found = llama_feed(backend), []

    def remember(ids: Sequence[int]) -> np.ndarray:
        logits = feed(ids)
        found.append(float(log_softmax(logits).max()))  # of the likeliest token, which greedy takes
        return logits

    written = write(remember, prompt, most, set(ends))
    return {"ids": written.ids, "log_probs": found[: len(written.ids)]}
