"""How fast a GGUF file is: here, at most in a phone's memory, and on the real phones that measured it.

A phone's result is checked key by key, because anybody with the address can send it.
"""

from __future__ import annotations

import datetime as dt
import json
import re
import secrets
import statistics
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import InputError, refusal, refusing
from lib.models.gguf_file import read_metadata, read_tensors
from lib.runs.files import data_file, sha256_file, write_json
from lib.runs.run import Run
from lib.scoring.backend import Feed
from lib.scoring.llama_backend import LlamaCppBackend

_TABLES = data_file("stages/compare/phones.yaml")

# How fast a GGUF file is here: loading, reading a prompt, writing tokens. For child processes only.

PROMPT_TOKENS = 128
GENERATED_TOKENS = 32
_FEWEST, _MOST, _SECONDS = 5, 25, 0.5
"""Timed repeats: at least the first number, then more until the time is up or the second number is reached."""
LOADS = (3, 5, 5.0)
"""The same for loading: fewest, most, seconds."""


def measure(path: Path, prompt: Sequence[int], n_threads: int, n_gpu_layers: int) -> dict[str, Any]:
    """Time one file; the first run of each kind is a warm-up and not counted.

    Args:
        prompt: token ids; the first 128 are used.

    Returns:
        "file_type" (header number), "size_budget" (bytes; None for a recipe), "weights", "tensor_bytes" and "speed"
        (see `rates`: loading is that of model and context, the file in the page cache).
    """
    ids, metadata = list(prompt[:PROMPT_TOKENS]), read_metadata(path)
    read_once(path)
    place = (path, len(ids) + GENERATED_TOKENS, n_threads, n_gpu_layers)

    def seconds_of_a_load() -> float:
        started = time.perf_counter()
        with LlamaCppBackend(*place):
            return time.perf_counter() - started

    loads = repeat(seconds_of_a_load, *LOADS)
    with LlamaCppBackend(*place) as backend:
        if max(ids) >= backend.vocab_size:
            raise refusal("compare/no-such-token", token=max(ids), path=path, backend=backend)
        weights, tensor_bytes = backend.totals
        times = times_of(backend.new_text, ids)
    return {
        "file_type": _number(metadata.get("general.file_type")),
        "size_budget": _number(metadata.get("quantize.mix.budget_bytes")),
        "weights": weights,
        "tensor_bytes": tensor_bytes,
        "speed": rates(loads, len(ids), *times),
    }


def read_once(path: Path) -> None:
    """Read a file, so that it is in the page cache when loading is timed."""
    with path.open("rb") as stream:
        while stream.read(1 << 22):
            pass


def _number(value: Any) -> int | None:
    """A whole number of the header, which may stand there as a text."""
    return int(value) if re.fullmatch("[0-9]{1,18}", str(value)) else None


def times_of(start: Callable[[], Feed], ids: Sequence[int]) -> tuple[list[float], list[float]]:
    """Seconds of reading a prompt, and of writing tokens behind it, the likeliest each time, whatever it is.

    Args:
        start: gives the feed of a new text (`Backend.new_text`).
    """

    def seconds(tokens: int) -> tuple[float, float]:
        feed, started = start(), time.perf_counter()
        logits = feed(ids)
        read = time.perf_counter() - started
        for _ in range(tokens):
            logits = feed([int(logits.argmax())])
        return read, time.perf_counter() - started - read

    return repeat(lambda: seconds(0)[0]), repeat(lambda: seconds(GENERATED_TOKENS)[1])


def repeat(
    run: Callable[[], float], fewest: int = _FEWEST, most: int = _MOST, seconds: float = _SECONDS
) -> list[float]:
    """Seconds of each timed run, after one that is not counted: at least `fewest`, then more until `seconds` are up or
    there are `most`."""
    run()
    times: list[float] = []
    while len(times) < fewest or (sum(times) < seconds and len(times) < most):
        times.append(run())
    return times


