"""Perplexity and KL divergence of any model on any text: what `workbook perplexity` does, in a process of its own."""

from __future__ import annotations

import gzip
import os
import re
import tempfile
import unicodedata
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError, refusal
from lib.models.configurations import read_configuration
from lib.models.gguf_file import read_metadata
from lib.models.gguf_tokenizer import refuse_bad_vocabulary
from lib.models.loading import affordable_dtype, load_model, load_tokenizer, quantization_method
from lib.runs.child import run_child
from lib.runs.files import user_path
from lib.scoring.backend import Backend
from lib.scoring.folders import check_folder, open_folder
from lib.scoring.llama_backend import LlamaCppBackend
from lib.scoring.perplexity import Positions, positions, scored_tokens, table_of
from lib.statistics.paired import clustered_bootstrap_t, clustered_share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lib.scoring.llama_backend import LlamaCppBackend

# A text as documents, and to which document every token belongs.

_BLANK_LINE = re.compile(r"(?:[ \t]*\r?\n){2,}")


@dataclass(frozen=True)
class Text:
    """A text to be judged on.

    Attributes:
        content: the whole text.
        starts: where each document begins in it, characters, ascending; the first is 0.
    """

    content: str
    starts: Sequence[int]

    @classmethod
    def of_file(cls, content: str) -> Text:
        """Documents end at blank lines. One newline at the end is dropped, as llama.cpp's tools do."""
        content = content.removesuffix("\n")
        ends = [match.end() for match in _BLANK_LINE.finditer(content)]
        return cls(content, (0, *(end for end in ends if end < len(content))))

    @classmethod
    def of_rows(cls, rows: Sequence[str]) -> Text:
        """One document a row, with a blank line between two."""
        rows = [row for row in rows if row.strip()]
        lengths = [len(row) + 2 for row in rows]
        return cls("\n\n".join(rows), tuple(int(n) for n in np.cumsum([0, *lengths[:-1]])))

    def documents_at(self, offsets: np.ndarray, unit: str) -> np.ndarray:
        """Index of the document at each offset, counted in "characters" or (UTF-8) "bytes"."""
        starts = np.array(self.starts)
        if unit == "bytes":
            pieces = [self.content[a:b] for a, b in zip((0, *self.starts), self.starts, strict=False)]
            starts = np.cumsum([len(piece.encode("utf-8")) for piece in pieces])
        return np.searchsorted(starts, offsets, side="right") - 1


@dataclass(frozen=True)
class Tokens:
    """A tokenized text.

    Attributes:
        ids: token ids, with the begin token in front where the model wants one.
        documents: (tokens,) index of the document in which each token begins; None where the tokens do not spell the
            text (a tokenizer that changes it), so that nobody can tell.
        begin: the token that takes the first place of every window; None where the model wants none.
    """

    ids: list[int]
    documents: np.ndarray | None
    begin: int | None

    def windows(self, n_ctx: int, chunks: int) -> list[list[int]]:
        """Windows of `n_ctx` tokens, at most `chunks` of them (0 = all), cut as llama-perplexity cuts them.

        Raises:
            InputError: the text is shorter than one window.
        """
        count = len(self.ids) // n_ctx
        if count < 1:
            smaller = f", or --n-ctx {len(self.ids) // 2} or less" if len(self.ids) >= 32 else ""
            raise refusal("scoring/short-text", count=len(self.ids), n_ctx=n_ctx, smaller=smaller)
        count = min(count, chunks) if chunks else count
        cut = [self.ids[i * n_ctx : (i + 1) * n_ctx] for i in range(count)]
        return cut if self.begin is None else [[self.begin, *window[1:]] for window in cut]


def tokenize_with_llama(backend: LlamaCppBackend, text: Text) -> Tokens:
    """Ids as llama-perplexity makes them."""
    ids, begin = backend.tokenize(text.content), backend.begin_token
    pieces = [backend.piece(token) for token in ids]
    spelt = b"".join(pieces) == text.content.encode("utf-8")
    offsets = np.cumsum([0, *map(len, pieces)])[:-1]
    return Tokens(ids, text.documents_at(offsets, "bytes") if spelt else None, begin)


def tokenize_with_transformers(tokenizer: PreTrainedTokenizerBase, text: Text) -> Tokens:
    """Ids by a model folder's own tokenizer; names of special tokens are plain text, as for llama-perplexity."""
    options = {"add_special_tokens": True, "split_special_tokens": True, "verbose": False}
    encoded = tokenizer(text.content, return_offsets_mapping=True, **options)
    ids = encoded["input_ids"]
    begin = ids[0] if ids and ids[0] == tokenizer.bos_token_id else None
    offsets = np.array([start for start, _ in encoded["offset_mapping"]])
    return Tokens(ids, text.documents_at(offsets, "characters"), begin)


# What `workbook perplexity` does.

FEWEST_DOCUMENTS = 30
"""With fewer documents in the scored text, an interval over them covers too rarely to be shown (docs/LOG.md)."""

