"""The harness measures whole processes: clock, memory of all descendants, nothing flushed, failures said."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import harness, peers, shapes
from lib.errors import InputError
from lib.runs.files import FSYNC_VARIABLE, flush_to_disk

PROJECT = Path(__file__).resolve().parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@linux
def test_clock_and_memory_of_a_process_and_its_child(tmp_path: Path) -> None:
    held = "import time; held = bytearray(100 << 20); time.sleep(0.4)"
    alone = harness.measure(python(held))
    assert 0.4 < alone["wall_seconds"] < 10
    assert 100 < alone["peak_anonymous_mib"] < 150
    assert alone["peak_resident_mib"] >= alone["peak_anonymous_mib"]
    both = harness.measure(python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}]); {held}"))
    assert 100 < both["peak_anonymous_mib"] < 160, "one after the other"
    together = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {held!r}]); {held}; p.wait()"
    assert 200 < harness.measure(python(together))["peak_anonymous_mib"] < 260


@linux
def test_mapped_files_are_not_counted_as_allocated(tmp_path: Path) -> None:
    path = tmp_path / "mapped"
    path.write_bytes(bytes(50 << 20))
    code = (
        "import mmap, time; f = open({!r}, 'rb'); m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ);"
        " sum(m[i] for i in range(0, len(m), 4096)); time.sleep(0.3)"
    )
    figures = harness.measure(python(code.format(str(path))))
    assert figures["peak_anonymous_mib"] < 40 < 50 < figures["peak_resident_mib"]


def test_a_command_that_fails_is_said() -> None:
    with pytest.raises(InputError, match=r"ended with 3.*last words"):
        harness.measure(python("import sys; print('last words'); sys.exit(3)"))


@linux
def test_sides_run_in_turn_and_the_result_has_the_promised_form(tmp_path: Path) -> None:
    log = tmp_path / "log"
    write = "from pathlib import Path; import sys, time; time.sleep({}); Path({!r}).write_text('x'); "
    note = f"open({str(log)!r}, 'a').write({{!r}})"
    ours = harness.Side("ours", [python(write.format(0.1, str(tmp_path / "a")) + note.format("o"))], [tmp_path / "a"])
    half = python(write.format(0.3, str(tmp_path / "b")) + note.format("p"))
    peer = harness.Side("peer", [half, half], [tmp_path / "b"])
    result = harness.compare("merge", ours, peer, 3, [tmp_path])
    assert log.read_text() == "opp" + "ppo" + "opp"
    assert set(result) >= {"name", "machine", "peer", "runs", "ours", "peer_figures", "ratios"}
    assert set(result["ratios"]) >= {"wall", "memory"}
    assert result["ratios"]["wall"] == pytest.approx(
        result["ours"]["wall_seconds"] / result["peer_figures"]["wall_seconds"], abs=1e-3
    )
    assert result["peer_figures"]["wall_seconds"] >= 0.6 and len(result["ours"]["wall_seconds_of_runs"]) == 3
    harness.write(tmp_path / "out" / "merge.json", result)
    assert json.loads((tmp_path / "out" / "merge.json").read_text()) == result
    assert "<svg" in (tmp_path / "out" / "merge.svg").read_text()


def test_a_side_without_its_output_is_said(tmp_path: Path) -> None:
    nothing = harness.Side("nothing", [python("pass")], [tmp_path / "absent"])
    with pytest.raises(InputError, match="nothing made no"):
        harness.compare("x", nothing, nothing, 1)


def test_the_workbook_leaves_flushing_to_the_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr("os.fsync", flushed.append)
    flush_to_disk(tmp_path)
    assert len(flushed) == 1
    monkeypatch.setenv(FSYNC_VARIABLE, "0")
    flush_to_disk(tmp_path)
    assert len(flushed) == 1
    answer = tmp_path / "answer"
    harness.measure(python(f"import os; open({str(answer)!r}, 'w').write(os.environ[{FSYNC_VARIABLE!r}])"))
    assert answer.read_text() == "0"


def test_peer_of_a_given_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(peers.LLAMA_CPP_VARIABLE, str(tmp_path))
    with pytest.raises(InputError, match=r"no convert_hf_to_gguf\.py"):
        peers.peer_llama_cpp()
    assert f"llama_cpp_python=={peers.pinned_version()}\n" in (PROJECT / "requirements.txt").read_text()


def test_shape_without_the_real_tokenizer(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBOOK_SHARED", str(home / "nowhere"))
    with pytest.raises(InputError, match="no real tokenizer"):
        shapes.shape_folder()
    with pytest.raises(InputError, match="unknown shape"):
        shapes.shape_folder("qwen9")


def test_a_shape_is_a_model_that_peft_and_the_merge_accept(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_data: Path
) -> None:
    """The builder itself on a narrow configuration: every tensor that transformers expects, every adapter consumed."""
    import shutil

    from lib.stages.merge.weights import merge_folders

    name = "qwen2.5-0.5b-instruct"
    shutil.copytree(shared_data / name, tmp_path / "data" / name)
    path = tmp_path / "data" / name / "config.json"
    config = json.loads(path.read_text())
    small = {"hidden_size": 28, "intermediate_size": 32, "num_hidden_layers": 2, "max_window_layers": 2}
    path.write_text(json.dumps({**config, **small}))
    monkeypatch.setenv("WORKBOOK_SHARED", str(tmp_path))
    model, adapter = shapes.shape_folder()
    assert (model, adapter) == shapes.shape_folder(), "built once"
    merge_folders(model, adapter, tmp_path / "merged")
    from transformers import AutoModelForCausalLM

    _, loading = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_limit_is_printed_beside_the_ratios(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    side = {"name": "ours", "samples_per_second": 2.0, "samples_per_second_of_runs": [2.0], "peak_anonymous_mib": 9.0}
    result = {"name": "n", "sides": {"ours": side}, "ratios": {"a": 1.5}, "machine": "m"}
    harness.write_rates(tmp_path / "one.json", {**result, "limit": {"tokens_per_second": 208.0}})
    assert json.loads(capsys.readouterr().out) == {"name": "n", "a": 1.5, "limit": {"tokens_per_second": 208.0}}
    harness.write_rates(tmp_path / "two.json", result)
    assert json.loads(capsys.readouterr().out) == {"name": "n", "a": 1.5}
