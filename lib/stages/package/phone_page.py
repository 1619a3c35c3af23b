"""web/ of the package: a page that runs the packaged file in a phone's browser, with rows to check itself by."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError, refusal
from lib.language import words_of_phones
from lib.runs.files import PROJECT, data_file, read_json, read_jsonl, sha256_file, sha256_json, utf8, write_json
from lib.runs.run import Run
from lib.scoring.word_lists import refuse_other_forms
from lib.stages.package.documents import CHECKED_TOKENS, PackedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Rows that a phone answers for comparison: of the user's own file, or of the sample corpus.

MOST = 50
"""Rows that a phone answers."""

_LINE = re.compile(r"\r\n|\r|\n")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Rows:
    """The rows of a phone page.

    Attributes:
        texts: at most MOST.
        source: where they come from, in words.
        first: where the first one stands, for messages ("rows.txt, line 3").
    """

    texts: tuple[str, ...]
    source: str
    first: str = "the first row"


def find_rows(run: Run, path: Path | None) -> Rows:
    """The rows of a file; None = of the sample corpus where the run is made from it, else none.

    Raises:
        InputError: a file that cannot be read as rows, by name and line.
    """
    data = run.require("data")
    if path is not None:
        return read_rows(path)
    if data.entry.facts.get("sample_data"):
        rows = [row for row in read_jsonl(data.path / "test.jsonl") if row.get("text") and not row.get("leaked")]
        return Rows(tuple(row["text"] for row in rows[:MOST]), "test rows of the workbook's own sample corpus")
    return Rows((), "the package's own sentences")  # whether other rows may be passed on is not known here


def read_rows(path: Path) -> Rows:
    """One text a line, or JSONL with "text"; empty lines are no rows.

    Raises:
        InputError: no file, not UTF-8, a line that is no row, or no row at all.
    """
    if not path.is_file():
        raise InputError(f"no file {path}.", "--rows with one text a line, or JSONL.", "check the path.")
    text = utf8(path, path.read_bytes()).removeprefix("\ufeff")
    lines = [(number, line) for number, line in enumerate(_LINE.split(text), 1) if line.strip()]
    if not lines:
        raise InputError(f"{path} holds no text.", 'one text a line, or JSONL with "text".', "check the file.")
    json_lines = path.suffix.lower() == ".jsonl"
    if not json_lines:
        refuse_other_forms(path, text)
    texts = [_text(path, number, line) if json_lines else line.strip() for number, line in lines]
    source = f"rows of {path.name}, which the user named"
    if len(texts) > MOST:
        source += f" (the first {MOST} of {len(texts):,})"
    return Rows(tuple(texts[:MOST]), source, f"{path}, line {lines[0][0]}")


def _text(path: Path, number: int, line: str) -> str:
    """The text of one line of JSONL."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _no_row(path, number, f"is not JSON ({error})") from None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise _no_row(path, number, "holds no text")
    if _SURROGATE.search(text):
        raise _no_row(path, number, "holds half of a surrogate pair, which is no character")
    return text.strip()


def _no_row(path: Path, number: int, what: str) -> InputError:
    return InputError(f"{path}, line {number} {what}.", 'an object with "text" in every line.', "correct that line.")


def fitting(rows: Rows, lengths: list[int], n_ctx: int) -> tuple[list[int], str]:
    """The rows whose prompt and answer fit into the context, and the source with what is left out.

    Args:
        lengths: tokens of each row's prompt and answer.

    Raises:
        InputError: there are rows, and none fits.
    """
    kept = [i for i, length in enumerate(lengths) if length < n_ctx]
    if lengths and not kept:
        raise refusal("package/long-rows", rows=rows, lengths=lengths, n_ctx=n_ctx)
    dropped = len(lengths) - len(kept)
    words = f" ({dropped} of {len(lengths)} left out, longer than the context)" if dropped else ""
    return kept, rows.source + words


# web/ of the package: a page that runs the packaged file in a phone's browser, with rows to check itself by.

LIBRARY = "wllama"
LARGEST_PART = 500_000_000
"""Bytes above which the file is split, with room to spare below the 512 MB from which browsers make trouble."""

_PAGE = Path(__file__).with_name("web")
_VERSION = "wllama/package.json"
_FILES: dict[str, str] = data_file("stages/package/wllama.yaml")
"""Files of the npm packages @wllama/wllama and @wllama/wllama-compat, and their names in web/wllama/."""


def request_web(run: Run, rows: Path | None) -> Rows:
    """Look for the library, and the rows that the phone answers, before anything is made.

    Args:
        rows: file of the user's own rows: one text a line, or JSONL with "text"; None = rows of the sample corpus where
            the run is made from it, else the package's own five sentences.

    Raises:
        InputError: the library was not fetched; a file that cannot be read as rows.
    """
    if missing := library_lacks():
        raise refusal("package/no-library", missing=missing)
    return find_rows(run, rows)


