"""`workbook doctor`: what this machine can run, with a cure for every lack, and what a parameter file would take here.

The network is used for config.json of a base model alone, where that is neither on this disk nor shipped.
"""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import typer

from lib.cli.console import padded, show, table
from lib.errors import InputError, in_words
from lib.language import HELP, LABEL, told, translated
from lib.runs import machine
from lib.runs.files import PROJECT, data_file, free_space, home, user_path
from lib.runs.locks import marker_reason
from lib.runs.manifest import version_of

if TYPE_CHECKING:
    from lib.settings import Settings

GIB = 2**30


def doctor(
    params_file: Path | None = None,
    model: str | None = None,
    parameters: list[str] | None = None,
    as_json: bool = False,
) -> None:
    """What this machine can run, with cures; with PARAMS.yaml or --model: which way of training fits it."""
    if params_file or model or parameters:
        _recommend(params_file, model, parameters or [], as_json)
        return
    found = examine()
    show({"checks": [asdict(check) for check in found]}, as_json, as_text(found))
    if broken(found):
        raise typer.Exit(2)


# Which way of training fits this machine, with the arithmetic shown.

ARITHMETIC = """\
GiB. A trained weight takes 4 bytes in the adapter, 4 as gradient, 8 in AdamW; activations grow with rows ×
tokens; a plan fits when its need is at most nine tenths of what is free."""
PER_THOUSAND = {"train": 1000, "test": 1000}
"""Rows that times are told for where the data does not lie here."""
PARTS = ("process", "weights", "adapter", "gradients", "optimizer", "activations", "logits")


def _recommend(params_file: Path | None, model: str | None, pairs: Sequence[str], as_json: bool) -> None:
    """Print the strategy for a parameter file (else the defaults) and its base model (else `model`)."""
    from lib import settings as lib_settings
    from lib.cli.report import parsed
    from lib.report.runner import ready, refuse_quantized
    from lib.report.sentences import sentence
    from lib.settings import UNTRAINED

    overrides = parsed(pairs)
    settings = ready(
        lib_settings.load(params_file, overrides) if params_file else lib_settings.check(overrides, "-p", overrides)
    )
    refuse_quantized(settings)
    rows: dict[str, Any] | None = None
    unused: list[str] = []
    counts: dict[str, int] = {}
    tokens = 0.0
    refused: InputError | None = None
    try:
        rows, unused, counts, tokens = _ask_what_is_here(settings, model)
    except InputError as error:
        if user_path(settings.dataset).exists() or not Path(settings.dataset).suffix:
            raise
        refused = error  # rows that have yet to be brought: the rest is told all the same
    takes = _what_it_takes(settings, model, counts, tokens)
    found: dict[str, Any] = {}
    if settings.finetuning_type == UNTRAINED:
        text = sentence("doctor.untrained")
    elif machine.has_module("torch"):
        from lib.stages.finetune.memory import recommend

        found = recommend(settings, model)
        text = strategy_text(found, settings, takes)
    else:
        text = sentence("doctor.no_torch")
    text += "\n\n" + sentence("doctor.takes", **takes) + rows_text(settings, rows)
    text += "\n".join(["\n" if unused else "", *(f"Of the data {why}." for why in unused)])
    show({**found, "takes": takes, "test_rows": rows, "not_used": unused}, as_json, text)
    if refused:
        raise refused


def _what_it_takes(settings: Settings, model: str | None, counts: dict[str, int], tokens: float) -> dict[str, Any]:
    """Disk, time, what 05 and the export formats say of the model: see `lib.pipeline.resources`.

    Args:
        tokens: of a row on average; 0 = not known.
    """
    from lib.models.language_model import known_shapes
    from lib.pipeline import resources

    config, where = resources.configuration(model or settings.base_model)
    try:
        shapes = known_shapes(config)
    except KeyError:
        return {"family": config.get("model_type"), "long": False}
    download = where in ("shipped", "hub")
    takes = resources.expected(settings, shapes, counts or PER_THOUSAND, download, tokens=tokens)
    return {
        "family": None,
        "where": where,
        "weights": takes.weights,
        "disk": takes.disk,
        "disk_total": sum(takes.disk.values()),
        "disk_free": free_space(home()),
        "home": str(home()),
        "seconds": takes.seconds,
        "time": takes.time,
        "long": sum(takes.seconds.values()) > resources.LONG,
        "rows": counts or None,
        "epochs": settings.num_train_epochs,
        "tokens": tokens or settings.max_seq_length,
        "counted": bool(tokens),
        "speed": asdict(takes.speed),
        "conversion": resources.conversion_problem(config),
        "reasons": config.get("reasons"),
        "formats": resources.possible_formats(settings, shapes),
    }


