"""What is fuzzed: a folder with a broken file, and the command or function that reads it.

Right is: it is read, or refused by a sentence (exit code 2, InputError). Wrong: any other exception, exit code 1, and
more than `PATIENCE` seconds.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.fuzz import mutations

PATIENCE = 20
"""Seconds: what a tiny file may take at most."""

ROWS = [{"text": f"第{i}间房很好，早餐{i}元", "label": i % 2} for i in range(12)]
TURNS = [
    {"messages": [{"role": "user", "content": f"问{i}"}, {"role": "assistant", "content": "答", "weight": 1}]}
    for i in range(6)
]
SHAREGPT = [{"conversations": [{"from": "human", "value": f"问{i}"}, {"from": "gpt", "value": "答"}]} for i in range(6)]
ALPACA = [{"instruction": f"做{i}", "input": "", "output": "好", "history": [["a", "b"]]} for i in range(6)]
PARAMETERS = {
    "run_name": "x",
    "seed": 42,
    "label_names": ["负面", "正面"],
    "learning_rate": 0.001,
    "ladder": ["Q8_0", "Q4_K_M"],
    "fallbacks": [{"dataset": "sample", "rows": 3}],
    "tensor_types": ["attn_v=q8_0"],
    "system_prompt": "你是助手。",
    "size_budget_mb": 0.0,
}


class WrongError(AssertionError):
    """A target did what it must never do."""


def command(*words: str) -> None:
    """`workbook WORDS` in this process.

    Raises:
        WrongError: it ended as a fault of the workbook.
    """
    from lib.cli.__main__ import app

    said, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        try:
            code = app(list(words), standalone_mode=False)
        except SystemExit as ended:
            code = ended.code
    if code not in (0, 2, None):
        raise WrongError(f"exit code {code}: {complained.getvalue()[-600:]}")


@functools.cache
def _seeds() -> Path:
    """Good files, made once: a model folder, an adapter, a GGUF file."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from lib.stages.convert.convert import convert
    from tests.stages.convert.convertible import write_model

    home = Path(tempfile.mkdtemp(prefix="fuzz-seeds-"))
    convert(write_model(home / "model"), home / "good.gguf")
    model = AutoModelForCausalLM.from_pretrained(home / "model")
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    lora.save_pretrained(home / "adapter")
    return home


def _folder(work: Path, name: str, file: str, content: bytes) -> Path:
    folder = work / name
    shutil.copytree(_seeds() / name, folder)
    (folder / file).write_bytes(content)
    return folder


def parameters(work: Path, chance: random.Random) -> None:
    """A parameter file."""
    path = work / "p.yaml"
    if chance.random() < 0.6:
        text = yaml.safe_dump(mutations.structure(PARAMETERS, chance), allow_unicode=True).encode("utf-8", "replace")
    else:
        text = mutations.raw(yaml.safe_dump(PARAMETERS, allow_unicode=True).encode(), chance)
    path.write_bytes(text)
    command("params", "--complete", str(path))


def table(work: Path, chance: random.Random) -> None:
    """A CSV, TSV, JSON or JSON Lines file of labelled rows."""
    from lib.errors import InputError
    from lib.stages.data.stage import rows_from_file

    kind = chance.choice(("csv", "tsv", "json", "jsonl"))
    if kind == "json":
        content = mutations.json_text(ROWS, chance)
    elif kind == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
        lines[chance.randrange(len(lines))] = mutations.json_text(ROWS[0], chance)
        content = b"\n".join(lines)
    else:
        mark = "\t" if kind == "tsv" else ","
        text = f"text{mark}label\n" + "".join(f"{row['text']}{mark}{row['label']}\n" for row in ROWS)
        content = mutations.raw(text.encode(), chance)
        content = content.replace(b"1", chance.choice((b'"', b",", b"\r", b"\x00", b"1")), 2)
    path = work / f"rows.{kind}"
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        rows_from_file(path, ("负面", "正面"))


def conversations(work: Path, chance: random.Random) -> None:
    """JSON rows of turns: messages, ShareGPT, Alpaca."""
    from lib.errors import InputError
    from lib.prompts.tasks import task_of
    from lib.settings import Settings
    from lib.stages.data.dialogues import clean_conversations
    from lib.stages.data.reading import read_table

    seed = chance.choice((TURNS, SHAREGPT, ALPACA))
    path = work / "turns.json"
    path.write_bytes(mutations.json_text(seed, chance))
    thinking = chance.random() < 0.3
    task = task_of(Settings(task="dialogue", dataset="x.json", system_prompt="", thinking=thinking))
    with contextlib.suppress(InputError):
        for split in read_table(str(path)).splits.values():
            clean_conversations(split, "all", task)


def model_configuration(work: Path, chance: random.Random) -> None:
    """config.json of a model folder, given to inspect and convert."""
    good = json.loads((_seeds() / "model/config.json").read_text(encoding="utf-8"))
    folder = _folder(work, "model", "config.json", mutations.json_text(good, chance))
    command("inspect", str(folder))
    command("convert", str(folder), str(work / "o.gguf"))


def adapter_configuration(work: Path, chance: random.Random) -> None:
    """adapter_config.json, given to inspect and merge."""
    good = json.loads((_seeds() / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    folder = _folder(work, "adapter", "adapter_config.json", mutations.json_text(good, chance))
    command("inspect", str(folder))
    _merge(folder, work)


def _merge(adapter: Path, work: Path) -> None:
    command(
        "merge", "--base-model", str(_seeds() / "model"), "--adapter", str(adapter), "--output-dir", str(work / "m")
    )


def safetensors(work: Path, chance: random.Random) -> None:
    """Weights of an adapter and of a model."""
    name, file = chance.choice((("adapter", "adapter_model.safetensors"), ("model", "model.safetensors")))
    folder = _folder(work, name, file, mutations.header((_seeds() / name / file).read_bytes(), chance))
    command("inspect", str(folder))
    if name == "adapter":
        _merge(folder, work)
    else:
        command("convert", str(folder), str(work / "o.gguf"))


def gguf(work: Path, chance: random.Random) -> None:
    """A GGUF file."""
    path = work / "m.gguf"
    path.write_bytes(mutations.header((_seeds() / "good.gguf").read_bytes(), chance))
    command("inspect", str(path))


TARGETS: dict[str, Callable[[Path, random.Random], None]] = {
    target.__name__: target
    for target in (
        *(parameters, table, conversations),
        *(model_configuration, adapter_configuration, safetensors, gguf),
    )
}
