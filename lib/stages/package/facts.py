"""Which file goes into the package, its name, and everything that the package's documents say of it."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lib.errors import InputError, refusal
from lib.language import retold, sentences
from lib.models.gguf_file import read_metadata, read_tensors
from lib.models.unpack import plain_name
from lib.prompts.tasks import Task
from lib.runs.files import data_file, read_json, sha256_file
from lib.runs.run import Run
from lib.statistics.losses import advice_words, retention_warning, warns_of

# Which file goes into the package, and what the evidence says of that choice.

RECOMMENDED, AGAINST, WITHOUT = "recommended", "against the recommendation", "without sufficient evidence"
NO_SIGN = "no sign of harm, not proven"
UNPROVEN = "unproven"
"""Asks for the smallest file without a sign of harm where none is recommended (`lib.statistics.noninferiority`)."""


@dataclass(frozen=True)
class ChosenFile:
    """The file that is packed.

    Attributes:
        type: quantization type.
        source: the file.
        standing: RECOMMENDED, AGAINST, WITHOUT or NO_SIGN.
        words: the same in sentences, for the report.
        entry, reference: of comparison.json.
        told: the words in the language of the card; empty = as they are.
    """

    type: str
    source: Path
    standing: str
    words: str
    entry: Mapping[str, Any]
    reference: Mapping[str, Any]
    told: str = ""


def choose_file(
    run: Run, comparison: Mapping[str, Any], wanted: str | None, other: Mapping[str, Any] | None = None
) -> ChosenFile:
    """The file that the comparison recommends, or the one that the user asks for.

    Args:
        comparison: content of comparison.json.
        wanted: a type of the comparison; None = the recommended one; UNPROVEN.
        other: its recommendation in the language of the card, where that is not English.

    Raises:
        InputError: nothing is recommended and nothing was asked for; a type that was not compared; a comparison by an
            older version.
    """
    advice = comparison["recommendation"]
    if "headline" not in advice:
        raise refusal("compare/older-comparison")
    entries = {e["type"]: e for e in comparison["files"] if str(e.get("file", "")).endswith(".gguf")}
    unproven = advice.get("unproven") if wanted == UNPROVEN else None
    asked = advice["type"] or unproven if wanted in (None, UNPROVEN) else wanted
    if asked is None:
        raise refusal("package/none-recommended", run=run, advice=advice_words(advice), types=", ".join(entries))
    entry = next((entry for name, entry in entries.items() if name.lower() == asked.lower()), None)
    if entry is None:
        raise InputError(f"--type {wanted!r}.", f"a compared GGUF file: {', '.join(entries)}.", "name one of them.")
    standing, words = _standing(entry, advice)
    reference = entries[comparison["reference"]]
    told = _standing(entry, {**other, "warning": retold(advice["warning"])}, retold)[1] if other else ""
    return ChosenFile(entry["type"], _source(run, entry["file"]), standing, words, entry, reference, told)


def _standing(entry: Mapping[str, Any], advice: Mapping[str, Any], tell: Callable[[str], str] = str) -> tuple[str, str]:
    chosen, advised = entry["type"], advice_words(advice)
    if chosen == advice["type"]:
        return RECOMMENDED, advised
    own = [tell(f"The verdict on this file: {entry['verdict']}.")]
    if not warns_of(advice["warning"], entry):  # where no file is recommended, it is of every one already
        own.append(tell(retention_warning(entry)))
    if advice["type"] is None:
        if chosen == advice.get("unproven"):
            return NO_SIGN, sentences([*own, advised, advice["details"]])
        why = tell(f"{chosen} was chosen by the user; the evidence recommends no file.")
        return WITHOUT, sentences([why, *own, advised])
    against = tell(f"{chosen} was chosen by the user against the recommendation, which is {advice['type']}.")
    return AGAINST, sentences([against, *own, advised])


def _source(run: Run, name: str) -> Path:
    for product in ("quantized", "gguf"):
        path = run.require(product).path / name
        if path.is_file():
            return path
    raise refusal("package/file-gone", name=name, run=run)


# What is known of the licences of base model and data, and what is not.

BASES = data_file("stages/package/licences.yaml")
_OWN = "MIT (the quantization workbook's own)"


def licences(data: Mapping[str, Any], base: str, has_text: bool) -> dict[str, str]:
    """The licences of "base" and "data" in words, and "id" for the front matter (an SPDX-like id, or "unknown").

    Args:
        data: facts of the product `data`.
        base: id of the base model.
        has_text: the base brought a file LICENSE, which is in the package.
    """
    is_offline = bool(data.get("offline_base"))
    plain = base.removeprefix("modelscope:").partition("@")[0]
    sample = bool(data.get("sample_data"))
    if is_offline and sample:
        identifier, model = "mit", _OWN
    elif is_offline:
        identifier, model = "unknown", "made by the workbook from the texts of the data, whose licence applies"
    elif plain in BASES:
        identifier, model = BASES[plain], f"{BASES[plain]}, as the model card of {plain} says; read it"
    elif licence := (data.get("unpacked") or {}).get("license"):
        identifier, model = str(licence), f"{licence}, as the GGUF file of the base model says"
    else:
        identifier, model = "unknown", "see the file LICENSE, which the base model brought"
        model = model if has_text else "unknown to the workbook: read the base model's card before you pass the file on"
    rows = _OWN if sample else "unknown to the workbook: ask where the rows come from"
    return {"id": identifier, "base": model, "data": rows}


# The file's name by the naming convention of GGUF: Base-Size-FineTune-v1.0-Encoding.gguf.

VERSION = "v1.0"

_SIZE = re.compile(r"(?:^|[-_ ])(\d+(?:[._]\d+)?[KMBTQ])(?=$|[-_ ])", re.IGNORECASE)
_REVISION = re.compile(r"^((?:\w+:)?[\w.-]+(?:/[\w.-]+)?)@.*$", re.S)
"""A hub id with its revision; a folder's path may hold an @ of its own."""


