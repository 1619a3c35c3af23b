"""`workbook doctor`: what this machine can run, with a cure for every lack, and which way of training fits it.

No network is used.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lib.cli.console import Json, show, table
from lib.runs import machine
from lib.runs.files import PROJECT, home

if TYPE_CHECKING:
    from lib.settings import Settings
    from lib.stages.finetune.memory import Plan, Strategy

GIB = 2**30


def doctor(
    params_file: Annotated[
        Path | None, typer.Argument(help="recommend a way to train this parameter file", metavar="[PARAMS.yaml]")
    ] = None,
    model: Annotated[str | None, typer.Option(help="model folder in place of base_model", metavar="DIR")] = None,
    parameters: Annotated[
        list[str] | None, typer.Option("-p", "--parameter", metavar="KEY VALUE", help="replace one key")
    ] = None,
    as_json: Json = False,
) -> None:
    """What this machine can run, with cures; with PARAMS.yaml or --model: which way of training fits it."""
    if params_file or model:
        _recommend(params_file, model, parameters or [], as_json)
        return
    found = examine()
    show({"checks": [asdict(check) for check in found]}, as_json, as_text(found))
    if broken(found):
        raise typer.Exit(2)


# Which way of training fits this machine, with the arithmetic shown.

PARTS = ("process", "weights", "adapter", "gradients", "optimizer", "activations", "logits")


def _recommend(params_file: Path | None, model: str | None, pairs: Sequence[str], as_json: bool) -> None:
    """Print the strategy for a parameter file (else the defaults) and its base model (else `model`)."""
    from lib import settings as lib_settings
    from lib.cli.report import parsed
    from lib.stages.finetune.memory import recommend

    overrides = parsed(pairs)
    settings = (
        lib_settings.load(params_file, overrides) if params_file else lib_settings.check(overrides, "-p", overrides)
    )
    found = recommend(settings, model)
    show(found.to_json(), as_json, strategy_text(found, settings))


def strategy_text(found: Strategy, settings: Settings) -> str:
    """The plans as a table, the recommended one with the settings it needs."""
    gib = found.free / GIB
    lines = [
        f"Strategy for {found.model}: {found.weights / 1e6:,.0f} M weights in {found.dtype}, "
        f"rows of up to {found.tokens} tokens",
        f"Device: {found.device}; {gib:.1f} GiB free"
        + (f" on each of {found.devices} GPUs" if found.devices > 1 else ""),
        "",
        table([_row(plan) for plan in found.plans], ("plan", *PARTS, "need", "fits")),
        "GiB. A trained weight takes 4 bytes in the adapter, 4 as gradient, 8 in AdamW; activations grow with rows ×",
        "tokens; a plan fits when its need is at most nine tenths of what is free.",
        "",
        _advice(found, settings),
    ]
    return "\n".join(lines)


def _row(plan: Plan) -> dict[str, str]:
    sizes = plan.estimate.to_json()
    parts = {part: f"{sizes[part] / GIB:.2f}" for part in PARTS}
    return {"plan": plan.name, **parts, "need": f"{plan.need / GIB:.2f}", "fits": "yes" if plan.fits else "no"}


def _advice(found: Strategy, settings: Settings) -> str:
    from lib.stages.finetune.memory import OFFLOAD

    if found.chosen is None:
        return (
            "Recommended: none of these fits. Take a smaller base_model or max_seq_length, or a device with "
            f"{min(plan.need for plan in found.plans if plan.possible) / 0.9 / GIB:.1f} GiB free. {OFFLOAD}"
        )
    changes = found.chosen.changes
    asked = settings.model_copy(update=changes)
    kind = "QLoRA" if asked.load_in_4bit else "LoRA"
    processes = asked.num_processes
    way = f"data parallel on {processes} processes, one GPU each" if found.devices > 1 else f"{processes} processes"
    way = way if processes > 1 else "a single process"
    change = ", ".join(f"{key}: {str(value).lower()}" for key, value in changes.items())
    note = "" if found.devices > 1 else " Several processes on one device share its memory and its speed."
    todo = f"Set {change}." if change else "Nothing needs to be changed."
    way += "".join(found.chosen.name.partition(" (")[1:])  # an update of another size
    return f"Recommended: {kind} in {way}. {todo}{note} {OFFLOAD}"


# What this machine can run.

OK, LACK, BROKEN, INFO = "ok", "lack", "broken", "info"
MEMORY_GIB, DISK_GB = 4.0, 3.0
LLAMA = "llama_cpp_python"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass(frozen=True)
class Check:
    """One line of the doctor.

    Attributes:
        state: "ok", "lack" (something runs slower or not at all), "broken" (nothing runs), "info".
        found: what is there.
        cure: what to do; empty when nothing is to be done.
        touches: the notebooks concerned.
    """

    name: str
    state: str
    found: str
    cure: str = ""
    touches: str = ""


def examine() -> list[Check]:
    """All checks, in the order of importance."""
    python = Check("Python", OK, f"{platform.python_version()} ({sys.executable})")
    libraries = [_bitsandbytes(), _llama_cpp(), _library("llmcompressor", "gptq"), _library("torchao", "torchao-int8")]
    tools = [_fonts(), _git(), _chromium(), _phone_page()]
    return [python, _lock(), *_torch(), *libraries, *_room(), *tools, *_hub()]


def broken(found: Sequence[Check]) -> bool:
    """Whether something is missing without which nothing runs."""
    return any(check.state == BROKEN for check in found)


def as_text(found: Sequence[Check]) -> str:
    """One line a check, cure and notebooks below a lack, a summary at the end."""
    lines = []
    for check in found:
        lines.append(f"{check.state:<7} {check.name:<17} {check.found}")
        if check.cure:
            lines.append(f"{'':<25} cure: {check.cure}")
        if check.touches:
            lines.append(f"{'':<25} touches: {check.touches}")
    lacks = sum(check.state == LACK for check in found)
    if broken(found):
        end = "Something required is broken: cure it first."
    elif lacks:
        end = f"Lacks: {lacks}. The notebooks that they do not touch run in full."
    else:
        end = "Everything is there."
    return "\n".join([*lines, "", end])


def _locked() -> dict[str, str]:
    """Versions of requirements.txt that hold on this system, by name."""
    versions = {}
    for line in (PROJECT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        requirement, _, marker = line.partition("#")[0].partition(";")
        name, separator, version = requirement.strip().partition("==")
        if separator and ("Darwin" not in marker or platform.system() == "Darwin"):
            versions[name] = version.strip()
    return versions


def _pip(name: str) -> str:
    """The command that installs a package of the lock in its version."""
    try:
        return f"pip install {name}=={_locked()[name]}"
    except (OSError, KeyError):  # without the project's files, or a lock of another time
        return f"pip install {name}"


def lock_differences() -> list[str]:
    """Packages whose installed version is not that of requirements.txt, as 'name 1.0 (lock: 1.1)'."""
    found = []
    for name, version in _locked().items():
        if name == LLAMA:  # which has a line of its own
            continue
        try:
            have = metadata.version(name)
        except metadata.PackageNotFoundError:
            have = "absent"
        if have.partition("+")[0] != version:
            found.append(f"{name} {have} (lock: {version})")
    return found


def _lock() -> Check:
    try:
        different = lock_differences()
    except OSError:
        return Check("Packages", INFO, "no requirements.txt beside the project: the lock was not compared")
    if not different:
        return Check("Packages", OK, "exactly the lock (requirements.txt)")
    shown = ", ".join(different[:5]) + (", …" if len(different) > 5 else "")
    cure = "pip install -r requirements.txt (make does it)."
    return Check("Packages", LACK, f"{len(different)} differ from the lock: {shown}", cure, "all: numbers may differ")


def _torch() -> list[Check]:
    try:
        import torch

        kind = machine.torch_device()
    except Exception as error:  # a broken native library may raise anything
        found = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return [Check("torch", BROKEN, found, f"{_pip('torch')} --force-reinstall", "all")]
    gpu = Check("GPU", OK, machine.device_name())
    if kind == "cpu":
        cure = "none needed for the offline base; for Qwen, a GPU saves hours (README: GPU builds)."
        gpu = Check("GPU", LACK, f"none: {machine.device_name()}", cure, "02, 03 (slower)")
    dtype, reason = machine.compute_dtype()
    bfloat16 = Check("bfloat16", OK, reason)
    if dtype != "bfloat16":
        cure = "none: float32 is used, with twice the memory."
        bfloat16 = Check("bfloat16", LACK, reason, cure, "02, 03 (more memory)")
    return [Check("torch", OK, torch.__version__), gpu, bfloat16]


def _bitsandbytes() -> Check:
    if problem := machine.bitsandbytes_problem():
        cure = f"{_pip('bitsandbytes')}; without it load_in_4bit falls back to LoRA and the pages say so."
        return Check("bitsandbytes", LACK, problem, cure, "02 with load_in_4bit: true; 06: int8, nf4")
    return Check("bitsandbytes", OK, f"{metadata.version('bitsandbytes')}: a small NF4 product is right")


def _llama_cpp() -> Check:
    """Imported, and tried on 8-bit weights: as some compilers make it, it does not survive them."""
    name, touches = "llama-cpp-python", "05 (gate), 06, 07"
    if problem := machine.llama_cpp_problem():
        cure = f"install a C/C++ compiler, then {_pip(LLAMA)} (about 4 minutes on 2 cores)."
        return Check(name, LACK, problem, cure, touches)
    from lib.scoring.measure import llama_cpp_crash

    if crash := llama_cpp_crash():
        flag = "-U__AMX_INT8__"
        again = f"{_pip(LLAMA)} --force-reinstall --no-cache-dir --no-deps"
        cure = f"compile it without the code for AMX: CFLAGS={flag} CXXFLAGS={flag} {again}"
        return Check(name, BROKEN, crash, cure, touches)
    import llama_cpp

    gpu = "GPU offload" if llama_cpp.llama_supports_gpu_offload() else "CPU only"
    return Check(name, OK, f"{metadata.version(name)}, {gpu}: survives a prompt on 8-bit weights")


def _library(package: str, made: str) -> Check:
    """A package that makes one export format."""
    if machine.has_module(package):
        return Check(package, OK, metadata.version(package))
    cure = f"{_pip(package)}; without it {made} is skipped."
    return Check(package, LACK, "not installed", cure, f"06 with export_formats: [{made}]")


def _room() -> list[Check]:
    """Memory and disk; the output folder only where it cannot be written."""
    available = machine.available_memory() / GIB
    memory = Check("Memory", OK, f"{available:.1f} GiB available")
    if available < MEMORY_GIB:
        found = f"{memory.found}, {MEMORY_GIB:.0f} wanted by params/quick.yaml"
        cure = "close programs; set gradient_checkpointing: true and smaller batches."
        memory = Check("Memory", LACK, found, cure, "02, 03, 07")
    folder = next(p for p in (home(), *home().parents) if p.exists())
    free = shutil.disk_usage(folder).free / 1e9
    disk = Check("Disk", OK, f"{free:.1f} GB free at {home()}")
    if free < DISK_GB:
        cure = "free some space, or set WORKBOOK_HOME to a folder on another disk."
        disk = Check("Disk", LACK, f"{disk.found}, {DISK_GB:.0f} wanted", cure, "all")
    if os.access(folder, os.W_OK):
        return [memory, disk]
    return [memory, disk, Check("Output folder", BROKEN, f"{folder} cannot be written", "set WORKBOOK_HOME.", "all")]


def _fonts() -> Check:
    from lib.report.display import cjk_font

    if font := cjk_font():
        return Check("Chinese font", OK, f"{font} (figures)")
    cure = "apt install fonts-noto-cjk, dnf install google-noto-sans-cjk-fonts, or conda install font-ttf-noto-cjk."
    return Check("Chinese font", LACK, "none: figures label in English", cure, "01, 03, 07 (figures)")


def _git() -> Check:
    if path := shutil.which("git"):
        return Check("git", OK, path)
    return Check("git", LACK, "absent", "install git; without it the pages cannot name the commit.", "all (footer)")


def _chromium() -> Check:
    if browser := next(filter(None, map(shutil.which, BROWSERS)), None):
        return Check("Chromium", OK, browser)
    touches = "no notebook: make screenshots, a test of the phone page"
    return Check("Chromium", LACK, "absent", "apt install chromium, or dnf install chromium.", touches)


def _phone_page() -> Check:
    from lib.stages.package.phone_page import library_lacks, library_version

    missing = library_lacks()
    if not missing:
        return Check("wllama", OK, f"{library_version()} (phone page)")
    npm = "" if shutil.which("npm") else "install Node.js with npm (apt install npm, or dnf install npm), then "
    cure = f"{npm}make wllama (it needs a network, once)."
    return Check("wllama", LACK, f"{missing[0]} is not in .cache/wllama", cure, "no notebook: workbook package --web")


def _hub() -> list[Check]:
    """Settings that decide where models come from; nothing is asked over the network."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    return [
        Check("HF_ENDPOINT", INFO, os.environ.get("HF_ENDPOINT", "not set: the hub itself")),
        Check("HF_HUB_OFFLINE", INFO, "on: only cached models and data" if offline else "off"),
        Check("Model cache", INFO, os.environ.get("HF_HOME") or "~/.cache/huggingface"),
    ]
