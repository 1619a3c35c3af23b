"""Which layers get an adapter, the memory that its training needs, and which way of training fits this machine."""

from __future__ import annotations

import copy
from typing import Any

import psutil

from lib.errors import refusal, refusing
from lib.models.base_model import configuration_of, refuse_without_template
from lib.models.configurations import refuse_other_task
from lib.models.loading import causal_model
from lib.models.unpack_source import read_source, transformers_config
from lib.runs import machine
from lib.runs.files import data_file, user_path
from lib.runs.machine import no_warnings, quiet
from lib.settings import FULL, LOFTQ, OFFLINE_BASE, Settings

# Which layers get an adapter: the check of target_modules, for a training and for the advice before it.


def with_adapter(model: Any, settings: Settings) -> Any:
    """The model with a fresh LoRA on its `target_modules`.

    Raises:
        InputError: target_modules names what is no layer of this model, or one that a merge could not change.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    targets: Any = settings.target_modules
    if targets != "all-linear":
        targets = [name.strip() for name in targets.split(",") if name.strip()]
        if bad := sorted({"lm_head", "embed_tokens"} & {name.rpartition(".")[2] for name in targets}):
            raise refusal("finetune/tied-targets", bad=bad)
        layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        if unknown := [name for name in targets if not any(f".{layer}".endswith(f".{name}") for layer in layers)]:
            blocks = sorted({layer.rpartition(".")[2] for layer in layers if layer.endswith("_proj")})
            raise refusal("finetune/not-linear", unknown=", ".join(unknown), blocks=", ".join(blocks))
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        **settings.pick("use_rslora", "use_dora"),
        init_lora_weights=settings.init_lora_weights == LOFTQ or settings.init_lora_weights,  # LoftQ begins as usual
        task_type="CAUSAL_LM",
    )
    with refusing(ValueError, "finetune/no-such-layers", settings=settings), no_warnings():
        adapted = get_peft_model(model, config)
    rank = min(len(weights) for name, weights in adapted.named_parameters() if ".lora_A." in name)
    if rank < settings.lora_r:
        raise refusal("finetune/rank-too-large", settings=settings, rank=rank)
    return adapted


# Memory a training needs, estimated before it starts, and what to change when it is too much.

HEAD_ROWS = 256
"""Positions whose logits exist at one time (`layout.head_loss`): 156 MB in float32 for a vocabulary of 151,936."""

NF4_BITS = 4.127
"""Bits a weight in NF4 with double quantization: 4 + 8/64 + 32/(64·256) (QLoRA, Dettmers et al. 2023, §3)."""


def weights_of(model: Any) -> tuple[int, int, int]:
    """Numbers of weights: in linear layers, in the embedding and the output layer, in the adapter (0 without one)."""
    inner = causal_model(model)
    embedding = inner.get_input_embeddings().weight
    other = embedding.numel() * (1 if inner.get_output_embeddings().weight is embedding else 2)
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad) if inner is not model else 0
    # packed 4-bit weights are two a byte
    everything = sum((getattr(p, "quant_state", None) or p).shape.numel() for p in model.parameters())
    return everything - adapter - other, other, adapter


def estimate(model: Any, settings: Settings, length: int, answer: int, prefix: int = 0) -> dict[str, int]:
    """Bytes by purpose; `process` is what Python and its libraries take already (0 on a GPU).

    Weights: their stored size (NF4 for linear layers in 4 bits; where all are trained float32, and a copy in the format
    of the products). Adapter, gradients, AdamW: 4, 4 and 8 bytes a trained weight. Activations: the tensors that
    autograd keeps for a Qwen2 layer, a token: about 16 × hidden, 6 × key/value width and 6 × intermediate in the
    compute format (with dropout another 7 copies of layer inputs), and 2 norms in float32. DoRA keeps three float32
    numbers more an output of a linear layer, B·A and W + s·B·A of one layer, and in 16 bits a copy of all weights (six
    layers of width 512, 8 rows of 120 tokens: 380 MiB more than LoRA in float32, 512 in bfloat16; here 436, 479). With
    `qat` the rounded matrices stay for the backward pass, and of every weight whether it was cut.
    With gradient checkpointing one hidden state a layer and the whole of one layer.
    Logits: loss positions (HEAD_ROWS at a time, if the output layer is frozen) × vocabulary × 12 bytes: float32 values,
    log-probabilities and gradient; in bfloat16 values and gradient once more in that format, but the float32 values are
    freed first.

    Args:
        length: tokens of the longest row. answer: loss tokens of the row that has most.
        prefix: tokens at the rows' beginning that a micro-batch computes once for all of them.
    """
    config, whole = causal_model(model).config.get_text_config(), settings.finetuning_type == FULL
    linear, other, adapter = weights_of(model)
    s, hidden, intermediate = model.get_input_embeddings().weight.itemsize, config.hidden_size, config.intermediate_size
    if whole:
        s = 4 if machine.compute_dtype(settings.dtype)[0] == "float32" else 2
    trained, held = (linear + other, 4 if s == 4 else 6) if whole else (adapter, s)
    linear_held = NF4_BITS / 8 if settings.load_in_4bit else held
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    key_value, layers = head * config.num_key_value_heads, config.num_hidden_layers
    inputs = 5 * hidden + intermediate + key_value if settings.lora_dropout > 0 and not whole else 0
    layer = s * (16 * hidden + 6 * key_value + 6 * intermediate + 1.5 * inputs) + 16 * hidden
    once = 0
    if settings.use_dora:
        layer += 12 * (3 * hidden + 2 * key_value + 2 * intermediate)
        once = 4 * intermediate * (intermediate + 3 * hidden) + (s * linear if s < 4 else 0)
    if settings.qat != "none":
        once += (s + 1) * linear
    rows = settings.per_device_train_batch_size
    tokens = prefix + rows * (length - prefix)
    kept = layers * s * hidden + layer if settings.gradient_checkpointing else layers * layer
    if settings.sharded:  # its share, and two layers that are whole at a time
        linear_held *= min(1.0, 1 / settings.num_processes + 2 / layers)
    return {
        "process": 0,
        "weights": round(linear * linear_held + other * held),
        "adapter": 4 * adapter,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "activations": round(tokens * kept) + once,
        "logits": (rows * answer if whole else min(rows * answer, HEAD_ROWS)) * config.vocab_size * 12,
    }


def advice(need: int, available: int, settings: Settings, can_4bit: bool) -> list[str]:
    """What to change, the cheapest first, when `need` bytes exceed nine tenths of `available`; else nothing."""
    rows, whole = settings.per_device_train_batch_size, settings.finetuning_type == FULL
    more = rows * settings.gradient_accumulation_steps
    steps = {
        f"per_device_train_batch_size: 1 with gradient_accumulation_steps: {more} (the same updates)": rows > 1,
        "finetuning_type: lora": whole,
        "lora_r: 4": settings.lora_r > 4 and not whole,
        "load_in_4bit: true (and dtype: auto)": can_4bit and not settings.load_in_4bit and not whole,
        "max_seq_length: 128 (notebook 01 shows the share of texts cut)": settings.max_seq_length > 128,
        "gradient_checkpointing: true (about 30 % slower)": not settings.gradient_checkpointing,
    }
    return [step for step, helps in steps.items() if helps] if need > 0.9 * available else []


def refuse_impossible(need: int, total: int, steps: list[str]) -> None:
    """Raise when the machine's whole memory is less than the estimate."""
    if need > total:
        cure = ", then ".join(steps or ["base_model to a smaller one"])
        raise refusal("finetune/too-large", need=need / 2**30, total=total / 2**30, cure=cure)


