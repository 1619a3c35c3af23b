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
from lib.packaging.rows import Rows, find_rows, fitting
from lib.packaging.splitting import split_gguf
from lib.packaging.turns import Turns
from lib.run import Run
from lib.run.child import run_child
from lib.run.files import read_json, sha256_file, sha256_json, write_json
from lib.run.folders import PROJECT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER, LIBRARY = "web", "wllama"
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
        rows: that the phone answers for comparison.
    """

    library: Path
    version: str
    rows: Rows

    def parameters(self) -> dict[str, Any]:
        """What decides whether the page has to be made again."""
        page = {path.name: sha256_file(path) for path in sorted(_PAGE.iterdir())}
        return {"web": {"wllama": self.version, "rows": sha256_json(self.rows.texts), "page": sha256_json(page)}}


def request_web(run: Run, rows: Path | None) -> WebRequest:
    """Look for the library and the rows before anything is made.

    Args:
        rows: file of the user's own rows: one text a line, or JSONL with "text"; None = rows of the sample corpus where
            the run is made from it, else the package's own five sentences.

    Raises:
        InputError: the library was not fetched; a file that cannot be read as rows.
    """
    if missing := library_lacks():
        raise InputError(
            f"the phone page needs the npm package @wllama/wllama, and {missing[0]} is not in .cache/wllama.",
            "the library, fetched once.",
            "run make wllama (needs npm and a network).",
        )
    return WebRequest(_library(), library_version(), find_rows(run, rows))


def _library() -> Path:
    return PROJECT / ".cache" / "wllama" / "node_modules" / "@wllama"


def library_lacks() -> list[str]:
    """Files of the library that `make wllama` would fetch and that are not there."""
    return [name for name in (*_FILES, _VERSION) if not (_library() / name).is_file()]


def library_version() -> str:
    """Version of the library that was fetched."""
    return str(read_json(_library() / _VERSION)["version"])


def write_web(
    request: WebRequest,
    facts: Facts,
    info: dict[str, Any],
    turns: Turns,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    n_threads: int,
) -> str:
    """Write folder/web; returns where its rows come from and how many are left out, in words.

    Args:
        info: content of model_info.json.
        folder: of the package; the GGUF file lies in it.

    Raises:
        InputError: labels that split a character; rows of which none fits into the context.
    """
    web = folder / FOLDER
    shutil.copytree(_PAGE, web)
    (web / LIBRARY).mkdir()
    for source, name in _FILES.items():
        shutil.copyfile(request.library / source, web / LIBRARY / name)
    gguf = folder / facts.file
    _require_whole_characters(tokenizer, info["labels"])
    rows, source = _answered(request.rows, facts, info, turns, tokenizer, gguf, n_threads)
    write_json(web / "rows.json", {"source": source, "rows": rows})
    parts = [gguf] if facts.bytes <= LARGEST_PART else split_gguf(gguf, web / "parts", LARGEST_PART)
    write_json(web / "page.json", _page(request, facts, info["sha256"], gguf, parts))
    return source


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
    rows: Rows,
    facts: Facts,
    info: dict[str, Any],
    turns: Turns,
    tokenizer: PreTrainedTokenizerBase,
    gguf: Path,
    n_threads: int,
) -> tuple[list[dict[str, Any]], str]:
    """The rows with the labels' log-probabilities here, those of model_info.json where there are no others; source."""
    if not isinstance(facts.task, Task):
        return [], rows.source
    if not rows.texts:
        return [{"text": check["text"], "labels": check["labels"]} for check in info["checks"]], rows.source
    system, wording = facts.task.system_prompt, facts.task.user_prompt
    prompts = [prompt_of(tokenizer, turns, system, wording.replace("{text}", text)) for text in rows.texts]
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    kept, source = fitting(rows, [len(own) + facts.most for own in ids], facts.n_ctx)
    request = {"prompts": [ids[i] for i in kept], "labels": [label["ids"] for label in info["labels"]], "most": 1}
    request |= {"path": str(gguf.resolve()), "ends": [], "n_threads": n_threads}
    answers = run_child("lib.packaging.worker:answer", request, f"asking {gguf.name} the phone's rows")["answers"]
    return [
        {"text": rows.texts[i], "labels": answer["labels"]} for i, answer in zip(kept, answers, strict=True)
    ], source
