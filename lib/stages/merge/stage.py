"""The model card of a merged model: what it is made of, in the front matter that hubs read and in words.
Stage 04: merge the adapter into the base model, prove the weights, and measure what their rounding costs.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError
from lib.prompts.tasks import language_of, read_task
from lib.runs.files import read_json, read_jsonl, write_json, write_text
from lib.stages.merge.nf4 import DEQUANTIZED, ORIGINAL, ROWS, Nf4Comparison, compare_merges, dequantize_base
from lib.stages.merge.proof import MergeProof
from lib.stages.merge.verify import MergeCheck
from lib.stages.merge.weights import MergeReport

if TYPE_CHECKING:
    from lib.runs.run import Product, Run, Work
    from lib.settings import Settings


# The model card of a merged model: what it is made of, in the front matter that hubs read and in words.


def _is_hub_id(name: str, revision: str) -> bool:
    """A hub model has a commit; the revision of a local folder is a hash of its files."""
    return ":" not in revision and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None


def write_card(
    folder: Path,
    base: str,
    revision: str,
    report: MergeReport,
    proof: MergeProof,
    check: MergeCheck,
    notes: list[str],
    merge_base: str,
    purpose: str = "sentiment-analysis",
    language: str | None = None,
) -> Path:
    """Write README.md with YAML front matter.

    Args:
        base: hub id or name of the base model; only a hub id becomes `base_model`.
        notes: sentences that every page of the run must say (sample data, offline base).
        purpose: tag that says what it was trained for.
        language: of the rows it was trained on; None = not known.
        merge_base: "original", or "dequantized" for weights that went through NF4.
    """
    from huggingface_hub import ModelCard, ModelCardData

    known = {"base_model": base, "base_model_relation": "finetune"} if _is_hub_id(base, revision) else {}
    data = ModelCardData(
        language=language,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["lora", "merged", purpose],
        **known,
    )
    warnings = "".join(f"> {note}\n>\n" for note in notes)
    through = ", whose linear layers were rounded to NF4 before" if merge_base == "dequantized" else ""
    text = f"""---
{data.to_yaml()}
---

# Merged model

{warnings}
A LoRA adapter merged into `{base}` (revision `{revision}`){through}.

| | |
|---|---|
| weights | {report.parameters:,} in {report.dtype}, {report.bytes_merged / 1e6:.1f} MB |
| tensors changed, copied | {report.tensors_changed}, {report.tensors_copied} |
| computed again and found right | {proof.weights_summed:,} summed and {proof.weights_copied:,} copied weights |
| compared with base + adapter | {check.positions} positions of {check.prompts} prompts, in {check.computed_in} |
| what rounding to {check.dtype} costs | mean KL divergence {check.mean_kld:.2g} nats (the adapter changes the base by \
{check.effect_kld:.2g}), largest change of a log-probability {check.max_abs_log_prob:.2g} |
| same most probable token | {check.argmax_agreement:.1%} |

Each changed weight is summed in float32 and rounded once. How it was trained and measured: the reports of the run.
"""
    path = folder / "README.md"
    write_text(path, ModelCard(text).content)
    return path


def write_lineage(folder: Path, base: str, revision: str | None, adapter: str) -> Path:
    """Write README.md of a merge outside a run: what it is made of, and that no prompt was run through it.

    Args:
        revision: commit of a hub model; None for a local folder, of which only the name is told.
    """
    import yaml

    known = {"base_model": base, "base_model_relation": "finetune"} if revision and _is_hub_id(base, revision) else {}
    data = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["lora", "merged"], **known}
    where = f"`{base}` (revision `{revision}`)" if revision else f"the local model `{base}`"
    text = f"""---
{yaml.safe_dump(data, sort_keys=False).strip()}
---

# Merged model

The LoRA adapter `{adapter}` merged into {where} by `workbook merge`.
Each changed weight is summed in float32 and rounded once; all other tensors are copies. Its answers were not compared
with those of base and adapter: notebook 04 of a run does that.
"""
    path = folder / "README.md"
    write_text(path, text)
    return path


# Stage 04: merge the adapter into the base model, prove the weights, and measure what their rounding costs.

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
    from lib.models.base_model import base_of

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
    kind = read_task(data.path).kind
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
    from lib.stages.merge.proof import prove_merge
    from lib.stages.merge.verify import check_merge
    from lib.stages.merge.weights import DTYPES, merge_folders

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
    return [task.probe_ids(tokenizer, row) for row in _rows(data, CHECK_PROMPTS)]


def _read(product: Product) -> MergeResult:
    from lib.stages.merge.proof import MergeProof
    from lib.stages.merge.verify import MergeCheck
    from lib.stages.merge.weights import MergeReport

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
