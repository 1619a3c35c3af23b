"""The stage `export`: the merged model in formats that transformers loads, beside the GGUF ladder."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import EXTRAS, InputError, refusal, refusing
from lib.models.loading import load_tokenizer, weight_bytes
from lib.models.onnx_folder import is_onnx
from lib.models.weights import open_weights
from lib.progress import Progress
from lib.prompts.tasks import Row, Task, read_task, spread
from lib.runs import files
from lib.runs.child import peak_memory_mib, run_child
from lib.runs.machine import bitsandbytes_problem, has_module, no_warnings, quiet
from lib.runs.manifest import hash_folder, version_of
from lib.runs.packages import pin
from lib.runs.render import render
from lib.runs.run import Product, ProductDraft, Run
from lib.settings import Settings
from lib.stages.export.sizes import GROUPS, group_size


@dataclass(frozen=True)
class Format:
    """One export format, as formats.yaml has it.

    Attributes:
        name: as in the setting `export_formats`; also its folder.
        title: what it is, in words.
        note: what a reader must know to use it.
        made_by: package that quantizes; None where transformers alone suffices.
        runs_in: the program that runs it: "transformers" (with torch) or "ONNX Runtime".
        needs: packages that a reader of the folder installs beside transformers (and torch).
        options: of `BitsAndBytesConfig`.
    """

    name: str
    title: str
    note: str
    made_by: str | None = None
    runs_in: str = "transformers"
    needs: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def problem(self) -> str | None:
        """The package that is absent, in words; None when all are there (whether they work shows in the child)."""
        wanted = dict.fromkeys((*filter(None, (self.made_by,)), *self.needs))
        missing = [name for name in wanted if not has_module(name.replace("-", "_"))]
        if not missing:
            return None
        extra = EXTRAS.get(missing[0].replace("-", "_"))
        return f"{' and '.join(missing)} not installed" + (f" (extra {extra})" if extra else "")

    @property
    def in_transformers(self) -> bool:
        """Whether transformers loads it."""
        return self.runs_in == "transformers"

    @property
    def packages(self) -> list[str]:
        """What a reader of the folder installs."""
        return [*(["torch"] if self.in_transformers else []), "transformers", *self.needs]

    def version(self) -> str | None:
        """Installed version of `made_by`; None where none is needed."""
        return version_of(self.made_by) if self.made_by else None

    def maker(self) -> str:
        """The package that makes it, with its version."""
        return f"{self.made_by} {self.version()}" if self.made_by else "transformers"


FORMATS = {name: Format(name, **values) for name, values in files.data_file("stages/export/formats.yaml").items()}
"""The formats by name, in the order of the pages."""

SUMMARY = "exports.json"

CALIBRATION_ROWS = 128
"""Training rows that GPTQ is calibrated on, evenly spaced."""

CHECK_PROMPTS = 12
"""Validation rows whose prompts check that a saved folder answers like the merged model."""


@dataclass(frozen=True)
class ExportsResult:
    """The exports of a run.

    Attributes:
        product: the folder with one folder a format.
        made: one record a format that was made: format, title, folder, bytes (weight files), bits_per_weight, weights,
            seconds, peak_memory_mib, check (mean_kld, same_top against the merged model), group_size, …
        skipped: {"format", "reason"} of every other format that was asked for.
    """

    product: Product
    made: tuple[dict[str, Any], ...]
    skipped: tuple[dict[str, str], ...]


def export(settings: Settings, run: Run) -> ExportsResult:
    """Make the product `exports` from `merged`, or skip it when nothing changed.

    Formats of the former product, or of an interrupted try, are taken over if they were made from the same model by
    the same package. A format whose package is absent, or that fails in its process, is skipped with the reason; a
    package that comes or goes makes the stage run again.

    Raises:
        InputError: a missing product, too little room.
        RuntimeError: a format that needs no further package failed.
    """
    formats = [FORMATS[name] for name in settings.export_formats]
    product = run.produce(
        "exports",
        lambda work: _build(settings, run, work, formats),
        parameters={**settings.pick("export_formats"), "export_libraries": {f.name: f.version() for f in formats}},
        inputs=("data", "merged"),
        force=settings.force,
        keep_partial=True,
    )
    content = files.read_json(product.path / SUMMARY)
    return ExportsResult(product, tuple(content["made"]), tuple(content["skipped"]))


def _build(settings: Settings, run: Run, work: ProductDraft, formats: list[Format]) -> None:
    data, merged = run.require("data"), run.require("merged")
    kept = {} if settings.force else _finished(run, work, formats)
    missing = [wanted for wanted in formats if wanted.name not in kept]
    weights = sum(out["bytes"] for name, out in merged.entry.outputs.items() if name.endswith(".safetensors"))
    files.require_space(run.folder, weights * len(missing), f"{len(missing)} exported models")
    task = read_task(data.path)
    argument = {"source": merged.path, **(_token_ids(data.path, task) if missing else {})}
    entries, facts = run.manifest.entries(), merged.entry.facts
    card = {
        "made_of": {
            "kind": "base" if run.untrained else "trained",
            "base": facts["base_model"],
            "revision": facts["base_revision"],
        },
        "notes": [note for name in ("data", "adapter", "merged") if name in entries for note in entries[name].notes],
        "asked": question_of(task, files.read_jsonl(data.path / "validation.jsonl")[0]),
        "calibrated_on": "training rows",
    }
    content: dict[str, list[dict[str, Any]]] = {"made": [], "skipped": []}
    files.write_json(work.folder / SUMMARY, content)
    for place, wanted in enumerate(formats, 1):
        record = kept.get(wanted.name) or make_format(
            wanted, work.folder / wanted.name, argument, card, f"({place} of {len(formats)})"
        )
        content["skipped" if "reason" in record else "made"].append(record)
        files.write_json(work.folder / SUMMARY, content)
    made = {record["folder"] for record in content["made"]}
    for path in work.folder.iterdir():  # what an interrupted try for other formats left
        if path.is_dir() and path.name not in made:
            shutil.rmtree(path)
    keys = ("bytes", "bits_per_weight", "seconds", "peak_memory_mib")
    work.metrics |= {record["format"]: {key: record[key] for key in keys} for record in content["made"]}
    work.facts |= {"skipped": content["skipped"], "reused": [f.name for f in formats if f.name in kept]}
    work.notes += [f"export format {skip['format']} skipped: {skip['reason']}" for skip in content["skipped"]]


def make_format(
    wanted: Format, folder: Path, argument: dict[str, Any], card: dict[str, Any], place: str
) -> dict[str, Any]:
    """Make the folder of a format, in a process of its own.

    Args:
        argument: "source", "calibration" and "prompts" of `make`. card: of `write_card`. place: "(1 of 3)".

    Returns:
        its record, with its "files"; {"format", "reason"} where it was skipped and nothing is left of it.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted try
    request, what = {**argument, "format": wanted.name, "output": folder}, f"exporting {wanted.name} {place}"
    try:
        if (reason := wanted.problem()) is None:
            answer = run_child("lib.stages.export.stage:make", request, what)
    except InputError as error:
        reason = error.found
    except RuntimeError as error:
        if wanted.made_by is None:
            raise
        reason = f"{wanted.made_by} failed: {str(error).strip().splitlines()[-1][:300]}"
    if reason is not None:
        shutil.rmtree(folder, ignore_errors=True)
        return {"format": wanted.name, "reason": reason}
    about = {"format": wanted.name, "title": wanted.title, "made_by": wanted.maker(), "folder": wanted.name}
    record = {**about, **answer}
    write_card(folder, wanted, record, **card)
    return {**record, "files": hash_folder(folder)}


