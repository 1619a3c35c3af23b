"""A LoRA adapter as a GGUF file of its own, which llama.cpp adds to its base while it runs (`llama-cli --lora`).

The file is equal, byte for byte, to that of llama.cpp's `convert_lora_to_gguf.py` for adapters whose scaling is
alpha / r. GGUF has one alpha for all pairs, which llama.cpp divides by the rank of each (get_scale in
src/llama-adapter.h). Other scalings (rsLoRA, alpha_pattern), which that script drops without a word, are put into
alpha, or into B.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lib.errors import InputError, refusal, refusing
from lib.models import gguf_file
from lib.models.adapters import CONFIG, WEIGHTS, Adapter, copy_weights
from lib.models.gguf_file import read_metadata, read_tensors
from lib.models.merge_plan import MergePlan, Update, plan_merge
from lib.models.weights import StoredTensor, open_weights, widen
from lib.runs.child import run_child, run_jobs
from lib.runs.files import atomic_path, require_space, write_json
from lib.runs.machine import llama_cpp_problem
from lib.scoring.llama_backend import last_error, llama, open_model
from lib.stages.convert import official
from lib.stages.convert.convert import Conversion, check_output, header_of, verify, write_metadata
from lib.stages.convert.tensors import ForeignModelError, GgufFile, PlannedTensor, read_convertible

SCRIPT = "convert_lora_to_gguf.py"


@dataclass(frozen=True)
class AdapterReport:
    """What was converted.

    Attributes:
        pairs: changed modules. lora_alpha: as the file says it. types: number of tensors of each GGUF type.
        loaded: what llama.cpp said when it opened the file beside the base's header, in words; empty = not asked.
        converter: another one than `convert_adapter`, in words; empty for that.
    """

    adapter: str
    base: str
    output: str
    architecture: str
    outtype: str
    pairs: int
    lora_alpha: float
    bytes_after: int
    types: dict[str, int]
    loaded: str
    seconds: float
    converter: str = ""


def convert_adapter(
    folder: Path, base: Path, output: Path, outtype: str = "f32", checkout: Path | None = None
) -> AdapterReport:
    """Write `output` from the adapter in `folder`, which fits the model folder `base`.

    Args:
        outtype: "f32", "f16", "bf16" or "q8_0"; of rows that Q8_0's blocks of 32 do not divide, float16.
        checkout: of llama.cpp, whose script converts instead.

    Raises:
        InputError: as `plan_merge`; what a GGUF adapter cannot say (DoRA, biases, fully trained tensors); or as
            `convert`. Nothing is left at `output` then.
    """
    started = time.monotonic()
    plan = plan_merge(base, folder)
    adapter = plan.adapter
    assert adapter is not None
    _refuse_more_than_pairs(adapter, plan)
    adapter.require_finite()
    check_output(output, plan.base, outtype)
    if output.exists() and output.samefile(folder / WEIGHTS):
        raise InputError(f"{output} is an input file.", "another file.", "choose another name for the output.")
    alpha, factors = _scales(plan)
    require_space(output.parent, sum(t.size for t in adapter.tensors.values()) * 4, output.name)
    loaded = converter = ""
    with refusing(OSError, "runs/no-output", output=output), atomic_path(output, alone=True) as temporary:
        config, sources = _config_or_sources(base, checkout)
        if config is not None:
            _write(plan, adapter, config, temporary, outtype, alpha, factors)
            loaded = _load_check(temporary, base)
        else:
            _write_officially(adapter, base, temporary, outtype, alpha, factors, sources / SCRIPT)
            converter = f"{SCRIPT} of {official.called(sources)}"
    metadata, tensors = read_metadata(output), read_tensors(output)
    return AdapterReport(
        adapter=str(folder),
        base=str(base),
        output=str(output),
        architecture=str(metadata["general.architecture"]),
        outtype=outtype,
        pairs=len(plan.updates),
        lora_alpha=float(metadata["adapter.lora.alpha"]),
        bytes_after=output.stat().st_size,
        types=dict(sorted(Counter(gguf.GGMLQuantizationType(tensor.type).name for tensor in tensors).items())),
        loaded=loaded,
        seconds=round(time.monotonic() - started, 2),
        converter=converter,
    )


def _config_or_sources(base: Path, checkout: Path | None) -> tuple[dict[str, Any] | None, Path]:
    """The base's configuration where its names are known here; else where the official script lies."""
    if checkout is not None:
        return None, official.checked(checkout, base, SCRIPT)
    try:
        return read_convertible(base), base
    except ForeignModelError as error:
        return None, official.sources_for(base, error)


def _refuse_more_than_pairs(adapter: Adapter, plan: MergePlan) -> None:
    """llama.cpp adds low-rank pairs; it knows no trained copies, rows, biases or lengths of rows."""
    more = {name for name, update in plan.updates.items() if not _is_pair(update)}
    if more:
        raise refusal("convert/more-than-pairs", adapter=adapter.folder, name=min(more), more=len(more))


def _is_pair(update: Update) -> bool:
    return update.kind in ("linear", "embedding") and "magnitude" not in update.tensors


