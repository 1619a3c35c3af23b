"""In the process that makes one format: quantize, save, load again, compare with the merged model."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import InputError, refusal, refusing
from lib.models.loading import load_tokenizer, weight_bytes
from lib.models.runtime_folders import MNN_CONFIGURATION, runtime_of
from lib.models.weights import open_weights
from lib.progress import Progress
from lib.runs import files
from lib.runs.child import peak_memory_mib, run_child
from lib.runs.machine import bitsandbytes_problem, no_warnings, quiet
from lib.runs.packages import environment_python
from lib.stages.export.sizes import GROUPS, group_size
from lib.stages.export.stage import FORMATS

CHECKED_POSITIONS = 16
"""Last positions of each prompt whose next-token distributions are compared with the merged model's."""

_MOST = 0.5
"""Largest mean KL divergence, as a share of that of the uniform distribution, which a file of zeros has. Rounding costs
a tenth of it at most (docs/LOG.md, "MNN as an export format"); how much is too much is judged in 07."""

_HARD = tuple(files.data_file("stages/convert/hard_strings.yaml"))

_OWN = {"config.json", "README.md", "merge.json", "model.safetensors.index.json"}
"""Files of the merged model that are not copied: the export writes its own."""


def make(argument: dict[str, Any]) -> dict[str, Any]:
    """Make one format.

    Args:
        argument: "format", "source" (folder of the merged model), "output" (folder to make), "calibration" (token ids
            of training rows; for GPTQ), "prompts" (token ids of the self-check), "answers" (token ids of the labels;
            may be absent), "texts" (what a tokenizer of the format's own must cut as the model's does; likewise).

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
        seconds, memory = time.perf_counter() - started, max(peak_memory_mib(), more.pop("peak_memory_mib", 0.0))
        progress.advance(1, "made")
        check = _check(source, output, argument, progress)
    saved, weights = None if runtime_of(output) else open_weights(output), open_weights(source).parameters
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
    if name in ("gptq", "autoround"):
        return quantize_by_rows(name, source, output, calibration)
    if name.startswith("onnx-"):
        return build_onnx(source, output, name.removeprefix("onnx-"))
    if name == "mnn-int4":
        shutil.copyfile(source / "config.json", output / MNN_CONFIGURATION)
        asked = {"source": source, "output": output}
        python = str(environment_python("mnn"))
        return run_child("lib.stages.export.mnn:convert", asked, "writing the MNN model", python=python)
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


def _check(source: Path, output: Path, argument: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """The gate before a folder is published: does it answer as the merged model does?

    Returns:
        "prompts", "positions", "mean_kld", "same_top" of the distributions behind the last tokens of the prompts,
        "uniform_kld" (that of a model that knows nothing), "rows" and "same_labels" (share; None without labels), and
        of a runtime with a tokenizer of its own "texts" and "cut_otherwise" (difficult ones that it cuts otherwise).

    Raises:
        InputError: the folder does not load, gives numbers that are not finite, cuts the rows into other tokens, or is
            as far from the merged model as one that knows nothing.
    """
    own, labels, cut = _answers(output, argument, load_tokenizer(source))
    progress.advance(1, "loaded again")
    if not np.isfinite(own).all():
        raise refusal("export/not-finite", output=output)
    merged, wanted, _ = _answers(source, argument, None)
    progress.advance(1, "compared")
    kld = float((np.exp(merged) * (merged - own)).sum(axis=1).mean())
    uniform = float((np.exp(merged) * merged).sum(axis=1).mean() + np.log(merged.shape[1]))
    if kld > _MOST * uniform:
        raise refusal("export/knows-nothing", output=output, kld=kld, uniform=uniform)
    return {
        "prompts": len(argument["prompts"]),
        "positions": len(own),
        "mean_kld": kld,
        "uniform_kld": uniform,
        "same_top": float((own.argmax(axis=1) == merged.argmax(axis=1)).mean()),
        "rows": len(argument["prompts"]) if len(labels) else 0,
        "same_labels": float((labels.argmax(axis=1) == wanted.argmax(axis=1)).mean()) if len(labels) else None,
        **cut,
    }


def _answers(folder: Path, argument: dict[str, Any], tokenizer: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Log-probabilities after the last positions of each prompt, (positions, V), and those of the labels, (prompts,
    labels); with a tokenizer also what `_compare_tokens` says. The folder is loaded and dropped again."""
    from lib.scoring.folders import open_folder

    prompts, answers = argument["prompts"], argument.get("answers", ())
    with open_folder(folder, name=folder.name) as backend:
        encode = tokenizer and getattr(backend, "encode", None)
        cut = _compare_tokens(folder, tokenizer, encode, argument.get("texts", ())) if encode else {}
        ends = [backend.window_log_probs(ids, max(0, len(ids) - CHECKED_POSITIONS)) for ids in prompts]
        return np.concatenate(ends), backend.label_log_probs(prompts, answers) if answers else np.empty(0), cut


