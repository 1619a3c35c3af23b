"""What an adapter's folder can hold beside peft's own: other makers' names, other tasks, a tokenizer of its own."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.cli.models import merge
from lib.errors import InputError
from lib.models.adapters import PREFIX
from lib.models.inspect import inspect
from lib.models.loading import load_model, load_tokenizer
from lib.models.merge_plan import check_fit
from lib.models.tokenizer_files import differences
from lib.models.weights import read_object
from lib.stages.merge.weights import merge_folders
from tests.stages.convert.convertible import write_model

FILE = "adapter_model.safetensors"
NEW = "<情感>"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("folders") / "base")


@pytest.fixture
def adapter(base: Path, make_adapter: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(make_adapter(base, task_type="CAUSAL_LM"), tmp_path / "adapter"))


def rename(adapter: Path, change: Callable[[str], str]) -> None:
    save_file({change(k): v for k, v in load_file(adapter / FILE).items()}, adapter / FILE, {"format": "pt"})


def add(adapter: Path, **tensors: torch.Tensor) -> None:
    save_file({**load_file(adapter / FILE), **tensors}, adapter / FILE, {"format": "pt"})


def reconfigure(adapter: Path, **changes: Any) -> None:
    content = read_object(adapter / "adapter_config.json")
    (adapter / "adapter_config.json").write_text(json.dumps({**content, **changes}))


def named(name: str) -> Callable[[str], str]:
    return lambda tensor: re.sub(r"(lora_[AB])\.", rf"\1.{name}.", tensor)


DECORATED = {
    "the adapter's name": named("default"),
    "another name": named("default_0"),
    "torch.compile": lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "torch.compile outside": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module.{name}",
    "DDP of a compiled one, with name": lambda name: f"module._orig_mod.{named('x')(name)}",
    "FSDP": lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "checkpointing": lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
    "Lightning": lambda name: f"model.{name}",
    "no prefix": lambda name: name.removeprefix(PREFIX),
}


@pytest.mark.parametrize("kind", DECORATED)
def test_known_decorations_are_read(kind: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_folders(base, adapter, tmp_path / "right")
    wanted = load_model(base, "float32", adapter=adapter, device="cpu").state_dict()
    rename(adapter, DECORATED[kind])
    assert not inspect(adapter)["problems"]
    assert check_fit(adapter, base).modules == 6
    merge_folders(base, adapter, tmp_path / "merged")
    name = "model.safetensors"
    assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "right" / name).read_bytes()
    found = load_model(base, "float32", adapter=adapter, device="cpu").state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def refused(base: Path, adapter: Path, words: str, tmp_path: Path) -> None:
    assert re.search(words, "\n".join(inspect(adapter)["problems"])), inspect(adapter)
    for use in (lambda: merge_folders(base, adapter, tmp_path / "m"), lambda: check_fit(adapter, base)):
        with pytest.raises(InputError, match=words):
            use()
    assert not (tmp_path / "m").exists()


def two_adapters(adapter: Path) -> None:
    pairs = load_file(adapter / FILE)
    both = {named(kind)(name): tensor.clone() for kind in ("first", "second") for name, tensor in pairs.items()}
    save_file(both, adapter / FILE, {"format": "pt"})


def wrapped_and_plain(adapter: Path) -> None:
    add(adapter, **{f"module.{name}": tensor.clone() for name, tensor in load_file(adapter / FILE).items()})


def kohya(adapter: Path) -> None:
    rename(adapter, lambda name: name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"))


def diffusers(adapter: Path) -> None:
    rename(adapter, lambda name: name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"))


def mlx(adapter: Path) -> None:
    rename(adapter, lambda n: n.removeprefix(PREFIX).replace(".weight", "").replace("_A", "_a").replace("_B", "_b"))
    (adapter / FILE).rename(adapter / "adapters.safetensors")
    (adapter / "adapter_config.json").write_text('{"fine_tune_type": "lora", "num_layers": 2}')


def other_file(adapter: Path) -> None:
    (adapter / FILE).rename(adapter / "model-adapter.safetensors")


def one_process(adapter: Path) -> None:
    empty = {name: torch.empty(0) for name in load_file(adapter / FILE)}
    save_file(empty, adapter / FILE, {"format": "pt"})


def head_beside(module: str) -> Callable[[Path], None]:
    """As LLaMA-Factory leaves a reward model, or PPO's critic."""
    parts = {f"{module}.weight": torch.ones(1, 64), f"{module}.bias": torch.ones(1)}
    return lambda adapter: save_file(parts, adapter / "value_head.safetensors", {"format": "pt"})


OTHERS = {
    head_beside("v_head.summary"): "a value head beside the adapter .value_head.safetensors",
    head_beside("score"): "a value head beside the adapter",
    two_adapters: "several adapters in one file .first, second",
    wrapped_and_plain: "several adapters in one file",
    kohya: "lora_down and lora_up",
    diffusers: "lora_down and lora_up",
    mlx: "lora_a and lora_b, of MLX",
    other_file: "no adapter_model.safetensors, but model-adapter.safetensors",
    one_process: "sharded training",
}


