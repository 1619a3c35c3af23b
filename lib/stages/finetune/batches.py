"""Rows as token ids in the order of the updates, and micro-batches of them: padded, or packed into one sequence."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as attend
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lib.errors import one_line
from lib.prompts.conversations import Encoded

# Rows as token ids, grouped by length, padded to the longest of their batch.

IGNORED = -100
"""Label of a position that takes no part in the loss (transformers' and torch's convention)."""

LENGTH_STEP = 16
"""Batches are padded to a multiple of so many tokens: oneDNN keeps compiled products for each shape it meets, which
for every length of its own took 2.0 GB after 80 updates of the offline base, and takes 1.0 GB so, at the same speed."""


Collate = Callable[[Sequence[Encoded]], dict[str, torch.Tensor]]
"""From rows to the tensors of one forward pass."""


def _labels(example: Encoded) -> torch.Tensor:
    """int64 (tokens,): the ids of its answers, IGNORED elsewhere."""
    labels, ids = torch.full((len(example),), IGNORED), torch.tensor(example.ids)
    for start, stop in example.spans:
        labels[start:stop] = ids[start:stop]
    return labels


@dataclass(frozen=True)
class Collator:
    """Pads on the right to a multiple of LENGTH_STEP; labels are IGNORED except on the answer."""

    pad_id: int

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask, labels: int64 (rows, longest rounded up); row_tokens: int64 (), no padding."""
        filling = (0, -max(map(len, batch)) % LENGTH_STEP)

        def padded(rows: list[torch.Tensor], filler: int) -> torch.Tensor:
            return pad(pad_sequence(rows, batch_first=True, padding_value=filler), filling, value=filler)

        mask = padded([torch.ones(len(example), dtype=torch.int64) for example in batch], 0)
        ids = padded([torch.tensor(example.ids) for example in batch], self.pad_id)
        labels = padded([_labels(example) for example in batch], IGNORED)
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


class MicroBatches:
    """The rows of every forward pass of one process: its share of each update, cut into micro-batches.

    A batch sampler for torch's DataLoader. Every process has as many updates as the others; where an update has fewer
    rows than there are processes, some get an empty micro-batch for it.

    Args:
        order: of the rows of all processes. rows: of a micro-batch.
        process, processes: which of how many.
    """

    def __init__(self, order: GroupedOrder, rows: int, process: int = 0, processes: int = 1) -> None:
        self.order, self.rows, self.process, self.processes = order, rows, process, processes

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[list[int]]:
        order, size = list(self.order), self.order.rows_per_update
        for update in range(0, len(order), size):
            share = order[update : update + size][self.process :: self.processes]
            yield from [share[start : start + self.rows] for start in range(0, len(share), self.rows)] or [[]]


# A micro-batch as one sequence: the prompt prefix that all rows share, once, then the rest of every row behind it.
#
# Each row attends to the prefix and to itself and its positions go on from the prefix, so loss and gradients are those
# of the padded batch, while the layers compute the prefix once instead of once a row, and no padding inside the batch.
# Dropout is the one difference in training: the prefix meets one random mask a micro-batch instead of one a row.

ATTENTION = "shared_prefix"
"""Name of the attention function in transformers' registry."""

PACKED_LENGTH_STEP = 64
"""The sequence is filled up to a multiple of at least so many tokens (why: batches.LENGTH_STEP)."""


