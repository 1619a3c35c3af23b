"""A product is complete or absent; an unchanged one is skipped; a changed or damaged one is made again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lib.errors import InputError
from lib.runs import manifest
from lib.runs import run as runs
from lib.runs.files import atomic_path, read_json, require_space
from lib.runs.manifest import Manifest
from lib.runs.run import ProductDraft, Run, open_run


@pytest.fixture
def run(home: Path) -> Run:
    return open_run("t")


def write(text: str):
    def build(work: ProductDraft) -> None:
        (work.folder / "a.txt").write_text(text)
        work.metrics["n"] = len(text)
        work.notes.append("a note")

    return build


def test_made_then_skipped_then_redone_for_a_reason(run: Run) -> None:
    first = run.produce("data", write("x"), {"seed": 1})
    assert first.made and first.entry.metrics == {"n": 1}
    again = run.produce("data", write("x"), {"seed": 1})
    assert not again.made and "nothing to do" in again.message and again.entry == first.entry
    changed = run.produce("data", write("y"), {"seed": 2})
    assert changed.made and "seed: 1 → 2" in changed.message
    assert run.produce("data", write("y"), {"seed": 2}, force=True).message.endswith("(force: true).")
    assert run.stamps() == ["a note"]


def test_a_changed_input_redoes_the_stage_and_equal_bytes_do_not(run: Run) -> None:
    run.produce("data", write("x"), {"seed": 1})
    run.produce("adapter", write("a"), {}, inputs=("data",))
    run.produce("data", write("x"), {"seed": 2})
    assert not run.produce("adapter", write("a"), {}, inputs=("data",)).made
    run.produce("data", write("z"), {"seed": 3})
    assert "another data" in run.produce("adapter", write("a"), {}, inputs=("data",)).message


@pytest.mark.parametrize("remade", ["data", "adapter", "merged"])
def test_a_product_of_former_ones_is_not_current(run: Run, remade: str) -> None:
    """However far down the change is; what is made again from the new ones is current."""
    chain = {"data": (), "adapter": ("data",), "merged": ("data", "adapter"), "comparison": ("merged",)}
    for name, inputs in chain.items():
        run.produce(name, write(name), {}, inputs=inputs)
    assert run.require_current("comparison").path.name == "comparison"
    run.produce(remade, write("other"), {}, inputs=chain[remade], force=True)
    assert run.require_current(remade) and run.require("comparison")
    with pytest.raises(InputError, match=f"of run 't' was made from another {remade}.*run 0[247]_"):
        run.require_current("comparison")
    assert run.outdated("comparison")[1] == remade and not run.outdated(remade)


def test_further_exports_leave_a_comparison_of_files_current(run: Run) -> None:
    for name, inputs in {"data": (), "exports": ("data",), "comparison": ("data", "exports")}.items():
        run.produce(name, write(name), {}, inputs=inputs)
    run.produce("exports", write("more"), {}, inputs=("data",), force=True)
    assert run.require_current("comparison") and run.require_current("exports")
    run.produce("data", write("other"), {}, force=True)
    with pytest.raises(InputError, match="the exports of run 't' was made from another data"):
        run.require_current("exports")


@pytest.mark.parametrize("command", ["pick", "package"])
def test_commands_refuse_a_comparison_of_former_products(run: Run, command: str) -> None:
    from lib.cli.package import package
    from lib.cli.report import pick

    run.produce("data", write("x"), {})
    run.produce("comparison", write("c"), {}, inputs=("data",))
    run.produce("data", write("y"), {}, force=True)
    with pytest.raises(InputError, match="the comparison of run 't' was made from another data"):
        {"pick": pick, "package": package}[command]("t")


def test_damage_is_named_and_repaired(run: Run) -> None:
    product = run.produce("data", write("x"), {})
    (product.path / "a.txt").write_text("X")
    with pytest.raises(InputError, match="SHA-256"):
        run.require("data")
    assert "damaged" in run.produce("data", write("x"), {}).message
    (product.path / "a.txt").unlink()
    with pytest.raises(InputError, match="missing"):
        run.require("data")


def test_a_missing_input_names_the_notebook(run: Run) -> None:
    with pytest.raises(InputError, match="01_data"):
        run.produce("adapter", write("a"), {}, inputs=("data",))


def test_failure_keeps_the_previous_product_and_leaves_nothing_half(run: Run) -> None:
    run.produce("data", write("x"), {"seed": 1})

    def fails(work: ProductDraft) -> None:
        (work.folder / "a.txt").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"disk of .*t is full .*No space"):
        run.produce("data", fails, {"seed": 2})
    assert (run.require("data").path / "a.txt").read_text() == "x"
    assert sorted(p.name for p in run.folder.iterdir()) == [".lock", "data", "manifest.json"]


def test_an_interrupted_stage_finds_its_remains_only_for_the_same_request(run: Run) -> None:
    seen = []

    def build(work: ProductDraft) -> None:
        seen.append((work.resumed, sorted(p.name for p in work.folder.glob("*.ckpt"))))
        (work.folder / "1.ckpt").write_text("1")
        if len(seen) < 3:
            raise KeyboardInterrupt

    for parameters in ({"seed": 1}, {"seed": 2}, {"seed": 2}):
        try:
            run.produce("adapter", build, parameters, keep_partial=True)
        except KeyboardInterrupt:
            continue
    assert seen == [(False, []), (False, []), (True, ["1.ckpt"])]


@pytest.mark.parametrize("where", ["hash_folder", "remove", "add", "_tidy"])
def test_a_kill_after_the_work_does_not_cost_it(run: Run, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """While the files are hashed, before and after the folder is renamed, behind the entry: never made twice."""
    run.produce("adapter", write("old"), {"seed": 0})

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        owner = {"hash_folder": manifest, "_tidy": runs}.get(where, Manifest)
        patch.setattr(owner, where, killed)
        with pytest.raises(KeyboardInterrupt):
            run.produce("adapter", write("hours of work"), {"seed": 1}, keep_partial=True)

    def unwanted(work: ProductDraft) -> None:
        raise AssertionError("made again")

    again = run.produce("adapter", unwanted, {"seed": 1}, keep_partial=True)
    assert again.made == (where != "_tidy") and ("interrupted" in again.message) == again.made
    assert again.entry.metrics == {"n": 13} and list(again.entry.outputs) == ["a.txt"]
    assert run.require("adapter").entry == again.entry
    assert sorted(p.name for p in run.folder.rglob("*")) == [".lock", "a.txt", "adapter", "manifest.json"]


def test_finished_work_is_made_again_for_another_request_by_force_or_when_cut(run: Run, monkeypatch) -> None:
    def interrupted(seed: int) -> None:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Manifest, "add", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            run.produce("adapter", write("first"), {"seed": seed})

    for seed, wanted, force, cut in ((1, 2, False, False), (3, 3, True, False), (4, 4, False, True)):
        interrupted(seed)
        if cut:
            (run.folder / "adapter" / "a.txt").write_text("f")
        again = run.produce("adapter", write("second"), {"seed": wanted}, force=force)
        assert (again.path / "a.txt").read_text() == "second"


KILLED = """
import os, signal, sys
from lib.runs.run import open_run
def build(work):
    (work.folder / "a.txt").write_text("half")
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    import time; time.sleep(30)
open_run("t").produce("data", build, {})
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_killed_stage_leaves_no_product_and_can_be_run_again(run: Run, home: Path, name: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILLED), name]
    ended = subprocess.run(command, env={**os.environ, "WORKBOOK_HOME": str(home)}, capture_output=True, timeout=60)
    assert ended.returncode in (-signal.Signals[name], 1, 130)
    assert not (run.folder / "data").exists() and not run.manifest.entries()
    assert run.produce("data", write("x"), {}).made
    assert not (run.folder / ".data.part").exists()


