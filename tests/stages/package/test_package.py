"""The package of a run: made, skipped, unpacked elsewhere, run there, damaged there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lib.errors import InputError
from lib.runs.files import read_json, read_jsonl, write_json
from lib.runs.run import Run, open_run
from lib.stages.package.stage import PackageResult, package
from tests import tiny_run
from tests.stages.package.conftest import python_in, unpack

pytestmark = pytest.mark.usefixtures("forked_children")

CONTENTS = {
    "Modelfile",
    "README.md",
    "SHA256SUMS",
    "deployment_guide.md",
    "export_report.json",
    "model_info.json",
    "requirements.txt",
    "test_model.py",
    "usage_examples.py",
}
CONVENTION = re.compile(
    r"[A-Za-z0-9.]+(-[A-Za-z0-9.]+)*-\d+(\.\d+)?[KMBT](-[A-Za-z0-9]+)+-v\d+\.\d+-[A-Z0-9]+(_[A-Z0-9]+)*\.gguf"
)


@pytest.fixture(scope="module")
def made(runs: Callable[[str], Run], packaging_home: Path, tmp_path_factory: pytest.TempPathFactory) -> PackageResult:
    run = runs("t")
    with pytest.raises(InputError, match=r"recommends no file.*--type, one of F16, Q8_0"):
        package(run)  # a random model: nothing is recommended
    return package(run, "q8_0", output=tmp_path_factory.mktemp("zips"), n_threads=1)


def test_contents(made: PackageResult, runs: Callable[[str], Run]) -> None:
    folder = made.product.path
    assert {path.name for path in folder.iterdir()} == CONTENTS | {made.report["file"]["name"]}
    assert CONVENTION.fullmatch(made.report["file"]["name"]) and made.report["file"]["name"].endswith(
        "-t-v1.0-Q8_0.gguf"
    )
    assert (folder / made.report["file"]["name"]).read_bytes() == (
        runs("t").folder / "quantized" / "m-Q8_0.gguf"
    ).read_bytes()
    sums = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert sums.keys() == CONTENTS - {"SHA256SUMS"} | {made.report["file"]["name"]}
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == value for name, value in sums.items())
    lock = (Path(__file__).parents[3] / "requirements.txt").read_text().lower().replace("_", "-").splitlines()
    pins = (folder / "requirements.txt").read_text().lower().replace("_", "-").splitlines()[1:]
    assert any(pin.startswith("llama-cpp-python==") for pin in pins) and {*pins} <= {*lock}
    assert made.report["mix"] is None, "a recipe, not types chosen under a budget"


def test_the_card_says_that_the_evidence_recommends_nothing(made: PackageResult) -> None:
    text = (made.product.path / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "unknown" and "Q8_0" in front["tags"] and "base_model" not in front
    assert (
        made.report["choice"]["standing"] == "without sufficient evidence"
        and "Q8_0 was chosen by the user; the evidence" in text
    )
    entry = made.report["evaluation"]["file"]
    low, high = entry["accuracy_interval"]
    assert f"| accuracy | {entry['accuracy']:.4f} [{low:.4f}, {high:.4f}] |" in text
    assert "unknown to the workbook: ask where the rows come from" in text


def test_the_package_holds_no_row_of_the_data(made: PackageResult, runs: Callable[[str], Run]) -> None:
    texts = [row["text"] for row in read_jsonl(runs("t").folder / "data" / "test.jsonl")]
    for path in made.product.path.iterdir():
        if path.suffix != ".gguf":
            content = path.read_text(encoding="utf-8")
            assert not any(text in content for text in texts if len(text) > 8)


def test_the_zip_is_the_same_whenever_it_is_made(made: PackageResult, runs: Callable[[str], Run]) -> None:
    before = made.archive.read_bytes()
    for path in made.product.path.iterdir():
        path.touch()
    foreign = made.product.path / "devices" / "phone.json"  # as an older `serve --phone` left it there
    foreign.parent.mkdir()
    foreign.write_text("user agents", encoding="utf-8")
    again = package(runs("t"), "Q8_0", output=made.archive.parent)
    shutil.rmtree(foreign.parent)
    assert not again.product.made and "nothing to do" in again.product.message
    assert again.archive.read_bytes() == before
    with zipfile.ZipFile(made.archive) as archive:
        assert archive.namelist() == sorted(archive.namelist())
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert [path.name for path in made.archive.parent.iterdir()] == [made.archive.name]


def test_it_works_elsewhere_without_this_project(made: PackageResult, bare_python: Path, tmp_path: Path) -> None:
    folder = unpack(made.archive, tmp_path)
    tested = python_in(bare_python, folder, "test_model.py")
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert "5 of 5 prompts answered as stored" in tested.stdout and tested.stdout.count("margin") == 5
    shown = python_in(bare_python, folder, "usage_examples.py")
    assert shown.returncode == 0, shown.stderr
    info = read_json(folder / "model_info.json")
    lines = shown.stdout.splitlines()
    assert lines[1].partition(": ")[2] == lines[2].partition(": ")[2]  # chat and stream write the same
    for line, check in zip([line for line in lines if line.startswith("labels")], info["checks"], strict=False):
        margin = check["labels"][1] - check["labels"][0]
        share = float(re.search(r"正面 ([\d.]+)%", line)[1])
        assert share == pytest.approx(100 / (1 + 2.718281828**-margin), abs=0.2)
    assert python_in(bare_python, folder, "usage_examples.py", "transformers").returncode == 1  # no such folder


@pytest.mark.parametrize("what", ["weights", "document", "answer", "missing"])
def test_damage_is_found(what: str, made: PackageResult, bare_python: Path, tmp_path: Path) -> None:
    folder = unpack(made.archive, tmp_path)
    name = (
        made.report["file"]["name"] if what == "weights" else "README.md" if what == "document" else "model_info.json"
    )
    if what == "missing":
        (folder / "Modelfile").unlink()
    elif what == "answer":  # a file that agrees with its hash, but not with the model
        info = read_json(folder / name)
        info["checks"][0]["log_probs"][0] -= 2 + abs(info["checks"][0]["log_probs"][0])
        info["checks"][1]["labels"] = [value - 3 * i for i, value in enumerate(info["checks"][1]["labels"])]
        info["checks"][2]["prompt_ids"] = info["checks"][2]["prompt_ids"][1:]
        write_json(folder / name, info)
        sums = (folder / "SHA256SUMS").read_text()
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        (folder / "SHA256SUMS").write_text(re.sub(rf"\w+  {name}", f"{digest}  {name}", sums))
    else:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
    answer = python_in(bare_python, folder, "test_model.py")
    assert answer.returncode == 1 and answer.stderr == ""
    if what == "answer":
        assert "2 of 5 prompts" in answer.stdout and "stored" in answer.stdout
        assert "label margins differ by" in answer.stdout and "other token ids" in answer.stdout
    else:
        assert f"FAILED: {'Modelfile is missing' if what == 'missing' else f'{name} is damaged'}" in answer.stdout


@pytest.mark.parametrize("sums", [None, "", "\n", "\xff"])
def test_without_sums_nothing_is_trusted(sums: str | None, tmp_path: Path, bare_python: Path) -> None:
    """And without model_info.json the examples end with a sentence."""
    for name in ("test_model.py", "usage_examples.py"):
        shutil.copy(Path(__file__).parents[3] / "lib" / "stages" / "package" / "scripts" / name, tmp_path / name)
    if sums is not None:
        (tmp_path / "SHA256SUMS").write_text(sums, encoding="latin-1")
    tested = python_in(bare_python, tmp_path, "test_model.py")
    assert tested.returncode == 1 and tested.stderr == "" and "FAILED: SHA256SUMS" in tested.stdout
    shown = python_in(bare_python, tmp_path, "usage_examples.py")
    assert shown.returncode == 1 and shown.stderr.startswith("model_info.json cannot be read")


def test_a_terminal_of_another_encoding(made: PackageResult) -> None:
    """cp1252 has neither the arrow nor Chinese."""
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, "-B", "test_model.py"]
    tested = subprocess.run(command, cwd=made.product.path, env=environment, capture_output=True, timeout=300)
    assert tested.returncode == 0 and b"5 of 5 prompts" in tested.stdout, tested.stderr


def test_the_guide_computes_its_numbers(made: PackageResult) -> None:
    text = (made.product.path / "deployment_guide.md").read_text(encoding="utf-8")
    entry, per_token = made.report["evaluation"]["file"], made.report["bytes_read_per_token"]
    assert f"{entry['generation_tokens_per_second']:.0f} tokens/s" in text
    assert 0 < per_token < entry["bytes"]  # the header is not read for every token
    assert f"| LPDDR5-6400 | 51.2 GB/s | {51.2e9 / per_token:,.0f} tokens/s |" in text
    outside = re.sub(r"^  -d '.*'$|```(kotlin|swift)\n.*?```", "", text, flags=re.M | re.S)
    assert "{" not in outside.replace("{text}", "")


def commands_of(text: str) -> list[list[str]]:
    """The words of every command in the guide, as a shell reads them."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    return [shlex.split(line, comments=True) for b in blocks for line in b.replace("\\\n", " ").splitlines() if line]