def _ask_what_is_here(
    settings: Settings, model: str | None
) -> tuple[dict[str, Any] | None, list[str], dict[str, int], float]:
    """What the steps of the run would refuse of the data, model and adapter that lie on this disk.

    Returns:
        what the test rows can show (`lib.report.data_page.detectable`); None where they lie elsewhere or have no
        labels. What of the data is not used, in the words of page 01. Rows by split; empty where they lie elsewhere.
        Tokens of a row on average; 0 where its tokenizer is not here either.

    Raises:
        InputError: the first of them.
    """
    from lib.hub.sources import looks_like_path
    from lib.models.adapters import read_adapter
    from lib.models.base_model import check_base_folder, resolve_adapter
    from lib.models.gguf_tokenizer import tokenizer_from_gguf
    from lib.models.loading import load_tokenizer
    from lib.models.merge_plan import check_fit, refuse_unsupported
    from lib.models.runtime_folders import runtime_of
    from lib.report.data_page import detectable
    from lib.scoring.metric import rows_of_folds
    from lib.settings import OFFLINE_BASE, SAMPLES
    from lib.stages.convert.official import check_conversion
    from lib.stages.data.data_files import FORMATS
    from lib.stages.data.reading import choose_data
    from lib.stages.data.stage import divide, measure, put_tokenizer

    def here(source: str, word: str = "") -> bool:
        return source not in ("", word) and (looks_like_path(source) or user_path(source).exists())

    source, base = model or settings.base_model, user_path(model or settings.base_model)
    rows, unused, tokenizer = None, [], None
    folds = []
    if settings.dataset in SAMPLES or here(settings.dataset) or Path(settings.dataset).suffix.lower() in FORMATS:
        table = choose_data(settings)
        folds = [divide(settings, table, fold) for fold in range(1, settings.folds + 1)]
        tested = [fold.splits["test"] for fold in folds]
        parts = [[{"label": row.label, "group": row.group, "leaked": row.leaked} for row in test] for test in tested]
        unused = [why for why in folds[0].changes + table.changes if why.startswith("not used")]
        if settings.task == "classification":
            rows = detectable(rows_of_folds(parts))
    counts = {name: len(part) for name, part in folds[0].splits.items()} if folds else {}
    if not machine.has_module("torch"):
        return rows, unused, counts, 0.0
    own = here(source, OFFLINE_BASE) and base.is_dir()
    if own and (model is None or runtime_of(base) or any(base.glob("*.safetensors"))):
        check_base_folder(base)
        tokenizer = load_tokenizer(base)
        check_conversion(base, as_base=True)
    elif here(source, OFFLINE_BASE) and base.suffix.lower() == ".gguf":
        tokenizer = tokenizer_from_gguf(base)
    elif source == OFFLINE_BASE and folds:
        with tempfile.TemporaryDirectory() as temporary:
            rows_of_train = folds[0].splits["train"]
            tokenizer, _ = put_tokenizer(None, folds[0].kind.task, rows_of_train, Path(temporary) / "tokenizer")
    tokens = 0.0
    if tokenizer is not None and folds:
        lengths = itertools.chain(*measure(tokenizer, folds[0])[1].values())
        tokens = mean(min(length, settings.max_seq_length) for length in lengths)
    if here(settings.adapter):
        adapter = resolve_adapter(settings.adapter).path
        if own:
            check_fit(adapter, base)
        else:
            refuse_unsupported(read_adapter(adapter))
    return rows, unused, counts, tokens


def rows_text(settings: Settings, rows: dict[str, Any] | None) -> str:
    """What the test rows can show of a quantized file, and how many would be needed."""
    from lib.report.sentences import sentence
    from lib.statistics.noninferiority import rows_for

    if rows is None:
        return ""
    margin = settings.equivalence_margin
    needed = [(share, rows_for(share, margin / 100)) for share in (0.0, 0.01, 0.02)]
    words = [sentence("data.detectable", **rows), sentence("doctor.rows_needed", margin=margin, needed=needed)]
    return "\n\n" + "\n".join(words).replace("**", "")


