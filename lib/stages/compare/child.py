"""One model in a process of its own: speed, scores of the rows, peak memory, perplexity and KL divergence.

The parent makes all token ids once (`encode_rows`), so that every model reads the same ones, and every process gets the
same argument. A GGUF file runs in llama.cpp, a folder in transformers as it loads by plain `from_pretrained`; what is
measured is the same. For llama.cpp only numpy and llama_cpp are imported: a process starts in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError
from lib.prompts.tasks import Task, texts_of
from lib.runs.child import peak_memory_mib
from lib.scoring.journal import Keep, kept_peak_memory_mib, model_hash
from lib.scoring.llama_backend import LlamaCppBackend
from lib.scoring.log_probabilities import AnswerScores, Scores, kept_log_probs, score_answers
from lib.scoring.measure import FEWEST_DOCUMENTS, SEED
from lib.scoring.perplexity import open_reference, positions, store_reference, table_of, text_windows
from lib.stages.compare import speed
from lib.statistics.paired import clustered_bootstrap_t

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lib.scoring.backend import Backend

WAIT_POLICY = "passive"
"""How llama.cpp's threads wait for one another (OMP_WAIT_POLICY)."""
BATCH = 32
"""Prompts a forward pass of transformers."""
MERGED, MERGED_FLOAT32, DEQUANTIZED = "merged", "merged_float32", "dequantized"
"""What `score_in_transformers` scores: the model that the files were made from, as saved and with its weights in
float32, and the weights of a GGUF file."""
_SMALLEST_WINDOW = 64

Row = Mapping[str, Any]


# What the parent sends.


