"""What a request may ask of the server, checked before any of it reaches the model; and what its answer may cost."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ValidationInfo

from lib.runs.files import data_file, once
from lib.serve.generation import SAID, THINKING, WORK, Work
from lib.serve.listening import names_loopback

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Send

CHAT, COMPLETION, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"

LARGEST_BIAS = 1000
"""Of `logit_bias`, either way: far above any difference of logits, far below what a 32-bit float holds."""

_MEMBERS = data_file("serve/http.yaml")
"""Among others: members of requests that are treated otherwise than the rest."""

WAITING = 64
"""Requests that are answered or wait for it; one more is refused."""

BODY_BYTES, _DRAINED = 1 << 20, 64 << 20
"""The largest body; and how much of a larger one is still read, so that the client gets to see the answer."""


class RefusedError(Exception):
    """A request that is answered with an error of the OpenAI protocol."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class Limits:
    """The limits of a server.

    Attributes:
        name: of the model, taken where a request names none; another one is refused.
        created: seconds since 1970, of the model.
        max_tokens: most tokens of an answer, and the number taken where a request names none.
        n_ctx: tokens of prompt and answer together.
        n_vocab: tokens of the vocabulary.
        local: whether requests must name this machine by a loopback name.
    """

    name: str
    created: int
    max_tokens: int
    n_ctx: int
    n_vocab: int
    local: bool


def _invalid(name: str | None, found: str, code: str | None = None) -> RefusedError:
    return RefusedError(400, f"{name} {found}", code or f"invalid_{name}")


