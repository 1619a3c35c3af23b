"""What a request may ask of the sampler: nothing that could end the whole server, llama.cpp being in its process."""

from __future__ import annotations

from typing import Any

UNSUPPORTED = "unsupported_parameter"
LARGEST_BIAS = 1000
"""Of `logit_bias`, either way: far above any difference of logits, far below what a 32-bit float holds."""

_LARGEST_PENALTY = 10


class RefusedError(Exception):
    """A request that is answered with an error of the OpenAI protocol."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def check_sampling(body: dict[str, Any], n_vocab: int) -> None:
    """Refuse what the sampler cannot do, or does not survive.

    llama.cpp ends the process where a grammar cannot be read (a null pointer), and also where one can be read but
    leaves no token to choose from (`[z-a]`). So no grammar is made of a client's words; that of any JSON object is
    llama-cpp-python's own and always has a way on.

    Raises:
        RefusedError: status 400.
    """
    for name, only in (("logprobs", None), ("top_logprobs", None), ("n", 1), ("best_of", 1), ("grammar", None)):
        if body.get(name) and body[name] != only:
            raise RefusedError(400, f"{name} is {body[name]!r}; this server has no such thing", UNSUPPORTED)
    for name in ("tool_choice", "function_call"):
        if isinstance(body.get(name), dict):
            text = f"{name} names a function; this server cannot force one, only 'auto' and 'none' are known"
            raise RefusedError(400, text, UNSUPPORTED)
    _check_format(body)
    _within(body, "temperature", 0, 2)
    _within(body, "repeat_penalty", 0.1, _LARGEST_PENALTY)
    if isinstance(body.get("logit_bias"), dict):
        _check_bias(body["logit_bias"], n_vocab, body.get("logit_bias_type") == "tokens")


def _check_format(body: dict[str, Any]) -> None:
    """JSON without a schema, and free to end: what may not end when its grammar says so ends the server."""
    form = body.get("response_format")
    if not isinstance(form, dict):
        return
    if form.get("schema") is not None:
        text = "response_format has a schema; this server knows 'json_object' without one, check the answer yourself"
        raise RefusedError(400, text, UNSUPPORTED)
    if form.get("type") == "json_object" and body.get("min_tokens"):
        raise RefusedError(400, "min_tokens does not go with response_format 'json_object'", UNSUPPORTED)


def _within(body: dict[str, Any], name: str, low: float, high: float) -> None:
    value = body.get(name)
    if value is not None and not (isinstance(value, (int, float)) and low <= value <= high):
        raise RefusedError(400, f"{name} is {value!r}; expected a number from {low} to {high}", f"invalid_{name}")


def _check_bias(bias: dict[str, Any], n_vocab: int, texts: bool) -> None:
    """Ids of the vocabulary (with `logit_bias_type` "tokens" texts), and values that a logit can be added to."""
    for key, value in bias.items():
        number = int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else -1
        if not texts and not 0 <= number < n_vocab:
            text = f"logit_bias names {key!r}; expected token ids from 0 to {n_vocab - 1}"
            raise RefusedError(400, text, "invalid_logit_bias")
        if not isinstance(value, (int, float)) or not abs(value) <= LARGEST_BIAS:
            text = f"logit_bias of {key!r} is {value!r}; expected a number from -{LARGEST_BIAS} to {LARGEST_BIAS}"
            raise RefusedError(400, text, "invalid_logit_bias")