@dataclass(frozen=True)
class EncodedRows:
    """Token ids of the rows and of the held-out text, and what to know about them.

    Attributes:
        order: the rows' places in the order in which they are scored (by id).
        names, prompts, spans: of the rows in that order: id, token ids, and (first, behind the last) position of every
            answer in them; no spans where the rows are prompts for answer words.
        answers: token ids of the answer words; none where the answers stand in the rows.
        windows: token ids of the held-out text.
        documents: group of near-duplicate rows that each scored token of the windows is from, window after window.
        truncated: whether each row was cut, in the rows' own order.
        sample: {"text", "ids"} of a row: another tokenizer shows by it.
        n_ctx: longest sequence.
        notes: sentences about what was changed to make it work.
    """

    order: list[int]
    names: list[str]
    prompts: list[list[int]]
    spans: list[list[tuple[int, int]]]
    answers: list[list[int]]
    windows: list[list[int]]
    documents: list[int]
    truncated: np.ndarray
    sample: dict[str, Any]
    n_ctx: int
    notes: list[str]

    def argument(self, n_threads: int, n_gpu_layers: int) -> dict[str, Any]:
        """What every process gets."""
        keys = ("names", "prompts", "spans", "answers", "windows", "documents", "sample", "n_ctx")
        return {key: getattr(self, key) for key in keys} | {"n_threads": n_threads, "n_gpu_layers": n_gpu_layers}

    def scores(self, rows: Sequence[Row], answer: Mapping[str, Any]) -> Scores | AnswerScores:
        """What a process gave, in the rows' own order."""
        back, ids = np.argsort(self.order), [row["id"] for row in rows]
        log_probs = np.array(answer["log_probs"], dtype=np.float64)[back]
        seconds, found = answer["score_seconds"], answer["found"]
        if self.answers:
            labels = np.array([row["label"] for row in rows], dtype=np.int64)
            return Scores(ids, labels, log_probs, self.truncated, seconds, found)
        tokens = np.array([sum(stop - start for start, stop in spans) for spans in self.spans], dtype=np.int64)
        return AnswerScores(ids, log_probs[:, 0], tokens[back], seconds, found)


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, task: Task, rows: Sequence[Row], n_ctx: int, most: int
) -> EncodedRows:
    """Everything is tokenized here.

    The held-out text is, leak-free rows first, the bare texts of rows that a prompt asks about, or whole conversations.

    Args:
        n_ctx, most: tokens of a window of the held-out text, and of the windows together.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i]["id"])
    first = sorted(range(len(rows)), key=lambda i: bool(rows[i].get("leaked")))
    encoded, words = [task.encode(tokenizer, row) for row in rows], task.answer_words(tokenizer)
    if words:
        ids, row_of = _joined_texts(tokenizer, [rows[i]["text"] for i in first])
        prompts = [encoded[i].prompt_ids for i in order]
    else:
        ids = [token for i in first for token in encoded[i].ids]
        row_of = np.repeat(np.arange(len(first)), [len(encoded[i].ids) for i in first])
        prompts = [encoded[i].ids for i in order]
    windows, notes = _windows(ids, n_ctx, most)
    text = texts_of(rows[first[0]])[0]
    return EncodedRows(
        order=order,
        names=[str(rows[i]["id"]) for i in order],
        prompts=prompts,
        spans=[] if words else [encoded[i].spans for i in order],
        answers=words,
        windows=windows,
        documents=_documents(row_of, [rows[i].get("group", i) for i in first], windows),
        truncated=np.array([one.truncated for one in encoded]),
        sample={"text": text, "ids": tokenizer(text, add_special_tokens=False)["input_ids"]},
        n_ctx=max(len(windows[0]), max(map(len, prompts)) + max(map(len, words), default=0)),
        notes=notes,
    )


def _joined_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[list[int], np.ndarray]:
    """Token ids of texts on lines of their own, and the text of each token."""
    tokens = tokenizer("\n".join(texts), add_special_tokens=False, return_offsets_mapping=True)
    starts = np.cumsum([0, *(len(text) + 1 for text in texts[:-1])])
    text_of = np.searchsorted(starts, [begin for begin, _ in tokens["offset_mapping"]], side="right") - 1
    return tokens["input_ids"], text_of


def _windows(ids: list[int], n_ctx: int, most: int) -> tuple[list[list[int]], list[str]]:
    """Windows of the held-out text, smaller ones (which is said) where it is short."""
    notes, window = [], n_ctx
    if _SMALLEST_WINDOW <= min(len(ids), most) < n_ctx:
        window = 2 ** (min(len(ids), most).bit_length() - 1)
        notes.append(
            f"the held-out text has only {len(ids)} tokens: perplexity windows are {window} tokens instead of {n_ctx}"
        )
    return text_windows(ids, window, most), notes


def _documents(row_of: np.ndarray, groups: Sequence[Any], windows: list[list[int]]) -> list[int]:
    """Group of the row of every scored token, see `lib.scoring.perplexity.positions`.

    Args:
        row_of: row of each token of the text, by its place in `groups`.
        groups: of the rows, in the text's order.
    """
    numbers = np.unique(np.asarray(groups), return_inverse=True)[1]
    size = len(windows[0])
    of_tokens = numbers[row_of[: size * len(windows)]].reshape(len(windows), size)
    return of_tokens[:, size // 2 + 1 :].ravel().tolist()


# What a process does.


def measure_model(argument: dict[str, Any]) -> dict[str, Any]:
    """Everything measured on one GGUF file or folder.

    Args:
        argument: `EncodedRows.argument`, "path", "keep" (file for the scores as they come), "reference" (file of the
            reference's log-probabilities), "is_reference" (make that file).

    Returns:
        size and speed (as `lib.stages.compare.speed.measure`; "weights" of a folder counts tied weights once,
        "tensor_bytes" and "bytes" are those of its safetensors), "log_probs", "score_seconds", "found" (what was
        already scored, in words), "memory_mib" (peak while loading, timing and scoring; the reference's
        log-probabilities, which only this comparison needs, are not in it), "divergence" (a KlTable as a dict; null for
        the reference), "kld_mean_interval" (over documents), "perplexity" (a Perplexity as a dict; null for the
        others), "note", "device" and "thread_waiting".
    """
    path = Path(argument["path"])
    program = _Transformers(path, argument) if path.is_dir() else _LlamaCpp(path, argument)
    facts = program.facts()
    with program.for_rows() as backend:
        facts |= score_ids(backend, argument, program.remedy)
    with program.for_text() as backend:
        facts |= (store if argument["is_reference"] else diverge)(backend, argument)
    waiting = os.environ.get("OMP_WAIT_POLICY", "")
    return {**facts, "note": getattr(backend, "note", ""), "device": backend.device, "thread_waiting": waiting}


class _LlamaCpp:
    """How llama.cpp runs a GGUF file."""

    remedy = "check the model's weights for NaN or infinity."

    def __init__(self, path: Path, argument: Mapping[str, Any]) -> None:
        # Threads that wait must sleep: spinning ones slow llama.cpp down a hundredfold when the cores are shared. Read
        # by the OpenMP library when llama.cpp is loaded, so it has to be set before.
        os.environ.setdefault("OMP_WAIT_POLICY", WAIT_POLICY)
        self.path, self.argument = path, argument
        self._devices = (argument["n_threads"], argument["n_gpu_layers"])

    def facts(self) -> dict[str, Any]:
        return {**speed.measure(self.path, self.argument["windows"][0], *self._devices), "bytes": _size(self.path)}

    def for_rows(self) -> LlamaCppBackend:
        return LlamaCppBackend(self.path, self.argument["n_ctx"], *self._devices)

    def for_text(self) -> LlamaCppBackend:
        """Windows in one batch, as llama-perplexity has them; the room for their logits is not the scoring's memory."""
        n_ctx = len(self.argument["windows"][0])
        return LlamaCppBackend(self.path, n_ctx, *self._devices, n_outputs=n_ctx - n_ctx // 2)


def _size(path: Path) -> int:
    return path.stat().st_size


class _Transformers:
    """How transformers runs a folder; the model stays loaded."""

    remedy = "leave this format out of export_formats."

    def __init__(self, path: Path, argument: Mapping[str, Any]) -> None:
        _use_threads(argument)
        _check_tokenizer(path, argument["sample"])
        self.path, self.prompt = path, argument["windows"][0][: speed.PROMPT_TOKENS]

    def facts(self) -> dict[str, Any]:
        from lib.models.loading import count_weights, load_as_saved, weight_bytes
        from lib.models.weights import open_weights
        from lib.scoring.torch_backend import TransformersBackend

        stored, weights = open_weights(self.path), count_weights(self.path)
        for file in stored.files:
            speed.read_once(file)
        loads = speed.repeat_loads(self._seconds_of_a_load)
        model = load_as_saved(self.path)
        rates = _rates(model, self.prompt)
        self.backend = TransformersBackend(model, BATCH, self.path.name)
        return {
            "file_type": None,
            "bytes": weight_bytes(self.path),
            "weights": weights,
            "tensor_bytes": stored.nbytes,
            "vocab_size": self.backend.vocab_size,
            **speed.load_facts(loads),
            **rates,
        }

    def _seconds_of_a_load(self) -> float:
        """The model is gone before the next one is loaded."""
        from lib.models.loading import load_as_saved

        started = time.perf_counter()
        model = load_as_saved(self.path)
        seconds = time.perf_counter() - started
        del model
        gc.collect()
        return seconds

    def for_rows(self) -> contextlib.AbstractContextManager[Backend]:
        return contextlib.nullcontext(self.backend)

    for_text = for_rows


def score_in_transformers(argument: dict[str, Any]) -> dict[str, Any]:
    """The rows alone, by a model as the error ladder asks for it: "log_probs", "score_seconds", "found", "dtype".

    Args:
        argument: as for `measure_model`, with "way": `MERGED`, `MERGED_FLOAT32` (what 16-bit arithmetic alone changed)
            or `DEQUANTIZED` ("path" is the GGUF file, "config" the folder of the model it was made from).
    """
    from lib.scoring.torch_backend import TransformersBackend

    _use_threads(argument)
    path, way = Path(argument["path"]), argument["way"]
    model = _load(path, way, argument)
    backend = TransformersBackend(model, BATCH, path.name)
    made_by = "quantize again with notebook 06" if way == DEQUANTIZED else "merge again with notebook 04"
    scored = score_ids(backend, argument, f"{made_by} and force: true.")
    return {**scored, "dtype": str(backend.model.dtype).removeprefix("torch."), "note": backend.note}


def _load(path: Path, way: str, argument: Mapping[str, Any]) -> PreTrainedModel:
    from lib.models.loading import load_as_saved, load_model

    if way == MERGED:
        _check_tokenizer(path, argument["sample"])
        return load_as_saved(path)
    if way == MERGED_FLOAT32:
        return load_model(path, dtype="float32", device="cpu")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lib.runs.machine import no_warnings, quiet

    quiet()
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    options["config"] = AutoConfig.from_pretrained(argument["config"], trust_remote_code=False)
    with no_warnings():
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options).eval()


def _use_threads(argument: Mapping[str, Any]) -> None:
    import torch

    torch.set_num_threads(argument["n_threads"])


def score_ids(backend: Backend, argument: Mapping[str, Any], remedy: str) -> dict[str, Any]:
    """log p of each answer word, (rows, words); without answer words of all answers of a row together, (rows, 1).

    Returns:
        "log_probs", "score_seconds", "found" and "memory_mib" (see `measure_model`).

    Raises:
        InputError: log-probabilities that are not numbers; `remedy` says what to do.
    """
    keep, what = keep_of(argument), f"scoring rows with {backend.name}"
    names, prompts = argument["names"], argument["prompts"]
    if argument["answers"]:
        values, seconds, found = kept_log_probs(backend, names, prompts, argument["answers"], what, keep)
    else:
        scores = score_answers(backend, names, prompts, argument["spans"], what, keep)
        values, seconds, found = scores.log_probs[:, None], scores.seconds, scores.found
    if not np.isfinite(values).all():
        name = Path(argument["path"]).name
        raise InputError(f"{name} gives log-probabilities that are not numbers.", "finite log-probabilities.", remedy)
    memory = max(peak_memory_mib(), kept_peak_memory_mib(keep.path))
    return {"log_probs": values.tolist(), "score_seconds": seconds, "found": found, "memory_mib": memory}


def keep_of(argument: Mapping[str, Any]) -> Keep:
    """Where the work on a file or folder is kept as it comes."""
    return Keep(Path(argument["keep"]), model_hash(Path(argument["path"])))


def store(backend: Backend, argument: dict[str, Any]) -> dict[str, Any]:
    """The reference's perplexity; its log-probabilities go into the file."""
    path = Path(argument["reference"])
    reference = store_reference(backend, argument["windows"], path, f"perplexity of {backend.name}")
    return {"perplexity": asdict(reference.perplexity), "divergence": None, "kld_mean_interval": None}


def diverge(backend: Backend, argument: dict[str, Any]) -> dict[str, Any]:
    """KL divergence from the stored reference, and perplexity; an interval over documents where there are enough."""
    windows, documents = argument["windows"], np.array(argument["documents"])
    reference = open_reference(Path(argument["reference"]), windows, backend.vocab_size)
    found = positions(reference, backend, windows, f"KL divergence of {backend.name}")
    interval = None
    if found.kl is not None and len(np.unique(documents)) >= FEWEST_DOCUMENTS:
        interval = clustered_bootstrap_t(found.kl, documents, SEED).to_json()
    return {"perplexity": None, "divergence": asdict(table_of(found)), "kld_mean_interval": interval}


def _check_tokenizer(path: Path, sample: Mapping[str, Any]) -> None:
    """The token ids come from the reference's tokenizer; the folder's own must give the same."""
    from lib.models.loading import load_tokenizer

    own = load_tokenizer(path)(sample["text"], add_special_tokens=False)["input_ids"]
    if own != sample["ids"]:
        raise InputError(
            f"the tokenizer in {path} gives other token ids than the reference's.",
            "one tokenizer.",
            "compare models that were made from one model.",
        )


def _rates(model: PreTrainedModel, prompt: Sequence[int]) -> dict[str, Any]:
    """Rates of reading a prompt and of greedy writing with a key-value cache, as `lib.stages.compare.speed` has
    them."""
    import torch

    ids = torch.tensor([list(prompt)], device=model.device)

    def seconds_since(started: float) -> float:
        if ids.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def read() -> tuple[float, Any]:
        started = time.perf_counter()
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return seconds_since(started), output

    def write() -> float:
        _, output = read()
        started = time.perf_counter()
        for _ in range(speed.GENERATED_TOKENS):
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        return seconds_since(started)

    with torch.inference_mode():
        prompts, written = speed.repeat(lambda: read()[0]), speed.repeat(write)
    return {**speed.rate("prompt", ids.shape[1], prompts), **speed.rate("generation", speed.GENERATED_TOKENS, written)}
