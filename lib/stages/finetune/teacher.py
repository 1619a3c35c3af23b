"""Distillation: the model of another run, which may be larger, is imitated at the answer tokens (`teacher`).

Its probabilities for what comes next are computed once, before the training: of every answer token the `KEPT` most
likely tokens, and together what is left. The loss of an answer token is

    (1 − w)·cross-entropy + w·KL(teacher ‖ model),

with w = `distillation_weight` (Hinton et al. 2015, arXiv 1503.02531, at temperature 1). What is left counts as one more
token, so that the divergence is at most the one over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import refusal
from lib.models.base_model import base_of
from lib.models.loading import load_tokenizer, load_trained
from lib.models.tokenizer_files import differences
from lib.progress import track
from lib.prompts.conversations import Encoded
from lib.prompts.tasks import read_task
from lib.runs.files import read_jsonl
from lib.runs.run import Run, known_run
from lib.settings import Settings

KEPT = 64
"""Tokens of a position whose probability is kept."""

FILE = "teacher.npz"
"""In the folder of the training while it goes on."""

_SPLITS = ("train.jsonl", "validation.jsonl", "test.jsonl")


@dataclass(frozen=True)
class Teacher:
    """The model of a run.

    Attributes:
        run: that run. digest: of its trained weights, and of its data where nothing was trained.
    """

    run: Run
    digest: str

    @classmethod
    def of(cls, settings: Settings, run: Run) -> Teacher | None:
        """The teacher that the settings name; None where they name none.

        Raises:
            InputError: no such run, or it is this one; rows that are not this run's (it may have been trained on this
                run's test rows); another tokenizer.
        """
        if not settings.teacher:
            return None
        teacher = known_run(settings.teacher)
        if teacher.name == run.name:
            raise refusal("finetune/own-teacher", name=run.name)
        given, own = teacher.require_current("data"), run.require("data")
        if other := [name for name in _SPLITS if given.entry.outputs[name] != own.entry.outputs[name]]:
            raise refusal("finetune/other-rows", name=teacher.name, files=", ".join(other))
        found = differences(given.path / "tokenizer", own.path / "tokenizer")
        if problem := found.get("vocabulary"):
            raise refusal("finetune/other-tokens", name=teacher.name, problem=problem)
        made = teacher.require_current("adapter")
        return cls(teacher, given.entry.digest if teacher.untrained else made.entry.digest)

    def write_answers(self, folder: Path, data: Path, dtype: str, vocabulary: int) -> None:
        """Compute its probabilities for the training rows into `folder`, unless they are there.

        Args:
            data: folder of the data product. vocabulary: rows of the student's output layer; tokens behind them count
                with what is left.
        """
        from lib.scoring.torch_backend import TransformersBackend

        if (folder / FILE).is_file():
            return
        made = None if self.run.untrained else self.run.adapter()
        model = load_trained(base_of(self.run).path, made, dtype)
        backend = TransformersBackend(model, 1, f"the teacher {self.run.name}")
        task, tokenizer = read_task(data), load_tokenizer(data / "tokenizer")
        ids, log_probs = [], []
        for row in track(read_jsonl(data / "train.jsonl"), "asking the teacher (training rows)"):
            encoded = task.encode(tokenizer, row)
            if not encoded.spans:
                continue
            first = encoded.spans[0][0] - 1
            all_of_it = backend.window_log_probs(encoded.ids, first)[:, :vocabulary]
            for place in _places(encoded):
                likely = np.argsort(-all_of_it[place - first - 1], kind="stable")[:KEPT]
                ids.append(likely)
                log_probs.append(all_of_it[place - first - 1][likely])
        backend.close()
        if not np.isfinite(np.max(log_probs, axis=1)).all():
            raise refusal("finetune/odd-teacher", name=self.run.name)
        partial = folder / f".{FILE}"
        np.savez(partial.open("wb"), ids=np.array(ids, np.int32), log_probs=np.array(log_probs, np.float32))
        partial.rename(folder / FILE)


def _places(row: Encoded) -> list[int]:
    """Positions of the row's answer tokens."""
    return [place for start, stop in row.spans for place in range(start, stop)]


class Imitating:
    """A collator that lays the teacher's probabilities beside training rows; other rows stay as they are.

    Args:
        collate: of the rows alone. train: rows in the order of train.jsonl. folder: with `FILE`.
        weight: share of the divergence in the loss.
    """

    def __init__(self, collate: Any, train: Sequence[Encoded], folder: Path, weight: float) -> None:
        import torch

        stored = np.load(folder / FILE)
        self.collate, self.weight = collate, torch.tensor(weight)
        ends = np.cumsum([len(_places(row)) for row in train]).tolist()
        parts = [torch.from_numpy(stored[name]).tensor_split(tuple(ends[:-1])) for name in ("ids", "log_probs")]
        self.of_row = {id(row): (ids.long(), told) for row, ids, told in zip(train, *parts, strict=True)}
        self.rows = train  # kept alive, or another row could get the id of one

    def __getattr__(self, name: str) -> Any:
        return getattr(self.collate, name)

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, Any]:
        """As the collator's, and of training rows "teacher_ids" (int64) and "teacher_log_probs", (tokens, KEPT)."""
        import torch

        found = self.collate(batch)
        parts = [self.of_row[id(row)] for row in batch if id(row) in self.of_row]
        if len(parts) < len(batch):
            return found
        ids, told = (torch.cat(part) for part in zip(*parts, strict=True))
        return {**found, "teacher_ids": ids, "teacher_log_probs": told, "teacher_weight": self.weight}
