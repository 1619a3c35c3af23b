"""Any models on any labelled rows, each in a process of its own: what `workbook evaluate` does."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.evaluation.analysis import LEAK_FREE, evaluate_scores, subsets
from lib.evaluation.checking import base_of_adapter, check_models, is_gguf
from lib.evaluation.sides import notes
from lib.models.prompting import Task, label_note
from lib.progress import say
from lib.run.child import run_child
from lib.run.files import read_json, read_jsonl, sha256_json, write_jsonl
from lib.run.folders import user_path
from lib.scoring import Keep, Scores, score_rows
from lib.scoring.journal import journal_path, kept_peak_memory_mib, model_hash


def evaluate_models(
    models: Sequence[str | Path],
    rows: Sequence[Mapping[str, Any]],
    task: Task,
    data: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    revision: str = "main",
    dtype: str = "auto",
    load_in_4bit: bool = False,
    batch_size: int = 32,
    n_threads: int = 0,
    n_gpu_layers: int = 0,
    keep: Path | None = None,
    tokenizer: Path | None = None,
) -> dict[str, Any]:
    """Accuracy and cost of each model on the same rows.

    Args:
        models: hub ids, folders (a full model, or an adapter), or .gguf files.
        rows: {"id", "text", "label"}, with "leaked" where a leak audit was made.
        task: prompt and answer words.
        data: description of the rows, put into the result.
        base_model: base of adapters; None = the one named in adapter_config.json.
        revision: commit, branch or tag of hub ids.
        dtype, load_in_4bit, batch_size: for transformers models; folders that are quantized keep their own dtype.
        n_threads, n_gpu_layers: for .gguf files.
        keep: folder for the scores of an interrupted evaluation, where the next one finds them; removed in the end.
        tokenizer: folder of the run's tokenizer, for .gguf files with its vocabulary; None = the one in the file.

    Returns:
        {"data": {…, "n", "labels"}, "models": [{"model", "n", "accuracy", "accuracy_interval", "macro_f1",
        "per_class", "confusion", "leak_free" (null without an audit), "ece", "near_ties", "truncated",
        "seconds_per_sample", "peak_memory_mib", "device", "note" (what was done otherwise than
        usual, and answer words of several tokens)}]}.

    Raises:
        InputError: no rows, or a model that cannot be loaded or run.
    """
    if not rows:
        raise InputError("no rows to evaluate on.", "at least one labelled row.", "check --data and --max-samples.")
    shared = {
        "task": task.to_json(),
        "base_model": base_model,
        "revision": revision,
        "dtype": dtype,
        "load_in_4bit": load_in_4bit,
        "batch_size": batch_size,
        "n_threads": n_threads,
        "n_gpu_layers": n_gpu_layers,
        "tokenizer": str(tokenizer) if tokenizer else None,
    }
    results = [
        {"model": model, **_summary(Scores.load(path), rows, task), **answer}
        for model, path, answer in each_in_a_child(
            "lib.evaluation.standalone:score_in_child", models, rows, shared, keep
        )
    ]
    described = {**(data or {}), "n": len(rows), "labels": list(task.label_names)}
    return {"data": described, "models": results}


def each_in_a_child(
    function: str,
    models: Sequence[str | Path],
    rows: Sequence[Mapping[str, Any]],
    shared: Mapping[str, Any],
    keep: Path | None,
) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Score the rows with every model in a process of its own; `keep` is removed when all of them are done.

    All models are looked at before the first is loaded, so that a wrong name does not cost the work on the others.

    Args:
        function: gets `shared`, "model", "rows" (file), "scores" (file to write) and "keep" (journal or None);
            gives "peak_of_scoring", "found" and what it wants to say.

    Yields:
        the model, the file of its scores, and what else is known of it, with "peak_memory_mib".

    Raises:
        InputError: a model that cannot be had, loaded or run; what was scored is in `keep`, which is said.
    """
    check_models(models, shared["base_model"], shared["revision"])
    with tempfile.TemporaryDirectory(prefix="workbook-evaluate-") as name:
        folder = Path(name)
        write_jsonl(folder / "rows.jsonl", [dict(row) for row in rows])
        for number, model in enumerate(models):
            scores = folder / f"scores-{number}.jsonl"
            argument = {**shared, "model": str(model), "rows": str(folder / "rows.jsonl"), "scores": str(scores)}
            argument["keep"] = str(journal_path(keep, model)) if keep else None
            try:
                answer = run_child(function, argument, f"evaluating {model}")
            except BaseException:
                if keep is not None and keep.is_dir():
                    say(f"what was scored so far is kept in {keep}; the same command goes on from there")
                raise
            answer["peak_memory_mib"] = max(answer["peak_memory_mib"], answer.pop("peak_of_scoring"))
            if found := answer.pop("found"):
                say(f"{model}: {found}")
            yield str(model), scores, answer
    if keep is not None:
        shutil.rmtree(keep)


