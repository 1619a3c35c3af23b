"""Notebook 02: the product `adapter`, a LoRA or QLoRA trained on the run's base model, or one that is adopted; the
trained model itself where every weight is trained."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lib.errors import refusal
from lib.models import base_model
from lib.models.adapters import adapter_config, copy_weights, read_adapter
from lib.models.base_model import Base, GivenAdapter
from lib.models.configurations import read_configuration
from lib.models.merge_plan import check_fit
from lib.models.tokenizer_files import differences
from lib.models.weights import TORCH, open_weights
from lib.runs import machine
from lib.runs.files import data_file, read_json, read_jsonl, user_path, write_json, write_jsonl, write_text
from lib.runs.machine import quiet, read_samples, resources_recorded, summary
from lib.runs.render import render
from lib.runs.run import Product, ProductDraft, Run, known_run
from lib.select.choice import BEST_OF, Best, best_of, write_analysis
from lib.settings import DEQUANTIZED, FULL, LOFTQ, UNTRAINED, Settings
from lib.stages.finetune import checkpoints, tracking
from lib.stages.finetune.processes import made_once, train_in_processes
from lib.stages.finetune.session import TrainingInputs, train, until_it_fits
from lib.stages.finetune.teacher import FILE, Teacher

RESOURCES = "resources.jsonl"

PRETRAINING = "base_seconds"
"""Fact of an adapter on the offline base: seconds of its product that made that base, or found it made."""

_NOTES: dict[str, str] = data_file("stages/finetune/notes.yaml")
PARAMETERS = (
    *("seed", "load_in_4bit", "lora_r", "lora_alpha", "lora_dropout", "target_modules", "learning_rate"),
    *("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "dtype"),
    *("gradient_checkpointing", "save_steps", "num_processes", "lr_scheduler_type", "warmup_steps"),
)
"""Settings that a trained adapter depends on (those of the data come in through the data product)."""

_OF_LORA = ("load_in_4bit", "lora_r", "lora_alpha", "lora_dropout", "target_modules")
"""Those of them that mean nothing where every weight is trained."""

UNNAMED = (
    *("adapter", "finetuning_type", "qat", "teacher", "distillation_weight"),
    *("weight_decay", "max_grad_norm", "neftune_noise_alpha"),
    *("use_rslora", "use_dora", "init_lora_weights", "loraplus_lr_ratio", "fsdp"),
)
"""The others, which a product names only where they are not the default: older products know nothing of them."""


def made_with(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a product `adapter`, with those that it does not name because they were the default."""
    return Settings().pick(*UNNAMED) | parameters


def _parameters(settings: Settings) -> dict[str, Any]:
    """What the product of a training names."""
    usual = Settings()
    others = {key: value for key, value in settings.pick(*UNNAMED).items() if value != getattr(usual, key)}
    idle = _OF_LORA if settings.finetuning_type == FULL else ()
    named = {key: value for key, value in settings.pick(*PARAMETERS).items() if key not in idle}
    return named | others | {"seed": settings.training_seed}


