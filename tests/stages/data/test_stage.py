"""The stage as a whole: the product, skipping, splits of every kind of source, refusals."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from lib.cli.evaluate import RowOptions
from lib.errors import InputError
from lib.report.data_page import page_of
from lib.report.display import ABSENT
from lib.runs.files import read_json
from lib.runs.run import open_run
from lib.settings import Settings, check
from lib.stages.data.stage import DataResult, prepare, rows_from_file


@pytest.fixture(scope="module")
def sample_run(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBOOK_HOME", str(tmp_path_factory.mktemp("home")))
        yield prepare(Settings(max_train_rows=600, max_eval_rows=200), open_run("quick"))


def reviews(count: int, seed: int = 0) -> list[dict]:
    """Distinct little reviews, both labels alike."""
    rng = random.Random(seed)
    parts = ("房间", "早餐", "前台", "位置", "屏幕", "键盘", "味道", "上菜", "情节", "文笔")
    words = (("糟糕", "难吃", "失望", "冷淡", "嘈杂"), ("满意", "喜欢", "推荐", "热情", "舒适"))
    made: dict[str, int] = {}
    while len(made) < count:
        label = len(made) % 2
        made["，".join(rng.choice(parts) + rng.choice(words[label]) for _ in range(4))] = label
    return [{"text": text, "label": label} for text, label in made.items()]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def settings(source: Path, **values) -> Settings:
    return check({"dataset": str(source), "run_name": "t", **values}, "the test")


def folder_of(home: Path, **splits: list[dict]) -> Path:
    folder = home / "source"
    folder.mkdir()
    for name, rows in splits.items():
        write(folder / f"{name}.jsonl", rows)
    return folder


def test_product_of_the_sample_corpus(sample_run: DataResult):
    product = sample_run.product
    assert product.made and {p.name for p in product.path.iterdir()} >= {
        "train.jsonl", "validation.jsonl", "test.jsonl", "task.json", "audit.json", "floor.json", "tokenizer"
    }  # fmt: skip
    facts = product.entry.facts
    assert facts["sample_data"] and facts["offline_base"] and facts["base_model"] == "offline"
    assert facts["rows"] == {"train": 600, "validation": 200, "test": 200} and len(facts["prompt_hash"]) == 64
    assert product.entry.notes == ["offline base model, sample data: not a result about Qwen or ChnSentiCorp"]
    rows = sample_run.rows("test")
    assert list(rows[0]) == ["id", "text", "label", "group", "leaked", "pattern"]
    assert len({row["id"] for row in rows}) == 200 and rows[0]["id"].startswith("test-")
    assert sum(sample_run.balance[0][name] for name in ("负面", "正面")) == 600
    assert {"step": "dropped: empty text", "split": "train", "rows": 3} in sample_run.flow
    assert "without" not in sample_run.split_rule and sample_run.split_rule.startswith("given")


def test_the_floor_speaks_of_the_rows_used(sample_run: DataResult):
    floor, rows = sample_run.floor["test"], sample_run.rows("test")
    assert floor["ids"] == [row["id"] for row in rows]
    right = [p == row["label"] for p, row in zip(floor["predictions"], rows, strict=True)]
    assert floor["accuracy"] == pytest.approx(sum(right) / 200) and floor["accuracy"] > 0.6
    assert floor["leak_free"]["n"] == sum(not row["leaked"] for row in rows)
    assert all((v > 0) == (p == 1) for v, p in zip(floor["log_odds"], floor["predictions"], strict=True))
    assert sample_run.product.entry.metrics["floor_accuracy"] == floor["accuracy"]


def test_lengths_and_example_agree_with_the_prompting_room(sample_run: DataResult):
    from lib.models.loading import load_tokenizer

    tokenizer, task = load_tokenizer(sample_run.product.path / "tokenizer"), sample_run.task
    rows = sample_run.rows("test")
    for row, length in list(zip(rows, sample_run.lengths["test"], strict=True))[:25]:
        encoded = task.encode(tokenizer, {"text": row["text"], "label": row["label"]})
        assert length == len(encoded.prompt_ids) + len(encoded.loss_ids)
    example = sample_run.example
    encoded = task.encode(tokenizer, {"text": example["text"], "label": task.label_names.index(example["label"])})
    assert [i for p in example["pieces"] if not p["loss"] for i in p["ids"]] == encoded.prompt_ids
    assert [i for p in example["pieces"] if p["loss"] for i in p["ids"]] == encoded.loss_ids
    assert example["text"] in "".join(piece["text"] for piece in example["pieces"])


def test_truncation_is_counted_as_encode_truncates(sample_run: DataResult):
    import dataclasses

    from lib.models.loading import load_tokenizer
    from lib.stages.data.cleaning import LabelledRows, Row
    from lib.stages.data.stage import token_lengths

    tokenizer = load_tokenizer(sample_run.product.path / "tokenizer")
    median = sorted(sample_run.lengths["test"])[100]
    task = dataclasses.replace(sample_run.task, max_seq_length=median)
    rows = [Row(i, row["text"], row["label"]) for i, row in enumerate(sample_run.rows("test")[:60])]
    kept, lengths, table = token_lengths(tokenizer, LabelledRows(Settings(), task), {"test": rows})
    room = median - max(map(len, task.answer_words(tokenizer))) - 1
    whole = dataclasses.replace(task, max_seq_length=10_000)
    prompts = [len(whole.probe_ids(tokenizer, row.content)) for row in rows]
    truncated = sum(length > room for length in prompts)
    assert 0 < truncated < 60 and table[0]["truncated rows"] == truncated and kept == {"test": rows}
    assert [length - prompt for length, prompt in zip(lengths["test"], prompts, strict=True)] == [2] * 60


def test_a_second_call_changes_nothing_and_reads_the_same(home: Path):
    source = write(home / "a.jsonl", reviews(200))
    run = open_run("t")
    first = prepare(settings(source), run)
    second = prepare(settings(source), run)
    assert first.product.made and not second.product.made
    assert [second.floor, second.lengths, second.flow] == [first.floor, first.lengths, first.flow]
    assert prepare(settings(source, learning_rate=0.1), run).product.made is False
    write(source, [*reviews(200), {"text": "新的一行", "label": 1}])
    third = prepare(settings(source), run)
    assert third.product.made and "dataset_sha256" in third.product.message
    assert third.flow[0] == {"step": "read", "split": "all", "rows": 201}
    assert "max_seq_length" in prepare(settings(source, max_seq_length=200), run).product.message


def test_a_single_file_is_split_by_cluster(home: Path):
    rows = reviews(300)
    copies = [{**row, "text": row["text"] + "！"} for row in rows[:20]]
    contradiction = [{"text": rows[30]["text"], "label": 1 - rows[30]["label"]}]
    result = prepare(settings(write(home / "a.jsonl", [*rows, *copies, *contradiction])), open_run("t"))
    dropped = {line["step"]: line["rows"] for line in result.flow if line["step"].startswith("dropped")}
    assert dropped == {"dropped: copy of an earlier row": 20, "dropped: text with conflicting labels": 2}
    parts = {name: result.rows(name) for name in ("train", "validation", "test")}
    assert sum(map(len, parts.values())) == 299 and 25 <= len(parts["test"]) <= 35
    groups = [{row["group"] for row in part} for part in parts.values()]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    assert not any(row["leaked"] for part in parts.values() for row in part)
    assert all(line["or near-duplicate"] == 0 for line in result.overlaps_used) and not result.leaked_examples
    page = page_of(result)
    assert page.overlaps().metadata == {ABSENT: True}
    assert result.product.entry.notes == ["offline base model: not a result about Qwen"]


def test_a_given_split_is_kept_with_its_leaks(home: Path):
    rows = reviews(120)
    folder = folder_of(home, train=rows[:80], dev=rows[80:100], test=[*rows[100:], *rows[:7], rows[0]])
    result = prepare(settings(folder), open_run("t"))
    test = result.rows("test")
    assert len(test) == 28 and sum(row["leaked"] for row in test) == 8
    assert [row["text"] for row in test] == [row["text"] for row in [*rows[100:], *rows[:7], rows[0]]]
    assert result.floor["decontaminated"]["trained_on"] < 80
    again = prepare(settings(folder, split="cluster"), open_run("other"))
    assert sum(len(again.rows(name)) for name in ("train", "validation", "test")) == 120


def test_missing_or_unlabelled_splits_are_made_up_for_and_said(home: Path):
    rows = reviews(150)
    unlabelled = [{"text": "没有标签", "label": -1}] * 3
    folder = folder_of(home, train=rows[:120], validation=rows[120:], test=unlabelled)
    result = prepare(settings(folder), open_run("t"))
    assert len(result.rows("test")) == 30 and len(result.rows("train")) + len(result.rows("validation")) == 120
    assert "validation is a tenth of train" in result.split_rule
    notes = result.product.entry.notes
    assert any("no labels" in note for note in notes) and any("its validation split is the test" in n for n in notes)


def test_refusals(home: Path):
    run = open_run("t")
    rows = reviews(60)
    with pytest.raises(InputError, match="only the label '正面'"):
        prepare(settings(write(home / "a.jsonl", [row for row in rows if row["label"]])), run)
    with pytest.raises(InputError, match="at least 10 of each label"):
        prepare(settings(write(home / "b.jsonl", rows[:12])), run)
    with pytest.raises(InputError, match="split: given"):
        prepare(settings(write(home / "c.jsonl", rows), split="given"), run)
    with pytest.raises(InputError, match="sample corpus"):
        prepare(check({"label_names": ["a", "b", "c"]}, "the test"), run)
    with pytest.raises(InputError, match="label_column 'stars'"):
        prepare(settings(write(home / "d.jsonl", rows), label_column="stars"), run)
    assert not (run.folder / "data").exists() and not list(run.folder.glob(".data*"))


def test_three_labels_work(home: Path):
    extra = [{"text": row["text"].replace("，", "呢"), "label": 2} for row in reviews(60, seed=3)]
    rows = [*({**row, "label": ["差", "好"][row["label"]]} for row in reviews(120)), *extra]
    rows = [{**row, "label": str(row["label"])} for row in rows]
    result = prepare(
        settings(write(home / "a.jsonl", rows), label_names=["差", "好", "平"], user_prompt="评：{text}"), open_run("t")
    )
    assert {row["label"] for row in result.rows("test")} == {0, 1, 2}
    assert len(result.floor["test"]["all"]["confusion"]) == 3


def test_rows_from_file(sample_run: DataResult, home: Path):
    own, counts = rows_from_file(sample_run.product.path / "test.jsonl", ["负面", "正面"])
    assert own == sample_run.rows("test") and counts == {"rows_available": len(own), "left_out": {}}
    csv = home / "new.csv"
    csv.write_text("review,sentiment\n好吃！,pos\n好吃,pos\n难吃,neg\n", encoding="utf-8")
    assert rows_from_file(csv, ["负面", "正面"])[0] == [
        {"id": "row-00000", "text": "好吃！", "label": 1, "group": 0, "leaked": False},
        {"id": "row-00001", "text": "好吃", "label": 1, "group": 0, "leaked": False},
        {"id": "row-00002", "text": "难吃", "label": 0, "group": 1, "leaked": False},
    ]
    csv.write_text("review,sentiment\n,pos\n", encoding="utf-8")
    with pytest.raises(InputError, match="no usable row"):
        rows_from_file(csv, ["负面", "正面"])


def test_task_is_plain_json(sample_run: DataResult):
    task = read_json(sample_run.product.path / "task.json")
    assert task == {
        "label_names": ["负面", "正面"],
        "system_prompt": "你是情感分析助手。",
        "user_prompt": "判断下面这段评论的情感倾向，只回答负面或正面。\n评论：{text}",
        "max_seq_length": 192,
    }


@pytest.mark.parametrize("written", [("True", "False"), ("1", "0"), ("yes", "no")])
def test_rows_of_a_run_saved_as_text_keep_their_flags(sample_run: DataResult, home: Path, written: tuple[str, str]):
    own, _ = rows_from_file(sample_run.product.path / "test.jsonl", ["负面", "正面"])
    assert any(row["leaked"] for row in own) and not all(row["leaked"] for row in own)
    saved = [{**row, "leaked": written[not row["leaked"]], "group": str(row["group"])} for row in own]
    path = write(home / "rows.jsonl", saved)
    if written[0] != "yes":
        assert rows_from_file(path, ["负面", "正面"])[0] == rows_from_file(path, ["1", "0"])[0] == own
        return
    with pytest.raises(InputError, match=r"leaked '(yes|no)'"):
        rows_from_file(path, ["负面", "正面"])


@pytest.mark.parametrize("limit", [{"max_train_rows": 1}, {"max_eval_rows": 1}])
def test_a_limit_that_leaves_one_label_is_named(home: Path, limit: dict[str, int]):
    source = write(home / "rows.jsonl", reviews(200))
    with pytest.raises(InputError, match=r"only the label .*raise max_train_rows or max_eval_rows"):
        prepare(settings(source, **limit), open_run("t"))


@pytest.mark.parametrize("columns", [{"text_column": "a"}, {"label_column": "b"}])
def test_columns_are_chosen_of_a_table_alone(columns: dict[str, str]):
    with pytest.raises(InputError, match=f"--{next(iter(columns)).replace('_', '-')} without --data"):
        RowOptions(run_name="t", **columns).rows(None)


def test_folds_test_every_row_once(home: Path):
    source = write(home / "rows.json", reviews(90))
    run, asked = open_run("t"), settings(source, folds=3)
    first = prepare(asked, run)
    run.on_other_folds(prepare, asked)
    others = [DataResult.read(other.require("data")) for other in run.other_folds()]
    assert [other.name for other in run.other_folds()] == ["t, fold 2", "t, fold 3"] and not others[0].product.made
    ids = sorted(row["text"] for one in (first, *others) for row in one.rows("test"))
    assert ids == sorted(row["text"] for row in first.tested()) and len(set(ids)) == 90
    assert {row["fold"] for row in first.tested()} == {1, 2, 3}
    assert "fold 1 of 3 is tested" in first.split_rule and "fold 3 of 3" in others[1].split_rule
    assert not {row["text"] for row in first.rows("test")} & {row["text"] for row in first.rows("train")}
    assert first.folds == 3 and first.product.entry.facts["folds"] == 3
    noted = prepare(settings(source, folds=3, test_share=0.4), run)
    assert "test_share 0.4 has no effect: 3 folds" in noted.product.entry.notes
    assert prepare(settings(source), run).folds == 1 and not run.other_folds()


def test_folds_of_rows_with_a_test_split_are_refused(home: Path):
    folder = folder_of(home, train=reviews(60), test=reviews(30, seed=1))
    with pytest.raises(InputError, match="folds: 2, for data with test rows of its own"):
        prepare(settings(folder, folds=2), open_run("t"))
    assert prepare(settings(folder, folds=2, split="cluster"), open_run("t")).folds == 2


def test_no_adapter_from_elsewhere_in_folds(home: Path, tmp_path: Path):
    from lib.stages.finetune.stage import adopt

    run = open_run("t")
    prepare(settings(write(home / "rows.json", reviews(60)), folds=2), run)
    with pytest.raises(InputError, match="cross-validated data of run 't'"):
        adopt(Settings(adapter=str(tmp_path)), run)


def test_rows_of_a_folder_mean_in_evaluate_what_they_mean_in_01(home: Path):
    """Names beside the numbers of train speak for test; a test split without labels leaves validation."""
    named = [{**row, "label": 1 - row["label"], "label_text": ("负面", "正面")[row["label"]]} for row in reviews(60)]
    bare = [{"text": row["text"], "label": 1 - row["label"]} for row in reviews(30, seed=1)]
    folder = folder_of(home, train=named, validation=bare, test=[{"text": row["text"]} for row in reviews(9, seed=2)])
    rows, told = rows_from_file(folder, ["负面", "正面"])
    assert told["split"] == "validation"
    assert [row["label"] for row in rows] == [row["label"] for row in reviews(30, seed=1)]


@pytest.mark.parametrize(
    "names", [("训练集", "测试集"), ("TrainData", "TestData"), ("reviews_train", "reviews_heldout")]
)
def test_held_out_files_are_not_trained_on(home: Path, names: tuple[str, str]):
    folder = folder_of(home, **{names[0]: reviews(60), names[1]: reviews(30, seed=1)})
    result = prepare(settings(folder), open_run("t"))
    assert {row["text"] for row in result.rows("test")} == {row["text"] for row in reviews(30, seed=1)}


@pytest.mark.parametrize(
    ("column", "turned"),
    [
        ("is_negative", True),
        ("负面", True),
        ("label(0=正面,1=负面)", True),
        ("is_positive", False),
        ("label", False),
        ("label(1=负面)", True),
    ],
)
def test_the_name_of_a_column_says_what_1_means(home: Path, column: str, turned: bool):
    made = [{"text": row["text"], column: row["label"] ^ turned} for row in reviews(60)]
    for kind in (int, bool):
        rows = [{**row, column: kind(row[column])} for row in made]
        found, _ = rows_from_file(write(home / "rows.jsonl", rows), ["负面", "正面"], label_column=column)
        assert [row["label"] for row in found] == [row["label"] for row in reviews(60)]


def test_a_column_called_y_is_any_target(home: Path):
    rows = [{"text": row["text"], "y": row["label"]} for row in reviews(60)]
    found, _ = rows_from_file(write(home / "rows.jsonl", rows), ["yes", "no"], label_column="y")
    assert [row["label"] for row in found] == [row["label"] for row in reviews(60)]
