"""The stage `package`: the file to ship with card, guide, examples and a test of its own, as a folder and a zip."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import InputError, refusal
from lib.language import ENGLISH, language, translated_code
from lib.models.loading import load_tokenizer
from lib.progress import Progress
from lib.prompts.tasks import read_task
from lib.prompts.templates import read_turns
from lib.runs.files import CHUNK, atomic_path, link_or_copy, read_json, require_space, writable, write_json, write_text
from lib.runs.manifest import hash_folder
from lib.runs.render import message_name
from lib.runs.run import Product, ProductDraft, Run
from lib.stages.package.documents import PackedModel, card, guide, model_info, modelfile, requirements
from lib.stages.package.facts import ChosenFile, choose_file, gather
from lib.stages.package.phone_page import Rows, request_web, web_parameters, write_web

FORMATS = ("merged_model", "fp16", "int8", "int4", "onnx", "mnn", "gguf")
"""Folders of the export tree."""

EXPORTS = {
    "fp16": ("fp16",),
    "int8": ("int8",),
    "int4": ("nf4", "gptq", "autoround"),
    "onnx": ("onnx-int4", "onnx-int8"),
}
EXPORTS["mnn"] = ("mnn-int4",)
"""Formats of the product `exports` that may fill a folder, the first that was made."""
Maker = Callable[[Run, Sequence[str]], None]
"""Makes formats of the product `exports` that folders lack; another stage's work, which the caller brings."""
Teller = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""The recommendation of a comparison in the language of this process; likewise."""

SUMS, INFO, REPORT = "SHA256SUMS", "model_info.json", "export_report.json"
_SCRIPTS = Path(__file__).with_name("scripts")
_FORMAT = 5
"""Raised when the package's content changes, so that an older one is made again."""
_SECONDS = 900


@dataclass(frozen=True)
class PackageResult:
    """The package of a run.

    Attributes:
        product: its folder.
        archive: the zip.
        report: content of export_report.json.
    """

    product: Product
    archive: Path
    report: dict[str, Any]


def package(
    run: Run,
    wanted: str | None = None,
    formats: Sequence[str] = (),
    output: Path | None = None,
    n_threads: int = 0,
    force: bool = False,
    web: bool = False,
    rows: Path | None = None,
    export_lacking: Maker | None = None,
    reworded: Teller | None = None,
) -> PackageResult:
    """Make the product `package`, or skip it when nothing changed, and pack it.

    Args:
        wanted: quantization type; None = the recommendation of the run's comparison.
        formats: folders of the export tree that are added (see `read_formats`).
        output: folder for the zip; None = the run's.
        web: whether web/, the page for a phone's browser, is added; rows: texts that it checks itself by (see
            `lib.stages.package.phone_page.request_web`).
        export_lacking: called with `formats` once nothing else is refused.
        reworded: tells the recommendation in the language of this process, where that is not English.

    Raises:
        InputError: nothing is recommended and `wanted` is None; a missing product or format; an unfit chat template;
            what the page is made of is not there; an `output` that cannot take the zip.
        RuntimeError: the package's own test_model.py fails.
    """
    target = _zip_folder(run, output)
    comparison = read_json(run.require_current("comparison").path / "comparison.json")
    other = reworded(comparison) if reworded and language() != ENGLISH else None
    chosen = choose_file(run, comparison, wanted, other)
    request = request_web(run, rows) if web else None
    parameters = {"package_format": _FORMAT, "type": chosen.type, "formats": list(formats)}
    parameters |= {"language": language()} if language() != ENGLISH else {}
    if export_lacking:
        export_lacking(run, formats)
    inputs = ["data", "gguf", "quantized", "comparison"]
    inputs += ["merged"] if "merged_model" in formats else []
    inputs += ["exports"] if not EXPORTS.keys().isdisjoint(formats) else []
    product = run.produce(
        "package",
        lambda work: _build(run, work, chosen, comparison, formats, n_threads, request),
        parameters=parameters | (web_parameters(request) if request else {}),
        inputs=tuple(inputs),
        force=force,
    )
    report = read_json(product.path / REPORT)
    title = report["file"]["name"].removesuffix(".gguf")
    archive = target / f"{title}.zip"
    check_target(archive, title, run.name)
    write_zip(product.path, product.entry.outputs, archive, title)
    return PackageResult(product, archive, report)


def _build(
    run: Run,
    work: ProductDraft,
    chosen: ChosenFile,
    comparison: dict[str, Any],
    formats: Sequence[str],
    n_threads: int,
    request: Rows | None,
) -> None:
    data = run.require("data").path
    task, tokenizer, folder = read_task(data), load_tokenizer(data / "tokenizer"), work.folder
    turns = read_turns(tokenizer, task.thinking)
    facts = gather(run, chosen, task, comparison, link_tree(run, formats, folder))
    link_or_copy(chosen.source, folder / facts.file)
    packed = PackedModel(facts, turns, tokenizer, folder / facts.file, n_threads)
    info = model_info(packed)
    write_json(folder / INFO, info)
    text, notes = modelfile(facts, turns, info["stops"])
    write_text(folder / "Modelfile", text)
    if request:
        facts.report["page_rows"] = write_web(request, packed, info)
    licences = [path for name in ("LICENSE", "NOTICE") if (path := run.folder / "merged" / name).is_file()]
    for path in licences:  # of the base model, where it brought them
        shutil.copyfile(path, folder / path.name)
    write_text(folder / "README.md", card(facts, [path.name for path in licences]))
    write_text(folder / "deployment_guide.md", guide(facts, turns, [check["prompt_ids"] for check in info["checks"]]))
    write_text(folder / "requirements.txt", requirements(facts))
    write_json(folder / REPORT, facts.report)
    for name in ("test_model.py", "usage_examples.py"):
        text = (_SCRIPTS / name).read_text(encoding="utf-8")
        write_text(folder / name, translated_code(text, message_name(_SCRIPTS / name)))
    lines = (f"{output['sha256']}  {name}\n" for name, output in hash_folder(folder).items() if name[0] != ".")
    write_text(folder / SUMS, "".join(lines))  # as sha256sum -c reads it
    _prove(folder)
    work.facts |= {"file": facts.file, "type": chosen.type, "standing": chosen.standing, "formats": list(formats)}
    work.metrics |= {"bytes": facts.report["file"]["bytes"], "checks": len(info["checks"])}
    work.notes += notes