def test_a_second_process_is_refused(run: Run) -> None:
    def build(work: ProductDraft) -> None:
        with pytest.raises(InputError, match="another process"):
            open_run("t").produce("adapter", write("a"), {})
        (work.folder / "a.txt").write_text("x")

    run.produce("data", build, {})


def test_an_unwritable_home_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("WORKBOOK_HOME", str(blocker / "below"))
    with pytest.raises(InputError, match="cannot be written"):
        open_run("t").produce("data", write("x"), {})


def test_atomic_path_leaves_nothing_on_failure(tmp_path: Path) -> None:
    final = tmp_path / "空 格.txt"
    with pytest.raises(ZeroDivisionError), atomic_path(final) as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []


def test_files_are_readable_as_the_umask_allows(run: Run) -> None:
    def build(work: ProductDraft) -> None:
        path = work.folder / "w.safetensors"
        path.write_text("x")
        path.chmod(0o600)

    old = os.umask(0o002)
    try:
        product = run.produce("merged", build, {})
    finally:
        os.umask(old)
    assert (product.path / "w.safetensors").stat().st_mode & 0o777 == 0o664


def test_disk_and_json_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="MB free"):
        require_space(tmp_path / "deep" / "er", 1 << 60, "a test")
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        read_json(tmp_path / "m.json")


@pytest.mark.parametrize(
    "odd",
    [
        {"outputs": {"a.txt": {"bytes": 1}}},
        {"outputs": {"a.txt": {"sha256": "0"}}},
        {"product": "adapter"},
        {"facts": {"rows": None}},
    ],
)
def test_an_entry_that_lacks_what_is_used_is_damage(home: Path, odd: dict) -> None:
    run = open_run("t")
    run.produce("data", write("x"), {})
    path = run.folder / "manifest.json"
    content = json.loads(path.read_text())
    content["products"]["data"] |= odd
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="of another version or damaged"):
        open_run("t").manifest.entries()
