"""The schema of a parameter file: every key, its type, its default and what it means.

The defaults are the values of params/quick.yaml.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lib.formats import EXPORT_FORMATS, IMATRIX_TYPES, QUANTIZATION_TYPES, TENSOR_TYPES

OFFLINE_BASE = "offline"
SAMPLE_DATASET = "sample"
SENTIMENT_PROMPT = "你是情感分析助手。"


class Settings(BaseModel):
    """All parameters of a run. Field descriptions are the documentation of the keys."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)

    run_name: str = Field("quick", description="name of the run: folder under runs/ and reports/")
    force: bool = Field(False, description="redo the stage even if it is finished and unchanged")
    seed: int = Field(42, ge=0, le=2**31 - 1, description="seed of splits, resampling and, by default, training")

    task: Literal["classification", "instruction", "dialogue"] = Field(
        "classification", description="rows with labels, questions with answers, or conversations"
    )
    thinking: bool = Field(False, description="answers begin with reasoning in <think> or <thinking> tags")
    dataset: str = Field(SAMPLE_DATASET, min_length=1, description="'sample', file, folder, hub id, modelscope:id")
    text_column: str = Field("", description="column with the text; empty = find it")
    label_column: str = Field("", description="column with the label; empty = find it")
    label_names: list[str] = Field(["负面", "正面"], min_length=2, description="answer words for label 0, 1, …")
    split: Literal["auto", "given", "cluster"] = Field(
        "auto", description="given = keep the files' split, cluster = 8:1:1 by duplicate cluster, auto = given if any"
    )
    system_prompt: str = Field(SENTIMENT_PROMPT, description="system turn, always explicit")
    user_prompt: str = Field(
        "判断下面这段评论的情感倾向，只回答负面或正面。\n评论：{text}",
        description="user turn; {text} is the row's text",
    )
    base_model: str = Field(OFFLINE_BASE, min_length=1, description="'offline', folder, .gguf file, id, modelscope:id")
    revision: str = Field("main", min_length=1, description="commit, branch or tag of an id; id@revision for one alone")
    gguf_dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        "auto", description="of weights unpacked from a .gguf base_model; auto = float16 where they fit"
    )
    gguf_off_grid: bool = Field(
        False, description="rescale channels of a .gguf base_model, same function, so that it leaves its type's grid"
    )
    fallbacks: list[dict[str, str | int]] = Field(
        [], description="sources tried in order when base_model or dataset cannot be had: {base_model: …}, {dataset: …}"
    )
    max_seq_length: int = Field(192, ge=32, le=32768, description="tokens of prompt and answer together")
    max_train_rows: int = Field(0, ge=0, description="training rows used; 0 = all")
    max_eval_rows: int = Field(0, ge=0, description="validation rows and test rows used, each; 0 = all")

    adapter: str = Field("", description="LoRA adapter to adopt: folder, id, or best-of:RUN,RUN,…; empty = train")
    train_seed: int = Field(-1, ge=-1, le=2**31 - 1, description="seed of adapter, dropout and row order; -1 = seed")
    load_in_4bit: bool = Field(False, description="QLoRA: frozen base in NF4 with double quantization (bitsandbytes)")
    lora_r: int = Field(16, ge=1, le=512, description="rank of the adapter")
    lora_alpha: int = Field(32, ge=1, description="scale of the adapter; the update is multiplied by alpha / r")
    lora_dropout: float = Field(0.05, ge=0.0, lt=1.0, description="dropout on the adapter's input")
    target_modules: str = Field("all-linear", min_length=1, description="'all-linear' or names joined by commas")
    learning_rate: float = Field(1.0e-3, gt=0.0, le=1.0, description="peak value; linear warm-up, cosine decay")
    num_train_epochs: float = Field(4.0, gt=0.0, le=1000.0, description="passes over the training rows")
    per_device_train_batch_size: int = Field(16, ge=1, description="rows a forward pass")
    gradient_accumulation_steps: int = Field(1, ge=1, description="forward passes an update")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto = bfloat16 where it is fast")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, about 30 % slower")
    num_processes: int = Field(1, ge=1, le=64, description="processes that train together, on one GPU each")
    save_steps: int = Field(100, ge=1, description="updates between checkpoints (and validation losses)")

    per_device_eval_batch_size: int = Field(32, ge=1, description="rows scored together")

    generated_rows: int = Field(5, ge=0, le=1000, description="test rows without labels answered in full; 0 = none")
    max_new_tokens: int = Field(128, ge=1, le=8192, description="most tokens of such an answer")
    terms: str = Field("", description="terms looked for in answers: cryptography, counselling, a file; empty = none")
    prompts_file: str = Field("", description="prompts answered beside the test rows; empty = five for counselling")

    merge_base: Literal["original", "dequantized"] = Field(
        "original", description="weights a QLoRA adapter is merged into: the 16-bit ones, or NF4 turned back"
    )
    merge_dtype: Literal["base", "float16", "bfloat16", "float32"] = Field(
        "base", description="number format of the merged weights; base = that of the base model, tensor by tensor"
    )

    outtype: Literal["f16", "bf16", "f32", "q8_0"] = Field("f16", description="type of the converted GGUF")
    gate_max_kld: float = Field(
        1.0e-3, gt=0.0, description="largest mean KL divergence, nats, merged vs GGUF (times 10: q8_0 or bfloat16)"
    )
    gate_min_label_agreement: float = Field(
        0.99, ge=0.0, le=1.0, description="smallest share of equal labels, of rows that are no near ties"
    )

    ladder: list[str] = Field(
        ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K"],
        min_length=1,
        description="quantization types, best first",
    )
    imatrix: str = Field("none", description="auto = of the run's training rows, none, or a file of llama-imatrix")
    imatrix_chunks: int = Field(64, ge=1, description="most windows of n_ctx training tokens for imatrix: auto")
    size_budget_mb: float = Field(
        0.0,
        ge=0.0,
        le=1e6,
        description="one more file of at most so many MB (10^6 bytes), types by measurement; 0 = off",
    )
    size_budget_bpw: float = Field(
        0.0,
        ge=0.0,
        le=32.0,
        description="the same budget in bits per weight, in place of size_budget_mb; 0 = off",
    )
    answer_weight: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="what the loss at answers counts where a budget chooses types: 0 = text alone, 1 = answers alone",
    )
    tensor_types: list[str] = Field([], description="REGEX=TYPE for single tensors, as llama-quantize --tensor-type")
    output_tensor_type: str = Field("", description="type of the output matrix; empty = as the recipe")
    token_embedding_type: str = Field("", description="type of the token embedding; empty = as the recipe")
    export_formats: list[str] = Field(
        ["int8", "nf4", "gptq"],
        description=f"further formats of the merged model, for transformers: {', '.join(EXPORT_FORMATS)}; [] = none",
    )
    n_threads: int = Field(0, ge=0, description="CPU threads of llama.cpp; 0 = physical cores")
    n_gpu_layers: int = Field(0, ge=-1, description="layers on the GPU in llama.cpp; -1 = all")
    n_ctx: int = Field(512, ge=64, le=32768, description="tokens a window of the perplexity text")
    perplexity_tokens: int = Field(8192, ge=512, description="most tokens of held-out text for perplexity")
    equivalence_margin: float = Field(1.0, gt=0.0, le=50.0, description="accuracy points that count as equivalent")

    perplexity_margin: float = Field(
        1.0, gt=0.0, le=100.0, description="percent of answer perplexity that counts as equivalent (no labels)"
    )

    @field_validator("run_name")
    @classmethod
    def _slug(cls, value: str) -> str:
        allowed = all(c.isalnum() or c in "._-" for c in value)
        if not value or not allowed or not value[0].isalnum() or len(value) > 80:
            raise ValueError("expected letters, digits, '.', '_' or '-', starting with a letter or digit")
        return value

    @field_validator("label_names")
    @classmethod
    def _distinct_labels(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value) or any(not name.strip() for name in value):
            raise ValueError("expected distinct, non-empty names")
        if spaced := [name for name in value if name != name.strip()]:
            raise ValueError(
                f"expected names without leading or trailing white space (the answer follows the prompt directly); "
                f"found {spaced[0]!r}"
            )
        return value

    @field_validator("fallbacks")
    @classmethod
    def _known_fallbacks(cls, value: list[dict[str, str | int]]) -> list[dict[str, str | int]]:
        for entry in value:
            typed = all(type(v) is (int if k == "rows" else str) and v for k, v in entry.items())
            known = entry.keys() <= {"base_model", "dataset", "revision", "rows", "sha256"}
            hashed = re.fullmatch("[0-9a-fA-F]{64}", str(entry.get("sha256", "0" * 64)))
            counted = "rows" not in entry or ("dataset" in entry and typed and entry["rows"] > 0)
            if not (typed and known and hashed and counted and ("base_model" in entry) != ("dataset" in entry)):
                raise ValueError(
                    "expected mappings with base_model or dataset, and where known revision, sha256 (64 hexadecimal "
                    f"digits) and, of a dataset, rows (a whole number); found {entry}"
                )
        return value

    @field_validator("user_prompt")
    @classmethod
    def _has_text(cls, value: str) -> str:
        if value.count("{text}") != 1:
            raise ValueError("expected exactly one {text}")
        return value

    @field_validator("ladder")
    @classmethod
    def _known_types(cls, value: list[str]) -> list[str]:
        return _each_known_once(value, (*QUANTIZATION_TYPES, *IMATRIX_TYPES), "quantization type", str.upper)

    @field_validator("export_formats")
    @classmethod
    def _known_formats(cls, value: list[str]) -> list[str]:
        return _each_known_once(value, EXPORT_FORMATS, "export format", str.lower)

    @field_validator("tensor_types")
    @classmethod
    def _regex_and_type(cls, value: list[str]) -> list[str]:
        for entry in value:
            pattern, _, name = entry.partition("=")
            if not pattern or name.lower() not in map(str.lower, TENSOR_TYPES):
                raise ValueError(f"expected REGEX=TYPE, e.g. attn_v=q8_0. Types: {', '.join(TENSOR_TYPES)}")
        return value

    @field_validator("output_tensor_type", "token_embedding_type")
    @classmethod
    def _tensor_type(cls, value: str) -> str:
        if value and value.lower() not in map(str.lower, TENSOR_TYPES):
            raise ValueError(f"expected the type of one tensor: {', '.join(TENSOR_TYPES)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        needing = [name for name in self.ladder if name in IMATRIX_TYPES]
        if needing and self.imatrix in ("", "none"):
            raise ValueError(
                f"{', '.join(needing)} in ladder need an importance matrix: set imatrix: auto, or leave them out"
            )
        if self.size_budget_mb and self.size_budget_bpw:
            raise ValueError("size_budget_mb and size_budget_bpw are one budget in two units: set one of them to 0")
        if self.perplexity_tokens < self.n_ctx:
            raise ValueError(f"perplexity_tokens ({self.perplexity_tokens}) must be at least n_ctx ({self.n_ctx})")
        if self.task != "classification" and self.dataset == SAMPLE_DATASET:
            raise ValueError(f"the sample corpus holds labelled reviews: set dataset to your own for task {self.task}")
        if self.task == "classification" and self.thinking:
            raise ValueError("answers of a classification are single words: thinking must be false")
        if self.task != "classification" and self.system_prompt == SENTIMENT_PROMPT:
            raise ValueError(
                f"{SENTIMENT_PROMPT!r} is the sentiment task's system turn: set system_prompt for task {self.task} "
                '("" = an empty one)'
            )
        return self

    @property
    def training_seed(self) -> int:
        """The seed that training uses: `train_seed` where it is given, else `seed`."""
        return self.seed if self.train_seed < 0 else self.train_seed

    @property
    def size_budget(self) -> str:
        """The key that sets a size budget; empty without one."""
        return next((key for key in ("size_budget_mb", "size_budget_bpw") if getattr(self, key)), "")

    def pick(self, *keys: str) -> dict[str, Any]:
        """The named keys with their values, in that order: the parameters a stage depends on."""
        return {key: getattr(self, key) for key in keys}


def _each_known_once(value: list[str], known: Sequence[str], what: str, usual: Callable[[str], str]) -> list[str]:
    """The names, if all are known and none stands twice; `usual` writes a name as the known ones are written."""
    for name in value:
        if name not in known:
            near = difflib.get_close_matches(usual(name), known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"unknown {what} {name!r}{hint} Known: {', '.join(known)}")
    if len(set(value)) != len(value):
        raise ValueError(f"expected each {what.split()[-1]} once")
    return value