def web_parameters(rows: Rows) -> dict[str, Any]:
    """What decides whether the page has to be made again."""
    page = {path.name: sha256_file(path) for path in sorted(_PAGE.iterdir())}
    page["words"] = sha256_json(words_of_phones())
    return {"web": {"wllama": library_version(), "rows": sha256_json(rows.texts), "page": sha256_json(page)}}


def _library() -> Path:
    return PROJECT / ".cache" / "wllama" / "node_modules" / "@wllama"


def library_lacks() -> list[str]:
    """Files of the library that `make wllama` would fetch and that are not there."""
    return [name for name in (*_FILES, _VERSION) if not (_library() / name).is_file()]


def library_version() -> str:
    """Version of the library that was fetched."""
    return str(read_json(_library() / _VERSION)["version"])


def write_web(wanted: Rows, packed: PackedModel, info: dict[str, Any]) -> str:
    """Write web/ beside the file; returns where its rows come from and how many are left out, in words.

    Args:
        info: content of model_info.json.

    Raises:
        InputError: labels that split a character; rows of which none fits into the context.
    """
    facts, gguf, web = packed.facts, packed.gguf, packed.gguf.with_name("web")
    shutil.copytree(_PAGE, web)
    (web / LIBRARY).mkdir()
    for source, name in _FILES.items():
        shutil.copyfile(_library() / source, web / LIBRARY / name)
    _require_whole_characters(packed.tokenizer, info["labels"])
    rows, source = _answered(wanted, packed, info)
    write_json(web / "rows.json", {"source": source, "rows": rows})
    parts = [gguf] if gguf.stat().st_size <= LARGEST_PART else split_gguf(gguf, web / "parts", LARGEST_PART)
    sizes = [path.stat().st_size for path in parts]
    page = {
        "format": 1,
        "title": facts.title,
        "run": facts.report["run"],
        "file": facts.file,
        "bytes": sum(sizes),
        "sha256": info["sha256"],
        "parts": [
            {
                "url": f"../{path.name}" if path == gguf else f"parts/{path.name}",
                "bytes": size,
                "sha256": info["sha256"] if path == gguf else sha256_file(path),
            }
            for path, size in zip(parts, sizes, strict=True)
        ],
        "wllama": library_version(),
        "checked_tokens": min(CHECKED_TOKENS, facts.most),
        "notes": facts.report["notes"],
    }
    write_json(web / "page.json", page)
    write_json(web / "words.json", words_of_phones([source, *page["notes"]]))
    return source


def _require_whole_characters(tokenizer: PreTrainedTokenizerBase, labels: Sequence[dict[str, Any]]) -> None:
    """The page hands tokens on as text, which half a character is not."""
    for label in labels:
        if "\ufffd" in "".join(tokenizer.decode([number]) for number in label["ids"]):
            raise refusal("package/split-character", label=label)


def _answered(rows: Rows, packed: PackedModel, info: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The rows with the labels' log-probabilities here, those of model_info.json where there are no others; source."""
    facts = packed.facts
    if not facts.task.label_names:
        return [], rows.source
    if not rows.texts:
        return [{"text": check["text"], "labels": check["labels"]} for check in info["checks"]], rows.source
    _, ids = packed.prompts(rows.texts)
    kept, source = fitting(rows, [len(own) + facts.most for own in ids], facts.n_ctx)
    labels = [label["ids"] for label in info["labels"]]
    found = packed.answers([ids[i] for i in kept], labels, 1, what=" the phone's rows")
    return [{"text": rows.texts[i], "labels": answer["labels"]} for i, answer in zip(kept, found, strict=True)], source


def split_gguf(path: Path, folder: Path, limit: int) -> list[Path]:
    """Write a file in parts, named and marked as llama.cpp's loader expects them: base-00001-of-00003.gguf.

    Args:
        limit: most bytes of tensors in a part; the metadata stand in the first one.

    Returns:
        The parts, in order.

    Raises:
        InputError: a single tensor is larger than a part.
    """
    from gguf import GGUFReader, GGUFWriter

    reader = GGUFReader(path)
    for tensor in reader.tensors:
        if tensor.n_bytes > limit:
            size, most = tensor.n_bytes / 1e6, limit / 1e6
            raise refusal("package/large-tensor", tensor=tensor, path=path, size=size, most=most)
    folder.mkdir(parents=True, exist_ok=True)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    writer = GGUFWriter(folder / path.name, fields.pop("general.architecture").contents(), split_max_size=limit)
    writer.data_alignment = reader.alignment
    for key, field in fields.items():
        writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    parts = [Path(stream.name) for stream in writer.fout]
    writer.close()
    return parts
