"""The rows of the notebooks' tables: results of the stages brought into columns that are named with their units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]

FORMATS: dict[str, str] = {
    **dict.fromkeys(("accuracy ↑", "macro-F1 ↑", "precision", "recall", "F1", "95 % low", "95 % high"), ".3f"),
    **dict.fromkeys(("MB", "predicted, MB"), ",.3f"),
    **dict.fromkeys(("bits per weight", "bits / weight", "load, s", "ms a row", "MDE, points"), ".2f"),
    **dict.fromkeys(("MiB", "peak memory, MiB", "prompt, tokens/s", "generation, tokens/s"), ",.0f"),
    **dict.fromkeys(("KL, nats ↓", "mean", "± (1.96 SE)", "median", "99th percentile", "largest"), ".2e"),
    **dict.fromkeys(("same top token ↑", "same top ↑", "share of the source"), ".1%"),
    **dict.fromkeys(("p", "p (Holm)"), ".2g"),
    **dict.fromkeys(("difference, points", "from, points", "to, points"), "+.2f"),
    **dict.fromkeys(("perplexity ↓", "PPL ↓", "±"), ".3f"),
    **dict.fromkeys(("truncated share", "seconds"), ".3g"),
    "margin change, nats": "+.4f",
    "ratio to reference": ".4f",
    "probability": ".3f",
}
"""How the columns are written, by their name; a table in a notebook need not repeat it."""


def _interval(limits: Sequence[float] | None, form: str = ".3f") -> str | None:
    return None if limits is None else f"[{limits[0]:{form}},\u00a0{limits[1]:{form}}]"


def machine_card(machine: Any) -> Row:
    """What ran everything (a device.Machine)."""
    return {
        "system": machine.system,
        "processor": f"{machine.processor}, {machine.cores} cores",
        "accelerator": machine.accelerator,
        "memory": f"{machine.memory_gib:g} GiB, {machine.available_gib:g} GiB of it free",
        "free on the disk of runs/": f"{machine.disk_free_gb:g} GB",
        "number format": f"{machine.dtype} ({machine.dtype_reason})",
        "bitsandbytes": machine.bitsandbytes,
        "llama-cpp-python": machine.llama_cpp,
    }


def reports(parts: Mapping[str, Mapping[str, Any] | None]) -> list[Row]:
    """Estimates for `charts.estimates` from classification reports as JSON; parts without rows are left out."""
    return [
        {
            "name": name,
            "estimate": report["accuracy"],
            "low": report["accuracy_interval"][0],
            "high": report["accuracy_interval"][1],
            "n": report["n"],
        }
        for name, report in parts.items()
        if report
    ]


def accuracies(result: Any) -> list[Row]:
    """Accuracy of every model on every part of the test rows (an EvaluationResult)."""
    return [
        {
            "rows": part.replace("_", " "),
            "model": point["name"],
            "n": point["n"],
            "accuracy ↑": point["estimate"],
            "95 % low": point["low"],
            "95 % high": point["high"],
        }
        for part in result.subsets()
        for point in result.accuracies(part)
    ]


def paired(comparisons: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """The fine-tuned model against each reference on each part of the rows."""
    return [
        {
            "rows": part.replace("_", " "),
            "fine-tuned against": name,
            "n": c.n,
            "lost": c.losses,
            "won": c.gains,
            "difference, points": 100 * c.difference.estimate,
            "from, points": 100 * c.difference.low,
            "to, points": 100 * c.difference.high,
            "p (Holm)": c.p_adjusted,
            "verdict": c.verdict,
        }
        for part, pairs in comparisons.items()
        for name, c in pairs.items()
    ]


def classes(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Per-class scores; `f1` is written F1."""
    return [{("F1" if key == "f1" else key): value for key, value in row.items()} for row in rows]


def mistakes(found: Iterable[Any], label_names: Sequence[str]) -> list[Row]:
    """Wrong answers as text, the label names for the numbers."""
    return [
        {
            "row": mistake.id,
            "text": mistake.text,
            "label": label_names[mistake.label],
            "answer": label_names[mistake.prediction],
            "probability": mistake.probability,
            "leaked": mistake.leaked,
        }
        for mistake in found
    ]