def strategy_text(found: dict[str, Any], settings: Settings, takes: dict[str, Any]) -> str:
    """The plans as a table, the recommended one with the settings it needs; `takes`: time and room, see `resources`."""
    from lib.report.sentences import sentence

    rows = []
    for plan in found["plans"]:
        parts = {part: f"{plan['estimate'][part] / GIB:.2f}" for part in PARTS}
        fits = {"need": f"{plan['need'] / GIB:.2f}", "fits": translated("yes" if plan["fits"] else "no", LABEL)}
        rows.append({"plan": told(plan["name"]), **parts, **fits})
    chosen = next((plan for plan in found["plans"] if plan["fits"]), None)
    if chosen is None:
        need = min(plan["need"] for plan in found["plans"] if plan["possible"]) / 0.9 / GIB
        advice = sentence("doctor.no_plan", gib=need, offload=found["offload"])
    else:
        asked = settings.model_copy(update=chosen["changes"])
        values = {"devices": found["devices"], "plan": chosen, "asked": asked, "takes": takes}
        advice = sentence("doctor.advice", **values, offload=found["offload"])
    words = [sentence("doctor.model", found=found), sentence("doctor.room", found=found, gib=found["free"] / GIB)]
    shown = [{translated(key, LABEL): value for key, value in row.items()} for row in rows]
    return "\n".join([*words, "", table(shown, list(shown[0])), translated(ARITHMETIC, HELP), "", advice])


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
    python = f"{platform.python_version()} ({sys.executable})"
    return [_check("Python", python), _lock(), *_torch(), *_libraries(), *_room(), *_tools(), *_hub()]


class _Pip(dict[str, str]):
    """The command that installs a package of the lock in its version."""

    def __missing__(self, name: str) -> str:
        try:
            return f"pip install {name}=={_locked()[name]}"
        except (OSError, KeyError):  # without the project's files, or a lock of another time
            return f"pip install {name}"


def _check(name: str, found: str, lack: str | bool | None = None, state: str = LACK, cure: str = "") -> Check:
    """What is there, or with its cure what is wanting.

    Args:
        lack: what is wanting, in words; false where nothing is.
        state: that of a lack.
        cure: name of its cure in ``cures.yaml``, where it is not the check's.
    """
    if not lack:
        return Check(name, OK, found)
    words = data_file("cli/cures.yaml")[cure or name]
    return Check(name, state, str(lack), words["cure"].format(pip=_Pip()), words["touches"])


def broken(found: Sequence[Check]) -> bool:
    """Whether something is missing without which nothing runs."""
    return any(check.state == BROKEN for check in found)


def as_text(found: Sequence[Check]) -> str:
    """One line a check, cure and notebooks below a lack, a summary at the end."""
    lines = []
    for check in found:
        lines.append(f"{padded(told(check.state), 7)} {padded(told(check.name), 17)} {told(check.found)}")
        if check.cure:
            lines.append(f"{'':<25} {told(f'cure: {check.cure}')}")
        if check.touches:
            lines.append(f"{'':<25} {told(f'touches: {check.touches}')}")
    lacks = sum(check.state == LACK for check in found)
    if broken(found):
        end = "Something required is broken: cure it first."
    elif lacks:
        end = f"Lacks: {lacks}. The notebooks that they do not touch run in full."
    else:
        end = "Everything is there."
    return "\n".join([*lines, "", told(end)])