# Which way of training fits this machine, with its arithmetic: from a parameter file and the model's shape alone.

MOST = 0.9
"""Share of the free memory that a plan may need; the estimate is good to about a tenth."""

ANSWER_TOKENS = 4
"""Loss tokens of a labelled row that are reckoned with: a label of up to three tokens, and the end of the turn."""

OFFLOAD: str = data_file("stages/finetune/notes.yaml")["offload"]


def recommend(settings: Settings, source: str | None = None) -> dict[str, Any]:
    """Estimate every plan for `base_model` (or the model folder `source`) and choose the first that fits.

    Rows are reckoned as long as `max_seq_length`, and answers of conversations too: real rows need less.

    Returns:
        As JSON, sizes in bytes: "model", its "weights", "tokens" of a row, "device" and how many "devices", "free" on
        one, "dtype", "plans", the name of the "recommended" one (None: none fits), "offload" in words. Of a plan
        "name", "changes" (the settings that differ from those asked for), "estimate" of one process by purpose, "need"
        on one device, of all processes that share it; "possible": whether this machine can start so many processes;
        "fits": whether the need is at most MOST of what is free, too.

    Raises:
        InputError: the model's configuration can be had nowhere (of a hub model that file alone is asked for).
    """
    quiet()
    name = source or settings.base_model
    dtype = machine.compute_dtype(settings.dtype)[0]
    kind, free, devices = _machine()
    base_model = _skeleton(name, dtype)
    weights = sum(parameter.numel() for parameter in base_model.parameters())
    adapted = with_adapter(copy.deepcopy(base_model).requires_grad_(False), settings)
    models = {FULL: base_model, "lora": adapted}
    process = psutil.Process().memory_info().rss if kind == "cpu" else 0
    plans: list[dict[str, Any]] = []
    for words, changes in _ways(settings, kind, devices):
        asked = settings.model_copy(update=changes)
        answer = ANSWER_TOKENS if asked.task == "classification" else asked.max_seq_length
        parts = estimate(models[asked.finetuning_type], asked, asked.max_seq_length, answer) | {"process": process}
        parts["total"] = sum(parts.values())
        need = parts["total"] * (asked.num_processes if kind == "cpu" else 1)
        possible = kind == "cpu" or asked.num_processes <= devices
        fits = possible and need <= MOST * free
        plans.append(
            {"name": words, "changes": changes, "estimate": parts, "need": need, "possible": possible, "fits": fits}
        )
    return {
        "model": name,
        "weights": weights,
        "tokens": settings.max_seq_length,
        "device": machine.device_name(),
        "devices": devices,
        "free": free,
        "dtype": dtype,
        "plans": plans,
        "recommended": next((plan["name"] for plan in plans if plan["fits"]), None),
        "offload": OFFLOAD,
    }


