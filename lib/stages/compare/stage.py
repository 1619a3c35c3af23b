"""The stage `compare`: the run's GGUF, its ladder and its exports on the run's test rows, and what every file writes to
them; product `comparison`."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lib.models.gguf_file import run_gguf
from lib.prompts.tasks import Task, read_task
from lib.runs.files import data_file, read_json, read_jsonl, sha256_json, write_json, write_jsonl
from lib.runs.machine import physical_cores
from lib.runs.run import Product, ProductDraft, Run
from lib.scoring import answer_metrics
from lib.scoring.backend import found_done
from lib.scoring.generation import Questions, Written, end_ids, with_likeness, write_all
from lib.scoring.llama_backend import LlamaCppBackend
from lib.scoring.log_probabilities import load_scores
from lib.scoring.metric import AnyScores, Metric, RowGroups, metric_in, metric_of
from lib.scoring.word_lists import prompt_set, read_prompts, read_terms
from lib.settings import Settings
from lib.stages.compare.changes import base_scores, retentions, steps_of, with_retention
from lib.stages.compare.child import MERGED, WAIT_POLICY, keep_of, use_threads
from lib.stages.compare.files import ALL_FOLDS, SUMMARY, Comparison, Fold, compare_files, forget_scores, run_kept
from lib.stages.compare.recommend import reworded
from lib.stages.compare.speed import LOADS

_RULES = 7
"""Goes up when entries or verdicts are made otherwise, so that a comparison made before is made again."""


@dataclass(frozen=True)
class ComparisonResult:
    """What comparison.json holds.

    Attributes:
        product: the folder with comparison.json and scores-<TYPE>.jsonl.
        metric: of the run's task; entries are in its terms.
        reference: type of the reference file.
        files: one entry a file, the reference first (keys: see docs/json.md).
        frontier: types that no other file beats in both size and KL divergence, smallest first.
        recommendation: what `lib.stages.compare.recommend.recommend` says.
        conditions: device, threads, windows and margin of the measurements.
        data: where the rows come from and how many there are.
        notes: what was done otherwise than asked.
        skipped: {"format", "reason"} of every export format that could not be made here.
        agreement: equal labels by margin for each pair of models; none without labels.
        retention_note: what the entries' retention rests on, or why it is unknown.
        fine_tuning_gain: the base's loss against the reference on the run's own test rows; None where it is unknown.
        below_floor: accuracy points by which 03 showed the model to be worse than the linear floor; None where not.
        steps: the error ladder, adapter to quantized file; empty without a merged model.
        steps_note: why its first step is missing, in words.
        written: what every GGUF file and the merged model wrote to test rows whose answers are free text, measured:
            reference, decoding, chrf, terms, same_text, metrics; empty where nothing was written.
        generated: {"id", "question", "reference", "answers"} of those rows. prompts: the same of the set of prompts:
            {"set", "system_prompt", "prompts": [{"prompt", "reference", "answers"}]}.
    """

    product: Product
    metric: Metric
    reference: str
    files: list[dict[str, Any]]
    frontier: list[str]
    recommendation: dict[str, Any]
    conditions: dict[str, Any]
    data: dict[str, Any]
    notes: list[str]
    retention_note: str
    fine_tuning_gain: float | None
    below_floor: float | None
    skipped: list[dict[str, str]]
    agreement: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    steps_note: str
    written: dict[str, Any]
    generated: list[dict[str, Any]]
    prompts: dict[str, Any]

    def entry(self, type_name: str) -> dict[str, Any]:
        """The entry of one type."""
        return next(entry for entry in self.files if entry["type"] == type_name)

    @property
    def others(self) -> list[dict[str, Any]]:
        """All entries but the reference's."""
        return [entry for entry in self.files if entry["type"] != self.reference]

    @property
    def margin(self) -> float:
        """Loss from which a file is not good enough, in the metric's unit."""
        return self.conditions[self.metric.margin_condition]

    def scores(self, type_name: str) -> AnyScores:
        """Per-row scores of one type, on all rows that it is judged on."""
        every = self.product.path / ALL_FOLDS.format(type_name)
        return load_scores(every) if every.is_file() else self.own_scores(type_name)

    def own_scores(self, type_name: str) -> AnyScores:
        """Per-row scores of one type on the run's own test rows, without those of other folds."""
        return load_scores(self.product.path / f"scores-{type_name}.jsonl")


