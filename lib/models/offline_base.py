"""The offline base model: a small Qwen2 pre-trained as a causal language model on the run's own training texts.

It never sees a label. Some texts are framed as ChatML turns, so that the frame is not alien to it: half of those let
the assistant continue a text that the user began, half are the task's own prompt answered with a label name drawn at
random, which makes the answer words likely and their order meaningless. Where there are no labels it sees single turns,
and pairs of turns drawn at random as question and answer: never a conversation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.device import compute_dtype
from lib.models import store
from lib.models.conversations import ASSISTANT, SYSTEM, USER, ConversationTask, render_conversation
from lib.models.offline_tokenizer import END_OF_TEXT, END_OF_TURN, START_OF_TURN
from lib.models.prompting import render
from lib.models.tasks import AnyTask, has_labels
from lib.progress import Progress
from lib.run.files import require_space, sha256_file, sha256_json, write_text

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM


@dataclass(frozen=True)
class BaseRecipe:
    """What determines the offline base besides texts, task and tokenizer.

    Attributes:
        layers, hidden, intermediate, heads, kv_heads: the shape; widths are multiples of 256 for K-quants.
        continued, framed: shares of texts shown as a continued turn, and as the task's prompt with a random answer.
        window, batch: tokens a window and windows an update.
        passes: times every text is seen; `min_tokens` and `max_tokens` bound the whole.
        learning_rate: peak; 5 % linear warm-up, cosine to 5 %.
        seed: of the weights, the order and the random answers.
        version: raised when this module's code changes what comes out.
    """

    layers: int = 2
    hidden: int = 256
    intermediate: int = 768
    heads: int = 4
    kv_heads: int = 2
    continued: float = 0.0
    framed: float = 0.3
    window: int = 128
    batch: int = 8
    passes: float = 1.0
    min_tokens: int = 300_000
    max_tokens: int = 900_000
    learning_rate: float = 3.0e-3
    weight_decay: float = 0.01
    seed: int = 0
    version: int = 1


def ensure_base(texts: list[str], task: AnyTask, tokenizer_dir: Path, recipe: BaseRecipe | None = None) -> Path:
    """The stored offline base model for these texts, trained if it is not there yet.

    Args:
        texts: the run's training texts, without labels.
        task: gives the prompt frame and the answer words.
        tokenizer_dir: the run's tokenizer (from `ensure_tokenizer`).

    Returns:
        A standard model folder. `offline_card` says how it was made.
    """
    recipe = recipe or _recipe(task)
    determined_by = {
        "texts": sha256_json(texts),
        "task": task.to_json(),
        "tokenizer": sha256_file(tokenizer_dir / "tokenizer.json"),
        "template": sha256_file(tokenizer_dir / "chat_template.jinja"),
        "recipe": asdict(recipe),
        "arithmetic": compute_dtype()[0],
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
    }

    def build(folder: Path) -> dict[str, Any]:
        require_space(folder, 64 << 20, "the offline base model")
        return _build(texts, task, tokenizer_dir, recipe, folder)

    return store.ensure("base", determined_by, build)


def _recipe(task: AnyTask) -> BaseRecipe:
    """The default; conversations are longer than single texts, and so are the windows for them."""
    recipe = BaseRecipe()
    if has_labels(task):
        return recipe
    return replace(recipe, window=4 * recipe.window, batch=max(1, recipe.batch // 4))


def offline_card(folder: Path) -> dict[str, Any]:
    """How a stored offline base was made: parameters, tokens seen, last loss (nats a token), recipe, tokens/s."""
    record = store.record_of(folder)
    return {**record["facts"], "recipe": record["determined_by"]["recipe"]}


def _build(texts: list[str], task: AnyTask, tokenizer_dir: Path, recipe: BaseRecipe, folder: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir), local_files_only=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = new_model(tokenizer, recipe)
        facts = _pretrain(model, windows(texts, task, tokenizer, recipe), recipe)
    model.to(torch.bfloat16).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    facts["parameters"] = sum(p.numel() for p in model.parameters())
    write_text(folder / "README.md", _readme(facts, recipe))
    return facts


def model_config(recipe: BaseRecipe, vocabulary: int, **more: Any) -> Any:
    """The Qwen2Config of a recipe."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        **more,
    )


