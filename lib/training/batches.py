"""Rows as token ids, grouped by length, padded to the longest of their batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.models.conversations import ConversationTask
from lib.models.prompting import encode
from lib.models.tasks import AnyTask, encode_row
from lib.progress import track

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""Label of a position that takes no part in the loss (transformers' and torch's convention)."""

LENGTH_STEP = 16
"""Batches are padded to a multiple of so many tokens: oneDNN keeps compiled products for each shape it meets, which
for every length of its own took 2.0 GB after 80 updates of the offline base, and takes 1.0 GB so, at the same speed."""


@dataclass(frozen=True)
class Example:
    """Token ids of one row, and where the loss is computed.

    Attributes:
        ids: prompt, then the answer word and the end of turn; or a whole conversation.
        prompt_length: tokens in front of the first answer.
        spans: (first, behind the last) position of every answer; None for one answer up to the end.
    """

    ids: list[int]
    prompt_length: int
    spans: tuple[tuple[int, int], ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def answers(self) -> tuple[tuple[int, int], ...]:
        """The spans that the loss counts."""
        return self.spans if self.spans is not None else ((self.prompt_length, len(self.ids)),)

    @property
    def loss_tokens(self) -> int:
        """Number of positions that the loss counts."""
        return sum(stop - start for start, stop in self.answers)


Collate = Callable[[Sequence[Example]], "dict[str, torch.Tensor]"]
"""From rows to the tensors of one forward pass."""


def examples(rows: Sequence[dict[str, Any]], task: AnyTask, tokenizer: Any, what: str) -> list[Example]:
    """Encode rows {"text", "label"} with the run's prompt, or rows {"messages"}."""
    done = []
    for row in track(rows, f"tokenizing {what} rows"):
        if isinstance(task, ConversationTask):
            whole = encode_row(tokenizer, task, row)
            done.append(Example(whole.ids, whole.spans[0][0], tuple(whole.spans)))
            continue
        encoded = encode(tokenizer, task, row["text"], row["label"])
        done.append(Example(encoded.prompt_ids + encoded.answer_ids, len(encoded.prompt_ids)))
    return done


class Collator:
    """Pads on the right to a multiple of LENGTH_STEP; labels are IGNORED except on the answer."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, batch: Sequence[Example]) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask, labels: int64 (rows, longest rounded up); row_tokens: int64 (), no padding."""
        import torch

        longest = max(len(example) for example in batch)
        shape = (len(batch), -(-longest // LENGTH_STEP) * LENGTH_STEP)
        ids = torch.full(shape, self.pad_id)
        mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED)
        for i, example in enumerate(batch):
            row = torch.tensor(example.ids)
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
            for start, stop in example.answers:
                labels[i, start:stop] = row[start:stop]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "row_tokens": mask.sum()}


class GroupedOrder:
    """Order of the rows of an epoch: shuffled, of like length inside an update; a function of seed and epoch only.

    Independent of torch's random state, so a resumed run draws the same order; independent of how an update is cut
    into forward passes, so 1 × 4 rows and 4 × 1 rows make the same updates.

    Args:
        lengths: tokens of each row.
        rows_per_update: batch size × accumulation steps.
    """

    def __init__(self, lengths: Sequence[int], rows_per_update: int, seed: int) -> None:
        self.lengths = np.asarray(lengths)
        self.rows_per_update, self.seed, self.epoch = rows_per_update, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        size = self.rows_per_update
        shuffled = rng.permutation(len(self.lengths))
        updates = []
        for start in range(0, len(shuffled), 50 * size):
            pool = shuffled[start : start + 50 * size]
            pool = pool[np.argsort(-self.lengths[pool], kind="stable")]
            updates += [pool[i : i + size] for i in range(0, len(pool), size)]
        whole = [update for update in updates if len(update) == size]
        rest = [update for update in updates if len(update) < size]  # only the epoch's last update may be short
        order = [whole[i] for i in rng.permutation(len(whole))] + rest
        return iter(np.concatenate(order).tolist() if order else [])