@pytest.mark.parametrize("change", OTHERS)
def test_other_makers_are_named(change: Callable[[Path], None], base: Path, adapter: Path, tmp_path: Path) -> None:
    change(adapter)
    refused(base, adapter, OTHERS[change], tmp_path)


@pytest.mark.parametrize(
    ("task", "head", "words"),
    [
        ("SEQ_CLS", "score", "an adapter of a classifier .task_type SEQ_CLS, head `score` with 2 outputs"),
        ("TOKEN_CLS", "classifier", "single tokens .task_type TOKEN_CLS, head `classifier` with 2 outputs"),
        ("QUESTION_ANS", None, "marks answers in a text .task_type QUESTION_ANS"),
        ("FEATURE_EXTRACTION", None, "an embedding model"),
        (None, "score", "a classifier or scorer .head `score` with 2 outputs"),
        ("CAUSAL_LM", "v_head.summary", "a classifier or scorer"),
    ],
)
def test_other_tasks(task: str | None, head: str | None, words: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    reconfigure(adapter, task_type=task, modules_to_save=[head] if head else None)
    if head:
        add(adapter, **{f"{PREFIX}{head}.weight": torch.ones(2, 64)})
    refused(base, adapter, words, tmp_path)


VALUES = [
    *({"lora_alpha": value} for value in (None, "8", True, [8], 10**9)),
    *({"r": value} for value in (None, 0, "4", True, -1, 4.0)),
    *({"rank_pattern": {"q_proj": value}} for value in (0, "4", -2, None)),
    *({"alpha_pattern": {"q_proj": value}} for value in (None, "x")),
    *({"rank_pattern": {pattern: 4}} for pattern in ("(", "(a+)+$", "(a|aa)+$")),
    *({"target_modules": value} for value in ("(", 3, {"q_proj": 1})),
    {"init_lora_weights": {"a": 1}},
    {"base_model_name_or_path": ["a"]},
    {"modules_to_save": "lm_head"},
]


@pytest.mark.parametrize("changes", VALUES, ids=str)
def test_values_of_no_kind(changes: dict[str, Any], base: Path, adapter: Path, tmp_path: Path) -> None:
    reconfigure(adapter, **changes)
    refused(base, adapter, next(iter(changes)), tmp_path)


def own_tokenizer(adapter: Path, base: Path, tokens: int = 1) -> None:
    content = read_object(base / "tokenizer.json")
    first = content["added_tokens"][0]
    content["added_tokens"] += [{**first, "id": 268 + i, "content": NEW if i == 0 else f"<{i}>"} for i in range(tokens)]
    (adapter / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    decoder = {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in content["added_tokens"]}
    settings = read_object(base / "tokenizer_config.json") | {"added_tokens_decoder": decoder}
    (adapter / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False))


def own_template(adapter: Path, text: str = "[{{ messages[0].content }}]") -> None:
    (adapter / "chat_template.jinja").write_text(text)


def answers(folder: Path) -> tuple[int, str]:
    """Tokens of the new word, and the template."""
    tokenizer = load_tokenizer(folder)
    return len(tokenizer(NEW)["input_ids"]), tokenizer.chat_template


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.txt"])
def test_files_of_older_tokenizers_go_along(name: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    (base / name).write_bytes(b"pieces")
    merge_folders(base, adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / name).read_bytes() == b"pieces"


def test_tokens_of_the_adapter_are_taken(base: Path, adapter: Path, tmp_path: Path) -> None:
    template, pieces = answers(base)[1], answers(base)[0]
    reconfigure(adapter, base_model_name_or_path=str(base))
    own_tokenizer(adapter, base)
    assert any(f"1: {NEW}" in note for note in inspect(adapter)["notes"])
    merge_folders(base, adapter, tmp_path / "a")
    assert answers(tmp_path / "a") == (1, template)
    own_template(adapter)
    merge_folders(base, adapter, tmp_path / "b")
    assert answers(tmp_path / "b") == (1, "[{{ messages[0].content }}]")
    merge_folders(base, adapter, tmp_path / "c", tokenizer="base")
    assert answers(tmp_path / "c") == (pieces, template)


START = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}]}
SPLIT = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def stripping() -> dict[str, Any]:
    names = enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), 264)
    return {str(i): {"content": name, "special": True, "lstrip": name == "<|im_end|>"} for i, name in names}


CUTS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "model": ("tokenizer.json", lambda content: content["model"]["merges"].pop()),
    "normalizer": ("tokenizer.json", lambda content: content.update(normalizer={"type": "Lowercase"})),
    "pre_tokenizer": ("tokenizer.json", lambda content: content.update(pre_tokenizer=SPLIT)),
    "post_processor": ("tokenizer.json", lambda content: content.update(post_processor=START)),
    "add_bos_token": ("tokenizer_config.json", lambda content: content.update(add_bos_token=True)),
    "eos_token '<|endoftext|>'": ("tokenizer_config.json", lambda c: c.update(eos_token="<|endoftext|>")),
    "<|im_end|>": ("tokenizer_config.json", lambda c: c.update(added_tokens_decoder=stripping())),
}
"""What is said of an adapter's tokenizer → the file and the change that make it so."""


