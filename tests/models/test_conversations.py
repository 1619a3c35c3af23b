"""Conversations as token ids: rendered by the real templates, loss on the answers and their ends alone."""

from __future__ import annotations

import copy
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib.errors import InputError
from lib.models.loading import load_tokenizer
from lib.models.offline_base import TokenizerRecipe, train_tokenizer
from lib.prompts.conversations import ExchangeTooLongError, encode_conversation, render_conversation, safe_messages
from lib.prompts.tasks import ConversationTask, task_from_json
from lib.prompts.templates import is_blank, split_thinking, think_tags, with_thinking

END = "<|im_end|>"
REAL = ("qwen2.5-0.5b-instruct", "qwen3-4b-thinking-2507", "qwen1.5-0.5b-chat")
NAMES = ("offline", *REAL, "qwen3-0.6b", "qwq")
THINKERS = ("qwen3-4b-thinking-2507", "qwq")
PIECES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
    st.sampled_from(
        ["好的，", "\n", "  ", "😀", "e\u0301", END, "<|im_start|>user\n", "<tool_response>", "\u200b", "a.\n"]
    ),
)
TEXT = st.lists(PIECES, min_size=1, max_size=4).map("".join).map(str.strip).filter(lambda text: not is_blank(text))


def untagged(text: str) -> bool:
    return "think" not in text


@st.composite
def conversations(draw) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": draw(TEXT)}]
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(TEXT.filter(untagged))})
        messages.append({"role": "assistant", "content": draw(TEXT.filter(untagged))})
    return messages


@pytest.fixture(scope="module")
def tokenizers(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    made = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(
        ["你好，最近怎么样？", "我很累。", "yes 123"] * 20, ["你是助手。"], made, TokenizerRecipe(vocabulary=512)
    )
    found = {"offline": load_tokenizer(made), **{name: load_tokenizer(shared_data / name) for name in REAL}}
    for name, file in (("qwen3-0.6b", "Qwen-Qwen3-0.6B.jinja"), ("qwq", "Qwen-QwQ-32B.jinja")):
        found[name] = copy.copy(found[REAL[1]])
        found[name].chat_template = (shared_data / "qwen2-tokenizer-vectors" / file).read_text(encoding="utf-8")
    return found


def decoded(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def question(tokenizer, messages: list, thinking: bool) -> str:
    return ConversationTask("dialogue", "", 512, thinking).prompt(tokenizer, {"messages": messages})


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in THINKERS])
@given(messages=conversations())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_loss_is_on_the_answers_and_their_ends(tokenizers: dict, name: str, messages: list) -> None:
    tokenizer, thinking = tokenizers[name], False
    encoded = encode_conversation(tokenizer, messages, 32768, thinking)
    safe = safe_messages(tokenizer, messages)
    answers = [nfc(m["content"]) + END for m in safe if m["role"] == "assistant"]
    assert encoded.unlearned == 0
    assert [nfc(decoded(tokenizer, encoded.ids[a:b])) for a, b in encoded.spans] == answers
    assert decoded(tokenizer, [encoded.ids[i] for i in encoded.loss]) == "".join(answers)
    real = tokenizer.apply_chat_template(safe, tokenize=False, enable_thinking=thinking)
    text, *_ = render_conversation(tokenizer, messages, thinking)
    assert text == real or (text == real + END and name == "qwen1.5-0.5b-chat")
    assert encoded.ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert text.count("<think>") <= 1  # the template's own empty block at most
    assert tokenizer.pad_token_id not in [encoded.ids[i] for i in encoded.loss]


def test_padding_by_the_end_of_turn_changes_nothing(tokenizers: dict) -> None:
    """SmolLM2 pads with <|im_end|>: the loss is placed by turns, so the end of an answer is learned all the same."""
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    tokenizer = copy.copy(tokenizers["offline"])
    before = encode_conversation(tokenizer, messages, 512, False)
    tokenizer.pad_token = tokenizer.eos_token
    assert encode_conversation(tokenizer, messages, 512, False) == before
    assert before.ids[before.loss[-1]] == tokenizer.eos_token_id