def gguf_name(base: str, size: str, run_name: str, encoding: str) -> str:
    """The name of a packaged file.

    Args:
        base: hub id, folder or name of the base model, as the run has it; a revision behind @ is left out.
        size: label of the size ("494M"), for a base whose name holds none.
        run_name: the fine-tune; behind what the base's own name says of its tuning (Instruct, Chat).
            Where the convention cannot hold all its characters, a short hash tells it from its like.
        encoding: quantization type.
    """
    name = re.split(r"[/\\:]", _REVISION.sub(r"\1", base).rstrip("/\\"))[-1] or "model"
    name = plain_name(name)
    name = "Offline-base" if name == "offline" else name
    found = _SIZE.search(name)
    size = found[1].replace("_", ".").upper() if found else size
    family, tuning = (name[: found.start()], name[found.end() :]) if found else (name, "")
    parts = [_part(family, "."), _part(size, "."), _part(f"{tuning}-{_tune(run_name)}"), VERSION, encoding]
    return "-".join(part for part in parts if part) + ".gguf"


def _tune(run_name: str) -> str:
    """The run's name as it can stand there: 情感甲 and 情感乙, a.b and a-b stay apart."""
    text = _part(run_name)
    return text if text == run_name else f"{text}-{hashlib.sha256(run_name.encode('utf-8')).hexdigest()[:6]}"


def _part(text: str, keep: str = "") -> str:
    """Letters, digits and hyphens, as the convention has them (a base's name and a size keep their dot)."""
    return re.sub(rf"[^A-Za-z0-9{re.escape(keep)}]+", "-", text).strip("-.")


# Everything that the package's documents say, gathered once from the run.

MOST_LABEL_TOKENS, MOST_ANSWER_TOKENS = 8, 256
"""Tokens at which an answer is cut: a label, a written answer."""

_CONTEXT = 2048


TOLERANCE, TOLERANCE_SHARE = 0.2, 0.1
"""By how much log-probabilities and margins may differ on another processor: nats, and on top a share of the stored
value. Kernels round the quantized products differently, and unlikely tokens feel it most: on SmolLM2-135M in Q4_0
other kernels of one processor move a label's log-probability by 0.31, its margin by 0.33, likely tokens by 0.09."""


def sentences_for(task: Task) -> list[str]:
    """The project's own sentences: a package holds no row of anybody's data."""
    return data_file("stages/package/sentences.yaml")["reviews" if task.label_names else "questions"]


@dataclass(frozen=True)
class Facts:
    """What is known of the packaged model.

    Attributes:
        report: content of export_report.json, the card for machines: card and guide say the same in words.
        comparison: content of comparison.json.
        n_ctx, most: tokens of context that are suggested, and of an answer.
        switches: whether the chat template knows two ways of answering (the trained one is that of the task).
        languages: of the rows it was trained on, as the converted file says; empty where that is not known.
    """

    chosen: ChosenFile
    task: Task
    report: dict[str, Any]
    comparison: Mapping[str, Any]
    n_ctx: int
    most: int
    switches: bool
    languages: Sequence[str] = ()

    @property
    def file(self) -> str:
        return self.report["file"]["name"]

    @property
    def title(self) -> str:
        return self.file.removesuffix(".gguf")


