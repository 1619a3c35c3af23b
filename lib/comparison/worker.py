"""One file in its own process: speed, label scores, peak memory, perplexity and KL divergence.

Imports only numpy and llama_cpp, so that a process starts in a fraction of a second; token ids come from the parent.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lib.comparison.speed import measure
from lib.errors import InputError
from lib.run.child import peak_memory_mib
from lib.scoring.answers import score_answers
from lib.scoring.backend import Backend
from lib.scoring.divergence import table_of
from lib.scoring.journal import Keep, kept_peak_memory_mib, model_hash
from lib.scoring.llama import LlamaCppBackend
from lib.scoring.measuring import FEWEST_DOCUMENTS, SEED
from lib.scoring.perplexity import open_reference, positions, store_reference
from lib.scoring.scores import kept_log_probs
from lib.statistics import clustered_bootstrap_t

WAIT_POLICY = "passive"
"""How llama.cpp's threads wait for one another (OMP_WAIT_POLICY)."""


def score_file(argument: dict[str, Any]) -> dict[str, Any]:
    """Everything measured on one file.

    Args:
        argument: "path", "names" (of the rows), "prompts", "answers" and "windows" (token ids), "keep" (file for the
            scores as they come), "spans" (of the answers; empty with labels), "documents" (of each scored token of the
            windows), "n_ctx" (longest sequence), "n_threads", "n_gpu_layers", "reference" (file of the reference's
            log-probabilities), "is_reference" (make that file).

    Returns:
        what `measure` gives, "log_probs", "score_seconds", "found" (what of it was done already, in words),
        "memory_mib" (peak while loading, timing and scoring; the reference's log-probabilities, which only this
        comparison needs, are not in it), "divergence" (a KlTable as a dict; null for the reference),
        "kld_mean_interval" (over documents) and "perplexity" (a Perplexity as a dict; null for the others).
    """
    # Threads that wait must sleep: spinning ones slow llama.cpp down a hundredfold when the cores are shared. Read by
    # the OpenMP library when llama.cpp is loaded, so it has to be set before.
    os.environ.setdefault("OMP_WAIT_POLICY", WAIT_POLICY)
    path, windows = Path(argument["path"]), argument["windows"]
    speed = measure(path, windows[0], argument["n_threads"], argument["n_gpu_layers"])
    backend = LlamaCppBackend(path, argument["n_ctx"], argument["n_threads"], argument["n_gpu_layers"])
    with backend:
        scored = row_log_probs(backend, argument)
        log_probs = scored.pop("values")
        if not np.isfinite(log_probs).all():
            raise InputError(
                f"{path.name} gives log-probabilities that are not numbers.",
                "finite log-probabilities.",
                "check the model's weights for NaN or infinity.",
            )
    # windows in one batch, as llama-perplexity has them; the room for their logits is not the scoring's memory
    n_ctx, devices = len(windows[0]), (argument["n_threads"], argument["n_gpu_layers"])
    backend = LlamaCppBackend(path, n_ctx, *devices, n_outputs=n_ctx - n_ctx // 2)
    with backend:
        text = (store if argument["is_reference"] else diverge)(backend, argument)
    return {
        **speed,
        "bytes": path.stat().st_size,
        "log_probs": log_probs.tolist(),
        **scored,
        "device": backend.device,
        "thread_waiting": os.environ["OMP_WAIT_POLICY"],
        **text,
    }


def row_log_probs(backend: Backend, argument: dict[str, Any]) -> dict[str, Any]:
    """log p of each answer word, (rows, words); without labels of all answers of a row together, (rows, 1).

    Returns:
        "values" (the array), "score_seconds", "found" and "memory_mib" (see `score_file`).
    """
    keep, what = keep_of(argument), f"scoring rows with {backend.name}"
    names, prompts = argument["names"], argument["prompts"]
    if argument["spans"]:
        scores = score_answers(backend, names, prompts, argument["spans"], what, keep)
        values, seconds, words = scores.log_probs[:, None], scores.seconds, scores.found
    else:
        values, seconds, words = kept_log_probs(backend, names, prompts, argument["answers"], what, keep)
    memory = max(peak_memory_mib(), kept_peak_memory_mib(keep.path))
    return {"values": values, "score_seconds": seconds, "found": words, "memory_mib": memory}


def keep_of(argument: dict[str, Any]) -> Keep:
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
