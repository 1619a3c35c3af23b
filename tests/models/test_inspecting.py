"""`workbook inspect`: what things are, what they lack; damaged files of every kind are described, never a traceback."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib.cli.__main__ import app
from lib.cli.models import as_text, examine
from lib.errors import InputError
from lib.models.base_model import refuse_bad_template
from lib.models.gguf_file import read_metadata
from lib.models.inspect import inspect
from lib.models.unpack import unpack
from lib.prompts import templates
from lib.prompts.templates import describe_template
from lib.runs.machine import llama_cpp_problem
from lib.serve.listening import ServeOptions
from lib.serve.openai import make_application
from tests import tiny_gguf
from tests.models import packed
from tests.stages.convert.convertible import write_model

PROJECT = Path(__file__).resolve().parents[2]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OWN_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}" + CHATML


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ (two shards), adapter/, small.gguf."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("inspected")
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = Qwen2Config(**shape, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "model", max_shard_size="15KB")
    tokens = {f"t{i}": i for i in range(60)}
    added = [{"id": 60 + i, "content": name} for i, name in enumerate(tiny_gguf.SPECIAL_TOKENS)]
    tokenizer = {"model": {"type": "BPE", "vocab": tokens, "merges": []}, "added_tokens": added}
    (folder / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps({"chat_template": OWN_SYSTEM}))
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_rslora=True)
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    tiny_gguf.write(folder / "small.gguf")
    return folder


@pytest.fixture
def here(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "here"))


def test_a_model(original: Path) -> None:
    report = inspect(original / "model")
    assert report["kind"] == "model" and report["problems"] == []
    assert (report["architecture"], report["layers"], report["hidden_size"]) == ("Qwen2ForCausalLM", 2, 32)
    assert report["parameters"] == 64 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 32 + 2 * 16 + 3 * 32 * 48 + 64) + 32
    assert report["dtype"] == "BF16" and report["tied"] is True and report["weight_files"] > 1
    assert report["vocabulary"] == 63 and report["added_tokens"] == list(tiny_gguf.SPECIAL_TOKENS)
    assert report["template"]["own_system_turn"] is True and len(report["template"]["sha256"]) == 64
    assert report["bytes"] == sum(p.stat().st_size for p in (original / "model").iterdir())


def test_an_adapter(original: Path) -> None:
    report = inspect(original / "adapter")
    assert (report["kind"], report["variant"], report["rank"], report["alpha"]) == ("adapter", "rsLoRA", 3, 6)
    assert report["targets"] == ["down_proj", "q_proj"] and report["changed_modules"] == 4
    assert report["parameters"] == 2 * (3 * (32 + 32) + 3 * (48 + 32)) and report["problems"] == []


def test_a_gguf_file(original: Path) -> None:
    report = inspect(original / "small.gguf")
    assert (report["kind"], report["architecture"], report["problems"]) == ("gguf", "qwen2", [])
    assert report["parameters"] > 0 and report["tied"] is True and report["vocabulary"] > 256
    assert sum(report["types"].values()) == report["tensors"] and report["layers"] >= 1


def test_a_cut_gguf_file_is_incomplete(here: Path) -> None:
    path = here / "small.gguf"
    path.write_bytes(path.read_bytes()[:-40])
    (problem,) = inspect(path)["problems"]
    assert problem.startswith("incomplete: ")


@pytest.mark.parametrize(
    ("order", "version", "words"),
    [
        (">", 3, "version 3, big-endian"),
        (">", 2, "version 2, big-endian"),
        ("<", 1, "version 1"),
        ("<", 4, "version 4"),
    ],
)
def test_versions_and_byte_orders_are_named(
    packed_files: dict[str, Path], tmp_path: Path, order: str, version: int, words: str
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack(f"{order}I", version) + packed_files["llama"].read_bytes()[8:])
    with pytest.raises(InputError, match=rf"{words}\..*2 or 3, little-endian.*convert the model again"):
        unpack(path, tmp_path / "model")


@pytest.mark.skipif(llama_cpp_problem() is not None, reason="llama-cpp-python does not work here")
@pytest.mark.parametrize(
    ("key", "value"), [("rope.dimension_count", 8), ("attention.key_length", 8), ("attention.head_count_kv", [2, 1])]
)
def test_what_ends_llama_cpp_is_said(packed_files: dict[str, Path], tmp_path: Path, key: str, value: object) -> None:
    whole = packed_files["qwen2"].parent / "qwen2-f32.gguf"
    path = packed.repack(whole, tmp_path / "m.gguf", more={f"qwen2.{key}": value})
    (problem,) = examine(path)["problems"]
    assert "workbook serve: " in problem and "SIGABRT" in problem
    with pytest.raises(InputError, match="SIGABRT"):
        make_application(path, read_metadata(path), ServeOptions())


@pytest.mark.parametrize("name", ["x_norm.weight", "x.bias"])
def test_vectors_of_other_numbers_are_said(packed_files: dict[str, Path], tmp_path: Path, name: str) -> None:
    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = np.ones(32, np.float32)

    path = packed.repack(packed_files["qwen2"].parent / "qwen2-f32.gguf", tmp_path / "m.gguf", tensors=add)
    entry = packed.text(name) + struct.pack("<IQ", 1, 32)
    data = path.read_bytes()
    assert data.count(entry + struct.pack("<I", 0)) == 1
    path.write_bytes(data.replace(entry + struct.pack("<I", 0), entry + struct.pack("<I", 1)))
    assert any(name in problem and "float32" in problem for problem in inspect(path)["problems"])


def drop(name: str):
    return lambda folder: (folder / name).unlink()


def text(name: str, content: str):
    return lambda folder: (folder / name).write_text(content)


def configured(**changes: object):
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **changes}))

    return change


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
SHARD = "model-00001-of-00002.safetensors"
WRONG = {
    "shard missing": (lambda f: sorted(f.glob("model-*"))[0].unlink(), "1 of the index's files are missing"),
    "shard a pointer": (lambda f: sorted(f.glob("model-*"))[0].write_text(LFS), "Git LFS pointer.*git lfs pull"),
    "index damaged": (text("model.safetensors.index.json", "{"), "is damaged"),
    "no config": (drop("config.json"), "no config.json"),
    "config a page": (text("config.json", "<html>"), "config.json is a web page"),
    "config a key twice": (text("config.json", '{"model_type": "qwen2", "model_type": "qwen3"}'), "twice in one"),
    "config a list": (text("config.json", "[]"), "holds no object"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "no tokenizer"),
    "no template": (text("tokenizer_config.json", "{}"), "no chat template"),
    "broken template": (text("chat_template.jinja", "{% for %}"), "cannot be rendered"),
    "template that drops the user": (text("chat_template.jinja", "hello"), "leaves the turn of the user out"),
    "other number of layers": (configured(num_hidden_layers=3), "says 3 layers, the weights have 2"),
    "untied without matrix": (configured(tie_word_embeddings=False), "lacks 1 tensors that a qwen2 model"),
    "ids beyond the embeddings": (
        text("tokenizer.json", json.dumps({"model": {"vocab": {"a": 0, "b": 64}}})),
        "largest id is 64, but the model has 64 embeddings",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_model(here: Path, name: str) -> None:
    break_it, words = WRONG[name]
    break_it(here / "model")
    problems = "\n".join(inspect(here / "model")["problems"])
    import re

    assert re.search(words, problems), problems


def test_what_is_worth_knowing(here: Path) -> None:
    model = here / "model"
    (model / "pytorch_model.bin").write_bytes(b"\x80\x02")
    (model / "modeling_x.py").write_text("boom")
    configured(auto_map={"AutoModel": "x.X"}, quantization_config={"quant_method": "gptq"})(model)
    report = inspect(model)
    notes = "\n".join(report["notes"])
    assert report["problems"] == []
    for words in ("pytorch_model.bin is a pickle", "modeling_x.py is code", "auto_map", "already quantized (gptq)"):
        assert words in notes


def test_what_is_wrong_with_an_adapter(here: Path) -> None:
    adapter = here / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    assert "says rank 8, the tensors have [3]" in inspect(adapter)["problems"][0]
    (adapter / "adapter_config.json").unlink()
    assert inspect(adapter)["kind"] == "adapter" and "no adapter_config.json" in inspect(adapter)["problems"][0]


@pytest.mark.parametrize("base", ["\0", "a" * 5000, "~nosuchuser/x", "no/such"])
def test_a_base_that_is_no_path_is_only_not_there(here: Path, base: str) -> None:
    adapter = here / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    report = examine(adapter)
    assert report["problems"] == []
    assert "its base model is no folder on this disk: whether it fits was not checked" in report["notes"]


def test_other_things(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("hello")
    assert inspect(tmp_path)["kind"] == "unknown" and "x.txt" in inspect(tmp_path)["problems"][0]
    assert inspect(tmp_path / "x.txt")["problems"]
    with pytest.raises(InputError, match="no file or folder"):
        inspect(tmp_path / "nothing")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}{{ messages[0].content }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{{ raise_exception('no') }}",
        "{{ messages.pop() }}",
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    ],
)
def test_malicious_templates_end_as_sentences(template: str) -> None:
    found = describe_template(template)
    assert found["problem"] is not None and "\n" not in found["problem"]


def test_a_template_is_stopped_by_the_time_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.prompts.templates.SECONDS", 1)
    found = describe_template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    assert "trying the chat template computed longer than it may" in found["problem"]


def test_a_template_is_not_stopped_while_it_waits_for_a_processor() -> None:
    started = time.monotonic()
    waits = "import time\ndef wait(_):\n    time.sleep(3)\n    return {}\n"
    limited = "from lib.runs.child import limit_computing\nlimit_computing(1)\n"
    subprocess.run([sys.executable, "-c", f"{limited}{waits}wait(None)"], cwd=PROJECT, check=True)
    assert time.monotonic() - started > 3 and templates.PATIENCE > 10 * templates.SECONDS


REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
DROPS_SYSTEM = CHATML.replace("messages %}", "messages if m.role != 'system' %}")


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, DROPS_SYSTEM])
def test_a_template_without_system_turn_is_usable_without_a_system_prompt(
    here: Path, tmp_path: Path, template: str
) -> None:
    (here / "model" / "chat_template.jinja").write_text(template)
    report = inspect(here / "model")
    assert report["problems"] == [] and report["template"]["takes_system_turn"] is False
    assert any(note.startswith("usable without a system prompt only") for note in report["notes"])
    refuse_bad_template(here / "model", system_turn=False)
    with pytest.raises(InputError, match="writes no system turn"):
        refuse_bad_template(here / "model")


def test_ask_takes_such_a_model_without_a_system_prompt_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model", "qwen2")
    (model / "chat_template.jinja").write_text(REFUSES_SYSTEM)
    ask = ["ask", str(model), "--prompt", "x", "--max-new-tokens", "2"]
    assert not app(ask, standalone_mode=False)
    assert app([*ask, "--system-prompt", "S"], standalone_mode=False) == 2
    assert "writes no system turn" in capsys.readouterr().err


def test_templates_of_the_real_models(shared_data: Path) -> None:
    own = {"qwen2.5-0.5b-instruct": True, "qwen1.5-0.5b-chat": True, "qwen3-4b-thinking-2507": False}
    for name, system in own.items():
        report = inspect(shared_data / name)
        assert report["template"]["own_system_turn"] is system
        assert any("holds no weights" in problem for problem in report["problems"])
    assert inspect(shared_data / "qwen2.5-0.5b-instruct")["vocabulary"] == 151_665
    assert inspect(shared_data / "qwen2.5-0.5b-lora-sft")["rank"] == 8


def test_the_command(original: Path, tmp_path: Path) -> None:
    def workbook(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lib.cli", "inspect", *arguments]
        return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120)

    answer = workbook(str(write_model(tmp_path / "model")), "--json")
    assert answer.returncode == 0 and json.loads(answer.stdout)["layers"] == 2 and answer.stderr == ""
    answer = workbook(str(original / "adapter"))
    assert answer.returncode == 0 and "rank: 3" in answer.stdout and "no problem found" in answer.stdout
    answer = workbook(str(tmp_path))
    assert answer.returncode == 2 and "PROBLEM: neither a model nor an adapter" in answer.stdout
    answer = workbook(str(tmp_path / "none"))
    assert answer.returncode == 2 and "no file or folder" in answer.stderr and "Traceback" not in answer.stderr


damage = st.one_of(
    st.tuples(st.just("cut"), st.integers(0, 4000)),
    st.tuples(st.just("replace"), st.binary(max_size=300)),
    st.tuples(st.just("flip"), st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 255)), min_size=1, max_size=20)),
    st.tuples(st.just("remove"), st.none()),
    st.tuples(
        st.just("json"),
        st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=3)),
    ),
    st.tuples(
        st.just("fields"),
        st.dictionaries(
            st.sampled_from(
                [
                    *("model_type", "architectures", "num_hidden_layers", "vocab_size", "tie_word_embeddings"),
                    *("model", "added_tokens", "chat_template", "added_tokens_decoder", "weight_map", "metadata"),
                    *("peft_type", "r", "lora_alpha", "rank_pattern", "modules_to_save", "target_modules", "use_dora"),
                    *("base_model_name_or_path", "quantization_config", "auto_map"),
                ]
            ),
            st.none() | st.integers() | st.text(max_size=4) | st.lists(st.integers(), max_size=2)
            | st.dictionaries(st.text(max_size=3), st.none() | st.integers() | st.text(max_size=2), max_size=2),
            max_size=4,
        ),
    ),
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_damage_raises_anything(
    original: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    home = tmp_path_factory.getbasetemp() / "damaged"
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(original, home)
    things = sorted(path for path in home.rglob("*") if path.is_file() and path.suffix != ".md")
    for _ in range(data.draw(st.integers(1, 2))):
        how, value = data.draw(damage)
        path = data.draw(st.sampled_from([t for t in things if how != "fields" or t.suffix == ".json"]))
        content = bytearray(path.read_bytes() if path.exists() else b"")
        if how == "remove":
            path.unlink(missing_ok=True)
            continue
        if how == "cut":
            content = content[:value]
        elif how == "replace":
            content = bytearray(value)
        elif how == "json":
            content = bytearray(json.dumps(value).encode())
        elif how == "fields":
            try:
                whole = json.loads(bytes(content))
            except ValueError:
                whole = {}
            content = bytearray(json.dumps({**(whole if isinstance(whole, dict) else {}), **value}).encode())
        elif how == "flip":
            for position, mask in value:
                if position < len(content):
                    content[position] ^= mask
        path.write_bytes(bytes(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.prompts.templates.run_child", lambda *_, **__: {})
        for place in ("model", "adapter", "small.gguf"):
            if (home / place).exists():
                report = inspect(home / place)
                json.dumps(report)
                assert as_text(report)
