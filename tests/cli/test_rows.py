"""Rows of the commands: in the run's order of labels, of the split that is said, audited for this run; outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lib.cli.__main__ import app
from lib.cli.evaluate import RowOptions, compare, evaluate
from lib.cli.package import package
from lib.cli.report import select
from lib.errors import InputError
from lib.runs.run import Run, open_run
from tests import tiny_run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run with the product `data` alone; one of its test rows is leaked."""
    monkeypatch.setenv("WORKBOOK_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    run = open_run("r")

    def data(work) -> None:
        for split, seed in (("train", 1), ("test", 3)):
            rows = [
                {**row, "leaked": split == "test" and not i} for i, row in enumerate(tiny_run.rows(24, split, seed))
            ]
            (work.folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (work.folder / "task.json").write_text(json.dumps(tiny_run.TASK.to_json()))

    run.produce("data", data, {})
    return run


@pytest.mark.parametrize("names", ["正面,负面", "正面,好", "坏", "坏,中,好"])
def test_the_words_of_a_run_in_another_order_are_refused(names: str, run: Run) -> None:
    with pytest.raises(InputError, match="whose labels are 负面,正面"):
        RowOptions(run_name="r", label_names=names).task()


def test_other_words_for_the_labels_of_a_run_are_said(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert RowOptions(run_name="r", label_names="坏, 好").task().label_names == ("坏", "好")
    assert "labels 负面, 正面 of run r are asked for as 坏, 好" in capsys.readouterr().err
    assert RowOptions(run_name="r", label_names="负面,正面").task().label_names == ("负面", "正面")
    assert RowOptions("x.csv", "r", label_names="正面,负面").task().label_names == ("正面", "负面")  # a file's own 0, 1


@pytest.mark.parametrize(("split", "kept"), [("test", True), ("train", False)])
def test_an_audit_counts_for_the_rows_of_its_run(split: str, kept: bool, run: Run, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (run.folder / "data" / f"{split}.jsonl").read_text().splitlines()][:12]
    rows[0]["leaked"] = True
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = RowOptions("rows.jsonl", "r")
    found, _ = options.rows(options.task())
    assert ["leaked" in row for row in found] == [kept] * 12


@pytest.mark.parametrize(
    ("files", "split"),
    [(("train", "validation"), "validation"), (("train", "validation", "test"), "test"), (("train",), "train")],
)
def test_the_split_that_is_taken_is_said(
    files: tuple[str, ...], split: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in files:
        (tmp_path / f"{name}.csv").write_text(f"text,label\n好{name},1\n差{name},0\n", encoding="utf-8")
    options = RowOptions(str(tmp_path))
    rows, told = options.rows(options.task())
    assert told["split"] == split and {row["text"] for row in rows} == {f"好{split}", f"差{split}"}
    assert (f"has no test split: its rows of {split} are taken" in capsys.readouterr().err) == (split != "test")


QUESTION = {"role": "user", "content": "一加一？"}
TOLD = {
    "answers": ({"messages": [QUESTION, {"role": "assistant", "content": "二"}]}, "instruction", False),
    "two answers": ({"messages": 2 * [QUESTION, {"role": "assistant", "content": "二"}]}, "dialogue", False),
    "thinking": (
        {"instruction": "一加一？", "output": "<think>\n数一数\n</think>\n\n二"},
        "instruction",
        True,
    ),
    "reasoning apart": (
        {"messages": [QUESTION, {"role": "assistant", "content": "二", "reasoning_content": "数一数"}]},
        "instruction",
        True,
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "一加一？"}, {"from": "gpt", "value": "二"}]},
        "instruction",
        False,
    ),
    "labels under input and output": (
        {"instruction": "哪一种？", "input": "房间很好", "output": "正面"},
        "classification",
        False,
    ),
    "answers under input and output": (
        {"instruction": "哪一种？", "input": "房间很好", "output": "这是好评"},
        "instruction",
        False,
    ),
}


@pytest.mark.parametrize(("row", "kind", "thinking"), TOLD.values(), ids=TOLD)
def test_the_rows_of_a_file_tell_their_task(
    row: dict, kind: str, thinking: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    options = RowOptions(str(path))
    task = options.task()
    assert (task.kind, task.thinking) == (kind, thinking)
    assert ("texts with labels" if task.label_names else f"conversations (task {kind})") in capsys.readouterr().err
    ((found,), _) = options.rows(task)
    if kind != "classification":
        assert task.reasons(found) == thinking and found["messages"][0] == {"role": "system", "content": ""}


@pytest.mark.parametrize(
    "given", [{"label_names": "a,b"}, {"user_prompt": "{text}"}, {"text_column": "messages"}, {"label_column": "x"}]
)
def test_options_of_labels_are_refused_for_conversations(given: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(TOLD["answers"][0]) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=f"--{next(iter(given)).replace('_', '-')} for .*rows without labels"):
        RowOptions(str(path), **given).task()
    task = RowOptions(str(path), system_prompt="答", max_seq_length=99).task()
    assert (task.system_prompt, task.max_seq_length) == ("答", 99)


@pytest.mark.parametrize("kind", ["model", "rows", "a run's file", "comparison"])
def test_no_output_replaces_what_it_did_not_write(kind: str, run: Run, tmp_path: Path) -> None:
    contents = {"model": b"GGUF\3\0\0\0", "rows": b'{"text": "a", "label": 1}\n', "comparison": b'{\n "data": {\n }\n}'}
    path = run.folder / "data" / "test.jsonl" if kind == "a run's file" else tmp_path / "x"
    before = contents.get(kind) or path.read_bytes()
    path.write_bytes(before)
    with pytest.raises(InputError, match="no earlier result of this command"):
        evaluate(["g.gguf"], RowOptions(run_name="r"), output=path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("before", [b"", b'{\n "data": {\n  "n": 1\n },\n "models": []\n}\n'])
def test_a_former_result_is_replaced(
    before: bytes, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.json").write_bytes(before)
    with pytest.raises(InputError, match=r"no file .*g\.gguf|g\.gguf"):
        evaluate(["g.gguf"], RowOptions(run_name="r"), output=tmp_path / "x.json")
    assert "x.json is there already: it is replaced." in capsys.readouterr().err


def test_a_comparison_is_not_written_into_a_product(run: Run) -> None:
    with pytest.raises(InputError, match="is a product of a run"):
        compare(Path("a.gguf"), [Path("b.gguf")], run.folder / "data", RowOptions(run_name="r"))


def test_a_comparison_and_an_analysis_replace_only_their_like(run: Run, tmp_path: Path) -> None:
    for name, ask in (
        ("comparison.json", lambda: compare(Path("a.gguf"), [Path("b.gguf")], tmp_path, RowOptions(run_name="r"))),
        ("model_analysis.json", lambda: select(["r", "s"], tmp_path)),
    ):
        (tmp_path / name).write_text('{"mine": 1}')
        with pytest.raises(InputError, match=f"{name} is there already, and no earlier result"):
            ask()
        assert (tmp_path / name).read_text() == '{"mine": 1}'


TABLES = {
    "labels 1 and 2": ("text,label\n" + "".join(f"第{i}条,{1 + i % 2}\n" for i in range(40)), [], "labels '2'"),
    "no header": ("".join(f"第{i}条,{i % 2}\n" for i in range(40)), [], "the columns"),
    "other task": ("text,label\n好,1\n差,0\n", ["task=dialogue", "system_prompt=x"], "the columns"),
    "column": ("text,label\n好,1\n差,0\n", ["text_column=nosuch"], "text_column 'nosuch'"),
    "words": ("text,label\n好,yes\n差,no\n" * 9, ["label_names=A,B"], "labels"),
    "one label": ("text,label\n好,1\n很好,1\n", [], "only the label"),
}


@pytest.mark.parametrize(("content", "given", "words"), TABLES.values(), ids=TABLES)
def test_doctor_asks_what_01_asks(
    content: str, given: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.csv").write_text(content, encoding="utf-8")
    options = [part for pair in (f"dataset={tmp_path / 'rows.csv'}", *given) for part in ("-p", pair)]
    assert app(["doctor", *options], standalone_mode=False) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("adapter", ["/no/such/folder", "./none"])
def test_doctor_names_an_adapter_that_is_not_there(adapter: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app(["doctor", "-p", f"adapter={adapter}"], standalone_mode=False) == 2
    assert "no folder" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["sample", "offline"])
def test_folders_named_as_the_words_are_not_meant(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / word).mkdir()
    monkeypatch.chdir(tmp_path)
    assert not app(["doctor", "-p", "seed=1"], standalone_mode=False), capsys.readouterr().err


@pytest.mark.parametrize("name", ["{folder}", "../runs/r", "r/", ".", "", "nosuch"])
def test_a_path_is_no_name_of_a_run(name: str, run: Run) -> None:
    for command in (package, lambda given: RowOptions(run_name=given).task()):
        with pytest.raises(InputError, match=r"no run .* one of: r"):
            command(name.format(folder=run.folder))
