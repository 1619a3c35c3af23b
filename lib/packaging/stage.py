"""The stage `package`: the file to ship with everything that its user needs, product `package`, and a zip of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.models.tasks import read_task
from lib.packaging.card import card, export_report
from lib.packaging.checks import TOLERANCE, TOLERANCE_SHARE, model_info, stops
from lib.packaging.choosing import Choice, choose
from lib.packaging.facts import Facts, gather
from lib.packaging.guide import guide
from lib.packaging.linking import inputs_of, link, link_tree
from lib.packaging.modelfile import modelfile
from lib.packaging.requirements import requirements
from lib.packaging.turns import read_turns
from lib.packaging.web import FOLDER, WebRequest, request_web, write_web
from lib.packaging.zipping import check_target, write_zip
from lib.run import Product, Run, Work
from lib.run.files import read_json, sha256_file, write_json, write_text
from lib.run.folders import writable
from lib.run.manifest import hash_folder

SUMS, INFO, REPORT = "SHA256SUMS", "model_info.json", "export_report.json"
_SCRIPTS = Path(__file__).with_name("scripts")
_FORMAT = 4
"""Raised when the package's content changes, so that an older one is made again."""
_SECONDS = 900

_CONTENTS = {
    "Modelfile": "for Ollama: template, system turn, stops",
    "deployment_guide.md": "phones, desktop, server",
    "usage_examples.py": "chat, streaming, labels with scores; folders for transformers where present",
    "test_model.py": "checks files, token ids, answers and margins; exit code 0 or 1",
    "requirements.txt": "the versions with which it was tested",
    INFO: "prompt, labels, and stored answers for test_model.py",
    REPORT: "this card for machines",
    SUMS: "SHA-256 of every other file",
}


@dataclass(frozen=True)
class PackageResult:
    """The package of a run.

    Attributes:
        product: its folder.
        archive: the zip.
        file: name of the GGUF file; type: its quantization type.
        standing, words: what the evidence says of the choice.
        report: content of export_report.json.
    """

    product: Product
    archive: Path
    file: str
    type: str
    standing: str
    words: str
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
) -> PackageResult:
    """Make the product `package`, or skip it when nothing changed, and pack it.

    Args:
        wanted: quantization type; None = the recommendation of the run's comparison.
        formats: folders of the export tree that are added (see `lib.packaging.linking`).
        output: folder for the zip; None = the run's.
        web: whether web/, the page for a phone's browser, is added; rows: texts that it checks itself by (see
            `lib.packaging.web.request_web`).

    Raises:
        InputError: nothing is recommended and `wanted` is None; a missing product or format; an unfit chat template;
            what the page is made of is not there; an `output` that cannot take the zip.
        RuntimeError: the package's own test_model.py fails.
    """
    target = _zip_folder(run, output)
    comparison = read_json(run.require("comparison").path / "comparison.json")
    choice = choose(run, comparison, wanted)
    request = request_web(run, rows) if web else None
    parameters = {"package_format": _FORMAT, "type": choice.type, "formats": list(formats)}
    product = run.produce(
        "package",
        lambda work: _build(run, work, choice, comparison, formats, n_threads, request),
        parameters=parameters | (request.parameters() if request else {}),
        inputs=("data", "gguf", "quantized", "comparison", *inputs_of(formats)),
        force=force,
    )
    report = read_json(product.path / REPORT)
    title = report["file"]["name"].removesuffix(".gguf")
    archive = target / f"{title}.zip"
    check_target(archive, title, REPORT, run.name)
    write_zip(product.path, product.entry.outputs, archive, title)
    return PackageResult(product, archive, report["file"]["name"], choice.type, choice.standing, choice.words, report)