def _summary(scores: Scores, rows: Sequence[Mapping[str, Any]], task: Task) -> dict[str, Any]:
    evaluation = evaluate_scores(scores, rows, task.label_names, subsets(rows))
    free = evaluation.reports.get(LEAK_FREE)
    return {
        **evaluation.reports["all"].to_json(),
        "leak_free": free.to_json() if free else None,
        "ece": evaluation.calibration.ece,
        "near_ties": scores.near_ties,
        "truncated": int(scores.truncated.sum()),
        "seconds_per_sample": scores.seconds_per_sample,
    }


def score_in_child(argument: dict[str, Any]) -> dict[str, Any]:
    """Load one model, score the rows, save the scores; runs in the child process."""
    task, rows = Task.from_json(argument["task"]), read_jsonl(Path(argument["rows"]))
    backend, tokenizer, files = open_model(argument, task.max_seq_length)
    keep, what = keep_of(argument, files), f"scoring rows with {Path(argument['model']).name}"
    try:
        scores = score_rows(backend, tokenizer, task, rows, what, keep)
        note = notes(backend.note, label_note(tokenizer, task))
    finally:
        backend.close()
    scores.save(Path(argument["scores"]))
    return {"device": backend.device, "note": note, "peak_of_scoring": peak_kept(keep), "found": scores.found}


def keep_of(argument: dict[str, Any], files: Sequence[Path]) -> Keep | None:
    """Where the scores are kept as they come; a base in 4 bits is another model than its files."""
    if argument["keep"] is None:
        return None
    return Keep(Path(argument["keep"]), sha256_json([model_hash(*files), argument["load_in_4bit"]]))


def peak_kept(keep: Keep | None) -> float:
    """Largest memory of the processes that scored before, MiB; 0 where nothing is kept."""
    return kept_peak_memory_mib(keep.path) if keep else 0.0


def open_model(argument: dict[str, Any], n_ctx: int) -> tuple[Any, Any, list[Path]]:
    """Backend, tokenizer and files of the model that the options name, with a context of `n_ctx` tokens."""
    opener = _open_gguf if is_gguf(argument["model"]) else _open_transformers
    return opener(argument, n_ctx)


def _open_gguf(argument: dict[str, Any], n_ctx: int) -> tuple[Any, Any, list[Path]]:
    from lib.scoring import LlamaCppBackend

    path = user_path(argument["model"])
    backend = LlamaCppBackend(
        path,
        n_ctx=n_ctx,
        n_threads=argument["n_threads"],
        n_gpu_layers=argument["n_gpu_layers"],
    )
    return backend, _tokenizer_for(path, argument.get("tokenizer")), [path]


def _tokenizer_for(path: Path, of_run: str | None) -> Any:
    """The run's own tokenizer where the file has its vocabulary, else the one inside the file."""
    from lib.models.gguf_tokenizer import same_vocabulary, tokenizer_from_gguf
    from lib.models.loading import load_tokenizer

    if of_run is not None and same_vocabulary(path, tokenizer := load_tokenizer(Path(of_run))):
        return tokenizer
    return tokenizer_from_gguf(path)


def _open_transformers(argument: dict[str, Any], n_ctx: int) -> tuple[Any, Any, list[Path]]:
    """A hub id, a model folder (quantized ones as they were saved), or an adapter folder with its base."""
    from lib.device import compute_dtype
    from lib.models.loading import load_model, load_tokenizer, resolve_base
    from lib.models.saved import load_as_saved, quantization_method
    from lib.models.trained_on import refuse_other_folder, unpacking_of
    from lib.scoring import TransformersBackend

    folder, adapter = user_path(argument["model"]), None
    name = argument["model"]
    if (folder / "adapter_config.json").is_file():
        adapter = folder
        own_base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        name = base_of_adapter(argument["base_model"] or own_base, folder)
    base = resolve_base(name, argument["revision"], **(unpacking_of(adapter) if adapter else {}))
    if adapter is not None:
        refuse_other_folder(adapter, base.path)
    own = adapter is not None and (adapter / "tokenizer.json").is_file()
    tokenizer = load_tokenizer(adapter if own else base.path)
    if adapter is None and (method := quantization_method(base.path)):
        if argument["load_in_4bit"]:
            do = "leave out --load-in-4bit."
            raise InputError(f"{name} is quantized already ({method}).", "a model of full weights.", do)
        model = load_as_saved(base.path)
    else:
        dtype, _ = compute_dtype(argument["dtype"])
        model = load_model(base.path, dtype=dtype, load_in_4bit=argument["load_in_4bit"], adapter=adapter)
    backend = TransformersBackend(model, argument["batch_size"], argument["model"])
    return backend, tokenizer, [base.path, *([adapter] if adapter else [])]