def training_card(result: Any) -> Row:
    """What was trained and how (a FinetuneResult)."""
    return {
        "base model": f"{result.base['id']} ({str(result.base['revision'])[:12]})",
        "method": result.method,
        "trainable weights": f"{result.trainable:,} of {result.total:,} ({100 * result.trainable_share:.2f} %)",
        "rows": f"{result.train_rows:,} for training, {result.validation_rows:,} for validation",
        "number format": f"{result.dtype} ({result.dtype_reason})",
        "device": result.product.entry.device,
        "continued from step": "none; trained in one go" if result.resumed_from is None else result.resumed_from,
        "messages": "; ".join(result.messages) or "none",
    }


def memory(result: Any) -> list[Row]:
    """Estimated memory by purpose, what was free, what was measured (a FinetuneResult)."""
    rows = [{"part": part.replace("_", " "), "MiB": size / 2**20} for part, size in result.estimate.items()]
    rows.append({"part": "free before the start", "MiB": result.memory["available"] / 2**20})
    rows.append({"part": "measured peak while training", "MiB": result.peak_memory_mib})
    return rows


def merge_card(result: Any) -> Row:
    """What the merge did (a MergeResult)."""
    report = result.report
    return {
        "base model": result.base,
        "trained as": result.method,
        "number format": report.dtype,
        "tensors": f"{report.tensors_changed:,} changed, {report.tensors_copied:,} copied as bytes",
        "weights": f"{report.parameters_changed:,} of {report.parameters:,} changed",
        "scaling (modules)": ", ".join(f"{factor} ({count})" for factor, count in report.scalings.items()),
        "memory of its own, MiB": report.peak_anonymous_mib,
        "seconds": report.seconds,
    }


def merge_check(check: Any) -> list[Row]:
    """The merge's cost beside the adapter's effect (a MergeCheck)."""
    found = {
        "base + adapter → merged (the merge's cost)": (check.mean_kld, check.argmax_agreement),
        "base + adapter → base (the adapter's effect)": (check.effect_kld, check.effect_agreement),
    }
    if check.nf4_kld is not None:
        found["adapter on the NF4 base → merged"] = (check.nf4_kld, check.nf4_agreement)
    return [{"compared": name, "KL, nats ↓": kld, "same top token ↑": same} for name, (kld, same) in found.items()]


def conversion_card(result: Any) -> Row:
    """What was converted (an ExportResult)."""
    conversion = result.conversion
    return {
        "file": result.path.name,
        "architecture": conversion.architecture,
        "type": conversion.outtype.upper(),
        "weights": f"{conversion.parameters:,} in {conversion.tensors} tensors",
        "tensor types": ", ".join(f"{kind}: {count}" for kind, count in conversion.types.items()),
        "size": f"{conversion.bytes_after / 1e6:,.2f} MB",
        "pre-tokenizer": f"{conversion.pre_tokenizer} ({conversion.recognised})",
        "vocabulary": f"{conversion.tokens:,} tokens, {conversion.padding_tokens:,} of them padding",
        "loaded by llama.cpp": conversion.loaded,
    }


def gate(report: Any) -> list[Row]:
    """The three questions of the gate with what was measured and what was required (a GateReport)."""
    divergence = f"mean KL {report.mean_kld:.2e} nats, largest {report.max_kld:.1e}, {report.positions:,} positions"
    answers = {
        "same token ids": (f"{report.tokens:,} ids of {report.texts:,} texts, all equal", "all equal"),
        "same next-token distribution": (divergence, f"mean at most {report.limit_kld:g} nats"),
        "same labels": (
            f"{100 * report.label_agreement:.2f} % of {report.rows:,} rows",
            f"at least {100 * report.limit_agreement:g} %",
        ),
    }
    return [{"question": q, "measured": measured, "required": needed} for q, (measured, needed) in answers.items()]