@dataclass(frozen=True)
class FinetuneResult:
    """What notebook 02 shows of the adapter and how it came about, read back from the product.

    Where nothing was trained, everything that only a training has is zero or empty.

    Attributes:
        product: the folder with adapter_model.safetensors (the chosen checkpoint), history.jsonl, training.log; with
            model.safetensors where every weight was trained.
        method: in words, e.g. "LoRA r=8, alpha=16 on 14 linear layers"; "full", "none".
        trainable, total: number of trained weights, and of all weights.
        history: rows {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second"} and
            {"step", "epoch", "eval_loss"}; losses in nats an answer token.
        chosen_step, steps: the update with the lowest validation loss, and all updates.
        estimate: bytes by purpose, expected before the start; "total" in all.
        memory: bytes that were free then ("available"), and that the device has ("total").
        advice: what to change when memory is scarce, cheapest first; empty when it is not.
        throughput: median non-padding tokens a second.
        peak_memory_mib: largest resident memory while training (the process and its children).
        peak_device_mib: most that the tensors took on a GPU then, of several the fullest; None where there is none.
        resumed_from: step of the checkpoint that this training continued from; None if it ran in one go.
        layout: how the rows of a micro-batch were laid out, in words.
        messages: what was found on resuming (damaged checkpoints passed over).
        seconds: of the last, uninterrupted part of the training.
        micro_batch: {"asked", "used"}: rows and passes an update each; "out_of_memory": the sizes that did not fit.
        notes: fallbacks, e.g. LoRA where QLoRA was asked for.
        samples: what the machine did (`lib.runs.machine`): seconds, cpu_percent, rss_mib, gpu_percent, gpu_mib.
        adopted: {"id", "revision", and what its files say} of an adapter that was not trained here; None when it was.
    """

    product: Product
    method: str
    trainable: int
    total: int
    history: list[dict[str, float]]
    chosen_step: int
    steps: int
    train_rows: int
    validation_rows: int
    estimate: dict[str, int]
    memory: dict[str, int]
    advice: list[str]
    throughput: float
    peak_memory_mib: float
    resumed_from: int | None
    layout: str
    messages: list[str]
    seconds: float
    dtype: str
    dtype_reason: str
    base: dict[str, Any]
    notes: list[str]
    samples: list[dict[str, float]]
    adopted: dict[str, Any] | None = None
    peak_device_mib: float | None = None
    micro_batch: dict[str, Any] = field(default_factory=dict)

    @property
    def untrained(self) -> bool:
        """Whether the base model goes through the run as it is: there is no adapter at all."""
        return self.method == UNTRAINED

    @property
    def whole(self) -> bool:
        """Whether every weight was trained: the product is a model folder."""
        return self.product.entry.facts.get("method") == FULL

    @property
    def trainable_share(self) -> float:
        """Trained share of all weights."""
        return self.trainable / self.total

    @classmethod
    def read(cls, product: Product) -> FinetuneResult:
        """From the product's files."""
        facts = read_json(product.path / "training.json")
        history = read_jsonl(product.path / "history.jsonl")
        samples = read_samples(product.path / RESOURCES)
        return cls(product=product, history=history, samples=samples, notes=product.entry.notes, **facts)


DrawLosses = Callable[[Path], AbstractContextManager[Any]]
"""From the file of losses (JSON lines, growing) to what draws it whenever its `update` is called."""


def finetune(settings: Settings, run: Run, draw: DrawLosses | None = None) -> FinetuneResult:
    """Train the adapter, or find it unchanged; an interrupted training continues from its newest whole checkpoint.

    With the setting `adapter` nothing is trained: that adapter is checked against the base model and adopted. With
    `finetuning_type: none` there is none: the product says so, and later stages take the base model. With
    `finetuning_type: full` every weight is trained, and the product is the model.

    Args:
        draw: draws the losses while they come; None = nobody does.

    Raises:
        InputError: no data product, an unusable base model, no room in memory or on the disk, unknown target_modules.
    """
    if settings.adapter:
        return FinetuneResult.read(adopt(settings, run))
    refuse_absent(settings)
    if settings.finetuning_type == UNTRAINED:
        return FinetuneResult.read(_leave_untrained(run, settings.force))

    teacher = Teacher.of(settings, run)
    taught_by = {"teacher_weights": teacher.digest} if teacher else {}

    def make() -> Product:
        return run.produce(
            "adapter",
            lambda draft: _train(settings, run, draft, draw, teacher),
            parameters=_parameters(settings) | taught_by,
            inputs=("data",),
            force=settings.force,
            keep_partial=True,
        )

    return FinetuneResult.read(made_once(make, run, settings.num_processes))


