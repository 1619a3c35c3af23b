"""Everything that the package's documents say, gathered once from the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lib.models.gguf_file import read_metadata, read_tensors
from lib.models.tasks import AnyTask, has_labels, kind_of
from lib.packaging.choosing import Choice
from lib.packaging.licences import licences
from lib.packaging.naming import gguf_name, size_label
from lib.run import Run
from lib.run.files import read_json

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
    task: AnyTask
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


def gather(run: Run, choice: Choice, task: AnyTask, comparison: Mapping[str, Any]) -> Facts:
    """Read the manifest and the header of the chosen file."""
    entries = run.manifest.entries()
    data = entries["data"].facts
    metadata = read_metadata(choice.source)
    base = str(data.get("base_model", metadata.get("general.name", "unknown")))
    weights = sum(math.prod(tensor.shape) for tensor in read_tensors(choice.source))
    size = str(metadata.get("general.size_label") or size_label(weights))
    labelled = has_labels(task)
    most = MOST_LABEL_TOKENS if labelled else MOST_ANSWER_TOKENS
    trained = int(metadata.get(f"{metadata['general.architecture']}.context_length", _CONTEXT))
    learned = entries.get("adapter")
    return Facts(
        run=run.name,
        file=gguf_name(base, size, run.name, choice.type),
        choice=choice,
        task=task,
        languages=list(metadata.get("general.languages", [])),
        kind=kind_of(task),
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
        thinks=bool(getattr(task, "thinking", False)),
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
