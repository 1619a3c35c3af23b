"""Which layers get an adapter: the check of target_modules, for a training and for the advice before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lib.errors import InputError
from lib.models.quiet import no_warnings

if TYPE_CHECKING:
    from lib.settings import Settings


def with_adapter(model: Any, settings: Settings) -> Any:
    """The model with a fresh LoRA on its `target_modules`.

    Raises:
        InputError: target_modules names no layer of this model, or one that a merge could not change.
    """
    from peft import LoraConfig, get_peft_model

    targets: Any = settings.target_modules
    if targets != "all-linear":
        targets = [name.strip() for name in targets.split(",") if name.strip()]
        if bad := sorted({"lm_head", "embed_tokens"} & set(targets)):
            raise InputError(
                f"target_modules names {bad[0]}.",
                "linear layers of the blocks: small Qwen models tie their embeddings, and a merge would be wrong.",
                "set target_modules: all-linear.",
            )
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        with no_warnings():
            return get_peft_model(model, config)
    except ValueError as error:
        raise InputError(
            f"target_modules {settings.target_modules!r} ({error}).", "names of linear layers.", "set it to all-linear."
        ) from None
