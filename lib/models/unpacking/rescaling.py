"""A way off the grid of a quantized file: the same function, computed by weights that lie between its steps.

Weights that were dequantized lie on the grid of their type, and the same type rounds W + δ back to W: it undoes a
fine-tuning, and looks better than other types where nothing was trained. In a transformer some channels can be scaled
in one tensor and scaled back in the next, without changing what is computed:

    RMSNorm(x)·γs, and the columns of q, k, v (or of gate and up) divided by s,
    rows of v (and its bias) times s, and the columns of o divided by s (a group of query heads shares one of v),
    rows of up (and its bias) times s, and the columns of down divided by s.

Blocks of a quantized type run along a row, so dividing columns by different numbers takes every matrix of a layer off
the grid. The residual stream, and with it the embedding and the output matrix, stays as it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lib.models.gguf_architecture import head_size

SEED = 20261128
RANGE = (0.8, 1.25)
"""Smallest and largest scale; they are log-uniform between. Why these: docs/LOG.md."""


class Rescaling:
    """Scales of every layer of a model, drawn by `seed`."""

    def __init__(self, config: dict[str, Any], seed: int = SEED, bounds: tuple[float, float] = RANGE) -> None:
        self.config, self.seed, self.bounds = config, seed, bounds
        self.layer, self.scales = -1, dict[str, np.ndarray]()

    def apply(self, name: str, first: int, values: np.ndarray) -> np.ndarray:
        """Rows of a tensor, scaled in float32.

        Args:
            name: of the tensor in transformers; first: number of the first row; values: float32 rows, or a vector.
        """
        if not name.startswith("model.layers."):
            return values
        _, _, layer, *rest = name.split(".")
        rows, columns = self._of(int(layer), rest[-2], rest[-1])
        if rows is not None:
            part = rows[first : first + len(values)]
            values = values * (part if values.ndim == 1 else part[:, None])
        return values / columns if columns is not None else values

    def _of(self, layer: int, module: str, kind: str) -> tuple[np.ndarray | None, np.ndarray | None]:
        """What rows are multiplied with, and what columns are divided by."""
        scales = self._layer(layer)
        rows = {
            "input_layernorm": "attention",
            "post_attention_layernorm": "feed_forward",
            "v_proj": "value",
            "up_proj": "up",
        }.get(module)
        columns = {
            **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "attention"),
            **dict.fromkeys(("gate_proj", "up_proj"), "feed_forward"),
            "o_proj": "output",
            "down_proj": "up",
        }.get(module)
        return scales[rows] if rows else None, scales[columns] if columns and kind == "weight" else None

    def _layer(self, layer: int) -> dict[str, np.ndarray]:
        if layer != self.layer:
            config, head = self.config, head_size(self.config)
            keys, width = config["num_key_value_heads"], config["hidden_size"]
            random = np.random.default_rng([self.seed, layer])
            low, high = np.log(self.bounds)
            sizes = {"attention": width, "feed_forward": width, "value": keys * head}
            sizes["up"] = config["intermediate_size"]
            scales = {k: np.exp(random.uniform(low, high, n)).astype(np.float32) for k, n in sizes.items()}
            group = config["num_attention_heads"] // keys
            scales["output"] = np.repeat(scales["value"].reshape(keys, head), group, axis=0).reshape(-1)
            self.layer, self.scales = layer, scales
        return self.scales