def _scales(plan: MergePlan) -> tuple[float, dict[str, float]]:
    """The one alpha of the file, and by weight what its B is multiplied by, because its own scaling is another.

    An alpha of 0, which llama.cpp takes for none and scales by 1, is never written.
    """
    wanted = {name: update.scaling * update.tensors["A"].shape[0] for name, update in plan.updates.items()}
    alphas = Counter(alpha for alpha in wanted.values() if alpha)
    alpha = alphas.most_common(1)[0][0] if alphas else 1.0
    return alpha, {name: 1.0 if math.isclose(w, alpha, rel_tol=1e-12) else w / alpha for name, w in wanted.items()}


def _write(
    plan: MergePlan,
    adapter: Adapter,
    config: dict[str, Any],
    path: Path,
    outtype: str,
    alpha: float,
    factors: dict[str, float],
) -> None:
    """Write the file and check that it holds what was planned."""
    tensors = _planned(plan, config, outtype, factors)
    writer = gguf.GGUFWriter(path=None, arch=config["model_type"])
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.type)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    write_metadata(writer, adapter.folder, None)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    file = GgufFile(path, header_of(writer), tensors)
    with closing(file):
        file.put_own()
        run_jobs(file.jobs(), lambda size: None)
    verify(path, {tensor.name: tensor.type.name for tensor in tensors})


def _planned(plan: MergePlan, config: dict[str, Any], outtype: str, factors: dict[str, float]) -> list[PlannedTensor]:
    """A and B of every pair, in the order of the official script: that of the adapter's names."""
    names = {name: ours for ours, name in gguf_file.names_of(config | {"tie_word_embeddings": False}).items()}
    planned = []
    for name, update in plan.updates.items():
        first, second = update.tensors["A"], update.tensors["B"]
        # llama.cpp looks rows of an embedding's A up by token
        turned = _values(first).T if update.kind == "embedding" else None
        scaled = _values(second) * np.float32(factors[name]) if factors[name] != 1 else None
        heads = gguf_file.rotary_heads(name, config)
        planned.append(_tensor(f"{names[name]}.lora_a", outtype, first, turned))
        planned.append(_tensor(f"{names[name]}.lora_b", outtype, second, scaled, heads))
    return planned


def _values(tensor: StoredTensor) -> np.ndarray:
    return widen(tensor.read(), tensor.dtype).reshape(tensor.shape)


def _tensor(name: str, outtype: str, source: StoredTensor, values: np.ndarray | None, heads: int = 0) -> PlannedTensor:
    source.require_floats()
    kind = gguf.GGMLQuantizationType[outtype.upper()]
    shape = source.shape if values is None else values.shape
    if kind == gguf.GGMLQuantizationType.Q8_0 and shape[-1] % 32:
        kind = gguf.GGMLQuantizationType.F16
    block, size = gguf.GGML_QUANT_SIZES[kind]
    nbytes = math.prod(shape) // block * size
    return PlannedTensor(name, kind, shape, nbytes, source if values is None else None, heads, values)


def _write_officially(
    adapter: Adapter, base: Path, output: Path, outtype: str, alpha: float, factors: dict[str, float], script: Path
) -> None:
    """By llama.cpp's own script, which takes alpha as adapter_config.json says it."""
    if any(factor != 1 for factor in factors.values()):
        raise refusal("convert/several-alphas", adapter=adapter.folder, script=SCRIPT)
    with tempfile.TemporaryDirectory(prefix="workbook-adapter-") as name:
        copy = Path(name) / adapter.folder.resolve().name
        copy.mkdir()
        copy_weights(adapter, copy / WEIGHTS)
        write_json(copy / CONFIG, {**adapter.config, "lora_alpha": alpha})
        if (card := adapter.folder / "README.md").is_file():
            shutil.copyfile(card, copy / card.name)
        official.run_script(script, copy, output, outtype, ["--base", str(base.resolve())])


def _load_check(path: Path, base: Path) -> str:
    """What llama.cpp says of the adapter beside its base, of which the header alone is there, in front of a hole.

    Raises:
        InputError: it refuses the file.
    """
    if problem := llama_cpp_problem():
        return f"not tried: {problem}"
    with tempfile.TemporaryDirectory(prefix="workbook-header-") as name:
        header = Path(name) / "base.gguf"
        Conversion(base, open_weights(base), header, "q8_0").write_header(header)
        argument = {"path": str(path), "base": str(header)}
        what, function = "opening the adapter in llama.cpp", f"{__name__}:open_adapter_with_llama_cpp"
        run_child(function, argument, what, 600, heard=lambda line: None)
    return "llama.cpp opened the file beside its base: the name and shape of every pair are valid"


def open_adapter_with_llama_cpp(argument: dict[str, Any]) -> dict[str, Any]:
    """Load the adapter {"path"} beside the model {"base"} (runs in a child process).

    Raises:
        InputError: llama.cpp refuses the adapter; with the last errors it logged.
    """
    model = open_model(Path(argument["base"]), n_gpu_layers=0)
    if not llama().llama_adapter_lora_init(model, argument["path"].encode()):
        why = last_error() or "no reason given"
        raise refusal("convert/llama-cpp-refuses", path=Path(argument["path"]).name, why=why)
    return {}
