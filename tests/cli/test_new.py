"""`workbook new`: what it sees in a file is what 01 will read, and the parameter file that it writes is taken."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lib.cli.__main__ import app
from lib.settings import Settings, load
from lib.stages.data.reading import choose_data
from lib.stages.data.stage import divide
from lib.statistics.noninferiority import rows_for

GOOD = ["房间很干净", "服务也好", "早餐不错", "位置方便", "前台热情", "床很舒服", "性价比高", "下次还来", "网络快"]
BAD = ["隔音太差", "一夜没睡", "空调坏了", "有味道", "服务冷淡", "价格太贵", "早餐难吃", "地毯很脏", "电梯太慢"]
Asked = Callable[..., dict[str, Any]]


def rows_of(count: int, words: tuple[str, str]) -> list[tuple[str, str]]:
    """Reviews that differ, half of them with each of the words as label."""
    draw = random.Random(count)
    rows = []
    for number in range(count):
        good = number % 2
        rows.append(("，".join(draw.sample(GOOD if good else BAD, 4)) + f"，{number}号房", words[good]))
    return rows


def table(path: Path, header: str, rows: list[tuple[str, str]]) -> Path:
    path.write_text("\n".join([header, *(f"{text},{label}" for text, label in rows)]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The command with --json; what it says."""
    monkeypatch.chdir(tmp_path)

    def ask(source: Path, *options: str) -> dict[str, Any]:
        output = tmp_path / "out.yaml"
        answer = CliRunner().invoke(app, ["new", str(source), "--output", str(output), "--json", *options])
        assert answer.exit_code == 0, answer.output
        return json.loads(answer.stdout) | {"settings": load(output), "text": output.read_text(encoding="utf-8")}

    return ask


def test_chinese_names_of_columns_and_other_words_for_labels(tmp_path: Path, asked: Asked) -> None:
    source = table(tmp_path / "reviews.csv", "评论,标签", rows_of(60, ("差评", "好评")))
    found = asked(source)
    assert (found["text_column"], found["label_column"]) == ("评论", "标签")
    assert found["labels"] == [
        {"name": "负面", "said": ["差评"], "rows": 30},
        {"name": "正面", "said": ["好评"], "rows": 30},
    ]
    assert found["keys"] == ["run_name", "dataset", "folds"], "words that are understood need no key"
    settings = found["settings"]
    assert settings.run_name == "reviews" and settings.label_names == Settings().label_names
    splits = divide(settings, choose_data(settings)).splits
    assert {name: len(rows) for name, rows in splits.items()} == found["used"], "01 divides the rows otherwise"


def test_every_key_says_why_and_none_says_what_is_so_already(tmp_path: Path, asked: Asked) -> None:
    found = asked(table(tmp_path / "reviews.csv", "评论,标签", rows_of(60, ("差评", "好评"))))
    lines = [line for line in found["text"].splitlines() if line and not line.startswith("#")]
    assert all("  # " in line and len(line.partition("  # ")[2]) > 10 for line in lines)
    default = Settings()
    assert all(value != getattr(default, key) for key, value in found["parameters"].items() if key != "run_name")


def test_few_rows_are_tested_once_each_and_what_they_show_is_computed(tmp_path: Path, asked: Asked) -> None:
    found = asked(table(tmp_path / "reviews.csv", "text,label", rows_of(200, ("0", "1"))))
    assert found["settings"].folds == 5 and found["shown"]["rows"] == 200
    assert found["shown"]["needed"] == [rows_for(share, 0.01) for share in (0.0, 0.01, 0.02)]
    assert found["shown"]["least"] > 1, "200 rows cannot exclude a loss of one point"


def test_given_splits_stay(tmp_path: Path, asked: Asked) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = rows_of(90, ("neg", "pos"))
    table(folder / "train.csv", "text,label", rows[:60])
    table(folder / "test.csv", "text,label", rows[60:])
    found = asked(folder)
    assert found["splits"] == {"train": 60, "test": 30} and "folds" not in found["keys"]
    assert found["settings"].dataset == str(folder)


def test_own_labels_are_named_in_the_question(tmp_path: Path, asked: Asked) -> None:
    rows = [(f"{text}{word}", word) for text, word in rows_of(90, ("体育", "财经"))]
    found = asked(table(tmp_path / "新闻.csv", "内容,类别名", rows))
    settings = found["settings"]
    assert settings.run_name == "新闻" and settings.label_column == "类别名"
    assert sorted(settings.label_names) == ["体育", "财经"]
    assert "体育" in settings.user_prompt and "财经" in settings.user_prompt and "情感" not in settings.user_prompt


def test_english_reviews_are_asked_in_english(tmp_path: Path, asked: Asked) -> None:
    draw = random.Random(3)
    words = ["room", "staff", "bed", "pool", "view", "food", "lift", "price", "desk", "shower", "street", "garden"]
    rows = [(" ".join([*draw.sample(words, 6), "good" if n % 2 else "bad"]), str(n % 2)) for n in range(80)]
    settings = asked(table(tmp_path / "reviews.csv", "review,sentiment", rows))["settings"]
    assert settings.label_names == ["negative", "positive"]
    assert settings.user_prompt.isascii() and settings.system_prompt.isascii()


