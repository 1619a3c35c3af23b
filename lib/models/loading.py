"""The run's base model found, checked and loaded; tokenizers and adapters with it. Only safetensors, never code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError
from lib.models.prompting import Task
from lib.models.quiet import no_warnings, quiet
from lib.models.weights import open_weights, read_file
from lib.run.files import read_json, read_jsonl, sha256_file, sha256_json
from lib.run.folders import user_path
from lib.settings import OFFLINE_BASE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lib.run import Run


@dataclass(frozen=True)
class Base:
    """A base model on the disk.

    Attributes:
        path: its folder.
        id: what the user called it: a hub id, a folder, or "offline".
        revision: commit of a hub model; a hash of the files of a folder; the key of the offline base.
        offline: True for the project's own small model, which is no Qwen result.
    """

    path: Path
    id: str
    revision: str
    offline: bool


def resolve_base(base_model: str, revision: str = "main") -> Base:
    """The folder of a base model: a local one, or a hub model downloaded to (or found in) the hub cache.

    Raises:
        InputError: no such folder or hub model, no access, no network, or a folder that is not a usable model.
    """
    local = user_path(base_model)
    if local.is_dir():
        check_model_folder(local)
        return Base(local, base_model, _fingerprint(local), False)
    if local.is_file() or base_model.startswith((".", "/", "~")) or "\\" in base_model or base_model.count("/") > 1:
        kind = "a file" if local.is_file() else "no folder"
        raise InputError(
            f"base_model {base_model!r}: {kind} {local}.",
            "a model folder (config.json, safetensors, tokenizer), or a hub id such as Qwen/Qwen2.5-0.5B-Instruct.",
            "correct the path, or set base_model: offline for the small built-in model.",
        )
    from lib.models.hub import download

    folder = download(base_model, revision)
    check_model_folder(folder)
    return Base(folder, base_model, folder.name, False)


def base_of(run: Run) -> Base:
    """The base model that notebook 01 chose for this run (the offline one is made now if it is not there yet)."""
    data = run.require("data")
    facts = data.entry.facts
    if facts.get("offline_base") or facts["base_model"] == OFFLINE_BASE:
        from lib.models.offline import ensure_base

        texts = [row["text"] for row in read_jsonl(data.path / "train.jsonl")]
        task = Task.from_json(read_json(data.path / "task.json"))
        folder = ensure_base(texts, task, data.path / "tokenizer")
        return Base(folder, OFFLINE_BASE, folder.name, True)
    base = resolve_base(facts["base_model"], _commit(facts.get("base_revision", "main")))
    if facts.get("base_revision") not in (None, base.revision):
        raise InputError(
            f"base model {base.id} is now {base.revision}.",
            f"{facts['base_revision']}, with which notebook 01 prepared the data.",
            "run notebook 01 again with force: true, or bring the old model back.",
        )
    return base


def _commit(recorded: str) -> str:
    return "main" if recorded.startswith("sha256:") else recorded


def _fingerprint(folder: Path) -> str:
    """Hash of the configuration and the weights of a model folder."""
    files = [folder / "config.json", *open_weights(folder).files]
    return "sha256:" + sha256_json({path.name: sha256_file(path) for path in files})[:16]


def check_model_folder(path: Path) -> None:
    """Refuse a folder that is not a complete causal language model in safetensors, before anything is loaded.

    Raises:
        InputError: no config.json, an unknown model type (code of the folder is never run), no weights, pickled
            weights, a Git LFS pointer or a web page in place of a file, truncated or damaged weights.
    """
    if not path.is_dir():
        raise InputError(f"no folder {path}.", "a model folder.", "check the path.")
    config = _read_config(path / "config.json")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        own = " that brings its own code (auto_map), which is never run" if config.get("auto_map") else ""
        raise InputError(
            f"{path / 'config.json'}: model_type {kind!r}{own}.",
            "a causal language model that transformers knows, e.g. qwen2 or qwen3.",
            "use another base_model.",
        )
    open_weights(path)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"no {path.name} in {path.parent}.", "a model folder.", "point to the folder that has it.")
    text = path.read_text(encoding="utf-8", errors="replace")
    if text.startswith("version https://git-lfs"):
        raise InputError(f"{path} is a Git LFS pointer.", "the file itself.", "run `git lfs pull` in its clone.")
    if text.lstrip().startswith("<"):
        raise InputError(f"{path} is a web page.", "JSON.", "download the file itself again.")
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is damaged ({error}).", "JSON.", "download or copy it again.") from None
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no object.", "a model configuration.", "download or copy it again.")
    return config


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
        load_in_4bit: linear layers in NF4 with double quantization, computed in bfloat16.
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
        options = {"dtype": torch.bfloat16, "quantization_config": _nf4(), "device_map": {"": device}}
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
        model = _with_adapter(model, adapter)
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


def _nf4() -> Any:
    """Frozen weights as in QLoRA: NormalFloat4 in blocks of 64, the block scales quantized again."""
    import torch
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
        bnb_4bit_compute_dtype=torch.bfloat16,
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


def _with_adapter(model: Any, adapter: Path) -> Any:
    """The model with a LoRA on top; the adapter's tensors must be exactly those that the model has places for."""
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    if not (adapter / "adapter_config.json").is_file():
        raise InputError(f"no adapter_config.json in {adapter}.", "an adapter folder.", "run 02_finetune first.")
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
    places = set(get_peft_model_state_dict(model))
    if odd := sorted(places ^ set(tensors)):
        raise InputError(
            f"the adapter {adapter} and its configuration disagree on {len(odd)} tensors (first {odd[0]}).",
            "a tensor for each place.",
            "train it again.",
        )
    return model
