"""The protocol between the scorer and a runtime's process, with small runtimes of NumPy that answer well or badly."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lib.errors import InputError
from lib.models.runtime_folders import RUNTIMES, Runtime, runtime_of
from lib.runs.files import PROJECT
from lib.runs.packages import environment_problem
from lib.scoring.generation import write
from lib.scoring.process_backend import ProcessBackend

VOCABULARY, LONGEST = 23, 40
RUNTIME = Runtime("a runtime", "fake", "fake.json", ("*",), "", lambda folder: {"vocab_size": 23, "context_length": 40})

GOOD = """
import numpy as np, sys, json, os
from lib.scoring.runtimes.protocol import _say, serve
class Fake:
    versions = {"fake": "1"}
    text = []
    def forward(self, keep, ids, first, most):
        assert keep + len(ids) <= most
        self.text = self.text[:keep] + list(ids)
        sums = np.cumsum(self.text)[keep + first:]  # logits of a place hang on every token before it
        return np.cos(np.outer(sums, np.arange(1, 24) ** 2)) * 3
    def encode(self, text):
        return [ord(letter) % 23 for letter in text]
"""
SERVE = """
out = os.fdopen(os.dup(1), "wb")
print("a library says something")
_say(out, {"versions": Fake.versions, "load_seconds": 0.25, "confined": True})
serve(Fake(), 23, sys.stdin.buffer, out)
"""
HELLO = (
    "import sys, json, os\nprint(json.dumps({'versions': {}, 'load_seconds': 1, 'peak_memory_mib': 1}), flush=True)\n"
)
ASK = "sys.stdin.readline()\nout = sys.stdout.buffer\n"
ROW = 'out.write(b\'{"rows": 3, "peak_memory_mib": 1}\\n\')\n'


def logits_of(ids: list[int]) -> np.ndarray:
    return np.cos(np.outer(np.cumsum(ids), np.arange(1, 24) ** 2)) * 3


def log_probs(ids: list[int]) -> np.ndarray:
    logits = logits_of(ids)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[str], ProcessBackend]]:
    """opened(code): the backend whose process runs that code."""
    made = []

    def start(code: str) -> ProcessBackend:
        script = tmp_path / "runtime.py"
        script.write_text(code, encoding="utf-8")
        made.append(ProcessBackend(tmp_path, RUNTIME, command=[sys.executable, "-P", str(script)]))
        return made[-1]

    yield start
    for backend in made:
        backend.close()


def test_labels_windows_and_answers(opened: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """In requests of a few tokens, with the common beginning read once, equal to the same computed at once."""
    monkeypatch.setattr("lib.scoring.process_backend._CHUNK", 3)
    backend = opened(GOOD + SERVE.replace('print("a library says something")', ""))
    prompts = [[5, 1, 2, 3, 9, 9], [5, 1, 2, 3, 7], [5, 1, 2, 3, 4, 4, 4, 4]]
    answers = [[3, 8], [4], [3, 2]]
    found = backend.label_log_probs(prompts, answers)
    for row, prompt in zip(found, prompts, strict=True):
        for value, answer in zip(row, answers, strict=True):
            whole, start = log_probs(prompt + answer), len(prompt)
            assert value == pytest.approx(sum(whole[start + k - 1, token] for k, token in enumerate(answer)), abs=1e-5)
    for first in (0, 2, 5):
        assert np.allclose(backend.window_log_probs(prompts[0], first), log_probs(prompts[0])[first:], atol=1e-5)
    (read,) = backend.token_log_probs([prompts[2]], [[[2, 4], [6, 8]]])
    assert np.allclose(read, [log_probs(prompts[2])[p - 1, prompts[2][p]] for p in (2, 3, 6, 7)], atol=1e-5)
    ids, expected = list(prompts[0]), []
    for _ in range(5):
        expected.append(int(logits_of(ids)[-1].argmax()))
        ids.append(expected[-1])
    assert write(backend.new_text(), prompts[0], 5, ()).ids == expected
    assert backend.encode(["ab", ""]) == [[ord("a") % 23, ord("b") % 23], []]
    assert backend.load_seconds == 0.25 and backend.settings["fake"] == "1" and backend.peak_memory_mib() > 5


def test_wrong_ids_and_long_texts_never_reach_it(opened: Callable) -> None:
    backend = opened(HELLO + ASK)
    for ids in ([23], [-1], list(range(23)) * 2):
        with pytest.raises(InputError, match=r"token id|vocabulary|context of"):
            backend.label_log_probs([ids], [[1]])


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("", "ended with exit code 0"),
        ("import sys; print('no weights', file=sys.stderr); sys.exit(3)", "ended with exit code 3.*no weights"),
        (HELLO + ASK + "os.kill(os.getpid(), 11)", "SIGSEGV"),
        (HELLO + ASK + "print('{')\nsys.stdout.flush()\nsys.stdin.readline()", "ended"),
        (HELLO + ASK + ROW + "out.write(b'half')\nout.flush()", "ended"),
        (
            HELLO + ASK + 'out.write(b\'{"rows": 9, "peak_memory_mib": 1}\\n\')\nout.flush()\nsys.stdin.readline()',
            "shape",
        ),
        (GOOD.replace("return np", "return 1 / 0 * np") + SERVE.replace("print", "#"), "ZeroDivisionError"),
        (GOOD.replace("[keep + first:]", "[-1:]") + SERVE.replace("print", "#"), r"logits of shape \(1, 23\)"),
    ],
)
def test_a_child_that_is_dead_or_answers_by_halves(code: str, words: str, opened: Callable) -> None:
    with pytest.raises(InputError, match=words):
        opened(code).window_logits([1, 2, 3])


def test_numbers_that_are_none(opened: Callable) -> None:
    """They come through as they are; who reads them refuses them."""
    backend = opened(GOOD.replace("* 3", "* np.nan") + SERVE.replace("print", "#"))
    assert np.isnan(backend.label_log_probs([[1, 2]], [[3]])).all()
    with pytest.raises(InputError, match="not numbers"):
        write(backend.new_text(), [1, 2], 2, ())


def test_what_a_library_prints_does_not_stand_between_the_answers(tmp_path: Path) -> None:
    """The real start of a child: its own runtime module, standard output kept for answers alone."""
    import subprocess

    module = tmp_path / "lib_fake.py"
    module.write_text(
        GOOD + "import sys\nsys.modules['lib.scoring.runtimes.fake'] = sys.modules[__name__]\n"
        "def load(folder, n_threads, info):\n"
        "    print('loading')\n    os.system('echo from a shell')\n    return Fake()\n"
    )
    code = "import lib_fake; from lib.scoring.runtimes import protocol; from pathlib import Path; import json\n"
    code += f"protocol._main('fake', Path({str(tmp_path)!r}), 1, {{'vocab_size': 23}})"
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT), str(tmp_path)])}
    asked = json.dumps({"keep": 0, "ids": [1, 2], "first": 2, "most": 4}).encode() + b"\n"
    told = subprocess.run([sys.executable, "-c", code], input=asked, env=paths, capture_output=True)
    lines = [json.loads(line) for line in told.stdout.splitlines()]
    assert "PermissionError" in lines[0]["error"], "a confined runtime starts no other program"
    module.write_text(module.read_text().replace("    os.system('echo from a shell')\n", ""))
    told = subprocess.run([sys.executable, "-c", code], input=asked, env=paths, capture_output=True)
    lines = [json.loads(line) for line in told.stdout.splitlines()]
    assert lines[0]["versions"] == {"fake": "1"} and lines[1]["rows"] == 0 and b"loading" in told.stderr


def test_folders_tell_their_runtime(tmp_path: Path) -> None:
    assert runtime_of(tmp_path) is None
    for runtime in RUNTIMES:
        (tmp_path / runtime.module).mkdir()
        (tmp_path / runtime.module / runtime.marker).write_text("{}")
        assert runtime_of(tmp_path / runtime.module) is runtime


def test_an_environment_that_is_absent_says_how_it_is_made() -> None:
    assert environment_problem("of-no-format") == "no environment .venv-of-no-format: make format-of-no-format makes it"


ODD = {
    "llm_model": "../other.mnn",
    "lora": "x.mnn",
    "chunk": 8,
    "tmp_path": "/tmp",
    "system_prompt": "x",
    "backend_type": "a b\x1b[2J",
    "tokenizer_file": "/etc/passwd",
}


@pytest.mark.parametrize("key", ODD)
def test_settings_of_a_foreign_mnn_folder(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.models.runtime_folders.environment_problem", lambda name: None)
    (tmp_path / "llm_config.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps({"llm_model": "llm.mnn", key: ODD[key]}))
    with pytest.raises(InputError, match=f"sets '{key}'"):
        runtime_of(tmp_path).check(tmp_path)  # type: ignore[union-attr]
