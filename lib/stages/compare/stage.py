"""The stage `compare`: the run's GGUF, its ladder and its exports on the run's test rows, product `comparison`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import InputError
from lib.prompts.tasks import read_task
from lib.runs.files import read_json, read_jsonl
from lib.runs.run import Product, Run, Work
from lib.scoring.journal import found_done
from lib.scoring.log_probabilities import Scores
from lib.scoring.metric import Metric, metric_of
from lib.settings import Settings
from lib.stages.compare.error_ladder import DEQUANTIZED_SCORES, MERGED32_SCORES, MERGED_SCORES, error_ladder
from lib.stages.compare.files import SUMMARY, compare_files, forget_scores
from lib.stages.compare.retention import TUNED_SCORES, base_scores, other_model, retentions, with_retention
from lib.stages.compare.speed import LOADS
from lib.stages.compare.written import ROWS, WRITTEN, write_answers, written_parameters

_RULES = 4
"""Goes up when entries or verdicts are made otherwise, so that a comparison made before is made again."""


@dataclass(frozen=True)
class ComparisonResult:
    """What comparison.json holds.

    Attributes:
        product: the folder with comparison.json and scores-<TYPE>.jsonl.
        reference: type of the reference file.
        files: one entry a file, the reference first (keys: see README).
        frontier: types that no other file beats in both size and KL divergence, smallest first.
        recommendation: rule, type (None = the evidence does not suffice), reason, rows_needed, next_higher, text.
        conditions: device, threads, windows and margin of the measurements.
        data: where the rows come from and how many there are.
        notes: what was done otherwise than asked.
        skipped: {"format", "reason"} of every export format that could not be made here.
        agreement: equal labels by margin for each pair of models (`lib.stages.compare.error_ladder`); none without
        labels.
        retention_note: what the entries' retention rests on, or why it is unknown.
        steps: the error ladder, adapter to quantized file (`lib.stages.compare.error_ladder.error_ladder`); empty
            without a merged
            model. steps_note: why its first step is missing, in words.
        written: without labels what every GGUF file wrote to test rows, measured (`lib.stages.compare.written`):
            reference,
            decoding, chrf, terms, same_text, metrics; empty where nothing was written.
        generated: {"id", "question", "reference", "answers"} of those rows.
        labelled: whether the rows have labels; without, entries speak of answer perplexity instead of accuracy.
    """

    product: Product
    reference: str
    files: tuple[dict[str, Any], ...]
    frontier: tuple[str, ...]
    recommendation: dict[str, Any]
    conditions: dict[str, Any]
    data: dict[str, Any]
    notes: tuple[str, ...]
    skipped: tuple[dict[str, str], ...]
    agreement: tuple[dict[str, Any], ...] = ()
    steps: tuple[dict[str, Any], ...] = ()
    steps_note: str = ""
    written: dict[str, Any] = field(default_factory=dict)
    generated: tuple[dict[str, Any], ...] = ()
    labelled: bool = True
    retention_note: str = ""

    def entry(self, type_name: str) -> dict[str, Any]:
        """The entry of one type."""
        return next(entry for entry in self.files if entry["type"] == type_name)

    def scores(self, type_name: str) -> Scores:
        """Per-row scores of one type."""
        return Scores.load(self.product.path / f"scores-{type_name}.jsonl")


def compare(settings: Settings, run: Run) -> ComparisonResult:
    """Compare every file of the ladder, and every exported folder, with the run's unquantized GGUF.

    Raises:
        InputError: a missing product, or a file that llama.cpp refuses or dies of (named).
    """

    def build(work: Work) -> None:
        _build(settings, run, work)

    task = read_task(run.require("data").path)
    metric, labelled = metric_of(task), bool(task.label_names)
    margin = metric.margin_setting
    parameters = settings.pick("seed", "n_threads", "n_gpu_layers", "n_ctx", "perplexity_tokens", margin)
    parameters |= {"timed_loads": list(LOADS[:2]), "rules": _RULES}
    product = run.produce(
        "comparison",
        build,
        parameters=parameters if labelled else parameters | written_parameters(settings),
        inputs=("data", "gguf", "quantized", "exports", *(["merged"] if _has_merged(run) else [])),
        force=settings.force,
        keep_partial=True,
    )
    content = _read(run, product.path, metric)
    wrote = (product.path / WRITTEN).is_file()
    steps, steps_note = _steps(run, product.path, content, metric)
    return ComparisonResult(
        product=product,
        reference=content["reference"],
        files=tuple(content["files"]),
        frontier=tuple(content["frontier"]),
        recommendation=content["recommendation"],
        conditions=content["conditions"],
        data=content["data"],
        notes=tuple(content["notes"]),
        skipped=tuple(_exports(run)["skipped"]),
        agreement=tuple(content.get("agreement") or ()),
        steps=steps,
        steps_note=steps_note,
        written=read_json(product.path / WRITTEN) if wrote else {},
        generated=tuple(read_jsonl(product.path / ROWS)) if wrote else (),
        labelled=labelled,
        retention_note=content["retention_note"],
    )


def _read(run: Run, folder: Path, metric: Metric) -> dict[str, Any]:
    """comparison.json with what 03 and 06 know now of the base: scores that come later need no file scored again."""
    content = read_json(folder / SUMMARY)
    scores = {entry["type"]: metric.load(folder / f"scores-{entry['type']}.jsonl") for entry in content["files"]}
    groups = _groups(run.require("data").path, scores[content["reference"]].ids)
    kept = retentions(metric, scores, base_scores(run, metric), groups)
    return with_retention(content, kept, _grid(run))


def _groups(data: Path, ids: Sequence[str]) -> np.ndarray:
    """The near-duplicate cluster of each test row."""
    rows = {row["id"]: row for row in read_jsonl(data / "test.jsonl")}
    return np.array([rows[i].get("group", i) for i in ids])


def _steps(run: Run, folder: Path, content: dict[str, Any], metric: Metric) -> tuple[tuple[dict[str, Any], ...], str]:
    """The error ladder from the scores of 03 and of this product, and why a step of 03 is left out."""
    if "steps" not in content:
        return (), ""
    name, reference = content["steps"]["file"], content["reference"]
    conditions, data = content["conditions"], run.require("data").path
    load = metric.load
    steps = [
        (content["steps"]["merged"], load(folder / MERGED_SCORES)),
        (f"GGUF {reference}, llama.cpp", load(folder / f"scores-{reference}.jsonl")),
        (f"weights of {name}, transformers (float32)", load(folder / DEQUANTIZED_SCORES)),
        (f"{name}, llama.cpp", load(folder / f"scores-{name}.jsonl")),
    ]
    if in_float32 := content["steps"].get("merged_float32"):
        steps.insert(1, (in_float32, load(folder / MERGED32_SCORES)))
    note = other_model(run)
    if not note:
        scores = load(run.folder / "evaluation" / TUNED_SCORES)
        if scores.ids == steps[0][1].ids:
            method = run.manifest.entries()["adapter"].facts.get("method", "LoRA")
            steps.insert(0, (f"adapter ({method}), transformers", scores))
        else:
            note = "03 scored other rows, so the adapter is left out."
    groups = _groups(data, steps[0][1].ids)
    margin = conditions[metric.margin_condition]
    return tuple(error_ladder(metric, steps, groups, margin, conditions["seed"])), note


def _has_grid(run: Run) -> bool:
    """Whether 06 has told, of these files, what lies on the grid of the base's weights."""
    entries = run.manifest.entries()
    if not {"retention", "quantized"} <= set(entries) or not (run.folder / "retention").is_dir():
        return False
    return entries["retention"].inputs.get("quantized") == entries["quantized"].digest


