"""The runner: order, parameters, failures of every kind, interruption, no page that looks finished and is not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest

from lib.errors import InputError
from lib.models.base_model import fingerprint
from lib.report import execute, runner
from lib.report.runner import ReportError, _refuse_other_settings, ready, run_report
from lib.runs.locks import locked
from lib.runs.run import open_run
from lib.settings import Settings
from lib.stages.data.cleaning import LabelledRows
from lib.stages.finetune.stage import PARAMETERS
from tests.stages.convert.convertible import write_model
from tests.support.pages import broken_links, problems

pytestmark = pytest.mark.usefixtures("unmeasured_children", "forked_children")

Writer = Callable[..., Path]

GOOD = "from lib.runs.run import open_run\nseed"

WORK = """
import sys
from lib.progress import Progress
with Progress('work', 2) as progress:
    progress.advance()
(seed, sys.executable)
"""

STAGE = """
from lib.runs.run import open_run
def build(work):
    (work.folder / 'rows.txt').write_text(str(seed))
    work.facts = {'source': 'a test', 'sample_data': True, 'offline_base': True, 'base_model': 'offline'}
    stamp = 'offline base model, sample data: not a result about Qwen or ChnSentiCorp'
    work.notes = [stamp, 'a fallback happened here']
    work.metrics = {'rows': 3}
