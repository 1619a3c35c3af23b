"""Mean squares of the inputs of every linear layer, by forward hooks; written as llama-imatrix writes them.

For child processes only: the model is loaded here.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError
from lib.progress import Progress
from lib.run.files import atomic_path

if TYPE_CHECKING:
    import torch

_TOKENS = 2048
"""Most tokens of a forward pass."""


def collect(argument: dict[str, Any]) -> dict[str, Any]:
    """Run windows of tokens through a model folder and write the importance matrix.

    Args:
        argument: "model" (folder), "windows" (token ids, all of one length), "output" (new GGUF file), "dataset" (its
            name for the header), "dtype" ("float32" or "bfloat16").

    Returns:
        "entries" (layers), "seconds" and "device".

    Raises:
        InputError: an architecture that llama.cpp's names are not known for, inputs that are not finite.
    """
    from lib.models.loading import load_model

    model = load_model(Path(argument["model"]), dtype=argument["dtype"])
    windows = argument["windows"]
    started = time.monotonic()
    sums = sums_of_squares(model, windows)
    count = sum(map(len, windows))
    write(Path(argument["output"]), sums, count, argument["dataset"], len(windows[0]))
    return {"entries": len(sums), "seconds": round(time.monotonic() - started, 2), "device": str(model.device)}


def sums_of_squares(model: Any, windows: list[list[int]]) -> dict[str, np.ndarray]:
    """GGUF tensor name → Σ x² over all tokens for every input of that layer, float64, (inputs,).

    The layers are those that llama-imatrix sees: the matrices of the blocks, not embedding and output.

    Raises:
        InputError: see `collect`.
    """
    import torch

    layers = gguf_layers(model)
    sums = {name: torch.zeros(layer.in_features, dtype=torch.float64) for name, layer in layers.items()}
    handles = [layer.register_forward_pre_hook(_adder(sums[name])) for name, layer in layers.items()]
    body, step = model.get_decoder(), max(1, _TOKENS // len(windows[0]))
    try:
        with torch.inference_mode(), Progress("importance matrix, windows", len(windows)) as progress:
            for start in range(0, len(windows), step):
                batch = torch.tensor(windows[start : start + step], device=model.device)
                body(input_ids=batch, use_cache=False)
                progress.advance(len(batch))
    finally:
        for handle in handles:
            handle.remove()
    broken = [name for name, values in sums.items() if not torch.isfinite(values).all()]
    if broken:
        raise InputError(
            f"inputs of {broken[0]} that are not finite ({len(broken)} layers).", "finite activations.", "check 04."
        )
    return {name: values.numpy() for name, values in sums.items()}


def _adder(total: torch.Tensor) -> Any:
    """A hook that adds the squares of a layer's input; sums over one pass in float32, over all in float64."""

    def add(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        rows = inputs[0].detach().float().flatten(0, -2)
        total.add_(rows.square().sum(dim=0).to("cpu", total.dtype))

    return add


def gguf_layers(model: Any) -> dict[str, Any]:
    """GGUF tensor name → linear layer, of all blocks.

    Raises:
        InputError: a linear layer in a block for which the package `gguf` knows no name.
    """
    import gguf
    import torch

    kinds = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    kind, body = model.config.model_type, model.get_decoder()
    prefix = next(f"{name}." for name, module in model.named_modules() if module is body)
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(prefix)
    }
    names = gguf.get_tensor_name_map(kinds[kind], model.config.num_hidden_layers) if kind in kinds else None
    found = {name: names.get_name(f"{name}.weight", (".weight",)) if names else None for name in linear}
    if unknown := [name for name, new in found.items() if new is None]:
        raise InputError(
            f"layer {unknown[0]} of a {kind} model, whose name in GGUF is not known.",
            "a model of the Qwen2, Qwen3 or Llama family.",
            "set imatrix to a file of llama-imatrix, or to none.",
        )
    return {str(found[name]): layer for name, layer in linear.items()}


def write(path: Path, sums: dict[str, np.ndarray], count: int, dataset: str, window: int) -> None:
    """Write an importance matrix in llama.cpp's GGUF form: sums of squares and counts a layer, names in order."""
    import gguf

    class Writer(gguf.GGUFWriter):
        def add_architecture(self) -> None:
            """An importance matrix has none."""

    with atomic_path(path) as temporary:
        writer = Writer(temporary, "")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [dataset])
        writer.add_uint32("imatrix.chunk_count", count // window)
        writer.add_uint32("imatrix.chunk_size", window)
        for name in sorted(sums):
            writer.add_tensor(f"{name}.in_sum2", sums[name].astype(np.float32).reshape(1, -1))
            writer.add_tensor(f"{name}.counts", np.full((1, 1), count, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
