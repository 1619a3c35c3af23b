"""Models of real shape with random weights: what a step costs depends on shapes, not on what a model knows."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.runs.files import PROJECT, home

SHAPES = {"qwen2.5-0.5b": "qwen2.5-0.5b-instruct"}
"""Name of a shape → folder of its configuration and tokenizer under shared/data."""

RANK = 16
_LINEAR = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def cache() -> Path:
    """The folder of everything that benchmarks keep for the next time (models, peers); git ignores it."""
    folder = home() / ".cache" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def shape_folder(name: str = "qwen2.5-0.5b") -> tuple[Path, Path]:
    """A model folder of that shape and a LoRA adapter for it, built once.

    The model has random bfloat16 weights (seed 0) in one safetensors file, with the real configuration and tokenizer;
    the adapter has rank 16 over all seven linear kinds, float32, in peft's format, and both of its factors are random.

    Returns:
        (model folder, adapter folder).

    Raises:
        InputError: unknown name; the real configuration and tokenizer are not beside the project.
    """
    if name not in SHAPES:
        raise InputError(f"unknown shape {name!r}.", f"one of {', '.join(SHAPES)}.", "correct the name.")
    shared = Path(os.environ.get("WORKBOOK_SHARED", PROJECT.parent / "shared")) / "data" / SHAPES[name]
    if not (shared / "tokenizer.json").is_file():
        do = "put config.json and tokenizer.json of the model there, or set WORKBOOK_SHARED."
        raise InputError(f"no real tokenizer in {shared}.", "the files of the model's repository.", do)
    model, adapter = cache() / name, cache() / f"{name}-adapter"
    config = json.loads((shared / "config.json").read_text(encoding="utf-8"))
    if not model.is_dir():
        _build(model, lambda folder: _write_model(folder, shared, config))
    if not adapter.is_dir():
        _build(adapter, lambda folder: write_adapter(folder, model, config))
    return model, adapter


def _build(folder: Path, write: Any) -> None:
    """Fill a temporary sibling, then give it its name."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    write(part)
    part.rename(folder)


def linear_shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """{module: (rows, columns)} of the seven linear kinds."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    sizes = [(queries, width), (keys, width), (keys, width), (width, queries)]
    sizes += [(hidden, width), (hidden, width), (width, hidden)]
    return dict(zip([f"{block}.{name}" for block, names in _LINEAR.items() for name in names], sizes, strict=True))


def _write_model(folder: Path, shared: Path, config: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).mul_(0.02).to(torch.bfloat16)

    width = config["hidden_size"]
    tensors = {"model.embed_tokens.weight": random(config["vocab_size"], width)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for module, shape in linear_shapes(config).items():
            tensors[f"{prefix}{module}.weight"] = random(*shape)
            if module.endswith(("q_proj", "k_proj", "v_proj")):
                tensors[f"{prefix}{module}.bias"] = random(shape[0])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(width, dtype=torch.bfloat16)
    tensors["model.norm.weight"] = torch.ones(width, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shared / file, folder / file)


def write_adapter(folder: Path, base: Path, config: dict[str, Any]) -> None:
    """A LoRA adapter of rank 16 with random factors for a model of that configuration."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (rows, columns) in linear_shapes(config).items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, columns, generator=draw) * 0.02
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, RANK, generator=draw) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    kinds = [name for names in _LINEAR.values() for name in names]
    LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=kinds,
        base_model_name_or_path=str(base),
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).save_pretrained(folder)