def compare(settings: Settings, run: Run) -> ComparisonResult:
    """Compare every file of the ladder, and every exported folder, with the run's unquantized GGUF.

    Raises:
        InputError: a missing product, or a file that llama.cpp refuses or dies of (named).
    """
    run.on_other_folds(compare, settings.model_copy(update={"generated_rows": 0}))
    folds = run.other_folds()
    data = run.require("data").path
    task, metric = read_task(data), metric_of(read_task(data))
    used = ("seed", "n_threads", "n_gpu_layers", "n_ctx", "perplexity_tokens", metric.margin_setting)
    parameters = settings.pick(*used) | {"timed_loads": list(LOADS[:2]), "rules": _RULES}
    if folds:
        digests = [fold.require("comparison").entry.digest for fold in folds]
        parameters["comparisons_of_folds"] = sha256_json(digests)[:16]
    product = run.produce(
        "comparison",
        lambda work: _build(settings, run, work),
        parameters=parameters | written_parameters(settings, task),
        inputs=(
            "data",
            "gguf",
            "quantized",
            *([] if run.fold > 1 else ["exports"]),
            *(["merged"] if _has_merged(run) else []),
        ),
        force=settings.force,
        keep_partial=True,
    )
    rows = RowGroups.of(read_jsonl(data / "test.jsonl"))
    content = _read(run, product.path, metric, rows)
    steps, steps_note = steps_of(run, product.path, content, metric, rows)
    wrote = (product.path / WRITTEN).is_file()
    kept = ("reference", "files", "frontier", "recommendation", "conditions", "data", "notes")
    return ComparisonResult(
        product=product,
        metric=metric,
        **{key: content[key] for key in (*kept, "retention_note", "fine_tuning_gain")},
        below_floor=_below_floor(run),
        skipped=_exports(run)["skipped"],
        agreement=content.get("agreement") or [],
        steps=steps,
        steps_note=steps_note,
        written=read_json(product.path / WRITTEN) if wrote else {},
        generated=read_jsonl(product.path / ROWS) if wrote else [],
        prompts=read_json(product.path / PROMPTS) if wrote else {},
    )


def _read(run: Run, folder: Path, metric: Metric, rows: RowGroups) -> dict[str, Any]:
    """comparison.json with what 03 and 06 know now of the base: scores that come later need no file scored again."""
    content = read_json(folder / SUMMARY)
    scores = {entry["type"]: load_scores(folder / f"scores-{entry['type']}.jsonl") for entry in content["files"]}
    found = with_retention(content, retentions(metric, scores, base_scores(run), rows.groups), _grid(run))
    return {**found, "recommendation": reworded(found)}


def _below_floor(run: Run) -> float | None:
    """On leak-free rows where there are others, too, as 03 says it; None without labels, or without 03."""
    path = run.folder / "evaluation" / "evaluation.json"
    if "evaluation" not in run.manifest.entries() or not path.is_file():
        return None
    compared = read_json(path).get("comparisons") or {}
    told = (compared.get("leak_free") or compared.get("all") or {}).get("linear floor")
    return -100 * told["difference"] if told and told["verdict"] == "worse" else None


def _grid(run: Run) -> dict[str, float]:
    """By file name, share of the weights in types on the grid of the base's weights; empty where 06 has not told, of
    these files."""
    entries = run.manifest.entries()
    if not {"retention", "quantized"} <= set(entries) or not (run.folder / "retention").is_dir():
        return {}
    if entries["retention"].inputs.get("quantized") != entries["quantized"].digest:
        return {}
    return read_json(run.require("retention").path / "retention.json")["source_grid"]


