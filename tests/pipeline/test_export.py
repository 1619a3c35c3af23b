"""`workbook export`: a LoRA folder and a full model become trees that load, answer, and are not made twice."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lib.cli.__main__ import app
from lib.models.loading import weight_bytes
from lib.runs.manifest import hash_folder
from lib.stages.package import stage as package
from tests import tiny_run
from tests.support.hub_fixture import hub  # noqa: F401
from tests.support.hub_server import Hub

pytestmark = pytest.mark.usefixtures("unmeasured_children", "forked_children", "home")

PAPERS = {"README.md", "deployment_guide.md", "usage_examples.py", "test_model.py", "requirements.txt"}
QUESTIONS = "很好吗？\n房间太小了\n什么是密钥？\n"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and a LoRA folder of it as a training leaves it (`checkpoint-4`)."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("checkpoints")
    tiny_run.make_base(folder / "base", "float32")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder / "checkpoint-4")
    (folder / "checkpoint-4" / "optimizer.pt").write_bytes(b"PK not read")
    (folder / "questions.txt").write_text(QUESTIONS, encoding="utf-8")
    return folder


def run(*words: object) -> tuple[int, str]:
    answer = CliRunner().invoke(app, ["export", *map(str, words)])
    return answer.exit_code, answer.output


def test_a_lora_folder_becomes_a_tree_that_answers(checkpoints: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (checkpoints / "checkpoint-4", "--base-model", checkpoints / "base", "--formats", "fp16,gguf:Q8_0,gguf:F16")
    words += ("--output-dir", out, "--prompts", checkpoints / "questions.txt", "--max-new-tokens", 6, "--json")
    code, text = run(*words)
    assert code == 0, text
    report = json.loads(text[text.index("{\n") :])
    assert report == json.loads((out / "export_report.json").read_text(encoding="utf-8"))
    assert {path.name for path in out.iterdir()} == {"merged_model", "fp16", "gguf", "export_report.json", *PAPERS}
    assert [record["path"] for record in report["formats"]] == [
        "fp16",
        "gguf/checkpoint-4-Q8_0.gguf",
        "gguf/checkpoint-4-F16.gguf",
    ]
    assert report["kind"] == "adapter" and report["skipped"] == [] and report["evaluation"] is None
    checks = [record["checks"] for record in (report["merged_model"], *report["formats"])]
    assert all(check["prompts"] == 3 and check["whole"] <= 3 for check in checks)
    assert checks[0]["same_text"] == 3 and checks[0]["chrf"] is None and checks[1]["chrf"] > 90
    assert [len(prompt["answers"]) for prompt in report["answers"]["prompts"]] == [4, 4, 4]
    assert report["formats"][0]["check"]["mean_kld"] < 1e-3
    for name in ("fp16", "gguf/checkpoint-4-Q8_0.gguf", "merged_model"):
        assert name in (out / "README.md").read_text(encoding="utf-8")
    own = subprocess.run([sys.executable, "test_model.py"], cwd=out, capture_output=True, text=True, timeout=300)
    assert own.returncode == 0 and "all is well" in own.stdout, own.stdout + own.stderr
    asked = [sys.executable, "usage_examples.py", "gguf/checkpoint-4-Q8_0.gguf"]
    used = subprocess.run(asked, cwd=out, capture_output=True, text=True, timeout=300)
    assert used.returncode == 0 and "answer:" in used.stdout, used.stdout + used.stderr

    damaged = out / "fp16" / "config.json"
    damaged.write_text(damaged.read_text(encoding="utf-8") + " ", encoding="utf-8")
    own = subprocess.run([sys.executable, "test_model.py", "fp16"], cwd=out, capture_output=True, text=True)
    assert own.returncode == 1 and "config.json is damaged" in own.stdout

    before = (out / "gguf" / "checkpoint-4-Q8_0.gguf").stat().st_mtime_ns
    code, text = run(*words[:-1])
    assert code == 0 and "merged_model: made before, unchanged" in text
    assert (out / "gguf" / "checkpoint-4-Q8_0.gguf").stat().st_mtime_ns == before
    assert "fp16: made before" not in text, "a damaged format is made again"
    assert weight_bytes(out / "fp16") < weight_bytes(out / "merged_model")


def test_an_interrupted_export_goes_on(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lib.pipeline import export as module

    words = (checkpoints / "base", "--output-dir", tmp_path / "out", "--formats", "bf16,fp16")
    words += ("--prompts", checkpoints / "questions.txt", "--max-new-tokens", 2)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "ask_models", interrupted)
        assert run(*words)[0] == 130
    report = json.loads((tmp_path / "out" / "export_report.json").read_text(encoding="utf-8"))
    assert report["finished"] is False and len(report["formats"]) == 2
    code, text = run(*words)
    assert code == 0 and "bf16: made before, unchanged" in text and "fp16: made before, unchanged" in text
    assert json.loads((tmp_path / "out" / "export_report.json").read_text(encoding="utf-8"))["finished"] is True


def test_a_full_model_with_rows(checkpoints: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"{text},{i % 2}\n" for i, text in enumerate(tiny_run.texts(12, 3))))
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(checkpoints / "base", model)
    (model / "training_args.bin").write_bytes(b"PK not read")
    words = (
        "--output-dir",
        out,
        "--formats",
        "bf16",
        "--data",
        rows,
        "--label-names",
        "负面,正面",
        "--max-new-tokens",
        4,
    )
    code, text = run(model, *words, "--prompts", checkpoints / "questions.txt")
    assert code == 0, text
    report = json.loads((out / "export_report.json").read_text(encoding="utf-8"))
    assert report["kind"] == "model" and [m["model"] for m in report["evaluation"]["models"]] == [
        "merged_model",
        "bf16",
    ]
    assert "accuracy" in text and report["evaluation"]["data"]["n"] == 12
    merged = hash_folder(out / "merged_model")
    assert "training_args.bin" not in merged and merged["config.json"] == hash_folder(model)["config.json"]


def test_formats_of_earlier_exports_stay_with_their_model_and_scores_are_not_made_twice(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lib.pipeline import export as module

    rows, out, model = tmp_path / "rows.csv", tmp_path / "out", tmp_path / "model"
    rows.write_text("text,label\n" + "".join(f"{text},{i % 2}\n" for i, text in enumerate(tiny_run.texts(6, 3))))
    shutil.copytree(checkpoints / "base", model)
    words = ("--output-dir", out, "--prompts", checkpoints / "questions.txt", "--max-new-tokens", 2)
    words += ("--data", rows, "--label-names", "负面,正面")
    assert run(model, "--formats", "bf16", *words)[0] == 0
    code, text = run(model, "--formats", "fp16", *words)
    assert code == 0 and "bf16: made before, unchanged" in text
    report = json.loads((out / "export_report.json").read_text(encoding="utf-8"))
    assert [record["path"] for record in report["formats"]] == ["bf16", "fp16"]
    with monkeypatch.context() as patched:
        for name in ("ask_models", "evaluate_models"):
            patched.setattr(module, name, lambda *_, **__: pytest.fail("asked again"))
        assert run(model, "--formats", "fp16", *words)[0] == 0
    tiny_run.make_base(tmp_path / "other", "float32", seed=5)
    shutil.copyfile(tmp_path / "other" / "model.safetensors", model / "model.safetensors")
    assert run(model, "--formats", "fp16", *words)[0] == 0
    assert not (out / "bf16").exists(), "of other weights: nobody asked to make it anew"


def test_checkpoints_from_a_hub(hub: Hub, checkpoints: Path, tmp_path: Path) -> None:  # noqa: F811
    def content(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    hub.add("models", "org/model", content(checkpoints / "base"))
    hub.add("models", "org/adapter", content(checkpoints / "checkpoint-4"))
    words = ("--output-dir", tmp_path / "out", "--formats", "bf16", "--prompts", checkpoints / "questions.txt")
    code, text = run("org/adapter", "org/model", "--base-model", "org/model", *words, "--max-new-tokens", 2)
    assert code == 0, text
    for name, kind in (("adapter", "adapter"), ("model", "model")):
        report = json.loads((tmp_path / "out" / name / "export_report.json").read_text(encoding="utf-8"))
        assert (report["checkpoint"], report["kind"]) == (f"org/{name}", kind)
        assert (tmp_path / "out" / name / "bf16" / "model.safetensors").is_file()
    assert "--base-model changes nothing" in text
    merged = (tmp_path / "out" / "adapter" / "merged_model" / "README.md").read_text(encoding="utf-8")
    assert "org/model" in merged and str(tmp_path) not in merged


def test_what_libraries_say_at_every_start_is_one_list() -> None:
    from lib import CHATTER

    script = Path(package.__file__).with_name("scripts") / "usage_examples.py"
    given = script.read_text(encoding="utf-8").partition("CHATTER = ")[2].partition("\n}")[0] + "}"
    assert ast.literal_eval(given) == CHATTER


def test_one_that_fails_does_not_stop_the_others(checkpoints: Path, tmp_path: Path) -> None:
    bad = tmp_path / "empty"
    bad.mkdir()
    words = ("--output-dir", tmp_path / "out", "--formats", "bf16", "--prompts", checkpoints / "questions.txt")
    code, text = run(bad, checkpoints / "base", *words, "--max-new-tokens", 2)
    assert code == 2 and f"{bad}: NOT EXPORTED. Found: {bad} is neither a model nor an adapter." in text
    assert (tmp_path / "out" / "base" / "bf16" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "empty").exists()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--formats", "fp8"], "--formats with 'fp8'"),
        (["--formats", "gguf:Q4_K_X"], "--formats with gguf:Q4_K_X"),
        (["--formats", ","], "--formats without a name"),
        (["--formats", "gptq"], "gptq without --text"),
        (["--formats", "bf16,gguf:IQ2_XS"], "gguf:IQ2_XS without --text"),
        (["--tokenizer", "mine"], "--tokenizer 'mine'"),
        (["--prompts", "nowhere.txt"], "--prompts: "),
    ],
)
def test_what_no_checkpoint_could_become(checkpoints: Path, tmp_path: Path, words: list[str], found: str) -> None:
    code, text = run(checkpoints / "base", "--output-dir", tmp_path / "out", *words)
    assert code == 2 and text.startswith("Found: ") and found in text
    assert not (tmp_path / "out").exists()


def test_nothing_else_is_overwritten(checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    code, text = run(checkpoints / "base", "--output-dir", tmp_path, "--formats", "bf16")
    assert code == 2 and "holds" in text and "no export_report.json" in text
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["thesis.txt"]
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    code, text = run(gguf, "--output-dir", tmp_path / "out")
    assert code == 2 and "workbook unpack" in text