def _prove(folder: Path) -> None:
    """Run the package's own test: what it refuses is not published."""
    command = [sys.executable, "-I", "-B", "test_model.py"]
    answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS)
    if answer.returncode:
        raise RuntimeError(f"the package's own test_model.py fails:\n{(answer.stdout + answer.stderr)[-2000:]}")


# The export tree: folders of other formats, whose large files are shared with the products that they come from.


def read_formats(text: str) -> list[str]:
    """Names from "fp16,int8", each once, in the order of the tree.

    Raises:
        InputError: an unknown name.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in FORMATS]:
        raise InputError(f"--formats {', '.join(unknown)}.", f"some of {', '.join(FORMATS)}.", "correct the names.")
    return [name for name in FORMATS if name in names]


def link_tree(run: Run, formats: Sequence[str], folder: Path) -> dict[str, str]:
    """Make the asked folders under `folder`.

    Returns:
        {folder: what it holds}.

    Raises:
        InputError: a product or a format that the run does not have.
    """
    made = {}
    for name in formats:
        if name == "gguf":
            (folder / name).mkdir()
            for product in ("gguf", "quantized"):
                for path in sorted(run.require(product).path.glob("*.gguf")):
                    link_or_copy(path, folder / name / path.name)
            made[name] = "every GGUF file of the run"
            continue
        source, made[name] = _linked_source(run, name)
        shutil.copytree(source, folder / name, copy_function=link_or_copy)
    return made


def _linked_source(run: Run, name: str) -> tuple[Path, str]:
    if name == "merged_model":
        return run.require_current("merged").path, "the merged model, 16 bits or as the base"
    exports = run.require_current("exports").path
    content = read_json(exports / "exports.json")
    records = {record["format"]: record for record in content["made"]}
    for kind in EXPORTS[name]:
        if kind in records:
            return exports / records[kind]["folder"], f"{kind}: {records[kind]['title']}"
    made, either = ", ".join(records) or "of no format", " or ".join(EXPORTS[name])
    skipped = "; ".join(f"{skip['format']}: {skip['reason']}" for skip in content["skipped"]) or "nothing was tried"
    raise refusal("package/no-such-export", run=run, made=made, either=either, name=name, skipped=skipped)


def lacking(run: Run, formats: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Folder of the tree → formats that would fill it, where none was made from the merged model of the run."""
    try:
        content = read_json(run.require_current("exports").path / "exports.json")
    except InputError:  # absent, damaged, or of a former model
        content = {"made": []}
    made = {record["format"] for record in content["made"]}
    return {name: EXPORTS[name] for name in formats if name in EXPORTS and made.isdisjoint(EXPORTS[name])}


# A zip of the package: the same files give the same bytes, whenever it is made.

_TIME = (1980, 1, 1, 0, 0, 0)
_MODE = 0o100644 << 16


def _zip_folder(run: Run, output: Path | None) -> Path:
    """The folder for the zip, writable, and none of the run's own: a product holds what its stage made, no more."""
    if output is None:
        return run.folder
    if output.exists() and not output.is_dir():
        raise refusal("package/output-is-file", output=output)
    found, own = output.resolve(), run.folder.resolve()
    if found != own and found.is_relative_to(own):
        raise InputError(f"--output {output} is inside run {run.name!r}.", "a folder outside.", "choose another one.")
    return writable(output)


def check_target(target: Path, root: str, run_name: str) -> None:
    """Refuse to replace what is not an earlier zip of the same run.

    Args:
        root: name of the folder that it unpacks to.

    Raises:
        InputError: another run's package, or another file, has the name.
    """
    if not target.exists():
        return
    try:
        with zipfile.ZipFile(target) as archive:
            found = json.loads(archive.read(f"{root}/{REPORT}"))["run"]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        found = None
    if found != run_name:
        what = f"the package of run {found!r}" if found else "no package of the workbook"
        raise refusal("package/other-zip", target=target, what=what)


def write_zip(folder: Path, names: Iterable[str], target: Path, root: str) -> Path:
    """Pack files of a folder, atomically.

    Names are sorted, times and rights fixed, nothing compressed (weights do not shrink, and compressors differ from
    version to version); files over 4 GB are allowed (ZIP64).

    Args:
        names: relative paths of the product's files: what else came into the folder is nobody's to hand on.
        root: name of the folder that the zip unpacks to.
    """
    paths = sorted(folder / name for name in names)
    total = sum(path.stat().st_size for path in paths)
    require_space(target.parent, total, target.name)
    with (
        atomic_path(target, alone=True) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
        Progress(f"packing {target.name}, MB", max(1, round(total / 1e6))) as progress,
    ):
        for path in paths:
            info = zipfile.ZipInfo(f"{root}/{path.relative_to(folder).as_posix()}", _TIME)
            info.create_system, info.external_attr, info.file_size = 3, _MODE, path.stat().st_size
            with path.open("rb") as source, archive.open(info, "w") as packed:
                shutil.copyfileobj(source, packed, CHUNK)
            progress.advance(round(info.file_size / 1e6))
    return target