def _has_merged(run: Run) -> bool:
    """The merged folder may be deleted to save room once its GGUF is there; then it is not compared. Of another fold
    only the files are."""
    return run.fold == 1 and "merged" in run.manifest.entries() and (run.folder / "merged").is_dir()


def _exports(run: Run) -> dict[str, Any]:
    if run.fold > 1:
        return {"made": [], "skipped": []}
    return read_json(run.require("exports").path / "exports.json")


def _build(settings: Settings, run: Run, work: ProductDraft) -> None:
    from lib.models.loading import load_tokenizer

    data, quantized = run.require("data"), run.require("quantized")
    task, reference = read_task(data.path), run_gguf(run)
    files = [quantized.path / row["file"] for row in read_json(quantized.path / "quantized.json")["files"]]
    folders = [run.folder / "exports" / record["folder"] for record in _exports(run)["made"]]
    asked = Comparison(
        reference,
        [*files, *folders],
        rows=read_jsonl(data.path / "test.jsonl"),
        task=task,
        output=work.folder,
        source={"source": data.entry.facts.get("source", "")},
        tokenizer=load_tokenizer(data.path / "tokenizer"),
        **settings.pick("n_ctx", "perplexity_tokens", "n_threads", "n_gpu_layers", "seed"),
        margin=getattr(settings, metric_of(task).margin_setting),
        train=data.path / "train.jsonl",
        merged=run.require("merged").path if _has_merged(run) else None,
        folds=[
            Fold(read_jsonl(fold.require("data").path / "test.jsonl"), fold.require("comparison").path)
            for fold in run.other_folds()
        ],
        start=base_scores(run),
        grid=_grid(run),
    )
    result = compare_files(asked, forget=False)
    names = [entry["type"] for entry in result["files"]]  # the GGUF files stand before the folders
    wrote = write_answers(dict(zip(names, [reference, *files], strict=False)), asked, settings)
    forget_scores(work.folder)
    _tell(work, result, wrote)


def _tell(work: ProductDraft, result: Mapping[str, Any], wrote: Mapping[str, str]) -> None:
    """What the manifest says of a comparison.

    Args:
        wrote: by type, what of the written answers was already there.
    """
    work.device = result["conditions"]["device"]
    work.notes += result["notes"]
    if folds := result["files"][0].get("folds"):
        note = data_file("stages/compare/notes.yaml")["folds"]
        work.notes.append(note.format(folds=folds, rows=result["files"][0]["n"]))
    work.facts |= {"reference": result["reference"], "recommended": result["recommendation"]["type"]}
    scored = result["found_done"]
    found = {entry["type"]: [own.get(entry["type"], "") for own in (scored, wrote)] for entry in result["files"]}
    work.facts["found_done"] = found_done(found)
    keys = ("bytes", "kld_mean", "ppl", "verdict", *metric_in(result["files"]).in_manifest)
    work.metrics |= {entry["type"]: {key: entry[key] for key in keys} for entry in result["files"]}


# What every GGUF file writes to the same test rows, measured, and compared with what the reference writes.


WRITTEN, ROWS, PROMPTS = "written.json", "generated.jsonl", "prompts.json"
KEYS = ("generated_rows", "max_new_tokens", "terms", "prompts_file")


def written_parameters(settings: Settings, task: Task) -> dict[str, Any]:
    """The settings that decide what is written, with hashes of terms and prompts; none where answers are words.

    Raises:
        InputError: no such list or set.
    """
    if task.label_names:
        return {}
    terms, prompts = read_terms(settings.terms), read_prompts(prompt_set(settings))
    hashes = {"terms_sha256": terms and terms.sha256, "prompts_sha256": sha256_json(prompts)}
    return settings.pick(*KEYS) | answer_metrics.parameter(settings) | hashes