product = open_run(run_name).produce('data', build, parameters={'seed': seed})
product.message
"""


def report(params: Path, home: Path, **keywords):
    lines: list[str] = []
    try:
        return run_report(params, notebooks=home / "notebooks", say=lines.append, **keywords), lines
    except BaseException as error:
        error.lines = lines
        raise


def test_success_publishes_pages_that_pass_the_checks(home: Path, params: Path, write_notebook: Writer) -> None:
    write_notebook("01_first", STAGE)
    write_notebook(
        "02_second",
        WORK,
    )
    result, lines = report(params, home)
    assert [p.name for p in result.pages] == ["01_first.html", "02_second.html"]
    assert not [problem for page in result.pages for problem in problems(page)]
    assert not broken_links(result.folder) and not broken_links(home / "reports")
    first, second = (page.read_text(encoding="utf-8") for page in result.pages)
    sentence = "offline base model, sample data: not a result about Qwen or ChnSentiCorp"
    for text in (first, second, result.index.read_text(encoding="utf-8")):
        assert sentence in text and "a fallback happened here" in text
    assert f"(7, '{sys.executable}')" in second, "the override or this interpreter was not used"
    assert '<a href="02_second.html">next</a>' in first and "README.md" not in first
    assert any("work: 1/2" in line for line in lines) or any("work: 1 done" in line for line in lines)
    assert (result.folder / "01_first.ipynb").is_file()
    assert not list(result.folder.glob(".work-*")) and not (result.folder / "partial").exists()
    assert 'href="test/index.html"' in (home / "reports" / "index.html").read_text(encoding="utf-8")


def test_only_declared_parameters_are_passed(home: Path, params: Path, write_notebook: Writer) -> None:
    write_notebook(
        "01_first", "assert 'learning_rate' not in globals()\nseed", parameters="seed: int = 1  # 1 = the seed"
    )
    result, _ = report(params, home, overrides={"learning_rate": 0.5})
    notebook = nbformat.read(result.folder / "01_first.ipynb", as_version=4)
    assert notebook.metadata.papermill.parameters == {"seed": 7}


def test_paths_are_found_from_where_the_user_stands(
    home: Path, params: Path, write_notebook: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_notebook("01_first", "dataset", parameters='dataset: str = "sample"  # where')
    (home / "my.csv").write_text("text,label\n", encoding="utf-8")
    monkeypatch.chdir(home)
    result, _ = report(params, home, overrides={"dataset": "my.csv"})
    notebook = nbformat.read(result.folder / "01_first.ipynb", as_version=4)
    assert notebook.metadata.papermill.parameters == {"dataset": str(home / "my.csv")}


@pytest.mark.parametrize("key", ["dataset", "base_model", "adapter", "terms", "prompts_file", "imatrix", "fallbacks"])
def test_of_two_files_the_current_folders_is_meant(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "d/x.txt" if key in ("terms", "prompts_file") else "d/x.csv"
    for place in ("project", "here"):
        (tmp_path / place / "d").mkdir(parents=True)
        (tmp_path / place / name).write_text(f"密钥 {place}\n")
    monkeypatch.setattr(runner.files, "PROJECT", tmp_path / "project")
    monkeypatch.chdir(tmp_path / "here")
    talk = {"task": "dialogue", "dataset": "none.csv", "system_prompt": ""}
    given = {key: [{"dataset": "d/x.csv"}] if key == "fallbacks" else name}
    own = str(tmp_path / "here" / name)
    found = getattr(ready(Settings(**talk | given)), key)
    assert found == ([{"dataset": own}] if key == "fallbacks" else own)
    monkeypatch.chdir(tmp_path / "project")
    assert getattr(ready(Settings(**talk | given)), key) == given[key], "as it was, so that no run is made anew"


def test_words_are_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for word in ("sample", "offline", "auto", "none", "counselling"):
        (tmp_path / word).mkdir()
    monkeypatch.chdir(tmp_path)
    words = [Settings(), Settings(imatrix="auto", fallbacks=[{"base_model": "offline"}, {"dataset": "sample"}])]
    words += [Settings(task="dialogue", dataset="x", system_prompt="", terms="counselling")]
    assert [ready(settings) for settings in words] == words


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"user_prompt": "别的 {text}", "label_names": ["A", "B"]}, "the data .* another label_names, user_prompt"),
        ({"learning_rate": 0.5, "lora_r": 4}, "the adapter .* another lora_r, learning_rate"),
        ({"train_seed": 3}, "the adapter .* another seed"),
        ({"adapter": "folder"}, "the adapter .* another adapter"),
        ({"merge_dtype": "float16"}, None),
        ({"seed": 9}, "another seed"),
    ],
)
def test_settings_of_what_is_not_made_anew(given: dict, words: str | None, home: Path) -> None:
    run, first = open_run("t"), Settings()
    keys = {"data": LabelledRows.keys, "adapter": PARAMETERS, "merged": ("merge_dtype",)}
    for product, own in keys.items():
        run.produce(product, lambda work: (work.folder / "a").write_text("a"), first.pick(*own))
    for settings, start in ((first, "07_x"), (Settings(**given), "01_data"), (Settings(**given), "")):
        _refuse_other_settings(run, settings, start)
    if words is None:
        _refuse_other_settings(run, Settings(**given), "04_merge")
        return
    with pytest.raises(InputError, match=words):
        _refuse_other_settings(run, Settings(**given), "03_evaluate")


@pytest.mark.parametrize("relative", ["relhome", "./a/b", "~/h"])
def test_notebooks_work_in_the_home_of_the_report(
    relative: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WORKBOOK_HOME", relative)
    inside = Path(execute._environment(tmp_path / "p")["WORKBOOK_HOME"])
    assert inside.is_absolute() and inside == tmp_path / relative.removeprefix("~/")


def test_notebook_that_declares_an_unknown_key_is_refused(home: Path, params: Path, write_notebook: Writer) -> None:
    write_notebook("01_first", GOOD, parameters="learning_rat: float = 0.1  # misspelt")
    with pytest.raises(InputError, match="learning_rat"):
        report(params, home)


KILL = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"

FAILURES = {
    "input": (
        "from lib.errors import InputError\nraise InputError('a', 'b', 'c')",
        2,
        r"01_first: Found: a Expected: b Do this: c$",
    ),
    "a kind of input": (
        "from lib.hub.sources import SourceError\nraise SourceError('a', 'b', 'c', 'd')",
        2,
        r"01_first: Found: a Expected: b Do this: c$",
    ),
    "killed": (KILL, 1, r"01_first: the kernel died \(SIGKILL: probably out of memory\) in cell 3"),
    "os._exit(0)": ("import os\nos._exit(0)", 1, r"01_first: the kernel died \(it ended itself with code 0\)"),
    "sys.exit(3)": ("import sys\nsys.exit(3)", 1, r"01_first: cell 3 called sys.exit\(3\)"),
    "sys.exit(0)": ("import sys\nsys.exit(0)", 1, r"01_first: cell 3 called sys.exit\(0\)"),
    "crash": (
        "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
        1,
        r"01_first: the kernel died \(SIGSEGV: a native library crashed\) in cell 3",
    ),
    "stderr": ("import sys\nprint('warning', file=sys.stderr)", 1, r"01_first: its page contains text on stderr"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_failure_leaves_no_page(kind: str, home: Path, params: Path, write_notebook: Writer) -> None:
    source, code, message = FAILURES[kind]
    write_notebook("01_first", source, "'after'")
    write_notebook("02_second", GOOD)
    folder = home / "reports" / "test"
    folder.mkdir(parents=True)
    for name in ("01_first", "02_second"):
        (folder / f"{name}.html").write_text("an old page", encoding="utf-8")
    with pytest.raises(ReportError, match=message) as caught:
        report(params, home)
    assert caught.value.exit_code == code and caught.value.stage == "01_first"
    assert "Traceback" not in str(caught.value)
    assert [p.name for p in folder.glob("*.html")] == ["index.html"]
    assert caught.value.evidence == folder / "partial" / "01_first.ipynb" and caught.value.evidence.is_file()
    overview = (folder / "index.html").read_text(encoding="utf-8")
    assert "not complete" in overview and "01_first" in overview and not broken_links(folder)
    assert "incomplete: 0 of 2 pages" in (home / "reports" / "index.html").read_text(encoding="utf-8")


def test_failure_in_the_middle_keeps_the_pages_before(home: Path, params: Path, write_notebook: Writer) -> None:
    write_notebook("01_first", GOOD)
    write_notebook("02_second", "import missing_package")
    write_notebook("03_third", GOOD)
    with pytest.raises(ReportError, match="02_second: cell 3 raised ModuleNotFoundError"):
        report(params, home)
    folder = home / "reports" / "test"
    assert sorted(p.name for p in folder.glob("*.html")) == ["01_first.html", "index.html"]
    assert not broken_links(folder), "a page links to one that was not made"


def _wait_for_end(pid: int, seconds: float = 20.0) -> None:
    """Wait until a process has ended (a zombie that nobody reaps has)."""
    deadline = time.monotonic() + seconds
    while psutil.pid_exists(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return
        assert time.monotonic() < deadline, f"process {pid} outlived its notebook"
        time.sleep(0.1)


def test_timeout_ends_the_kernel_and_its_children(
    home: Path, params: Path, write_notebook: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids, ahead = home / "pids", [0.0]
    source = (
        "import os, subprocess, time\nfrom lib.progress import Progress\nchild = subprocess.Popen(['sleep', '300'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "with Progress('sleeping'):\n    time.sleep(300)"
    )
    write_notebook("01_first", source)
    clock = SimpleNamespace(sleep=time.sleep, monotonic=lambda: time.monotonic() + ahead[0])
    monkeypatch.setattr(execute, "time", clock)

    def say(line: str) -> None:
        if "sleeping" in line:  # the cell runs: now let an hour pass
            ahead[0] = 3600.0

    with pytest.raises(ReportError, match=r"longer than 3000 s and was stopped in cell 3") as caught:
        run_report(params, notebooks=home / "notebooks", say=say, timeout=3000)
    assert caught.value.exit_code == 1
    for pid in pids.read_text().split():
        _wait_for_end(int(pid))


def _start(home: Path, params: Path) -> subprocess.Popen:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from lib.report.runner import Terminated\nfrom lib.report.runner import run_report\n"
        f"try: run_report({str(params)!r}, notebooks=Path({str(home / 'notebooks')!r}))\n"
        "except KeyboardInterrupt: sys.exit(130)\nexcept Terminated: sys.exit(143)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env={**os.environ})


def _wait_for(path: Path, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_interruption_leaves_nothing_running_and_no_product(
    number: int, code: int, home: Path, params: Path, write_notebook: Writer
) -> None:
    pid = home / "pid"
    slow = f"""def build(work):
    import os, time
    (work.folder / 'half').write_text('x')
    open({str(pid)!r}, 'w').write(str(os.getpid()))
    time.sleep(300)"""
    stage = STAGE.replace("def build(work):", slow)
    write_notebook("01_first", stage)
    runner = _start(home, params)
    _wait_for(pid)
    runner.send_signal(number)
    runner.communicate(timeout=90)
    assert runner.returncode == code
    _wait_for_end(int(pid.read_text()))
    run = home / "runs" / "test"
    assert not (run / "data").exists() and not (run / "manifest.json").exists()
    assert number == signal.SIGKILL or not (run / ".data.part").exists()
    assert [p.name for p in (home / "reports" / "test").glob("*.html")] == ["index.html"]
    if number == signal.SIGKILL:  # the only one that leaves something behind: the next report clears it
        write_notebook("01_first", STAGE)
        result, _ = report(params, home)
        assert [p.name for p in result.pages] == ["01_first.html"] and not list(result.folder.glob(".work-*"))


def test_from_keeps_the_pages_before(home: Path, params: Path, write_notebook: Writer) -> None:
    write_notebook("01_first", STAGE)
    write_notebook("02_second", GOOD)
    first, _ = report(params, home)
    before = (first.folder / "01_first.ipynb").stat().st_mtime_ns
    result, lines = report(params, home, start_from="2", rerun=True)
    assert (result.folder / "01_first.ipynb").stat().st_mtime_ns == before and len(result.pages) == 2
    assert lines[0] == "[2/2] 02_second"
    with pytest.raises(InputError, match="--from '9'"):
        report(params, home, start_from="9")


def test_to_ends_there_and_leaves_no_later_page(home: Path, params: Path, write_notebook: Writer) -> None:
    write_notebook("01_first", STAGE)
    write_notebook("02_second", GOOD)
    report(params, home)
    result, lines = report(params, home, end_at="01_first")
    assert [page.name for page in result.pages] == ["01_first.html"] and not (result.folder / "02_second.html").exists()
    assert not any("02_second" in line for line in lines)
    with pytest.raises(InputError, match="--from 2 --to 1"):
        report(params, home, start_from="2", end_at="1")


@pytest.mark.parametrize("end", [None, "04"])
def test_a_base_that_05_would_refuse_is_refused_before_the_training(
    end: str | None, home: Path, params: Path, write_notebook: Writer
) -> None:
    base = write_model(home / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    params.write_text(f"{params.read_text()}base_model: {base}\n")
    own = STAGE.replace(
        "'offline_base': True, 'base_model': 'offline'",
        f"'base_model': base_model, 'base_revision': '{fingerprint(base)}'",
    )
    write_notebook("01_data", own, parameters="run_name: str = ''\nseed: int = 1\nbase_model: str = ''")
    for name in ("02_finetune", "03_evaluate", "04_merge", "05_convert_gguf"):
        write_notebook(name, "seed")
    with pytest.raises(ReportError, match=r"^02_finetune: ") as refused:
        report(params, home, end_at=end)
    assert ("hidden_act 'gelu'" in str(refused.value)) == (end is None)  # the notebook itself makes no adapter
    assert end or refused.value.exit_code == 2
    assert [path.name for path in (home / "reports" / "test").glob("0*.html")] == ["01_data.html"]


def test_refused_parameters_leave_an_old_report_alone(home: Path, params: Path, write_notebook: Writer) -> None:
    write_notebook("01_first", GOOD)
    result, _ = report(params, home)
    with pytest.raises(InputError, match="seed"):
        report(params, home, overrides={"seed": "many"})
    assert result.pages[0].is_file()


def test_lists_that_cannot_be_read_are_refused_before_anything_runs(
    home: Path, params: Path, write_notebook: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_notebook("01_first", "terms", parameters='terms: str = ""  # where')
    text = params.read_text(encoding="utf-8")
    params.write_text(
        f"{text}\ntask: dialogue\nsystem_prompt: x\ndataset: rows.jsonl\nterms: absent.txt\n", encoding="utf-8"
    )
    with pytest.raises(InputError, match=r"terms: .*absent\.txt") as error:
        report(params, home)
    assert error.value.lines == []
    monkeypatch.chdir(home)
    (home / "absent.txt").write_text("焦虑\n", encoding="utf-8")
    (home / "counselling").mkdir()
    expected = {"absent.txt": str(home / "absent.txt"), "counselling": "counselling"}  # a shipped list comes first
    for given, passed in expected.items():
        result, _ = report(params, home, overrides={"terms": given})
        notebook = nbformat.read(result.folder / "01_first.ipynb", as_version=4)
        assert notebook.metadata.papermill.parameters == {"terms": passed}


def test_one_report_of_a_run_at_a_time(home: Path, params: Path, write_notebook: Writer) -> None:
    write_notebook("01_first", "1")
    folder = report(params, home)[0].folder
    (folder / ".work-old").mkdir()
    busy = pytest.raises(InputError, match="another process makes the report")
    with locked(folder / ".lock", "", "", ""), busy:
        report(params, home)
    assert (folder / ".work-old").is_dir()
    report(params, home)
    assert not (folder / ".work-old").exists()