def rates(loads: list[float], prompt_tokens: int, prompts: list[float], written: list[float]) -> dict[str, Any]:
    """What seconds of loading, of reading a prompt and of writing (greedily, 32 tokens after the prompt) say.

    Returns:
        "load_seconds" (median), "load_seconds_range" ([fastest, slowest]), "load_runs"; for prompt and generation
        "…_tokens_per_second" (median), "…_tokens_per_second_range" ([slowest, fastest]) and "…_runs".
    """
    median = statistics.median(loads)
    found = {"load_seconds": median, "load_seconds_range": [min(loads), max(loads)], "load_runs": len(loads)}
    for kind, tokens, times in (("prompt", prompt_tokens, prompts), ("generation", GENERATED_TOKENS, written)):
        per_second = [round(tokens / seconds, 2) for seconds in (statistics.median(times), max(times), min(times))]
        found[f"{kind}_tokens_per_second"], *found[f"{kind}_tokens_per_second_range"] = per_second
        found[f"{kind}_runs"] = len(times)
    return found


# The most tokens a second that a memory can feed: arithmetic, not a measurement and not a forecast.
#
# Writing one token reads every weight once (of the token embedding one row, unless it is also the output matrix), so no
# runtime can be faster than bandwidth / bytes read a token. Real phones stay below it: the processor, heat and the key-
# value cache (not counted here) come on top.


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


MEMORIES = tuple(Memory(**entry) for entry in _TABLES["memories"])


def read_bytes(path: Path, tensor_bytes: int) -> int:
    """Bytes of a GGUF file that writing one token reads: every weight, of a separate token embedding one row."""
    tensors = {tensor.name: tensor for tensor in read_tensors(path)}
    if "output.weight" not in tensors:  # the embedding is the output matrix too
        return tensor_bytes
    table = tensors["token_embd.weight"]
    rows = table.shape[0]
    return tensor_bytes - table.nbytes // rows * (rows - 1)


_CACHED = 32_000_000
"""Bytes that caches of a phone may hold: below, memory bandwidth sets no ceiling."""