def write_answers(files: Mapping[str, Path], asked: Comparison, settings: Settings) -> dict[str, str]:
    """Let every file, and the merged model, answer the same test rows and prompts greedily, one at a time.

    Makes written.json, generated.jsonl and prompts.json in the comparison's folder; likeness is to the reference.

    Nothing is written with `generated_rows: 0`, or where the answers are words that are scored.

    Args:
        files: type -> GGUF file, the reference first.

    Returns:
        by type, what an interrupted run had already written, in words.

    Raises:
        InputError: a file that llama.cpp refuses or dies of.
    """
    task, tokenizer = asked.task, asked.tokenizer
    if task.label_names or not settings.generated_rows:
        return {}
    questions = Questions.of(settings, tokenizer, task, asked.rows, read_prompts(prompt_set(settings)))
    every, rows = (*questions.asked, *questions.prompts), len(questions.asked)
    argument = {
        "prompts": [one.ids for one in every],
        "ends": sorted(end_ids(tokenizer)),
        "most": settings.max_new_tokens,
        "n_threads": settings.n_threads or physical_cores(),
        "n_gpu_layers": settings.n_gpu_layers,
    }
    made = {
        name: run_kept("stage:write_file", path, argument, asked.output, f"answers of {name}")
        for name, path in (files | ({MERGED: asked.merged} if asked.merged else {})).items()
    }
    told = with_likeness(
        {name: questions.told(every, [Written(**one) for one in own["written"]]) for name, own in made.items()}
    )
    answers, reference = {name: own[:rows] for name, own in told.items()}, next(iter(told))
    texts = {name: [answer["text"] for answer in given] for name, given in answers.items()}
    content = {
        "reference": reference,
        **questions.conditions(),
        "same_text": {name: sum(map(operator.eq, own, texts[reference])) for name, own in texts.items()},
        "metrics": questions.summarise(answers, reference),
    }
    write_json(asked.output / WRITTEN, content)
    write_jsonl(asked.output / ROWS, _readable(questions, answers))
    prompts = [
        {**source, "answers": {name: own[rows + place] for name, own in told.items()}}
        for place, source in enumerate(questions.sources)
    ]
    conditions = {"set": Path(prompt_set(settings)).name, "system_prompt": task.system_prompt}
    write_json(asked.output / PROMPTS, {**conditions, "prompts": prompts})
    return found_done({name: [own["found"]] for name, own in made.items()})


def _readable(questions: Questions, answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Question, reference and every file's answer of each row."""
    return [
        {
            "id": row["id"],
            "question": one.question,
            "reference": one.reference,
            "answers": {name: given[place] for name, given in answers.items()},
        }
        for place, (row, one) in enumerate(zip(questions.rows, questions.asked, strict=True))
    ]


def write_file(argument: dict[str, Any]) -> dict[str, Any]:
    """Answers of one file or folder, in a process of its own; the first prompt is read once before, for the latency.

    Args:
        argument: "path", "prompts" (token ids of each), "ends", "most", "n_threads", "n_gpu_layers", "keep" (file for
            the answers as they come).

    Returns:
        {"written": fields of a Written, one a prompt; "found": what of them was there, in words}.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", WAIT_POLICY)
    prompts, most = argument["prompts"], argument["most"]
    context = max(map(len, prompts)) + most
    path = Path(argument["path"])
    if path.is_file():
        backend: Any = LlamaCppBackend(path, context, argument["n_threads"], argument["n_gpu_layers"])
    else:
        from lib.scoring.folders import open_folder

        use_threads(argument)
        backend = open_folder(path, 1, path.name, argument["n_threads"], context)
    with backend:
        backend.new_text()(prompts[0])
        written, found = write_all(backend, prompts, most, argument["ends"], keep_of(argument))
    return {"written": [asdict(one) for one in written], "found": found}
