"""The most tokens a second that a memory can feed: arithmetic, not a measurement and not a forecast.

Writing one token reads every weight once (of the token embedding one row, unless it is also the output matrix), so no
runtime can be faster than bandwidth / bytes read a token. Real phones stay below it: the processor, heat and the key-
value cache (not counted here) come on top.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.models.gguf_file import read_tensors


@dataclass(frozen=True)
class Memory:
    """A phone's memory.

    Attributes:
        name: of the memory, with a processor that has it where one is meant.
        transfers: a second and line, millions.
        lines: width of the bus, bits.
        source: where rate and width are stated.
    """

    name: str
    transfers: int
    lines: int
    source: str

    @property
    def bandwidth(self) -> float:
        """Bytes a second: transfers × lines / 8."""
        return self.transfers * 1e6 * self.lines / 8


MEMORIES = (
    Memory("LPDDR4X-4266, 2 × 16 bit", 4266, 32, "JEDEC JESD209-4-1; two channels, usual in low-priced phones"),
    Memory("LPDDR5-6400, 4 × 16 bit", 6400, 64, "JEDEC JESD209-5; four channels"),
    Memory("Snapdragon 8 Gen 3, LPDDR5X at 4800 MHz", 9600, 64, "Qualcomm's specification; four channels of 16 bit"),
)


def read_bytes(path: Path, tensor_bytes: int) -> int:
    """Bytes of a GGUF file that writing one token reads: every weight, of a separate token embedding one row."""
    import gguf

    tensors = {tensor.name: tensor for tensor in read_tensors(path)}
    if "output.weight" not in tensors:  # the embedding is the output matrix too
        return tensor_bytes
    table = tensors["token_embd.weight"]
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(table.type)]
    rows, columns = table.shape
    return tensor_bytes - (rows - 1) * (columns // block * size)


def ceilings(files: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For every GGUF file "type", "megabytes" read a token, and "tokens_per_second" by name of the memory."""
    return [
        {
            "type": entry["type"],
            "megabytes": entry["read_bytes"] / 1e6,
            "tokens_per_second": {memory.name: memory.bandwidth / entry["read_bytes"] for memory in MEMORIES},
        }
        for entry in files
        if entry["read_bytes"]
    ]
