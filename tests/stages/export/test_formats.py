"""Every format: made, loaded by plain `from_pretrained`, close to its source, used as its README says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lib.errors import InputError
from lib.models.gguf_tokenizer import token_bytes
from lib.models.loading import count_weights, load_as_saved, quantization_method, weight_bytes
from lib.progress import Progress
from lib.runs.files import PROJECT
from lib.runs.packages import environment_python
from lib.scoring.folders import open_folder
from lib.scoring.generation import end_ids, write
from lib.settings import EXPORT_FORMATS
from lib.stages.export import child
from lib.stages.export.stage import FORMATS, question_of, write_card
from tests import tiny_run
from tests.stages.export.conftest import make, token_ids

pytestmark = pytest.mark.usefixtures("unmeasured_children", "forked_children")

Exported = Callable[[str], tuple[Path, dict]]
each = pytest.mark.parametrize("name", EXPORT_FORMATS)
METHODS = {
    "int8": "bitsandbytes",
    "nf4": "bitsandbytes",
    "gptq": "compressed-tensors",
    "autoround": "compressed-tensors",
    "torchao-int8": "torchao",
}
ONNX_FORMATS, MNN_FORMATS = ("onnx-int8", "onnx-int4"), ("mnn-int4",)
METHODS_OF_OTHERS = {**dict.fromkeys(ONNX_FORMATS, "ONNX Runtime"), **dict.fromkeys(MNN_FORMATS, "MNN")}
LARGEST_KLD = {"bf16": 0.0, "fp16": 1e-3, "torchao-int8": 5e-3, "int8": 5e-3, "nf4": 0.3, "gptq": 0.3, "autoround": 0.3}
LARGEST_KLD |= {"onnx-int8": 5e-3, "onnx-int4": 0.5, "mnn-int4": 0.5}


def test_settings_and_formats_name_the_same() -> None:
    assert tuple(FORMATS) == EXPORT_FORMATS


@each
def test_a_format_is_complete_and_close_to_its_source(name: str, exported: Exported, base: Path) -> None:
    folder, answer = exported(name)
    have = {path.name for path in folder.iterdir()}
    weights = {"model.onnx", "model.onnx.data"} if name in ONNX_FORMATS else {"model.safetensors"}
    weights = {"llm.mnn", "llm.mnn.weight"} if name in MNN_FORMATS else weights
    assert {*weights, "config.json", "tokenizer.json", "chat_template.jinja"} <= have
    assert not [path for path in have if path.endswith((".bin", ".pt", ".pth"))]
    assert all(path.stat().st_mode & 0o040 for path in folder.iterdir()), "not readable by the group"
    assert quantization_method(folder) == METHODS_OF_OTHERS.get(name, METHODS.get(name))
    assert -1e-9 <= answer["check"]["mean_kld"] <= LARGEST_KLD[name]
    assert answer["weights"] == count_weights(base) == count_weights(folder)
    assert answer["bytes"] == weight_bytes(folder) == sum((folder / n).stat().st_size for n in weights)
    assert answer["seconds"] > 0 and answer["peak_memory_mib"] > 100
    for path in folder.iterdir():  # no path of the machine that made it
        assert str(base.parent).encode() not in path.read_bytes()


@pytest.mark.parametrize("name", METHODS)
def test_quantized_formats_are_smaller_and_keep_the_embedding(name: str, exported: Exported, base: Path) -> None:
    from safetensors import safe_open

    folder, answer = exported(name)
    assert answer["bytes"] < weight_bytes(base)
    with safe_open(folder / "model.safetensors", "pt") as saved, safe_open(base / "model.safetensors", "pt") as source:
        key = "model.embed_tokens.weight"
        assert saved.get_tensor(key).equal(source.get_tensor(key))


def test_fewer_bits_are_further_away(exported: Exported) -> None:
    klds = {name: exported(name)[1]["check"]["mean_kld"] for name in ("bf16", "torchao-int8", "int8", "nf4", "gptq")}
    assert klds["bf16"] == 0 < min(klds["int8"], klds["torchao-int8"])
    assert max(klds["int8"], klds["torchao-int8"]) < min(klds["nf4"], klds["gptq"]) / 3


@pytest.mark.parametrize(  # a process takes seconds, and bf16 is loaded as fp16 is
    "name",
    [
        "fp16",
        "nf4",
        "gptq",
        "onnx-int4",
        "mnn-int4",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("int8", "torchao-int8")),
    ],
)
def test_the_usage_of_the_readme_works_in_a_fresh_process(name: str, exported: Exported) -> None:
    import torch

    from lib.models.loading import load_tokenizer

    folder, answer = exported(name)
    text = '他说："很好"，房间\\干净。'
    record = {**answer, "bytes": answer["bytes"], "bits_per_weight": 8.0, "peak_memory_mib": 1.0}
    asked = question_of(tiny_run.TASK, {"text": text})
    write_card(
        folder,
        FORMATS[name],
        record,
        made_of={"kind": "model", "model": "m"},
        notes=["a note"],
        asked=asked,
        calibrated_on="rows",
    )
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "> a note" in card and name in card and ("BitsAndBytesConfig" in card) == (name in ("int8", "nf4"))
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    assert "quantization_config" not in code and "device_map" not in code
    python = str(environment_python("mnn")) if name in MNN_FORMATS else sys.executable
    answered = subprocess.run([python, "-c", code], cwd=folder, capture_output=True, text=True, errors="replace")
    if name not in MNN_FORMATS:  # MNN's text is no string where a random model writes half a character
        assert answered.returncode == 0, answered.stderr
    tokenizer = load_tokenizer(folder)
    if name in METHODS_OF_OTHERS:
        messages = tiny_run.TASK.messages({"text": text})
        switches = {"add_generation_prompt": True, "enable_thinking": False}
        ids = tokenizer.apply_chat_template(messages, **switches, return_dict=True)["input_ids"]
        with open_folder(folder) as backend:
            own = write(backend.new_text(), ids, 8, end_ids(tokenizer)).ids
        written = b"".join(token_bytes(tokenizer, own)).decode("utf-8", "replace")
        assert written in answered.stdout and (name in MNN_FORMATS or answered.stdout == written + "\n")
        return
    model = load_as_saved(folder)
    prompt = tokenizer.apply_chat_template(
        tiny_run.TASK.messages({"text": text}),
        add_generation_prompt=True,
        enable_thinking=False,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        own = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    wanted = tokenizer.decode(own[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answered.stdout == wanted + "\n"


def test_calibration_decides_what_gptq_writes(base: Path, exported: Exported, tmp_path: Path) -> None:
    first, answer = exported("gptq")
    make("gptq", base, tmp_path / "again", seed=1)
    make("gptq", base, tmp_path / "other", seed=9)
    weights = [
        (folder / "model.safetensors").read_bytes() for folder in (first, tmp_path / "again", tmp_path / "other")
    ]
    assert weights[0] == weights[1] != weights[2]
    assert answer["calibration_rows"] == 24
    assert answer["calibration_tokens"] == sum(map(len, token_ids(base, 24, 1)))


def test_group_size_fits_the_layers(exported: Exported) -> None:
    assert child.group_of({896, 4864}) == 128 and child.group_of({256, 768}) == 128
    assert child.group_of({64, 128}) == 64 and child.group_of({48, 96}) == 16
    with pytest.raises(InputError, match="linear layers with 40 inputs"):
        child.group_of({40, 128})
    folder, answer = exported("gptq")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == answer["group_size"] == 64
    assert config["ignore"] == ["lm_head"]


def test_qwen3_with_an_output_layer_of_its_own(tmp_path: Path) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(4)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=512, tie_word_embeddings=False, **sizes, **heads))
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(0, 0.15)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tiny_run.make_tokenizer(tmp_path / "base")
    for name in ("nf4", "gptq", "torchao-int8", *ONNX_FORMATS):
        answer = make(name, tmp_path / "base", tmp_path / name)
        assert answer["check"]["mean_kld"] <= LARGEST_KLD[name]
        if name in METHODS_OF_OTHERS:
            continue
        saved = load_as_saved(tmp_path / name)
        assert type(saved.lm_head) is torch.nn.Linear and saved.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("value", "words"), [(1e5, "exceeds the range of float16"), (3e4, "not finite")])
def test_what_float16_cannot_hold_is_refused(base: Path, tmp_path: Path, value: float, words: str) -> None:
    """A weight above 65,504, and activations above it."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(base, tmp_path / "large"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].fill_(value)
    tensors["model.layers.1.mlp.up_proj.weight"].fill_(10.0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=words):
        make("fp16", folder, tmp_path / "fp16")


