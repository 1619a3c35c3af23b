"""How much each weight matters: the diagonal of the Fisher information on training text.

To second order a change d of the weights moves the predicted distribution by a KL divergence of ½ Σ F d². F is the mean
square of the gradient of log p(y), with y drawn from the model's own prediction. Draws of different positions are
independent, so one backward pass of a window sums the information of all its positions.

The diagonal takes rounding errors for independent. Some types (IQ3_S and its kin) shrink all weights of a tensor by
about two percent, which no diagonal sees; so the information of a common factor is measured too: F of s in (1 + s) W,
the mean square of Σ W·gradient. For child processes only.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError
from lib.progress import Progress
from lib.quantizing.collecting import gguf_layers

if TYPE_CHECKING:
    import torch

_CHECKED = 1 << 21
"""Most weights of a tensor that are compared with the GGUF; of a larger one, rows at even distances."""
_SAME = 1e-2
"""Largest relative difference of a row's sum."""


def collect(argument: dict[str, Any]) -> dict[str, Any]:
    """Write F of every matrix as `folder`/<GGUF name>.npy, float32, (rows, columns), a mean over positions.

    Rows stand as in GGUF.

    Args:
        argument: "model" (folder), "source" (the GGUF made from it), "windows" (token ids, all of one length),
            "folder", "dtype" and "seed" of the draws.

    Returns:
        "positions", "scales" ({tensor: information of its common factor}), "seconds" and "device".

    Raises:
        InputError: an architecture that llama.cpp's names are not known for, a GGUF of another model.
    """
    from lib.models.loading import load_model

    model = load_model(Path(argument["model"]), dtype=argument["dtype"])
    check_same(model, Path(argument["source"]))
    started = time.monotonic()
    found, scales = information(model, argument["windows"], argument["seed"])
    for name, values in found.items():
        np.save(Path(argument["folder"]) / f"{name}.npy", values[row_order(name, model.config, len(values))])
    seconds = round(time.monotonic() - started, 2)
    positions = sum(map(len, argument["windows"]))
    return {"positions": positions, "scales": scales, "seconds": seconds, "device": str(model.device)}


def check_same(model: Any, source: Path) -> None:
    """Refuse, before the gradients, a GGUF with other rows than the model, or with rows in another order.

    Raises:
        InputError: with the first such tensor.
    """
    from lib.quantizing import native
    from lib.quantizing.stored import rows_of

    with native.open_header(source) as header:
        for name, weight in matrices(model).items():
            tensor = header.tensors.get(name)
            if tensor is None:  # an output matrix that only one of the two ties: its rows are those of the embedding
                continue
            sums = weight.detach().double().sum(dim=1).cpu().numpy()[row_order(name, model.config, len(weight))]
            rows, step = tensor["weights"] // tensor["shape"][0], -(-tensor["weights"] // _CHECKED)
            found = rows_of(source, tensor, 0, rows, step).sum(axis=1, dtype=np.float64)
            scale = float(np.abs(sums).max())
            if rows != len(sums) or not np.allclose(found, sums[::step], rtol=_SAME, atol=_SAME * scale):
                do = "convert the model again (05, or workbook convert), or name the one that the GGUF was made from."
                raise InputError(f"{name} in {source.name} has other rows than in the model folder.", "equal rows.", do)


def information(model: Any, windows: list[list[int]], seed: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """GGUF tensor name → F, float32, of all matrices of the blocks, of embedding and output (one where they are tied);
    and name → the information of a common factor of its weights.

    Raises:
        InputError: see `collect`.
    """
    import torch

    weights = matrices(model)
    sums = {name: torch.zeros(weight.shape, dtype=torch.float32) for name, weight in weights.items()}
    scales = dict.fromkeys(weights, 0.0)
    model.requires_grad_(False)
    handles = []
    for name, weight in weights.items():
        weight.requires_grad_(True)
        handles.append(weight.register_post_accumulate_grad_hook(_adder(name, sums[name], scales)))
    draw = torch.Generator().manual_seed(seed)
    try:
        with torch.enable_grad(), Progress("sensitivity, windows", len(windows)) as progress:
            for window in windows:
                logits = model(input_ids=torch.tensor([window], device=model.device), use_cache=False).logits[0].float()
                drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=draw)[:, 0]
                torch.nn.functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum").backward()
                progress.advance()
    finally:
        for handle in handles:
            handle.remove()
    positions = sum(map(len, windows))
    found = {name: total.div_(positions).numpy() for name, total in sums.items()}
    return found, {name: total / positions for name, total in scales.items()}


def matrices(model: Any) -> dict[str, torch.nn.Parameter]:
    """GGUF tensor name → weight."""
    found = {name: layer.weight for name, layer in gguf_layers(model).items()}
    found["token_embd.weight"] = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    if head is not found["token_embd.weight"]:
        found["output.weight"] = head
    return found


def row_order(name: str, config: Any, rows: int) -> np.ndarray:
    """The rows of a matrix in the order of GGUF: llama.cpp interleaves the halves of Llama's queries and keys."""
    order = np.arange(rows)
    kinds = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    heads = kinds.get(name.removesuffix(".weight").rpartition(".")[2])
    if config.model_type not in ("llama", "mistral") or heads is None:
        return order
    return order.reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def _adder(name: str, total: torch.Tensor, scales: dict[str, float]) -> Any:
    """A hook that adds the squared gradient of a pass, and that of a common factor, and drops the gradient."""

    def add(weight: torch.nn.Parameter) -> None:
        if weight.grad is not None:
            gradient = weight.grad.float()
            total.add_(gradient.square().to(total.device))
            scales[name] += float((gradient * weight.detach()).sum(dtype=gradient.dtype)) ** 2
        weight.grad = None

    return add
