"""The sides of the two evaluation benchmarks: each loads a model, answers the rows and writes what it answered.

    python -c "from benchmarks.evaluation_sides import run; run('SIDE', 'JOB.json', 'OUT.json')"

SIDE: a name in `SIDES`. JOB.json: {"model", "rows" ({"id", "text", "label"}), "prompts" (rendered), "task", "batch",
"threads"}. OUT.json: {"seconds" (from the loaded model to the last answer, tokenization included),
"scoring_cpu_seconds" (the same in processor time), "answers" ({id: label}), "margins" ({id: nats} where the side has
them)}.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Made = dict[str, Any]


def run(side: str, job_file: str, out: str) -> None:
    """Do one side's work."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    Path(out).write_text(json.dumps(SIDES[side](job)), encoding="utf-8")


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(started: tuple[float, float]) -> Made:
    """Wall clock and processor time since then."""
    wall, cpu = _now()
    return {"seconds": wall - started[0], "scoring_cpu_seconds": cpu - started[1]}


def _task(job: Job) -> Any:
    from lib.prompts.tasks import task_from_json

    return task_from_json(job["task"])


def _scored(backend: Any, tokenizer: Any, job: Job) -> Made:
    """Our scorer on either backend."""
    from lib.scoring.log_probabilities import score_rows

    started = _now()
    scores = score_rows(backend, tokenizer, _task(job), job["rows"], "scoring")
    took = _since(started)
    answers, margins = scores.predictions.tolist(), scores.margins.tolist()
    return {
        **took,
        "answers": dict(zip(scores.ids, answers, strict=True)),
        "margins": dict(zip(scores.ids, margins, strict=True)),
        "note": backend.note,
    }


def workbook_transformers(job: Job) -> Made:
    """The workbook's scorer with transformers."""
    import torch

    from lib.models.loading import load_model, load_tokenizer
    from lib.scoring.torch_backend import TransformersBackend

    torch.set_num_threads(job["threads"])
    folder = Path(job["model"])
    backend = TransformersBackend(load_model(folder, dtype="bfloat16", device="cpu"), job["batch"])
    return _scored(backend, load_tokenizer(folder), job)


def lm_eval_hf(job: Job) -> Made:
    """lm-eval's `hf` model on a multiple-choice task over the same rendered prompts."""
    import tempfile

    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    torch.set_num_threads(job["threads"])
    model = HFLM(pretrained=job["model"], dtype="bfloat16", device="cpu", batch_size=job["batch"])
    names = job["task"]["label_names"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [
            {"id": row["id"], "prompt": prompt, "choices": names, "label": row["label"]}
            for row, prompt in zip(job["rows"], job["prompts"], strict=True)
        ]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
        (folder / "task.yaml").write_text(_TASK.format(rows=folder / "rows.jsonl"), encoding="utf-8")
        clock = _Clock(model.loglikelihood)
        model.loglikelihood = clock
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        result = simple_evaluate(model, tasks=["rows"], task_manager=manager, bootstrap_iters=0, log_samples=True)
    answers = {}
    for sample in result["samples"]["rows"]:
        values = [float(response[0]) for response in sample["filtered_resps"]]
        answers[sample["doc"]["id"]] = max(range(len(values)), key=values.__getitem__)
    return {
        **clock.took,
        "answers": answers,
        "margins": {},
        "accuracy": result["results"]["rows"]["acc,none"],
    }


_TASK = """task: rows
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


class _Clock:
    """Times one call of a function."""

    def __init__(self, function: Callable) -> None:
        self._function, self.took = function, {}

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        started = _now()
        result = self._function(*arguments, **named)
        self.took = _since(started)
        return result


def workbook_gguf(job: Job) -> Made:
    """The workbook's scorer with llama.cpp."""
    from lib.models.gguf_tokenizer import tokenizer_from_gguf
    from lib.scoring.llama_backend import LlamaCppBackend

    backend = LlamaCppBackend(job["model"], job["task"]["max_seq_length"], job["threads"])
    return _scored(backend, tokenizer_from_gguf(Path(job["model"])), job)


def _llama(job: Job) -> Any:
    from llama_cpp import Llama

    threads = job["threads"]
    n_ctx = job["task"]["max_seq_length"] + 64
    return Llama(job["model"], n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads, verbose=False)


def chat_as_it_comes(job: Job) -> Made:
    """`chat_completion` with the constructor's own number of threads, and OpenMP threads that wait as they like."""
    from llama_cpp import Llama

    return _chat(Llama(job["model"], verbose=False), job)


def chat_completion(job: Job) -> Made:
    """llama-cpp-python's `create_chat_completion`, one call a row: the answer word and the end of the turn."""
    return _chat(_llama(job), job)


def _chat(model: Any, job: Job) -> Made:
    task = _task(job)
    names, answers = task.label_names, {}
    allowed = {model.tokenize(name.encode(), add_bos=False)[0]: 100.0 for name in names}
    started = _now()
    for row in job["rows"]:
        reply = model.create_chat_completion(
            task.messages(task.row_of(row["text"])), max_tokens=job["max_tokens"], temperature=0.0, logit_bias=allowed
        )
        text = reply["choices"][0]["message"]["content"]
        answers[row["id"]] = next(i for i, name in enumerate(names) if text.startswith(name))
    return {**_since(started), "answers": answers, "margins": {}}


def one_by_one(job: Job) -> Made:
    """One `llama_decode` a row over the whole prompt, the labels' logits compared."""
    import ctypes

    import llama_cpp.llama_cpp as api
    import numpy as np

    model, task = _llama(job), _task(job)
    labels = [model.tokenize(name.encode(), add_bos=False)[0] for name in task.label_names]
    context, answers, margins = model.ctx, {}, {}
    started = _now()
    for row, prompt in zip(job["rows"], job["prompts"], strict=True):
        ids = model.tokenize(prompt.encode(), add_bos=False, special=True)
        api.llama_memory_clear(api.llama_get_memory(context), True)
        tokens = (api.llama_token * len(ids))(*ids)
        if api.llama_decode(context, api.llama_batch_get_one(tokens, len(ids))) != 0:
            raise RuntimeError("llama_decode failed")
        logits = np.ctypeslib.as_array(api.llama_get_logits_ith(context, ctypes.c_int32(-1)), shape=(model.n_vocab(),))
        values = [float(logits[label]) for label in labels]
        answers[row["id"]] = int(np.argmax(values))
        margins[row["id"]] = values[1] - values[0]
    return {**_since(started), "answers": answers, "margins": margins}


SIDES: dict[str, Callable[[Job], Made]] = {
    "workbook-transformers": workbook_transformers,
    "lm-eval": lm_eval_hf,
    "workbook-gguf": workbook_gguf,
    "chat": chat_completion,
    "chat-as-it-comes": chat_as_it_comes,
    "one-by-one": one_by_one,
}
