"""Base models, tokenizers and adapters loaded. Only safetensors, never code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError
from lib.models.kinds import require_adapter
from lib.models.quiet import no_warnings, quiet
from lib.models.resolving import Base, base_of, check_model_folder, resolve_base
from lib.models.weights import read_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Base", "base_of", "check_model_folder", "load_model", "load_tokenizer", "resolve_base"]


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or tokenizer folder.

    Raises:
        InputError: no tokenizer there, a damaged one, or one without a chat template.
    """
    quiet()
    from transformers import AutoTokenizer

    if not (path / "tokenizer.json").is_file() and not (path / "tokenizer_config.json").is_file():
        raise InputError(f"no tokenizer in {path}.", "tokenizer.json.", "copy or download the folder again.")
    try:
        with no_warnings():
            tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"the tokenizer in {path} cannot be read ({reason}).", "a whole one.", "copy it again."
        ) from None
    if not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer in {path} has no chat template.",
            "an instruction-tuned (chat) model.",
            "use its -Instruct kin.",
        )
    return tokenizer


def load_model(
    path: Path,
    dtype: str = "auto",
    load_in_4bit: bool = False,
    adapter: Path | None = None,
    device: str | None = None,
) -> PreTrainedModel:
    """A model in eval mode with SDPA attention, on `device`.

    Args:
        path: model folder.
        dtype: "auto" (what this machine computes natively), "float32" or "bfloat16".
        load_in_4bit: linear layers in NF4 with double quantization, computed in `dtype`.
        adapter: LoRA folder (safetensors) put on top; its weights stay float32.
        device: "cpu", "cuda", …; None = the best one here.

    Raises:
        InputError: an unusable folder, missing tensors, NaN or infinite weights, 4 bits where they do not work.
    """
    quiet()
    import torch
    from transformers import AutoModelForCausalLM

    from lib.device import compute_dtype, torch_device

    check_model_folder(path)
    device = device or torch_device()
    options: dict[str, Any] = {"dtype": getattr(torch, compute_dtype(dtype)[0])}
    if load_in_4bit:
        options |= {"quantization_config": _nf4(options["dtype"]), "device_map": {"": device}}
    with no_warnings():
        model, report = AutoModelForCausalLM.from_pretrained(
            str(path),
            attn_implementation="sdpa",
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"{path} lacks {len(missing)} tensors (first {missing[0]}).", "all tensors.", "download the folder again."
        )
    if load_in_4bit:
        _keep_trainable(model)
    else:
        model = model.to(device)
    _refuse_infinite(model, path)
    model.requires_grad_(False)
    if adapter is not None:
        model = _with_adapter(model, adapter, path)
    return model.eval()


def _keep_trainable(model: Any) -> None:
    """Keep 4-bit layers in the layout that has gradients.

    On CPUs with AVX512-BF16 bitsandbytes 0.50 repacks a layer at its first forward pass in eval mode, for good, and the
    repacked product has no backward pass: training would fail after the first validation.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _nf4(compute_dtype: Any) -> Any:
    """Frozen weights as in QLoRA: NormalFloat4 in blocks of 64, the block scales quantized again.

    Products are computed in what the machine computes natively: bfloat16 is emulated, slowly, on older devices.
    """
    from transformers import BitsAndBytesConfig

    from lib.device import bitsandbytes_problem

    if problem := bitsandbytes_problem():
        raise InputError(
            f"4-bit loading does not work here: {problem}.", "a working bitsandbytes.", "set load_in_4bit: false."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def _refuse_infinite(model: Any, path: Path) -> None:
    import torch

    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor.detach())
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                raise InputError(
                    f"tensor {name} in {path} holds NaN or infinity.", "finite weights.", "train or download it again."
                )


def _with_adapter(model: Any, adapter: Path, base: Path) -> Any:
    """The model of folder `base` with a LoRA on top, whose tensors must be exactly those that it has places for."""
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    require_adapter(adapter)
    tensors, _ = read_file(adapter / "adapter_model.safetensors")
    try:
        with no_warnings():
            model = PeftModel.from_pretrained(model, str(adapter), is_trainable=False, use_safetensors=True)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"the adapter {adapter} does not fit the base model ({reason}).",
            "an adapter of this base model.",
            "check base_model.",
        ) from None
    # peft reads the vocabulary's size from the base that the adapter names: a hub id it would ask the hub for, and a
    # .gguf file has no config.json. What was loaded is here.
    model.peft_config["default"].base_model_name_or_path = str(base)
    places = set(get_peft_model_state_dict(model))
    if odd := sorted(places ^ set(tensors)):
        raise InputError(
            f"the adapter {adapter} and its configuration disagree on {len(odd)} tensors (first {odd[0]}).",
            "a tensor for each place.",
            "train it again.",
        )
    return model