def refuse_absent(settings: Settings) -> None:
    """Refuse, before hours of training go by, what it needs and this machine lacks.

    Raises:
        InputError: a tracker that is not installed; a teacher that is no run; 4-bit layers, where plain LoRA cannot
            stand in for them.
    """
    tracking.refuse_absent(settings.report_to)
    if settings.teacher:
        known_run(settings.teacher)
    needed = settings.merge_base == DEQUANTIZED or settings.init_lora_weights == LOFTQ
    if settings.load_in_4bit and needed and (problem := machine.bitsandbytes_problem()):
        raise refusal("finetune/no-4-bits", problem=problem)


def _train(settings: Settings, run: Run, draft: ProductDraft, draw: DrawLosses | None, teacher: Teacher | None) -> None:
    """Train, and make the chosen checkpoint the product."""
    quiet()  # also where other processes train: this one loads the same libraries
    began = time.monotonic()
    base = base_model.base_of(run)
    if base.offline:
        draft.facts[PRETRAINING] = round(time.monotonic() - began, 2)
    if settings.load_in_4bit and (problem := machine.bitsandbytes_problem()):
        draft.notes.append(
            f"QLoRA was asked for, but 4-bit layers do not work here ({problem}): plain LoRA was trained instead."
        )
        settings = settings.model_copy(update={"load_in_4bit": False})
    messages = checkpoints.same_or_afresh(draft.folder, settings)
    if teacher:
        draft.folder.mkdir(parents=True, exist_ok=True)
        rows = read_configuration(base.path)["vocab_size"]
        teacher.write_answers(draft.folder, run.require("data").path, machine.compute_dtype(settings.dtype)[0], rows)
        messages.insert(0, _NOTES["taught"].format(teacher=teacher.run.name, share=settings.distillation_weight))
    with (
        draw(draft.folder / checkpoints.LIVE) if draw else contextlib.nullcontext() as plot,
        resources_recorded(draft.folder / RESOURCES, gpus=settings.num_processes),
    ):
        inputs = TrainingInputs(
            settings,
            run.require("data").path,
            base,
            draft.folder,
            plot and plot.update,
            tracking=run.folder / tracking.FOLDER,
        )
        facts, notes = until_it_fits(inputs, train if settings.num_processes == 1 else train_in_processes)
    (draft.folder / FILE).unlink(missing_ok=True)
    draft.notes += notes
    draft.device = facts.pop("device")
    facts["messages"] = [*messages, *facts["messages"]]
    chosen = draft.folder / "checkpoints" / f"checkpoint-{facts['chosen_step']}"
    loss = read_json(chosen / checkpoints.RECORD)["eval_loss"]
    named = json.dumps(base.id, ensure_ascii=False)
    told = {"base": base, "base_json": named, "facts": facts, "loss": loss}
    card = render(Path(__file__).with_name("trained.md.j2"), whole=settings.finetuning_type == FULL, **told)
    if settings.finetuning_type == FULL:
        _write_model(chosen, draft, base)
        _write_facts(draft, base, facts, card)
    else:
        _write_adapter(chosen, draft, base, facts, card)
        if _is_zero(draft.folder / "adapter_model.safetensors"):
            draft.notes.append("the adapter is zero: the training changed nothing, and the model is the base model")
    kept = ("chosen_step", "steps", "trainable", "total", "dtype", "resumed_from", "micro_batch")
    method = FULL if settings.finetuning_type == FULL else "QLoRA" if settings.load_in_4bit else "LoRA"
    draft.facts |= {"method": method, **{key: facts[key] for key in kept}}
    draft.facts["resources"] = summary(read_samples(draft.folder / RESOURCES))
    draft.metrics |= {"eval_loss": loss, "tokens_per_second": facts["throughput"]}


def _write_adapter(source: Path, draft: ProductDraft, base: Base, facts: dict[str, Any], card: str) -> None:
    """The files that every adapter has: weights, configuration, facts for the page, card."""
    copy_weights(read_adapter(source), draft.folder / "adapter_model.safetensors")
    write_config(draft.folder, adapter_config(source), base)
    _write_facts(draft, base, facts, card)