def _token_ids(data: Path, task: Task) -> dict[str, Any]:
    """Training rows with their answers for calibration, validation prompts for the check."""
    tokenizer = load_tokenizer(data / "tokenizer")
    rows = spread(files.read_jsonl(data / "train.jsonl"), CALIBRATION_ROWS)
    probes = spread(files.read_jsonl(data / "validation.jsonl"), CHECK_PROMPTS)
    return {
        "calibration": [task.encode(tokenizer, row).ids for row in rows],
        "prompts": [task.probe_ids(tokenizer, row) for row in probes],
    }


# Formats that need not be made again: those of the former product, and those of an interrupted try.


def _finished(run: Run, work: ProductDraft, formats: Sequence[Format]) -> dict[str, dict[str, Any]]:
    """{format: record} of what was made from the same products by the same package and still verifies, now in the
    folder of the work."""
    makers, found = {wanted.name: wanted.maker() for wanted in formats}, {}
    for folder in run.earlier(work, "exports", "data", "merged"):
        for record in files.read_json(folder / SUMMARY)["made"] if (folder / SUMMARY).is_file() else []:
            name, path = record["format"], folder / record["folder"]
            same = record["made_by"] == makers.get(name) and name not in found
            if same and path.is_dir() and hash_folder(path) == record["files"]:
                found[name], target = record, work.folder / name
                if path != target:
                    shutil.rmtree(target, ignore_errors=True)
                    shutil.copytree(path, target, copy_function=files.link_or_copy)
    return found