def _compare_tokens(folder: Path, tokenizer: Any, encode: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Whether a runtime's own tokenizer cuts texts as the model's does; of difficult strings it is only told."""
    wanted = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (*_HARD, *texts)]
    found = encode([*_HARD, *texts])
    other = [place for place, ids in enumerate(found) if ids != wanted[place]]
    if rows := [place for place in other if place >= len(_HARD)]:
        text, place = texts[rows[0] - len(_HARD)], rows[0]
        raise refusal("export/other-tokens", folder=folder, text=text, found=found[place], wanted=wanted[place])
    return {"texts": len(found), "cut_otherwise": [_HARD[place] for place in other]}


# ONNX by the model builder of ONNX Runtime GenAI.


_BLOCK = 32
"""Weights that share a scale."""


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


# GPTQ and AutoRound by llm-compressor: INT4 weights in groups; each column's error is pushed into the columns not yet
# rounded, or what is rounded up or down is learned by signs of gradients, block by block.

BITS, ITERATIONS = 4, 50
"""Bits a weight; steps of AutoRound on each block (its library's light recipe: 200 take four times as long)."""
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


def quantize_by_rows(name: str, source: Path, output: Path, calibration: list[list[int]]) -> dict[str, Any]:
    """Quantize a model folder and save it in the packed format of compressed-tensors.

    Args:
        name: "gptq" or "autoround".
        calibration: token ids of the texts whose activations decide what may be rounded how.

    Returns:
        "group_size" and "calibration_rows", "calibration_tokens".

    Raises:
        InputError: no calibration texts, or layers that no group size fits.
    """
    if not calibration:
        raise InputError(f"no rows to calibrate {name} with.", "training rows.", "check max_train_rows.")
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.bfloat16, local_files_only=True)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != _HEAD}
    size = group_of({layer.in_features for layer in layers.values()})
    weights = QuantizationArgs(num_bits=BITS, type="int", symmetric=True, strategy="group", group_size=size)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    options: dict[str, Any] = {"config_groups": {"group_0": scheme}, "ignore": [_HEAD]}
    if name == "gptq":
        from llmcompressor.modifiers.gptq import GPTQModifier as Modifier
    else:
        from llmcompressor.modifiers.autoround import AutoRoundModifier as Modifier

        # compiled, it needs a C++ compiler, and leaves processes behind that keep this one from ending
        options |= {"iters": ITERATIONS, "enable_torch_compile": False}
    oneshot(
        model=model,
        dataset=Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration]),
        recipe=Modifier(**options),
        max_seq_length=max(map(len, calibration)),
        num_calibration_samples=len(calibration),
    )
    model.save_pretrained(str(output), save_compressed=True)
    return {"group_size": size, "calibration_rows": len(calibration), "calibration_tokens": sum(map(len, calibration))}
