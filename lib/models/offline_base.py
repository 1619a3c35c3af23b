"""The offline base model: a small Qwen2, pre-trained with its own tokenizer on the run's own training texts."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.models.gguf_tokenizer import PLAIN_BYTES, RULES
from lib.progress import Progress
from lib.prompts.conversations import render_conversation
from lib.prompts.tasks import Task
from lib.prompts.templates import ASSISTANT, ROLES, SYSTEM, USER
from lib.runs import manifest
from lib.runs.files import require_space, sha256_file, sha256_json, write_text
from lib.runs.machine import compute_dtype
from lib.runs.render import render

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM


# The offline base model's tokenizer: Qwen2's byte-level BPE, trained on the run's own texts.
#
# Normaliser (NFC), pre-tokenizer, decoder and special tokens are those of Qwen2, so that every tool that reads a Qwen2
# tokenizer (the GGUF converter, llama.cpp) reads this one. The chat template is the project's own.

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

LONGEST = 4096
"""Characters of a text that are trained on. A run of letters without end (a damaged row) is one piece for the trainer,
whose time grows with the square of its length: 80,000 took over a minute."""


SMALL_FILES = Path(__file__).parent / "templates" / "offline_tokenizer"
"""tokenizer_config.json and chat_template.jinja, as `save_pretrained` of Qwen2's tokenizer writes them."""


@dataclass(frozen=True)
class TokenizerRecipe:
    """What determines the tokenizer besides texts and words.

    Attributes:
        vocabulary: ids in all, the three special tokens included; a multiple of 256.
        min_frequency: a pair seen less often is not merged.
        longest_token: bytes; 9 are three Chinese characters, about what a real Qwen token holds. Without a limit the
            tokens of a small corpus become whole clauses, each too rare to learn anything from.
        version: raised when this module's code changes what comes out.
    """

    vocabulary: int = 4096
    min_frequency: int = 3
    longest_token: int = 9
    version: int = 2


