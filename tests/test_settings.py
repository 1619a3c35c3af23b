"""A parameter file is right, or refused in a sentence that says which key, which value and what to write."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lib import settings
from lib.errors import InputError
from lib.runs.files import user_path
from lib.settings import Settings

PROJECT = Path(__file__).resolve().parents[1]
PARAMS = sorted((PROJECT / "params").glob("*.yaml"))


def test_quick_is_the_embedded_default() -> None:
    assert settings.load(PROJECT / "params/quick.yaml") == Settings()


@pytest.mark.parametrize("path", PARAMS, ids=lambda p: p.stem)
def test_a_parameter_file_says_why_it_differs_from_the_defaults(path: Path) -> None:
    """quick.yaml shows every key; the others only what differs from it. Each line has its comment."""
    loaded, default = settings.load(path), Settings()
    lines = path.read_text(encoding="utf-8").splitlines()
    keys = yaml.safe_load("\n".join(lines))
    differing = {key for key in Settings.model_fields if getattr(loaded, key) != getattr(default, key)}
    assert set(keys) == (set(Settings.model_fields) if path.stem == "quick" else differing)
    assert list(keys) == [key for key in Settings.model_fields if key in keys], "in the order of the stages"
    assert loaded.run_name == path.stem
    for key in keys:
        (line,) = [line for line in lines if line.startswith(f"{key}:")]
        assert re.search(r"\s#\s*\S", line), f"{key} has no comment in {path.name}"


@pytest.mark.parametrize("path", PARAMS, ids=lambda p: p.stem)
def test_the_complete_file_is_the_same_run(path: Path, tmp_path: Path) -> None:
    values = settings.load(path).model_dump()
    text = settings.as_yaml({**values, "learning_rate": 1.0e-7})
    (tmp_path / "complete.yaml").write_text(text, encoding="utf-8")
    assert settings.load(tmp_path / "complete.yaml").model_dump() == {**values, "learning_rate": 1.0e-7}
    for (key, field), line in zip(Settings.model_fields.items(), text.splitlines(), strict=True):
        assert line.startswith(f"{key}: ") and field.description in line
    assert "learning_rate: 1.0e-07  # the peak value (default: 0.001)" in text


TALK = {"task": "dialogue", "dataset": "d.jsonl", "system_prompt": "x"}


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"lora_q": 1}, ["unknown parameter 'lora_q'", "lora_r"]),
        ({"learning_rate": "1e-4"}, ["learning_rate", "'1e-4'", "text for YAML", "0.0001"]),
        ({"learning_rate": "2e-7"}, ["2.0e-07"]),
        ({"seed": True}, ["seed", "True", "integer"]),
        ({"lora_r": 8.0}, ["lora_r", "8.0"]),
        ({"ladder": ["q4_k_m"]}, ["did you mean Q4_K_M"]),
        ({"ladder": ["Q4_0", "Q4_0"]}, ["ladder", "once"]),
        ({"label_names": ["a"]}, ["label_names"]),
        ({"label_names": ["a", "a"]}, ["distinct"]),
        ({"label_names": ["负面", " 正面"]}, ["label_names", "white space", "' 正面'"]),
        ({"label_names": ["负面\n", "正面"]}, ["white space"]),
        ({"user_prompt": "no slot"}, ["{text}"]),
        ({"system_prompt": "判断\0情感"}, ["system_prompt", "control character U+0000"]),
        ({"label_names": ["负\x1b面", "正面"]}, ["label_names", "control character U+001B"]),
        ({"run_name": "../up"}, ["run_name", "letters"]),
        ({"user_prompt": "看 {{text}}"}, ["{text}", "braces"]),
        ({"user_prompt": "看 ${text}"}, ["{text}", "$"]),
        ({"system_prompt": "判断{text}"}, ["system_prompt", "never filled in"]),
        ({"system_prompt": "只回答{label_names}"}, ["{label_names}", "never filled in"]),
        ({"tensor_types": ["(=q8_0"]}, ["'('", "no regular expression"]),
        ({"terms": "cryptography"}, ["terms has no effect with task classification"]),
        ({"prompts_file": "p.txt"}, ["prompts_file", "no effect"]),
        ({"answer_metric": "entity_f1"}, ["answer_metric has no effect with task classification"]),
        ({**TALK, "answer_metric": "f1"}, ["answer_metric", "'f1'", "'entity_f1'"]),
        ({**TALK, "answer_metric": "exact_match", "generated_rows": 0}, ["exact_match", "set generated_rows"]),
        ({"dataset": "sample-ner"}, ["the sample corpus sample-ner", "task instruction"]),
        ({**TALK, "dataset": "sample"}, ["the sample corpus sample", "task classification", "task dialogue"]),
        ({**TALK, "user_prompt": "请用英文回答：{text}"}, ["user_prompt", "no effect with task dialogue"]),
        ({**TALK, "label_names": ["a", "b"]}, ["label_names", "no effect"]),
        ({**TALK, "text_column": "t"}, ["text_column", "no effect"]),
        ({"n_ctx": 1024, "perplexity_tokens": 512}, ["perplexity_tokens (512)", "n_ctx (1024)"]),
        ({"folds": 5, "adapter": "some/adapter"}, ["folds trains a model for each part", "leave adapter out"]),
        ({"warmup_steps": 2.5}, ["warmup_steps", "whole number of updates", "2.5"]),
        ({"lr_scheduler_type": "cosinus"}, ["lr_scheduler_type", "cosinus"]),
        ({"init_lora_weights": "eva"}, ["init_lora_weights", "eva", "loftq", "pissa"]),
        ({"teacher": "big", "folds": 2}, ["teacher big", "one training"]),
        ({"teacher": "big", "finetuning_type": "none"}, ["teacher big"]),
        ({"distillation_weight": 0.9}, ["name one in teacher"]),
        ({"qat": "int4"}, ["qat int4", "set finetuning_type to full"]),
        ({"init_lora_weights": "loftq"}, ["load_in_4bit: true and merge_base: dequantized"]),
        ({"init_lora_weights": "loftq", "load_in_4bit": True}, ["fits no other base"]),
        ({"init_lora_weights": "olora", "load_in_4bit": True}, ["rounded to 4 bits anew", "init_lora_weights to true"]),
        (
            {"finetuning_type": "full", "adapter": "a/b"},
            ["finetuning_type full trains every weight", "leave adapter out"],
        ),
        ({"finetuning_type": "full", "load_in_4bit": True}, ["weights in 4 bits are frozen", "load_in_4bit to false"]),
        ({"fsdp": "full_shard"}, ["fsdp shares the base model out", "num_processes to 2 or more"]),
        ({"fsdp": "full_shard", "num_processes": 2, "load_in_4bit": True}, ["load_in_4bit to false", "fsdp to none"]),
        ({"fsdp": "full_shard", "num_processes": 2, "finetuning_type": "full"}, ["full freezes nothing"]),
        (
            {"finetuning_type": "full", "use_dora": True, "loraplus_lr_ratio": 2.0},
            ["use_dora, loraplus_lr_ratio: of an adapter", "finetuning_type to lora"],
        ),
        ({"folds": 5, "finetuning_type": "none"}, ["folds trains a model for each part", "set folds to 1"]),
        (
            {"adapter": "some/adapter", "finetuning_type": "none"},
            ["finetuning_type none takes the base model as it is"],
        ),
    ],
)
def test_refusals_name_key_value_and_cure(values: dict, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        settings.check(values, "some.yaml")
    text = str(caught.value)
    assert text.startswith("Found: ") and "Expected: " in text and "Do this: " in text
    for part in [*parts, "some.yaml"]:
        assert part in text


@given(
    st.dictionaries(
        st.text(max_size=8), st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.floats())
    ).filter(lambda values: values and not set(values) <= set(Settings.model_fields))
)
def test_any_unknown_key_is_refused_in_words(values: dict) -> None:
    with pytest.raises(InputError):
        settings.check(values, "x.yaml")


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbfseed: 7\r\n", b"# only a comment\n"])
def test_empty_files_bom_and_crlf(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p.yaml"
    path.write_bytes(content)
    assert settings.load(path).seed in (7, 42)


@pytest.mark.parametrize("content", [b"a: [1", b"- 1\n", b"text", b"\xff\xfe\x00", b"1: 2\n"])
def test_files_that_are_no_mapping_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError):
        settings.load(path)


def test_missing_file_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        settings.load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("learning_rate", "1e-4", 1e-4),
        ("seed", "7", 7),
        ("seed", "x", "x"),
        ("seed", "1_000", 1000),
        ("num_train_epochs", "1e3", 1000.0),
        ("force", "false", False),
        ("dataset", "1234", "1234"),
        ("ladder", "Q8_0, Q4_0", ["Q8_0", "Q4_0"]),
        ("ladder", "[Q8_0]", ["Q8_0"]),
        ("ladder", "F32,BF16", ["F32", "BF16"]),
        ("label_names", '"a","b, c"', ["a", "b, c"]),
        ("label_names", "'a', 'b'", ["a", "b"]),
        ("user_prompt", "判断\n{text}", "判断\n{text}"),
        ("user_prompt", r"\nabla {text} \theta", r"\nabla {text} \theta"),
        (
            "user_prompt",
            r"{text} \neq \frac{1}{\nu} \textbf{x} \times \to \top",
            r"{text} \neq \frac{1}{\nu} \textbf{x} \times \to \top",
        ),
    ],
)
def test_overrides_of_the_command_line(key: str, text: str, value: object) -> None:
    assert settings.parse_override(key, text) == value


@pytest.mark.parametrize("text", ["010", "0x10", "0b11", "10:24", "1e3", "5.0", "1,000", "no", ""])
def test_a_number_given_by_p_means_what_it_means_in_a_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(f"seed: {text}\n")
    with pytest.raises(InputError, match="seed"):
        settings.load(tmp_path / "p.yaml")
    with pytest.raises(InputError, match="seed"):
        settings.check({"seed": settings.parse_override("seed", text)}, "-p", ("seed",))


@pytest.mark.parametrize(
    "text", [r"判断\n{text}", r"a\n\n{text}", r"\t{text}", r"classify.\nreview {text}", r"a\ttext {text}"]
)
@pytest.mark.parametrize("key", ["user_prompt", "system_prompt"])
def test_a_line_end_that_a_shell_did_not_make(key: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(f"{key}: {text}\n", encoding="utf-8")
    for read in (lambda: settings.parse_override(key, text), lambda: settings.load(tmp_path / "p.yaml")):
        with pytest.raises(InputError, match=f"{key}.*a backslash and an [nt], no line end"):
            read()


def test_many_names_end_at_once_and_no_number_is_endless() -> None:
    settings.check({"label_names": [f"a{i}" for i in range(1000)]}, "x")
    with pytest.raises(InputError, match="at most 1,000 names"):
        settings.check({"label_names": [f"a{i}" for i in range(100000)]}, "x")
    with pytest.raises(InputError, match="'1' and '01' do not"):
        settings.check({"label_names": ["1", "2", "01"]}, "x")
    for value in (float("inf"), float("nan")):
        with pytest.raises(InputError, match="gate_max_kld"):
            settings.check({"gate_max_kld": value}, "x")


@pytest.mark.parametrize("text", ["a\0b", "a" * 5000, "~nosuchuser/x"])
def test_a_text_that_is_no_path_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="no path"):
        user_path(text)


@pytest.mark.parametrize("odd", ["\x85", "\u2028", "\ufeff", "\u200b", "\U000e0001", "\u3000"])
def test_characters_that_nobody_sees_are_written_so_that_they_come_back(odd: str, tmp_path: Path) -> None:
    asked = settings.check({"user_prompt": f"x{odd}{{text}}"}, "x")
    (tmp_path / "p.yaml").write_text(settings.as_yaml(asked.model_dump()), encoding="utf-8")
    assert settings.load(tmp_path / "p.yaml") == asked


def test_notebook_variables_and_injected_unknown_names() -> None:
    namespace = {"seed": 7, "other": 1, "In": ["", "seed = 7"]}
    assert settings.from_notebook(namespace).seed == 7
    namespace["In"].append("# Parameters\nseed = 7\nlerning_rate = 0.1\n")
    namespace["lerning_rate"] = 0.1
    with pytest.raises(InputError, match="lerning_rate"):
        settings.from_notebook(namespace)


def test_a_notebook_does_not_know_what_another_one_is_told() -> None:
    """02 is not asked into which weights 04 merges; 04, which is, and a whole file are."""
    own = {"init_lora_weights": "loftq", "load_in_4bit": True, "In": []}
    assert settings.from_notebook(own).init_lora_weights == "loftq"
    for wrong in ({"merge_base": "original"}, {"load_in_4bit": False}):
        with pytest.raises(InputError, match="fits no other base"):
            settings.from_notebook(own | wrong)


def test_the_run_of_notebooks_is_named_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By WORKBOOK_RUN, where a notebook's own cell was left as it is; whatever papermill or the user gives wins."""
    own = {"run_name": "quick", "seed": 42, "In": ["", 'run_name = "quick"']}
    assert settings.from_notebook(own).run_name == "quick" and capsys.readouterr().err == ""
    monkeypatch.setenv("WORKBOOK_RUN", "reviews")
    assert settings.from_notebook(own).run_name == "reviews"
    assert "run reviews, as WORKBOOK_RUN says" in capsys.readouterr().err
    assert settings.from_notebook(own | {"run_name": "mine"}).run_name == "mine"
    by_papermill = own | {"In": ["", '# Parameters\nrun_name = "quick"\n']}
    assert settings.from_notebook(by_papermill).run_name == "quick" and capsys.readouterr().err == ""
    monkeypatch.setenv("WORKBOOK_RUN", "a/b")
    with pytest.raises(InputError, match="WORKBOOK_RUN"):
        settings.from_notebook(own)


@pytest.mark.parametrize("user", ["user:SECRET@", "u:SE/SECRET@x@", ""])
@pytest.mark.parametrize("key", ["dataset", "base_model", "adapter", "fallbacks"])
def test_a_web_address_is_refused_without_its_password(key: str, user: str) -> None:
    address = f"https://{user}127.0.0.1:9/rows.csv"
    value = [{"dataset": "a.csv"}, {"base_model": address}] if key == "fallbacks" else address
    with pytest.raises(InputError, match="a web address is none of") as caught:
        settings.check({key: value}, "x.yaml")
    assert "SECRET" not in str(caught.value)
