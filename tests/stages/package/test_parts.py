"""Names, evidence, chat templates taken apart, and what Ollama makes of them."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lib.errors import InputError
from lib.prompts.tasks import ConversationTask, Task
from lib.prompts.templates import read_turns
from lib.runs.files import write_json
from lib.stages.package.documents import card, go_template, modelfile
from lib.stages.package.facts import (
    AGAINST,
    NO_SIGN,
    RECOMMENDED,
    UNPROVEN,
    WITHOUT,
    ChosenFile,
    Facts,
    choose_file,
    gguf_name,
    licences,
)
from lib.stages.package.stage import REPORT, check_target, read_formats, write_zip
from lib.statistics.losses import retention_warning
from tests import tiny_run

TOKEN = re.compile(r"\{\{(.*?)\}\}", re.S)
FILES = ("qwen2.5-0.5b-instruct", "qwen1.5-0.5b-chat", "qwen3-4b-thinking-2507")


def render_go(template: str, messages: list[dict[str, str]]) -> str:
    """A small reader of Go's text/template: range, if, else if, end, fields and string literals."""
    parts = TOKEN.split(template)
    assert not any(code.startswith("-") or code.endswith("-") for code in parts[1::2]), "trimming is not read here"

    def block(at: int, message: dict[str, str] | None, live: bool) -> tuple[str, int]:
        """Text up to the end, or else, of the block that begins with the text parts[at]; the place of that word."""
        text = ""
        while True:
            text += parts[at] if live else ""
            if at + 1 >= len(parts):
                return text, at + 1
            code = parts[at + 1].strip()
            if code == "end" or code.startswith("else"):
                return text, at + 1
            if code == "range .Messages":
                for each in messages:
                    inner, after = block(at + 2, each, live)
                    text += inner
            elif code.startswith("if "):
                inner, after = branches(at + 1, message, live)
                text += inner
            else:
                after = at + 1
                value = code[1:-1] if code.startswith('"') else message[code[1:].lower()] if live else ""
                text += value if live else ""
            at = after + 1

    def branches(at: int, message: dict[str, str] | None, live: bool) -> tuple[str, int]:
        text, open_ = "", live
        while parts[at].strip() != "end":
            role = re.fullmatch(r'(?:else )?if eq \.Role "(\w+)"', parts[at].strip())[1]
            taken = open_ and message["role"] == role
            inner, at = block(at + 1, message, taken)
            text += inner
            open_ = open_ and not taken
        return text, at

    return block(0, None, True)[0]


def conversation(*texts: str) -> list[dict[str, str]]:
    roles = ["system", *["user", "assistant"] * len(texts)]
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def check_ollama(tokenizer: Any, thinking: bool) -> None:
    """The Modelfile's template writes what the chat template writes."""
    turns = read_turns(tokenizer, thinking)
    for texts in (("系统", "问题 {{ .Content }}"), ("s", "一\n二", "答案。", "再问？"), ("s", "u", "a", "u", "a", "u")):
        messages = conversation(*texts)
        expected = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        assert render_go(go_template(turns), messages) == expected == turns.render(messages)


def facts(task: Task, mix: dict[str, Any] | None = None) -> Facts:
    """What is known of some file."""
    entry = {"type": "Q4_0", "bits_per_weight": 4.5, "kld_mean": 0.01, "verdict": "good enough"}
    report: dict[str, Any] = {
        "run": "r",
        "file": {"name": "m.gguf", "bytes": 4_500_000},
        "mix": mix,
        "lineage": {
            **dict.fromkeys(("base_model", "base_revision", "data", "method"), "unknown"),
            **{key: {} for key in ("rows", "training", "products")},
        },
        "bytes_read_per_token": 4_000_000,
        "cache_bytes_per_token": 2_000,
        "licences": {"id": "mit", "base": "MIT", "data": "MIT"},
        "export_tree": {},
        "page_rows": "",
        "notes": [],
    }
    chosen = ChosenFile("Q4_0", Path("m-Q4_0.gguf"), RECOMMENDED, "Because.", entry, {"type": "F16"})
    comparison = {"data": {"rows": 12, "source": "file.csv"}, "conditions": {"device": "cpu"}}
    return Facts(chosen, task, report, comparison, n_ctx=512, most=8, switches=False)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from lib.models.loading import load_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_run.make_tokenizer(folder)
    return load_tokenizer(folder)


def test_the_own_template_for_ollama(tokenizer: Any) -> None:
    check_ollama(tokenizer, False)


