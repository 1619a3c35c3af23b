"""`workbook package` and `workbook serve`: what is passed on, and what answers on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lib.cli.console import show, speak, tell
from lib.errors import InputError, refusal
from lib.language import AUTO
from lib.progress import say
from lib.serve.listening import ServeOptions

if TYPE_CHECKING:
    from lib.runs.run import Run


def package(
    run_name: str,
    type_name: str | None = None,
    unproven: bool = False,
    formats: str = "",
    output: Path | None = None,
    web: bool = False,
    rows: Path | None = None,
    language: str = AUTO,
    n_threads: int = 0,
    force: bool = False,
    as_json: bool = False,
) -> None:
    """Pack the recommended file, or the one of --type, so that somebody else can use and check it."""
    from lib.runs.run import known_run
    from lib.stages.compare.recommend import reworded
    from lib.stages.package.facts import UNPROVEN
    from lib.stages.package.stage import package as make
    from lib.stages.package.stage import read_formats

    if unproven and type_name:
        raise InputError("--unproven with --type.", "one of them.", "leave one of the two out.")
    if rows and not web:
        raise InputError("--rows without --web.", "both, or neither.", "add --web.")
    speak(language)
    made = make(
        known_run(run_name),
        UNPROVEN if unproven else type_name,
        read_formats(formats),
        output,
        n_threads,
        force,
        web,
        rows,
        export_lacking,
        reworded,
    )
    report, standing = made.report, made.report["choice"]["standing"]
    names = {"file": report["file"]["name"], "type": report["file"]["type"], "standing": standing}
    result = {"run": run_name, "folder": str(made.product.path), "zip": str(made.archive), **names}
    result |= {key: report[key] for key in ("page_rows", "notes")}
    lines = [made.product.message, f"{names['type']}: {standing}. {report['choice']['words']}"]
    if report["page_rows"]:
        lines.append(f"The phone page checks itself by {report['page_rows']}.")
    show(result, as_json, "\n".join([*lines, str(made.archive)]))


def export_lacking(run: Run, formats: Sequence[str]) -> None:
    """Make the export formats that folders of a package need: of several the first that works on this machine."""
    from lib.settings import Settings
    from lib.stages.export.stage import export
    from lib.stages.package.stage import lacking

    for name in formats:
        for kind in lacking(run, [name]).get(name, ()):
            if lacking(run, [name]):
                entry = run.manifest.entries().get("exports")
                asked = dict.fromkeys([*(entry.parameters.get("export_formats", []) if entry else []), kind])
                made = export(Settings(run_name=run.name, export_formats=[*asked]), run)
                say(f"for {name}/: {made.product.message}")


def serve(model: Path, options: ServeOptions, phone: bool = False) -> None:
    """Serve a GGUF file under /v1 by llama-cpp-python's server, with the file's template, until Ctrl-C or SIGTERM."""
    plain, of_page = vars(ServeOptions()), ("cert", "key")
    given = [name for name, value in vars(options).items() if value != plain[name]]
    of_other = [name for name in given if name not in ("host", "port") and (name in of_page) != phone]
    if of_other or (options.key and not options.cert):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in of_other or ["key"])
        raise refusal("cli/of-other-serving", names=names, form="with" if phone else "without")
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
