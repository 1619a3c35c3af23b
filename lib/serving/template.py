"""The file's own chat template for llama-cpp-python, which would else guess one by the template's look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_CONTROL = 3
"""Type of tokens that are not text: <|im_start|> and its like."""


ROLES = ("system", "user", "assistant", "tool")


def _text(content: Any) -> str | None:
    """A message's text; of several parts, as clients may send them, one after the other; None where one is no text."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
    return "".join(texts) if parts and len(texts) == len(parts) else None


def control_tokens(metadata: Mapping[str, Any]) -> list[str]:
    """The texts of a GGUF file's control tokens."""
    types = metadata.get("tokenizer.ggml.token_type") or []
    names = metadata.get("tokenizer.ggml.tokens") or []
    return [name for name, kind in zip(names, types, strict=False) if kind == _CONTROL and len(name) > 1]


def make_formatter(template: str, thinking: bool, begin: str, end: str, end_id: int, control: Sequence[str]) -> Any:
    """A chat formatter for llama-cpp-python.

    Args:
        template: Jinja, of the file.
        thinking: whether a template that knows both ways asks for reasoning.
        begin, end, end_id: special tokens of the file.
        control: texts that no message may hold as they are: a space is put into them.
    """
    from jinja2 import TemplateError
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    class Formatter(Jinja2ChatFormatter):
        def __call__(self, *, messages: Sequence[Mapping[str, Any]], **keywords: Any) -> Any:
            try:
                return super().__call__(messages=[harmless(message) for message in messages], **keywords)
            except (TemplateError, TypeError, AttributeError, KeyError) as error:
                raise ValueError(f"the chat template refuses these messages: {error}") from None

    def harmless(message: Any) -> dict[str, Any]:
        content = _text(message["content"]) if isinstance(message, Mapping) and "content" in message else None
        if content is None:
            raise ValueError("each of messages must be an object with role and content, both texts")
        if message.get("role") not in ROLES:
            raise ValueError(f"no role {message.get('role')!r}; there are {', '.join(ROLES)}")
        for token in control:
            content = content.replace(token, token[:1] + " " + token[1:])
        return {**message, "content": content}

    switch = f"{{%- set enable_thinking = {str(thinking).lower()} -%}}"
    return Formatter(switch + template, eos_token=end, bos_token=begin, stop_token_ids=[end_id])