def test_gptq_without_rows(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no rows to calibrate"):
        child.quantize_by_rows("gptq", base, tmp_path / "gptq", [])


def test_a_folder_whose_library_is_absent(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = exported("nf4")
    monkeypatch.setattr("lib.runs.machine.has_module", lambda name: name != "bitsandbytes")
    with pytest.raises(InputError, match="pip install bitsandbytes"):
        load_as_saved(folder)


def test_loading_gives_no_warning(exported: Exported) -> None:
    folders = [str(exported(name)[0]) for name in METHODS]
    load = f"[load_as_saved(Path(folder)) for folder in {folders}]"
    ask = "[m(torch.ones(1, 4, dtype=int)) for m in models]"
    code = (
        f"import torch; from pathlib import Path; from lib.models.loading import load_as_saved; models = {load}; {ask}"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert not re.search(r"warn|fail|deprecat|error|MatMul8bitLt|W\d{4} ", said.stderr, re.I), said.stderr


def test_the_examples_of_a_package_answer_and_say_nothing_else(exported: Exported, tmp_path: Path) -> None:
    """In a Python without this library, whose own filters they have not."""
    names = [name for name in ("int8", "nf4") if FORMATS[name].problem() is None]
    onnx = ["onnx"] if FORMATS["onnx-int4"].problem() is None else []
    for name in [*names, *onnx]:
        (tmp_path / name).symlink_to(exported("onnx-int4" if name == "onnx" else name)[0])
    parts = {role: f"<{role}>" for role in ("system", "user", "assistant")}
    turns = {"begin": "", "opening": parts, "closing": dict.fromkeys(parts, "\n"), "answer": "<assistant>"}
    info = {"system": "你是助手。", "user": "{text}", "special_tokens": [], "labels": [], "turns": turns}
    info |= {"max_tokens": 4, "examples": ["房间好"], "folders": [*names, *onnx]}
    (tmp_path / "model_info.json").write_text(json.dumps(info))
    script = PROJECT / "lib" / "stages" / "package" / "scripts" / "usage_examples.py"
    (tmp_path / "usage_examples.py").write_bytes(script.read_bytes())
    for kind, folders in {"transformers": names, "onnx": onnx}.items():
        command = [sys.executable, "-I", "usage_examples.py", kind]
        said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        if not folders:
            assert said.returncode == 1 and f"not '{kind}'" in said.stdout
            continue
        assert [line.partition(":")[0] for line in said.stdout.splitlines()] == [f"{kind}, {n}/" for n in folders]
        assert not re.search(r"Failed to load|MatMul8bitLt|W\d{4} ", said.stderr), said.stderr


def test_a_folder_that_knows_nothing_is_not_published(base: Path, tmp_path: Path) -> None:
    """As exporters have written it: all weights zero."""
    from safetensors.torch import load_file, save_file

    zeros = Path(shutil.copytree(base, tmp_path / "zeros"))
    weights = load_file(zeros / "model.safetensors")
    save_file({name: 0 * tensor for name, tensor in weights.items()}, zeros / "model.safetensors", {"format": "pt"})
    argument = {"prompts": token_ids(base, 4, 2), "answers": [[300], [301]]}
    with pytest.raises(InputError, match="nats from the merged model, and one that knows nothing"):
        child._check(base, zeros, argument, Progress("checking", 2))
    told = child._check(base, base, argument, Progress("checking", 2))
    assert told["rows"] == 4 and told["same_labels"] == 1.0 and abs(told["mean_kld"]) < 1e-6 < told["uniform_kld"]


@pytest.mark.parametrize("damage", ["zeros", "cut", "gone"])
def test_an_mnn_folder_with_broken_weights(damage: str, base: Path, exported: Exported, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported("mnn-int4")[0], tmp_path / "copy"))
    weights = folder / "llm.mnn.weight"
    size = weights.stat().st_size
    weights.write_bytes(bytes(size) if damage == "zeros" else weights.read_bytes()[: size // 3])
    if damage == "gone":
        weights.unlink()
    with pytest.raises(
        InputError, match=r"ended by signal|ended with exit code|knows nothing|lacks llm|MNN does not run"
    ):
        child._check(base, folder, {"prompts": token_ids(base, 2, 2)}, Progress("checking", 2))


def test_another_tokenizer_is_not_published(base: Path) -> None:
    from lib.models.loading import load_tokenizer

    tokenizer = load_tokenizer(base)

    def encode(texts: list[str]) -> list[list[int]]:
        return [tokenizer(text.replace("\u200d", " "), add_special_tokens=False)["input_ids"] for text in texts]

    told = child._compare_tokens(base, tokenizer, encode, ["酒店", "很好"])
    assert (
        told["texts"] == len(child._HARD) + 2
        and told["cut_otherwise"]
        and all("\u200d" in t for t in told["cut_otherwise"])
    )
    with pytest.raises(InputError, match="the same token ids for every row"):
        child._compare_tokens(base, tokenizer, encode, ["酒店", "很\u200d好"])
