"""What two models write to rows and prompts, on the tiny model: kept, measured, the same every time."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from IPython.display import HTML

from lib.errors import InputError
from lib.models.gguf_tokenizer import token_bytes
from lib.models.loading import load_tokenizer
from lib.prompts.tasks import ConversationTask
from lib.report.evaluate_page import AnswerPage
from lib.scoring.backend import Keep
from lib.scoring.generation import Questions, Sampling, ask_prompt, ask_row, end_ids, write
from lib.scoring.text_metrics import summarise
from lib.scoring.torch_backend import TransformersBackend
from lib.scoring.word_lists import read_prompts
from lib.settings import Settings
from lib.stages.evaluate.results import BASE, FINETUNED, SHOWN
from lib.stages.evaluate.stage import Replies, generated_rows, prompts_json, write_with
from tests.scoring.conftest import (
    Tiny,
    small,  # noqa: F401
)
from tests.stages.evaluate.conftest import conversations as rows

pytestmark = pytest.mark.usefixtures("forked_children")

TASK = ConversationTask("dialogue", "你是助手。", 192)
THINKING = replace(TASK, thinking=True)


def questions(small: Tiny, tmp_path: Path, task: ConversationTask = TASK, **values: object) -> Questions:  # noqa: F811
    terms = tmp_path / "terms.txt"
    terms.write_text("房间\n早餐\t早饭\n服务", encoding="utf-8")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("房间好吗？\n早餐呢？\t很好。", encoding="utf-8")
    given = {"generated_rows": 4, "max_new_tokens": 12, "terms": str(terms), "prompts_file": str(prompts), **values}
    data = rows(6, task.thinking)
    sources = read_prompts(str(prompts)) if given["generated_rows"] else ()
    return Questions.of(
        Settings(**given, task="dialogue", dataset="x", system_prompt=""), small.tokenizer, task, data, sources
    )


def answered(small: Tiny, asked: Questions, keep: Keep | None = None) -> Replies:  # noqa: F811
    return write_with(TransformersBackend(small.model, name="a"), asked, keep)


def test_rows_and_prompts_are_answered_measured_and_kept(small: Tiny, tmp_path: Path) -> None:  # noqa: F811
    asked = questions(small, tmp_path)
    first, again = ((found.answers, found.replies) for found in (answered(small, asked), answered(small, asked)))
    untimed = [
        [{key: value for key, value in answer.items() if "second" not in key} for answer in found[0]]
        for found in (first, again)
    ]
    assert untimed[0] == untimed[1] and len(first[0]) == 4
    assert [reply["sampled"]["text"] for reply in first[1]] == [reply["sampled"]["text"] for reply in again[1]]
    for one, answer in zip(asked.asked, first[0], strict=True):
        ids = write(TransformersBackend(small.model).new_text(), one.ids, 12, end_ids(small.tokenizer)).ids
        assert answer["text"] == small.tokenizer.decode(ids, skip_special_tokens=False).strip()
        assert answer["tokens"] <= 12 and answer["measured"]["stopped"] == answer["ended"]
        assert answer["first_token_seconds"] <= answer["seconds"]
    kept = generated_rows(asked, {"base": first[0], "fine-tuned": first[0]})
    assert [row["id"] for row in kept] == ["test-00000", "test-00001", "test-00002", "test-00003"]
    assert kept[0]["reference"] == rows(6)[0]["messages"][-1]["content"]
    content = prompts_json(asked, {"base": first[1], "fine-tuned": first[1]}, {"device": "cpu"})
    assert json.loads(json.dumps(content)) == content
    assert content["decoding"]["sampled"] == {"max_new_tokens": 12, "temperature": 0.7, "top_p": 0.8, "seed": 42}
    without, given = content["prompts"]
    assert given["reference"] == "很好。" and without["answers"]["base"]["greedy"]["measured"]["chrf"] is None
    assert given["answers"]["base"]["sampled"]["measured"]["chrf"] is not None


def test_kept_answers_are_not_written_again_and_others_are(small: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """Clocks show it: kept answers come back with their times; another limit, draw or prompt begins anew."""
    asked, keep = questions(small, tmp_path), Keep(tmp_path / "kept.jsonl", "m")
    first = answered(small, asked, keep)
    again = answered(small, asked, keep)
    assert (again.answers, again.replies) == (first.answers, first.replies)
    assert first.found == ["", "", ""]
    kinds = ("answers", "replies", "drawn replies")
    found = [f"{n} {kind} already written" for n, kind in zip((4, 2, 2), kinds, strict=True)]
    assert again.found == found
    shorter = answered(small, replace(asked, most=11), keep)
    assert shorter.found == ["begun anew: what was kept is of another way of writing"] * 3
    assert max(answer["tokens"] for answer in shorter.answers) <= 11
    drawn = answered(small, replace(asked, most=11, sampling=Sampling(seed=7)), keep)
    assert drawn.found[:2] == found[:2] and "another way of writing" in drawn.found[2]
    other = answered(small, replace(asked, most=11, asked=asked.asked[::-1]), keep)
    assert "other prompts" in other.found[0]


def test_a_row_is_asked_up_to_its_last_answer_that_fits(small: Tiny) -> None:  # noqa: F811
    (row,) = rows(1)
    whole = TASK.encode(small.tokenizer, row)
    asked = ask_row(small.tokenizer, row, whole)
    assert (asked.question, asked.reference) == (row["messages"][3]["content"], row["messages"][4]["content"])
    assert small.tokenizer.decode(asked.ids).rstrip().endswith("assistant") and asked.opening == ""
    cut = replace(TASK, max_seq_length=len(whole.ids) - 2).encode(small.tokenizer, row)
    asked = ask_row(small.tokenizer, row, cut)
    assert (asked.question, asked.reference) == (row["messages"][1]["content"], row["messages"][2]["content"])


def test_a_template_that_opens_the_reasoning_itself(small: Tiny) -> None:  # noqa: F811
    """Qwen3-Thinking's prompt ends with <think>: what the model writes begins inside the block."""
    tokenizer = small.tokenizer
    plain = ask_prompt(tokenizer, THINKING, {"prompt": "好吗", "reference": ""})
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = template + "{%- if add_generation_prompt %}<think>\n{%- endif %}"
        opened = ask_prompt(tokenizer, THINKING, {"prompt": "好吗", "reference": ""})
    finally:
        tokenizer.chat_template = template
    assert (plain.opening, opened.opening) == ("", "<think>\n")


