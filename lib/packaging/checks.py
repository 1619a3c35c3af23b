"""model_info.json: how the model is asked, and what it answered here to five prompts, for test_model.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.models.prompting import Task, end_of_turn_id, escape, label_ids
from lib.packaging.facts import Facts
from lib.packaging.turns import Turns
from lib.run.child import run_child
from lib.scoring.generation import end_ids

if TYPE_CHECKING:
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
"""The project's own sentences: a package holds no row of anybody's data."""


def model_info(
    facts: Facts, turns: Turns, tokenizer: PreTrainedTokenizerBase, gguf: Path, sha256: str, n_threads: int
) -> dict[str, Any]:
    """The content of model_info.json; the file is asked here, in a process of its own.

    Raises:
        InputError: llama.cpp refuses the file or dies of it.
    """
    task = facts.task
    labelled = isinstance(task, Task)
    texts = REVIEWS if labelled else QUESTIONS
    wording = task.user_prompt if labelled else "{text}"
    names = list(task.label_names) if labelled else []
    labels = label_ids(tokenizer, task) if labelled else []
    prompts = [prompt_of(tokenizer, turns, task.system_prompt, wording.replace("{text}", text)) for text in texts]
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    request = {"prompts": ids, "labels": labels, "most": min(CHECKED_TOKENS, facts.most), "n_threads": n_threads}
    request |= {"path": str(gguf.resolve()), "ends": sorted(end_ids(tokenizer))}
    answers = run_child("lib.packaging.worker:answer", request, f"asking {gguf.name}")["answers"]
    checked = zip(texts, prompts, ids, answers, strict=True)
    return {
        "format": 1,
        "file": facts.file,
        "sha256": sha256,
        "system": task.system_prompt,
        "user": wording,
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
