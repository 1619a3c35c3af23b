"""Mean squares of the inputs of every linear layer, by forward hooks; written as llama-imatrix writes them.
How much each weight matters: the diagonal of the Fisher information on training text, and at its answers.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError
from lib.progress import Progress
from lib.runs.files import atomic_path

if TYPE_CHECKING:
    import torch


# Mean squares of the inputs of every linear layer, by forward hooks; written as llama-imatrix writes them.
#
# For child processes only: the model is loaded here.

_TOKENS_AT_ONCE = 2048
"""Most tokens of a forward pass."""


def collect_imatrix(argument: dict[str, Any]) -> dict[str, Any]:
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
    write_imatrix(Path(argument["output"]), sums, count, argument["dataset"], len(windows[0]))
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
    body, step = model.get_decoder(), max(1, _TOKENS_AT_ONCE // len(windows[0]))
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


def write_imatrix(path: Path, sums: dict[str, np.ndarray], count: int, dataset: str, window: int) -> None:
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


# How much each weight matters: the diagonal of the Fisher information on training text, and at its answers.
#
# To second order a change d of the weights moves the predicted distribution by a KL divergence of ½ Σ F d². F is the
# mean square of the gradient of log p(y), with y drawn from the model's own prediction. Draws of different positions
# are independent, so one backward pass of a window sums the information of all its positions.
#
# Answers are a few positions a row, most of them nearly certain: a drawn label would nearly always be the likely one,
# and rare others would carry all of the information. So u'∇logits is squared there in place of ∇log p(y), with a random
# vector u over the vocabulary whose mean square is the same, E[u u'] = diag(p) - p p' (the covariance of the drawn
# labels): u = √p s - p (√p·s) with random signs s, whose squares scatter by about their mean at most, however sure the
# model is. Whole rows are run, few at once: signs of different rows are independent, so that the squares add up in the
# mean, and the more passes, the less chance is in their sum.
#
# The diagonal takes rounding errors for independent. Some types (IQ3_S and its kin) shrink all weights of a tensor by
# about two percent, which no diagonal sees; so the information of a common factor is measured too: F of s in (1 + s) W,
# the mean square of Σ W·gradient. For child processes only.

_CHECKED = 1 << 21
"""Most weights of a tensor that are compared with the GGUF; of a larger one, rows at even distances."""
_SAME = 1e-2
"""Largest relative difference of a row's sum."""
_TOGETHER, _TOKENS = 4, 512
"""Most rows of a pass over answers, and most tokens of one of several rows."""
ANSWERS = "answers"
"""Folder of the sensitivities at answers."""


def collect(argument: dict[str, Any]) -> dict[str, Any]:
    """Write F of every matrix as `folder`/<GGUF name>.npy, float32, (rows, columns), a mean over positions; and that at
    answers as `folder`/answers/<GGUF name>.npy.

    Rows stand as in GGUF.

    Args:
        argument: "model" (folder), "source" (the GGUF made from it), "windows" (token ids, all of one length),
            "rows" (of `lib.stages.quantize.calibration.AnswerRows`; [] = no answers), "folder", "dtype" and "seed" of
            the
            draws.

    Returns:
        "positions", "scales" ({tensor: information of its common factor}), "answer_scales" (None without rows),
        "seconds" and "device".

    Raises:
        InputError: an architecture that llama.cpp's names are not known for, a GGUF of another model.
    """
    from lib.models.loading import load_model

    model = load_model(Path(argument["model"]), dtype=argument["dtype"])
    check_same(model, Path(argument["source"]))
    started = time.monotonic()
    folder, rows, answer_scales = Path(argument["folder"]), argument["rows"], None
    scales = _store(folder, model, information(model, argument["windows"], argument["seed"]))
    if rows:
        (folder / ANSWERS).mkdir()
        answer_scales = _store(folder / ANSWERS, model, answer_information(model, rows, argument["seed"]))
    seconds = round(time.monotonic() - started, 2)
    positions = sum(map(len, argument["windows"]))
    found = {"positions": positions, "scales": scales, "answer_scales": answer_scales}
    return {**found, "seconds": seconds, "device": str(model.device)}


def _store(folder: Path, model: Any, measured: tuple[dict[str, np.ndarray], dict[str, float]]) -> dict[str, float]:
    """Write one file a matrix; the information of the common factors."""
    found, scales = measured
    for name, values in found.items():
        np.save(folder / f"{name}.npy", values[row_order(name, model.config, len(values))])
    return scales


