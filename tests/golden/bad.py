"""Bad inputs of ../shared/cases: exit code and words of the command that each README names, as they are today.

Left out: what needs a server (hostile 02, 03, reported 22), a module of lib (hostile 01), a training before the fault
(hostile 23); what does not end within 20 seconds (hostile 04: the alias bombs; 06: a billion layers); and what depends
on a debugger's being installed (hostile 11).
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.golden.place import PROJECT, SHARED, Place, SkippedError, words
from tests.golden.reduced import totals

QUICK = str(PROJECT / "params/quick.yaml")
TIMEOUT = 900.0

ASCII = {"PYTHONIOENCODING": "ascii"}
PLAIN_C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
NO_HUB = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://user:PASSWORDxyz@127.0.0.1:9"}

ODD = ("lora_alpha", "alpha_pattern", "init_lora_weights", "base_model_name_or_path")
"""Keys of adapter_config.json that hostile 14 is about; the others are those of the adapter at hand."""

Asked = dict[str, tuple[list[str | bytes], dict[str, str]]]


def _copy(place: Place) -> Path:
    """A copy of the cases in the place, so that nothing is written beside them."""
    if not (SHARED / "cases").is_dir():
        raise SkippedError("no ../shared/cases beside the project (WORKBOOK_SHARED)")
    folder = place.root / "shared"
    if not folder.exists():
        shutil.copytree(SHARED / "cases", folder / "cases")
        (folder / "data").symlink_to((SHARED / "data").resolve())
        (folder / "cases/rows.csv").write_text("text,label\n很好,1\n很差,0\n房间干净,1\n隔音太差,0\n", encoding="utf-8")
        (folder / "cases/text.txt").write_text("房间很干净，早餐一般。\n\n" * 40, encoding="utf-8")
    return folder / "cases"


def _all(place: Place, asked: Asked) -> dict[str, Any]:
    options = {"cwd": _copy(place), "timeout": TIMEOUT}
    home = {"WORKBOOK_HOME": str(_home(place))}
    return {name: place.command(*given, more=home | more, **options) for name, (given, more) in asked.items()}


def _home(place: Place) -> Path:
    """A home apart from that of the runs, whose names a refusal may list."""
    return place.root / "bad"


def errors(place: Place) -> Any:
    """Inputs that are refused, or should be, before any model is loaded."""
    cases = _copy(place)
    _manifests(place, cases)
    gguf = "hostile/09_gguf_alignment_type/align_{}.gguf"
    asked: Asked = {
        "hostile 09 str": (["inspect", gguf.format("str")], {}),
        "hostile 09 arr": (["inspect", gguf.format("arr")], {}),
        "hostile 09 float": (["inspect", gguf.format("float")], {}),
        "hostile 12 yaml": (["report", "hostile/12_deep_json/deep.yaml"], {}),
        "hostile 16 inspect": (["inspect", "~nosuchuser/x"], {}),
        "hostile 16 report": (["report", "hostile/16_tilde_user/ds_tilde.yaml", "--to", "01"], {}),
        "hostile 17 quantize": (["quantize", b"\xff\xfe.gguf", "o.gguf", "Q8_0"], {}),
        "hostile 17 convert": (["convert", b"\xff\xfe", "o.gguf"], {}),
        "hostile 18": (["params"], {"PYTHONIOENCODING": "latin-1"}),
        "hostile 21 integer": (["report", "hostile/21_yaml_huge_int/hexint.yaml"], {}),
        "hostile 21 deep": (["report", "hostile/21_yaml_huge_int/deep.yaml"], {}),
        "unknown key": (["report", QUICK, "-p", "lora_rr", "8"], {}),
        "wrong type": (["report", QUICK, "-p", "lora_r", "many"], {}),
        "contradiction": (["report", QUICK, "-p", "task", "dialogue"], {}),
        "unknown type": (["report", QUICK, "-p", "ladder", "Q4_K_X"], {}),
        "order": (["report", QUICK, "--from", "05", "--to", "02"], {}),
        "no file": (["report", "nowhere.yaml"], {}),
        "no run": (["pick", "nowhere"], {}),
        "no command": (["quantise"], {}),
    }
    for run in sorted(path.name for path in (_home(place) / "runs").iterdir()):
        asked[f"hostile 15 pick {run}"] = (["pick", run, "--max-mb", "2"], {})
        asked[f"hostile 15 package {run}"] = (["package", run], {})
        asked[f"hostile 15 select {run}"] = (["select", run, "nowhere"], {})
    return _all(place, asked)


def _manifests(place: Place, cases: Path) -> None:
    """A run for every manifest that is damaged or of another version."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in cases.glob("hostile/15_*/*.json")}
    for name, text in {**texts, "manifest_null": "null", "manifest_list": "[]"}.items():
        folder = _home(place) / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").write_text(text, encoding="utf-8")


def models(place: Place) -> Any:
    """Models and adapters that are odd or damaged, given to the commands that read them."""
    cases = _tiny(place)
    asked: Asked = {
        "hostile 09 evaluate": (
            ["evaluate", "hostile/09_gguf_alignment_type/align_arr.gguf", "--data", "rows.csv"],
            {},
        ),
        "hostile 12 convert": (["convert", "tiny/deep", "o.gguf"], {}),
        "hostile 12 inspect": (["inspect", "tiny/deep"], {}),
        "hostile 12 evaluate": (["evaluate", "tiny/deep", "--data", "rows.csv"], {}),
        "hostile 25": (["evaluate", "Qwen/Qwen3-0.6B", "--data", "rows.csv"], NO_HUB),
        "reported 21 ascii": (["inspect", "tiny/adapter"], ASCII),
        "reported 21 C": (["inspect", "tiny/adapter"], PLAIN_C),
        "data no template": (["imatrix", "tiny/untemplated", "o.gguf", "--text", "text.txt"], {}),
    }
    for name in ("both", "generation", "shards", "stale"):
        asked[f"reported inspect {name}"] = (["inspect", f"tiny/{name}"], {})
        asked[f"reported convert {name}"] = (["convert", f"tiny/{name}", f"tiny/{name}.gguf"], {})
    asked["reported 11 inspect gguf"] = (["inspect", "tiny/generation.gguf"], {})
    for name in ("owntok", "trained", "seqcls", "default", "compiled", "alpha_text", "rank_zero"):
        asked[f"reported inspect {name}"] = (["inspect", f"tiny/{name}"], {})
        asked[f"reported merge {name}"] = (_merge(f"tiny/{name}"), {})
    for path in sorted((cases / "tiny").glob("config_*")):
        command = ["convert", f"tiny/{path.name}", "o.gguf"]
        if path.name not in ("config_ctx_huge", "config_inter_1e12"):
            command = ["evaluate", f"tiny/{path.name}", "--data", "rows.csv"]
        asked[f"hostile 13 {path.name}"] = (command, {})
    for name in ("alpha_null", "alpha_str", "alpha_pattern_null"):
        asked[f"hostile 14 merge {name}"] = (_merge(f"tiny/{name}"), {})
    for name in ("base_list", "init_evil"):
        asked[f"hostile 14 evaluate {name}"] = (["evaluate", f"tiny/{name}", "--data", "rows.csv"], {})
    return _all(place, asked)


def _merge(adapter: str) -> list[str | bytes]:
    return ["merge", "--base-model", "tiny/base", "--adapter", adapter, "--output-dir", f"{adapter}-merged"]


def _tiny(place: Place) -> Path:
    """The cases with `tiny/`: a small base, an adapter, and a variant of either for every case."""
    cases = _copy(place)
    tiny = cases / "tiny"
    if tiny.exists():
        return cases
    if not (SHARED / "data/qwen2.5-0.5b-instruct").is_dir():
        raise SkippedError("no ../shared/data/qwen2.5-0.5b-instruct, whose tokenizer the small base has")
    made = subprocess.run([sys.executable, "-m", "tests.golden.bad", str(cases)], cwd=PROJECT, capture_output=True)
    if made.returncode:
        raise RuntimeError(made.stderr.decode()[-2000:])
    return cases


def _make(cases: Path) -> None:
    """Make `tiny/`, in a process of its own: the scripts of the cases load torch."""
    tiny = cases / "tiny"
    for script in sorted(cases.glob("reported/*/make.py")):
        if "make_tiny" in script.read_text(encoding="utf-8"):
            sys.argv = [str(script), str(tiny)]
            runpy.run_path(str(script), run_name="__main__")
    vocabulary = json.loads((tiny / "base/config.json").read_text(encoding="utf-8"))["vocab_size"]

    def base(name: str, change: Callable[[Path], Any]) -> None:
        shutil.copytree(tiny / "base", tiny / name)
        change(tiny / name)

    for path in sorted(cases.glob("hostile/13_*/config_*.json")):
        text = path.read_text(encoding="utf-8").replace('"vocab_size": 512', f'"vocab_size": {vocabulary}')
        base(path.stem, lambda folder, text=text: (folder / "config.json").write_text(text, encoding="utf-8"))
    base("deep", lambda folder: shutil.copy(cases / "hostile/12_deep_json/config.json", folder / "config.json"))
    base("untemplated", _without_template)
    for path in sorted(cases.glob("hostile/14_*/*.json")):
        shutil.copytree(tiny / "adapter", tiny / path.stem)
        ours, odd = (json.loads(p.read_text(encoding="utf-8")) for p in (tiny / "adapter/adapter_config.json", path))
        odd = {key: odd[key] for key in ODD if odd[key] != "BASE"}
        (tiny / path.stem / "adapter_config.json").write_text(json.dumps(ours | odd), encoding="utf-8")