@pytest.mark.parametrize("name", NAMES)
@given(messages=conversations(), reasoning=TEXT.filter(untagged), tag=st.sampled_from(["think", "thinking"]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_reasoning_of_the_last_answer_is_learned_once(
    tokenizers: dict, name: str, messages: list, reasoning: str, tag: str
) -> None:
    tokenizer = tokenizers[name]
    answer = messages[-1]["content"]
    messages[-1]["content"] = f"<{tag}>\n{reasoning}\n</{tag}>\n{answer}"
    encoded = encode_conversation(tokenizer, messages, 32768, True)
    start, stop = encoded.spans[-1]
    safe_reasoning, safe_answer = (
        safe_messages(tokenizer, [{"role": "user", "content": text}])[0]["content"] for text in (reasoning, answer)
    )
    wanted = f"<think>\n{safe_reasoning}\n</think>\n\n{safe_answer}{END}"
    if name in THINKERS:  # its own prompt opens the block
        wanted = wanted.removeprefix("<think>\n")
    found = decoded(tokenizer, encoded.ids[start:stop])
    assert nfc(found).strip("\n") == nfc(wanted)
    whole = decoded(tokenizer, encoded.ids)
    assert whole.count("<think>") == whole.count("</think>") == 1
    if name.startswith("qwen3"):
        assert tokenizer.convert_tokens_to_ids("<think>") in encoded.ids


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("thinking", [False, True])
def test_every_learned_answer_stands_behind_the_question_of_its_turn(
    tokenizers: dict, name: str, thinking: bool
) -> None:
    """What is asked at use is a beginning of what was trained on, so an answer starts where it was learned to."""
    tokenizer = tokenizers[name]
    reasons = [thinking, False, thinking]
    messages = [{"role": "system", "content": "你是助手。"}]
    for i, reason in enumerate(reasons):
        answer = with_thinking(tokenizer, f"想{i}" if reason else "", f"答{i}。")
        messages += [{"role": "user", "content": f"问{i}"}, {"role": "assistant", "content": answer}]
    if name in THINKERS and not thinking:
        with pytest.raises(InputError, match="always thinks"):
            encode_conversation(tokenizer, messages, 512, thinking)
        return
    encoded = encode_conversation(tokenizer, messages, 512, thinking)
    assert question(tokenizer, messages[:2], thinking).startswith("<|im_start|>system\n你是助手。<|im_end|>")
    for number, (start, stop) in zip(encoded.answers, encoded.spans, strict=True):
        asked = question(tokenizer, messages[: 2 * number + 2], thinking)
        before = decoded(tokenizer, encoded.ids[:start])
        missing = asked.removeprefix(before)  # Qwen3 writes earlier answers without the empty block that it asks with
        assert before == asked or (name == "qwen3-0.6b" and not thinking and missing == "<think>\n\n</think>\n\n")
        learned = decoded(tokenizer, encoded.ids[start:stop])
        assert learned.endswith(f"答{number}。{END}") and (f"想{number}" in learned) == thinking
    if thinking and name in (*THINKERS, "qwen3-0.6b"):
        assert encoded.answers == (2,)  # the template shows the reasoning of the last answer alone
    else:
        assert encoded.answers == ((0, 2) if thinking else (0, 1, 2))
    assert encoded.unlearned == 3 - len(encoded.answers)
    assert decoded(tokenizer, encoded.prompt_ids) == question(tokenizer, messages, thinking)


def test_tags_of_the_tokenizer(tokenizers: dict) -> None:
    assert {name: think_tags(tokenizer)[0] for name, tokenizer in tokenizers.items()} == dict.fromkeys(NAMES, "<think>")
    assert "<think>" in tokenizers["qwen3-0.6b"].get_vocab()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("<think>a", "not closed"),
        ("a</think>b", "not opened"),
        ("<think>a<think>b</think></think>c", "nested"),
        ("<think>a</thinking>c", "crossed"),
        ("<think> </think>c", "empty thinking"),
        ("<thinking>a</thinking>\n", "no answer"),
        ("first <think>a</think>c", "text before"),
        ("<Think>a", "not closed"),
        ("<think>\u200b</think>c", "empty thinking"),
        ("<think>a</think>\u200b\ufeff", "no answer"),
        ("&lt;think&gt;a&lt;/think&gt;b", "escaped tags"),
        ("\n＜Thinking＞a＜/Thinking＞b", "escaped tags"),
    ],
)
def test_damaged_thinking_is_named(content: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        split_thinking(content)


@pytest.mark.parametrize(
    "content",
    [
        "<Think>a</Think>b",
        "<THINKING>a</thinking >b",
        "< think >a</ think>b",
        "\ufeff<think>a</think>b",
        "\u200b<think>a</think>b",
    ],
)
def test_tags_in_other_writings(content: str) -> None:
    assert split_thinking(content) == ("a", "b")


def test_escaped_tags_inside_an_answer_are_text() -> None:
    assert split_thinking("写作 &lt;think&gt;") == ("", "写作 &lt;think&gt;")


@pytest.mark.parametrize("name", NAMES)
def test_thinking_is_never_cut_away(tokenizers: dict, name: str) -> None:
    tokenizer = tokenizers[name]
    messages = [{"role": "system", "content": "你是助手。"}]
    for answer in ("<think>想</think>甲", "乙", "<think>" + "很长的推理。" * 40 + "</think>丙"):
        messages += [{"role": "user", "content": "问"}, {"role": "assistant", "content": answer}]
    cut = encode_conversation(tokenizer, messages, 128, True)
    assert cut.turns_cut == 4 and cut.answers == (0,)
    assert "想" in decoded(tokenizer, [cut.ids[i] for i in cut.loss])
    messages[2]["content"] = "甲"  # the turns that would fit have no reasoning
    with pytest.raises(ExchangeTooLongError, match="with its reasoning"):
        encode_conversation(tokenizer, messages, 128, True)


def test_long_dialogues_lose_whole_turns_at_their_end(tokenizers: dict) -> None:
    for name, tokenizer in tokenizers.items():
        if name in THINKERS:
            continue
        messages = [{"role": "system", "content": "你是助手。"}]
        for i in range(6):
            messages += [{"role": "user", "content": f"问题{i}"}, {"role": "assistant", "content": f"回答{i}" * 5}]
        whole = encode_conversation(tokenizer, messages, 4096, False)
        most = len(whole.ids) - 3
        cut = encode_conversation(tokenizer, messages, most, False)
        assert cut.turns_cut == 2 and len(cut.ids) <= most, name
        assert cut.ids == encode_conversation(tokenizer, messages[:-2], 4096, False).ids
        assert len(cut.spans) + cut.unlearned == 5
        with pytest.raises(ExchangeTooLongError):
            encode_conversation(tokenizer, messages, 12, False)


def test_a_template_that_drops_turns_is_refused(tokenizers: dict) -> None:
    tokenizer = tokenizers["offline"]
    before = tokenizer.chat_template
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        tokenizer.chat_template = "{{ messages[-1]['content'] }}<|im_end|>"
        with pytest.raises(InputError, match="leaves turns out"):
            render_conversation(tokenizer, messages, False)
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
        with pytest.raises(InputError, match="does not close an answer"):
            render_conversation(tokenizer, [*messages, *messages], False)
    finally:
        tokenizer.chat_template = before


def test_the_hash_tells_tasks_apart(tokenizers: dict) -> None:
    plain, other = ConversationTask("dialogue", "a", 64), ConversationTask("dialogue", "b", 64)
    assert task_from_json(plain.to_json()) == plain
    tokenizer = tokenizers["qwen3-0.6b"]
    assert plain.fingerprint(tokenizer) != other.fingerprint(tokenizer)
    assert plain.fingerprint(tokenizer) != plain.fingerprint(tokenizers["offline"])


def test_an_answer_that_is_not_to_be_learned_is_only_read(tokenizers: dict) -> None:
    tokenizer = tokenizers["offline"]
    messages: list = [{"role": "system", "content": "s"}]
    for question, answer in (("你好", "不用管它"), ("累", "休息吧"), ("好", "再见")):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    whole = encode_conversation(tokenizer, messages, 512, False)
    messages[2]["learn"] = False
    encoded = encode_conversation(tokenizer, messages, 512, False)
    assert encoded.ids == whole.ids and encoded.spans == whole.spans[1:] and encoded.answers == (1, 2)
    assert encoded.unlearned == 1 and "不用管它" not in decoded(tokenizer, encoded.loss_ids)
    with pytest.raises(ExchangeTooLongError, match="to be learned"):  # only the first exchange fits
        encode_conversation(tokenizer, messages, whole.spans[0][1] + 1, False)
