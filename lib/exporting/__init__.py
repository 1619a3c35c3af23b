"""Exporting: the merged model in formats that transformers loads, beside the GGUF ladder.

- `export` is the stage: one folder a format, product `exports`.
- `lib.exporting.formats` says what the formats are and which of them this machine can make.

Each format is made in a process of its own, so that its memory is its own and a library that fails ends only itself.
"""

from lib.exporting.stage import ExportsResult, export

__all__ = ["ExportsResult", "export"]
