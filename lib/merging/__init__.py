"""Stage 04: merge the adapter into the base model, prove the weights, and measure what their rounding costs."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError
from lib.merging.nf4 import DEQUANTIZED, ORIGINAL, ROWS, Nf4Comparison, compare_merges, dequantize_base
from lib.models.tasks import kind_of, language_of, probe_ids, read_task
from lib.run.files import read_json, read_jsonl, write_json

if TYPE_CHECKING:
    from lib.merging.checking import MergeCheck
    from lib.merging.proving import MergeProof
    from lib.merging.report import MergeReport
    from lib.run import Product, Run, Work
    from lib.settings import Settings

__all__ = ["MergeResult", "merge"]

_CHECK = 3
"""Raised when the check measures more, so that an older merge is measured again."""

_TOLD_BY = 200
"""Validation rows by which the card tells the language."""

CHECK_PROMPTS = 12
"""Validation rows whose prompts check the merge."""


@dataclass(frozen=True)
class MergeResult:
    """The merged model of a run.

    Attributes:
        report: sizes, tensors, memory and rules of the merge.
        proof: what was recomputed, and found right.
        check: what rounding the weights costs: answers beside those of base + adapter.
        nf4: both ways to merge an adapter of an NF4 base, measured; None for an adapter of a 16-bit base.
        files: bytes of every file of the product.
        base: id of the base model; method: how the adapter was trained ("LoRA", "QLoRA").
        merge_base: into which weights it was merged ("original", "dequantized").
    """

    product: Product
    report: MergeReport
    proof: MergeProof
    check: MergeCheck
    nf4: Nf4Comparison | None
    files: dict[str, int]
    base: str
    method: str
    merge_base: str


def merge(settings: Settings, run: Run) -> MergeResult:
    """Make the product `merged` from `adapter` and the run's base model, or skip it when nothing changed.

    Raises:
        InputError: an adapter that cannot be merged exactly, a merged weight that is not the rounded sum, or rounding
            that takes too much of what the adapter changed.
    """
    product = run.produce(
        "merged",
        lambda work: _build(settings.merge_base, settings.merge_dtype, run, work),
        parameters=settings.pick("merge_base", "merge_dtype") | {"check": _CHECK},
        inputs=("data", "adapter"),
        force=settings.force,
    )
    return _read(product)


def _build(merge_base: str, merge_dtype: str, run: Run, work: Work) -> None:
    from lib.merging.card import write_card
    from lib.models.loading import base_of

    data, adapter, base = run.require("data"), run.require("adapter"), base_of(run)
    method = str(adapter.entry.facts.get("method", "LoRA"))
    if method != "QLoRA" and merge_base != ORIGINAL:
        raise InputError(
            f"merge_base {merge_base!r}, and the adapter was not trained on an NF4 base.",
            f"merge_base: {ORIGINAL}, or an adapter trained with load_in_4bit: true.",
            f"set merge_base: {ORIGINAL}.",
        )
    folders = {ORIGINAL: base.path}
    with tempfile.TemporaryDirectory(prefix=".merging-", dir=work.folder) as name:
        scratch = Path(name)
        if method == "QLoRA":
            folders[DEQUANTIZED] = dequantize_base(base.path, scratch / "dequantized-base")
        dtype = None if merge_dtype == "base" else merge_dtype
        made = {
            key: _merge_into(folder, scratch / key, data.path, adapter.path, dtype) for key, folder in folders.items()
        }
        nf4 = None
        if method == "QLoRA":
            rows, task = _rows(data.path, ROWS), read_task(data.path)
            merges = {key: scratch / key for key in made}
            nf4 = compare_merges(base.path, adapter.path, merges, rows, task, data.path / "tokenizer")
        for path in sorted((scratch / merge_base).iterdir()):
            path.rename(work.folder / path.name)
    report, proof, check = made[merge_base]
    kind = kind_of(read_task(data.path))
    purpose = {"instruction": "instruction-following", "dialogue": "conversational"}.get(kind, "sentiment-analysis")
    chosen = adapter.entry.facts.get("chosen")
    notes = [*run.stamps(), *([chosen["text"]] if chosen else [])]
    language = language_of(_rows(data.path, _TOLD_BY))
    write_card(work.folder, base.id, base.revision, report, proof, check, notes, merge_base, purpose, language)
    record = {**report.to_json(), "base": base.id, "adapter": "adapter", "output": "merged"}
    content = {"report": record, "proof": proof.to_json(), "check": check.to_json()}
    content |= {"method": method, "merge_base": merge_base}
    write_json(work.folder / "merge.json", content | {"nf4": nf4.to_json() if nf4 else None})
    work.facts = {"base_model": base.id, "base_revision": base.revision, "method": method, "dtype": report.dtype}
    work.facts |= {"merge_base": merge_base} | ({"chosen": chosen} if chosen else {})
    work.metrics = {
        "bytes": report.bytes_merged,
        "max_abs_log_prob": check.max_abs_log_prob,
        "mean_kld": check.mean_kld,
        "argmax_agreement": check.argmax_agreement,
    }


def _merge_into(
    base: Path, output: Path, data: Path, adapter: Path, dtype: str | None
) -> tuple[MergeReport, MergeProof, MergeCheck]:
    """Merge, prove the merged weights, and measure what rounding them costs on prompts of the run."""
    from lib.merging.checking import check_merge
    from lib.merging.folder import merge_folders
    from lib.merging.proving import prove_merge
    from lib.merging.writing import DTYPES

    report = merge_folders(base, adapter, output, dtype, tokenizer=data / "tokenizer")
    proof = prove_merge(base, adapter, output, DTYPES[dtype] if dtype else None)
    return report, proof, check_merge(base, adapter, output, check_prompts(data), report.dtype)


def _rows(data: Path, count: int) -> list[dict[str, Any]]:
    """Evenly spaced validation rows."""
    rows = read_jsonl(data / "validation.jsonl")
    step = max(1, len(rows) // count)
    return rows[::step][:count]


def check_prompts(data: Path) -> list[list[int]]:
    """Token ids of evenly spaced validation prompts of the data product."""
    from lib.models.loading import load_tokenizer

    task, tokenizer = read_task(data), load_tokenizer(data / "tokenizer")
    return [probe_ids(tokenizer, task, row) for row in _rows(data, CHECK_PROMPTS)]


def _read(product: Product) -> MergeResult:
    from lib.merging.checking import MergeCheck
    from lib.merging.proving import MergeProof
    from lib.merging.report import MergeReport

    content: dict[str, Any] = read_json(product.path / "merge.json")
    report = {**content["report"], "rules": tuple(content["report"]["rules"])}
    return MergeResult(
        product=product,
        report=MergeReport(**report),
        proof=MergeProof(**content["proof"]),
        check=MergeCheck.from_json(content["check"]),
        nf4=Nf4Comparison.from_json(content["nf4"]) if content["nf4"] else None,
        files={name: output["bytes"] for name, output in product.entry.outputs.items()},
        base=content["report"]["base"],
        method=content["method"],
        merge_base=content["merge_base"],
    )