@pytest.mark.parametrize("part", CUTS)
def test_another_tokenizer_with_the_same_tokens_is_taken(part: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, adapter)
    file, change = CUTS[part]
    content = read_object(adapter / file)
    change(content)
    (adapter / file).write_text(json.dumps(content, ensure_ascii=False))
    assert part in " ".join(differences(adapter, base).values())
    merge_folders(base, adapter, tmp_path / "m")
    assert (tmp_path / "m" / file).read_bytes() == (adapter / file).read_bytes()


def in_other_words(content: dict[str, Any]) -> None:
    """As other versions of the tokenizers library write the same."""
    model = content["model"]
    model["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    content["model"] = {"ignore_merges": False, **{key: value for key, value in model.items() if value}}
    content |= {"truncation": None, "padding": {"strategy": "BatchLongest"}, "post_processor": None}


def test_the_same_tokenizer_saved_again_is_the_same(base: Path, adapter: Path) -> None:
    load_tokenizer(base).save_pretrained(adapter)
    assert differences(adapter, base) == {}
    content = read_object(base / "tokenizer.json")
    in_other_words(content)
    (adapter / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    assert differences(adapter, base) == {}


def test_new_tokens_without_a_tokenizer_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    (adapter / "added_tokens.json").write_text(json.dumps({NEW: 268}))
    reconfigure(adapter, base_model_name_or_path=str(base))
    assert any("adds tokens" in problem for problem in inspect(adapter)["problems"])
    with pytest.raises(InputError, match="--tokenizer base"):
        merge_folders(base, adapter, tmp_path / "m")
    merge_folders(base, adapter, tmp_path / "m", tokenizer="base")


def test_a_template_alone_is_taken(base: Path, adapter: Path, tmp_path: Path) -> None:
    own_template(adapter)
    merge_folders(base, adapter, tmp_path / "m")
    assert answers(tmp_path / "m") == (answers(base)[0], "[{{ messages[0].content }}]")


def test_marks_of_training_are_no_other_template(base: Path, adapter: Path, tmp_path: Path) -> None:
    original = (base / "chat_template.jinja").read_text()
    own_template(adapter, original.replace("{{ m", "{% generation %}{{ m").replace("}}", "}}{% endgeneration %}"))
    merge_folders(base, adapter, tmp_path / "m")
    assert (tmp_path / "m/chat_template.jinja").read_text() == original


NAMES = {
    "another model": ({"base_model_name_or_path": "Qwen/Qwen2.5-7B-Instruct"}, "names Qwen/Qwen2.5-7B-Instruct as"),
    "another folder": ({"base_model_name_or_path": "/nosuch/other-model"}, "names /nosuch/other-model as"),
    "a commit": ({"base_model_name_or_path": "org/base", "revision": "abc123def"}, "names org/base at abc123def as"),
    "the same name": ({"base_model_name_or_path": "org/base", "revision": "main"}, ""),
    "no name": ({"base_model_name_or_path": None}, ""),
}


@pytest.mark.parametrize("case", NAMES)
def test_a_base_of_another_name_is_said(
    case: str, base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    changes, words = NAMES[case]
    reconfigure(adapter, **changes)
    merge(str(base), str(adapter), tmp_path / "out")
    said = capsys.readouterr().out
    assert words in said and ("was not checked" in said) == bool(words) and "TRAINED ON" not in said


@pytest.mark.parametrize("own", [{"temperature": 0.1, "eos_token_id": [1, 2]}, {"eos_token_id": 1}, None])
def test_generation_settings_of_an_adapter_are_left_out_and_said(
    own: dict[str, Any] | None, base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if own is None:
        shutil.copyfile(base / "generation_config.json", adapter / "generation_config.json")
    else:
        (adapter / "generation_config.json").write_text(json.dumps(own))
    merge(str(base), str(adapter), tmp_path / "out")
    assert ("left out: generation_config.json" in capsys.readouterr().out) == (own is not None)


@pytest.mark.parametrize(
    ("gguf", "outtype", "words"),
    [
        ("out/x.gguf", None, "the new folder"),
        ("out/deep/x.gguf", "f16", "the new folder"),
        ("out", None, "the new folder"),
        (None, "q8_0", "--outtype without --gguf"),
    ],
)
def test_two_products_that_do_not_go_together(
    gguf: str | None, outtype: str | None, words: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        merge(str(base), str(adapter), tmp_path / "out", gguf=gguf and tmp_path / gguf, outtype=outtype)
    assert not (tmp_path / "out").exists()


def test_tokens_beyond_the_rows_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    own_tokenizer(adapter, base, 33)
    with pytest.raises(InputError, match=r"token 300, and the base has 300 rows(?s:.)*--tokenizer base"):
        merge_folders(base, adapter, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    merge_folders(base, adapter, tmp_path / "m", tokenizer="base")
