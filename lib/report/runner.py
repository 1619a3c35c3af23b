"""Run the notebooks of a parameter file in order, one process each, and publish their pages."""

from __future__ import annotations

import ast
import contextlib
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lib import settings as lib_settings
from lib.errors import InputError, Terminated
from lib.report import execute, html, index, unchanged
from lib.report.html import duration
from lib.report.index import Stage, summarise
from lib.report.sentences import sentence
from lib.runs.files import PROJECT, locked, reports_folder, require_space, writable, write_json, write_text
from lib.runs.manifest import NOTEBOOK_OF
from lib.runs.run import open_run
from lib.scoring.term_lists import SHIPPED_TERMS, read_prompts, read_terms
from lib.settings import Settings

# Around a report: alone in its folder, SIGTERM as an exception, progress on the terminal.

DETAIL = "    "
"""How a line of progress inside a notebook begins."""


def check_lists(settings: Settings) -> None:
    """Refuse lists of terms and prompts that cannot be read before hours of training go by.

    Raises:
        InputError: no such list, or one that cannot be used.
    """
    if settings.task != "classification":
        read_terms(settings.terms)
        read_prompts(settings.prompts_file)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Refuse a second report of the same run; remove what a killed one left behind."""
    busy = (f"another process makes the report {folder.name!r}.", "one at a time.", "wait for it, or set run_name.")
    with locked(folder / ".lock", *busy):
        for left in folder.glob(".work-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Turn SIGTERM into an exception while a report runs (in the main thread only, as Python demands)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def to_stderr(line: str) -> None:
    """One line of progress; in a terminal the lines inside a notebook replace one another."""
    if not sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)
        return
    detail = line.startswith(DETAIL)
    shown = line[: shutil.get_terminal_size().columns - 1] if detail else line
    sys.stderr.write(f"\r\033[K{shown}" + ("" if detail else "\n"))
    sys.stderr.flush()


# Run the notebooks of a parameter file in order and publish their pages.
#
# A page is published only when its notebook ran to the last cell and the page passes `lib.report.html`. Before the
# first notebook starts, the pages that will be made anew are removed, so that no old page is taken for a current one.

PATTERN = "[0-9][0-9]_*.ipynb"
TIMEOUT = 24 * 3600.0
"""Seconds a notebook may take unless the caller says otherwise."""

PATHS = ("dataset", "base_model", "adapter", "terms", "prompts_file")
"""Keys whose value may be a path."""

Say = Callable[[str], None]


class ReportError(RuntimeError):
    """A notebook did not run to its end, or its page has problems.

    Attributes:
        stage: the notebook's stem.
        exit_code: 2 for refused input, 143 when the kernel was ended by SIGTERM, 1 otherwise.
        detail: last lines of the traceback or log; empty for refused input.
        evidence: the partial notebook or page; None when nothing was written.
    """

    def __init__(self, stage: str, failure: execute.Failure, evidence: Path | None) -> None:
        self.stage, self.exit_code, self.detail, self.evidence = stage, failure.exit_code, failure.detail, evidence
        super().__init__(f"{stage}: {failure.sentence}")


@dataclass(frozen=True)
class Report:
    """A finished report: its run, folder, overview, pages in order, and seconds taken."""

    run: str
    folder: Path
    index: Path
    pages: tuple[Path, ...]
    seconds: float


@dataclass
class _Session:
    """One call of `run_report`: what is fixed while it lasts (titles are read once, before anything runs)."""

    settings: lib_settings.Settings
    folder: Path
    notebooks: list[Path]
    timeout: float
    say: Say

    def __post_init__(self) -> None:
        self.titles = [index.read_stage(notebook) for notebook in self.notebooks]

    @property
    def run_name(self) -> str:
        return self.settings.run_name

    def stages(self) -> list[Stage]:
        return [replace(stage, exists=(self.folder / f"{stage.name}.html").is_file()) for stage in self.titles]

    def write_indexes(self, state: str = "") -> Path:
        overview = index.write_run_index(self.folder, summarise(open_run(self.run_name)), self.stages(), state)
        index.write_all_index(self.folder.parent, len(self.notebooks))
        return overview


def find_notebooks(folder: Path) -> list[Path]:
    """The numbered notebooks in order.

    Raises:
        InputError: there are none.
    """
    found = sorted(folder.glob(PATTERN))
    if not found:
        raise InputError(f"no notebook NN_name.ipynb in {folder}.", "the seven notebooks.", "run in a clone.")
    return found


def _position(notebooks: list[Path], option: str, given: str | None, default: int) -> int:
    """Position of the notebook that an option names, as '04', '4' or '04_merge'."""
    if given is None:
        return default
    wanted = given.removesuffix(".ipynb")
    number = wanted.zfill(2) if wanted.isdigit() else wanted
    for position, notebook in enumerate(notebooks):
        if number in (notebook.stem, notebook.stem[:2]):
            return position
    names = ", ".join(n.stem for n in notebooks)
    raise InputError(f"{option} {given!r}.", f"one of {names}, or its number.", f"use e.g. {option} 04.")


def _with_absolute_paths(settings: lib_settings.Settings) -> lib_settings.Settings:
    """Paths that exist from the current directory only, made absolute: notebooks run in the project's root."""

    def absolute(text: Any) -> Any:
        path = Path(str(text)).expanduser()
        only_here = text and not path.is_absolute() and path.exists() and not (PROJECT / path).exists()
        return str(path.resolve()) if only_here else text

    found: dict[str, Any] = {key: absolute(getattr(settings, key)) for key in PATHS}
    found["terms"] = settings.terms if settings.terms in SHIPPED_TERMS else found["terms"]
    found["fallbacks"] = [
        {key: absolute(value) if key in PATHS else value for key, value in entry.items()}
        for entry in settings.fallbacks
    ]
    return settings.model_copy(update=found)


