"""The command line in Chinese: help, the option parser's own words, refusals; JSON and exit codes are as in English."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from lib.cli.console import width
from lib.cli.doctor import INFO, LACK, OK, Check, as_text
from lib.cli.models import as_text as inspected
from lib.cli.parser_words import fill
from lib.language import CHINESE, ENGLISH, VARIABLE, speaking
from tests.cli.test_cli import workbook

ENGLISH_WORDS = re.compile(r"\b[a-z]{3,} [a-z]{2,} [a-z]{2,}")


def chinese(*arguments: str) -> subprocess.CompletedProcess[str]:
    return workbook(*arguments, **{VARIABLE: CHINESE, "PYTHONUTF8": "1", "COLUMNS": "80"})


@pytest.mark.parametrize("words", [["--help"], ["quantize", "--help"], ["export", "-h"]])
def test_help_is_chinese_and_fits_the_terminal(words: list[str]) -> None:
    answer = chinese(*words)
    assert answer.returncode == 0 and answer.stderr == ""
    assert answer.stdout.startswith("用法：workbook")
    assert "选项：" in answer.stdout and "显示本帮助并退出。" in answer.stdout
    assert not ENGLISH_WORDS.search(answer.stdout)
    assert max(map(width, answer.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quantise"], "错误：没有命令 'quantise'。你是不是要写 'quantize'？"),
        (["merge"], "错误：缺少选项 '--base-model'。"),
        (["pick", "run", "--foo"], "错误：没有选项 --foo"),
        (["quantize", "a", "b", "--n-ctx", "x"], "错误：'--n-ctx' 的值无效：应为整数"),
        (["serve", "none.gguf"], "发现：没有文件 none.gguf。 期望：.gguf 文件。 请这样做：检查路径。"),
        (["--log-level", "loud", "params"], "发现：--log-level 'loud'。 期望：以下之一：debug, info, warning, error。"),
    ],
)
def test_errors_are_chinese(words: list[str], said: str) -> None:
    answer = chinese(*words)
    assert answer.returncode == 2 and said in answer.stderr
    assert not ENGLISH_WORDS.search(answer.stderr)


@pytest.mark.parametrize("words", [["params", "--json"], ["inspect", "tests", "--json"]])
def test_json_is_the_same_in_both_languages(words: list[str]) -> None:
    answers = [workbook(*words, **{VARIABLE: spoken}) for spoken in (ENGLISH, CHINESE)]
    assert answers[0].stdout == answers[1].stdout and json.loads(answers[0].stdout)
    assert answers[0].returncode == answers[1].returncode


def test_keys_of_a_parameter_file_are_explained_in_chinese() -> None:
    answer = chinese("params")
    assert "lora_r: 16\n    适配器的秩（整数）\n" in answer.stdout
    assert not ENGLISH_WORDS.search(answer.stdout)


def test_the_lines_of_doctor_and_inspect() -> None:
    checks = [
        Check(
            "Memory", LACK, "2.0 GiB available, 4 wanted by params/quick.yaml", "set WORKBOOK_HOME.", "02, 03 (slower)"
        ),
        Check("Python", OK, "3.12"),
        Check("HF_HUB_OFFLINE", INFO, "off"),
    ]
    report = {"kind": "model", "tied": True, "notes": ["no chat template"], "problems": ["no vocabulary"]}
    with speaking(CHINESE):
        lines = as_text(checks).splitlines()
        told = inspected(report)
    assert lines[0] == "缺少    内存              可用 2.0 GiB，params/quick.yaml 需要 4"
    assert lines[1].strip() == "办法：设置 WORKBOOK_HOME。" and lines[2].strip() == "影响：02、03（变慢）"
    assert lines[-1] == "缺少：1。不受影响的笔记本可以完整运行。"
    assert told == "种类：model\n共用输入输出嵌入：是\n注意：没有对话模板\n问题：没有词表"


def test_a_paragraph_breaks_behind_chinese_characters_and_never_before_a_comma() -> None:
    assert fill("把模型文件夹转换成一个 GGUF 文件，再量化。", 14) == "把模型文件夹转\n换成一个 GGUF\n文件，再量化。"
    assert fill("一二三四五，六", 10, "  ", "  ") == "  一二三四\n  五，六"
    assert fill("plain words", 80, "> ") == "> plain words"


def test_a_bad_table_is_refused_in_chinese(tmp_path: Path) -> None:
    table = tmp_path / "bad.csv"
    table.write_text("text,label\na,1\nb,2,3\n", encoding="utf-8")
    answer = chinese("new", str(table))
    assert answer.returncode == 2 and "第 3 行有 3 个单元格，表头有 2 个。" in answer.stderr
