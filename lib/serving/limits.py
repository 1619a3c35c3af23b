"""What a request may ask of the server, checked before any of it reaches the model."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from lib.serving.asking import RefusedError, check_sampling
from lib.serving.hosts import names_loopback

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