def _write_model(source: Path, draft: ProductDraft, base: Base) -> None:
    """The trained weights, float32, with the base's configuration: its names, and nothing that training needed."""
    for path in sorted([*source.glob("model*.safetensors"), *source.glob("model*.json")]):
        shutil.copyfile(path, draft.folder / path.name)
    config = {key: value for key, value in read_configuration(base.path).items() if key != "torch_dtype"}
    write_json(draft.folder / "config.json", {**config, "dtype": "float32"})


def _write_facts(draft: ProductDraft, base: Base, facts: dict[str, Any], card: str) -> None:
    """What the page shows, the card, and which base model it is about."""
    given = {"id": base.id, "revision": base.revision, "offline": base.offline}
    write_json(draft.folder / "training.json", {**facts, "base": given})
    write_text(draft.folder / "README.md", card)
    draft.facts |= {"base_model": base.id, "base_revision": base.revision, "offline_base": base.offline}


def write_config(folder: Path, config: dict[str, Any], base: Base) -> None:
    """adapter_config.json that names the run's base model: by id and commit, by its folder, or by its GGUF file.

    A GGUF file is named with its identity as revision: `unpacking_of` reads there how the file was unpacked.
    """
    hub = not base.offline and not base.revision.startswith("sha256:")  # that one is a local folder's
    gguf = base.unpacked is not None
    name = base.id if hub else str(user_path(base.id) if gguf else base.path)
    revision = base.revision if hub or gguf else None
    write_json(folder / "adapter_config.json", {**config, "base_model_name_or_path": name, "revision": revision})


def _is_zero(adapter: Path) -> bool:
    """Whether the second factor of every layer is as it began."""
    from safetensors.numpy import load_file

    return not any(tensor.any() for name, tensor in load_file(adapter).items() if ".lora_B." in name)


# A base model that goes through the run as it is.

_NO_TRAINING: dict[str, Any] = {
    "layout": "",
    "resumed_from": None,
    **dict.fromkeys(("trainable", "chosen_step", "steps", "train_rows", "validation_rows"), 0),
    **dict.fromkeys(("throughput", "seconds", "peak_memory_mib"), 0.0),
    **{key: {} for key in ("estimate", "memory", "micro_batch")},
    **{key: [] for key in ("advice", "messages")},
}
"""Facts that only a training has."""


def _leave_untrained(run: Run, force: bool) -> Product:
    """The product `adapter` without an adapter: it says that there is none, and why."""
    if run.fold > 1 or run.other_folds():
        raise refusal("finetune/untrained-with-folds", run=run)

    def build(draft: ProductDraft) -> None:
        base = base_model.base_of(run)
        weights = open_weights(base.path)
        kinds = {TORCH.get(tensor.dtype, tensor.dtype) for tensor in weights.tensors.values()}
        facts = {"method": UNTRAINED, "total": weights.parameters, "dtype": " and ".join(sorted(kinds))}
        draft.notes.append(_NOTES[UNTRAINED].format(base=base_model.called(base.id)))
        card = render(Path(__file__).with_name("untrained.md.j2"), base=base)
        _write_facts(draft, base, {**_NO_TRAINING, **facts, "dtype_reason": "as its files hold it"}, card)
        write_jsonl(draft.folder / "history.jsonl", [])
        draft.facts["method"] = UNTRAINED

    return run.produce("adapter", build, {"finetuning_type": UNTRAINED}, ("data",), force)


# An adapter that somebody else trained, or another run.


def adopt(settings: Settings, run: Run) -> Product:
    """The product `adapter` by the setting `adapter`: a folder, an id, or `best-of:RUN,RUN,…`, chosen now.

    Raises:
        InputError: it cannot be had, does not fit the base model, is not a LoRA in safetensors, or the runs cannot be
            compared.
    """
    if run.fold > 1 or run.other_folds():
        raise refusal("finetune/adopted-with-folds", settings=settings, run=run)
    best = best_of(settings.adapter, run) if settings.adapter.startswith(BEST_OF) else None
    given = best.given if best else base_model.resolve_adapter(settings.adapter)
    return run.produce(
        "adapter",
        lambda draft: _adopt(given, run, draft, best),
        parameters={"adapter": given.id, "adapter_revision": given.revision},
        inputs=("data",),
        force=settings.force,
    )