@pytest.mark.parametrize("name", FILES)
def test_real_templates_for_ollama(name: str, shared_data: Path) -> None:
    from transformers import AutoTokenizer

    if not (shared_data / name / "tokenizer.json").is_file():
        pytest.skip(f"no tokenizer.json in ../shared/data/{name}")
    found = AutoTokenizer.from_pretrained(shared_data / name)
    for thinking in (False, True):
        check_ollama(found, thinking)


QWEN3 = """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{{- m.content.split('</think>')[-1].lstrip('\\n') }}
{%- else %}{{- m.content }}{%- endif %}
{{- '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""


def test_a_template_with_two_ways_of_answering(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", QWEN3)
    assert read_turns(tokenizer, False).answer.endswith("</think>\n\n")
    assert read_turns(tokenizer, True).answer == "<|im_start|>assistant\n"
    check_ollama(tokenizer, False)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}",
        "{% for m in messages %}[{{ m.role }}]{{ m.content | upper }}|{% endfor %}",
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'user' %}|{% endif %}{% endfor %}>",
        "{{ messages | length }}{% for m in messages %}[{{ m.role }}]{{ m.content }}|{% endfor %}",
    ],
)
def test_other_templates_are_refused(template: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(InputError, match="one turn behind the other"):
        read_turns(tokenizer, False)


def test_modelfile(tokenizer: Any) -> None:
    turns = read_turns(tokenizer, False)
    text, notes = modelfile(facts(tiny_run.TASK), turns, ["<|im_end|>"])
    assert (
        'SYSTEM """你是情感分析助手。"""\nPARAMETER stop "<|im_end|>"\nPARAMETER temperature 0\n' in text
        and notes == []
    )
    text, notes = modelfile(facts(ConversationTask("dialogue", 'say """', 192)), turns, [])
    assert "SYSTEM " not in text.replace("No SYSTEM", "") and len(notes) == 1 and text.count('"""') == 3


@pytest.mark.parametrize(
    ("base", "run", "expected"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", "hotel", "Qwen2.5-0.5B-Instruct-hotel-v1.0-Q4_K_M.gguf"),
        ("modelscope:Qwen/Qwen3-0.6B@v1.0.0", "a-b", "Qwen3-0.6B-a-b-v1.0-Q4_K_M.gguf"),
        ("Qwen/Qwen3-0.6B@refs/pr/1", "a-b", "Qwen3-0.6B-a-b-v1.0-Q4_K_M.gguf"),
        ("/models/a@b/my model", "r", "my-model-2.0M-r-v1.0-Q4_K_M.gguf"),
        ("X-D-Lab/MindChat-Qwen2-0_5B", "r", "MindChat-Qwen2-0.5B-r-v1.0-Q4_K_M.gguf"),
        ("offline", "quick", "Offline-base-2.0M-quick-v1.0-Q4_K_M.gguf"),
        ("models/my model/", "r", "my-model-2.0M-r-v1.0-Q4_K_M.gguf"),
    ],
)
def test_names(base: str, run: str, expected: str) -> None:
    assert gguf_name(base, "2.0M", run, "Q4_K_M") == expected


def test_different_runs_get_different_names() -> None:
    names = [gguf_name("Qwen/Qwen3-0.6B", "", run, "Q8_0") for run in ("情感甲", "情感乙", "a.b", "a-b", "a_b")]
    assert len({*names}) == 5 and names[3] == "Qwen3-0.6B-a-b-v1.0-Q8_0.gguf"
    assert all(re.fullmatch(r"Qwen3-0\.6B(-[A-Za-z0-9]+)+-v1\.0-Q8_0\.gguf", name) for name in names)