SEED = 42
_SAMPLE = 20_000  # characters on which two tokenizers must agree


def measure_text(
    model: str,
    text: Text,
    reference: str | None = None,
    n_ctx: int = 512,
    chunks: int = 0,
    n_threads: int = 0,
    n_gpu_layers: int = 0,
) -> dict[str, Any]:
    """What llama-perplexity prints for a model and a text, with intervals over documents.

    Args:
        model, reference: .gguf files or model folders (quantized ones as they were saved).
        n_ctx: tokens a window.
        chunks: most windows; 0 = all.
        n_threads, n_gpu_layers: of llama.cpp; 0 threads = physical cores.

    Returns:
        JSON values: model, reference, n_ctx, n_windows, n_tokens, n_documents, ppl, ppl_uncertainty, ppl_interval; the
        keys kld_…, dp_…, rms_dp, same_top, ppl_reference, ppl_ratio, ln_ppl_ratio, … (null without a reference); note.
        Shares and probability differences are fractions, divergences nats, intervals 95 % bootstrap over documents.

    Raises:
        InputError: a text shorter than one window, a model that cannot be loaded or run, different tokenizers.
    """
    if n_ctx < 16:
        raise InputError(f"windows of {n_ctx} tokens.", "at least 16.", "give a larger --n-ctx.")
    for path in filter(None, (model, reference)):
        if not user_path(path).exists():
            raise InputError(f"no file or folder {path}.", "a .gguf file or a model folder.", "correct the path.")
    paths = {"model": str(user_path(model)), "reference": str(user_path(reference)) if reference else None}
    argument = {"text": asdict(text), "n_ctx": n_ctx, "chunks": chunks, **paths}
    argument |= {"n_threads": n_threads, "n_gpu_layers": n_gpu_layers}
    answer = run_child("lib.scoring.measure:measure_in_child", argument, f"perplexity of {Path(model).name}")
    return {"model": str(model), "reference": reference, **answer}


def measure_in_child(argument: dict[str, Any]) -> dict[str, Any]:
    """Open the models, make the ids once, score window by window; nothing is kept on the disk."""
    # Threads of llama.cpp that wait must sleep; read when its OpenMP library is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    text, n_ctx = Text(**argument["text"]), argument["n_ctx"]
    with ExitStack() as stack:
        paths = [Path(argument[key]) for key in ("reference", "model") if argument[key]]
        dtype = _dtype(paths)
        longest = min(n_ctx, len(text.content.encode()) + 8)  # a token is at least a byte: more room would be in vain
        opened = [_open(path, {**argument, "n_ctx": longest}, dtype) for path in paths]
        for backend, _ in opened:
            stack.enter_context(backend)
        tokens = _tokenize(opened, paths, text)
        windows = tokens.windows(n_ctx, argument["chunks"])
        base = opened[0][0] if len(opened) == 2 else None
        found = positions(base, opened[-1][0], windows, f"perplexity of {paths[-1].name}")
        device = opened[-1][0].device
    documents = None if tokens.documents is None else scored_tokens(tokens.documents, windows)
    numbers = summarize(found, documents)
    notes = [numbers["note"], "" if dtype == "float32" else f"model folders were computed in {dtype}"]
    numbers["note"] = "; ".join(filter(None, [*notes, *beyond_context(paths, n_ctx)]))
    return {"n_ctx": n_ctx, "n_windows": len(windows), **numbers, "device": device}


def _dtype(paths: Sequence[Path]) -> str:
    """In what model folders are computed, both in the same: where memory allows it in what llama.cpp computes in."""
    folders = [path for path in paths if path.is_dir()]
    for folder in folders:
        check_folder(folder)
    return affordable_dtype(*(folder for folder in folders if not quantization_method(folder)))


def most_positions(path: Path) -> int | None:
    """Tokens of context that a folder or a GGUF file was made for; None where it does not say."""
    said = read_configuration(path) if path.is_dir() else read_metadata(path)
    name = "max_position_embeddings" if path.is_dir() else f"{said.get('general.architecture')}.context_length"
    return most if type(most := said.get(name)) is int else None


def beyond_context(paths: Sequence[Path], n_ctx: int) -> list[str]:
    """What is to be said of models that were made for shorter windows."""
    made_for = [(path.name, most) for path in paths if (most := most_positions(path)) and n_ctx > most]
    return [f"windows of {n_ctx} tokens, and {name} was made for at most {most}" for name, most in made_for]