# README.md of an export folder: what it is, what it cost, and the lines that load it.


def write_card(folder: Path, made: Format, record: dict[str, Any], **card: Any) -> None:
    """Write README.md with YAML front matter.

    Args:
        record: the format's entry of exports.json.
        card: "made_of" (what was merged: its "kind" and names), "notes" (sentences that every page of the run must
            say), "asked" (what the code of the card asks the model, see `question_of`), "calibrated_on" (rows or
            windows of GPTQ).
    """
    text = render(
        Path(__file__).with_name("README.md.j2"),
        made=made,
        record=record,
        **card,
        versions=" ".join(map(pin, made.packages)),
    )
    files.write_text(folder / "README.md", text)


def question_of(task: Task, row: Row) -> dict[str, Any]:
    """The run's question about one row, for the code of a card."""
    system, user = (message["content"] for message in task.messages(row)[:2])
    return {"system": system, "user": user, "thinking": task.thinking, "most_tokens": 8 if task.label_names else 256}


# In the child process: quantize, save, load again, compare with the merged model.

CHECKED_POSITIONS = 16
"""Last positions of each prompt whose next-token distributions are compared with the merged model's."""

_OWN = {"config.json", "README.md", "merge.json", "model.safetensors.index.json"}
"""Files of the merged model that are not copied: the export writes its own."""


def make(argument: dict[str, Any]) -> dict[str, Any]:
    """Make one format.

    Args:
        argument: "format", "source" (folder of the merged model), "output" (folder to make), "calibration" (token ids
            of training rows; for GPTQ), "prompts" (token ids of the self-check).

    Returns:
        "seconds" (of quantizing and saving), "peak_memory_mib" (until then), "weights", "bytes", "bits_per_weight",
        "tensor_bytes", "dtypes", "check" and what the format adds, e.g. "group_size".

    Raises:
        InputError: a model or a machine that this format does not fit.
    """
    name, source, output = argument["format"], Path(argument["source"]), Path(argument["output"])
    quiet()
    with Progress(f"making and checking {name}, steps", 3) as progress:
        started = time.perf_counter()
        output.mkdir(parents=True)
        with no_warnings():
            more = _quantize(name, source, output, argument["calibration"])
        # tokenizer, template, generation settings and licences
        left_out = shutil.ignore_patterns("*.safetensors", *_OWN)
        shutil.copytree(source, output, ignore=left_out, copy_function=shutil.copyfile, dirs_exist_ok=True)
        for path in filter(Path.is_file, output.rglob("*")):
            files.readable_by_group(path)
        seconds, memory = time.perf_counter() - started, peak_memory_mib()
        progress.advance(1, "made")
        check = _check(source, output, argument["prompts"], progress)
    saved, weights = None if is_onnx(output) else open_weights(output), open_weights(source).parameters
    nbytes = saved.nbytes if saved else weight_bytes(output)
    return {
        "seconds": round(seconds, 2),
        "peak_memory_mib": memory,
        **more,
        "weights": weights,
        "bytes": weight_bytes(output),
        "bits_per_weight": 8 * nbytes / weights,
        "tensor_bytes": nbytes,
        "dtypes": sorted({t.dtype for t in saved.tensors.values()} & {"F32", "F16", "BF16"}) if saved else [],
        "check": check,
    }