def ceilings(files: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For every GGUF file too large for caches "type", "megabytes" a token, and "tokens_per_second" by memory."""
    return [
        {
            "type": entry["type"],
            "megabytes": entry["read_bytes"] / 1e6,
            "tokens_per_second": {memory.name: memory.bandwidth / entry["read_bytes"] for memory in MEMORIES},
        }
        for entry in files
        if entry["read_bytes"] and entry["read_bytes"] >= _CACHED
    ]


# What real phones measured of the compared files: results that `workbook serve --phone` took in, or that were sent.


def measured(run: Run, files: Iterable[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The results in the run's folder devices/.

    Args:
        files: entries of the run's comparison.

    Returns:
        Results with "type", that of the entry whose file has the result's SHA-256, oldest first; a sentence for each
        result that is left out.
    """
    names: dict[str, str] = {}
    for product in ("gguf", "quantized"):
        outputs = run.require(product).entry.outputs
        names |= {output["sha256"]: name for name, output in outputs.items() if name.endswith(".gguf")}
    types = {entry.get("file"): entry["type"] for entry in files}
    names = {digest: name for digest, name in names.items() if name in types}
    found, left_out = [], []
    for path in sorted((run.folder / FOLDER).glob("*.json")):
        try:
            result = match(path, names)
        except InputError as error:
            left_out.append(f"{path.name} is left out. {error}")
        else:
            found.append({**result, "type": types[result["compared"]]})
    return found, left_out


def match(path: Path, names: Mapping[str, str]) -> dict[str, Any]:
    """A phone's result with "compared", the name of the file that it is about.

    Args:
        names: {SHA-256: name} of the compared files.

    Raises:
        InputError: no result, or one about another file.
    """
    result = read_result(path)
    if result["sha256"] not in names:
        raise refusal("compare/other-file", path=path, result=result, compared=", ".join(sorted(names.values())))
    return {**result, "compared": names[result["sha256"]]}


def match_files(results: Sequence[Path], compared: Iterable[Path]) -> list[dict[str, Any]]:
    """The same for files named by hand.

    Raises:
        InputError: as `match`.
    """
    names = {sha256_file(path): path.name for path in compared if path.is_file()} if results else {}
    return [match(path, names) for path in results]


# What a phone's page sends back: checked key by key, because anybody with the address can send it, then saved.


FOLDER = "devices"
"""Of a run: what phones measured."""

MOST_BYTES = 256 << 10
MOST_FILES = 500
MOST_TEXT = 2000
LARGEST = 10**9
"""Largest value of any number: seconds, tokens, tokens a second, nats."""
_LIST = 5000
_HASH = re.compile(r"[0-9a-f]{64}")
_ODD = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories that no device name contains: control characters, lone surrogates, line separators."""
_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the direction of the text after them, in a table even that of other cells."""


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= LARGEST


def is_text(value: Any) -> bool:
    return (
        isinstance(value, str)
        and len(value) <= MOST_TEXT
        and not any(character in _TURNING or unicodedata.category(character) in _ODD for character in value)
    )


_FITS: dict[str, Callable[[Any], bool]] = {
    "count": lambda value: isinstance(value, int) and is_number(value),
    "maybe": lambda value: value is None or is_number(value),
    "numbers": lambda value: isinstance(value, list) and 0 < len(value) <= _LIST and all(map(is_number, value)),
    "flag": lambda value: isinstance(value, bool),
    "text": is_text,
}
"""What is of a kind of values (phones.yaml)."""


def check_result(content: Any) -> dict[str, Any]:
    """The known keys of a result, each of its kind; others are dropped.

    Raises:
        InputError: something is missing or of another kind.
    """
    if not isinstance(content, Mapping) or content.get("format") != 1:
        raise _wrong("format", "1")
    if not isinstance(content.get("sha256"), str) or not _HASH.fullmatch(content["sha256"]):
        raise _wrong("sha256", "64 hexadecimal digits")
    result: dict[str, Any] = {"format": 1}
    for key in ("run", "file", "sha256", "measured"):
        result[key] = _checked(content.get(key), "text", key)
    for section, kinds in _TABLES["result"].items():
        found = content.get(section)
        if not isinstance(found, Mapping):
            raise _wrong(section, "an object")
        result[section] = {key: _checked(found.get(key), kind, f"{section}.{key}") for key, kind in kinds.items()}
    for section, part, whole in _TABLES["parts"]:
        if result[section][part] > result[section][whole]:
            raise _wrong(f"{section}.{part}", f"at most {section}.{whole}")
    return result


def read_result(path: Path) -> dict[str, Any]:
    """A saved or downloaded result, checked.

    Raises:
        InputError: no such file, not JSON, or not a result.
    """
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        raise InputError(f"no result {path}.", "a JSON file from the phone page.", "check the path.")
    # of UTF-8, of JSON, of a number with thousands of digits, of nesting
    with refusing((ValueError, RecursionError), "compare/damaged-result", path=path):
        content = json.loads(path.read_bytes())
    return check_result(content)


def save_result(folder: Path, result: Mapping[str, Any]) -> Path:
    """Write a checked result as <time>-<device>-<random>.json: results that arrive together are all kept.

    Raises:
        InputError: the folder is full, so that nobody can fill the disk with results.
        OSError: the disk does not take it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if sum(1 for _ in folder.iterdir()) >= MOST_FILES:
        raise InputError(f"{MOST_FILES} results are kept already.", "fewer.", "remove some from the run's devices/.")
    slug = re.sub(r"[^a-z0-9]+", "-", result["device"]["name"].lower()).strip("-")[:40] or "device"
    path = folder / f"{dt.datetime.now():%Y%m%d-%H%M%S}-{slug}-{secrets.token_hex(4)}.json"
    write_json(path, result)
    return path


def _checked(value: Any, kind: str, key: str) -> Any:
    if not _FITS[kind](value):
        raise _wrong(key, _TABLES["kinds"][kind].format(largest=LARGEST, longest=MOST_TEXT))
    return value


def _wrong(key: str, expected: str) -> InputError:
    return InputError(f"the result's {key!r} is something else.", f"{expected}.", "measure again on the phone page.")
