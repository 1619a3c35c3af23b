"""`workbook doctor PARAMS`: which way of training fits this machine, with the arithmetic shown.
What this machine can run: every lack with its cure and the notebooks it touches. No network is used.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.cli.console import show, table
from lib.runs import machine
from lib.runs.files import PROJECT, home

if TYPE_CHECKING:
    from lib.settings import Settings
    from lib.stages.finetune.memory import Plan, Strategy


# `workbook doctor PARAMS`: which way of training fits this machine, with the arithmetic shown.

GIB = 2**30
PARTS = ("process", "weights", "adapter", "gradients", "optimizer", "activations", "logits")


def tell_strategy(params_file: Path | None, model: str | None, pairs: list[str], as_json: bool) -> None:
    """Print the strategy for a parameter file (else the defaults) and its base model (else `model`)."""
    from lib import settings as lib_settings
    from lib.stages.finetune.memory import recommend

    texts = [text.partition("=") for text in pairs]
    overrides = {key: lib_settings.parse_override(key, value) for key, _, value in texts}
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


# What this machine can run: every lack with its cure and the notebooks it touches. No network is used.

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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _python() -> Check:
    return Check("Python", OK, f"{platform.python_version()} ({sys.executable})")


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
    checks = [Check("torch", OK, torch.__version__)]
    if kind == "cpu":
        cure = "none needed for the offline base; for Qwen, a GPU saves hours (README: GPU builds)."
        checks.append(Check("GPU", LACK, f"none: {machine.device_name()}", cure, "02, 03 (slower)"))
    else:
        checks.append(Check("GPU", OK, machine.device_name()))
    dtype, reason = machine.compute_dtype()
    if dtype == "bfloat16":
        checks.append(Check("bfloat16", OK, reason))
    else:
        cure = "none: float32 is used, with twice the memory."
        checks.append(Check("bfloat16", LACK, reason, cure, "02, 03 (more memory)"))
    return checks


def _optional() -> list[Check]:
    """The libraries without which part of the notebooks still runs."""
    four_bit = machine.bitsandbytes_problem()
    cure = f"{_pip('bitsandbytes')}; without it load_in_4bit falls back to LoRA and the pages say so."
    checks = [
        Check("bitsandbytes", LACK, four_bit, cure, "02 with load_in_4bit: true; 06: int8, nf4")
        if four_bit
        else Check("bitsandbytes", OK, f"{metadata.version('bitsandbytes')}: a small NF4 product is right")
    ]
    return [*checks, _llama_cpp(), *_export_libraries()]


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


def _export_libraries() -> list[Check]:
    """Packages that make one export format each."""
    checks = []
    for package, formats in (("llmcompressor", "gptq"), ("torchao", "torchao-int8")):
        if machine.has_module(package):
            checks.append(Check(package, OK, metadata.version(package)))
        else:
            cure = f"{_pip(package)}; without it {formats} is skipped."
            checks.append(Check(package, LACK, "not installed", cure, f"06 with export_formats: [{formats}]"))
    return checks


def _room() -> list[Check]:
    memory = machine.available_memory() / 2**30
    folder = next(p for p in (home(), *home().parents) if p.exists())
    disk = shutil.disk_usage(folder).free / 1e9
    enough = memory >= MEMORY_GIB
    checks = [
        Check("Memory", OK, f"{memory:.1f} GiB available")
        if enough
        else Check(
            "Memory",
            LACK,
            f"{memory:.1f} GiB available, {MEMORY_GIB:.0f} wanted by params/quick.yaml",
            "close programs; set gradient_checkpointing: true and smaller batches.",
            "02, 03, 07",
        )
    ]
    if disk >= DISK_GB:
        checks.append(Check("Disk", OK, f"{disk:.1f} GB free at {home()}"))
    else:
        cure = "free some space, or set WORKBOOK_HOME to a folder on another disk."
        checks.append(Check("Disk", LACK, f"{disk:.1f} GB free at {home()}, {DISK_GB:.0f} wanted", cure, "all"))
    writable = os.access(folder, os.W_OK)
    if not writable:
        checks.append(Check("Output folder", BROKEN, f"{folder} cannot be written", "set WORKBOOK_HOME.", "all"))
    return checks


def _fonts() -> Check:
    from lib.report.display import cjk_font

    if font := cjk_font():
        return Check("Chinese font", OK, f"{font} (figures)")
    cure = "apt install fonts-noto-cjk, dnf install google-noto-sans-cjk-fonts, or conda install font-ttf-noto-cjk."
    return Check("Chinese font", LACK, "none: figures label in English", cure, "01, 03, 07 (figures)")


def _tools() -> list[Check]:
    checks = [
        Check("git", OK, shutil.which("git") or "")
        if shutil.which("git")
        else Check("git", LACK, "absent", "install git; without it the pages cannot name the commit.", "all (footer)")
    ]
    if browser := next(filter(None, map(shutil.which, BROWSERS)), None):
        return [*checks, Check("Chromium", OK, browser)]
    cure = "apt install chromium, or dnf install chromium."
    return [*checks, Check("Chromium", LACK, "absent", cure, "no notebook: make screenshots, a test of the phone page")]


def _phone_page() -> Check:
    from lib.stages.package.phone_page import library_lacks, library_version

    missing = library_lacks()
    if not missing:
        return Check("wllama", OK, f"{library_version()} (phone page)")
    npm = "" if shutil.which("npm") else "install Node.js with npm (apt install npm, or dnf install npm), then "
    cure = f"{npm}make wllama (it needs a network, once)."
    found = f"{missing[0]} is not in .cache/wllama"
    return Check("wllama", LACK, found, cure, "no notebook: workbook package --web")


def _hub() -> list[Check]:
    """Settings that decide where models come from; nothing is asked over the network."""
    endpoint = os.environ.get("HF_ENDPOINT", "not set: the hub itself")
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    cached = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return [
        Check("HF_ENDPOINT", INFO, endpoint),
        Check("HF_HUB_OFFLINE", INFO, "on: only cached models and data" if offline else "off"),
        Check("Model cache", INFO, cached),
    ]


def examine() -> list[Check]:
    """All checks, in the order of importance."""
    return [_python(), _lock(), *_torch(), *_optional(), *_room(), _fonts(), *_tools(), _phone_page(), *_hub()]


def broken(found: list[Check]) -> bool:
    """Whether something is missing without which nothing runs."""
    return any(check.state == BROKEN for check in found)


def as_text(found: list[Check]) -> str:
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


def tell(as_json: bool) -> bool:
    """Print all checks; False when something is broken."""
    found = examine()
    show({"checks": [check.to_json() for check in found]}, as_json, as_text(found))
    return not broken(found)