def _locked() -> dict[str, str]:
    """Versions of requirements.txt that hold on this system, by name."""
    from packaging.requirements import Requirement

    lines = (PROJECT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {one.name: str(one.specifier).removeprefix("==") for one in found if not one.marker or one.marker.evaluate()}


def lock_differences() -> list[str]:
    """Packages whose installed version is not that of requirements.txt, as 'name 1.0 (lock: 1.1)'."""
    locked = {name: version for name, version in _locked().items() if name != LLAMA}  # which has a line of its own
    have = {name: version_of(name) for name in locked}
    return [f"{n} {have[n]} (lock: {locked[n]})" for n in locked if have[n].partition("+")[0] != locked[n]]


def _lock() -> Check:
    try:
        different = lock_differences()
    except OSError:
        return Check("Packages", INFO, "no requirements.txt beside the project: the lock was not compared")
    shown = ", ".join(different[:5]) + (", …" if len(different) > 5 else "")
    lack = different and f"{len(different)} differ from the lock: {shown}"
    return _check("Packages", "exactly the lock (requirements.txt)", lack)


def _torch() -> list[Check]:
    if not machine.has_module("torch"):
        return [_check("torch", "", "not installed: only inspecting, planning and simulating work")]
    try:
        import torch

        kind = machine.torch_device()
    except Exception as error:  # a broken native library may raise anything
        return [_check("torch", "", in_words(error), BROKEN)]
    gpu, (dtype, reason) = machine.device_name(), machine.compute_dtype()
    build = f"{torch.__version__}, built for CUDA {torch.version.cuda}" if torch.version.cuda else torch.__version__
    gpus = [_check(f"GPU {number}", words) for number, words in enumerate(machine.gpus())]
    return [
        _check("torch", build),
        *(gpus or [_check("GPU", gpu, kind == "cpu" and f"none: {gpu}")]),
        _check("bfloat16", reason, dtype != "bfloat16" and reason),
    ]


def _libraries() -> list[Check]:
    from lib.runs.packages import environment_problem, environment_versions

    words = f"{version_of('bitsandbytes')}: a small NF4 product is right"
    return [
        _check("bitsandbytes", words, machine.bitsandbytes_problem()),
        _llama_cpp(),
        *(
            _check(name, version_of(name), not machine.has_module(name.replace("-", "_")) and "not installed")
            for name in ("llmcompressor", "torchao", "onnxruntime-genai")  # each makes export formats
        ),
        _check("mnn", environment_versions("mnn").get("mnn", ""), environment_problem("mnn")),
    ]


def _llama_cpp() -> Check:
    """Imported, and tried on 8-bit weights: as some compilers make it, it does not survive them."""
    name = "llama-cpp-python"
    if problem := machine.llama_cpp_problem():
        return _check(name, "", problem)
    import llama_cpp

    from lib.scoring.measure import llama_cpp_crash

    if crash := llama_cpp_crash():
        return _check(name, "", crash, BROKEN, "llama-cpp-python crashes")
    gpu = "GPU offload" if llama_cpp.llama_supports_gpu_offload() else "CPU only"
    return _check(name, f"{version_of(name)}, {gpu}: survives a prompt on 8-bit weights")


def _room() -> list[Check]:
    """Memory, disk and its locks; the output folder only where it cannot be written."""
    available = machine.available_memory() / GIB
    memory = f"{available:.1f} GiB available"
    folder = next(p for p in (home(), *home().parents) if p.exists())
    free = shutil.disk_usage(folder).free / 1e9
    disk = f"{free:.1f} GB free at {home()}"
    found = [
        _check("Memory", memory, available < MEMORY_GIB and f"{memory}, {MEMORY_GIB:.0f} wanted by params/quick.yaml"),
        _check("Disk", disk, free < DISK_GB and f"{disk}, {DISK_GB:.0f} wanted"),
    ]
    reason = marker_reason(folder)
    found.append(_check("Disk locks", f"of the system, and marker files ({reason})" if reason else "of the system"))
    if not os.access(folder, os.W_OK):
        found.append(_check("Output folder", "", f"{folder} cannot be written", BROKEN))
    return found


def _tools() -> list[Check]:
    """What figures, footers, screenshots and the phone page need."""
    from lib.stages.package.phone_page import library_lacks, library_version

    figures = Check("Chinese font", INFO, "figures need the extra lab")
    if machine.has_module("matplotlib"):
        from lib.report.looks import cjk_font

        font = cjk_font()
        figures = _check("Chinese font", f"{font} (figures)", not font and "none: figures label in English")
    git, missing = shutil.which("git"), library_lacks()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    words = "" if missing else f"{library_version()} (phone page)"
    cure = "wllama" if shutil.which("npm") else "wllama without npm"
    return [
        figures,
        _check("git", str(git), not git and "absent"),
        _check("Chromium", str(browser), not browser and "absent"),
        _check("wllama", words, missing and f"{missing[0]} is not in .cache/wllama", cure=cure),
    ]


def _hub() -> list[Check]:
    """Settings that decide where models come from; nothing is asked over the network."""
    from lib.hub.sources import is_offline
    from lib.hub.transport import host_of

    return [
        Check("HF_ENDPOINT", INFO, host_of(os.environ.get("HF_ENDPOINT", "")) or "not set: the hub itself"),
        Check("HF_HUB_OFFLINE", INFO, "on: only cached models and data" if is_offline() else "off"),
        Check("Model cache", INFO, os.environ.get("HF_HOME") or "~/.cache/huggingface"),
    ]