def test_the_zip_of_another_run_stays(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_json(tmp_path / "in" / REPORT, {"run": "a"})
    target = tmp_path / "x.zip"
    check_target(target, "x", "b")
    write_zip(tmp_path / "in", [REPORT], target, "x")
    check_target(target, "x", "a")
    with pytest.raises(InputError, match="package of run 'a'"):
        check_target(target, "x", "b")
    target.write_bytes(b"my own")
    with pytest.raises(InputError, match="no package of the workbook"):
        check_target(target, "x", "b")


def test_evidence(tmp_path: Path) -> None:
    files = [{"type": t, "file": f"{t}.gguf", "verdict": v} for t, v in (("F16", "reference"), ("Q8_0", "good enough"))]
    files += [{"type": "Q2_K", "file": "Q2_K.gguf", "verdict": "worse"}, {"type": "nf4", "verdict": "not shown"}]
    for entry in files[:3]:
        (tmp_path / entry["file"]).touch()
    run: Any = SimpleNamespace(name="r", require=lambda product: SimpleNamespace(path=tmp_path))
    told = {"headline": "So.", "text": "Because.", "details": "At length.", "warning": ""}
    advice: dict[str, Any] = {"type": "Q8_0", **told}
    comparison = {"files": files, "reference": "F16", "recommendation": advice}
    assert (choose_file(run, comparison, None).type, choose_file(run, comparison, "q8_0").standing) == (
        "Q8_0",
        RECOMMENDED,
    )
    assert choose_file(run, comparison, None).words == "So. Because."
    unsure = {**comparison, "recommendation": {**told, "type": None, "unproven": "Q8_0"}}
    unproven = choose_file(run, unsure, UNPROVEN)
    assert unproven.standing == NO_SIGN and unproven.words.endswith("So. Because. At length.")
    assert choose_file(run, comparison, UNPROVEN).standing == RECOMMENDED
    with pytest.raises(InputError, match=r"recommends no file \(So. Because.\)"):
        choose_file(run, unsure, None)
    older = {**comparison, "recommendation": {"type": "Q8_0", "text": "Because."}}
    for wanted in (None, "Q8_0", UNPROVEN):
        with pytest.raises(InputError, match=r"older version.*07_compare_quantized"):
            choose_file(run, older, wanted)
    other = choose_file(run, comparison, "Q2_K")
    assert other.standing == AGAINST and "against the recommendation, which is Q8_0" in other.words
    assert "worse" in other.words and other.reference["type"] == "F16"
    with pytest.raises(InputError, match="nf4"):
        choose_file(run, comparison, "nf4")
    files[2] |= {"retention": 0.28, "retention_interval": [0.25, 0.31]}
    assert "Q2_K keeps only 0.28 [0.25,\u00a00.31]" in choose_file(run, comparison, "Q2_K").words
    advice["type"] = None
    assert choose_file(run, comparison, "Q2_K").standing == WITHOUT
    advice["warning"] = retention_warning(files[2])
    assert choose_file(run, comparison, "Q2_K").words.count("keeps only") == 1
    with pytest.raises(InputError, match="--type, one of F16, Q8_0, Q2_K"):
        choose_file(run, comparison, None)


def test_what_chose_the_types() -> None:
    mix = {"predicted_kld": 0.011, "predicted_answer_kld": 0.25, "answer_weight": 0.0}
    mix |= {"budget_bytes": 120_000, "types": {"a": "Q4_K", "b": "Q8_0", "c": "Q4_K"}}

    def told(**more: Any) -> str:
        return card(facts(tiny_run.TASK, mix={**mix, **more}))

    assert "sensitivity on training text chose for it (Q4_K × 2, Q8_0 × 1)." in told()
    assert "divergence of 0.011 nats a token of text and 0.25 nats at a token of an answer." in told()
    assert "sensitivity on the answers of training rows chose" in told(answer_weight=1.0)
    both = "sensitivity on training text and on the answers of training rows (of weight 0.5) chose"
    assert both in told(answer_weight=0.5)
    assert "divergence of 0.011 nats a token of text." in told(predicted_answer_kld=None)


def test_licences() -> None:
    offline = {"offline_base": True}
    assert licences({"sample_data": True, **offline}, "offline", False)["id"] == "mit"
    assert licences(offline, "offline", False)["id"] == "unknown"  # made from texts of somebody else
    assert licences({}, "modelscope:Qwen/Qwen3-0.6B@main", False)["id"] == "apache-2.0"
    assert "file LICENSE" in licences({}, "my/model", True)["base"]
    assert "read the base model's card" in licences({}, "my/model", False)["base"]


def test_large_files_in_the_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the limit of plain zips lowered: what is larger is packed and read (ZIP64); a failure leaves nothing."""
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "sub" / "large").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "in" / "foreign").touch()
    names = ["sub/large"]
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    with zipfile.ZipFile(write_zip(tmp_path / "in", names, tmp_path / "out" / "x.zip", "root")) as archive:
        assert archive.namelist() == ["root/sub/large"]
        assert archive.read("root/sub/large") == bytes(range(256)) * 40
    raw = (tmp_path / "out" / "x.zip").read_bytes()
    assert raw[18:26] == b"\xff" * 8  # sizes stand in the ZIP64 field
    monkeypatch.setattr("lib.stages.package.stage.shutil.copyfileobj", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_zip(tmp_path / "in", names, tmp_path / "out" / "y.zip", "root")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x.zip"]


def test_formats() -> None:
    assert read_formats("gguf, int4,int4") == ["int4", "gguf"] and read_formats("") == []
    with pytest.raises(InputError, match="int3"):
        read_formats("int3")
