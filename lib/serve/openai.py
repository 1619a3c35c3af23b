"""`workbook serve`: llama-cpp-python's OpenAI-compatible server for one GGUF file, with its own template and limits."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError, missing_library, refusal, refusing
from lib.models.base_model import refuse_bad_template
from lib.models.gguf_file import check_model_gguf, read_metadata
from lib.models.gguf_tokenizer import refuse_bad_vocabulary
from lib.models.unpack_source import Keys
from lib.runs.child import run_child
from lib.runs.files import data_file
from lib.runs.machine import has_module, llama_cpp_problem, physical_cores
from lib.serve.generation import SAID, THINKING, bound
from lib.serve.limits import CHAT, LimitedApplication, Limits, error_body, failure, text_of
from lib.serve.listening import ServeOptions, in_address, is_loopback, listen, make_server

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_CONTROL = 3
"""Type of tokens that are not text: <|im_start|> and its like."""


ROLES = ("system", "user", "assistant", "tool")
TOOLS = {"tools": "tool_choice", "functions": "function_call"}
"""Members of a request, besides the messages, whose texts a template may write, and the member that says "none"."""
CALLS = ("tool_calls", "function_call", "prefix", "partial")
"""Members of a message that a template may leave out: calls, and that the answer goes on from this message."""


def control_tokens(metadata: Mapping[str, Any]) -> list[str]:
    """The texts of a GGUF file's control tokens."""
    types = metadata.get("tokenizer.ggml.token_type") or []
    names = metadata.get("tokenizer.ggml.tokens") or []
    return [name for name, kind in zip(names, types, strict=False) if kind == _CONTROL and len(name) > 1]


def make_formatter(template: str, thinking: bool, begin: str, end: str, end_id: int, control: Sequence[str]) -> Any:
    """A chat formatter for llama-cpp-python.

    Args:
        template: Jinja, of the file.
        thinking: whether a template that knows both ways asks for reasoning, where a request does not say it.
        begin, end, end_id: special tokens of the file.
        control: texts that no message may hold as they are: a space is put into them.
    """
    from jinja2 import TemplateError
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    refused = (TemplateError, TypeError, AttributeError, KeyError)

    class Formatter(Jinja2ChatFormatter):
        def __call__(self, *, messages: Sequence[Mapping[str, Any]], **keywords: Any) -> Any:
            said = {**keywords, "messages": messages, **(SAID.get() or {})}
            told = {name: defused(said[name]) for name in TOOLS if said.get(name)}
            asked = THINKING.get()
            if asked is not None and "enable_thinking" not in template and (asked or "<think>" in template):
                raise ValueError(f"enable_thinking is {asked}, and the chat template of this model knows one way only")
            told["enable_thinking"] = thinking if asked is None else asked
            messages = [harmless(message) for message in said["messages"]]
            try:
                answer = super().__call__(messages=messages, **keywords | told)
            except refused as error:
                raise ValueError(f"the chat template refuses these messages: {error}") from None
            for name in (name for name, choice in TOOLS.items() if told.get(name) and said.get(choice) != "none"):
                self._refuse_unwritten(name, answer.prompt, messages, {**keywords, **told, name: None})
            if any(message["role"] == "system" and message["content"] for message in messages):
                others = [message for message in messages if message["role"] != "system"]
                self._refuse_unwritten("messages of the system", answer.prompt, others, {**keywords, **told})
            for name in (name for name in CALLS if any(message.get(name) for message in messages)):
                without = [{key: value for key, value in message.items() if key != name} for message in messages]
                self._refuse_unwritten(name, answer.prompt, without, {**keywords, **told})
            return answer

        def _refuse_unwritten(self, name: str, prompt: str, messages: list[Any], keywords: dict[str, Any]) -> None:
            """Refuse a member without which the template writes the same prompt: the model would not hear of it."""
            with contextlib.suppress(*refused):
                if super().__call__(messages=messages, **keywords).prompt == prompt:
                    raise ValueError(f"{name}: the chat template of this model does not write them")

    def harmless(message: Any) -> dict[str, Any]:
        role = message.get("role") if isinstance(message, Mapping) else None
        content = text_of(message.get("content", "" if role == "assistant" else None)) if role else None
        if content is None:
            raise ValueError("each of messages must be an object with role and content, both texts")
        if role not in ROLES:
            raise ValueError(f"no role {role!r}; there are {', '.join(ROLES)}")
        aliased = {"reasoning_content": message["reasoning"]} if "reasoning" in message else {}
        return defused({**aliased, **message, "content": content})

    def defused(value: Any) -> Any:
        """Texts inside tools and calls of them, too, and names of parameters."""
        if isinstance(value, Mapping):
            return {defused(key): defused(part) for key, part in value.items()}
        if isinstance(value, list):
            return [defused(part) for part in value]
        for token in control if isinstance(value, str) else ():
            value = value.replace(token, token[:1] + " " + token[1:])
        return value

    return Formatter(template, eos_token=end, bos_token=begin, stop_token_ids=[end_id])


NEEDS = ("fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings")
_ANSWER_BYTES = 64 << 20
"""More than any answer: the model never waits for a client to read."""
_CONTEXT = 4096
_TEMPLATE = "tokenizer.chat_template"


