"""The one model behind the server: its answers end at their limit, and when nobody waits for them any more."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import islice
from typing import Any


@dataclass(eq=False)
class Work:
    """What a request may still cost.

    Attributes:
        most: tokens of its answer.
        gone: set when its client has gone.
        cut: whether the answer was ended here.
    """

    most: int
    gone: threading.Event = field(default_factory=threading.Event)
    cut: bool = False


WORK: ContextVar[Work] = ContextVar("work")
"""That of the request that is answered; threads of the server inherit it."""

THINKING: ContextVar[bool | None] = ContextVar("thinking", default=None)
"""Whether the request that is answered asks for reasoning (`enable_thinking`); None = as the server was started."""

SAID: ContextVar[dict[str, Any] | None] = ContextVar("said", default=None)
"""Messages and tools of the request that is answered, as it has them: the inner server leaves out members that it does
not know, such as `reasoning_content`, and a template may write them."""


class _GoneError(Exception):
    """The client of the request has gone."""


def bound(llm: Any) -> None:
    """Make a `Llama` count the tokens that it generates.

    Its own loop looks at `max_tokens` after whole characters only: tokens that begin one and never end it (`logit_bias`
    can see to that) would go on for ever.
    """
    generate, evaluate, create = llm.generate, llm.eval, llm._create_completion

    def generate_within(tokens: Sequence[int], *arguments: Any, **keywords: Any) -> Iterator[int]:
        work = WORK.get()
        keywords["stopping_criteria"] = None
        most = min(work.most, llm.n_ctx() - len(tokens))
        try:
            for token in islice(generate(tokens, *arguments, **keywords), most):
                if work.gone.is_set():
                    break
                yield token
        except _GoneError:
            pass
        work.cut = True

    def evaluate_by_batches(tokens: Sequence[int]) -> None:
        for start in range(0, len(tokens), llm.n_batch):
            if WORK.get().gone.is_set():
                raise _GoneError
            evaluate(tokens[start : start + llm.n_batch])

    def create_within(*arguments: Any, **keywords: Any) -> Iterator[dict[str, Any]]:
        work = WORK.get()
        # Where tokens end before the loop does, its text is taken only by way of a criterion.
        keywords["stopping_criteria"] = lambda ids, scores: work.cut
        for part in create(*arguments, **keywords):
            if work.cut and part["choices"][0]["finish_reason"]:
                part["choices"][0]["finish_reason"] = "length"
            yield part

    llm.generate, llm.eval, llm._create_completion = generate_within, evaluate_by_batches, create_within