def _same(value: Any, other: Any) -> bool:
    """Whether two values are equal, where true is no 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _refuse_unheard(path: str, body: dict[str, Any]) -> None:
    """Refuse members that the inner server would leave out without a word (its schema takes any)."""
    from llama_cpp.server import types

    schema = types.CreateChatCompletionRequest if path == CHAT else types.CreateCompletionRequest
    neutral = _MEMBERS["neutral"]
    for name in body.keys() - schema.model_fields.keys() - set(_MEMBERS["unheard"]):
        if not _same(body[name], neutral[name]) if name in neutral else body[name]:
            raise _invalid(name, f"is {body[name]!r:.80}; this server has no such thing", "unsupported_parameter")


def _thinking(body: dict[str, Any]) -> bool | None:
    """What a request says of reasoning, as clients of other servers say it; both members are taken out of it."""
    asked, value = body.pop("chat_template_kwargs", {}), body.pop("enable_thinking", None)
    if not isinstance(asked, dict) or asked.keys() - {"enable_thinking"}:
        found = f"is {asked!r:.80}; this server knows enable_thinking alone"
        raise _invalid("chat_template_kwargs", found, "unsupported_parameter")
    value = asked.get("enable_thinking", value)
    if value not in (None, True, False):
        raise _invalid("enable_thinking", f"is {value!r:.80}; expected true or false")
    return value


def _not_forced(value: Any, info: ValidationInfo) -> Any:
    if value not in (None, "auto", "none"):
        found = f"is {value!r:.80}; this server cannot force a call, only 'auto' and 'none' are known"
        raise _invalid(info.field_name, found, "unsupported_parameter")
    return value


def _without_schema(value: Any, info: ValidationInfo) -> Any:
    """JSON without a schema, and free to end: what may not end when its grammar says so ends the server."""
    if isinstance(value, dict) and value.get("schema") is not None:
        found = "has a schema; this server knows 'json_object' without one, check the answer yourself"
        raise _invalid("response_format", found, "unsupported_parameter")
    if isinstance(value, dict) and value.get("type") == "json_object" and info.data["min_tokens"]:
        raise _invalid("min_tokens", "does not go with response_format 'json_object'", "unsupported_parameter")
    return value


def _within_vocabulary(value: Any, info: ValidationInfo) -> Any:
    """Ids of the vocabulary (with `logit_bias_type` "tokens" texts), and values that a logit can be added to."""
    n_vocab, texts = info.context.n_vocab, info.data["logit_bias_type"] == "tokens"
    for key, bias in value.items() if isinstance(value, dict) else ():
        number = int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else -1
        if not texts and not 0 <= number < n_vocab:
            raise _invalid("logit_bias", f"names {key!r}; expected token ids from 0 to {n_vocab - 1}")
        if not isinstance(bias, (int, float)) or not abs(bias) <= LARGEST_BIAS:
            found = f"of {key!r} is {bias!r}; expected a number from -{LARGEST_BIAS} to {LARGEST_BIAS}"
            raise _invalid("logit_bias", found)
    return value


def _between(low: float, high: float | None, *kinds: type, code: str | None = None) -> AfterValidator:
    """A number of one of these types within limits; without a limit at most the tokens of an answer."""
    kind = "number" if float in kinds else "whole number"

    def check(value: Any, info: ValidationInfo) -> Any:
        most = info.context.max_tokens if high is None else high
        if value is not None and (type(value) not in kinds or not low <= value <= most):
            raise _invalid(info.field_name, f"is {value!r}; expected a {kind} from {low} to {most}", code)
        return value

    return AfterValidator(check)


_TOKENS = _between(1, None, int, code="invalid_max_tokens")


def _no_empty_text(value: Any, info: ValidationInfo) -> Any:
    if "" in (value if isinstance(value, list) else [value]):
        raise _invalid(info.field_name, "holds an empty text, which every answer begins with; leave it out")
    return value


class Asked(BaseModel):
    """What a request asks of the sampler; further keys are the inner server's. The context holds the `Limits`.

    llama.cpp is in the server's process and ends it where a grammar cannot be read (a null pointer), and also where one
    can be read but leaves no token to choose from (`[z-a]`). So no grammar is made of a client's words; that of any
    JSON object is llama-cpp-python's own and always has a way on.

    Raises:
        RefusedError: status 400, for what the sampler cannot do, or does not survive.
    """

    tool_choice: Annotated[Any, AfterValidator(_not_forced)] = None
    function_call: Annotated[Any, AfterValidator(_not_forced)] = None
    min_tokens: Annotated[Any, _between(0, 2**31 - 1, int)] = None
    top_k: Annotated[Any, _between(0, 2**31 - 1, int)] = None
    seed: Annotated[Any, _between(-(2**63), 2**63 - 1, int)] = None
    stop: Annotated[Any, AfterValidator(_no_empty_text)] = None
    response_format: Annotated[Any, AfterValidator(_without_schema)] = None
    temperature: Annotated[Any, _between(0, 2, int, float)] = None
    repeat_penalty: Annotated[Any, _between(0.1, 10, int, float)] = None
    logit_bias_type: Any = None
    logit_bias: Annotated[Any, AfterValidator(_within_vocabulary)] = None
    max_tokens: Annotated[Any, _TOKENS] = None
    max_completion_tokens: Annotated[Any, _TOKENS] = None


class LimitedApplication:
    """An ASGI application in front of another one.

    Args:
        inner: the server.
        count: (path, body) → tokens of the prompt; raises ValueError for messages that the template refuses.
    """

    def __init__(self, inner: ASGIApp, limits: Limits, count: Callable[[str, dict[str, Any]], int]) -> None:
        self._inner, self._limits, self._count = inner, limits, count
        self._asked: set[Work] = set()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        from starlette.datastructures import MutableHeaders
        from starlette.requests import Request
        from starlette.responses import JSONResponse

        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            self._check_host(request)
            if request.method == "GET" and scope["path"].startswith(MODELS):
                await JSONResponse(self._models(scope["path"]))(scope, receive, send)
                return
            body = await self._checked(scope["path"], await self._read(request))
        except RefusedError as error:
            refusal = {"error": error_body(error.message, error.code)}
            await JSONResponse(refusal, error.status)(scope, receive, send)
            return
        encoded = json.dumps(body).encode("utf-8")
        scope = {**scope, "headers": list(scope["headers"])}
        MutableHeaders(scope=scope)["content-length"] = str(len(encoded))
        await self._work(Work(body["max_tokens"]), scope, encoded, receive, send)

    async def _work(self, work: Work, scope: dict[str, Any], body: bytes, receive: Receive, send: Send) -> None:
        """The inner server's answer; nothing is done any more for a client that has gone."""
        from starlette.responses import JSONResponse

        begun, last, left = False, None, asyncio.Event()

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self._end(work)
            left.set()

        async def sent(message: Message) -> None:
            nonlocal begun, last
            begun = True
            if message["type"] == "http.response.body" and not message.get("more_body"):
                last = message  # a stream ends before the inner server says that its work has failed
            else:
                await send(message)

        WORK.set(work)
        self._asked.add(work)
        watcher = asyncio.create_task(watch())
        try:
            await self._inner(scope, _replay(body, left), sent)
            if last:
                await send(last)
        except Exception as error:
            status, said = failure(error.exceptions[0] if isinstance(error, ExceptionGroup) else error)
            if begun:  # a stream
                text = f"data: {json.dumps({'error': said})}\n\n".encode()
                await send({"type": "http.response.body", "body": text, "more_body": False})
            else:
                await JSONResponse({"error": said}, status)(scope, receive, send)
        finally:
            self._end(work)
            watcher.cancel()

    def _end(self, work: Work) -> None:
        work.gone.set()
        self._asked.discard(work)

    def _check_host(self, request: Request) -> None:
        hosts = request.headers.getlist("host")
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

    async def _read(self, request: Request) -> bytes:
        """The body of a request for an answer."""
        from starlette.requests import ClientDisconnect

        path = request.scope["path"]
        if path not in (CHAT, COMPLETION):
            raise RefusedError(404, f"no {path}; there are {CHAT}, {COMPLETION} and {MODELS}", "not_found")
        if request.method != "POST":
            raise RefusedError(405, f"{path} takes POST", "method_not_allowed")
        body, size = bytearray(), 0
        try:
            async for part in request.stream():
                size += len(part)
                if size <= BODY_BYTES:
                    body += part
                elif size > _DRAINED:
                    break
        except ClientDisconnect:
            raise RefusedError(400, "the body ended early") from None
        if size > BODY_BYTES:
            text = f"the body has more than {BODY_BYTES} bytes, which is the limit"
            raise RefusedError(413, text, "request_too_large")
        if not request.headers.get("content-type", "").lower().startswith("application/json"):
            raise RefusedError(415, "the body must be application/json", "unsupported_media_type")
        return bytes(body)

    async def _checked(self, path: str, raw: bytes) -> dict[str, Any]:
        """The body with `max_tokens` within the limit, and no penalty that the protocol does not know."""
        from starlette.concurrency import run_in_threadpool

        gc.disable()  # brackets in brackets exhaust the stack: a destructor that ran at its end would fail
        try:
            body = without_nulls(json.loads(raw, parse_constant=_no_number, object_pairs_hook=once))
            json.dumps(body, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text
        except (ValueError, RecursionError) as error:
            raise RefusedError(400, f"the body is not JSON: {error}", "invalid_json") from None
        finally:
            gc.enable()
        if not isinstance(body, dict):
            raise RefusedError(400, "the body is not a JSON object", "invalid_json")
        if len(self._asked) >= WAITING:
            raise RefusedError(503, f"{WAITING} requests are waiting already; ask again later", "overloaded")
        for name, nothing in _MEMBERS["refused"].items():
            if not _same(value := body.pop(name, nothing), nothing):
                raise _invalid(name, f"is {value!r}; this server has no such thing", "unsupported_parameter")
        THINKING.set(_thinking(body) if path == CHAT else None)
        _refuse_unheard(path, body)
        SAID.set({name: body[name] for name in _MEMBERS["said"] if name in body})
        for tool in tools if isinstance(tools := body.get("tools"), list) else ():
            if isinstance(tool, dict) and isinstance(tool.get("function"), dict):
                tool["function"].setdefault("parameters", {})  # the inner server asks for what the protocol lets out
        asked = Asked.model_validate(body, context=self._limits)
        body["model"] = body.get("model") or self._limits.name
        self._check_model(body["model"])
        body.setdefault("repeat_penalty", 1.0)  # the inner server's 1.1 would change greedy answers
        body.pop("max_completion_tokens", None)
        body["max_tokens"] = asked.max_completion_tokens or asked.max_tokens or self._limits.max_tokens
        try:
            tokens = await run_in_threadpool(self._count, path, body)
        except ValueError as error:
            raise RefusedError(400, str(error), "invalid_messages") from None
        if path == CHAT:  # the inner server knows parts of some roles
            body["messages"] = [
                {**said, "content": text_of(said.get("content", ""))} for said in body.get("messages", [])
            ]
        if tokens >= self._limits.n_ctx:
            text = f"the prompt has {tokens} tokens; the context holds {self._limits.n_ctx} with the answer"
            raise RefusedError(400, text, "context_length_exceeded")
        return body


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def without_nulls(value: Any) -> Any:
    """A JSON value without its null members: in the protocol they say no more than absent ones."""
    if isinstance(value, list):
        return [without_nulls(part) for part in value]
    if not isinstance(value, dict):
        return value
    kept = {key: part for key, part in value.items() if part is not None}
    return {key: part if key in _MEMBERS["data"] else without_nulls(part) for key, part in kept.items()}


def text_of(content: Any) -> str | None:
    """A message's text; of several parts, as clients may send them, one after the other; None where one is no text."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [
        part["text"]
        for part in parts
        if isinstance(part, dict)
        and isinstance(part.get("text"), str)
        and part.get("type", "text") in _MEMBERS["texts"]
    ]
    return "".join(texts) if parts and len(texts) == len(parts) else None


def _replay(body: bytes, left: asyncio.Event) -> Receive:
    """A channel that gives the checked body first, and the end of the connection when the client has left."""
    first = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        if first:
            return first.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    return again


def error_body(message: str, code: str | None, kind: str = "invalid_request_error") -> dict[str, Any]:
    """An error as the OpenAI protocol writes it."""
    return {"message": message, "type": kind, "param": None, "code": code}


def failure(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and error of the protocol for what the inner server raised; no traceback for what a client sent.

    What a machine has too little of, and what llama.cpp says of its own work, is no fault of the client.
    """
    if isinstance(error, (RuntimeError, MemoryError, OSError)) and not isinstance(error, RecursionError):
        print(f"The server failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 500, error_body("internal error", None, "internal_server_error")
    return 400, error_body(str(error) or type(error).__name__, "invalid_request")