def check_same(model: Any, source: Path) -> None:
    """Refuse, before the gradients, a GGUF with other rows than the model, or with rows in another order.

    Raises:
        InputError: with the first such tensor.
    """
    from lib.stages.quantize import llama_library
    from lib.stages.quantize.llama_library import rows_of

    with llama_library.open_header(source) as header:
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

    draw = torch.Generator().manual_seed(seed)
    with _Squares(model) as squares, Progress("sensitivity, windows", len(windows)) as progress:
        for window in windows:
            logits = model(input_ids=torch.tensor([window], device=model.device), use_cache=False).logits[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=draw)[:, 0]
            torch.nn.functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum").backward()
            progress.advance()
    return squares.means(sum(map(len, windows)))


def answer_information(
    model: Any, rows: list[dict[str, Any]], seed: int
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """As `information`, at the positions that predict an answer's tokens alone, a mean over them.

    Args:
        rows: of `lib.stages.quantize.calibration.AnswerRows`.
        seed: of the random signs.

    Raises:
        InputError: see `collect`.
    """
    import torch

    draw = torch.Generator().manual_seed(seed)
    body, head = model.get_decoder(), model.get_output_embeddings()
    with _Squares(model) as squares, Progress("sensitivity at answers, rows", len(rows)) as progress:
        for group in groups(rows):
            ids = torch.zeros((len(group), max(len(row["ids"]) for row in group)), dtype=torch.long)
            for place, row in enumerate(group):  # padding stands behind: a causal model does not see it
                ids[place, : len(row["ids"])] = torch.tensor(row["ids"])
            hidden = body(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
            read = [hidden[place, row["positions"]] for place, row in enumerate(group)]
            logits = head(torch.cat(read)).float()
            logits.backward(_random_labels(logits.detach(), draw))
            progress.advance(len(group))
    return squares.means(sum(len(row["positions"]) for row in rows))


def groups(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of like length together, few enough that many passes add up and padding stays small."""
    found: list[list[dict[str, Any]]] = []
    for row in sorted(rows, key=lambda row: len(row["ids"])):
        if found and len(found[-1]) < _TOGETHER and (len(found[-1]) + 1) * len(row["ids"]) <= _TOKENS:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def _random_labels(logits: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Random vectors u with mean 0 and E[u u'] = diag(p) - p p', one a position: (positions, V)."""
    import torch

    p = logits.softmax(-1)
    signs = torch.randint(0, 2, p.shape, generator=draw, dtype=torch.int8).to(p.device) * 2 - 1
    signed = p.sqrt().mul_(signs)
    return signed.sub_(p.mul_(signed.sum(-1, keepdim=True)))  # in place: a long answer's vocabularies are large


class _Squares:
    """Sums of squared gradients of every matrix, one square a backward pass, and of its common factor; the gradients
    are dropped."""

    def __init__(self, model: Any) -> None:
        import torch

        self._weights = matrices(model)
        self._sums = {name: torch.zeros(w.shape, dtype=torch.float32) for name, w in self._weights.items()}
        self._scales = dict.fromkeys(self._weights, 0.0)
        model.requires_grad_(False)

    def __enter__(self) -> _Squares:
        import torch

        self._handles = []
        for name, weight in self._weights.items():
            weight.requires_grad_(True)
            hook = _gradient_adder(name, self._sums[name], self._scales)
            self._handles.append(weight.register_post_accumulate_grad_hook(hook))
        self._grad = torch.enable_grad()
        self._grad.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._grad.__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def means(self, positions: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """The sums a position; the object cannot be used afterwards."""
        found = {name: total.div_(positions).numpy() for name, total in self._sums.items()}
        return found, {name: total / positions for name, total in self._scales.items()}


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


def _gradient_adder(name: str, total: torch.Tensor, scales: dict[str, float]) -> Any:
    """A hook that adds the squared gradient of a pass, and that of a common factor, and drops the gradient."""

    def add(weight: torch.nn.Parameter) -> None:
        if weight.grad is not None:
            gradient = weight.grad.float()
            moved = gradient.to(total.device)
            total.addcmul_(moved, moved)
            scales[name] += float(gradient.flatten().dot(weight.detach().float().flatten())) ** 2
        weight.grad = None

    return add