def _zip_folder(run: Run, output: Path | None) -> Path:
    """The folder for the zip, writable, and none of the run's own: a product holds what its stage made, no more."""
    if output is None:
        return run.folder
    if output.exists() and not output.is_dir():
        raise InputError(
            f"--output {output} is a file.", "a folder; the zip's name is that of the GGUF file.", "name the folder."
        )
    found, own = output.resolve(), run.folder.resolve()
    if found != own and found.is_relative_to(own):
        raise InputError(f"--output {output} is inside run {run.name!r}.", "a folder outside.", "choose another one.")
    return writable(output)


def _build(
    run: Run,
    work: Work,
    choice: Choice,
    comparison: dict[str, Any],
    formats: Sequence[str],
    n_threads: int,
    request: WebRequest | None,
) -> None:
    from lib.models.loading import load_tokenizer

    data = run.require("data").path
    task, tokenizer, folder = read_task(data), load_tokenizer(data / "tokenizer"), work.folder
    turns = read_turns(tokenizer, getattr(task, "thinking", False))
    facts = gather(run, choice, task, comparison)
    facts = replace(facts, tree=link_tree(run, formats, folder))
    gguf = folder / facts.file
    link(choice.source, gguf)
    digest = sha256_file(gguf)
    info = model_info(facts, turns, tokenizer, gguf, digest, n_threads)
    write_json(folder / INFO, info)
    text, notes = modelfile(
        facts.file, turns, task.system_prompt, stops(tokenizer), facts.labelled, facts.n_ctx, facts.most
    )
    write_text(folder / "Modelfile", text)
    if request:
        source = write_web(request, facts, info, turns, tokenizer, folder, n_threads)
        facts = replace(facts, page_rows=source)
    _write_documents(facts, folder, run.folder / "merged", digest, len(info["checks"]))
    _write_sums(folder)
    _prove(folder)
    work.facts |= {"file": facts.file, "type": choice.type, "standing": choice.standing, "formats": list(formats)}
    work.metrics |= {"bytes": facts.bytes, "checks": len(info["checks"])}
    work.notes += notes


def _write_documents(facts: Facts, folder: Path, merged: Path, sha256: str, checks: int) -> None:
    contents = {facts.file: f"the model, {facts.bytes / 1e6:.2f} MB", **_CONTENTS}
    for name in ("LICENSE", "NOTICE"):  # of the base model, where it brought them
        if (merged / name).is_file():
            shutil.copyfile(merged / name, folder / name)
            contents[name] = "of the base model"
    contents |= {f"{name}/": what for name, what in facts.tree.items()}
    if facts.page_rows:
        contents[f"{FOLDER}/"] = (
            f"a page that runs the model in a phone's browser; it checks itself by {facts.page_rows}"
        )
    write_text(folder / "README.md", card(facts, contents))
    write_text(folder / "deployment_guide.md", guide(facts))
    write_text(folder / "requirements.txt", requirements(facts.tree, _packages(facts)))
    write_json(folder / REPORT, export_report(facts, sha256, checks, TOLERANCE, TOLERANCE_SHARE))
    for name in ("test_model.py", "usage_examples.py"):
        shutil.copyfile(_SCRIPTS / name, folder / name)


def _packages(facts: Facts) -> list[str]:
    """What the folders for transformers need beside torch and transformers."""
    kinds = {what.partition(":")[0] for what in facts.tree.values()}
    bits = ["bitsandbytes"] if kinds & {"int8", "nf4"} else []
    return bits + (["compressed_tensors"] if "gptq" in kinds else [])


def _write_sums(folder: Path) -> None:
    """SHA256SUMS, as sha256sum -c reads it."""
    outputs = hash_folder(folder)
    lines = (f"{output['sha256']}  {name}\n" for name, output in outputs.items() if not name.startswith("."))
    write_text(folder / SUMS, "".join(lines))


def _prove(folder: Path) -> None:
    """Run the package's own test: what it refuses is not published."""
    command = [sys.executable, "-I", "-B", "test_model.py"]
    answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS)
    if answer.returncode:
        raise RuntimeError(f"the package's own test_model.py fails:\n{(answer.stdout + answer.stderr)[-2000:]}")
