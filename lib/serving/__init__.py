"""A GGUF file behind the OpenAI protocol, for programs on this machine."""

from __future__ import annotations

from lib.serving.server import ServeOptions, serve

__all__ = ["ServeOptions", "serve"]