def _quantize(name: str, source: Path, output: Path, calibration: list[list[int]]) -> dict[str, Any]:
    if name == "gptq":
        return quantize_gptq(source, output, calibration)
    if name.startswith("onnx-"):
        return build_onnx(source, output, name.removeprefix("onnx-"))
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.float16 if name == "fp16" else torch.bfloat16
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    if name not in ("fp16", "bf16"):
        options |= {"quantization_config": _quantization(name), "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(str(source), **options)
    if name == "fp16":  # weights above 65,504 became infinite
        for weight_name, weight in model.named_parameters():
            if not torch.isfinite(weight).all():
                raise refusal("export/beyond-float16", weight_name=weight_name)
    model.save_pretrained(str(output))
    return {}


def _quantization(name: str) -> Any:
    """The configuration of transformers for one format."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if name == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(version=2, set_inductor_config=False))
    if problem := bitsandbytes_problem():
        raise InputError(f"bitsandbytes does not work here ({problem}).", "a working one.", "see `workbook doctor`.")
    return BitsAndBytesConfig(**FORMATS[name].options)


def _check(source: Path, output: Path, prompts: list[list[int]], progress: Progress) -> dict[str, Any]:
    """How far the saved folder's next-token distributions are from the merged model's on the ends of some prompts.

    Raises:
        InputError: the folder does not load, or gives numbers that are not finite.
    """
    own = _log_probs(output, prompts)
    progress.advance(1, "loaded again")
    if not np.isfinite(own).all():
        raise refusal("export/not-finite", output=output)
    merged = _log_probs(source, prompts)
    progress.advance(1, "compared")
    kld = (np.exp(merged) * (merged - own)).sum(axis=1)
    return {
        "prompts": len(prompts),
        "positions": len(own),
        "mean_kld": float(kld.mean()),
        "same_top": float((own.argmax(axis=1) == merged.argmax(axis=1)).mean()),
    }


def _log_probs(folder: Path, prompts: list[list[int]]) -> Any:
    """Log-probabilities after the last positions of each prompt, (positions, V), loaded and dropped again."""
    from lib.scoring.folders import open_folder

    with open_folder(folder, name=folder.name) as backend:
        return np.concatenate([backend.window_log_probs(ids, max(0, len(ids) - CHECKED_POSITIONS)) for ids in prompts])


# ONNX by the model builder of ONNX Runtime GenAI.


def build_onnx(source: Path, output: Path, precision: str) -> dict[str, Any]:
    """Write a model folder's weights as a graph of ONNX Runtime, rounded in blocks of 32 (MatMulNBits).

    Args:
        precision: "int4" or "int8".

    Returns:
        "group_size".

    Raises:
        InputError: an architecture that the builder does not know.
    """
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    logging.getLogger("onnxruntime").setLevel(logging.WARNING)
    # INT8 has no form for the embedding; k_quant (llama.cpp's search for scale and zero point) is nearer than plain
    # rounding: docs/LOG.md, "ONNX Runtime"
    options = "op_types_to_quantize=MatMul" if precision == "int8" else "algo_config=k_quant"
    with (
        tempfile.TemporaryDirectory(prefix="workbook-onnx-") as cache,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        refusing(NotImplementedError, "export/unknown-to-onnx"),
    ):
        asked = ("", str(source), str(output), precision, "cpu", cache)
        create_model(*asked, **parse_extra_options(*asked, ["hf_token=false", f"block_size={_BLOCK}", options]))
    shutil.copyfile(source / "config.json", output / "config.json")
    return {"group_size": _BLOCK}


_BLOCK = 32


# GPTQ by llm-compressor: INT4 weights in groups, each column's error pushed into the columns not yet rounded.

BITS = 4
_HEAD = "lm_head"


def group_of(widths: set[int]) -> int:
    """The largest group that divides the rows of every layer.

    Raises:
        InputError: some row is no multiple of 16: smaller groups would spend more on scales than they save.
    """
    if size := group_size(widths):
        return size
    odd = min(width for width in widths if width % GROUPS[-1])
    raise refusal("export/odd-layers", odd=odd, least=GROUPS[-1])


def quantize_gptq(source: Path, output: Path, calibration: list[list[int]]) -> dict[str, Any]:
    """Quantize a model folder and save it in the packed format of compressed-tensors.

    Args:
        calibration: token ids of the texts whose activations decide what may be rounded how.

    Returns:
        "group_size" and "calibration_rows", "calibration_tokens".

    Raises:
        InputError: no calibration texts, or layers that no group size fits.
    """
    if not calibration:
        raise InputError("no rows to calibrate GPTQ with.", "training rows.", "check max_train_rows.")
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.bfloat16, local_files_only=True)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != _HEAD}
    size = group_of({layer.in_features for layer in layers.values()})
    weights = QuantizationArgs(num_bits=BITS, type="int", symmetric=True, strategy="group", group_size=size)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=model,
        dataset=Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration]),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=[_HEAD]),
        max_seq_length=max(map(len, calibration)),
        num_calibration_samples=len(calibration),
    )
    model.save_pretrained(str(output), save_compressed=True)
    return {"group_size": size, "calibration_rows": len(calibration), "calibration_tokens": sum(map(len, calibration))}