@pytest.mark.parametrize(
    ("name", "opening"),
    [("qwen3-4b-thinking-2507", "<think>\n"), ("qwen2.5-0.5b-instruct", ""), ("qwen1.5-0.5b-chat", "")],
)
def test_the_prompts_of_real_models(name: str, opening: str, shared_data: Path) -> None:
    """Where the answer begins, how it ends, and what bytes its tokens are, with the tokenizers of Qwen."""
    tokenizer = load_tokenizer(shared_data / name)
    (row,) = rows(1, thinking=True)
    asked = ask_row(tokenizer, row, THINKING.encode(tokenizer, row))
    prompt = ask_prompt(tokenizer, THINKING, {"prompt": "什么是AES？", "reference": ""})
    assert asked.opening == prompt.opening == opening
    assert tokenizer.decode(prompt.ids).endswith(f"<|im_start|>assistant\n{opening}")
    ends = {tokenizer.convert_ids_to_tokens(number) for number in end_ids(tokenizer)}
    assert ends == {"<|im_end|>", "<|endoftext|>"}
    text = "早餐😀𠮷，é\nthe key — <think>x</think>"
    assert b"".join(token_bytes(tokenizer, tokenizer(text)["input_ids"])) == text.encode()


def test_nothing_is_written_where_nothing_is_wanted(small: Tiny, tmp_path: Path) -> None:  # noqa: F811
    asked = questions(small, tmp_path, generated_rows=0)
    assert answered(small, asked) == Replies([], [], ["", "", ""])
    with pytest.raises(InputError, match="terms: "):
        questions(small, tmp_path, terms=str(tmp_path / "absent.txt"))