def test_the_guide_sends_the_trained_prompt(made: PackageResult) -> None:
    info = read_json(made.product.path / "model_info.json")
    text = (made.product.path / "deployment_guide.md").read_text(encoding="utf-8")
    commands = commands_of(text)
    chats = [words for words in commands if words and words[0].endswith("llama-cli")]
    assert len(chats) == 3 and all(words[words.index("-sys") + 1] == info["system"] for words in chats)
    turn = info["user"].replace("{text}", info["checks"][0]["text"])
    asked = [words[words.index("-p") + 1] for words in chats if "-p" in words]
    assert asked == [turn]
    (request,) = [json.loads(words[words.index("-d") + 1]) for words in commands if words and words[0] == "curl"]
    assert [message["content"] for message in request["messages"]] == [info["system"], turn]
    assert "No phone measurement is part of this package" in text


def test_a_type_that_was_not_compared_is_refused(runs: Callable[[str], Run]) -> None:
    with pytest.raises(InputError, match=r"Q4_K_M.*F16, Q8_0"):
        package(runs("t"), "Q4_K_M")


def test_where_the_zip_cannot_go(made: PackageResult, runs: Callable[[str], Run], tmp_path: Path) -> None:
    for inside in (made.product.path, made.product.path / "zips", runs("t").folder / "data"):
        with pytest.raises(InputError, match="is inside run 't'"):
            package(runs("t"), "Q8_0", output=inside)
    assert not (made.product.path / "zips").exists()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file is a file\. Expected: a folder"):
        package(runs("t"), "Q8_0", output=tmp_path / "file")


