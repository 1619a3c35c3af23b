"""The model card of a merged model: what it is made of, in the front matter that hubs read and in words."""

from __future__ import annotations

import re
from pathlib import Path

from lib.merging.checking import MergeCheck
from lib.merging.proving import MergeProof
from lib.merging.report import MergeReport
from lib.run.files import write_text


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