def new_model(tokenizer: PreTrainedTokenizerBase, recipe: BaseRecipe) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights; rows of the embedding rounded up to a multiple of 256."""
    from transformers import GenerationConfig, Qwen2ForCausalLM

    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vocabulary = -(-len(tokenizer) // 256) * 256
    config = model_config(recipe, vocabulary, bos_token_id=tokenizer.pad_token_id, attn_implementation="sdpa", **ends)
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.pad_token_id, do_sample=False, **ends)
    return model


def documents(texts: list[str], task: AnyTask, tokenizer: PreTrainedTokenizerBase, recipe: BaseRecipe) -> Iterator[str]:
    """Endless documents: every text once a pass in a new random order, plain or framed; no label is involved."""
    import numpy as np

    rng = np.random.default_rng(recipe.seed)
    while True:
        for i in rng.permutation(len(texts)):
            answers = texts if isinstance(task, ConversationTask) else task.label_names
            text, draw, answer = texts[i], rng.random(), answers[rng.integers(len(answers))]
            if draw < recipe.framed and isinstance(task, ConversationTask):
                turns = ((SYSTEM, task.system_prompt), (USER, text), (ASSISTANT, answer))
                messages = [{"role": role, "content": content} for role, content in turns]
                yield render_conversation(tokenizer, messages, False)[0] + END_OF_TEXT
            elif draw < recipe.framed:
                yield f"{render(tokenizer, task, text)}{answer}{END_OF_TURN}\n{END_OF_TEXT}"
            elif draw < recipe.framed + recipe.continued:
                half = len(text) // 2
                opened = f"{START_OF_TURN}user\n{text[:half]}{END_OF_TURN}\n{START_OF_TURN}assistant\n"
                yield f"{opened}{text[half:]}{END_OF_TURN}\n{END_OF_TEXT}"
            else:
                yield f"{text}{END_OF_TEXT}"


def windows(texts: list[str], task: AnyTask, tokenizer: PreTrainedTokenizerBase, recipe: BaseRecipe) -> torch.Tensor:
    """Documents packed end to end and cut into windows, int64 (n, window)."""
    import torch

    ids: list[int] = []
    wanted = math.ceil(recipe.passes * len(texts))
    for count, document in enumerate(documents(texts, task, tokenizer, recipe)):
        if len(ids) >= recipe.max_tokens or (count >= wanted and len(ids) >= recipe.min_tokens):
            break
        ids += tokenizer(document, add_special_tokens=False)["input_ids"]
    ids = ids[: recipe.max_tokens]
    rows = len(ids) // (recipe.window * recipe.batch) * recipe.batch
    return torch.tensor(ids[: rows * recipe.window]).view(rows, recipe.window)


def _pretrain(model: Qwen2ForCausalLM, data: torch.Tensor, recipe: BaseRecipe) -> dict[str, Any]:
    """Train in place; returns tokens, updates, mean loss of the last tenth (nats a token)."""
    import torch

    batches = data[torch.randperm(len(data))].split(recipe.batch)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)
    low = compute_dtype()[0] == "bfloat16"
    losses: list[float] = []
    model.train()
    with Progress("pre-training the offline base model (updates)", len(batches)) as progress:
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _schedule(step, len(batches))
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                logits = model(batch).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            progress.advance(note=f"loss {losses[-1]:.2f}")
    last = losses[-max(1, len(losses) // 10) :]
    return {"tokens": data.numel(), "updates": len(batches), "loss": round(sum(last) / len(last), 4)}


def _schedule(step: int, steps: int) -> float:
    warm = max(1, round(0.05 * steps))
    cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / warm) * cosine


def _readme(facts: dict[str, Any], recipe: BaseRecipe) -> str:
    return f"""---
language: zh
library_name: transformers
pipeline_tag: text-generation
tags: [qwen2, offline-base]
---
# Offline base model

A Qwen2 of {facts["parameters"]:,} parameters ({recipe.layers} layers, {recipe.hidden} wide), made by the quantization
workbook on this machine: a causal language model pre-trained on {facts["tokens"]:,} tokens of the run's own training
texts (last loss {facts["loss"]:.2f} nats a token). It has seen no label. It stands in for a real base model where
there is no network: its results say nothing about Qwen.
"""