def _without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def rows(place: Place) -> Any:
    """Odd data through 01: what is read, left out, said, and what the page shows."""
    cases = _tiny(place)
    base = {"base_model": str(cases / "tiny/base"), "max_seq_length": 256}
    dialogue = {"task": "dialogue", "system_prompt": "你是助手。"}
    instruction = {"task": "instruction", "system_prompt": "你是助手。"}
    letters = {"label_names": "A,B,C,D"}
    options = {"user_prompt": "{text}\nA. {A}\nB. {B}", "text_column": "Question", "label_column": "Answer"}
    hostile, reported, data = cases / "hostile", cases / "reported", cases / "data"
    asked: dict[str, dict[str, Any]] = {
        "reported-01": {"dataset": reported / "01_csv_unclosed_quote/reviews.csv"},
        "reported-03": {"dataset": reported / "03_csv_trailing_comma/reviews.csv"},
        "reported-03-index": {"dataset": reported / "03_csv_trailing_comma/index.csv"},
        "reported-04": {"dataset": reported / "04_parquet_classlabel_order/reviews.parquet"},
        "reported-06": dialogue | {"dataset": reported / "06_turns_marked_not_to_learn/dialogues.jsonl"},
        "reported-20": dialogue | {"dataset": reported / "20_reasoning_key/reasoning.jsonl"},
        "reported-20-thinking": dialogue
        | {"dataset": reported / "20_reasoning_key/reasoning.jsonl", "thinking": "true"},
        "hostile-07-traceback": {"dataset": hostile / "07_row_with_traceback_text/traceback.csv"},
        "hostile-07-object": {"dataset": hostile / "07_row_with_traceback_text/object.csv"},
        "hostile-07-figure": {"dataset": hostile / "07_row_with_traceback_text/figure.csv"},
        "hostile-08": {"dataset": hostile / "07_row_with_traceback_text/object.csv", "label_names": "cheap,a_$x^$"},
        "hostile-24": {"dataset": cases / "rows.csv", "user_prompt": "<b onmouseover=alert(6)>x</b> {text}"},
        "data-options": letters | {"dataset": data / "mcq_options_dict.json"},
        "data-options-prompt": letters | options | {"dataset": data / "index_column.csv"},
        "data-list": letters | {"dataset": data / "label_is_list.json"},
        "data-nested": letters | {"dataset": data / "nested_examples.json"},
        "data-several": letters | {"dataset": data / "several_json"},
        "data-tags": instruction | {"dataset": data / "system_names_tags.json", "thinking": "true"},
        "data-mixed": instruction | {"dataset": data / "mixed_thinking.jsonl", "thinking": "true"},
        "data-limits": {"dataset": "sample", "max_train_rows": 100, "max_eval_rows": 50},
    }
    found = {
        name: _short(place.run(name, *words(base | own), "--to", "01", must_end_well=False))
        for name, own in asked.items()
    }
    twice = ["report", "reported/07_yaml_key_twice/twice.yaml", *words(base), "--to", "01"]
    return found | {"reported-07": place.command(*twice, cwd=cases)}


def _short(run: dict[str, Any]) -> dict[str, Any]:
    """A run with the totals of its files, and without the overview."""
    files = {name: totals(content) for name, content in run["files"].items()}
    return run | {"files": files, "pages": {"01_data": run["pages"].get("01_data")}}


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    _make(Path(sys.argv[1]))