def gather(
    run: Run, chosen: ChosenFile, task: Task, comparison: Mapping[str, Any], tree: Mapping[str, str] | None = None
) -> Facts:
    """Read the manifest and the header of the chosen file.

    Args:
        tree: {folder of the export tree: what it holds}.
    """
    from gguf.utility import size_label

    entries = run.manifest.entries()
    data, adapter = entries["data"].facts, entries.get("adapter")
    header = read_metadata(chosen.source)
    base = str(data.get("base_model", header.get("general.name", "unknown")))
    weights = sum(math.prod(tensor.shape) for tensor in read_tensors(chosen.source))
    size = str(header.get("general.size_label") or size_label(weights, 0, 0, 0))
    most = MOST_LABEL_TOKENS if task.label_names else MOST_ANSWER_TOKENS
    trained = int(header.get(f"{header['general.architecture']}.context_length", _CONTEXT))
    files = read_json(run.require("quantized").path / "quantized.json")["files"]
    report = {
        "format": 1,
        "run": run.name,
        "file": {
            "name": gguf_name(base, size, run.name, chosen.type),
            "bytes": chosen.source.stat().st_size,
            "sha256": sha256_file(chosen.source),
            "type": chosen.type,
        },
        "choice": {"standing": chosen.standing, "words": chosen.words},
        "mix": next((row.get("mix") for row in files if row["file"] == chosen.source.name), None),
        "recommendation": comparison["recommendation"],
        "lineage": {
            "base_model": base,
            "base_revision": str((adapter.facts if adapter else data).get("base_revision", "unknown")),
            "method": str(adapter.facts.get("method", "unknown")) if adapter else "unknown",
            "data": str(data.get("source", "unknown")),
            "rows": dict(data.get("rows", {})),
            "training": dict(adapter.parameters) if adapter else {},
            "products": {name: entry.digest for name, entry in entries.items() if name != "package"},
        },
        "task": task.to_json(),
        "evaluation": {"file": chosen.entry, "reference": chosen.reference},
        "conditions": comparison["conditions"],
        "bytes_read_per_token": _bytes_per_token(chosen.source),
        "cache_bytes_per_token": _cache_per_token(header),
        "licences": licences(data, base, (run.folder / "merged" / "LICENSE").is_file()),
        "export_tree": tree or {},
        "page_rows": "",  # where the rows of the phone page come from; empty without the page
        "checks": {
            "prompts": len(sentences_for(task)),
            "tolerance_nats": TOLERANCE,
            "tolerance_share": TOLERANCE_SHARE,
        },
        "versions": {name: metadata.version(name) for name in ("llama_cpp_python", "gguf", "transformers", "numpy")},
        "notes": run.stamps(),
    }
    n_ctx = min(trained, max(_CONTEXT, task.max_seq_length + most))
    switches = "enable_thinking" in str(header.get("tokenizer.chat_template", ""))
    return Facts(chosen, task, report, comparison, n_ctx, most, switches, list(header.get("general.languages", [])))


def _bytes_per_token(gguf: Path) -> int:
    """Bytes of weights that one token reads: all tensors, without the embedding where the output layer has its own."""
    tensors = sorted(read_tensors(gguf), key=lambda tensor: tensor.start)
    ends = [*(tensor.start for tensor in tensors[1:]), gguf.stat().st_size]
    sizes = {tensor.name: end - tensor.start for tensor, end in zip(tensors, ends, strict=True)}
    unread = sizes["token_embd.weight"] if "output.weight" in sizes else 0
    return sum(sizes.values()) - unread


def _cache_per_token(header: Mapping[str, Any]) -> int:
    """Bytes of keys and values that a token leaves in the cache, in 16 bits; of all layers, though some may look back
    through a window only."""
    own = {
        key.partition(".")[2]: value for key, value in header.items() if key.startswith(header["general.architecture"])
    }
    heads, size = own["attention.head_count"], own["embedding_length"]
    keys, values = (own.get(f"attention.{kind}_length", size // heads) for kind in ("key", "value"))
    return 2 * own["block_count"] * own.get("attention.head_count_kv", heads) * (keys + values)
