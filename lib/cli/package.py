"""`workbook package` and `workbook serve`: what is passed on, and what answers on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lib.cli.console import Json, Threads, show, tell
from lib.errors import InputError


def package(
    run_name: Annotated[str, typer.Argument(help="name of a run that was compared (01 to 07)", metavar="RUN")],
    type_name: Annotated[
        str | None, typer.Option("--type", help="quantization type [default: as the comparison recommends]")
    ] = None,
    formats: Annotated[
        str, typer.Option(help="also folders, joined by commas: merged_model, fp16, int8, int4, gguf", metavar="NAMES")
    ] = "",
    output: Annotated[Path | None, typer.Option(help="folder for the zip [default: the run's]", metavar="DIR")] = None,
    web: Annotated[bool, typer.Option("--web", help="add a page that runs the file in a phone's browser")] = False,
    rows: Annotated[
        Path | None,
        typer.Option(help="with --web: texts that a phone is checked by, one a line or JSONL", metavar="FILE"),
    ] = None,
    n_threads: Threads = 0,
    force: Annotated[bool, typer.Option("--force", help="make it again even if nothing changed")] = False,
    as_json: Json = False,
) -> None:
    """Pack the recommended file, or the one of --type, so that somebody else can use and check it."""
    from lib.runs.run import open_run
    from lib.stages.package.stage import package as make
    from lib.stages.package.stage import read_formats

    if rows and not web:
        raise InputError("--rows without --web.", "both, or neither.", "add --web.")
    made = make(open_run(run_name), type_name, read_formats(formats), output, n_threads, force, web, rows)
    report, standing = made.report, made.report["choice"]["standing"]
    names = {"file": report["file"]["name"], "type": report["file"]["type"], "standing": standing}
    result = {"run": run_name, "folder": str(made.product.path), "zip": str(made.archive), **names}
    result |= {key: report[key] for key in ("page_rows", "notes")}
    lines = [made.product.message, f"{names['type']}: {standing}. {report['choice']['words']}"]
    if report["page_rows"]:
        lines.append(f"The phone page checks itself by {report['page_rows']}.")
    show(result, as_json, "\n".join([*lines, str(made.archive)]))


def serve(
    model: Annotated[
        Path,
        typer.Argument(
            help="GGUF file with a chat template; with --phone a run or a package's folder", metavar="FILE.gguf"
        ),
    ],
    host: Annotated[str, typer.Option(help="address; others than 127.0.0.1 let the network in")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 = any free one", min=0, max=65535)] = 8080,
    n_ctx: Annotated[int, typer.Option(help="tokens of prompt and answer; 0 = the file's, at most 4096", min=0)] = 0,
    max_tokens: Annotated[int, typer.Option(help="most tokens of an answer", min=1)] = 1024,
    thinking: Annotated[bool, typer.Option("--thinking", help="let a template that knows both ways reason")] = False,
    n_gpu_layers: Annotated[int, typer.Option(help="layers on the GPU; -1 = all", min=-1)] = 0,
    n_threads: Threads = 0,
    phone: Annotated[
        bool, typer.Option("--phone", help="serve a package's page for a phone's browser instead")
    ] = False,
    cert: Annotated[
        Path | None, typer.Option(help="with --phone: certificate, PEM; then https", metavar="FILE")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="with --phone: its key, PEM", metavar="FILE")] = None,
) -> None:
    """Serve a GGUF file under /v1 by llama-cpp-python's server, with the file's template, until Ctrl-C or SIGTERM."""
    if phone:
        _serve_page(str(model), host, port, cert, key)
        return
    from lib.serve.openai import ServeOptions
    from lib.serve.openai import serve as run

    run(model, ServeOptions(host, port, n_ctx, max_tokens, n_threads, n_gpu_layers, thinking), tell)


def _serve_page(name: str, host: str, port: int, cert: Path | None, key: Path | None) -> None:
    """A package's folder: of a run, or as somebody unpacked it; results are kept beside it, never in what is served."""
    from lib.runs.run import known_run
    from lib.serve.phone import PhoneOptions, serve_phone
    from lib.stages.compare.speed import FOLDER

    folder = Path(name)
    if folder.is_dir() and (folder / "model_info.json").is_file():
        package = folder.resolve()
        own = package.name == "package" and (package.parent / "manifest.json").is_file()
        devices = package.parent / FOLDER if own else package.with_name(f"{package.name}-{FOLDER}")
    else:
        run = known_run(name)
        package, devices = run.require("package").path, run.folder / FOLDER
    serve_phone(package, devices, PhoneOptions(host, port, cert, key), tell)