def filled_length(used: int) -> int:
    """Tokens of a sequence that holds `used` ones: four to eight lengths from one power of two to the next.

    oneDNN keeps compiled products for each length: 100 updates on ChnSentiCorp took 1,961 MiB with multiples of 64,
    1,436 with multiples of 512 (6 % slower), and 1,532 so, as fast as the first.
    """
    step = max(PACKED_LENGTH_STEP, 1 << max(0, used.bit_length() - 3))
    return -(-used // step) * step


def shared_prefix(examples: Sequence[Encoded]) -> int:
    """Number of leading tokens that all rows have in common, in front of the last prompt token of every row.

    The position that predicts a row's first answer token must stay the row's own.
    """
    if not examples:
        return 0
    columns = zip(*(example.ids for example in examples), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    return max(0, min(common, min(example.spans[0][0] for example in examples) - 1))


@dataclass(frozen=True)
class PackedCollator:
    """Makes the packed sequence of a micro-batch.

    Args:
        pad_id: token that fills the end.
        prefix: number of leading tokens that every row has in common (`shared_prefix`).
    """

    pad_id: int
    prefix: int

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """One sequence of N tokens for B rows, whose longest has S tokens behind the prefix of P tokens.

        Returns:
            input_ids, position_ids, labels: int64 (1, N).
            gather: int64 (B, S), position in the sequence of each row's tokens; −1 for an empty place.
            scatter: int64 (N − P,), place in the flattened (B, S) of each token behind the prefix; −1 for the filling.
            row_tokens: int64 (), tokens of all rows, the prefix counted once a row.
        """
        prefix, lengths = self.prefix, [len(example) - self.prefix for example in batch]
        used, widest = prefix + sum(lengths), max(lengths)
        front, own = torch.arange(prefix), [torch.arange(length) for length in lengths]
        starts = itertools.accumulate(lengths[:-1], initial=prefix)

        def filled(parts: Iterable[torch.Tensor], filler: int) -> torch.Tensor:
            return pad(torch.cat(list(parts)), (0, filled_length(used) - used), value=filler)

        ids = [batch[0].ids[:prefix], *(example.ids[prefix:] for example in batch)]
        labels = [torch.full((prefix,), IGNORED), *(_labels(example)[prefix:] for example in batch)]
        return {
            "input_ids": filled((torch.tensor(part, dtype=torch.int64) for part in ids), self.pad_id)[None],
            "position_ids": filled([front, *(prefix + places for places in own)], 0)[None],
            "labels": filled(labels, IGNORED)[None],
            "gather": pad_sequence([start + places for start, places in zip(starts, own, strict=True)], True, -1),
            "scatter": filled((i * widest + places for i, places in enumerate(own)), -1),
            "row_tokens": torch.tensor(sum(map(len, batch))),
        }


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    gather: torch.Tensor | None = None,
    scatter: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a packed sequence; without `gather` transformers' own scaled dot-product attention.

    Args:
        query: (1, heads, N, width); key, value: (1, key/value heads, N, width).
        attention_mask: bool (1, 1, S, P + S), what a row's own tokens see: the prefix and themselves, causally.
        gather, scatter: from `PackedCollator`.

    Returns:
        (1, N, heads, width), and no weights.
    """
    if gather is None or scatter is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    prefix = query.shape[2] - len(scatter)
    groups = module.num_key_value_groups

    def seen(states: torch.Tensor) -> torch.Tensor:
        """Prefix and own tokens of every row: (rows, heads, prefix + widest, width)."""
        front = states[:, :, :prefix].expand(len(gather), -1, -1, -1)
        return repeat_kv(_join(front, _unpack(states, gather, scatter)), groups)

    own = _unpack(query, gather, scatter)
    behind = attend(own, seen(key), seen(value), attn_mask=attention_mask, dropout_p=dropout, scale=scaling)
    behind = _pack(behind.transpose(1, 2), gather, scatter, prefix)
    if not prefix:
        return behind, None
    front = attend(
        query[:, :, :prefix],
        repeat_kv(key[:, :, :prefix], groups),
        repeat_kv(value[:, :, :prefix], groups),
        is_causal=True,
        dropout_p=dropout,
        scale=scaling,
    )
    return _join(front.transpose(1, 2), behind, 1), None


def _unpack(states: torch.Tensor, gather: torch.Tensor, scatter: torch.Tensor) -> torch.Tensor:
    """(1, heads, N, width) to (rows, heads, widest, width): every row's own tokens."""
    back = pad(scatter, (states.shape[2] - len(scatter), 0), value=-1)  # the prefix is no row's own
    return _Move.apply(states[0].transpose(0, 1), gather.flatten(), back).unflatten(0, gather.shape).transpose(1, 2)


def _pack(states: torch.Tensor, gather: torch.Tensor, scatter: torch.Tensor, prefix: int) -> torch.Tensor:
    """(rows, widest, heads, width) to (1, N − P, heads, width): the reverse of `_unpack`."""
    return _Move.apply(states.flatten(0, 1), scatter, gather.flatten() - prefix)[None]


class _Move(torch.autograd.Function):
    """Takes the states at the places `there`; `back` is where each of them went, negative for nowhere.

    Its gradient is the way back, where torch would add up in bfloat16. That is exact because an empty place has no
    gradient: no token of a row sees it, and nobody reads what it sees.
    """

    @staticmethod
    def forward(context: Any, states: torch.Tensor, there: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(back)
        return states.index_select(0, there.clamp(min=0))

    @staticmethod
    def backward(context: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (back,) = context.saved_tensors
        gradient = upstream.index_select(0, back.clamp(min=0))
        gradient[back < 0] = 0
        return gradient, None, None


def _join(first: torch.Tensor, second: torch.Tensor, axis: int = 2) -> torch.Tensor:
    return torch.cat([first, second], axis) if first.shape[axis] else second


def packed_inputs(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Keyword arguments of the decoder for a packed batch."""
    widest, total = batch["gather"].shape[1], batch["input_ids"].shape[1]
    prefix = total - len(batch["scatter"])
    mask = torch.ones((widest, prefix + widest), dtype=torch.bool, device=batch["input_ids"].device).tril(prefix)
    return {
        **{key: batch[key] for key in ("input_ids", "position_ids", "gather", "scatter")},
        "attention_mask": mask[None, None],  # transformers hands a mask of four dimensions on as it is
    }


def unpackable(model: Any, longest: int) -> str | None:
    """Why the layers of this model do not treat a packed row of `longest` tokens as a padded one, by its configuration.

    A window that is shorter than a row hides its beginning, and a layer without attention (Mamba, gated delta rule)
    carries its state from one row into the next. None: nothing speaks against it.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of {' and '.join(sorted(kinds))}"
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and window < longest:
        return f"it has layers with a sliding window of {window} tokens, and a row of {longest}"
    layers = getattr(model.get_decoder(), "layers", ())
    if not layers or not all(hasattr(getattr(layer, "self_attn", None), "num_key_value_groups") for layer in layers):
        return "its layers are not of the kind of Qwen or Llama"
    return None


def use_packed_attention(model: Any) -> tuple[str | None, str]:
    """Switch a model's attention to `packed_attention`, which leaves batches that are not packed as they were.

    Returns:
        None, or why transformers cannot (then it is unchanged); and the name of the attention it had.
    """
    config = model.config.get_text_config()
    before = config._attn_implementation
    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    try:
        model.set_attn_implementation(ATTENTION)
    except (ValueError, AttributeError) as error:
        return f"transformers: {one_line(error, 120)}", before
    if config._attn_implementation != ATTENTION:
        model.set_attn_implementation(before)
        return "its attention function cannot be changed", before
    return None, before