def _adopt(given: GivenAdapter, run: Run, draft: ProductDraft, best: Best | None) -> None:
    """Check and copy; `best`: how it was chosen among runs, None for one that was simply given."""
    base = base_model.base_of(run)
    base_model.refuse_other_weights(given.path, base)
    shape, own = check_fit(given.path, base.path), differences(given.path, run.require("data").path / "tokenizer")
    if "vocabulary" in own:
        raise refusal("finetune/other-vocabulary", given=given, own=own)
    draft.notes += [f"{words}: this run asks by the base's, not as the adapter was trained" for words in own.values()]
    method, trained_on = (best.method, f"as run {best.run} says") if best else trained_as(given.path)
    if method == "QLoRA" and (problem := machine.bitsandbytes_problem()):
        draft.notes.append(
            f"the adapter was trained on a 4-bit base, which does not work here ({problem}): 16 bits instead"
        )
        method = "LoRA"
    draft.notes += _chosen_notes(best) if best else _given_notes(given, base)
    source = {"id": given.id, "revision": given.revision}
    sizes = {"trainable": shape.parameters, "total": open_weights(base.path).parameters + shape.parameters}
    facts = {
        **_NO_TRAINING,
        "adopted": {**source, **asdict(shape), "trained_on": trained_on},
        "method": f"{shape.variant} r={shape.rank}, alpha={shape.alpha} on {shape.modules} linear layers",
        **sizes,
        "dtype": shape.dtype,
        "dtype_reason": "as it came",
    }
    card = render(Path(__file__).with_name("adopted.md.j2"), given=given, base=base, shape=shape, best=best)
    _write_adapter(given.path, draft, base, facts, card)
    write_jsonl(draft.folder / "history.jsonl", [])
    draft.facts |= {"method": method, "adopted": source, **sizes}
    if best:
        write_analysis(best.analysis, draft.folder)
        draft.facts["chosen"] = {"run": best.run, "test_rows_seen": best.test_rows_seen, "text": best.analysis["text"]}


def trained_as(folder: Path) -> tuple[str, str]:
    """ "QLoRA" or "LoRA", and in words what an adapter's files say of the base that it was trained on.

    adapter_config.json has no field for it. This workbook's training.json has; peft writes the quantization into the
    model card, and so do tools whose card holds their configuration. Where nothing is said it is taken for a LoRA.
    """
    record, card = folder / "training.json", folder / "README.md"
    facts = read_json(record) if record.is_file() else None
    if isinstance(facts, dict) and isinstance(facts.get("method"), str):
        four = facts["method"].startswith("QLoRA")
        return ("QLoRA", "a 4-bit base (training.json)") if four else ("LoRA", "a 16- or 32-bit base (training.json)")
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if found := re.search(r"load_in_4bit\W+(true|false)", text, re.IGNORECASE):
        four = found[1].lower() == "true"
        return ("QLoRA", "a 4-bit base (its model card)") if four else ("LoRA", "no 4-bit base (its model card)")
    return "LoRA", "not known: its files do not say; taken for a 16-bit base"


def _given_notes(given: GivenAdapter, base: Base) -> list[str]:
    notes = [_NOTES["adopted"].format(adapter=base_model.called(given.id))]
    if named := base_model.named_otherwise(given.path, base.id, str(base.path)):
        notes.append(_NOTES["other-base"].format(named=named, base=base_model.called(base.id)))
    elif found := base_model.other_revision(given.path, base.revision):
        notes.append(f"the adopted adapter was trained on {found} of its base; here it is put on {base.revision}")
    return notes


def _chosen_notes(best: Best) -> list[str]:
    seen = f"{best.test_rows_seen} test rows" if best.test_rows_seen else "no test row"
    return [_NOTES["chosen"].format(best=best, seen=seen)]
