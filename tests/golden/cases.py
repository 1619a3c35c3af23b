"""What is recorded: one function a case, from a place to plain JSON."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

from tests.golden import bad, varying
from tests.golden.place import PROJECT, Place, SkippedError, words, written_rows

SMALL = {"per_device_train_batch_size": 8, "num_train_epochs": 1.0, "save_steps": 10, "perplexity_tokens": 512}

LABELS = SMALL | {
    "max_train_rows": 600,  # fewer, or fewer passes, teach nothing: every verdict would be that of a failed training
    "max_eval_rows": 120,
    "num_train_epochs": 4.0,
    "per_device_train_batch_size": 16,
    "save_steps": 50,
    "n_ctx": 128,
    "ladder": "Q8_0,Q4_K_M,Q2_K",
    "imatrix": "auto",
    "imatrix_chunks": 8,
    "size_budget_bpw": 5.0,
    "export_formats": "bf16,int8",
    "equivalence_margin": 5.0,  # what so few rows can show, so that a file is recommended
}

ANSWERS = SMALL | {
    "dtype": "float32",
    "lora_r": 4,
    "max_seq_length": 192,
    "generated_rows": 2,
    "max_new_tokens": 8,
    "terms": "counselling",
    "n_ctx": 128,
    "ladder": "Q8_0,Q4_0",
    "imatrix": "auto",
    "imatrix_chunks": 4,
    "system_prompt": "你是助手。",
}


def labels(place: Place) -> Any:
    """Rows with labels through all notebooks: the offline base, an importance matrix, a size budget, two exports."""
    return place.run("labels", *words(LABELS))


def conversation(place: Place) -> Any:
    """Dialogues through all notebooks, with a size budget and one export."""
    rng = random.Random(1)
    troubles = ["工作压力大", "和室友吵架", "睡不好", "考试没过", "想家", "不敢说话", "总是拖延", "担心父母"]
    rows = []
    for i in range(80):
        first, second = rng.sample(troubles, 2)
        turns = [f"老师您好，我第{i}次来，最近{first}。", f"听起来{first}让您很难受，能多说一点吗？"]
        turns += [f"还有就是{second}，第{rng.randrange(100)}天了。", f"我们先看{second}，再看{first}，一步一步来。"]
        roles = ["user", "assistant"] * 2
        rows.append({"messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]})
    dataset = written_rows(place.root / "dialogues.jsonl", rows)
    own = {"task": "dialogue", "dataset": dataset, "size_budget_bpw": 6.0, "export_formats": "bf16"}
    return place.run("conversation", *words(ANSWERS | own))


def thinking(place: Place) -> Any:
    """Questions whose answers begin with reasoning, through all notebooks."""
    rng = random.Random(1)
    rows = []
    for i in range(80):
        a, b = rng.randrange(100), rng.randrange(100)
        output = f"<thinking>\n先算个位，再算十位：{a}和{b}。\n</thinking>\n\n等于{a + b}。"
        rows.append({"instruction": f"第{i}题，{a}加{b}等于多少？", "input": "", "output": output, "difficulty": 1})
    dataset = written_rows(place.root / "sums.jsonl", rows)
    own = {"task": "instruction", "thinking": "true", "dataset": dataset, "export_formats": "[]", "ladder": "Q8_0"}
    return place.run("thinking", *words(ANSWERS | own))


def smollm2(place: Place) -> Any:
    """A really trained model, from a GGUF file off its grid."""
    if not (PROJECT / ".cache/smollm2").exists():
        raise SkippedError("no .cache/smollm2 (`make smollm2`)")
    fewer = {"max_train_rows": 60, "max_eval_rows": 40, "perplexity_tokens": 512, "imatrix_chunks": 2, "ladder": "Q4_0"}
    fewer |= {"export_formats": "[]", "save_steps": 10}
    return place.run("smollm2-fast", "--fast", *words(fewer), params="smollm2-movies")


def select(place: Place) -> Any:
    """The choice between two trainings on the same rows."""
    labels(place)
    place.run("labels-s43", *words(LABELS | {"train_seed": 43}), "--to", "03")
    told = place.command("select", "labels", "labels-s43")
    told["stdout"] = varying.columns(told["stdout"])
    return {"command": told, "analysis": place.file(place.home / "reports/model_analysis.json")}


def commands(place: Place) -> Any:
    """The commands that take products of a finished run."""
    labels(place)
    run, out = place.home / "runs/labels", place.root / "made"
    out.mkdir()
    source = str(next((run / "gguf").glob("*.gguf")))
    q8, q2 = (str(next((run / "quantized").glob(f"*{kind}.gguf"))) for kind in ("Q8_0", "Q2_K"))
    merged, adapter = str(run / "merged"), str(run / "adapter")
    text = place.root / "text.txt"
    text.write_text("房间很干净，早餐一般。\n\n前台热情，隔音太差，位置方便。\n\n" * 40, encoding="utf-8")
    rows = ["--run", "labels", "--max-samples", "16"]
    asked = {
        "pick": ["pick", "labels"],
        "pick-small": ["pick", "labels", "--max-mb", "3", "--max-loss", "20"],
        "inspect-merged": ["inspect", merged],
        "inspect-adapter": ["inspect", adapter],
        "inspect-gguf": ["inspect", q2],
        "evaluate": ["evaluate", merged, q8, *rows, "--dtype", "float32"],
        "compare": ["compare", source, q8, q2, *rows, "--output", str(out / "compared")],
        "perplexity": ["perplexity", q2, "--text", str(text), "--reference", source, "--n-ctx", "64"],
        "dry-run": ["quantize", source, str(out / "dry"), "Q8_0", "Q3_K_M", "--dry-run"],
        "imatrix": ["imatrix", merged, str(out / "i.gguf"), "--text", str(text), "--n-ctx", "64", "--chunks", "4"],
        "quantize": ["quantize", source, str(out / "q.gguf"), "Q4_K_M", "--imatrix", str(out / "i.gguf")],
        "convert": ["convert", merged, str(out / "c.gguf"), "--outtype", "q8_0"],
        "package": ["package", "labels", "--type", "Q4_K_M"],
    }
    found = {name: place.json(*given, "--json") for name, given in asked.items()}
    del found["inspect-adapter"]["bytes"]  # of the whole folder, the log with its times included
    return found | {"package files": place.files(run / "package", re.compile(r"\.(json|md)$"))}


def help_(place: Place) -> Any:
    """What every command says of itself, and every key of a parameter file."""
    top = place.command("--help")
    listed = "\n".join(top["stdout"]).partition("Commands:")[2]
    names = re.findall(r"^  ([a-z][a-z-]+)  ", listed, re.M)
    return {"workbook": top, "params": place.command("params")} | {
        f"{name} --help": place.command(name, "--help") for name in names
    }


CASES: dict[str, Callable[[Place], Any]] = {
    "help": help_,
    "labels": labels,
    "select": select,
    "commands": commands,
    "conversation": conversation,
    "thinking": thinking,
    "smollm2": smollm2,
    "errors": bad.errors,
    "models": bad.models,
    "rows": bad.rows,
}