def _machine() -> tuple[str, int, int]:
    """Kind of device, bytes free on one (the fullest), and how many could train together."""
    kind = machine.torch_device()
    if kind != "cuda":
        return kind, machine.available_memory(), 1
    import torch

    count = torch.cuda.device_count()
    return kind, min(torch.cuda.mem_get_info(index)[0] for index in range(count)), count


def _ways(settings: Settings, kind: str, devices: int) -> list[tuple[str, dict[str, Any]]]:
    """All plans as words and changes, in the order of preference."""
    ways: list[tuple[str, dict[str, Any]]] = [("as the parameter file says", {})]
    if kind == "cuda" and devices > 1 and settings.num_processes != devices:
        words, changes = _divided(settings, devices)
        ways.insert(0, (f"{devices} processes, one on each GPU{words}", changes))
        if settings.finetuning_type != FULL and not settings.load_in_4bit:
            shared = {**changes, "fsdp": "full_shard"}
            ways.append((f"{devices} processes that share out the frozen layers{words}", shared))
    root: dict[str, Any] = {}
    if settings.num_processes > 1:
        words, single = _divided(settings, 1)
        ways.append((f"a single process{words}", single))
        root = single if kind != "cuda" or settings.num_processes > devices else {}
    for words, changes in _alternatives(settings.model_copy(update=root)):
        together = {**root, **changes}
        words += ", a single process" if root else ""
        ways.append((words, {key: value for key, value in together.items() if getattr(settings, key) != value}))
    return ways


def _divided(settings: Settings, processes: int) -> tuple[str, dict[str, Any]]:
    """The changes for so many processes with as many rows an update; and a word where that cannot be divided."""
    rows, passes = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    update = rows * passes * settings.num_processes
    changes: dict[str, Any] = {"num_processes": processes, "fsdp": settings.fsdp if processes > 1 else "none"}
    odd = f" (an update of {rows * passes * processes} rows, not {update})" if update % processes else ""
    if not odd:
        each = update // processes
        fitting = max(size for size in range(1, min(rows, each) + 1) if each % size == 0)
        changes |= {"per_device_train_batch_size": fitting, "gradient_accumulation_steps": each // fitting}
    return odd, {key: value for key, value in changes.items() if getattr(settings, key) != value}


def _alternatives(settings: Settings) -> list[tuple[str, dict[str, Any]]]:
    """What to change, the least harmful first: first what leaves the updates as they are, then 4 bits."""
    rows, passes = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows * passes} if rows > 1 else {}
    plans: list[tuple[str, dict[str, Any]]] = [("one row a forward pass", small)] if small else []
    again = {**small, "gradient_checkpointing": True}
    if not settings.gradient_checkpointing:
        plans.append(("gradient checkpointing", again))
    if settings.finetuning_type == FULL:
        plans.append(("LoRA", {**small, "finetuning_type": "lora"}))
    elif not settings.load_in_4bit and machine.bitsandbytes_problem() is None:
        four = {"load_in_4bit": True, "dtype": "auto", "fsdp": "none"}
        if not settings.gradient_checkpointing:
            plans.append(("QLoRA", {**small, **four}))
        plans.append(("QLoRA with gradient checkpointing", {**again, **four}))
    return plans


def _skeleton(name: str, dtype: str) -> Any:
    """The model without weights, from its configuration."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), no_warnings():
        return AutoModelForCausalLM.from_config(
            _config(name), dtype=getattr(torch, dtype), trust_remote_code=False, attn_implementation="sdpa"
        )


def _config(name: str) -> Any:
    from transformers import AutoConfig

    if name == OFFLINE_BASE:
        from lib.models.offline_base import BaseRecipe, TokenizerRecipe, model_config

        return model_config(BaseRecipe(), TokenizerRecipe().vocabulary)
    folder = user_path(name)
    if folder.is_file() and folder.suffix.lower() == ".gguf":
        refuse_without_template(str(folder))
        return transformers_config(read_source(folder).config, folder)
    known = dict(configuration_of(name)[0])
    refuse_other_task(folder, {}, known.get("architectures") or ())
    with refusing((ValueError, KeyError), "finetune/no-language-model", file=name):
        return AutoConfig.for_model(known.pop("model_type"), **known)
