"""Run the notebooks of a parameter file in order, one process each, and publish their pages."""

from __future__ import annotations

import ast
import contextlib
import functools
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from lib import settings as lib_settings
from lib.errors import InputError, Terminated, refusal, refusing, sigterm_raises
from lib.report import execute, html, index
from lib.report.html import duration
from lib.report.index import Stage, summarise
from lib.report.sentences import sentence
from lib.runs import files
from lib.runs.manifest import NOTEBOOK_OF, versions
from lib.runs.run import Run, open_run
from lib.scoring.text_metrics import SHIPPED_TERMS, read_prompts, read_terms
from lib.select.choice import BEST_OF
from lib.settings import OFFLINE_BASE, SAMPLE_DATASET, Settings
from lib.stages.compare.speed import FOLDER as PHONES

# Around a report: alone in its folder, progress on the terminal.

DETAIL = "    "
"""How a line of progress inside a notebook begins."""


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

PATHS: dict[str, Sequence[str]] = {
    "dataset": (SAMPLE_DATASET,),
    "base_model": (OFFLINE_BASE,),
    "adapter": (),
    "terms": SHIPPED_TERMS,
    "prompts_file": (),
    "imatrix": ("none", "auto"),
}
"""Keys whose value may be a path, and the words that are none, whatever files there are."""

CHAIN = ("data", "adapter", "merged", "gguf", "quantized", "exports")
"""Products that later notebooks build on."""

Say = Callable[[str], None]


class ReportError(RuntimeError):
    """A notebook did not run to its end, or its page has problems.

    Attributes:
        stage: the notebook's stem.
        failure: why it failed.
        exit_code: 2 for refused input, 143 when the kernel was ended by SIGTERM, 1 otherwise.
        detail: last lines of the traceback or log; empty for refused input.
        evidence: the partial notebook or page; None when nothing was written.
    """

    evidence: Path | None = None

    def __init__(self, stage: str, failure: execute.Failure) -> None:
        self.stage, self.failure, self.exit_code, self.detail = stage, failure, failure.exit_code, failure.detail
        super().__init__(f"{stage}: {failure.sentence}")


@dataclass(frozen=True)
class Report:
    """A finished report: its run, folder, overview, pages in order, and seconds taken."""

    run: str
    folder: Path
    index: Path
    pages: tuple[Path, ...]
    seconds: float


class _Session:
    """One call of `run_report`: what is fixed while it lasts (titles are read once, before anything runs)."""

    def __init__(self, run: Run, notebooks: list[Path], last: Path, timeout: float, say: Say) -> None:
        self.run, self.notebooks, self.last, self.timeout, self.say = run, notebooks, last, timeout, say
        self.folder = files.reports_folder() / run.name
        self.titles = [index.read_stage(notebook) for notebook in notebooks]

    def page(self, notebook: Path) -> Path:
        """Where the page of a notebook is published, its executed copy beside it."""
        return self.folder / f"{notebook.stem}.html"

    def head(self, notebook: Path) -> str:
        """The notebook in a line of progress."""
        return f"[{self.notebooks.index(notebook) + 1}/{len(self.notebooks)}] {notebook.stem}"

    def stages(self) -> list[Stage]:
        return [replace(stage, exists=(self.folder / f"{stage.name}.html").is_file()) for stage in self.titles]

    def unchanged(self, notebook: Path, parameters: dict[str, Any]) -> bool:
        """Whether its page stays as it is, which is told."""
        same = unchanged_page(self.page(notebook), notebook, parameters, self.run)
        if same:
            self.say(f"{self.head(notebook)}: unchanged, no kernel started (--rerun starts it)")
        return same

    def write_indexes(self, state: str = "") -> Path:
        overview = index.write_run_index(self.folder, summarise(self.run), self.stages(), state)
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


