"""Stage 04: merge the adapter into the base model and prove that the answers stayed the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.run.files import read_json, read_jsonl, write_json

if TYPE_CHECKING:
    from lib.merging.checking import MergeCheck
    from lib.merging.report import MergeReport
    from lib.run import Product, Run, Work
    from lib.settings import Settings

__all__ = ["MergeResult", "merge"]

CHECK_PROMPTS = 12
"""Validation rows whose prompts check the merge."""


@dataclass(frozen=True)
class MergeResult:
    """The merged model of a run.

    Attributes:
        report: sizes, tensors, memory and rules of the merge.
        check: how far its answers are from those of base + adapter.
        files: bytes of every file of the product.
        base: id of the base model; method: how the adapter was trained ("LoRA", "QLoRA").
    """

    product: Product
    report: MergeReport
    check: MergeCheck
    files: dict[str, int]
    base: str
    method: str


def merge(settings: Settings, run: Run) -> MergeResult:
    """Make the product `merged` from `adapter` and the run's base model, or skip it when nothing changed.

    Raises:
        InputError: an adapter that cannot be merged exactly, or a merged model that answers differently.
    """
    product = run.produce(
        "merged", lambda work: _build(run, work), parameters={}, inputs=("data", "adapter"), force=settings.force
    )
    return _read(product)


def _build(run: Run, work: Work) -> None:
    from lib.merging.card import write_card
    from lib.merging.checking import check_merge
    from lib.merging.folder import merge_folders
    from lib.models.loading import base_of

    data, adapter, base = run.require("data"), run.require("adapter"), base_of(run)
    method = str(adapter.entry.facts.get("method", "LoRA"))
    fresh = work.folder / "model"
    report = merge_folders(base.path, adapter.path, fresh, tokenizer=data.path / "tokenizer")
    prompts = check_prompts(data.path)
    check = check_merge(base.path, adapter.path, fresh, prompts, report.dtype, trained_on_nf4=method == "QLoRA")
    for path in sorted(fresh.iterdir()):
        path.rename(work.folder / path.name)
    fresh.rmdir()
    write_card(work.folder, base.id, base.revision, report, check, run.stamps())
    record = {**report.to_json(), "base": base.id, "adapter": "adapter", "output": "merged"}
    write_json(work.folder / "merge.json", {"report": record, "check": check.to_json(), "method": method})
    work.facts = {"base_model": base.id, "base_revision": base.revision, "method": method, "dtype": report.dtype}
    work.metrics = {
        "bytes": report.bytes_merged,
        "max_abs_log_prob": check.max_abs_log_prob,
        "mean_kld": check.mean_kld,
        "argmax_agreement": check.argmax_agreement,
    }


def check_prompts(data: Path) -> list[list[int]]:
    """Token ids of evenly spaced validation prompts of the data product."""
    from lib.models.loading import load_tokenizer
    from lib.models.prompting import Task, encode

    rows = read_jsonl(data / "validation.jsonl")
    step = max(1, len(rows) // CHECK_PROMPTS)
    task, tokenizer = Task.from_json(read_json(data / "task.json")), load_tokenizer(data / "tokenizer")
    return [encode(tokenizer, task, row["text"]).prompt_ids for row in rows[::step][:CHECK_PROMPTS]]


def _read(product: Product) -> MergeResult:
    from lib.merging.checking import MergeCheck
    from lib.merging.report import MergeReport

    content: dict[str, Any] = read_json(product.path / "merge.json")
    report = {**content["report"], "rules": tuple(content["report"]["rules"])}
    return MergeResult(
        product=product,
        report=MergeReport(**report),
        check=MergeCheck(**content["check"]),
        files={name: output["bytes"] for name, output in product.entry.outputs.items()},
        base=content["report"]["base"],
        method=content["method"],
    )
