"""Which file goes into the package, and what the evidence says of that choice.
What is known of the licences of base model and data, and what is not.
Everything that the package's documents say, gathered once from the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.models.gguf_file import read_metadata, read_tensors
from lib.prompts.tasks import Task
from lib.runs.files import read_json
from lib.runs.run import Run
from lib.stages.package.gguf_parts import gguf_name, size_label
from lib.statistics.losses import retention_warning
from lib.statistics.verdicts import in_words

# Which file goes into the package, and what the evidence says of that choice.

RECOMMENDED, AGAINST, WITHOUT = "recommended", "against the recommendation", "without sufficient evidence"


@dataclass(frozen=True)
class Choice:
    """The chosen file.

    Attributes:
        type: quantization type.
        source: the file.
        standing: RECOMMENDED, AGAINST or WITHOUT.
        words: the same in sentences, for card and report.
        entry, reference: of comparison.json.
    """

    type: str
    source: Path
    standing: str
    words: str
    entry: Mapping[str, Any]
    reference: Mapping[str, Any]


def choose(run: Run, comparison: Mapping[str, Any], wanted: str | None) -> Choice:
    """The file that the comparison recommends, or the one that the user asks for.

    Args:
        comparison: content of comparison.json.
        wanted: a type of the comparison; None = the recommended one.

    Raises:
        InputError: nothing is recommended and nothing was asked for; a type that was not compared.
    """
    advice = comparison["recommendation"]
    entries = {e["type"]: e for e in comparison["files"] if str(e.get("file", "")).endswith(".gguf")}
    if wanted is None and advice["type"] is None:
        raise InputError(
            f"the comparison of run {run.name!r} recommends no file ({advice['text']})",
            "a recommended file, or your own decision.",
            f"decide yourself with --type, one of {', '.join(entries)}; the model card will say so.",
        )
    known = {name.lower(): name for name in entries}
    chosen = known.get((wanted or advice["type"]).lower())
    if chosen is None:
        raise InputError(f"--type {wanted!r}.", f"a compared GGUF file: {', '.join(entries)}.", "name one of them.")
    entry = entries[chosen]
    standing, words = _standing(chosen, entry, advice)
    reference = entries[comparison["reference"]]
    return Choice(chosen, _source(run, entry["file"]), standing, words, entry, reference)


def _standing(chosen: str, entry: Mapping[str, Any], advice: Mapping[str, Any]) -> tuple[str, str]:
    if chosen == advice["type"]:
        return RECOMMENDED, advice["text"]
    own, warning = f"The verdict on this file: {in_words(entry)}.", retention_warning(entry)
    if warning not in advice["text"]:  # where no file is recommended, the text warns of every one already
        own += f" {warning}"
    if advice["type"] is None:
        return WITHOUT, f"{chosen} was chosen by the user; the evidence recommends no file. {own} {advice['text']}"
    text = f"{chosen} was chosen by the user against the recommendation, which is {advice['type']}. {own}"
    return AGAINST, f"{text} {advice['text']}"


def _source(run: Run, name: str) -> Path:
    for product in ("quantized", "gguf"):
        path = run.require(product).path / name
        if path.is_file():
            return path
    raise InputError(
        f"{name} is in neither quantized/ nor gguf/ of run {run.name!r}.",
        "the files that were compared.",
        "run notebooks/07_compare_quantized.ipynb again.",
    )


# What is known of the licences of base model and data, and what is not.

BASES = {
    "Qwen/Qwen2.5-0.5B": "apache-2.0",
    "Qwen/Qwen2.5-0.5B-Instruct": "apache-2.0",
    "Qwen/Qwen3-0.6B": "apache-2.0",
    "X-D-Lab/MindChat-Qwen2-0_5B": "gpl-3.0",
}
"""Hub ids whose licence the parameter files and the README of this project name."""

_OWN = "MIT (the quantization workbook's own)"


def licences(data: Mapping[str, Any], base: str, is_offline: bool, has_text: bool) -> dict[str, str]:
    """The licences of "base" and "data" in words, and "id" for the front matter (an SPDX-like id, or "unknown").

    Args:
        data: facts of the product `data`.
        base: id of the base model.
        has_text: the base brought a file LICENSE, which is in the package.
    """
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


# Everything that the package's documents say, gathered once from the run.

MOST_LABEL_TOKENS, MOST_ANSWER_TOKENS = 8, 256
"""Tokens at which an answer is cut: a label, a written answer."""

_CONTEXT = 2048


@dataclass(frozen=True)
class Facts:
    """What is known of the packaged model.

    Attributes:
        file: its name; title: the same without ending.
        bytes, bytes_per_token: of the file, and of the weights that one generated token reads.
        n_ctx, most: tokens of context that are suggested, and of an answer.
        base, revision, source, method: lineage.
        rows: rows of the splits.
        comparison: content of comparison.json.
        notes: sentences that every page of the run says.
        switches: whether the chat template knows two ways of answering; thinks: the one that was trained.
        tree: {folder of the export tree: what it holds}.
        mix: of a file under a size budget how its types were chosen (`mix` of quantized.json); None for a recipe.
        languages: of the rows it was trained on, as the converted file says; empty where that is not known.
        page_rows: where the rows of the phone page come from; empty without the page.
    """

    run: str
    file: str
    choice: Choice
    task: Task
    kind: str
    labelled: bool
    bytes: int
    bytes_per_token: int
    n_ctx: int
    most: int
    base: str
    revision: str
    source: str
    method: str
    rows: Mapping[str, int]
    licences: Mapping[str, str]
    comparison: Mapping[str, Any]
    parameters: Mapping[str, Any]
    products: Mapping[str, str]
    switches: bool
    thinks: bool
    notes: list[str] = field(default_factory=list)
    tree: dict[str, str] = field(default_factory=dict)
    page_rows: str = ""
    languages: list[str] = field(default_factory=list)
    mix: Mapping[str, Any] | None = None

    @property
    def title(self) -> str:
        return self.file.removesuffix(".gguf")


def gather(run: Run, choice: Choice, task: Task, comparison: Mapping[str, Any]) -> Facts:
    """Read the manifest and the header of the chosen file."""
    entries = run.manifest.entries()
    data = entries["data"].facts
    metadata = read_metadata(choice.source)
    base = str(data.get("base_model", metadata.get("general.name", "unknown")))
    weights = sum(math.prod(tensor.shape) for tensor in read_tensors(choice.source))
    size = str(metadata.get("general.size_label") or size_label(weights))
    labelled = bool(task.label_names)
    most = MOST_LABEL_TOKENS if labelled else MOST_ANSWER_TOKENS
    trained = int(metadata.get(f"{metadata['general.architecture']}.context_length", _CONTEXT))
    learned = entries.get("adapter")
    return Facts(
        run=run.name,
        file=gguf_name(base, size, run.name, choice.type),
        choice=choice,
        task=task,
        languages=list(metadata.get("general.languages", [])),
        kind=task.kind,
        labelled=labelled,
        bytes=choice.source.stat().st_size,
        bytes_per_token=_bytes_per_token(choice),
        n_ctx=min(trained, max(_CONTEXT, task.max_seq_length + most)),
        most=most,
        base=base,
        revision=str((learned.facts if learned else data).get("base_revision", "unknown")),
        source=str(data.get("source", "unknown")),
        method=str(learned.facts.get("method", "unknown")) if learned else "unknown",
        rows=dict(data.get("rows", {})),
        licences=licences(data, base, bool(data.get("offline_base")), (run.folder / "merged" / "LICENSE").is_file()),
        comparison=comparison,
        parameters=dict(learned.parameters) if learned else {},
        products={name: entry.digest for name, entry in entries.items() if name != "package"},
        switches="enable_thinking" in str(metadata.get("tokenizer.chat_template", "")),
        thinks=task.thinking,
        notes=run.stamps(),
        mix=_mix(run, choice),
    )


def _mix(run: Run, choice: Choice) -> Mapping[str, Any] | None:
    files = read_json(run.require("quantized").path / "quantized.json")["files"]
    return next((row.get("mix") for row in files if row["file"] == choice.source.name), None)


def _bytes_per_token(choice: Choice) -> int:
    """Bytes of weights that one token reads: all tensors, without the embedding where the output layer has its own."""
    tensors = sorted(read_tensors(choice.source), key=lambda tensor: tensor.start)
    ends = [tensor.start for tensor in tensors[1:]] + [choice.source.stat().st_size]
    sizes = {tensor.name: end - tensor.start for tensor, end in zip(tensors, ends, strict=True)}
    unread = sizes["token_embd.weight"] if "output.weight" in sizes else 0
    return sum(sizes.values()) - unread