def sizes(source: Mapping[str, Any], files: Iterable[Any]) -> list[Row]:
    """Predicted and measured sizes of a ladder (QuantizationReports) below their source."""
    first = {"type": source["type"], "MB": source["bytes"] / 1e6, "bits per weight": source["bits_per_weight"]}
    rows = [
        {
            "type": f.type,
            "MB": f.bytes / 1e6,
            "predicted, MB": f.predicted_bytes / 1e6,
            "share of the source": f.bytes / source["bytes"],
            "bits per weight": f.bits_per_weight,
            "token embedding": f.token_embedding_type,
            "tensors that fell back": len(f.fallbacks),
            "seconds": f.seconds,
        }
        for f in files
    ]
    return [{**dict.fromkeys(rows[0]), **first, "share of the source": 1.0}, *rows]


def megabytes_by_type(source: Mapping[str, Any], files: Iterable[Any]) -> dict[str, dict[str, float]]:
    """Megabytes of each tensor type of each file, for `ladder.tensor_types`."""
    histograms = {source["type"]: source["histogram"], **{f.type: f.histogram for f in files}}
    return {name: {part["type"]: part["bytes"] / 1e6 for part in parts} for name, parts in histograms.items()}


def quality(files: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Size, quality and verdict of each file (entries of comparison.json)."""
    return [
        {
            "type": e["type"],
            "MB": e["bytes"] / 1e6,
            "bits / weight": e["bits_per_weight"],
            "accuracy ↑": e["accuracy"],
            "95 % interval": _interval(e["accuracy_interval"]),
            "verdict": e["verdict"],
            "flips ↓": e["flips"],
            "KL, nats ↓": e["kld_mean"],
            "same top ↑": e["same_top"],
            "PPL ↓": e["ppl"],
            "macro-F1 ↑": e["macro_f1"],
        }
        for e in files
    ]


def differences(files: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Paired difference in accuracy from the reference, in points, for `charts.estimates`."""
    return [
        {
            "name": e["type"],
            "estimate": 100 * e["accuracy_difference"],
            "low": 100 * e["accuracy_difference_interval"][0],
            "high": 100 * e["accuracy_difference_interval"][1],
            "n": e["n"],
        }
        for e in files
    ]


def tests(files: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The paired test of each file against the reference."""
    return [
        {
            "type": e["type"],
            "lost": e["mcnemar_b"],
            "won": e["mcnemar_c"],
            "p": e["mcnemar_p"],
            "p (Holm)": e["mcnemar_p_holm"],
            "MDE, points": 100 * e["mde"],
            "margin change, nats": e["margin_change_mean"],
            "95 % interval": _interval(e["margin_change_interval"], "+.3f"),
            "verdict": e["verdict"],
            "leak-free verdict": (e["leak_free"] or {}).get("verdict"),
        }
        for e in files
    ]


def divergences(files: Iterable[Mapping[str, Any]]) -> list[Row]:
    """KL divergence from the reference and perplexity of each file."""
    return [
        {
            "type": e["type"],
            "mean": e["kld_mean"],
            "± (1.96 SE)": 1.96 * e["kld_uncertainty"],
            "median": e["kld_median"],
            "99th percentile": e["kld_p99"],
            "largest": e["kld_max"],
            "perplexity ↓": e["ppl"],
            "±": e["ppl_uncertainty"],
            "ratio to reference": e["ppl_ratio"],
        }
        for e in files
    ]


def speeds(files: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Load time, token rates with their range, and memory of each file."""
    return [
        {
            "type": e["type"],
            "load, s": e["load_seconds"],
            "prompt, tokens/s": e["prompt_tokens_per_second"],
            "prompt range": "{:,.0f} – {:,.0f}".format(*e["prompt_tokens_per_second_range"]),
            "generation, tokens/s": e["generation_tokens_per_second"],
            "generation range": "{:,.0f} – {:,.0f}".format(*e["generation_tokens_per_second_range"]),
            "ms a row": 1000 * e["seconds_per_sample"],
            "peak memory, MiB": e["peak_memory_mib"],
        }
        for e in files
    ]
