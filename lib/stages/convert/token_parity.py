"""Do transformers and llama.cpp cut texts into the same token ids, and render the chat template alike?"""

from __future__ import annotations

import ctypes
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError
from lib.models.gguf_file import read_metadata
from lib.prompts.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


HARD_STRINGS = (
    "",
    " ",
    "\n",
    "  \n\n \t x  ",
    "酒店很干净，服务不错！！！",
    "It's 12345 o'clock — we'LL see…",
    "３６５天ＡＢＣ①②",
    "👨‍👩‍👧‍👦 🇨🇳 ❤️",
    "a\u00a0b\u3000c\u200bd",
    "é à Ω ё 한글 ไทย العربية",
    "<|im_start|>user\n你好<|im_end|>\n",
    "\x00\x01\x7f",
    "https://a.b/c?d=1&e=%20#f",
    "==------``````''''\"\"\"\"",
)
"""Texts on which tokenizers are known to differ; compared besides the run's own."""


def gguf_token_ids(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of llama.cpp for each text, special tokens recognised, nothing added.

    Raises:
        InputError: llama.cpp is missing or refuses the file.
    """
    from lib.scoring.llama_backend import forget_errors, last_error, llama

    api = llama()
    parameters = api.llama_model_default_params()
    parameters.vocab_only = True
    forget_errors()
    model = api.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        raise InputError(f"llama.cpp cannot load {path}: {last_error()}.", "a complete GGUF.", "convert it again.")
    try:
        vocabulary = api.llama_model_get_vocab(model)
        return [_tokenize(api, vocabulary, text.encode("utf-8", "replace")) for text in texts]
    finally:
        api.llama_model_free(model)


def _tokenize(api: Any, vocabulary: Any, text: bytes) -> list[int]:
    room = len(text) + 8  # a token is at least one byte
    buffer = (ctypes.c_int32 * room)()
    count = api.llama_tokenize(vocabulary, text, len(text), buffer, room, False, True)
    if count < 0:
        raise RuntimeError(f"llama.cpp needs {-count} tokens for {len(text)} bytes")
    return list(buffer[:count])


def _first_difference(found: Sequence[Any], wanted: Sequence[Any]) -> int:
    """Index at which two unequal sequences part; the shorter one's end where it begins the other."""
    pairs = zip(found, wanted, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(wanted)))


def compare_tokens(tokenizer: PreTrainedTokenizerBase, path: Path, texts: Sequence[str]) -> int:
    """Check that both tokenizers give the same ids for every text (NFC; llama.cpp does not normalise).

    Returns:
        The number of ids compared.

    Raises:
        InputError: the first text that differs, with both lists.
    """
    texts = [unicodedata.normalize("NFC", text) for text in texts]
    for text, found in zip(texts, gguf_token_ids(path, texts), strict=True):
        wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
        if found != wanted:
            first = _first_difference(found, wanted)
            raise InputError(
                f"{path.name} cuts {text[:60]!r} into other tokens than the merged model: "
                f"{found[first : first + 6]} instead of {wanted[first : first + 6]} from token {first} on.",
                "the same token ids.",
                "convert again with the tokenizer that the model was trained with.",
            )
    return sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)


def compare_prompts(
    tokenizer: PreTrainedTokenizerBase, path: Path, task: Task, rows: Sequence[Mapping[str, Any]]
) -> int:
    """Check that the template inside the GGUF, rendered as llama-cpp-python does, gives the prompts of this run.

    The system turn is always given and thinking is always switched on or off in words, so that no default can differ.

    Args:
        rows: {"text"} for a task with labels, else {"messages"} that end on an answer.

    Returns:
        The number of prompts compared.

    Raises:
        InputError: no template in the file, or the first prompt that differs.
    """
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = read_metadata(path).get("tokenizer.chat_template")
    if not isinstance(template, str):
        raise InputError(f"no chat template in {path.name}.", "the template of the model.", "convert the whole folder.")
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    formatter = Jinja2ChatFormatter(template, eos_token=eos, bos_token=bos)
    for row in rows:
        wanted = task.prompt(tokenizer, row)
        found = formatter(messages=task.question(tokenizer, row), enable_thinking=task.thinking).prompt
        if found != wanted:
            first = _first_difference(found, wanted)
            raise InputError(
                f"the template in {path.name} renders another prompt than the merged model's from character {first} "
                f"on: {found[first : first + 40]!r} instead of {wanted[first : first + 40]!r}.",
                "the same prompt.",
                "convert again with the tokenizer and template that the model was trained with.",
            )
    return len(rows)
