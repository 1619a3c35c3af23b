"""Parameter files: what YAML reads otherwise than it looks is refused with its line; everything else is what it was."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lib.errors import InputError
from lib.parameter_file import _FLOAT, parse, parse_value
from tests.conftest import PROJECT

TEXTS = {"label_names", "system_prompt", "run_name"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nlora_r: 2\nseed: 3", "line 3: seed twice (lines 1 and 3)"),
        ("fallbacks:\n- {dataset: a, dataset: b}", "line 2: dataset twice"),
        ("a: &x 1\nb: *x", "line 1: the anchor or alias 'x'"),
        ("<<: {a: 1}", "a key that is no word"),
        ("system_prompt: !!binary aGk=", "line 1: the tag 'tag:yaml.org,2002:binary'"),
        ("a: 1\nseed: !!str 5", "line 2: the tag"),
        ("label_names: !x [a, b]", "the tag '!x'"),
        ("? [a]\n: 1", "a key that is no word"),
        ("seed: 010", "seed: 010, which YAML reads as 8"),
        ("max_seq_length: 10:24", "10:24, which YAML reads as 624"),
        ("seed: 0b11", "which YAML reads as 3"),
        ("seed: 0x" + "f" * 5000, "(5,002 characters), no number of a parameter"),
        ("seed: " + "9" * 5000, "(5,000 characters), no number of a parameter"),
        ("learning_rate: " + "9" * 5000 + ".0", "learning_rate: 999"),
        ("run_name: " + "9" * 5000, "a number of 5,000 digits"),
        ("label_names: [no, yes]", "label_names: no, which YAML reads as true or false"),
        ("label_names:\n- 好\n- ~", "line 3: label_names: ~, which YAML reads as nothing at all"),
        ("run_name: 2024-01-01", "which YAML reads as a date"),
        ("day: 2024-01-01", "(timestamp)"),
        ("seed: " + "9" * 20, "9" * 20 + ", no number of a parameter. Expected: at most 18 digits"),
        ("a: 1\nsystem_prompt: '判断\\n{text}'", "line 2: system_prompt: '判断\\\\n{text}'"),
        ("system_prompt: 判断\\nText", "a backslash and an n, no line end"),
        ("system_prompt: a\u2028run_name: x", "U+2028, which ends a line for YAML"),
        ("system_prompt: a\u2029 b", "U+2029"),
        ("seed: 1\x85run_name: x", "U+0085"),
        ('system_prompt: "\\ud83d!"', "\\ud83d, half of a character"),
        ('{"a": ["\\ude00"]}', "\\ude00, half of a character"),
        ("system_prompt: 判断 #情感", "'判断' and, behind it, '#情感', which YAML takes for a comment"),
        ("a: " + "[" * 3000, "values deep inside each other"),
        ("a: " + "{a: " * 3000, "values deep inside each other"),
        ("a: [1, 2", "is not YAML"),
        ("a: !!python/object:os.system x", "python/object:os.system"),
        ("- 1", "holds a list"),
        ("just words", "holds a str"),
        ("a: 1\n" * 300_000, "characters"),
    ],
)
def test_traps_are_refused(text: str, said: str) -> None:
    with pytest.raises(InputError) as refused:
        parse(text, "f.yaml", TEXTS)
    assert said in str(refused.value) and len(str(refused.value)) < 600


def test_aliases_are_refused_before_they_are_followed() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 40))
    with pytest.raises(InputError, match="line 1: the anchor"):
        parse(bomb, "f.yaml")


def test_numbers_and_texts_mean_what_they_look_like() -> None:
    text = (
        "learning_rate: 1e-3\nrun_name: 2024\nlabel_names: [1, 2]\nforce: yes\nsystem_prompt: 你是助手。 # a comment\n"
    )
    assert parse(text, "f.yaml", TEXTS) == {
        "learning_rate": 0.001,
        "run_name": "2024",
        "label_names": ["1", "2"],
        "force": True,
        "system_prompt": "你是助手。",
    }
    assert parse("system_prompt: |\n  a #b\n", "f.yaml", TEXTS) == {"system_prompt": "a #b\n"}
    assert parse("# nothing but a comment\n", "f.yaml") == {}
    assert parse_value("[{dataset: a, rows: 3}]", "fallbacks") == [{"dataset": "a", "rows": 3}]


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ('{"system_prompt": "\\u4f60\\ud83d\\ude00"}', "你😀"),
        ('system_prompt: "a\\nb"', "a\nb"),
        ('system_prompt: "a\\\\n{text}"', "a\\n{text}"),
        (r"system_prompt: '$\nabla$ and $\neq$'", r"$\nabla$ and $\neq$"),
        ("system_prompt: |\n  print('\\n')\n", "print('\\n')\n"),
        ("system_prompt: '１２'", "１２"),
    ],
)
def test_prompts_are_what_they_look_like(text: str, prompt: str) -> None:
    assert parse(text, "f.yaml", TEXTS) == {"system_prompt": prompt}
    assert parse("seed: １２", "f.yaml", TEXTS) == {"seed": "１２"}


def test_every_profile_is_what_yaml_reads() -> None:
    files = sorted((PROJECT / "params").glob("*.yaml"))
    assert files
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert parse(text, str(path), TEXTS) == yaml.safe_load(text)


# YAML 1.1 takes 0E0 for a text, and writes it without quotation marks; here it is a number.
_TEXT = st.text().filter(lambda text: not _FLOAT.fullmatch(text))
_SCALAR = st.one_of(_TEXT, st.booleans(), st.integers(-(10**9), 10**9), st.floats(allow_nan=False), st.none())


@given(st.dictionaries(st.text(min_size=1), st.one_of(_SCALAR, st.lists(_SCALAR))))
def test_what_yaml_writes_is_read_again(values: dict) -> None:
    text = yaml.safe_dump(values, allow_unicode=True)
    if "&id" not in text:
        assert parse(text, "f.yaml") == yaml.safe_load(text)