def ready(settings: Settings) -> Settings:
    """Settings whose paths are absolute where notebooks, which run in the project's root, would find another file.

    Raises:
        InputError: a list or a matrix that cannot be read: refused before hours of training go by.
    """
    from lib.stages.quantize.calibration import matrix_file

    def absolute(key: str, text: Any) -> Any:
        if not text or text in PATHS.get(key, (text,)):
            return text
        found = files.user_path(str(text))
        return str(found) if text[0] == "~" or (found.exists() and found != (files.PROJECT / text).resolve()) else text

    matrix_file(settings)
    if settings.task != "classification":
        read_terms(settings.terms)
        read_prompts(settings.prompts_file)
    found: dict[str, Any] = {key: absolute(key, getattr(settings, key)) for key in PATHS}
    found["fallbacks"] = [{key: absolute(key, value) for key, value in entry.items()} for entry in settings.fallbacks]
    return settings.model_copy(update=found)


def refuse_quantized(settings: Settings) -> None:
    """Refuse, before hours of training go by, a converted file that 06 could not quantize.

    Raises:
        InputError: it is quantized already.
    """
    if settings.outtype == "q8_0":
        raise refusal("report/quantized-outtype")


def _refuse_other_settings(run: Run, settings: Settings, first: str) -> None:
    """Refuse settings of products that notebooks before `first` made otherwise: they would have no effect."""
    for product, entry in run.manifest.entries().items():
        if product not in CHAIN or NOTEBOOK_OF[product] >= first:
            continue
        now, made = settings.model_dump(), entry.parameters
        if product == "adapter":
            now["seed"], made = settings.training_seed, {"adapter": "", **made}
        hashed = ("fallbacks", "imatrix")
        if other := [key for key in made if key in now and key not in hashed and made[key] != now[key]]:
            keys, made_by = ", ".join(other), NOTEBOOK_OF[product]
            raise refusal("report/other-settings", first=first, product=product, run=run, keys=keys, made_by=made_by)