def serve(path: Path | str, options: ServeOptions, tell: Callable[[str], None]) -> None:
    """Serve a file until SIGTERM or Ctrl-C.

    Args:
        tell: gets the address when the server listens, and a warning where others can reach it.

    Raises:
        InputError: packages that are absent, a file without a chat template or that llama.cpp refuses, an address
            that cannot be used.
    """
    if missing := [name for name in NEEDS if not has_module(name)]:
        raise missing_library(*missing)
    if problem := llama_cpp_problem():
        raise InputError(f"llama-cpp-python: {problem}.", "a working llama-cpp-python.", "see workbook doctor.")
    path = check_model_gguf(path).resolve()
    metadata = read_metadata(path)
    if not metadata.get(_TEMPLATE):
        raise refusal("serve/no-template", path=path, key=_TEMPLATE)
    refuse_bad_vocabulary(metadata, path)
    refuse_bad_template(path, system_turn=False)
    with listen(options.host, options.port) as listening:
        application = make_application(path, metadata, options)
        if not is_loopback(options.host):
            tell(data_file("serve/sentences.yaml")["open"].format(host=options.host))
        address = f"http://{in_address(options.host)}:{listening.getsockname()[1]}/v1"
        words = f"{path.name} is served at {address} (end with Ctrl-C)."
        server = make_server(application, lambda: tell(words), _ANSWER_BYTES, log_level="error")
        try:
            server.run(sockets=[listening])
        finally:
            _free_model()


def make_application(path: Path, metadata: Mapping[str, Any], options: ServeOptions) -> ASGIApp:
    """The server as an ASGI application, with the model loaded.

    Raises:
        InputError: llama.cpp refuses the file.
    """
    from llama_cpp.server import app as server
    from llama_cpp.server.settings import ModelSettings, ServerSettings
    from starlette.middleware.cors import CORSMiddleware

    n_ctx = _context(Keys(metadata, path).whole("context_length"), options.n_ctx)
    model = ModelSettings(
        model=str(path),
        model_alias=path.stem,
        n_ctx=n_ctx,
        n_threads=options.n_threads or physical_cores(),
        n_threads_batch=options.n_threads or physical_cores(),
        n_gpu_layers=options.n_gpu_layers,
        use_mlock=False,
        flash_attn=True,  # as llama.cpp's own programs choose it
        logits_all=False,  # else context × vocabulary × 4 bytes: gigabytes for a Qwen
        verbose=False,
    )
    argument = {"path": path, **vars(options)}  # what ends llama.cpp ends a child
    run_child("lib.scoring.measure:try_prompt", argument, f"a prompt of {path.name}", heard=lambda _: None)
    os.environ.pop("CONFIG_FILE", None)  # the server would take the model that it names
    with refusing(ValueError, "serve/no-model", path=path, n_ctx=n_ctx):
        application = server.create_app(None, ServerSettings(interrupt_requests=False), [model])
    application.user_middleware = [m for m in application.user_middleware if m.cls is not CORSMiddleware]
    server.RouteErrorHandler.error_message_wrapper = _explained
    llm = server._llama_proxy()
    bound(llm)
    begin, end = llm.token_bos(), llm.token_eos()
    marks = [llm._model.token_get_text(number) if number >= 0 else "" for number in (begin, end)]
    template = str(metadata[_TEMPLATE])
    formatter = make_formatter(template, options.thinking, *marks, end, control_tokens(metadata))
    llm.chat_handler = formatter.to_chat_handler()
    made, most = int(path.stat().st_mtime), min(options.max_tokens, n_ctx)
    limits = Limits(path.stem, made, most, n_ctx, llm.n_vocab(), is_loopback(options.host))
    return LimitedApplication(application, limits, _counter(llm, formatter))


def _context(trained: int, asked: int) -> int:
    """Tokens of context: as asked, within what the model was made for; 0 = that, at most 4096."""
    if asked > trained:
        raise InputError(f"--n-ctx {asked}.", f"at most {trained}, which the model was made for.", "ask for less.")
    return asked or min(_CONTEXT, trained)


def _counter(llm: Any, formatter: Any) -> Callable[[str, dict[str, Any]], int]:
    """(path, body) → tokens of the prompt."""

    def count(path: str, body: dict[str, Any]) -> int:
        if path != CHAT:
            prompt = body.get("prompt", "")
            texts = prompt if isinstance(prompt, list) else [prompt]
            if len(texts) != 1 or not all(isinstance(text, str) and text for text in texts):
                raise ValueError("prompt must be one text")
            return sum(len(llm.tokenize(text.encode("utf-8"), special=True)) for text in texts) + 1
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise ValueError("messages must be a list with at least one message")
        rendered = formatter(messages=messages, **{key: body.get(key) for key in TOOLS}).prompt
        return len(llm.tokenize(rendered.encode("utf-8"), add_bos=False, special=True))

    return count


def _explained(self: Any, error: Exception, body: Any = None) -> tuple[int, dict[str, Any]]:
    """Status and error of the OpenAI protocol for what the server raised; no traceback for what a client sent."""
    from fastapi.exceptions import RequestValidationError

    if isinstance(error, RequestValidationError):
        errors = error.errors()
        others = {e["loc"][:-1] for e in errors if e["loc"][-1] == "role"}  # of other roles' messages
        found = next((e for e in errors if not any(e["loc"][: len(other)] == other for other in others)), errors[0])
        place = ".".join(str(part) for part in found["loc"] if not str(part).startswith("ChatCompletion"))
        return 400, error_body(f"{place}: {found['msg']}", "invalid_request")
    return failure(error)


def _free_model() -> None:
    from llama_cpp.server import app as server

    if server.llama_inner_lock.locked():  # a thread is still inside llama.cpp: freeing the model would crash it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(143)
    server._llama_proxy.free()
