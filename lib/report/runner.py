"""Run the notebooks of a parameter file in order, one process each, and publish their pages."""

from __future__ import annotations

import ast
import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from statistics import mean
from typing import Any

from lib import settings as lib_settings
from lib.errors import InputError, Terminated, closed_to_reading, refusal, refusing, sigterm_raises
from lib.language import language, told, use
from lib.progress import tell_rarely
from lib.report import execute, html, index
from lib.report.html import duration
from lib.report.index import Stage, summarise
from lib.report.sentences import sentence
from lib.report.unchanged import RENDERED, library, record_of, remember_page, unchanged_page
from lib.runs import files
from lib.runs.locks import locked
from lib.runs.manifest import NOTEBOOK_OF
from lib.runs.run import Run, open_run
from lib.scoring.word_lists import SHIPPED_PROMPTS, SHIPPED_TERMS, prompt_set, read_prompts, read_terms
from lib.settings import OFFLINE_BASE, SAMPLES, Settings
from lib.stages.finetune.stage import made_with

# Around a report: alone in its folder, progress on the terminal.

DETAIL = "    "
"""How a line of progress inside a notebook begins."""


def to_stderr(line: str) -> None:
    """One line of progress; in a terminal the lines inside a notebook replace one another."""
    detail = line.startswith(DETAIL)
    if not sys.stderr.isatty():
        tell_rarely(line) if detail else print(line, file=sys.stderr, flush=True)
        return
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
    "dataset": tuple(SAMPLES),
    "base_model": (OFFLINE_BASE,),
    "adapter": (),
    "terms": SHIPPED_TERMS,
    "prompts_file": SHIPPED_PROMPTS,
    "imatrix": ("none", "auto"),
}
"""Keys whose value may be a path, and the words that are none, whatever files there are."""

