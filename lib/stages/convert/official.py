"""Converting with llama.cpp's own script, for models that this converter does not know.

The script comes with the sources of llama-cpp-python, from which the set-up keeps it; or from a checkout of llama.cpp
that the user names. Its own code is run (it is not reviewed here), code inside the model folder is not.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lib.errors import refusal
from lib.models.configurations import read_configuration
from lib.models.gguf_file import read_metadata, read_tensors
from lib.models.weights import Weights, open_weights
from lib.progress import Progress, say
from lib.runs.files import atomic_path, require_space
from lib.runs.manifest import version_of
from lib.stages.convert.convert import ConversionReport, check_output, convert, load_check, plan_conversion
from lib.stages.convert.tensors import ForeignModelError

SCRIPT = "convert_hf_to_gguf.py"
_CLASSES = "conversion/__init__.py"


def convert_folder(model_dir: Path, output: Path, outtype: str = "f16", name: str | None = None) -> ConversionReport:
    """Write `output` from a model folder: by `convert`, or where that does not know the class by the official script.

    Args:
        outtype, name: as of `convert`; the official script makes "f32", "f16", "bf16" and "q8_0", too.

    Raises:
        InputError: as `convert`; or the official script is not here, or fails.
    """
    try:
        return convert(model_dir, output, outtype, name)
    except ForeignModelError as error:
        sources = sources_for(model_dir, error)
        say(f"converting by {SCRIPT} of llama.cpp, for the workbook's own converter found {error.found}")
        return convert_officially(model_dir, output, outtype, sources, name)


def check_conversion(folder: Path, as_base: bool = False) -> list[str]:
    """Refuse what `convert_folder` would refuse, as far as that is known without reading weights.

    Args:
        as_base: what will be converted is a merge into this model, which brings no code of its own.

    Returns:
        What is to be said of the file that would be made.

    Raises:
        InputError: as `plan_conversion`; or code in a folder that the official script would convert.
    """
    try:
        return plan_conversion(folder).tokenizer["unsaid"]
    except ForeignModelError as error:
        sources = sources_for(folder, error, as_base)
        return [f"05 converts it by {SCRIPT} of {called(sources)}; whether that can is known only then"]


def sources_for(folder: Path, error: ForeignModelError, as_base: bool = False) -> Path:
    """Where the official converter lies that knows the folder's class; else the error of our own is raised again."""
    sources = kept_sources()
    kinds = read_configuration(folder).get("architectures") or [""]
    if sources is None or kinds[0] not in known_classes(sources):
        raise error
    if not as_base:
        _refuse_code(folder)
    return sources


def kept_sources() -> Path | None:
    """Where the set-up has put the converter of the installed llama-cpp-python; None where it has not."""
    version = version_of("llama_cpp_python")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = cache / "quantization-workbook" / f"llama.cpp-{version}"
    return folder if version and (folder / SCRIPT).is_file() else None


def known_classes(sources: Path) -> set[str]:
    """Language models of transformers that the script of these sources converts, as its own table names them."""
    try:
        text = (sources / _CLASSES).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return set()
    return set(re.findall(r'"(\w+)": "', text.partition("MMPROJ_MODEL_MAP")[0]))


def convert_officially(
    model_dir: Path, output: Path, outtype: str, sources: Path, name: str | None = None
) -> ConversionReport:
    """Run the script of `sources` with this Python and publish its file once llama.cpp has opened it.

    Raises:
        InputError: no script there, weights that are not safetensors, a folder with code of its own, or the script or
            llama.cpp fails; nothing is left at `output` then.
    """
    import gguf

    started = time.monotonic()
    model_dir, output = Path(model_dir), Path(output)
    script = checked(sources, model_dir, SCRIPT) / SCRIPT
    weights = open_weights(model_dir)
    check_output(output, weights, outtype)
    require_space(output.parent, weights.parameters * (4 if outtype == "f32" else 2) + (64 << 20), output.name)
    with atomic_path(output, alone=True) as temporary:
        more = (["--model-name", name] if name else []) + _without_further_layers(model_dir, weights)
        run_script(script, model_dir, temporary, outtype, more)
        loaded = load_check(temporary)
    metadata, tensors = read_metadata(output), read_tensors(output)
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    return ConversionReport(
        model=str(model_dir),
        output=str(output),
        architecture=str(metadata.get("general.architecture")),
        outtype=outtype,
        tensors=len(tensors),
        parameters=weights.parameters,
        bytes_before=weights.nbytes,
        bytes_after=output.stat().st_size,
        types=dict(Counter(gguf.GGMLQuantizationType(tensor.type).name for tensor in tensors)),
        float16_fallback=[],
        tokens=len(tokens),
        padding_tokens=sum(str(token).startswith("[PAD") for token in tokens),
        pre_tokenizer=str(metadata.get("tokenizer.ggml.pre") or metadata.get("tokenizer.ggml.model")),
        recognised="by the official script",
        loaded=loaded,
        seconds=round(time.monotonic() - started, 2),
        converter=f"{SCRIPT} of {called(sources)}",
    )


def checked(sources: Path, folder: Path, script: str) -> Path:
    """`sources`, provided that they hold the script and the model folder nothing that it would run.

    Raises:
        InputError: no such script, or code of the folder's own.
    """
    if not (Path(sources) / script).is_file():
        raise refusal("convert/no-script", checkout=sources, script=script)
    _refuse_code(folder)
    return Path(sources)


def called(sources: Path) -> str:
    return f"llama-cpp-python {version_of('llama_cpp_python')}" if sources == kept_sources() else str(sources)


def _refuse_code(folder: Path) -> None:
    """The script loads tokenizers with `trust_remote_code`, which runs what a folder brings."""
    brought = sorted(path.name for path in folder.glob("*.py"))
    brought += ["auto_map"] if "auto_map" in read_configuration(folder) else []
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file() and "auto_map" in tokenizer.read_text(encoding="utf-8", errors="replace"):
        brought.append(f"auto_map in {tokenizer.name}")
    if brought:
        raise refusal("convert/own-code", folder=folder, brought=", ".join(brought))


def _without_further_layers(folder: Path, weights: Weights) -> list[str]:
    """The option by which the script does not look for layers that guess further tokens, where a model of such a class
    has none: it would stop at their absence (`conversion/qwen.py`, _QwenMtpMixin)."""
    kind = str(read_configuration(folder).get("model_type"))
    there = any("mtp." in name for name in weights.tensors)
    return ["--no-mtp"] if kind.startswith(("qwen3_5", "qwen3_next")) and not there else []


def run_script(script: Path, folder: Path, output: Path, outtype: str, more: Sequence[str] = ()) -> None:
    """Run a script of llama.cpp on the model or adapter in `folder`.

    Raises:
        InputError: it fails, or leaves no file at `output`.
    """
    arguments = [str(folder.resolve()), "--outtype", outtype, "--outfile", str(output.resolve()), *more]
    command = [sys.executable, str(script.resolve()), *arguments]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with Progress(f"{script.name} of llama.cpp"):
        done = subprocess.run(
            command, cwd=script.parent, env=offline, capture_output=True, text=True, errors="replace", check=False
        )
    if done.returncode or not output.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1][:300] if lines else f"exit code {done.returncode}"
        absent = "ModuleNotFoundError" in reason
        raise refusal(
            "convert/script-lacks-library" if absent else "convert/script-failed", script=script.name, reason=reason
        )