def test_columns_without_known_names_are_found_by_what_they_hold(tmp_path: Path, asked: Asked) -> None:
    rows = [(f"{number},{text}", label) for number, (text, label) in enumerate(rows_of(60, ("差评", "好评")))]
    found = asked(table(tmp_path / "reviews.csv", "编号,说了什么,结果", rows))
    assert found["settings"].text_column == "说了什么" and found["settings"].label_column == "结果"


def test_long_texts_get_room_and_it_is_said_how_many_fit(tmp_path: Path, asked: Asked) -> None:
    rows = [("，".join([text] * 12), label) for text, label in rows_of(60, ("差评", "好评"))]
    found = asked(table(tmp_path / "reviews.csv", "评论,标签", [(text.replace(",", "，"), y) for text, y in rows]))
    most = found["settings"].max_seq_length
    assert most > Settings().max_seq_length and most >= found["tokens"]["p95"] and most % 64 == 0
    assert "% of rows fit" in found["text"]


def test_conversations_and_reasoning(tmp_path: Path, asked: Asked) -> None:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"{text}怎么办？"},
                {"role": "assistant", "content": f"<think>想一想{n}</think>先说说{text}"},
                {"role": "user", "content": "还有呢"},
                {"role": "assistant", "content": f"<think>再想</think>第{n}个办法"},
            ]
        }
        for n, (text, _) in enumerate(rows_of(60, ("", "")))
    ]
    source = tmp_path / "talks.jsonl"
    source.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    found = asked(source)
    assert (found["settings"].task, found["settings"].thinking) == ("dialogue", True)
    assert found["shown"] is None and found["labels"] == []
    assert found["settings"].system_prompt != Settings().system_prompt


def test_a_pretrained_base_gets_the_training_of_the_shipped_profiles(tmp_path: Path, asked: Asked) -> None:
    source = table(tmp_path / "reviews.csv", "评论,标签", rows_of(60, ("差评", "好评")))
    found = asked(source, "--base-model", "Qwen/Qwen3-0.6B")["settings"]
    shipped = load(Path(__file__).parents[2] / "params" / "chnsenticorp-qwen3-0.6b.yaml")
    same = ("base_model", "lora_r", "lora_alpha", "learning_rate", "num_train_epochs")
    same += ("per_device_train_batch_size", "gradient_accumulation_steps")
    assert found.pick(*same) == shipped.pick(*same)
    assert found.fallbacks == [{"base_model": "modelscope:Qwen/Qwen3-0.6B"}]
    assert asked(source, "--force")["settings"].base_model == "offline"


def test_a_base_model_on_this_disk_counts_the_tokens(tmp_path: Path, asked: Asked) -> None:
    from tests import tiny_run

    tiny_run.make_base(tmp_path / "base")
    source = table(tmp_path / "reviews.csv", "评论,标签", rows_of(60, ("差评", "好评")))
    found = asked(source, "--base-model", str(tmp_path / "base"))
    assert found["whose_tokens"] == "that base model's" and found["settings"].base_model == str(tmp_path / "base")
    assert found["tokens"] != asked(source, "--force")["tokens"]
    assert "fallbacks" not in found["keys"]


REFUSED: dict[str, tuple[str, list[tuple[str, str]], str]] = {
    "free answers": (
        "question,answer",
        [(text, f"{label}{n}") for n, (text, label) in enumerate(rows_of(120, ("a", "b")))],
        "instruction and\\s+output",
    ),
    "one label": ("text,label", [(text, "好评") for text, _ in rows_of(40, ("a", "b"))], "alone"),
    "nothing that repeats": ("one,two", [(text, text) for text, _ in rows_of(60, ("a", "b"))], "评论 and 标签"),
    "few rows": ("text,label", rows_of(6, ("差评", "好评")), "at least 10"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    header, rows, why = REFUSED[name]
    output = tmp_path / "out.yaml"
    source = table(tmp_path / "data.csv", header, rows)
    answer = CliRunner().invoke(app, ["new", str(source), "--output", str(output)])
    assert answer.exit_code == 2 and not output.exists()
    assert re.search(why, answer.stderr), answer.stderr


def test_a_parameter_file_that_is_there_stays(tmp_path: Path) -> None:
    source = table(tmp_path / "reviews.csv", "评论,标签", rows_of(60, ("差评", "好评")))
    output = tmp_path / "mine.yaml"
    output.write_text("run_name: mine\n", encoding="utf-8")
    command = ["new", str(source), "--output", str(output)]
    answer = CliRunner().invoke(app, command)
    assert answer.exit_code == 2 and "--force" in answer.stderr
    assert output.read_text(encoding="utf-8") == "run_name: mine\n"
    answer = CliRunner().invoke(app, [*command, "--force", "--name", "other"])
    assert answer.exit_code == 0 and load(output).run_name == "other"
    assert f"workbook report {output}" in answer.stdout


@pytest.mark.parametrize("name", ["reviews.csv", "reviews.jsonl", "reviews.parquet", "reviews.json", "folder"])
def test_report_of_data_names_the_command_for_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    else:
        path.write_text('[{"text": "x", "label": "y"}]', encoding="utf-8")
    answer = CliRunner().invoke(app, ["report", str(path)])
    assert answer.exit_code == 2 and f"workbook new {path}" in answer.stderr
