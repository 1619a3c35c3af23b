"""web/ of the package: a page that runs the packaged file in a phone's browser, with rows to check itself by."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError
from lib.models.prompting import Task
from lib.packaging.checks import CHECKED_TOKENS, prompt_of
from lib.packaging.facts import Facts
from lib.packaging.splitting import split_gguf
from lib.packaging.turns import Turns
from lib.run import Run
from lib.run.child import run_child
from lib.run.files import read_json, read_jsonl, sha256_file, sha256_json, write_json
from lib.run.folders import PROJECT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER, LIBRARY = "web", "wllama"
ROWS = 50
"""Rows that a phone answers for comparison."""

LARGEST_PART = 500_000_000
"""Bytes above which the file is split, with room to spare below the 512 MB from which browsers make trouble."""

_PAGE = Path(__file__).with_name("web")
_VERSION = "wllama/package.json"
_FILES = {
    "wllama/esm/index.min.js": "index.min.js",
    "wllama/esm/wasm/wllama.wasm": "wllama.wasm",
    "wllama/LICENCE": "LICENCE",
    "wllama-compat/wasm/wllama.js": "compat.js",
    "wllama-compat/wasm/wllama.wasm": "compat.wasm",
}
"""Files of the npm packages @wllama/wllama and @wllama/wllama-compat, and their names in web/wllama/."""


@dataclass(frozen=True)
class WebRequest:
    """What the page is made of.

    Attributes:
        library: node_modules/@wllama with the files that are copied.
        version: of wllama.
        rows: texts that the phone answers for comparison; source: where they come from, in words.
    """

    library: Path
    version: str
    rows: tuple[str, ...]
    source: str

    def parameters(self) -> dict[str, Any]:
        """What decides whether the page has to be made again."""
        page = {path.name: sha256_file(path) for path in sorted(_PAGE.iterdir())}
        return {"web": {"wllama": self.version, "rows": sha256_json(self.rows), "page": sha256_json(page)}}


def request_web(run: Run, rows: Path | None) -> WebRequest:
    """Look for the library and the rows before anything is made.

    Args:
        rows: file of the user's own rows: one text a line, or JSONL with "text"; None = rows of the sample corpus where
            the run is made from it, else the package's own five sentences.

    Raises:
        InputError: the library was not fetched; a file without rows.
    """
    if missing := library_lacks():
        raise InputError(
            f"the phone page needs the npm package @wllama/wllama, and {missing[0]} is not in .cache/wllama.",
            "the library, fetched once.",
            "run make wllama (needs npm and a network).",
        )
    texts, source = _rows(run, rows)
    return WebRequest(_library(), library_version(), tuple(texts), source)


def _library() -> Path:
    return PROJECT / ".cache" / "wllama" / "node_modules" / "@wllama"


def library_lacks() -> list[str]:
    """Files of the library that `make wllama` would fetch and that are not there."""
    return [name for name in (*_FILES, _VERSION) if not (_library() / name).is_file()]


def library_version() -> str:
    """Version of the library that was fetched."""
    return str(read_json(_library() / _VERSION)["version"])


def _rows(run: Run, path: Path | None) -> tuple[list[str], str]:
    data = run.require("data")
    if path is not None:
        return _read_rows(path), f"rows of {path.name}, which the user named"
    if data.entry.facts.get("sample_data"):
        rows = [row for row in read_jsonl(data.path / "test.jsonl") if row.get("text") and not row.get("leaked")]
        return [row["text"] for row in rows[:ROWS]], "test rows of the workbook's own sample corpus"
    return [], "the package's own sentences"  # whether other rows may be passed on is not known here


def _read_rows(path: Path) -> list[str]:
    if not path.is_file():
        raise InputError(f"no file {path}.", "--rows with one text a line, or JSONL.", "check the path.")
    if path.suffix == ".jsonl":
        texts = [row.get("text") for row in read_jsonl(path)]
    else:
        texts = path.read_text(encoding="utf-8").splitlines()
    found = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    if not found:
        raise InputError(f"{path} holds no text.", 'one text a line, or JSONL with "text".', "check the file.")
    return found[:ROWS]


def write_web(
    request: WebRequest,
    facts: Facts,
    info: dict[str, Any],
    turns: Turns,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    n_threads: int,
) -> None:
    """Write folder/web.

    Args:
        info: content of model_info.json.
        folder: of the package; the GGUF file lies in it.
    """
    web = folder / FOLDER
    shutil.copytree(_PAGE, web)
    (web / LIBRARY).mkdir()
    for source, name in _FILES.items():
        shutil.copyfile(request.library / source, web / LIBRARY / name)
    gguf = folder / facts.file
    _require_whole_characters(tokenizer, info["labels"])
    rows = _answered(request.rows, facts, info, turns, tokenizer, gguf, n_threads)
    write_json(web / "rows.json", {"source": request.source, "rows": rows})
    parts = [gguf] if facts.bytes <= LARGEST_PART else split_gguf(gguf, web / "parts", LARGEST_PART)
    write_json(web / "page.json", _page(request, facts, info["sha256"], gguf, parts))


def _page(request: WebRequest, facts: Facts, sha256: str, gguf: Path, parts: Sequence[Path]) -> dict[str, Any]:
    """The content of page.json."""
    return {
        "format": 1,
        "title": facts.title,
        "run": facts.run,
        "file": facts.file,
        "bytes": sum(path.stat().st_size for path in parts),
        "sha256": sha256,
        "parts": [
            {
                "url": f"../{path.name}" if path == gguf else f"parts/{path.name}",
                "bytes": path.stat().st_size,
                "sha256": sha256 if path == gguf else sha256_file(path),
            }
            for path in parts
        ],
        "wllama": request.version,
        "checked_tokens": min(CHECKED_TOKENS, facts.most),
        "notes": facts.notes,
    }


def _require_whole_characters(tokenizer: PreTrainedTokenizerBase, labels: Sequence[dict[str, Any]]) -> None:
    """The page hands tokens on as text, which half a character is not."""
    for label in labels:
        if "\ufffd" in "".join(tokenizer.decode([number]) for number in label["ids"]):
            raise InputError(
                f"the tokens of the label {label['name']!r} split a character.",
                "labels whose tokens are whole characters.",
                "train with other label_names, or package without --web.",
            )


def _answered(
    texts: Sequence[str],
    facts: Facts,
    info: dict[str, Any],
    turns: Turns,
    tokenizer: PreTrainedTokenizerBase,
    gguf: Path,
    n_threads: int,
) -> list[dict[str, Any]]:
    """The rows with the labels' log-probabilities here; those of model_info.json where there are no others."""
    if not isinstance(facts.task, Task):
        return []
    if not texts:
        return [{"text": check["text"], "labels": check["labels"]} for check in info["checks"]]
    wording = facts.task.user_prompt
    prompts = [prompt_of(tokenizer, turns, facts.task.system_prompt, wording.replace("{text}", text)) for text in texts]
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    fitting = [i for i, own in enumerate(ids) if len(own) + facts.most < facts.n_ctx]
    request = {"prompts": [ids[i] for i in fitting], "labels": [label["ids"] for label in info["labels"]], "most": 1}
    request |= {"path": str(gguf.resolve()), "ends": [], "n_threads": n_threads}
    answers = run_child("lib.packaging.worker:answer", request, f"asking {gguf.name} the phone's rows")["answers"]
    return [{"text": texts[i], "labels": answer["labels"]} for i, answer in zip(fitting, answers, strict=True)]
