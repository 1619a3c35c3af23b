"""The simulated export: sizes from headers, checked against the formats themselves and against published files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lib.cli.__main__ import app
from lib.models.base_model import SHIPPED
from lib.models.configurations import shapes_of
from lib.models.weights import open_weights
from lib.runs.files import PROJECT
from lib.stages.export.sizes import about_gguf
from lib.stages.quantize.files import FILE_TYPES, predict_sizes
from tests import tiny_run

NUMBERS = {"Qwen/Qwen2.5-0.5B-Instruct": 494_032_768, "Qwen/Qwen3-0.6B": 596_049_920}
"""Weights of the published models, tied ones once (their model pages)."""
PUBLISHED = {
    ("Qwen/Qwen2.5-0.5B-Instruct", "Q4_K_M"): 397_808_192,
    ("Qwen/Qwen3-4B-Thinking-2507", "Q4_K_M"): 2_497_281_120,
}
"""Bytes of GGUF files that others published (bartowski, unsloth)."""


@pytest.mark.parametrize("name", NUMBERS)
def test_shapes_from_a_configuration_have_the_published_number_of_weights(name: str) -> None:
    from math import prod

    assert sum(map(prod, shapes_of(SHIPPED[name]).values())) == NUMBERS[name]


@pytest.mark.parametrize(("name", "recipe"), PUBLISHED)
def test_gguf_sizes_are_near_the_published_files(name: str, recipe: str) -> None:
    assert about_gguf(shapes_of(SHIPPED[name]), recipe) == pytest.approx(PUBLISHED[name, recipe], rel=0.03)


def test_shapes_from_a_configuration_are_those_of_the_model(tmp_path: Path) -> None:
    tiny_run.make_base(tmp_path / "model", "bfloat16")
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert shapes_of(config) == {n: t.shape for n, t in open_weights(tmp_path / "model").tensors.items()}


def test_estimates_without_llama_cpp_are_within_a_tenth(shared_data: Path, tmp_path: Path) -> None:
    """Of the header of a real model (Qwen2.5-0.5B: rows of 896, which K-types do not fit)."""
    from lib.models.tokenizer_files import FILES
    from lib.models.weights import pack_header
    from lib.stages.convert.convert import plan_conversion

    real, folder = shared_data / "qwen2.5-0.5b-instruct", tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", *FILES):
        if (real / name).is_file():
            (folder / name).write_bytes((real / name).read_bytes())
    shapes = shapes_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    sizes = {name: ("BF16", shape, 2 * int(__import__("math").prod(shape))) for name, shape in shapes.items()}
    header = pack_header(sizes, {})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(size for _, _, size in sizes.values()))
    plan_conversion(folder).write_header(tmp_path / "model.gguf")
    recipes = [name for name in FILE_TYPES if not name.startswith(("IQ1", "IQ2", "IQ3_XXS", "TQ", "Q2_0", "Q1_0"))]
    for row in predict_sizes(tmp_path / "model.gguf", recipes):
        assert about_gguf(shapes, row["type"]) == pytest.approx(row["bytes"], rel=0.1), row["type"]


@pytest.mark.parametrize("words", [["Qwen/Qwen3-0.6B"], ["Qwen/Qwen3-0.6B", "Qwen/Qwen1.5-0.5B-Chat"]])
def test_a_simulated_tree_says_that_nothing_was_made(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    answer = CliRunner().invoke(app, ["export", *words, "--simulate", "--output-dir", str(out)])
    assert answer.exit_code == 0 and "SIMULATED, nothing was made" in answer.output
    tree = out if len(words) == 1 else out / "Qwen3-0.6B"
    names = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    assert names == {f"{n}/README.md" for n in ("merged_model", "fp16", "int8", "int4")} | {
        "README.md",
        "export_report.json",
    }
    assert "**Nothing was made.**" in (tree / "README.md").read_text(encoding="utf-8")
    assert json.loads((tree / "export_report.json").read_text(encoding="utf-8"))["simulated"] is True
    again = CliRunner().invoke(app, ["export", *words, "--simulate", "--output-dir", str(out)])
    assert again.exit_code == 0


def test_the_real_adapter_is_described(shared_data: Path, tmp_path: Path) -> None:
    words = [str(shared_data / "qwen2.5-0.5b-lora-sft"), "--base-model", "Qwen/Qwen2.5-0.5B-Instruct", "--simulate"]
    answer = CliRunner().invoke(app, ["export", *words, "--output-dir", str(tmp_path / "out")])
    assert answer.exit_code == 0 and "LoRA of rank 8 with alpha 32 on 48 layers" in answer.output


def test_a_hub_id_that_cannot_be_asked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    answer = CliRunner().invoke(app, ["export", "Qwen/None", "--simulate", "--output-dir", str(tmp_path / "out")])
    assert answer.exit_code == 2 and "Qwen/None" in answer.output and not (tmp_path / "out").exists()


HEAVY = "torch accelerate bitsandbytes peft torchao llama_cpp compressed_tensors llmcompressor matplotlib papermill"
WITHOUT = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {HEAVY.split()!r} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
from lib.cli.__main__ import main
main()
"""


@pytest.mark.parametrize(
    "words",
    [
        ["export", "Qwen/Qwen3-0.6B", "--simulate", "--formats", "fp16,gguf:Q4_K_M", "--output-dir", "OUT"],
        ["export", "BASE", "--simulate", "--output-dir", "OUT"],
        ["inspect", "BASE"],
        ["params"],
        ["doctor"],
        ["doctor", "params/quick.yaml"],
        ["quantize", "--dry-run", "FILE.gguf", "OUT.gguf", "Q4_K_M"],
    ],
)
def test_the_base_install_runs_it(words: list[str], tmp_path: Path) -> None:
    """Without torch, llama.cpp and everything heavy; `doctor` may say what is missing (exit code 1)."""
    tiny_run.make_base(tmp_path / "BASE", "bfloat16")
    if "FILE.gguf" in words:
        from lib.stages.convert.convert import convert

        convert(tmp_path / "BASE", tmp_path / "FILE.gguf")
    where = {"OUT": "OUT", "BASE": "BASE", "FILE.gguf": "FILE.gguf", "OUT.gguf": "OUT.gguf"}
    given = [str(tmp_path / where[word]) if word in where else word for word in words]
    command = [sys.executable, "-c", WITHOUT, *given]
    answer = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert answer.returncode in ((0, 1) if words[0] == "doctor" else (0,)), answer.stdout + answer.stderr
    assert "fault of the workbook" not in answer.stderr