def _open(path: Path, argument: dict[str, Any], dtype: str) -> tuple[Backend, Any]:
    """A backend and, for a folder, its tokenizer."""
    if path.is_file():
        refuse_bad_vocabulary(read_metadata(path), path)
        n_ctx, threads, layers = (argument[key] for key in ("n_ctx", "n_threads", "n_gpu_layers"))
        return LlamaCppBackend(path, n_ctx, threads, layers, n_outputs=n_ctx - n_ctx // 2), None
    from lib.scoring.torch_backend import TransformersBackend

    if argument["n_threads"]:
        import torch

        torch.set_num_threads(argument["n_threads"])
    tokenizer = load_tokenizer(path, chat=False)
    if quantization_method(path):
        return open_folder(path, name=path.name, n_threads=argument["n_threads"]), tokenizer
    return TransformersBackend(load_model(path, dtype), name=path.name), tokenizer


def _tokenize(opened: list[tuple[Backend, Any]], paths: list[Path], text: Text) -> Tokens:
    """Ids by llama.cpp where one of the models is a GGUF file, else by the first folder; the other must agree."""

    def make(index: int, of: Text) -> Tokens:
        backend, tokenizer = opened[index]
        return tokenize_with_llama(backend, of) if tokenizer is None else tokenize_with_transformers(tokenizer, of)

    gguf = [i for i, (_, tokenizer) in enumerate(opened) if tokenizer is None]
    chosen = gguf[0] if gguf else 0
    if len(opened) == 2:
        # llama.cpp does not compose characters (NFC) and Qwen's tokenizers do: compare on what is composed.
        sample = Text(unicodedata.normalize("NFC", text.content[:_SAMPLE]), (0,))
        if make(0, sample).ids != make(1, sample).ids:
            raise refusal("scoring/two-tokenizers", paths=paths)
    return make(chosen, text)


_NAMES = tuple(table_of(Positions(*np.zeros((5, 1)))))
"""Keys of a table; without a reference those that need one are null."""


def summarize(found: Positions, documents: np.ndarray | None) -> dict[str, Any]:
    """All numbers of `measure_text` from the scored positions and each one's document.

    Intervals are 95 % ones over whole documents: drawn ones, and Wilson's for the share of equal tokens. A share that
    misses in few documents has no interval by drawing: most draws hold no miss at all.
    """
    n_documents = None if documents is None else len(np.unique(documents))
    result: dict[str, Any] = {**dict.fromkeys(_NAMES), **table_of(found), "n_documents": n_documents}
    names = ("ppl_interval", "kld_mean_interval", "ln_ppl_ratio_interval", "same_top_interval")
    result |= {**dict.fromkeys(names), "note": _note(n_documents)}
    if n_documents and n_documents >= FEWEST_DOCUMENTS:
        loss = clustered_bootstrap_t(-found.log_p, documents, SEED)
        result["ppl_interval"] = [float(np.exp(loss.low)), float(np.exp(loss.high))]
        if found.kl is not None:
            ratio = clustered_bootstrap_t(found.log_p_reference - found.log_p, documents, SEED)
            result["kld_mean_interval"] = clustered_bootstrap_t(found.kl, documents, SEED).to_json()
            result["ln_ppl_ratio_interval"] = ratio.to_json()
            result["same_top_interval"] = clustered_share(found.same, documents).to_json()
    return result


def _note(n_documents: int | None) -> str:
    if n_documents is None:
        return "the tokens do not spell the text, so no intervals over documents"
    if n_documents < FEWEST_DOCUMENTS:
        plural = "" if n_documents == 1 else "s"
        return f"{n_documents} document{plural} scored; intervals over documents need {FEWEST_DOCUMENTS}"
    return ""


# Does llama.cpp, as it was compiled here, survive a prompt on 8-bit weights? Tried in a process of its own.
#
# Compiled by GCC for a processor with AMX it does not: the inline assembly behind `_tile_loadconfig` names 8 of the 64
# bytes that it reads, GCC 12 leaves out the stores to the others, and `ldtilecfg` faults (ggml-cpu/amx/mmq.cpp).
# `scripts/setup.sh` compiles without that code; a llama-cpp-python from elsewhere may have it.

TRIAL = Path(__file__).with_name("trial.gguf.gz")
"""One layer of Llama in Q8_0, weights 1/64 more than 0 or 1, no vocabulary; made by tests/scoring/test_trial.py."""
_TOKENS, _PROMPT = 32, 24


def llama_cpp_crash() -> str | None:
    """How llama.cpp ends on a tiny model in Q8_0, in words; None when it answers."""
    with tempfile.TemporaryDirectory(prefix="workbook-trial-") as name:
        path = Path(name) / "trial.gguf"
        path.write_bytes(gzip.decompress(TRIAL.read_bytes()))
        try:
            run_child("lib.scoring.measure:try_prompt", {"path": str(path)}, "a prompt on 8-bit weights", timeout=120)
        except InputError as error:
            return error.found.rstrip(".")
    return None


def try_prompt(argument: dict[str, Any]) -> dict[str, Any]:
    """Read a prompt with the model at "path", by "n_threads" and with "n_gpu_layers" where it says them."""
    threads, layers = argument.get("n_threads", 1), argument.get("n_gpu_layers", 0)
    with LlamaCppBackend(Path(argument["path"]), _PROMPT, threads, layers) as backend:
        found = backend.window_log_probs([place % _TOKENS for place in range(_PROMPT)])
        if not np.isfinite(found).all():
            raise refusal("scoring/window-not-numbers", backend=backend)
    return {"positions": len(found)}
