"""A text as documents, and to which document every token belongs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lib.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lib.scoring.llama_backend import LlamaCppBackend


_BLANK_LINE = re.compile(r"(?:[ \t]*\r?\n){2,}")


@dataclass(frozen=True)
class Text:
    """A text to be judged on.

    Attributes:
        content: the whole text.
        starts: where each document begins in it, characters, ascending; the first is 0.
    """

    content: str
    starts: tuple[int, ...]

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
            raise InputError(
                f"a text of {len(self.ids)} tokens.",
                f"at least one window of {n_ctx} tokens (--n-ctx).",
                f"give a longer text{smaller}.",
            )
        count = min(count, chunks) if chunks else count
        cut = [self.ids[i * n_ctx : (i + 1) * n_ctx] for i in range(count)]
        return cut if self.begin is None else [[self.begin, *window[1:]] for window in cut]

    def scored_documents(self, n_ctx: int, n_windows: int) -> np.ndarray | None:
        """Document of every scored token, in the order of `lib.scoring.perplexity.positions`."""
        if self.documents is None:
            return None
        return self.documents[: n_ctx * n_windows].reshape(n_windows, n_ctx)[:, n_ctx // 2 + 1 :].ravel()


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
