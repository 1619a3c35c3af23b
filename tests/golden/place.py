"""A temporary folder in which the commands of a recording run, and what they leave there as plain JSON."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.golden import pages, varying
from tests.golden.reduced import ROWS, reduced, totals

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
SHARED = Path(os.environ.get("WORKBOOK_SHARED", PROJECT.parent / "shared"))

FIXED = {
    "COLUMNS": "100",
    "TERMINAL_WIDTH": "100",
    "NO_COLOR": "1",
    "LC_ALL": "C.UTF-8",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
    "OMP_NUM_THREADS": "2",  # sums of floats depend on how many threads add them up
}
DROPPED = re.compile(r"WORKBOOK_|HF_|PYTHON(?!HOME)|COVERAGE|_TYPER|MODELSCOPE")

READ = re.compile(r"\.jsonl?$")
NOT_READ = re.compile(
    r"^manifest\.json$|^package/|(^|/)\.|checkpoints/|tokenizer\.json$|vocab\.json$|resources\.jsonl$"
)
"""Files that are recorded otherwise, that others are made from, or that hold costs alone."""


class SkippedError(Exception):
    """A case that cannot run here, and why."""


class FailedError(Exception):
    """A command that had to end well."""


class Place:
    """The folder `root` with `home` (runs/ and reports/) in it; every run is made once."""

    def __init__(self, root: Path) -> None:
        self.root, self.home = root.resolve(), root.resolve() / "home"
        self.figures = self.root / "figures.jsonl"
        self.home.mkdir()
        self.made: dict[str, Any] = {}
        model = PROJECT / ".cache/smollm2"  # may be a link
        self.names = {str(model.resolve()): "<project>/.cache/smollm2"}
        self.names |= {str(self.home): "<home>", str(self.root): "<work>", str(PROJECT): "<project>"}
        if processor := re.search(r"model name\s*: (.+)", _text("/proc/cpuinfo")):
            self.names[processor[1].strip()] = "<processor>"

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        """That of every command: this project, the hook, nothing of the user's."""
        own = {key: value for key, value in os.environ.items() if not DROPPED.match(key)}
        path = os.pathsep.join([str(HERE / "hook"), str(PROJECT)])
        places = {"WORKBOOK_HOME": str(self.home), "GOLDEN_FIGURES": str(self.figures), "PYTHONPATH": path}
        return {**own, **FIXED, **places, **more}

    def command(self, *given: str | bytes, **options: Any) -> dict[str, Any]:
        """Exit code and output of `workbook GIVEN…`; for the options see `_ended`."""
        code, stdout, stderr = self._ended(*given, **options)
        said = [line for line in stderr.splitlines() if not varying.PROGRESS.search(line)]
        return {"exit": code, "stdout": self._lines(stdout.splitlines()), "stderr": self._lines(said)}

    def json(self, *given: str, **options: Any) -> Any:
        """The JSON that a command prints, steady and reduced.

        Raises:
            FailedError: the command did not end well.
        """
        code, stdout, stderr = self._ended(*given, **options)
        if code != 0:
            raise FailedError(f"{' '.join(given)}: exit code {code}\n{stderr[-4000:]}")
        return self.steady(json.loads(stdout))

    def _ended(
        self,
        *given: str | bytes,
        cwd: Path | None = None,
        timeout: float = 4 * 3600.0,
        more: Mapping[str, str] | None = None,
    ) -> tuple[int | str, str, str]:
        """Exit code ("timeout" when it was ended), stdout and stderr; `more` goes into the environment."""
        process = subprocess.Popen(
            [sys.executable, "-m", "lib.cli", *given],
            cwd=cwd or self.root,
            env=self._environment(more or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        code: int | str
        try:
            out, err = process.communicate(timeout=timeout)
            code = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            code = "timeout"
        return code, out.decode("utf-8", "backslashreplace"), err.decode("utf-8", "backslashreplace")

    def _lines(self, lines: Sequence[str]) -> list[str]:
        return [varying.text(line, self.names) for line in lines if line.strip()]

    def steady(self, value: Any) -> Any:
        """Without what varies and without long lists."""
        return reduced(varying.steady(value, self.names))

    def file(self, path: Path) -> Any:
        """A file of JSON, of JSON lines or of text, steady and reduced."""
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return self.steady(json.loads(content))
        if path.suffix != ".jsonl":
            return self._lines(content.splitlines())
        rows = varying.steady([json.loads(row) for row in content.splitlines()], self.names)
        return reduced(rows) if len(rows) <= ROWS else totals(rows)

    def files(self, folder: Path, wanted: re.Pattern[str] = READ) -> dict[str, Any]:
        """All wanted files below a folder, by their relative names."""
        paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
        names = [name for name in paths if wanted.search(name) and not NOT_READ.search(name)]
        return {name: self.file(paths[name]) for name in names}

    def run(self, name: str, *words: str, params: str = "quick", must_end_well: bool = True) -> Any:
        """Everything of the run `name`, made by `workbook report` with further words if it is not there yet."""
        if name not in self.made:
            asked = name.removesuffix("-fast") if "--fast" in words else name  # which is added by the option
            given = ["report", str(PROJECT / f"params/{params}.yaml"), "-p", "run_name", asked, *words]
            done = self.command(*given, cwd=PROJECT)
            if must_end_well and done["exit"] != 0:
                raise FailedError(f"run {name}: exit code {done['exit']}\n" + "\n".join(done["stderr"][-30:]))
            self.made[name] = {"command": done, **self._products(name), "pages": self._pages(name)}
        return self.made[name]

    def _products(self, name: str) -> dict[str, Any]:
        """Manifest entries without cost, and the JSON files of all products."""
        folder = self.home / "runs" / name
        entries = json.loads(_text(folder / "manifest.json") or '{"products": {}}')["products"]
        kept = ("parameters", "facts", "metrics", "notes")
        manifest = {
            product: {**{key: entry[key] for key in kept}, "outputs": sorted(entry["outputs"])}
            for product, entry in entries.items()
        }
        return {"manifest": self.steady(manifest), "files": self.files(folder)}

    def _pages(self, name: str) -> dict[str, Any]:
        """What the executed notebooks and the overview show."""
        folder, figures = self.home / "reports" / name, pages.read_figures(self.figures)
        shown = {path.stem: pages.notebook(path, figures) for path in sorted(folder.glob("*.ipynb"))}
        shown |= {path.stem: pages.overview(path) for path in folder.glob("index.html")}
        return {page: self.steady(content) for page, content in shown.items()}


def words(values: Mapping[str, Any]) -> list[str]:
    """`-p KEY VALUE` for every key."""
    return [word for key, value in values.items() for word in ("-p", key, str(value))]


def written_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """The path of a JSONL file of these rows."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _text(path: str | Path) -> str:
    return Path(path).read_text(encoding="utf-8") if Path(path).is_file() else ""
