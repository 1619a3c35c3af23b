"""Ways of training beside one another: held-out accuracy and validation loss of each over some seeds.

python -m benchmarks.training_methods PARAMS.yaml --json OUT.json [--seeds 3] [--methods LoRA DoRA …] [-p KEY VALUE …]

The same data, base and updates for all; each method changes what METHODS says and nothing else. Results are written
after every training, and a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from lib import settings as lib_settings
from lib.models.loading import load_tokenizer
from lib.prompts.tasks import read_task
from lib.runs.files import read_json, read_jsonl, write_json
from lib.runs.machine import compute_dtype
from lib.runs.run import Run, open_run
from lib.scoring.log_probabilities import score_rows
from lib.scoring.metric import metric_of
from lib.scoring.torch_backend import TransformersBackend
from lib.stages.data.stage import prepare
from lib.stages.evaluate.stage import candidates
from lib.stages.finetune.stage import finetune

METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "Gaussian": {"init_lora_weights": "gaussian"},
    "PiSSA": {"init_lora_weights": "pissa_niter_16"},
    "OLoRA": {"init_lora_weights": "olora"},
    "LoRA+ 16": {"loraplus_lr_ratio": 16.0},
    "NEFTune 5": {"neftune_noise_alpha": 5.0},
    "QLoRA": {"load_in_4bit": True, "merge_base": "dequantized"},
    "LoftQ": {"load_in_4bit": True, "merge_base": "dequantized", "init_lora_weights": "loftq"},
    "full": {"finetuning_type": "full", "learning_rate": 5e-5},
    "LoRA, taught": {"teacher": "{run}-teacher"},
    "full, rounded": {"finetuning_type": "full", "learning_rate": 5e-5, "qat": "int4"},
}


TEACHER = "full"
"""Of these the one whose first model teaches "LoRA, taught": it has to be trained before."""

SHOWN = {"accuracy": ".3f", "accuracy_q4_0": ".3f", "validation_loss": ".4f", "seconds": ".0f"}


def round_to_q4_0(model: Any) -> Any:
    """The model, an adapter merged, with the matrices of its layers as llama.cpp's Q4_0 gives them back."""
    import gguf
    import torch

    kind = gguf.GGMLQuantizationType.Q4_0
    model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and not name.endswith("lm_head"):
            back = gguf.quants.dequantize(gguf.quants.quantize(layer.weight.detach().float().numpy(), kind), kind)
            layer.weight.data = torch.from_numpy(back).to(layer.weight.dtype)
    return model


def accuracy(run: Run, settings: lib_settings.Settings, which: int, rounded: bool = False) -> float:
    """Mean value of the test rows (accuracy, or loss without labels) of the base (0) or the trained model (1).

    Args:
        rounded: of the model after `round_to_q4_0`.
    """
    data = run.require("data").path
    task, rows, tokenizer = read_task(data), read_jsonl(data / "test.jsonl"), load_tokenizer(data / "tokenizer")
    encoded = [task.encode(tokenizer, row) for row in rows]
    model = candidates(run, compute_dtype(settings.dtype)[0])[which]
    with model.opened(settings.per_device_eval_batch_size) as opened:
        backend = TransformersBackend(round_to_q4_0(opened.model), 16) if rounded else opened
        scores = score_rows(backend, tokenizer, task, rows, "scoring test rows", None, encoded)
    values, weights = metric_of(task).row_values(scores)
    return float(np.average(values, weights=weights))


def one(name: str, seed: int, given: lib_settings.Settings, data: Run) -> dict[str, Any]:
    """Train once, in a run of its own that holds nothing but the data."""
    changes = {**METHODS[name], "train_seed": seed}
    if "teacher" in changes:
        changes["teacher"] = changes["teacher"].format(run=data.name)
    settings, run = given.model_copy(update=changes), open_run(f"{data.name}-method")
    shutil.rmtree(run.folder, ignore_errors=True)
    shutil.copytree(data.folder, run.folder)
    started = time.monotonic()
    result = finetune(settings, run)
    seconds = time.monotonic() - started
    if name == TEACHER and not (teacher := open_run(f"{data.name}-teacher")).folder.exists():
        shutil.copytree(run.folder, teacher.folder)
    losses = {row["step"]: row["eval_loss"] for row in result.history if "eval_loss" in row}
    return {
        "method": name,
        "seed": seed,
        "updates": result.steps,
        "rows": [result.train_rows, result.validation_rows, len(read_jsonl(data.folder / "data" / "test.jsonl"))],
        "validation_loss": losses[result.chosen_step],
        "chosen_step": result.chosen_step,
        "trained_weights": result.trainable,
        "seconds": round(seconds, 1),
        "peak_memory_mib": result.peak_memory_mib,
        "layout": result.layout.partition(":")[0].partition(" ")[0],
        "accuracy": accuracy(run, settings, 1),
        "accuracy_q4_0": None if settings.load_in_4bit else accuracy(run, settings, 1, rounded=True),
    }


def summary(records: list[dict[str, Any]]) -> list[str]:
    """A line a method: mean and range over the seeds."""
    lines = []
    for name in METHODS:
        own = [record for record in records if record["method"] == name]
        if not own:
            continue
        cells = [name, str(len(own))]
        for key, shape in SHOWN.items():
            values = [record[key] for record in own if record.get(key) is not None]
            if not values:
                cells.append("–")
                continue
            cells.append(f"{statistics.mean(values):{shape}} ({min(values):{shape}} to {max(values):{shape}})")
        lines.append(" | ".join(cells))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("params", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"))
    asked = parser.parse_args()
    given = lib_settings.load(asked.params, {key: lib_settings.parse_override(key, text) for key, text in asked.p})
    data = open_run(f"{given.run_name}-methods")
    prepare(given, data)
    found = read_json(asked.json) if asked.json.is_file() else {"base": None, "records": []}
    for seed in range(1, asked.seeds + 1):
        for name in asked.methods:
            if any(record["method"] == name and record["seed"] == seed for record in found["records"]):
                continue
            found["records"].append(one(name, seed, given, data))
            if found["base"] is None:
                found["base"] = accuracy(open_run(f"{data.name}-method"), given, 0)
            write_json(asked.json, found)
            told = {key: found["records"][-1][key] for key in SHOWN}
            print(name, seed, told, flush=True)
    print(f"base accuracy {found['base']:.3f}", *summary(found["records"]), sep="\n")


if __name__ == "__main__":
    main()
