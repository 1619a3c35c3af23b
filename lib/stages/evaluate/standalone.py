"""Any models on any rows, each in a process of its own: what `workbook evaluate` does."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from lib.errors import InputError, refusal
from lib.hub.sources import SourceError
from lib.models import base_model
from lib.models.adapters import base_named, require_adapter
from lib.models.gguf_file import read_tensors
from lib.models.gguf_tokenizer import same_vocabulary, tokenizer_from_gguf
from lib.models.loading import load_model, load_tokenizer, quantization_method
from lib.models.runtime_folders import runtime_of
from lib.models.tokenizer_files import chat_templates, differences, reader
from lib.progress import say
from lib.prompts.tasks import ConversationTask, Task, in_model_tags, task_from_json
from lib.prompts.templates import ASSISTANT
from lib.runs.child import run_child
from lib.runs.files import sha256_json, user_path
from lib.runs.machine import compute_dtype
from lib.scoring.backend import Keep, journal_path, kept_peak_memory_mib, model_hash
from lib.scoring.folders import check_folder, open_folder
from lib.scoring.generation import (
    Questions,
    Sampling,
    ask_prompt,
    end_ids,
    with_likeness,
    write_all,
)
from lib.scoring.log_probabilities import score_rows
from lib.scoring.measure import most_positions
from lib.stages.evaluate.results import result_of

# Models looked at before any of them is loaded: whether they can be had, and whether their files are whole.


@dataclass(frozen=True)
class ModelOptions:
    """How models are opened.

    Attributes:
        base_model: base of adapters; None = the one named in adapter_config.json.
        revision: commit, branch or tag of hub ids.
        dtype, load_in_4bit, batch_size: for transformers models; folders that are quantized keep their own dtype.
        n_threads, n_gpu_layers: for .gguf files.
        run_tokenizer: folder of the run's tokenizer, for .gguf files with its vocabulary; None = the one in the file.
    """

    base_model: str | None = None
    revision: str = "main"
    dtype: str = "auto"
    load_in_4bit: bool = False
    batch_size: int = 32
    n_threads: int = 0
    n_gpu_layers: int = 0
    run_tokenizer: Path | None = None


@dataclass(frozen=True)
class FoundModel:
    """The files of a model.

    Attributes:
        path: its .gguf file, or its folder; of an adapter that of its base.
        adapter: folder of the adapter; None of a whole model.
        tokenizer, template: folders of the tokenizer and of the chat template; None of a .gguf file, which holds its
            own.
        fetched: whether it, or its base, was named by a hub id.
    """

    path: Path
    adapter: Path | None = None
    tokenizer: Path | None = None
    template: Path | None = None
    fetched: bool = False


def find_model(model: str, options: ModelOptions, system_turn: bool = True) -> FoundModel:
    """Look at a model as far as that takes no loading; what the hub has is fetched.

    Args:
        system_turn: whether its prompts will have one.

    Raises:
        InputError: it is missing, damaged or cut off, or an adapter whose base is, that was trained on another one, or
            whose base neither the option nor adapter_config.json names; or its chat template does not fit.
    """
    folder = user_path(model)
    if model.lower().endswith(".gguf") or folder.is_file():
        _check_whole(folder)
        base_model.refuse_bad_template(folder, system_turn)
        return FoundModel(folder)
    if (folder / "adapter_config.json").is_file():
        adapter = folder
        require_adapter(adapter)
        base = base_named(folder, options.base_model)
        path = _base_folder(base, options.revision, base_model.unpacking_of(adapter), of_adapter=True)
        base_model.refuse_other_folder(adapter, path)
        if named := base_model.named_otherwise(adapter, base, str(path)):
            say(f"{folder} names {named} as its base; whether {base} is the same was not checked")
        own = differences(adapter, path)  # as merging takes them
        tokenizer, template = adapter if own.keys() - {"template"} else path, adapter if "template" in own else path
    else:
        adapter, base = None, model
        path = tokenizer = template = _base_folder(model, options.revision, {})
    base_model.refuse_bad_template(template, system_turn)
    tokenizer_of(tokenizer, template)
    return FoundModel(path, adapter, tokenizer, template, not user_path(base).exists())


def tokenizer_of(folder: Path, template: Path) -> Any:
    """The tokenizer of a folder, with the chat template of the same or of another one."""
    tokenizer = load_tokenizer(folder, chat=folder == template)
    if folder != template:
        written = chat_templates(template, reader(template)("tokenizer_config.json")).get("default")
        if not written:
            raise refusal("models/no-template", path=template)
        tokenizer.chat_template = written
    return tokenizer


def _check_whole(path: Path) -> None:
    """Refuse a file that ends before its tensors do."""
    tensors, size = read_tensors(path), path.stat().st_size
    for tensor in tensors:
        need = tensor.start + (tensor.nbytes or 0)  # None of a newer type: llama.cpp will say whether it knows it
        if need > size:
            raise refusal("evaluate/cut-file", path=path, size=size, tensor=tensor, need=need)


def _base_folder(model: str, revision: str, unpacking: Mapping[str, Any], of_adapter: bool = False) -> Path:
    """The folder of a model folder, a hub id, or the GGUF file that is an adapter's base; `unpacking`: how that was
    unpacked."""
    folder = user_path(model)
    if folder.is_dir():
        (base_model.check_model_folder if of_adapter else check_folder)(folder)
        return folder
    try:
        return base_model.resolve_base(model, revision, **unpacking).path
    except SourceError as error:
        if "/" in model or "\\" in model:
            raise
        raise refusal("evaluate/no-such-model", model=model, error=error) from None


# Any models on any rows, each in a process of its own.


def evaluate_models(
    models: Sequence[str | Path],
    rows: Sequence[Mapping[str, Any]],
    task: Task,
    data: Mapping[str, Any] | None = None,
    options: ModelOptions = ModelOptions(),
    keep: Path | None = None,
) -> dict[str, Any]:
    """Quality and cost of each model on the same rows, each in a process of its own.

    All models are looked at before the first is loaded, so that a wrong name does not cost the work on the others.

    Args:
        models: hub ids, folders (a full model, or an adapter), or .gguf files.
        rows: {"id", "text", "label"} or {"id", "messages"}, with "leaked" and "group" where they were audited.
        task: prompt and answer words; of conversations each model has its own tokenizer.
        data: description of the rows, put into the result.
        keep: folder for the scores of an interrupted evaluation, where the next one finds them; removed in the end.

    Returns:
        {"data": {…, "n", "labels" or "task"}, "models": [{"model", "n", "leak_free" (null without an audit),
        "seconds_per_sample", "seconds" (in all), "peak_memory_mib", "device", …}]}. With labels also "accuracy",
        "accuracy_interval", "macro_f1", "per_class", "confusion", "ece", "near_ties", "truncated" and "note" (what was
        done otherwise than usual, and answer words of several tokens); of conversations "answer_tokens", "loss" (nats a
        token), "perplexity", "loss_interval", "perplexity_interval" (Student's over groups; null below three),
        "bits_per_character" (for models with other tokenizers) and "turns_cut".

    Raises:
        InputError: no rows, a model that cannot be loaded or run (what was scored is in `keep`, which is said), or
            whose tokenizer needs more than `max_seq_length` for a first exchange.
    """
    if not rows:
        raise InputError("no rows to evaluate on.", "at least one row.", "check --data or --run, and --max-samples.")
    shared = {"task": task.to_json(), "rows": [dict(row) for row in rows], **vars(options)}
    results = []
    found_models = [find_model(str(model), options) for model in models]
    _refuse_without_effect(options, found_models)
    for model, files in zip(map(str, models), found_models, strict=True):
        argument = {**shared, **vars(files), "model": model, "keep": keep and journal_path(keep, model)}
        try:
            answer = run_child("lib.stages.evaluate.standalone:score_in_child", argument, f"evaluating {model}")
        except BaseException:
            if keep is not None and keep.is_dir():
                say(f"what was scored so far is kept in {keep}; the same command goes on from there")
            raise
        if found := answer.pop("found"):
            say(f"{model}: {found}")
        results.append({"model": model, **answer})
    if keep is not None:
        shutil.rmtree(keep)
    return {"data": {**(data or {}), "n": len(rows), **result_of(task).asked(task)}, "models": results}


def _refuse_without_effect(options: ModelOptions, models: Sequence[FoundModel], thinking: bool = False) -> None:
    """Refuse an option that none of the models heeds."""
    full = any(m.path.is_dir() and (m.adapter or not quantization_method(m.path)) for m in models)
    switch = not thinking or any("enable_thinking" in base_model.template_of(m.template or m.path) for m in models)
    given = {
        "--thinking": (not switch, "a chat template that knows both ways (enable_thinking)"),
        "--revision": (options.revision != "main" and not any(m.fetched for m in models), "a hub id"),
        "--load-in-4bit": (options.load_in_4bit and not full, "a folder of full weights"),
        "--dtype": (options.dtype != "auto" and not full, "a folder of full weights"),
        "--n-gpu-layers": (options.n_gpu_layers != 0 and not any(m.path.is_file() for m in models), "a .gguf file"),
        "--batch-size": (
            options.batch_size != ModelOptions.batch_size
            and all(m.path.is_file() or runtime_of(m.path) for m in models),
            "a folder that transformers loads",
        ),
        "--base-model": (options.base_model is not None and not any(m.adapter for m in models), "an adapter"),
    }
    for option, (idle, expected) in given.items():
        if idle:
            raise InputError(f"{option} for models that it changes nothing of.", f"{expected}.", f"leave out {option}.")


def score_in_child(argument: dict[str, Any]) -> dict[str, Any]:
    """Load one model, score the rows, say what the scores mean; runs in the child process."""
    task = task_from_json(argument["task"])
    backend, tokenizer = open_model(argument, task.max_seq_length)
    rows = in_model_tags(tokenizer, argument["rows"])
    keep, what = keep_of(argument), f"scoring rows with {Path(argument['model']).name}"
    with backend:
        encoded = [task.encode(tokenizer, row) for row in rows]
        scores = score_rows(backend, tokenizer, task, rows, what, keep, encoded)
        note = "; ".join(filter(None, (backend.note, task.note(tokenizer))))
    answers = [[turn["content"] for turn in task.messages(row) if turn["role"] == ASSISTANT] for row in rows]
    facts = {
        "note": note,
        "characters": [sum(len(own[i]) for i in one.answers) for own, one in zip(answers, encoded, strict=True)],
        "turns_cut": [one.turns_cut for one in encoded],
    }
    own = result_of(task).of_model(scores, rows, task, facts)
    peak = max(backend.peak_memory_mib(), kept_peak_memory_mib(keep.path) if keep else 0.0)
    cost = {"seconds": scores.seconds, "device": backend.device, "peak_memory_mib": peak}
    return {**own, **cost, "found": scores.found}


# Any models on any prompts, to be read side by side.


def ask_models(
    models: Sequence[str | Path],
    prompts: Sequence[Mapping[str, str]],
    options: ModelOptions = ModelOptions(),
    system_prompt: str = "",
    thinking: bool = False,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
) -> dict[str, Any]:
    """What each model answers to the same prompts, each model in a process of its own, one prompt at a time.

    Args:
        prompts: {"prompt", "reference"} ("" where there is none).
        sampling: None = greedy.

    Returns:
        {"system_prompt", "thinking", "decoding", "models": [{"model", "device", "peak_memory_mib", "note",
        "first_token_seconds", "tokens_per_second" (medians over the prompts; the first one is read once before)}],
        "prompts": [{"prompt", "reference", "answers": one a model: {"text", "tokens", "ended", "problem" (of its
        characters), "first_token_seconds", "seconds", "tokens_per_second", "same_text", "same_start" (share of the
        longer text), "chrf" (these three to the first model's answer; null of the first)}}]}.

    Raises:
        InputError: a model that cannot be loaded, or a prompt that is longer than its context allows.
    """
    shared = {"system_prompt": system_prompt, "thinking": thinking, "most": max_new_tokens}
    shared |= {"prompts": [dict(prompt) for prompt in prompts], "sampling": sampling and asdict(sampling)}
    told: list[dict[str, Any]] = []
    written: dict[int, list[dict[str, Any]]] = {}
    found_models = [find_model(str(model), options, bool(system_prompt)) for model in models]
    _refuse_without_effect(options, found_models, thinking)
    for model, files in zip(map(str, models), found_models, strict=True):
        argument = {**shared, **vars(options), **vars(files), "model": model}
        made = run_child("lib.stages.evaluate.standalone:answer_in_child", argument, f"asking {model}")
        answers = written[len(told)] = made.pop("answers")
        rates = [answer["tokens_per_second"] for answer in answers if answer["tokens_per_second"] is not None]
        first = median(answer["first_token_seconds"] for answer in answers)
        speed = {"first_token_seconds": first, "tokens_per_second": median(rates) if rates else None}
        told.append({"model": model, **made, **speed})
    alike = with_likeness(written).values()
    asked = [{**prompt, "answers": [own[place] for own in alike]} for place, prompt in enumerate(prompts)]
    decoding = {"max_new_tokens": max_new_tokens, **(asdict(sampling) if sampling else {"method": "greedy"})}
    return {
        "decoding": decoding,
        "system_prompt": system_prompt,
        "thinking": thinking,
        "models": told,
        "prompts": asked,
    }


def answer_in_child(argument: dict[str, Any]) -> dict[str, Any]:
    """Load one model and let it answer every prompt; runs in the child process."""
    tokenizer, most = open_tokenizer(argument), argument["most"]
    task = ConversationTask("instruction", argument["system_prompt"], max_seq_length=0, thinking=argument["thinking"])
    told = bool(task.system_prompt)  # without one as programs ask: what the template adds by itself is the model's
    asked = [ask_prompt(tokenizer, task, prompt, told) for prompt in argument["prompts"]]
    longest = max(len(one.ids) for one in asked)
    path, model = Path(argument["path"]), argument["model"]
    if (limit := most_positions(path)) and longest + most > limit:  # before any room for them is asked for
        raise refusal("evaluate/beyond-context", model=model, longest=longest, most=most, limit=limit)
    backend, _ = open_model(argument, longest + most)
    with backend:
        backend.new_text()(asked[0].ids)  # the first prompt finds a warm model, too
        sampling = Sampling(**argument["sampling"]) if argument["sampling"] else None
        ids = [one.ids for one in asked]
        written, _ = write_all(backend, ids, most, end_ids(tokenizer), None, sampling=sampling)
    questions = Questions(tokenizer, None, task.thinking, [], [], argument["prompts"], asked, most, Sampling())
    answers = questions.told(asked, written)
    for answer in answers:
        answer["problem"] = answer.pop("measured")["problem"]
    return {
        "answers": answers,
        "device": backend.device,
        "note": backend.note,
        "peak_memory_mib": backend.peak_memory_mib(),
    }


def keep_of(argument: dict[str, Any]) -> Keep | None:
    """Where the scores are kept as they come; a base in 4 bits is another model than its files."""
    if argument["keep"] is None:
        return None
    files = [Path(argument[key]) for key in ("path", "adapter") if argument[key]]
    return Keep(Path(argument["keep"]), sha256_json([model_hash(*files), argument["load_in_4bit"]]))


def open_model(argument: dict[str, Any], n_ctx: int) -> tuple[Any, Any]:
    """Backend and tokenizer of the model that was found, with a context of `n_ctx` tokens."""
    path = Path(argument["path"])
    if path.is_file():
        from lib.scoring.llama_backend import LlamaCppBackend

        backend = LlamaCppBackend(path, n_ctx, argument["n_threads"], argument["n_gpu_layers"])
        return backend, open_tokenizer(argument)
    adapter, in_4bit = argument["adapter"] and Path(argument["adapter"]), argument["load_in_4bit"]
    if adapter is None and (method := quantization_method(path)):
        if in_4bit:
            raise refusal("evaluate/quantized-already", argument=argument, method=method)
        backend = open_folder(path, argument["batch_size"], argument["model"], argument["n_threads"], n_ctx)
    else:
        from lib.scoring.torch_backend import TransformersBackend

        dtype, _ = compute_dtype(argument["dtype"])
        model = load_model(path, dtype=dtype, load_in_4bit=in_4bit, adapter=adapter)
        backend = TransformersBackend(model, argument["batch_size"], argument["model"])
    return backend, open_tokenizer(argument)


def open_tokenizer(argument: dict[str, Any]) -> Any:
    """The tokenizer of the model that was found."""
    path = Path(argument["path"])
    if path.is_dir():
        return tokenizer_of(Path(argument["tokenizer"]), Path(argument["template"]))
    return _tokenizer_for(path, argument["run_tokenizer"])


def _tokenizer_for(path: Path, of_run: str | None) -> Any:
    """The run's own tokenizer where the file has its vocabulary, else the one inside the file."""
    if of_run is not None and same_vocabulary(path, tokenizer := load_tokenizer(Path(of_run))):
        return tokenizer
    return tokenizer_from_gguf(path)
