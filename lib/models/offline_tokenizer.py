"""The offline base model's tokenizer: Qwen2's byte-level BPE, trained on the run's own texts.

Normaliser (NFC), pre-tokenizer, decoder and special tokens are those of Qwen2, so that every tool that reads a Qwen2
tokenizer (the GGUF converter, llama.cpp) reads this one. The chat template is the project's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from lib.models import store
from lib.run.files import sha256_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

PLAIN_BYTES = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
LONGEST = 4096
"""Characters of a text that are trained on. A run of letters without end (a damaged row) is one piece for the trainer,
whose time grows with the square of its length: 80,000 took over a minute."""

ROLES = ("system", "user", "assistant")

CHAT_TEMPLATE = """\
{#- ChatML: each message is one turn, opened and closed once; no system turn is invented. -#}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] }}
    {%- if not message['content'].endswith('<|im_end|>') %}
        {{- '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


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
        folder: existing folder to write into.

    Raises:
        RuntimeError: a word did not become one token (the vocabulary is too small for all words).
    """
    from transformers import Qwen2Tokenizer

    recipe = recipe or TokenizerRecipe()
    raw = _train(texts, words, recipe)
    _check_words(raw, words, recipe)
    whole = json.loads(raw.to_str())
    whole["decoder"] = {"type": "ByteLevel", **PLAIN_BYTES}  # written out as Qwen2's file has it; same effect
    state = whole["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(pair) for pair in state["merges"]],
        unk_token=None,
        bos_token=None,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        extra_special_tokens=[START_OF_TURN],
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    # the class would number the special tokens in another order
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False, indent=1), encoding="utf-8")


def ensure_tokenizer(texts: list[str], words: list[str]) -> Path:
    """The stored tokenizer for these texts and words, trained if it is not there yet; a folder to load or copy.

    Of each text only the first LONGEST characters are used.
    """
    recipe, texts = TokenizerRecipe(), [text[:LONGEST] for text in texts]
    determined_by = {
        "texts": sha256_json(texts),
        "words": sha256_json(words),
        "recipe": asdict(recipe),
        "template": sha256_json(CHAT_TEMPLATE),
        "tokenizers": metadata.version("tokenizers"),
        "transformers": metadata.version("transformers"),
    }

    def build(folder: Path) -> dict[str, int]:
        train_tokenizer(texts, words, folder, recipe)
        return {"texts": len(texts), "characters": sum(map(len, texts))}

    return store.ensure("tokenizer", determined_by, build)


def _train(texts: list[str], words: list[str], recipe: TokenizerRecipe) -> Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
    from tokenizers.models import BPE
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    raw = Tokenizer(BPE())
    raw.normalizer = normalizers.NFC()
    pieces = PLAIN_BYTES
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(**pieces)])
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(**pieces)
    special = [END_OF_TEXT, START_OF_TURN, END_OF_TURN]
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary - len(special),
        min_frequency=recipe.min_frequency,
        max_token_length=recipe.longest_token,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(_stream(texts, words), trainer)
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return raw


def _stream(texts: list[str], words: list[str]) -> Iterator[str]:
    """The texts, then every word so often that its pairs are merged before the vocabulary is used up."""
    yield from texts
    for word in (*ROLES, *words):
        yield f"{word}\n" * (1000 + len(texts))


def _check_words(raw: Tokenizer, words: list[str], recipe: TokenizerRecipe) -> None:
    for word in words:
        pieces = raw.pre_tokenizer.pre_tokenize_str(raw.normalizer.normalize_str(word))
        ids = raw.encode(word).ids
        if len(pieces) == 1 and len(word.encode()) <= recipe.longest_token and len(ids) != 1:
            raise RuntimeError(
                f"{word!r} takes {len(ids)} tokens of {recipe.vocabulary}; too many or too long words were given"
            )