def declared(notebook: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Those of `values` that the notebook's parameters cell declares.

    The cell is parsed here: papermill's own inspection overlooks a line whose comment holds an equals sign.

    Raises:
        InputError: it declares a key that the workbook does not know, or has no readable parameters cell.
    """
    import nbformat

    cells = nbformat.read(notebook, as_version=4).cells
    sources = [c.source for c in cells if "parameters" in c.metadata.get("tags", [])]
    try:
        statements = ast.parse("\n".join(sources)).body
    except SyntaxError as error:
        raise InputError(
            f"the parameters cell of {notebook.name} is no Python ({error.msg}).", "assignments.", "correct that cell."
        ) from None
    targets = [s.target for s in statements if isinstance(s, ast.AnnAssign)]
    targets += [target for s in statements if isinstance(s, ast.Assign) for target in s.targets]
    keys = [target.id for target in targets if isinstance(target, ast.Name)]
    unknown = sorted(set(keys) - set(values))
    if unknown:
        raise InputError(
            f"{notebook.name} declares {', '.join(unknown)}.", "parameters of lib.settings.", "correct that cell."
        )
    return {key: values[key] for key in keys}


def run_report(
    params_file: Path | str,
    overrides: dict[str, Any] | None = None,
    start_from: str | None = None,
    *,
    end_at: str | None = None,
    notebooks: Path | None = None,
    timeout: float = TIMEOUT,
    say: Say = to_stderr,
    rerun: bool = False,
) -> Report:
    """Execute the notebooks with a parameter file and publish reports/<run>/.

    Args:
        params_file: flat YAML, see `lib.settings`.
        overrides: keys that replace those of the file.
        start_from: number or name of the first notebook to execute; earlier pages stay as they are.
        end_at: the same of the last one; pages of later ones are removed.
        notebooks: folder of the notebooks (default: the project's).
        timeout: seconds that one notebook may take.
        say: called with every line of progress.
        rerun: execute also the notebooks whose pages are unchanged (`lib.report.unchanged`).

    Raises:
        InputError: refused before anything ran.
        ReportError: a notebook failed; later ones did not run, and no page of it or of a later one is left.
        KeyboardInterrupt, Terminated: interrupted; the running notebook and all its children were ended.
    """
    settings = _with_absolute_paths(lib_settings.load(params_file, overrides))
    check_lists(settings)
    found = find_notebooks(notebooks or PROJECT / "notebooks")
    first, last = _position(found, "--from", start_from, 0), _position(found, "--to", end_at, len(found) - 1)
    if last < first:
        raise InputError(f"--from {start_from} --to {end_at}.", "the first before the last.", "exchange them.")
    folder = reports_folder() / settings.run_name
    session = _Session(settings, folder, found, timeout, say)
    values = settings.model_dump()
    parameters = {n: declared(n, values) for n in found[first : last + 1]}
    require_space(writable(folder), 64 << 20, "the report")
    started = time.monotonic()
    with alone(folder), sigterm_raises():
        kept = 0 if rerun else _unchanged(session, first, last, parameters)
        if doomed := [n for n in found[first + kept :] if (folder / f"{n.stem}.html").exists() or n in parameters]:
            _remove_pages(session, doomed)
        for position, notebook in enumerate(found[first + kept : last + 1], first + kept):
            _stage(session, position, parameters[notebook])
        _render_again(session)
        overview = session.write_indexes()
    made = tuple(folder / f"{n.stem}.html" for n in found if (folder / f"{n.stem}.html").is_file())
    return Report(settings.run_name, folder, overview, made, time.monotonic() - started)


def _unchanged(session: _Session, first: int, last: int, parameters: dict[Path, dict[str, Any]]) -> int:
    """How many pages from the first on stay as they are; behind one that is made anew, all are."""
    for position in range(first, last + 1):
        notebook = session.notebooks[position]
        page = session.folder / f"{notebook.stem}.html"
        if not unchanged.unchanged_page(page, notebook, parameters[notebook], open_run(session.run_name)):
            return position - first
        head = f"[{position + 1}/{len(session.notebooks)}] {notebook.stem}"
        session.say(f"{head}: unchanged, no kernel started (--rerun starts it)")
    return last + 1 - first


def _remove_pages(session: _Session, notebooks: list[Path]) -> None:
    """Remove what an earlier report left of these notebooks; say in the overview that a report is being made."""
    for notebook in notebooks:
        page = session.folder / f"{notebook.stem}.html"
        for path in (unchanged.record_of(page), page, page.with_suffix(".ipynb")):
            path.unlink(missing_ok=True)
    (session.folder / unchanged.RENDERED).unlink(missing_ok=True)
    shutil.rmtree(session.folder / "partial", ignore_errors=True)
    session.write_indexes(sentence("index.being_made"))


def _stage(session: _Session, position: int, parameters: dict[str, Any]) -> None:
    """Execute and publish one notebook."""
    notebook = session.notebooks[position]
    head = f"[{position + 1}/{len(session.notebooks)}] {notebook.stem}"
    session.say(head)
    try:
        with tempfile.TemporaryDirectory(prefix=".work-", dir=session.folder) as name:
            work = Path(name)
            executed = work / notebook.name
            try:
                ended = execute.execute(
                    notebook, executed, parameters, work, session.timeout, lambda line: session.say(f"{DETAIL}{line}")
                )
                failure = execute.judge(executed, ended, session.timeout) or _without_product(session, notebook.stem)
                if failure:
                    raise ReportError(notebook.stem, failure, None)
                _publish(session, executed, work)
            except BaseException as error:
                evidence = _keep(session.folder, [executed, work / f"{notebook.stem}.html"])
                if isinstance(error, ReportError):
                    error.evidence = evidence
                raise
    except BaseException as error:
        session.write_indexes(_state(notebook.stem, error))
        _render_again(session)
        raise
    page = session.folder / f"{notebook.stem}.html"
    unchanged.remember_page(page, notebook, parameters, open_run(session.run_name))
    session.say(f"{head}: done in {duration(ended.seconds)}")


def _without_product(session: _Session, stage: str) -> execute.Failure | None:
    """A stage that ran to its end without leaving its product is a failure too."""
    wanted = next((product for product, notebook in NOTEBOOK_OF.items() if notebook == stage), None)
    if wanted is None or wanted in open_run(session.run_name).manifest.entries():
        return None
    return execute.Failure(f"it ran to its end, but the product {wanted!r} is not in the manifest.", 1)


def _state(stage: str, error: BaseException) -> str:
    """What the overview says of a report that is not complete."""
    why = str(error).removeprefix(f"{stage}: ") if isinstance(error, ReportError) else f"{type(error).__name__}."
    interrupted = isinstance(error, (KeyboardInterrupt, Terminated))
    return sentence("index.stopped", stage=stage, why=why, interrupted=interrupted)


def _keep(folder: Path, files: list[Path]) -> Path | None:
    """Move what there is of a failed stage to partial/; returns the notebook there, or None."""
    partial = folder / "partial"
    kept = []
    for file in files:
        if file.is_file():
            partial.mkdir(exist_ok=True)
            kept.append(file.replace(partial / file.name))
    return kept[0] if kept else None


def _publish(session: _Session, executed: Path, work: Path) -> None:
    """Render, check, and only then put page and executed notebook into the report."""
    name = executed.stem
    stages = [replace(s, exists=s.exists or s.name == name) for s in session.stages()]
    text = html.render(executed, summarise(open_run(session.run_name)), stages)
    if found := html.problems_in(text):
        (work / f"{name}.html").write_text(text, encoding="utf-8")
        raise ReportError(name, execute.Failure(f"its page contains {', '.join(found)}.", 1), None)
    executed.replace(session.folder / executed.name)
    write_text(session.folder / f"{name}.html", text)


def _render_again(session: _Session) -> None:
    """Give every page the links and stamps that are known only now; nothing is executed."""
    summary, stages = summarise(open_run(session.run_name)), session.stages()
    state = unchanged.rendered_state(summary, stages)
    if unchanged.is_rendered(session.folder, state):
        return
    for stage in stages:
        executed = session.folder / f"{stage.name}.ipynb"
        if stage.exists and executed.is_file():
            write_text(session.folder / f"{stage.name}.html", html.render(executed, summary, stages))
    write_json(session.folder / unchanged.RENDERED, state)
