"""Quantizing: from one GGUF of full weights to a ladder of smaller files, by llama.cpp's own quantizer.

- `quantize_file` makes one file, `quantize_files` several at once, with `Options` for an importance matrix and types
  of single tensors; `predict_sizes` tells exact sizes before, `describe_gguf` what a file really holds.
- `measure` makes an importance matrix of the run's own training rows, product `imatrix`; `effect` compares files
  with and without it, `errors` every tensor with the source.
- `grid` tells which types' grid the base's weights lie on, `retention` what every file keeps of the fine-tuning.
- `mix` chooses a type for every tensor under a size budget, by the run's product `sensitivity`.
  `predictions` tells what the same sensitivities predict of every file, `mix_effect` measures it beside the recipes.
- `quantize` is the stage: the ladder of a run, product `quantized`; `plan` tells its sizes before.

All native work runs in child processes: llama.cpp aborts its process on some damaged files.
"""

from lib.quantizing.effect import EffectResult
from lib.quantizing.errormap import TensorErrors
from lib.quantizing.files import QuantizationReport, describe_gguf, predict_sizes, quantize_file
from lib.quantizing.forecast import predictions
from lib.quantizing.importance import ImatrixResult, measure
from lib.quantizing.ladder import quantize_files
from lib.quantizing.mixeffect import MixEffect
from lib.quantizing.mixing import Mix
from lib.quantizing.options import Options
from lib.quantizing.retention import Retention, SourceGrid
from lib.quantizing.stage import QuantizeResult, effect, errors, grid, mix, mix_effect, plan, quantize, retention

__all__ = [
    "EffectResult",
    "ImatrixResult",
    "Mix",
    "MixEffect",
    "Options",
    "QuantizationReport",
    "QuantizeResult",
    "Retention",
    "SourceGrid",
    "TensorErrors",
    "describe_gguf",
    "effect",
    "errors",
    "grid",
    "measure",
    "mix",
    "mix_effect",
    "plan",
    "predict_sizes",
    "predictions",
    "quantize",
    "quantize_file",
    "quantize_files",
    "retention",
]