def _grid(run: Run) -> dict[str, float]:
    """By file name, share of the weights in types on that grid; empty where 06 has not told."""
    if not _has_grid(run):
        return {}
    return read_json(run.require("retention").path / "retention.json")["source_grid"]


def _has_merged(run: Run) -> bool:
    """The merged folder may be deleted to save room once its GGUF is there; then it is not compared."""
    return "merged" in run.manifest.entries() and (run.folder / "merged").is_dir()


def _exports(run: Run) -> dict[str, Any]:
    return read_json(run.require("exports").path / "exports.json")


def _build(settings: Settings, run: Run, work: Work) -> None:
    from lib.models.loading import load_tokenizer

    data, quantized = run.require("data"), run.require("quantized")
    task = read_task(data.path)
    reference = _only_gguf(run.require("gguf").path)
    files = [quantized.path / row["file"] for row in read_json(quantized.path / "quantized.json")["files"]]
    folders = [run.folder / "exports" / record["folder"] for record in _exports(run)["made"]]
    rows, tokenizer = read_jsonl(data.path / "test.jsonl"), load_tokenizer(data.path / "tokenizer")
    result = compare_files(
        reference,
        [*files, *folders],
        rows,
        task,
        work.folder,
        {"source": data.entry.facts.get("source", "")},
        tokenizer=tokenizer,
        n_ctx=settings.n_ctx,
        perplexity_tokens=settings.perplexity_tokens,
        n_threads=settings.n_threads,
        n_gpu_layers=settings.n_gpu_layers,
        equivalence_margin=settings.equivalence_margin,
        perplexity_margin=settings.perplexity_margin,
        train=() if task.label_names else read_jsonl(data.path / "train.jsonl"),
        merged=run.require("merged").path if _has_merged(run) else None,
        seed=settings.seed,
        start=base_scores(run, metric_of(task)),
        grid=_grid(run),
        forget=False,
    )
    wrote: dict[str, str] = {}
    if not task.label_names:
        names = [entry["type"] for entry in result["files"]]  # the GGUF files stand before the folders
        named = dict(zip(names, [reference, *files], strict=False))
        wrote = write_answers(named, rows, task, tokenizer, settings, work.folder)
    forget_scores(work.folder)
    _tell(work, result, wrote)


def _tell(work: Work, result: dict[str, Any], wrote: dict[str, str]) -> None:
    """What the manifest says of a comparison.

    Args:
        wrote: by type, what of the written answers was found done.
    """
    work.device = result["conditions"]["device"]
    work.notes += result["notes"]
    work.facts |= {"reference": result["reference"], "recommended": result["recommendation"]["type"]}
    scored = result["found_done"]
    found = {entry["type"]: [own.get(entry["type"], "") for own in (scored, wrote)] for entry in result["files"]}
    work.facts["found_done"] = found_done(found)
    keys = ("bytes", "kld_mean", "ppl", "verdict")
    labelled = "accuracy" in result["files"][0]
    keys += ("accuracy", "accuracy_interval", "flips") if labelled else ("answer_ppl", "answer_ratio")
    work.metrics |= {entry["type"]: {key: entry[key] for key in keys} for entry in result["files"]}


def _only_gguf(folder: Path) -> Path:
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        do = "run notebooks/05_convert_gguf.ipynb with force: true."
        raise InputError(f"{len(found)} GGUF files in {folder}.", "exactly one.", do)
    return found[0]