def page(small: Tiny, tmp_path: Path, task: ConversationTask, wanted: int) -> AnswerPage:  # noqa: F811
    """The page of a result as the stage makes it, both models the same."""
    asked = questions(small, tmp_path, task, generated_rows=wanted)
    found = answered(small, asked)
    answers, replies = found.answers, found.replies
    own = {SHOWN[name]: answers for name in (BASE, FINETUNED)}
    measured = {name: [answer["measured"] for answer in given] for name, given in own.items()}
    part = {"n": 6, "ratio": 1.0, "ratio_interval": [0.9, 1.1]}
    part |= {name: {"perplexity": 9.0, "perplexity_interval": [8.0, 10.0]} for name in (BASE, FINETUNED)}
    content = {
        "answers": summarise(measured, [*range(len(answers))], "base") if answers else [],
        "chrf": "signature",
        "terms": {"name": "terms.txt", "terms": 3},
        "decoding": {"rows": len(answers), "max_new_tokens": 12},
        "parts": {"all": part},
        "turns_cut": 0,
    }
    prompts = prompts_json(asked, dict.fromkeys(own, replies), {"system_prompt": "你是助手。"})
    generated = generated_rows(asked, own)
    told = {"trained": True, "shown": SHOWN, "judged": FINETUNED}
    return AnswerPage(SimpleNamespace(content=content, part=part, generated=generated, prompts=prompts, **told))


def test_the_metric_of_the_answers_stands_on_the_page(small: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """Entity F1 first, with its types; answers to prompts without a reference have none."""
    asked = replace(questions(small, tmp_path), answer_metric="entity_f1")
    asked = replace(asked, asked=[replace(one, reference='[{"type": "地点", "text": "杭州"}]') for one in asked.asked])
    found = answered(small, asked)
    assert [answer["measured"]["readable"] for answer in found.answers] == [False] * 4
    assert [answer["measured"]["entity_f1"] for answer in found.answers] == [[0, 1]] * 4
    assert {reply["greedy"]["measured"]["entity_f1"] for reply in found.replies} == {None}
    shown = page(small, tmp_path, TASK, 4)
    own = [answer["measured"] for answer in found.answers]
    shown.content["answers"] = summarise({"base": own, "fine-tuned": own}, [*range(4)], "base")
    table = cells(shown.error_table())
    assert [line[:2] for line in table[:2]] == [["entity F1 ↑", "4"], ["entities readable ↑", "4"]]
    assert table[-2:] == [[model, "地点", "4", "0", "0", "–", "0.000", "0.000"] for model in ("base", "fine-tuned")]
    assert "entity F1 base 0.00, fine-tuned 0.00" in shown.learned().data
    with pytest.raises(InputError, match="4 of 4 reference answers that list no entities"):
        questions(small, tmp_path, answer_metric="entity_f1")


def cells(shown: HTML) -> list[list[str]]:
    """The cells of all tables that are shown, row by row."""
    lines = re.findall(r"<tr>(.*?)</tr>", shown.data, re.S)
    return [found for line in lines if (found := re.findall(r"<td[^>]*>(.*?)</td>", line, re.S))]


def test_what_the_page_shows(small: Tiny, tmp_path: Path) -> None:  # noqa: F811
    shown = page(small, tmp_path, TASK, 4)
    checks = cells(shown.errors())
    assert [line[0] for line in checks] == [
        "character integrity",
        "term preservation",
        "think structure",
        "semantic coherence",
        "semantic coherence",
    ]
    assert checks[0][2] == "4" and "without thinking" in checks[2][1]
    assert checks[3][3].startswith("9.00 [8.00") and checks[4][1].startswith("chrF")
    lines = {line[0]: line for line in cells(shown.error_table())}
    assert lines["stopped by itself ↑"][4].startswith("+0.00 [-0.")
    assert "signature" in shown.error_table().data and "terms.txt, 3 terms" in shown.error_table().data
    assert "0 differ by more than chance" in shown.reading().data
    assert "Of 4 written answers: characters intact base" in shown.learned().data
    latencies = [line for line in cells(shown.prompts()) if line[0] in SHOWN.values()]
    assert [line[1] for line in latencies] == ["2", "2"]
    assert len(cells(shown.prompts())) == 2 + 4 and "seed 42" in shown.prompts().data


def test_what_the_page_shows_of_thinking_and_of_nothing(small: Tiny, tmp_path: Path) -> None:  # noqa: F811
    thinking = page(small, tmp_path, THINKING, 3)
    assert cells(thinking.errors())[2][2] == "3" and "reasoning opened 0, closed 0" in thinking.reading().data
    nothing = page(small, tmp_path, TASK, 0)
    assert "generated_rows is 0" in cells(nothing.errors())[0][1]
    assert all("generated_rows is 0" in part().data for part in (nothing.error_table, nothing.reading, nothing.learned))
    assert "generated_rows is 0" in nothing.prompts().data
