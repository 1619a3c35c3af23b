"""Stage 04: merge the adapter into the base model, prove the weights, and measure what their rounding costs."""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lib.errors import refusal
from lib.models.adapters import CONFIG
from lib.models.base_model import base_of
from lib.models.loading import load_tokenizer
from lib.models.weights import SAFETENSORS
from lib.prompts.tasks import language_of, read_task, spread
from lib.runs.files import read_json, read_jsonl, write_json, write_text
from lib.runs.render import render
from lib.runs.run import Product, ProductDraft, Run
from lib.settings import DEQUANTIZED, FULL, LOFTQ, UNTRAINED, Settings
from lib.stages.merge.nf4 import ORIGINAL, ROWS, Nf4Comparison, compare_merges, dequantize_base
from lib.stages.merge.proof import MergeProof, prove_merge
from lib.stages.merge.verify import MergeCheck, check_merge
from lib.stages.merge.weights import MergeReport, merge_folders

_CHECK = 3
"""Counted up when the check measures more, so that an older merge is measured again."""

_TOLD_BY = 200
"""Validation rows from which the language of the card is told."""

CHECK_PROMPTS = 12
"""Validation rows whose prompts check the merge."""


@dataclass(frozen=True)
class MergeRecord:
    """Content of merge.json.

    Attributes:
        report: sizes, tensors, memory and rules of the merge.
        proof: what was recomputed, and found right.
        check: what rounding the weights costs: answers beside those of base + adapter.
        method: how the adapter was trained ("LoRA", "QLoRA"); "full", "none" where there is none.
        merge_base: into which weights it was merged ("original", "dequantized").
        nf4: both ways to merge an adapter of an NF4 base, measured; None for an adapter of a 16-bit base, and of LoftQ,
            which has one way.
    """

    report: MergeReport
    proof: MergeProof
    check: MergeCheck
    method: str
    merge_base: str
    nf4: Nf4Comparison | None


@dataclass(frozen=True)
class MergeResult(MergeRecord):
    """The merged model of a run."""

    product: Product

    @property
    def trained(self) -> bool:
        """Whether anything was trained; else the weights are the base's."""
        return self.method != UNTRAINED

    @property
    def whole(self) -> bool:
        """Whether every weight was trained: nothing was merged, the trained weights were taken over."""
        return self.method == FULL

    @property
    def files(self) -> dict[str, int]:
        """Bytes of every file of the product."""
        return {name: output["bytes"] for name, output in self.product.entry.outputs.items()}

    @property
    def base(self) -> str:
        """Id of the base model."""
        return self.report.base


def merge(settings: Settings, run: Run) -> MergeResult:
    """Make the product `merged` from `adapter` and the run's base model, or skip it when nothing changed.

    Where nothing was trained it holds the base's own weights, and where every weight was trained those; both is proved.

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


def _build(merge_base: str, merge_dtype: str, run: Run, work: ProductDraft) -> None:
    data, made, base = run.require("data"), run.require("adapter"), base_of(run)
    method, adapter = str(made.entry.facts.get("method", "LoRA")), None if run.untrained else made.path
    if method != "QLoRA" and merge_base != ORIGINAL:
        raise refusal("merge/no-nf4-base", merge_base=merge_base)
    loftq = made.entry.parameters.get("init_lora_weights") == LOFTQ
    if loftq and merge_base != DEQUANTIZED:
        raise refusal("merge/loftq", merge_base=merge_base)
    task, dtype = read_task(data.path), None if merge_dtype == "base" else merge_dtype
    rows, tokenizer = read_jsonl(data.path / "validation.jsonl"), load_tokenizer(data.path / "tokenizer")
    prompts = [task.probe_ids(tokenizer, row) for row in spread(rows, CHECK_PROMPTS)]
    folders, nf4 = {ORIGINAL: base.path}, None
    with tempfile.TemporaryDirectory(prefix=".merging-", dir=work.folder) as name:
        scratch = Path(name)
        if method == "QLoRA":
            folders[DEQUANTIZED] = dequantize_base(base.path, scratch / "dequantized-base")
        if loftq:
            del folders[ORIGINAL]  # that never lost what the adapter makes up for
            adapter = _on_rounded_base(made.path, scratch / "adapter")
        merged, found = {key: scratch / key for key in folders}, {}
        for key, folder in folders.items():
            report = merge_folders(folder, adapter, merged[key], dtype, tokenizer=data.path / "tokenizer")
            proof = prove_merge(folder, adapter, merged[key], SAFETENSORS[dtype] if dtype else None)
            found[key] = report, proof, check_merge(folder, adapter, merged[key], prompts, report.dtype)
        if method == "QLoRA" and not loftq:
            nf4 = compare_merges(base.path, made.path, merged, spread(rows, ROWS), task, tokenizer)
        for path in sorted(merged[merge_base].iterdir()):
            path.rename(work.folder / path.name)
    report, proof, check = found[merge_base]
    chosen = made.entry.facts.get("chosen")
    told = {
        "trained": adapter is not None,
        "whole": run.whole,
        "merge_base": merge_base,
        "report": report,
        "proof": proof,
        "check": check,
    }
    told["notes"] = [*run.stamps(), *([chosen["text"]] if chosen else [])]
    told |= {"task": task.kind, "language": language_of(spread(rows, _TOLD_BY))}
    _write_readme(work.folder, "card.md.j2", base.id, base.revision, **told)
    named = replace(report, base=base.id, adapter="adapter" if adapter else "", output="merged")
    write_json(work.folder / "merge.json", asdict(MergeRecord(named, proof, check, method, merge_base, nf4)))
    work.facts = {"base_model": base.id, "base_revision": base.revision, "method": method, "dtype": report.dtype}
    work.facts |= {"merge_base": merge_base} | ({"chosen": chosen} if chosen else {})
    measured = ("max_abs_log_prob", "mean_kld", "argmax_agreement")
    work.metrics = {"bytes": report.bytes_merged, **{key: getattr(check, key) for key in measured}}


def _on_rounded_base(adapter: Path, folder: Path) -> Path:
    """A copy of LoftQ's adapter without its mark: on the rounded base it is plain LoRA."""
    shutil.copytree(adapter, folder, ignore=shutil.ignore_patterns("checkpoints"))
    config = read_json(folder / CONFIG)
    write_json(folder / CONFIG, {key: value for key, value in config.items() if key != "loftq_config"})
    return folder


def _read(product: Product) -> MergeResult:
    record = TypeAdapter(MergeRecord).validate_python(read_json(product.path / "merge.json"))
    return MergeResult(**vars(record), product=product)


def _write_readme(folder: Path, template: str, base: str, revision: str | None, **values: Any) -> None:
    """Write README.md of a merged model: front matter that hubs read, and what it is made of in words.

    Args:
        base: hub id or name; only a hub's base is named in the front matter. values: whatever else the template names.
    """
    on_hub = revision and ":" not in revision and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", base)
    told = {"on_hub": on_hub, "base": base, "revision": revision, **values}
    write_text(folder / "README.md", render(Path(__file__).with_name(template), **told))


def write_lineage(folder: Path, base: str, revision: str | None, adapter: str) -> None:
    """Write README.md of a merge outside a run: what it is made of, and that no prompt was run through it.

    Args:
        revision: commit of a hub model; None for a local folder, of which only the name is told.
    """
    _write_readme(folder, "lineage.md.j2", base, revision, adapter=adapter)
