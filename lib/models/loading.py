"""Loading models, tokenizers and adapters: only from safetensors, never running code of a repository."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError, refusal, refusing
from lib.models.adapters import copy_weights, read_adapter, require_adapter
from lib.models.base_model import check_model_folder
from lib.models.configurations import as_peft_reads, read_adapter_configuration, read_configuration
from lib.models.runtime_folders import runtime_of
from lib.models.weights import infinite, open_weights
from lib.runs import machine
from lib.runs.files import write_json
from lib.runs.machine import available_memory, no_warnings, quiet
from lib.settings import FULL

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lib.runs.run import Product


LIBRARIES = {"bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed_tensors", "torchao": "torchao"}
"""quant_method of config.json → the package that transformers needs to read it."""


def quantization_method(folder: Path) -> str | None:
    """`quant_method` of the folder's config.json, or the runtime that reads it instead of transformers; None for plain
    weights (or no folder at all)."""
    if runtime := runtime_of(folder):
        return runtime.title
    path = folder / "config.json"
    if not path.is_file():
        return None
    return (read_configuration(folder).get("quantization_config") or {}).get("quant_method")


def weight_bytes(folder: Path) -> int:
    """Bytes on the disk of the folder's weight files (safetensors; of other runtimes graph and weights)."""
    return sum(path.stat().st_size for path in weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights."""
    runtime = runtime_of(folder)
    return runtime.files(folder) if runtime else [*open_weights(folder).files]


def count_weights(folder: Path) -> int:
    """Number of weights of the unquantized architecture, tied ones once; nothing is allocated."""
    quiet()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    name = runtime.configuration if (runtime := runtime_of(folder)) else "config.json"
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, _configuration_file=name)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def affordable_dtype(*folders: Path) -> str:
    """Arithmetic for checking model folders: "float32" if the weights of all fit into memory that way, else
    "bfloat16"."""
    parameters = sum(open_weights(folder).parameters for folder in folders)
    return "float32" if parameters * 4 * 1.3 < available_memory() else "bfloat16"


def load_as_saved(folder: Path) -> PreTrainedModel:
    """What `AutoModelForCausalLM.from_pretrained(folder)` gives, in eval mode.

    That is: its own dtype and quantization (a quantized checkpoint carries its configuration), on the CPU
    (bitsandbytes puts itself on a GPU where there is one).

    Raises:
        InputError: an unusable folder, a quantization whose package is absent, missing or superfluous tensors.
    """
    quiet()
    check_model_folder(folder)
    method = quantization_method(folder)
    needed = LIBRARIES.get(method, method) if method else None
    if needed and not machine.has_module(needed):
        package = needed.replace("_", "-")
        raise refusal("models/quantizer-absent", folder=folder, method=method, needed=needed, package=package)
    return _from_pretrained(folder).requires_grad_(False).eval()


_ODD = (ValueError, TypeError, LookupError, AttributeError)
"""What transformers and peft raise where a configuration asks for what they cannot build or compute."""


def _from_pretrained(folder: Path, **options: Any) -> Any:
    """The model, with exactly the tensors of the folder."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM

    options |= {"trust_remote_code": False, "local_files_only": True, "output_loading_info": True}
    with no_warnings(), refusing((*_ODD, StrictDataclassError), "models/folder-does-not-load", folder=folder):
        model, report = AutoModelForCausalLM.from_pretrained(str(folder), ignore_mismatched_sizes=True, **options)
    for kind in ("missing", "unexpected", "mismatched"):
        if wrong := sorted(map(str, report[f"{kind}_keys"])):
            raise refusal("models/other-keys", folder=folder, count=len(wrong), kind=kind, wrong=wrong)
    return model


def load_tokenizer(path: Path, chat: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or tokenizer folder.

    Args:
        chat: False where plain text alone is cut, which takes no chat template.

    Raises:
        InputError: no tokenizer there, a damaged one, or one without a chat template.
    """
    quiet()
    from transformers import AutoTokenizer

    if not (path / "tokenizer.json").is_file() and not (path / "tokenizer_config.json").is_file():
        raise InputError(f"no tokenizer in {path}.", "tokenizer.json.", "copy or download the folder again.")
    # the tokenizers library raises bare Exception for a damaged file
    with no_warnings(), refusing(Exception, "models/damaged-tokenizer", path=path):
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    if chat and not tokenizer.chat_template:
        raise refusal("models/no-template", path=path)
    return tokenizer


def causal_model(model: Any) -> Any:
    """The transformers model inside a PeftModel (LoRA layers stay in place), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def load_model(
    path: Path, dtype: str = "auto", load_in_4bit: bool = False, adapter: Path | None = None, device: str | None = None
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

    check_model_folder(path)
    device = device or machine.torch_device()
    options: dict[str, Any] = {"dtype": getattr(torch, machine.compute_dtype(dtype)[0])}
    if load_in_4bit:
        options |= {"quantization_config": _nf4(options["dtype"]), "device_map": {"": device}}
    model = _from_pretrained(path, attn_implementation="sdpa", use_safetensors=True, **options)
    if load_in_4bit:
        _keep_trainable(model)
    else:
        model = model.to(device)
    _refuse_infinite(model, path)
    model.requires_grad_(False).eval()
    with refusing(_ODD, "models/folder-does-not-load", folder=path):
        _answer(model)
    return model if adapter is None else _with_adapter(model, adapter, path)


def load_trained(base: Path, made: Product | None, dtype: str) -> Any:
    """A run's model as it was trained: the product `adapter` on the base (in 4 bits where it was trained on that), the
    product alone where every weight was trained, the base alone where there is none.

    Raises:
        InputError: as `load_model`.
    """
    method = made and made.entry.facts.get("method")
    if made is None or method == FULL:
        return load_model(made.path if made else base, dtype=dtype)
    return load_model(base, dtype=dtype, load_in_4bit=method == "QLoRA", adapter=made.path)


def _answer(model: Any) -> None:
    """Two tokens through the model: what can be built and not computed fails here, not amid the work."""
    import torch

    with no_warnings(), torch.no_grad():
        model(input_ids=torch.zeros((1, 2), dtype=torch.long, device=model.device))


def _keep_trainable(model: Any) -> None:
    """Keep 4-bit layers in the layout that supports gradients.

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

    if problem := machine.bitsandbytes_problem():
        raise refusal("models/no-4-bit", problem=problem)
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
                raise infinite(name, path)


def _with_adapter(model: Any, adapter: Path, base: Path) -> Any:
    """The model of folder `base` with a LoRA on top, with exactly the tensors that the model has places for."""
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    require_adapter(adapter)
    found = read_adapter(adapter)
    found.require_finite()
    refused = refusing((RuntimeError, ImportError, *_ODD), "models/adapter-does-not-load", adapter=adapter)
    with no_warnings(), tempfile.TemporaryDirectory() as folder, refused:
        write_json(Path(folder, "adapter_config.json"), as_peft_reads(read_adapter_configuration(adapter)))
        copy_weights(found, Path(folder, "adapter_model.safetensors"))
        model = PeftModel.from_pretrained(model, folder, is_trainable=False, use_safetensors=True)
    # peft reads the vocabulary's size from the base that the adapter names: a hub id it would ask the hub for, and a
    # .gguf file has no config.json. What was loaded is here.
    model.peft_config["default"].base_model_name_or_path = str(base)
    places = set(get_peft_model_state_dict(model))
    if extra := sorted(places ^ set(found.tensors)):
        raise refusal("models/adapter-and-configuration", adapter=adapter, count=len(extra), odd=extra)
    with refusing(_ODD, "models/adapter-does-not-load", adapter=adapter):
        _answer(model.eval())
    return model
