"""Data sets of a hub on loopback: plain files in every layout; scripts, refusals and fallbacks in sentences."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from lib.errors import InputError
from lib.runs.run import open_run
from lib.settings import check, load
from lib.stages.data.cleaning import clean_split
from lib.stages.data.reading import HOTELS_SHA256, HOTELS_STAMP, choose_data, read_table
from lib.stages.data.stage import prepare
from tests.support.hub_fixture import hub  # noqa: F401
from tests.support.hub_server import Hub
from tests.test_settings import PROJECT

HEAD = "text,label\n"


def csv(*texts: str) -> bytes:
    return (HEAD + "".join(f"{text},{i % 2}\n" for i, text in enumerate(texts))).encode()


@pytest.fixture
def served(hub: Hub) -> Hub:  # noqa: F811
    hub.add("datasets", "org/reviews", {"train.csv": csv("好", "坏"), "dev.csv": csv("行"), "x.py": b"boom"})
    return hub


@pytest.mark.parametrize("name", ["org/reviews", "modelscope:org/reviews"])
def test_plain_files_are_read_as_text(served: Hub, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = read_table(name)
    assert {split: [row["text"] for row in rows] for split, rows in table.splits.items()} == {
        "train": ["好", "坏"],
        "validation": ["行"],
    }
    assert table.rows == 3 and not any("x.py" in path for _, path, _ in served.requests if "resolve" in path)
    commit = served.commit("datasets", "org/reviews")
    assert table.revision == commit or table.revision.startswith("sha256:")
    assert table.hashes["dev.csv"] == hashlib.sha256(csv("行")).hexdigest()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert read_table(name).revision == table.revision


LAYOUTS = {
    "shards": ({"data/train-00000-of-00002.csv": csv("a"), "data/train-00001-of-00002.csv": csv("b")}, {"train": 2}),
    "folders": ({"default/train/0000.csv": csv("a"), "default/test/0000.csv": csv("b")}, {"train": 1, "test": 1}),
    "words in names": ({"reviews_train.csv": csv("a"), "reviews_dev.csv": csv("b")}, {"train": 1, "validation": 1}),
    "one file": ({"all_reviews.csv": csv("a", "b")}, {"all": 2}),
    "card": (
        {
            "a.csv": csv("a"),
            "b.csv": csv("b", "c"),
            "README.md": b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: b.csv\n"
            b"  - split: test\n    path: a.*\n- config_name: other\n  data_files: a.csv\n---\n# x\n",
        },
        {"train": 2, "test": 1},
    ),
    "card with one path": (
        {"a.csv": csv("a"), "README.md": b"---\nconfigs:\n- config_name: x\n  data_files: a.csv\n---\n"},
        {"all": 1},
    ),
    "card of nonsense": (
        {"train.csv": csv("a"), "README.md": b"---\nconfigs: [1, {data_files: 7}]\n---\n"},
        {"train": 1},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(hub: Hub, name: str) -> None:  # noqa: F811
    files, rows = LAYOUTS[name]
    hub.add("datasets", "org/reviews", files)
    assert {split: len(table) for split, table in read_table("org/reviews").splits.items()} == rows


REFUSED = {
    "script": ({"reviews.py": b"boom", "README.md": b"x"}, "script data set .*never run.*refs/convert/parquet.*folder"),
    "archive": ({"data.zip": b"PK"}, "holds data.zip.*csv, tsv"),
    "two tables": ({"a/train.csv": csv("a"), "b/train.csv": csv("b")}, "several tables: a/train.csv, b/train.csv"),
    "two forms": ({"train.csv": csv("a"), "train.jsonl": b"{}"}, "several tables"),
    "no split": ({"a.csv": csv("a"), "b.csv": csv("b")}, "a.csv, b.csv.*a file train"),
    "configurations": (
        {
            "a.csv": csv("a"),
            "README.md": b"---\nconfigs:\n- {config_name: x, data_files: a.csv}\n"
            b"- {config_name: y, data_files: a.csv}\n---",
        },
        "configurations x, y",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_cure(hub: Hub, name: str) -> None:  # noqa: F811
    files, words = REFUSED[name]
    hub.add("datasets", "org/reviews", files)
    with pytest.raises(InputError, match=words):
        read_table("org/reviews")


def test_gated_and_missing(served: Hub) -> None:
    with pytest.raises(InputError, match=r"hub data set 'org/gone' .*is not there, or private.*correct dataset"):
        read_table("org/gone")
    served.faults.gated = True
    with pytest.raises(InputError, match=r"is gated.*HF_TOKEN"):
        read_table("org/reviews")


def settings(**values: object):
    return check({"run_name": "t", **values}, "the test")


def test_a_data_fallback_is_checked_by_rows_and_hash(served: Hub, tmp_path: Path) -> None:
    file = tmp_path / "own.csv"
    file.write_bytes(csv("好", "坏", "行"))
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    entry = {"dataset": str(file), "rows": 3, "sha256": sha256}
    chosen = choose_data(settings(dataset="org/gone", fallbacks=[{"dataset": "./none.csv"}, entry]))
    assert chosen.asked == str(file) and chosen.rows == 3
    assert chosen.notes == (
        "fallback: data set org/gone could not be had (is not there, or private); file own.csv was used instead of it",
    )
    for wrong, words in (({"rows": 4}, "3 rows.*4 rows"), ({"sha256": "0" * 64}, f"SHA-256 {sha256}")):
        with pytest.raises(InputError, match=words):
            choose_data(settings(dataset="org/gone", fallbacks=[{**entry, **wrong}]))
    assert choose_data(settings(dataset="org/reviews", fallbacks=[entry])).notes == ()
    with pytest.raises(InputError, match="is not there, or private"):
        choose_data(settings(dataset="org/gone", fallbacks=[{"base_model": "offline"}]))


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"dataset": ""},
        {"dataset": "a/b", "base_model": "offline"},
        {"base_model": "offline", "rows": 3},
        {"dataset": "a/b", "rows": 0},
        {"dataset": "a/b", "rows": "3"},
        {"dataset": "a/b", "sha256": "12"},
        {"dataset": "a/b", "token": "x"},
        {"dataset": 3},
    ],
)
def test_a_fallback_that_says_nonsense_is_refused(entry: dict) -> None:
    with pytest.raises(InputError, match="fallbacks"):
        settings(fallbacks=[entry])


def test_every_page_says_the_fallbacks(served: Hub, tmp_path: Path) -> None:
    lines = [
        f"第{i}间房间很{'好' if i % 2 else '差'}，早餐{'丰富' if i % 2 else '难吃'}{i * 37 % 101}" for i in range(120)
    ]
    file = tmp_path / "own.csv"
    file.write_bytes(csv(*lines))
    fallbacks = [{"dataset": str(file), "rows": 120}, {"base_model": "modelscope:org/gone"}, {"base_model": "offline"}]
    asked = settings(dataset="lost/ChnSentiCorp", base_model="org/gone", fallbacks=fallbacks)
    result = prepare(asked, open_run("t"))
    facts, stamps = result.product.entry.facts, open_run("t").stamps()
    assert facts["base_model"] == "offline" and facts["offline_base"]
    assert facts["dataset"]["source"] == str(file) and facts["dataset"]["rows"] == 120
    assert [s.partition(":")[0] for s in stamps] == ["offline base model", "fallback", "fallback"]
    assert "lost/ChnSentiCorp could not be had" in stamps[2] and "org/gone could not be had" in stamps[1]
    assert not prepare(asked, open_run("t")).product.made
    file.write_bytes(csv(*lines[::-1]))
    assert prepare(asked, open_run("t")).product.made, "the fallback's file has changed"
    assert prepare(settings(dataset=str(file)), open_run("t")).product.made, "without fallbacks it is another run"
    assert not any("fallback" in stamp for stamp in open_run("t").stamps())


def test_the_manifest_holds_the_commit(served: Hub) -> None:
    lines = [
        f"第{i}间房间很{'好' if i % 2 else '差'}，早餐{'丰富' if i % 2 else '难吃'}{i * 37 % 101}" for i in range(120)
    ]
    commit = served.add("datasets", "org/long", {"train.csv": csv(*lines)})
    facts = prepare(settings(dataset="org/long", revision=commit, split="cluster"), open_run("t")).product.entry.facts
    assert (
        facts["dataset"]["revision"] == commit and facts["source"] == f"hub data set org/long, revision {commit[:23]}"
    )


def test_the_hotel_set_never_passes_for_chnsenticorp(hub: Hub, shared_data: Path, tmp_path: Path) -> None:  # noqa: F811
    original = shared_data / "chnsenticorp_htl_all" / "ChnSentiCorp_htl_all.csv"
    hub.add("datasets", "lost/ChnSentiCorp", {"train.csv": original.read_bytes()})
    table = read_table("lost/ChnSentiCorp")
    assert table.is_hotels and table.source.startswith("ChnSentiCorp_htl_all, hub data set")
    renamed = tmp_path / "ChnSentiCorp" / "train.csv"
    renamed.parent.mkdir()
    renamed.write_bytes(original.read_bytes().replace(b"\r\n", b"\n") + b"\n")  # other bytes, same rows
    assert hashlib.sha256(renamed.read_bytes()).hexdigest() != HOTELS_SHA256
    chosen = choose_data(settings(dataset=str(renamed.parent)))
    assert chosen.notes == (HOTELS_STAMP,)
    entry = {"dataset": str(original.parent), "rows": 7766, "sha256": HOTELS_SHA256}
    chosen = choose_data(settings(dataset="gone/ChnSentiCorp", fallbacks=[entry]))
    assert "ChnSentiCorp_htl_all" in chosen.notes[0] and chosen.notes[1] == HOTELS_STAMP
    assert not read_table(str(shared_data / "chnsenticorp")).is_hotels


def test_chnsenticorp_by_hand_is_told_and_taken(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chain of the shipped profiles: hub, ModelScope, files by hand, and last the sample, which is stamped."""
    shipped = load(PROJECT / "params" / "chnsenticorp-qwen3-0.6b.yaml")
    monkeypatch.chdir(tmp_path)
    chain = [entry for entry in shipped.fallbacks if "dataset" in entry]
    assert [entry["dataset"] for entry in chain] == ["modelscope:seamew/ChnSentiCorp", "./data/chnsenticorp", "sample"]
    where = "github.com/ymcui/Chinese-BERT-wwm.*ChnSentiCorp_htl_all .*another data set"
    with pytest.raises(InputError, match=f"'lansinuote/ChnSentiCorp'.*Do this: .*{where}"):
        choose_data(settings(dataset=shipped.dataset))
    chosen = choose_data(settings(dataset=shipped.dataset, fallbacks=chain))
    assert chosen.asked == "sample" and "sample was used instead" in chosen.notes[0]
    assert re.search(where, chosen.notes[1])
    by_hand = tmp_path / "data" / "chnsenticorp"
    by_hand.mkdir(parents=True)
    for name, rows in (("train", 9600), ("dev", 1200), ("test", 1200)):
        (by_hand / f"{name}.tsv").write_text("label\ttext_a\n" + "1\t好\n" * rows, encoding="utf-8")
    chosen = choose_data(settings(dataset=shipped.dataset, fallbacks=chain))
    assert (chosen.asked, chosen.rows, len(chosen.notes)) == ("./data/chnsenticorp", 12000, 1)
    (by_hand / "test.tsv").write_text("label\ttext_a\n1\t好\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"10,801 rows.*12,000 rows"):
        choose_data(settings(dataset=shipped.dataset, fallbacks=chain))
    with pytest.raises(InputError) as caught:
        choose_data(settings(dataset="./none/ChnSentiCorp_htl_all.csv"))
    assert "ymcui" not in str(caught.value), "somebody who means the other one"


@pytest.mark.parametrize("place", ["", "modelscope:"])
def test_a_base_of_a_hub_is_pinned_for_the_whole_run(
    hub: Hub,  # noqa: F811
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """01 writes the resolved commit; later notebooks find that very model, without a network and after a change."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from lib.models.base_model import base_of
    from lib.models.offline_base import TokenizerRecipe, train_tokenizer

    lines = [
        f"第{i}间房间很{'好' if i % 2 else '差'}，早餐{'丰富' if i % 2 else '难吃'}{i * 37 % 101}" for i in range(120)
    ]
    model = tmp_path / "model"
    shape = {"vocab_size": 600, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    Qwen2ForCausalLM(Qwen2Config(**shape, num_attention_heads=2, num_key_value_heads=1)).save_pretrained(model)
    train_tokenizer(lines, ["负面", "正面"], model, TokenizerRecipe(512))
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    commit = hub.add("models", "org/base", files)
    file = tmp_path / "own.csv"
    file.write_bytes(csv(*lines))
    run = open_run("t")
    facts = prepare(settings(dataset=str(file), base_model=f"{place}org/base"), run).product.entry.facts
    assert facts["base_model"] == f"{place}org/base" and not facts["offline_base"]
    assert facts["base_revision"] == commit or facts["base_revision"].startswith("sha256:")
    hub.add("models", "org/base", {**files, "README.md": b"changed"})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.requests.clear()
    base = base_of(run)
    assert base.revision == facts["base_revision"] and (base.path / "config.json").is_file() and hub.requests == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.txt", b"positive\nnegative\n"),
        ("README_zh.md", "0：正面，1：负面".encode()),
        ("labels.yaml", b"[pos, neg]"),
    ],
)
def test_files_that_name_the_classes_come_along(hub: Hub, name: str, text: bytes) -> None:  # noqa: F811
    hub.add("datasets", "org/named", {"train.csv": csv("好", "坏"), name: text})
    table = read_table("org/named", label_names=["负面", "正面"])
    rows, _ = clean_split(table.splits["train"], "x", "", "", ["负面", "正面"])
    assert [row.label for row in rows] == [1, 0]
