"""Which addresses and names only this machine answers to.
What a request may ask of the sampler: nothing that could end the whole server, llama.cpp being in its process.
What a request may ask of the server, checked before any of it reaches the model.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

# Which addresses and names only this machine answers to.


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def names_loopback(header: str) -> bool:
    """Whether a request's Host is this machine by a loopback name.

    A page of the web whose name was pointed to 127.0.0.1 (DNS rebinding) is of the same origin for a browser, and
    would read every answer; but its requests bear its own name.
    """
    try:
        return is_loopback(urlsplit(f"//{header}").hostname or "")
    except ValueError:
        return False


# What a request may ask of the sampler: nothing that could end the whole server, llama.cpp being in its process.

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


# What a request may ask of the server, checked before any of it reaches the model.

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]

CHAT, COMPLETION, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"

_DRAINED = 64 << 20
"""Bytes of a refused body that are still read, so that the client gets to see the answer."""


@dataclass(frozen=True)
class Limits:
    """The limits of a server.

    Attributes:
        name: of the model, taken where a request names none; another one is refused.
        created: seconds since 1970, of the model.
        body_bytes: largest body of a request.
        max_tokens: most tokens of an answer, and the number taken where a request names none.
        n_ctx: tokens of prompt and answer together.
        n_vocab: tokens of the vocabulary.
        local: whether requests must name this machine by a loopback name.
    """

    name: str
    created: int
    body_bytes: int
    max_tokens: int
    n_ctx: int
    n_vocab: int
    local: bool


class LimitedApplication:
    """An ASGI application in front of another one.

    Args:
        inner: the server.
        count: (path, body) → tokens of the prompt; raises ValueError for messages that the template refuses.
    """

    def __init__(self, inner: Application, limits: Limits, count: Callable[[str, dict[str, Any]], int]) -> None:
        self._inner, self._limits, self._count = inner, limits, count

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        try:
            self._check_host(scope)
            if scope["method"] == "GET" and scope["path"].startswith(MODELS):
                await _answer(send, 200, self._models(scope["path"]))
                return
            raw = await self._body(scope, receive)
            body = await self._checked(scope["path"], raw)
        except RefusedError as error:
            await _answer(send, error.status, {"error": error_body(error.message, error.code)})
            return
        encoded = json.dumps(body).encode("utf-8")
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
        headers.append((b"content-length", str(len(encoded)).encode()))
        await self._inner({**scope, "headers": headers}, _replay(encoded, receive), send)

    def _check_host(self, scope: dict[str, Any]) -> None:
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name.lower() == b"host"]
        if self._limits.local and not all(map(names_loopback, hosts)):
            text = f"no {hosts[0]!r} here: this server listens to this machine alone, as localhost (see --host)"
            raise RefusedError(421, text, "misdirected_request")

    def _models(self, path: str) -> dict[str, Any]:
        """The list of the one model, or the model itself. (The inner server's list has no time of making.)"""
        model = {"id": self._limits.name, "object": "model", "created": self._limits.created, "owned_by": "workbook"}
        if path == MODELS:
            return {"object": "list", "data": [model]}
        self._check_model(path.removeprefix(MODELS + "/"))
        return model

    def _check_model(self, asked: Any) -> None:
        if asked != self._limits.name:
            raise RefusedError(404, f"no model {asked!r}; there is {self._limits.name!r}", "model_not_found")

    async def _body(self, scope: dict[str, Any], receive: Receive) -> bytes:
        if scope["path"] not in (CHAT, COMPLETION):
            raise RefusedError(404, f"no {scope['path']}; there are {CHAT}, {COMPLETION} and {MODELS}", "not_found")
        if scope["method"] != "POST":
            raise RefusedError(405, f"{scope['path']} takes POST", "method_not_allowed")
        headers = {name.lower(): value for name, value in scope["headers"]}
        body, size, more = bytearray(), 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RefusedError(400, "the body ended early")
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            if size <= self._limits.body_bytes:
                body += part
            elif size > _DRAINED:
                break
        if size > self._limits.body_bytes:
            text = f"the body has more than {self._limits.body_bytes} bytes, which is the limit"
            raise RefusedError(413, text, "request_too_large")
        if not headers.get(b"content-type", b"").lower().startswith(b"application/json"):
            raise RefusedError(415, "the body must be application/json", "unsupported_media_type")
        return bytes(body)

    async def _checked(self, path: str, raw: bytes) -> dict[str, Any]:
        """The body with `max_tokens` within the limit, and no penalty that the protocol does not know."""
        from starlette.concurrency import run_in_threadpool

        try:
            body = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise RefusedError(400, f"the body is not JSON: {error}", "invalid_json") from None
        if not isinstance(body, dict):
            raise RefusedError(400, "the body is not a JSON object", "invalid_json")
        check_sampling(body, self._limits.n_vocab)
        body["model"] = body.get("model") or self._limits.name
        self._check_model(body["model"])
        body.setdefault("repeat_penalty", 1.0)  # the inner server's 1.1 would change greedy answers
        most = body.pop("max_completion_tokens", None)
        most = body.get("max_tokens") if most is None else most
        body["max_tokens"] = self._limits.max_tokens if most is None else self._tokens(most)
        try:
            tokens = await run_in_threadpool(self._count, path, body)
        except ValueError as error:
            raise RefusedError(400, str(error), "invalid_messages") from None
        if tokens >= self._limits.n_ctx:
            text = f"the prompt has {tokens} tokens; the context holds {self._limits.n_ctx} with the answer"
            raise RefusedError(400, text, "context_length_exceeded")
        return body

    def _tokens(self, asked: Any) -> int:
        if not isinstance(asked, int) or isinstance(asked, bool) or not 1 <= asked <= self._limits.max_tokens:
            text = f"max_tokens is {asked!r}; expected a whole number from 1 to {self._limits.max_tokens}"
            raise RefusedError(400, text, "invalid_max_tokens")
        return asked


def _replay(body: bytes, receive: Receive) -> Receive:
    """A channel that gives the checked body first, and then what the client does."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def error_body(message: str, code: str | None, kind: str = "invalid_request_error") -> dict[str, Any]:
    """An error as the OpenAI protocol writes it."""
    return {"message": message, "type": kind, "param": None, "code": code}


async def _answer(send: Send, status: int, value: dict[str, Any]) -> None:
    content = json.dumps(value).encode("utf-8")
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