def test_results_are_never_kept_in_what_is_served(
    made: PackageResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lib.cli.package import serve as command
    from lib.serve.listening import ServeOptions

    kept: list[Path] = []
    monkeypatch.setattr("lib.serve.phone.serve_phone", lambda package, devices, *_: kept.append(devices))
    command(made.product.path, ServeOptions(), phone=True)
    shutil.copytree(made.product.path, tmp_path / "model")
    command(tmp_path / "model", ServeOptions(), phone=True)
    assert kept == [made.product.path.parent / "devices", tmp_path / "model-devices"]


def test_a_failing_check_publishes_nothing(runs: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs("talk")
    for name, value in {"TOLERANCE": -1.0, "TOLERANCE_SHARE": 0.0}.items():  # no difference is small enough
        monkeypatch.setattr(f"lib.stages.package.documents.{name}", value)
    before = run.manifest.entries().get("package"), sorted(run.folder.rglob("*.zip"))  # of other tests
    with pytest.raises(RuntimeError, match="own test_model"):
        package(run, "Q8_0", n_threads=1, force=True)
    assert (run.manifest.entries().get("package"), sorted(run.folder.rglob("*.zip"))) == before
    assert (run.folder / "package").is_dir() == (before[0] is not None)


def test_conversations(runs: Callable[[str], Run], bare_python: Path, tmp_path: Path) -> None:
    made = package(runs("talk"), "F16", output=tmp_path / "zip", n_threads=1)
    assert made.report["file"]["name"] == "Qwen2.5-0.5B-Instruct-talk-v1.0-F16.gguf"
    card = (made.product.path / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "apache-2.0" and front["base_model"] == "Qwen/Qwen2.5-0.5B-Instruct"
    assert "| answer_ppl |" in card and "accuracy |" not in card
    folder = unpack(made.archive, tmp_path / "out")
    info = read_json(folder / "model_info.json")
    assert info["labels"] == [] and all(len(check["ids"]) == len(check["log_probs"]) for check in info["checks"])
    answer = python_in(bare_python, folder, "test_model.py")
    assert answer.returncode == 0 and "5 of 5" in answer.stdout, answer.stdout
    assert python_in(bare_python, folder, "usage_examples.py", "chat").returncode == 0
    refused = python_in(bare_python, folder, "usage_examples.py", "labels")
    assert refused.returncode == 1 and "chat, stream" in refused.stdout


def test_export_tree(runs: Callable[[str], Run], home: Path, bare_python: Path, tmp_path: Path) -> None:
    """A copy of the run with a 16-bit export: folders by hard links, and transformers loads one in a bare process."""
    shutil.copytree(runs("t").folder, home / "runs" / "t")
    run = open_run("t")
    with pytest.raises(InputError, match="exports of no format"):
        package(run, "Q8_0", ["fp16"])
    tiny_run.make_base(tmp_path / "model", "float16")
    record = {"format": "fp16", "title": "16-bit floats", "folder": "fp16"}

    def exports(work) -> None:
        shutil.copytree(tmp_path / "model", work.folder / "fp16")
        write_json(work.folder / "exports.json", {"made": [record], "skipped": []})

    run.produce("exports", exports, {"new": True})
    made = package(run, "Q8_0", ["fp16", "gguf"], n_threads=1)
    folder = made.product.path
    assert {path.name for path in (folder / "gguf").iterdir()} == {"m-F16.gguf", "m-Q8_0.gguf"}
    assert (folder / "gguf" / "m-F16.gguf").samefile(run.folder / "gguf" / "m-F16.gguf")
    assert (folder / "fp16" / "model.safetensors").stat().st_nlink == 2
    assert "torch==" in (folder / "requirements.txt").read_text()
    answer = python_in(bare_python, unpack(made.archive, tmp_path / "out"), "usage_examples.py", "transformers")
    assert answer.returncode == 0 and answer.stdout.startswith("transformers, fp16/:"), answer.stderr


def test_the_command(runs: Callable[[str], Run], at_home: None, capsys: pytest.CaptureFixture[str]) -> None:
    from lib.cli.package import package as command

    runs("t")
    with pytest.raises(InputError, match="merged_model, fp16, int8, int4, onnx, mnn, gguf"):
        command("t", formats="fp8")
    command("t", type_name="Q8_0", as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["type"] == "Q8_0" and Path(told["zip"]).is_file() and told["standing"] == "without sufficient evidence"
