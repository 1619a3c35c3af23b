"""`workbook package` and `workbook serve`: what is passed on, and what answers on this machine."""

from __future__ import annotations

from pathlib import Path

from lib.cli.console import show, tell
from lib.errors import InputError
from lib.serve.listening import ServeOptions


def package(
    run_name: str,
    type_name: str | None = None,
    unproven: bool = False,
    formats: str = "",
    output: Path | None = None,
    web: bool = False,
    rows: Path | None = None,
    n_threads: int = 0,
    force: bool = False,
    as_json: bool = False,
) -> None:
    """Pack the recommended file, or the one of --type, so that somebody else can use and check it."""
    from lib.runs.run import open_run
    from lib.stages.package.facts import UNPROVEN
    from lib.stages.package.stage import package as make
    from lib.stages.package.stage import read_formats

    if unproven and type_name:
        raise InputError("--unproven with --type.", "one of them.", "leave one of the two out.")
    if rows and not web:
        raise InputError("--rows without --web.", "both, or neither.", "add --web.")
    made = make(
        open_run(run_name),
        UNPROVEN if unproven else type_name,
        read_formats(formats),
        output,
        n_threads,
        force,
        web,
        rows,
    )
    report, standing = made.report, made.report["choice"]["standing"]
    names = {"file": report["file"]["name"], "type": report["file"]["type"], "standing": standing}
    result = {"run": run_name, "folder": str(made.product.path), "zip": str(made.archive), **names}
    result |= {key: report[key] for key in ("page_rows", "notes")}
    lines = [made.product.message, f"{names['type']}: {standing}. {report['choice']['words']}"]
    if report["page_rows"]:
        lines.append(f"The phone page checks itself by {report['page_rows']}.")
    show(result, as_json, "\n".join([*lines, str(made.archive)]))


def serve(model: Path, options: ServeOptions, phone: bool = False) -> None:
    """Serve a GGUF file under /v1 by llama-cpp-python's server, with the file's template, until Ctrl-C or SIGTERM."""
    if phone:
        _serve_page(str(model), options)
        return
    from lib.serve.openai import serve as run

    run(model, options, tell)


def _serve_page(name: str, options: ServeOptions) -> None:
    """A package's folder: of a run, or as somebody unpacked it; results are kept beside it, never in what is served."""
    from lib.runs.run import known_run
    from lib.serve.phone import serve_phone
    from lib.stages.compare.speed import FOLDER

    folder = Path(name)
    if folder.is_dir() and (folder / "model_info.json").is_file():
        package = folder.resolve()
        own = package.name == "package" and (package.parent / "manifest.json").is_file()
        devices = package.parent / FOLDER if own else package.with_name(f"{package.name}-{FOLDER}")
    else:
        run = known_run(name)
        package, devices = run.require("package").path, run.folder / FOLDER
    serve_phone(package, devices, options, tell)
