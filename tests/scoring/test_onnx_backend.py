"""ONNX Runtime GenAI against transformers on unrounded weights, and folders that are refused."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from lib.cli.__main__ import app
from lib.errors import InputError
from lib.models.onnx_folder import CONFIG, GRAPH, check_onnx_folder
from lib.models.runtime_folders import runtime_of
from lib.scoring.backend import Backend
from lib.scoring.folders import open_folder
from lib.scoring.generation import write
from tests import tiny_run

genai = pytest.importorskip("onnxruntime_genai")
onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_run.make_base(folder, "float32")
    return folder


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in float32, as the official builder writes them."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    made = tmp_path_factory.mktemp("onnx") / "fp32"
    asked = ("", str(base), str(made), "fp32", "cpu", str(made.parent / "cache"))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        create_model(*asked, **parse_extra_options(*asked, ["hf_token=false"]))
    shutil.copyfile(base / "config.json", made / "config.json")
    return made


@pytest.fixture(scope="module")
def both(base: Path, folder: Path) -> tuple[Backend, Backend]:
    return open_folder(folder), open_folder(base)


def prompts(base: Path) -> list[list[int]]:
    from lib.models.loading import load_tokenizer

    tokenizer = load_tokenizer(base)
    return [tiny_run.TASK.encode(tokenizer, {"text": text}).prompt_ids for text in tiny_run.texts(9, 3)]


def test_labels_as_transformers_scores_them(base: Path, both: tuple[Backend, Backend]) -> None:
    """With the common beginning computed once, and answers of several tokens."""
    asked, answers = prompts(base), [[300], [301, 17, 40], [301, 9]]
    ours, theirs = (backend.label_log_probs(asked, answers) for backend in both)
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    alone = np.array([both[0].label_log_probs([prompt], answers)[0] for prompt in asked])
    np.testing.assert_allclose(ours, alone, atol=1e-5)


def test_answers_and_windows_as_transformers(base: Path, both: tuple[Backend, Backend], monkeypatch) -> None:
    """In passes of a few tokens, as long texts are computed."""
    monkeypatch.setattr("lib.scoring.process_backend._CHUNK", 7)
    rows = prompts(base)
    spans = [[[2, 5], [len(ids) - 3, len(ids)]] for ids in rows]
    for ours, theirs in zip(*(backend.token_log_probs(rows, spans) for backend in both), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)
    for first in (0, 3, 11):
        ours, theirs = (backend.window_log_probs(rows[0], first) for backend in both)
        assert ours.shape == theirs.shape == (len(rows[0]) - first, both[0].vocab_size)
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_it_writes_what_transformers_writes(base: Path, both: tuple[Backend, Backend]) -> None:
    for ids in prompts(base)[:3]:
        ours, theirs = (write(backend.new_text(), ids, 16, ()).ids for backend in both)
        assert ours == theirs


def test_a_text_beyond_its_context_is_refused(folder: Path) -> None:
    with open_folder(folder, n_ctx=12) as backend, pytest.raises(InputError, match="context of"):
        write(backend.new_text(), list(range(1, 9)), 8, ())


def test_a_number_of_threads_changes_nothing(base: Path, folder: Path, both: tuple[Backend, Backend]) -> None:
    ids = prompts(base)[0]
    with open_folder(folder, n_threads=1) as backend:
        assert backend.settings["n_threads"] == 1 and backend.settings["onnxruntime-genai"]
        np.testing.assert_allclose(backend.window_log_probs(ids), both[0].window_log_probs(ids), atol=1e-4)


def changed(content: dict, path: str, value: object) -> dict:
    *parents, last = path.split(".")
    place = content
    for name in parents:
        place = place[name]
    place[last] = value
    return content


ODD = {
    "model.decoder.session_options.custom_ops_library": "evil.so",
    "model.decoder.session_options.provider_options": [{"cuda": {}}],
    "model.decoder.filename": "../model.onnx",
    "model.decoder.pipeline": [{}],
    "model.vision": {},
    "model.vocab_size": None,
    "model.context_length": -1,
    "model.decoder.run_options": {"enable_profiling": "/tmp/profile"},
    "model.decoder.sliding_window": {"window_size": 4},
    "model.decoder.outputs.logits": "present.0.key",
    "model.decoder.inputs.past_key_names": "%s%s%s%n",
    "model.decoder.session_options.log_id": "a\x1b[2J",
    "model.type": ["qwen2"],
    "model.decoder.head_size": 10**9,
    "engine": {},
    "search.chunk_size": 3,
    "search.num_beams": 10,
    "model.decoder": [],
    "model": None,
}


@pytest.mark.parametrize("path", ODD)
def test_settings_that_could_run_code_or_are_damaged(path: str, folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    content = json.loads((copy / CONFIG).read_text())
    (copy / CONFIG).write_text(json.dumps(changed(content, path, ODD[path])))
    with pytest.raises(InputError, match="genai_config"):
        open_folder(copy)


def foreign_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "my.own"


def weights_elsewhere(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../etc/passwd"


def odd_offset(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "offset":
                entry.value = "abc"


def other_vocabulary(model: onnx.ModelProto) -> None:
    next(o for o in model.graph.output if o.name == "logits").type.tensor_type.shape.dim[2].dim_value = 7


@pytest.mark.parametrize("change", [foreign_operator, weights_elsewhere, odd_offset, other_vocabulary])
def test_graphs_that_reach_outside(change: Callable, folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    model = onnx.load(str(copy / GRAPH), load_external_data=False)
    change(model)
    (copy / GRAPH).write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=r"operators of my\.own|no file of its folder|no ONNX model"):
        check_onnx_folder(copy)


@pytest.mark.parametrize(
    ("name", "keep", "words"),
    [(GRAPH, 200, "no ONNX model"), (f"{GRAPH}.data", 100, "last tensor ends"), (GRAPH, None, "has no model.onnx")],
)
def test_cut_and_missing_files(name: str, keep: int | None, words: str, folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    data = (copy / name).read_bytes()
    (copy / name).unlink()
    if keep is not None:
        (copy / name).write_bytes(data[:keep])
    with pytest.raises(InputError, match=words):
        check_onnx_folder(copy)


def test_a_folder_of_two_models(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 99}))
    with pytest.raises(InputError, match=r"and config\.json beside it 99"):
        check_onnx_folder(copy)


def test_inspect_and_doctor_know_it(base: Path, folder: Path, tmp_path: Path) -> None:
    """What runs it is told from what needs weights for transformers."""
    whole = Path(shutil.copytree(folder, tmp_path / "onnx"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(base / name, whole / name)
    told = CliRunner().invoke(app, ["inspect", str(whole)])
    assert told.exit_code == 0 and "onnx" in told.stdout and "no problem found" in told.stdout
    asked = CliRunner().invoke(app, ["doctor", "--model", str(whole)])
    assert asked.exit_code == 2 and "a model for ONNX Runtime, and no weights" in asked.stdout + asked.stderr


def test_without_its_package_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime_of(folder).title == "ONNX Runtime"
    monkeypatch.setattr("lib.models.onnx_folder.has_module", lambda name: False)
    with pytest.raises(InputError, match=r"onnxruntime_genai, onnx are not installed.*extra onnx"):
        open_folder(folder)