CHAIN = ("data", "adapter", "merged", "gguf", "quantized", "exports")  # products that later notebooks build on

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

    def __init__(self, settings: Settings, notebooks: list[Path], last: Path, timeout: float, say: Say) -> None:
        self.run, self.finetuning_type = open_run(settings.run_name), settings.finetuning_type
        self.full = settings.detail == "full"
        self.notebooks, self.last, self.timeout = notebooks, last, timeout
        self.say, self.detail = say, lambda line: say(f"{DETAIL}{line}")
        self.folder = files.reports_folder() / self.run.name
        self.titles = [index.read_stage(notebook, self.finetuning_type) for notebook in notebooks]

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
        InputError: a list or a matrix that cannot be read, a tracker or 4-bit layers that a training needs and that are
            not here: refused before hours of training go by.
    """
    from lib.stages.finetune.stage import refuse_absent
    from lib.stages.quantize.calibration import matrix_file

    def absolute(key: str, text: Any) -> Any:
        if not text or text in PATHS.get(key, (text,)):
            return text
        found = files.user_path(str(text))
        return str(found) if text[0] == "~" or (found.exists() and found != (files.PROJECT / text).resolve()) else text

    matrix_file(settings)
    refuse_absent(settings)
    if settings.task != "classification":
        read_terms(settings.terms)
        read_prompts(prompt_set(settings))
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
            now["seed"], made = settings.training_seed, made_with(made)
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
    use(settings.language)
    found = find_notebooks(notebooks or files.PROJECT / "notebooks")
    first, last = _position(found, "--from", start_from, 0), _position(found, "--to", end_at, len(found) - 1)
    if last < first:
        raise InputError(f"--from {start_from} --to {end_at}.", "the first before the last.", "exchange them.")
    if any(notebook.stem.startswith("06") for notebook in found[first : last + 1]):
        refuse_quantized(settings)
    session = _Session(settings, found, found[last], timeout, say)
    _refuse_other_settings(session.run, settings, found[first].stem if first else "")
    parameters = {n: declared(n, settings.model_dump()) for n in found[first : last + 1]}
    files.require_space(files.writable(session.folder), 64 << 20, "the report")
    started = time.monotonic()
    found_busy = f"another process makes the report {settings.run_name!r}."
    alone = locked(session.folder / ".lock", found_busy, "one at a time.", "wait for it, or set run_name.")
    with alone, sigterm_raises():
        for left in session.folder.glob(".work-*"):  # of a killed report
            shutil.rmtree(left, ignore_errors=True)
        # behind a page that is made anew, all are
        kept = [] if rerun else list(takewhile(lambda n: session.unchanged(n, parameters[n]), parameters))
        to_make = [n for n in parameters if n not in kept]
        if doomed := [n for n in found[first + len(kept) :] if session.page(n).exists() or n in to_make]:
            _remove_pages(session, doomed)
        for notebook in to_make:
            if notebook.stem == NOTEBOOK_OF["adapter"]:
                _say_expected(session, settings, to_make[-1])
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
    from lib.stages.convert.official import check_conversion

    data = run.manifest.entries().get("data")
    try:
        if data is not None and not data.facts.get("offline_base"):
            check_conversion(base_of(run).path, as_base=True)
    except InputError as error:
        raise ReportError(name, execute.Failure(str(error), 2)) from None


def _say_expected(session: _Session, settings: Settings, last: Path) -> None:
    """Roughly what the rest takes: 01 knows the rows, and this machine is measured for a second or two.

    A model or data that cannot be read is left to the notebook that will read it.
    """
    from lib.models.base_model import base_of
    from lib.models.language_model import known_shapes
    from lib.pipeline import resources
    from lib.stages.data.stage import DataResult

    data = session.run.manifest.entries().get("data")
    if data is None:
        return
    try:
        model = OFFLINE_BASE if data.facts["offline_base"] else str(base_of(session.run).path)
        shapes = known_shapes(resources.configuration(model)[0])
        lengths = DataResult.read(session.run.require("data")).lengths.values()
    except (InputError, KeyError, OSError):
        return
    tokens = mean(min(length, settings.max_seq_length) for of_split in lengths for length in of_split)
    takes = resources.expected(settings, shapes, data.facts["rows"], download=False, patience=1.0, tokens=tokens)
    disk = sum(takes.disk.values()) / 1e9
    session.say(sentence("index.expected", last=last.stem, time=takes.time, disk=disk))


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
            kind, source = session.finetuning_type, notebook
            if kind in index.INSTEAD:
                source = index.write_reduced(notebook, work / "source.ipynb", kind)
            ended = execute.execute(source, executed, parameters, work, session.timeout, session.detail)
            if failure := execute.judge(executed, ended, session.timeout) or _without_product(session, name):
                raise ReportError(name, _refused(failure, work) or failure)
            # Rendered and checked before anything of it is put into the report.
            stages = [replace(s, exists=s.exists or s.name == name) for s in session.stages()]
            text = html.render(executed, summarise(session.run), stages, session.full)
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
                session.write_indexes(sentence("index.stopped", stage=name, why=told(why), interrupted=interrupted))
                _render_again(session)
            raise
    remember_page(page, notebook, parameters, session.run)
    session.say(told(f"{session.head(notebook)}: done in {duration(ended.seconds)}"))


def _refused(failure: execute.Failure, folder: Path) -> execute.Failure | None:
    """A notebook that failed because the disk is full, also where its log could not say so; or an input is closed."""
    if failure.exit_code != execute.RAISED:
        return None
    said = f"{failure.sentence} {failure.detail}"
    words = said if files.free_space(folder) > 1 << 20 else files.NO_SPACE[0]
    refused = files.disk_error(words, folder.parent) or closed_to_reading(said)
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
    state = {"library": library(), "run": files.sha256_json([repr(summary), repr(stages), session.full, language()])}
    if files.object_or_empty(session.folder / RENDERED) == state:
        return
    for stage in stages:
        executed = session.folder / f"{stage.name}.ipynb"
        if stage.exists and executed.is_file():
            files.write_text(
                session.folder / f"{stage.name}.html", html.render(executed, summary, stages, session.full)
            )
    files.write_json(session.folder / RENDERED, state)