def declared(notebook: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Those of `values` that the notebook's parameters cell declares.

    The cell is parsed here: papermill's own inspection overlooks a line whose comment holds an equals sign.

    Raises:
        InputError: it declares a key that the workbook does not know, or has no readable parameters cell.
    """
    import nbformat

    cells = nbformat.read(notebook, as_version=4).cells
    sources = [c.source for c in cells if "parameters" in c.metadata.get("tags", [])]
    with refusing(SyntaxError, "report/no-parameters-cell", notebook=notebook):
        tree = ast.parse("\n".join(sources))
    keys = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    unknown = sorted(set(keys) - set(values))
    if unknown:
        raise refusal("report/unknown-parameters", notebook=notebook, names=", ".join(unknown))
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
        rerun: execute also the notebooks whose pages are unchanged (`unchanged_page`).

    Raises:
        InputError: refused before anything ran.
        ReportError: a notebook failed; later ones did not run, and no page of it or of a later one is left.
        KeyboardInterrupt, Terminated: interrupted; the running notebook and all its children were ended.
    """
    settings = ready(lib_settings.load(params_file, overrides))
    found = find_notebooks(notebooks or files.PROJECT / "notebooks")
    first, last = _position(found, "--from", start_from, 0), _position(found, "--to", end_at, len(found) - 1)
    if last < first:
        raise InputError(f"--from {start_from} --to {end_at}.", "the first before the last.", "exchange them.")
    if any(notebook.stem.startswith("06") for notebook in found[first : last + 1]):
        refuse_quantized(settings)
    session = _Session(open_run(settings.run_name), found, found[last], timeout, say)
    _refuse_other_settings(session.run, settings, found[first].stem if first else "")
    values = settings.model_dump()
    parameters = {n: declared(n, values) for n in found[first : last + 1]}
    files.require_space(files.writable(session.folder), 64 << 20, "the report")
    started = time.monotonic()
    found_busy = f"another process makes the report {settings.run_name!r}."
    alone = files.locked(session.folder / ".lock", found_busy, "one at a time.", "wait for it, or set run_name.")
    with alone, sigterm_raises():
        for left in session.folder.glob(".work-*"):  # of a killed report
            shutil.rmtree(left, ignore_errors=True)
        # behind a page that is made anew, all are
        kept = [] if rerun else list(takewhile(lambda n: session.unchanged(n, parameters[n]), parameters))
        to_make = [n for n in parameters if n not in kept]
        if doomed := [n for n in found[first + len(kept) :] if session.page(n).exists() or n in to_make]:
            _remove_pages(session, doomed)
        for notebook in to_make:
            _stage(session, notebook, parameters[notebook])
        _render_again(session)
        overview = session.write_indexes()
    made = tuple(page for page in map(session.page, found) if page.is_file())
    return Report(settings.run_name, session.folder, overview, made, time.monotonic() - started)


def _remove_pages(session: _Session, notebooks: list[Path]) -> None:
    """Remove what an earlier report left of these notebooks; say in the overview that a report is being made."""
    for page in map(session.page, notebooks):
        for path in (record_of(page), page, page.with_suffix(".ipynb")):
            path.unlink(missing_ok=True)
    (session.folder / RENDERED).unlink(missing_ok=True)
    shutil.rmtree(session.folder / "partial", ignore_errors=True)
    session.write_indexes(sentence("index.being_made"))


def _refuse_unconvertible(run: Run, name: str) -> None:
    """Refuse before a training what notebook 05 would refuse of its base model."""
    from lib.models.base_model import base_of
    from lib.stages.convert.convert import plan_conversion

    data = run.manifest.entries().get("data")
    try:
        if data is not None and not data.facts.get("offline_base"):
            plan_conversion(base_of(run).path)
    except InputError as error:
        raise ReportError(name, execute.Failure(str(error), 2)) from None


def _stage(session: _Session, notebook: Path, parameters: dict[str, Any]) -> None:
    """Execute and publish one notebook; what there is of a failed one is moved to partial/."""
    name, page = notebook.stem, session.page(notebook)
    session.say(session.head(notebook))
    with tempfile.TemporaryDirectory(prefix=".work-", dir=session.folder) as temporary:
        work = Path(temporary)
        executed, draft = work / notebook.name, work / page.name
        try:
            if name == NOTEBOOK_OF["adapter"] and session.last.stem >= NOTEBOOK_OF["gguf"]:
                _refuse_unconvertible(session.run, name)
            ended = execute.execute(
                notebook, executed, parameters, work, session.timeout, lambda line: session.say(f"{DETAIL}{line}")
            )
            if failure := execute.judge(executed, ended, session.timeout) or _without_product(session, name):
                raise ReportError(name, _full_disk(failure, work) or failure)
            # Rendered and checked before anything of it is put into the report.
            stages = [replace(s, exists=s.exists or s.name == name) for s in session.stages()]
            text = html.render(executed, summarise(session.run), stages)
            draft.write_text(text, encoding="utf-8")
            if problems := html.problems_in(text):
                raise ReportError(name, execute.Failure(f"its page contains {', '.join(problems)}.", 1))
            executed.replace(page.with_suffix(".ipynb"))
            files.write_text(page, text)
        except BaseException as error:
            partial, why = session.folder / "partial", f"{type(error).__name__}."
            with contextlib.suppress(OSError):  # on a full disk the overview goes on saying that a report is being made
                made = [file for file in (executed, draft) if file.is_file()]
                if made:
                    partial.mkdir(exist_ok=True)
                kept = [file.replace(partial / file.name) for file in made]
                if isinstance(error, ReportError):
                    why, error.evidence = error.failure.sentence, next(iter(kept), None)
                interrupted = isinstance(error, (KeyboardInterrupt, Terminated))
                session.write_indexes(sentence("index.stopped", stage=name, why=why, interrupted=interrupted))
                _render_again(session)
            raise
    remember_page(page, notebook, parameters, session.run)
    session.say(f"{session.head(notebook)}: done in {duration(ended.seconds)}")


def _full_disk(failure: execute.Failure, folder: Path) -> execute.Failure | None:
    """A notebook that failed because the disk is full, also where its log could not say so."""
    words = f"{failure.sentence} {failure.detail}" if files.free_space(folder) > 1 << 20 else files.NO_SPACE[0]
    refused = files.disk_error(words, folder.parent) if failure.exit_code == execute.RAISED else None
    return execute.Failure(str(refused), 2) if refused else None


def _without_product(session: _Session, stage: str) -> execute.Failure | None:
    """A stage that ran to its end without leaving its product is a failure too."""
    wanted = next((product for product, notebook in NOTEBOOK_OF.items() if notebook == stage), None)
    if wanted is None or wanted in session.run.manifest.entries():
        return None
    return execute.Failure(f"it ran to its end, but the product {wanted!r} is not in the manifest.", 1)


def _render_again(session: _Session) -> None:
    """Give every page the links and stamps that are known only now; nothing is executed."""
    summary, stages = summarise(session.run), session.stages()
    state = {"library": _library(), "run": files.sha256_json([repr(summary), repr(stages)])}
    if files.object_or_empty(session.folder / RENDERED) == state:
        return
    for stage in stages:
        executed = session.folder / f"{stage.name}.ipynb"
        if stage.exists and executed.is_file():
            files.write_text(session.folder / f"{stage.name}.html", html.render(executed, summary, stages))
    files.write_json(session.folder / RENDERED, state)


# Whether a page still shows what its notebook would: then a report answers without starting a kernel for it.
#
# Beside a page lies a record of everything that it depends on. It is written last, so a page without one is made again.

RENDERED = ".rendered.json"
"""Beside the pages: what their links and stamps were made from."""


def record_of(page: Path) -> Path:
    """The file beside a page that says what it was made from."""
    return page.with_name(f".{page.stem}.json")


def page_state(page: Path, notebook: Path, parameters: dict[str, Any], run: Run) -> dict[str, Any]:
    """What a page depends on: its notebook, parameters, the library, packages, products up to its own, local files.

    Files are known by size and time of their last change: reading a model of gigabytes would take longer than the rest.
    """
    products = {
        name: entry.digest for name, entry in run.manifest.entries().items() if NOTEBOOK_OF[name][:2] <= page.stem[:2]
    }
    paths = [run.folder / name for name in products] + [run.folder / PHONES, *_local_files(parameters)]
    return {
        "notebook": files.sha256_file(notebook),
        "parameters": files.sha256_json(parameters),
        "library": _library(),
        "packages": versions(),
        "products": products,
        "files": files.sha256_json([list(_times(path)) for path in paths]),
        "executed": files.sha256_file(page.with_suffix(".ipynb")),
    }


def unchanged_page(page: Path, notebook: Path, parameters: dict[str, Any], run: Run) -> bool:
    """Whether the page is there and nothing that it depends on has changed since it was made."""
    there = all(path.is_file() for path in (page, page.with_suffix(".ipynb")))
    if parameters.get("force") or not there:
        return False
    return files.object_or_empty(record_of(page)) == page_state(page, notebook, parameters, run)


def remember_page(page: Path, notebook: Path, parameters: dict[str, Any], run: Run) -> None:
    """Write the record of a page that has just been made."""
    files.write_json(record_of(page), page_state(page, notebook, parameters, run))


@functools.cache
def _library() -> str:
    """Hash of the sources of lib: code, templates, data."""
    paths = sorted(
        path for path in (files.PROJECT / "lib").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    )
    return files.sha256_json({path.relative_to(files.PROJECT).as_posix(): files.sha256_file(path) for path in paths})


def _local_files(parameters: dict[str, Any]) -> Iterator[Path]:
    """Files and folders of the user's that parameters name; of runs to choose from their manifests."""
    fallbacks = [value for entry in parameters.get("fallbacks", ()) for value in entry.values()]
    for text in filter(lambda value: isinstance(value, str) and value, [*parameters.values(), *fallbacks]):
        if text.startswith(BEST_OF):
            names = text.removeprefix(BEST_OF).split(",")
            yield from (files.runs_folder() / name.strip() / "manifest.json" for name in names)
        elif len(text) < 4096 and "\n" not in text and (path := files.user_path(text)).exists():
            yield path


def _times(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, bytes and time of the last change of a file, or of every file in a folder."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            found = file.stat()
            yield file.name, found.st_size, found.st_mtime_ns