def train_tokenizer(texts: list[str], words: list[str], folder: Path, recipe: TokenizerRecipe | None = None) -> None:
    """Train the tokenizer and save it as `AutoTokenizer` reads it (tokenizer.json, its config, the chat template).

    Args:
        texts: the training texts, in a fixed order; equal input gives equal bytes.
        words: strings that should cost few tokens (label names, prompts). A word of at most `longest_token` bytes
            that Qwen2's pre-tokenizer leaves in one piece becomes one token.
        folder: to write into; made where it is not there.
    """
    from tokenizers import AddedToken, Tokenizer, pre_tokenizers, trainers

    parts = {
        "version": "1.0",
        "normalizer": RULES["qwen2"]["normalizer"],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": RULES["qwen2"]["steps"]},
        "post_processor": PLAIN_BYTES,
        "decoder": PLAIN_BYTES,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    recipe, raw = recipe or TokenizerRecipe(), Tokenizer.from_str(json.dumps(parts))
    special = [END_OF_TEXT, START_OF_TURN, END_OF_TURN]
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary - len(special),
        min_frequency=recipe.min_frequency,
        max_token_length=recipe.longest_token,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # every word so often that its pairs are merged before the vocabulary is used up
    repeated = (f"{word}\n" * (1000 + len(texts)) for word in (*ROLES, *words))
    raw.train_from_iterator(itertools.chain(texts, repeated), trainer)
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    # the tokenizer's class would number the special tokens in another order
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(json.loads(raw.to_str()), ensure_ascii=False, indent=1)
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    for path in SMALL_FILES.iterdir():
        shutil.copyfile(path, folder / path.name)


def ensure_tokenizer(texts: list[str], words: list[str]) -> Path:
    """The stored tokenizer for these texts and words, trained if it is not there yet; a folder to load or copy.

    Of each text only the first LONGEST characters are used.
    """
    recipe, texts = TokenizerRecipe(), [text[:LONGEST] for text in texts]
    determined_by = {
        "texts": sha256_json(texts),
        "words": sha256_json(words),
        "recipe": asdict(recipe),
        "template": sha256_json((SMALL_FILES / "chat_template.jinja").read_text(encoding="utf-8")),
        "tokenizers": metadata.version("tokenizers"),
        "transformers": metadata.version("transformers"),
    }

    def build(folder: Path) -> dict[str, int]:
        train_tokenizer(texts, words, folder, recipe)
        return {"texts": len(texts), "characters": sum(map(len, texts))}

    return manifest.ensure("tokenizer", determined_by, build)


# The offline base model: a small Qwen2 pre-trained as a causal language model on the run's own training texts.
#
# It never sees a label. Some texts are framed as ChatML turns, so that the frame is not alien to it: as the task's own
# prompt answered with a label name drawn at random, which makes the answer words likely and their order meaningless.
# Where there are no labels it sees single turns, and pairs of turns drawn at random as question and answer: never a
# conversation.


@dataclass(frozen=True)
class BaseRecipe:
    """What determines the offline base besides texts, task and tokenizer.

    Attributes:
        layers, hidden, intermediate, heads, kv_heads: the shape; widths are multiples of 256 for K-quants.
        framed: share of texts shown as the task's prompt with a random answer.
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


def ensure_base(texts: list[str], task: Task, tokenizer_dir: Path, recipe: BaseRecipe | None = None) -> Path:
    """The stored offline base model for these texts, trained if it is not there yet.

    Args:
        texts: the run's training texts, without labels.
        task: gives the prompt frame and the answer words.
        tokenizer_dir: the run's tokenizer (from `ensure_tokenizer`).

    Returns:
        A standard model folder; its record (see `manifest.ensure`) says how it was made.
    """
    if recipe is None:  # conversations are longer than single texts, and so are the windows for them
        recipe = BaseRecipe() if task.label_names else BaseRecipe(window=512, batch=2)
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
        import torch
        from transformers import AutoTokenizer

        require_space(folder, 64 << 20, "the offline base model")
        tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir), local_files_only=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = new_model(tokenizer, recipe)
            facts = _pretrain(model, windows(texts, task, tokenizer, recipe), recipe)
        model.to(torch.bfloat16).eval()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        shutil.copyfile(tokenizer_dir / "tokenizer.json", folder / "tokenizer.json")
        facts["parameters"] = sum(p.numel() for p in model.parameters())
        card = render(Path(__file__).with_name("offline_base.md.j2"), facts=facts, recipe=recipe)
        write_text(folder / "README.md", card)
        return facts

    return manifest.ensure("base", determined_by, build)


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


def documents(texts: list[str], task: Task, tokenizer: PreTrainedTokenizerBase, recipe: BaseRecipe) -> Iterator[str]:
    """Endless documents: every text once a pass in a new random order, plain or framed; no label is involved."""
    import numpy as np

    rng = np.random.default_rng(recipe.seed)
    while True:
        for i in rng.permutation(len(texts)):
            answers = task.label_names or texts
            text, draw, answer = texts[i], rng.random(), answers[rng.integers(len(answers))]
            if draw < recipe.framed and not task.label_names:
                turns = ((SYSTEM, task.system_prompt), (USER, text), (ASSISTANT, answer))
                messages = [{"role": role, "content": content} for role, content in turns]
                yield render_conversation(tokenizer, messages, False)[0] + END_OF_TEXT
            elif draw < recipe.framed:
                yield f"{task.prompt(tokenizer, {'text': text})}{answer}{END_OF_TURN}\n{END_OF_TEXT}"
            else:
                yield f"{text}{END_OF_TEXT}"


def windows(texts: list[str], task: Task, tokenizer: PreTrainedTokenizerBase, recipe: BaseRecipe) -> torch.Tensor:
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
            warm = min(1.0, (step + 1) / max(1, round(0.05 * len(batches))))
            cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * (warm * cosine)
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
