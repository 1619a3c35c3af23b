"""The command line: instant help, exit codes, one paragraph for bad input, JSON for machines, never a traceback."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import typer
import yaml

from lib import settings
from lib.cli.__main__ import COMMANDS, joined
from lib.cli.console import guarded, table, width, with_options
from lib.cli.doctor import BROKEN, Check, as_text, broken, examine
from lib.cli.evaluate import RowOptions
from lib.cli.models import merge
from lib.errors import InputError, Terminated
from lib.runs.run import open_run
from lib.settings import Settings
from tests import tiny_run
from tests.stages.package.test_web import make_library

pytestmark = pytest.mark.usefixtures("forked_children")

PROJECT = Path(__file__).resolve().parents[2]


def workbook(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lib.cli", *arguments],
        cwd=PROJECT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("encoding", ["ascii", "gbk", "utf-8"])
@pytest.mark.parametrize("words", [["--help"], ["pick", "--help"], ["pick", "→"]])
def test_help_and_usage_in_any_terminal(encoding: str, words: list[str]) -> None:
    answer = workbook(*words, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert "Traceback" not in answer.stderr and answer.returncode == (0 if "--help" in words else 2)
    assert ("Usage" in answer.stdout) == ("--help" in words)


@pytest.mark.parametrize("words", [["--help"], ["quantize", "--help"]])
def test_a_full_disk_takes_no_help(words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "lib.cli", *words]
        answer = subprocess.run(command, cwd=PROJECT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1 and "No space left" in answer.stderr


@pytest.mark.parametrize(
    "command", ["quantize F loop Q8_0", "unpack F loop", "unpack loop/x.gguf out", "ask loop/x", "inspect loop"]
)
def test_links_in_a_circle_are_refused(command: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "F").write_bytes(b"GGUF")
    words = [str(tmp_path / word) if word[0] in "Flo" else word for word in command.split()]
    answer = workbook(*words)
    assert answer.returncode == 2 and "no path" in answer.stderr, answer.stderr
    answer = workbook("pick", "r", WORKBOOK_HOME=str(tmp_path / "loop"))
    assert answer.returncode == 2 and "no path" in answer.stderr, answer.stderr


@pytest.mark.parametrize("key", ["dataset", "base_model", "adapter", "terms", "prompts_file", "imatrix"])
def test_a_nul_in_a_path_is_refused(key: str, tmp_path: Path) -> None:
    file = tmp_path / "y.yaml"
    text = f'task: instruction\nsystem_prompt: ""\nrun_name: y\ndataset: x.jsonl\n{key}: "rows/a\\0b"\n'
    file.write_text(text.replace("dataset: x.jsonl\n", "" if key == "dataset" else "dataset: x.jsonl\n"))
    answer = workbook("report", str(file), "--to", "01", WORKBOOK_HOME=str(tmp_path))
    assert answer.returncode == 2 and "Traceback" not in answer.stderr and "\0" not in answer.stderr, answer.stderr


@pytest.mark.parametrize("address", ["http://user:PW@[::1", "http://[::1"])
def test_a_mirror_without_an_address_is_refused_without_its_password(address: str) -> None:
    answer = workbook("ask", "Qwen/Qwen3-0.6B", "--prompt", "x", HF_ENDPOINT=address)
    assert answer.returncode == 2 and "HF_ENDPOINT holds no address" in answer.stderr and "PW" not in answer.stderr


def test_help_is_instant_and_names_every_command() -> None:
    answer = workbook("--help")
    assert answer.returncode == 0
    for command in (
        "doctor",
        "new",
        "inspect",
        "report",
        "merge",
        "convert",
        "imatrix",
        "quantize",
        "evaluate",
        "compare",
        "perplexity",
        "params",
        "select",
        "pick",
        "unpack",
        "package",
        "serve",
    ):
        assert f"  {command} " in answer.stdout
    loaded = "import lib.cli.__main__, sys; print([m for m in ('torch', 'pydantic', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True).stdout.strip() == "[]"


REFUSED = {
    "no parameter file": (("report", "no.yaml"), "no file no.yaml"),
    "misspelt key": (("report", "params/quick.yaml", "-p", "learning_rat", "1e-3"), "write 'learning_rate'"),
    "wrong type": (("report", "params/quick.yaml", "-p", "seed", "many"), "seed: 'many' given by -p"),
    "unknown type": (("report", "params/quick.yaml", "-p", "ladder", "Q4_K_X"), "unknown quantization type"),
    "unknown notebook": (("report", "params/quick.yaml", "--from", "11"), "--from '11'"),
    "no data": (("evaluate", "x.gguf"), "neither --data nor --run"),
    "no run": (("evaluate", "x.gguf", "--run", "nope"), "no run 'nope'"),
    "no such model": (("convert", "nope", "x.gguf"), "nope"),
    "single tensor": (("quantize", "x.gguf", "y.gguf", "Q8_0", "--tensor-type", "attn_v"), "REGEX=TYPE"),
    "tensor types of a run": (("report", "params/quick.yaml", "-p", "tensor_types", "attn_v=Q4_K_M"), "REGEX=TYPE"),
    "a key twice": (("report", "params/quick.yaml", "-p", "seed", "3", "-p", "seed=4"), "-p seed twice"),
    "a list twice": (("doctor", *("-p", "label_names", "a,b") * 2), "-p label_names twice"),
    "no such matrix": (("report", "params/quick.yaml", "-p", "imatrix", "Auto"), "an importance matrix"),
    "no such matrix, doctor": (("doctor", "params/quick.yaml", "-p", "imatrix", "no.gguf"), "an importance matrix"),
    "a quantized source, doctor": (("doctor", "params/quick.yaml", "-p", "outtype=q8_0"), "06 cannot quantize"),
    "a quantized source": (("report", "params/quick.yaml", "-p", "outtype=q8_0"), "06 cannot quantize"),
    "capitals": (("doctor", "params/quick.yaml", "-p", "tensor_types", "Attn_v=q8_0"), "has capital letters"),
    "no expression": (("doctor", "params/quick.yaml", "-p", "tensor_types", "(=q8_0"), "no regular expression"),
    "a prompt's line end": (
        ("evaluate", "x.gguf", "--data", "r", "--user-prompt", r"a\n{text}"),
        "a backslash and an n",
    ),
    "imatrix of a run": (("report", "params/quick.yaml", "-p", "ladder", "IQ2_XS"), "need an importance matrix"),
    "one file for two types": (("quantize", "x.gguf", "y.gguf", "Q8_0", "Q4_0"), "a folder for several types"),
    "no such gguf": (("quantize", "nope.gguf", "x.gguf", "Q4_K_M"), "nope.gguf"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_input_is_one_paragraph(case: str, tmp_path: Path) -> None:
    arguments, words = REFUSED[case]
    answer = workbook(*arguments, WORKBOOK_HOME=str(tmp_path))
    assert answer.returncode == 2 and answer.stdout == ""
    assert words in answer.stderr and "Traceback" not in answer.stderr
    assert all(part in answer.stderr for part in ("Found: ", "Expected: ", "Do this: "))
    assert len(answer.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "reports" / "quick" / "index.html").exists()


def test_usage_errors_exit_2() -> None:
    assert workbook("frobnicate").returncode == 2
    assert workbook("quantize", "a.gguf").returncode == 2
    margin = workbook("compare", "a.gguf", "b.gguf", "--output", "o", "--equivalence-margin", "100")
    assert margin.returncode == 2 and "equivalence-margin" in margin.stderr  # before any file is measured


def test_params_lists_every_key() -> None:
    answer = workbook("params", "--json")
    keys = {entry["key"]: entry for entry in json.loads(answer.stdout)["parameters"]}
    assert list(keys) == list(Settings.model_fields)
    assert keys["outtype"]["type"] == "one of f16, bf16, f32, q8_0" and keys["ladder"]["type"] == "list of text"
    assert all(entry["meaning"] for entry in keys.values())


def test_params_completes_a_file() -> None:
    answer = workbook("params", "--complete", "params/smollm2-movies.yaml")
    assert answer.returncode == 0
    assert yaml.safe_load(answer.stdout) == settings.load(PROJECT / "params/smollm2-movies.yaml").model_dump()
    listed = json.loads(workbook("params", "--json", "--complete", "params/quick.yaml").stdout)["parameters"]
    assert {entry["key"]: entry["value"] for entry in listed} == Settings().model_dump()
    assert workbook("params", "--complete", "params/none.yaml").returncode == 2


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("a.", "b.", "c."), 2, "Found: a. Expected: b. Do this: c."),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (Terminated(), 143, "Interrupted"),
        (OSError(28, "No space left on device", "runs/x"), 2, "No space left on device (runs/x)"),
        (PermissionError(13, "Permission denied", "out"), 2, "Permission denied (out)"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, "the disk is full"),
        (MemoryError(), 2, "no memory left"),
        (ModuleNotFoundError("No module named 'llama_cpp'", name="llama_cpp"), 2, "the libraries of the extra gguf"),
        (RuntimeError("boom\nmore"), 1, "RuntimeError: boom"),
    ],
)
def test_every_exception_becomes_a_message_and_a_code(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORKBOOK_DEBUG", raising=False)

    @guarded
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as caught:
        command()
    shown = capsys.readouterr().err
    assert caught.value.exit_code == code and words in shown and "Traceback" not in shown
    assert code != 1 or "WORKBOOK_DEBUG=1" in shown


def test_an_error_is_told_where_no_further_file_can_be_opened(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command() -> None:
        raise OSError(24, "Too many open files", "runs/x")

    monkeypatch.setattr("lib.errors._refusals", lambda room: command())
    with pytest.raises(typer.Exit) as caught:
        guarded(command)()
    assert caught.value.exit_code == 2 and "Too many open files (runs/x)" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["", "0"])
def test_debug_off(value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBOOK_DEBUG", value)

    @guarded
    def command() -> None:
        raise RuntimeError("boom")

    with pytest.raises(typer.Exit):
        command()
    assert "Traceback" not in capsys.readouterr().err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBOOK_DEBUG", "1")

    @guarded
    def command() -> None:
        raise RuntimeError("boom")

    with pytest.raises(typer.Exit):
        command()
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_p_takes_key_and_value_as_papermill_does() -> None:
    assert joined(["report", "-p", "seed", "1", "-p", "run_name=x", "--from", "04"]) == [
        *("report", "-p", "seed=1", "-p", "run_name=x", "--from", "04")
    ]
    assert joined(["report", "-p", "user_prompt", "a=b {text}"]) == ["report", "-p", "user_prompt=a=b {text}"]
    assert joined(["report", "-p"]) == ["report", "-p"] and joined(["x", "--", "-p", "a", "b"]) == [
        *("x", "--", "-p", "a", "b")
    ]


def test_task_comes_from_the_options_and_the_defaults() -> None:
    task = RowOptions(None, None, label_names="坏, 好", max_seq_length=64).task()
    assert task.label_names == ("坏", "好") and task.max_seq_length == 64
    assert task.user_prompt == Settings().user_prompt
    with pytest.raises(InputError, match="label_names"):
        RowOptions(None, None, label_names="好,好").task()


def test_rows_are_drawn_the_same_every_time(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    texts = [f"第{number}条评论写得{'很好' if number % 2 else '很差'}" for number in range(50)]
    lines = [json.dumps({"text": text, "label": number % 2}, ensure_ascii=False) for number, text in enumerate(texts)]
    file.write_text("\n".join(lines), encoding="utf-8")
    source = RowOptions(str(file), None, 10)
    task = source.task()
    (rows, described), (again, _) = source.rows(task), source.rows(task)
    assert rows == again and len(rows) == 10 and described["rows_available"] == 50 and described["sample_seed"] == 42
    assert not any("leaked" in row for row in rows), "no leak audit was made for a bare file"


def test_rows_that_a_file_loses_are_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n房间很好,1\n早餐很差,0\n  ,1\n服务好,\n,0\n", encoding="utf-8")
    source = RowOptions(str(file), None, 1)
    rows, described = source.rows(source.task())
    assert len(rows) == 1 and described["rows_available"] == 5
    assert described["left_out"] == {"empty text": 2, "no label": 1}
    assert "3 of 5 rows left out (2 empty text, 1 no label)" in capsys.readouterr().err


def test_doctor_examines_this_machine() -> None:
    found = examine()
    assert {"Python", "torch", "bitsandbytes", "llama-cpp-python", "Memory", "Disk", "Chinese font", "git"} <= {
        check.name for check in found
    }
    assert all(check.cure and check.touches for check in found if check.state == "lack")
    assert (not broken(found) and "notebooks" in as_text(found)) or "Everything" in as_text(found)
    assert broken([*found, Check("torch", BROKEN, "gone", "install it.", "all")])


def test_doctor_names_a_cure_for_every_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without programs, optional libraries and the phone page's library; then with npm."""
    from lib.cli import doctor
    from lib.runs import machine
    from lib.stages.package import phone_page

    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(phone_page, "PROJECT", tmp_path)
    monkeypatch.setattr(machine, "has_module", lambda name: False)
    monkeypatch.setattr(machine, "bitsandbytes_problem", lambda: "not installed")
    monkeypatch.setattr(machine, "llama_cpp_problem", lambda: "not installed")
    found = {check.name: check for check in examine()}
    for name in ("git", "Chromium", "wllama", "llmcompressor", "torchao", "bitsandbytes", "llama-cpp-python"):
        assert found[name].state == "lack" and found[name].touches, name
    locked = (PROJECT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    for name in ("llmcompressor", "torchao", "bitsandbytes", "llama-cpp-python"):
        (pin,) = re.findall(r"pip install ([\w-]+==[\d.]+)", found[name].cure)
        assert pin in locked
    assert "install Node.js with npm" in found["wllama"].cure and "chromium" in found["Chromium"].cure
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    found = {check.name: check for check in examine()}
    assert found["wllama"].cure == "make wllama (it needs a network, once)."
    assert found["Chromium"].state == "ok" and found["Chromium"].found == "/usr/bin/chromium"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_every_parameter_of_a_command_is_an_option(command: Callable) -> None:
    """One without its line in options.yaml would keep its default, whatever is typed."""
    shown = inspect.signature(with_options(command), eval_str=True).parameters
    taken = inspect.signature(command, eval_str=True).parameters
    groups = {name for name, p in taken.items() if is_dataclass(p.annotation)}
    fields_of = {f.name for name in groups for f in fields(taken[name].annotation)}
    assert shown.keys() == (taken.keys() - groups) | fields_of


def test_doctor_says_what_it_found_and_nothing_else() -> None:
    """Importing torchao, bitsandbytes and transformers, as it does, lets them speak of other machines."""
    code = "from lib.cli.__main__ import main; import sys; sys.argv = ['workbook', 'doctor']; main()"
    answer = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert answer.stderr in ("", "a prompt on 8-bit weights: …\n") and "torchao" in answer.stdout


def test_doctor_tries_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    (llama,) = [check for check in examine() if check.name == "llama-cpp-python"]
    assert llama.state == "ok" and "8-bit" in llama.found
    monkeypatch.setattr("lib.scoring.measure.llama_cpp_crash", lambda: "a prompt ended by signal SIGSEGV")
    (llama,) = [check for check in examine() if check.name == "llama-cpp-python"]
    assert broken([llama]) and "SIGSEGV" in llama.found and "-U__AMX_INT8__ pip install llama" in llama.cure


def test_doctor_knows_the_phone_pages_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_library(tmp_path)
    monkeypatch.setattr("lib.stages.package.phone_page.PROJECT", tmp_path)
    (wllama,) = [check for check in examine() if check.name == "wllama"]
    assert wllama.state == "ok" and wllama.found == "3.8.1 (phone page)" and not wllama.cure
    next(tmp_path.rglob("LICENCE")).unlink()
    (wllama,) = [check for check in examine() if check.name == "wllama"]
    assert wllama.state == "lack" and "wllama/LICENCE" in wllama.found


def test_tables_align_chinese() -> None:
    assert width("负面ok") == 6
    assert table([{"a": "负面", "b": 0.123456}, {"a": "x", "b": None}], ("a", "b")) == "a     b\n负面  0.1235\nx     –"


def test_several_types_and_their_sizes(tmp_path: Path) -> None:
    from tests import tiny_gguf

    source = tiny_gguf.write(tmp_path / "tiny-F16.gguf")
    command = ("quantize", str(source), str(tmp_path / "out"), "Q8_0", "Q4_0")
    sizes = json.loads(workbook(*command, "--dry-run", "--json").stdout)["files"]
    assert not (tmp_path / "out").exists()
    made = workbook(*command)
    assert made.returncode == 0 and "bits_per_weight" in made.stdout
    files = [tmp_path / "out" / f"tiny-{name}.gguf" for name in ("Q8_0", "Q4_0")]
    assert [row["bytes"] for row in sizes] == [path.stat().st_size for path in files]


def test_merge_and_convert_in_one_pass(tmp_path: Path) -> None:
    """The GGUF of `merge --gguf` is that of `convert` on the merged folder; a refused one leaves neither product."""
    tiny_run.make_base(tmp_path / "base", "bfloat16")
    tiny_run.make_adapter(tmp_path / "base", tmp_path / "adapter")
    given = ("merge", "--base-model", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter"))
    done = workbook(*given, "--output-dir", str(tmp_path / "merged"), "--gguf", str(tmp_path / "one.gguf"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["gguf"]["architecture"] == "qwen2"
    assert "the local model `base`" in (tmp_path / "merged" / "README.md").read_text()
    assert "trained_on" not in json.loads(done.stdout)
    done = workbook("convert", str(tmp_path / "merged"), str(tmp_path / "two.gguf"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    before = sorted(tmp_path.iterdir())
    done = workbook(*given, "--output-dir", str(tmp_path / "other"), "--gguf", str(tmp_path / "other.bin"))
    assert done.returncode == 2 and "ends in .gguf" in done.stderr
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "adapter" / "training.json").write_text('{"base": {"revision": "sha256:0123456789abcdef"}}')
    done = workbook(*given, "--output-dir", str(tmp_path / "other"))  # a base of equal shape: no shape tells
    assert done.returncode == 0 and "TRAINED ON ANOTHER BASE (sha256:0123456789abcdef)" in done.stdout


def test_doctor_says_what_the_test_rows_can_show(tmp_path, monkeypatch, capsys) -> None:
    """As 01 counts them, before anything is trained; nothing is said of rows that are not here, or without labels."""
    from lib.cli import doctor

    rows = [{"text": f"{word} number {i} {'ab'[i % 2] * (i % 7 + 1)}", "label": i % 2} for i, word in enumerate(WORDS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = Settings(dataset=str(tmp_path / "rows.jsonl"), test_share=0.3)
    found, unused, counts, tokens = doctor._ask_what_is_here(settings, None)
    assert 8 < tokens < settings.max_seq_length, "the rows are short, and doctor has counted"
    assert sum(counts.values()) == len(rows)
    assert unused == [] and found["counts"]["all"] == pytest.approx(0.3 * len(rows), abs=4)
    text = doctor.rows_text(settings, found)
    assert f"exclude a loss of {found['least']['all']:.2g} points on all {found['counts']['all']} rows" in text
    assert "less than 1 point takes independent rows" in text and "316 (0 %)" in text
    assert doctor.rows_text(settings, None) == ""
    (tmp_path / "README.md").write_text("The label is 0 or 1.")
    folded, unused, *_ = doctor._ask_what_is_here(Settings(dataset=str(tmp_path / "rows.jsonl"), folds=4), None)
    assert unused == ["not used: what the file 'README.md' says of labels"]
    assert folded["counts"]["all"] == len(rows) and folded["worth"]["all"] > 3 * found["worth"]["all"]
    assert doctor._ask_what_is_here(Settings(dataset="org/elsewhere"), None) == (None, [], {}, 0.0)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"max_seq_length": 32}, "the prompt alone takes"),
        ({"label_names": ["负面", "负面的"]}, "begin with the same tokens"),
        ({"dataset": "no/such.csv"}, "no file or folder"),
    ],
)
def test_doctor_refuses_what_01_refuses(asked: dict, found: str, home: Path) -> None:
    from lib.cli import doctor
    from lib.stages.data.stage import prepare

    rows = [{"text": f"{word} number {i}", "label": i % 2} for i, word in enumerate(WORDS)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = Settings(**{"dataset": str(home / "rows.jsonl"), **asked})
    for refusing in (lambda: doctor._ask_what_is_here(settings, None), lambda: prepare(settings, open_run("r"))):
        with pytest.raises(InputError, match=found):
            refusing()


WORDS = ["".join(chr(97 + (i * k) % 26) for k in (1, 3, 5, 7, 11)) for i in range(100)]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
def test_json_is_json_on_any_terminal(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "u.yaml").write_text('system_prompt: "Café 😀"\n', encoding="utf-8")
    found = workbook("params", "--complete", str(tmp_path / "u.yaml"), "--json", PYTHONIOENCODING=encoding)
    assert "Caf" in found.stdout and "Café 😀" in json.dumps(json.loads(found.stdout), ensure_ascii=False)


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--revision for a base model on this disk"):
        merge(str(tmp_path), str(tmp_path), tmp_path / "out", revision="abc")
