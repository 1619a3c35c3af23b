"""`workbook serve` as the official client sees it: answers, streams, clients at once, labels, and its error classes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openai
import pytest

from lib.models.loading import load_tokenizer
from lib.runs.machine import llama_cpp_problem
from lib.scoring.llama_backend import LlamaCppBackend
from lib.serve.openai import NEEDS
from tests import tiny_run
from tests.serve.conftest import MESSAGES

pytestmark = [
    pytest.mark.skipif(llama_cpp_problem() is not None, reason="llama-cpp-python does not work here"),
]
for _name in NEEDS:
    pytest.importorskip(_name)

ASKED: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "temperature": 0}


@pytest.fixture(scope="module")
def client(server: SimpleNamespace) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.address + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def text_of(client: openai.OpenAI, **asked: Any) -> str:
    return client.chat.completions.create(**{**ASKED, **asked}).choices[0].message.content or ""


def test_answers_and_streams(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**ASKED)
    text = answer.choices[0].message.content
    assert answer.model == "tiny" and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    chunks = list(client.chat.completions.create(**ASKED, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text != ""
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "length"]
    parts = [{"type": "text", "text": "房间"}, {"type": "text", "text": "很干净"}]
    assert text_of(client, messages=[MESSAGES[0], {"role": "user", "content": parts}]) == text
    plain = client.completions.create(model="tiny", prompt="房间", max_tokens=3, temperature=0)
    streamed = client.completions.create(model="tiny", prompt="房间", max_tokens=3, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == plain.choices[0].text != ""


def test_the_model_is_listed_and_no_other_one_answers(client: openai.OpenAI, model: Path) -> None:
    (listed,) = client.models.list().data
    assert listed.id == "tiny" and listed.created == int(model.stat().st_mtime)
    assert client.models.retrieve("tiny") == listed
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(**{**ASKED, "model": "gpt-9"})
    assert unknown.value.code == "model_not_found" and "'tiny'" in unknown.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_several_clients_at_once_get_whole_answers(client: openai.OpenAI, server: SimpleNamespace) -> None:
    topics = ["房间", "服务", "早餐"]
    turns = [[MESSAGES[0], {"role": "user", "content": topic * 5}] for topic in topics]
    alone = [text_of(client, messages=messages) for messages in turns]

    async def ask(parallel: openai.AsyncOpenAI, messages: list, stream: bool) -> str:
        if not stream:
            answer = await parallel.chat.completions.create(**{**ASKED, "messages": messages})
            return answer.choices[0].message.content
        chunks = await parallel.chat.completions.create(**{**ASKED, "messages": messages}, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async def ask_all() -> list[str]:
        options = {"base_url": server.address + "/v1", "api_key": "none", "max_retries": 0, "timeout": 60}
        async with openai.AsyncOpenAI(**options) as parallel:
            return await asyncio.gather(*(ask(parallel, turns[i % 3], i < 6) for i in range(12)))

    assert asyncio.run(ask_all()) == [alone[i % 3] for i in range(12)]


def test_a_client_that_leaves_its_stream_holds_up_nobody(client: openai.OpenAI) -> None:
    with client.chat.completions.create(**ASKED, stream=True) as stream:
        next(iter(stream))
    assert text_of(client.with_options(timeout=20)) == text_of(client)


def test_labels_are_those_that_the_workbook_scores(client: openai.OpenAI, model: Path) -> None:
    """`logit_bias` leaves only the answer words; it is shifted so that both come as often."""
    tokenizer, task = load_tokenizer(model.parent / "tokenizer"), replace(tiny_run.TASK, max_seq_length=200)
    (first,), (second,) = task.answer_words(tokenizer)
    texts = tiny_run.texts(20, seed=3)
    with LlamaCppBackend(model, 256, 1) as backend:
        prompts = [task.encode(tokenizer, {"text": text}).prompt_ids for text in texts]
        scores = backend.label_log_probs(prompts, [[first], [second]])
    margins = scores[:, 1] - scores[:, 0]
    middle = float(np.median(margins))
    bias = {str(first): 50.0, str(second): 50.0 - middle}
    clear = [i for i in range(len(texts)) if abs(margins[i] - middle) > 0.02]
    assert len(clear) >= 15
    for i in clear:
        found = text_of(client, messages=task.messages({"text": texts[i]}), logit_bias=bias, max_tokens=1)
        assert found == task.label_names[int(margins[i] > middle)]


def test_answers_are_not_penalized_for_repeating(client: openai.OpenAI, model: Path) -> None:
    """The inner server would take a tenth of the logit of a token that has come before. Two tokens may come here."""
    from llama_cpp import Llama

    tokenizer = load_tokenizer(model.parent / "tokenizer")
    (first,), (second,) = tiny_run.TASK.answer_words(tokenizer)
    prompt = tokenizer.apply_chat_template(MESSAGES, tokenize=True, add_generation_prompt=True, return_dict=False)
    llm = Llama(str(model), n_ctx=256, n_threads=1, flash_attn=True, verbose=False)
    options = {"max_tokens": 12, "temperature": 0, "repeat_penalty": 1.0}
    wanted = llm.create_completion(prompt, logit_bias={first: 500, second: 500}, **options)["choices"][0]["text"]
    llm.close()
    assert any(name * 3 in wanted for name in tiny_run.LABELS)
    assert text_of(client, logit_bias={str(first): 500, str(second): 500}) == wanted


@pytest.mark.parametrize(
    ("asked", "code", "words"),
    [
        ({"messages": [{"role": "user", "content": "好" * 2000}]}, "context_length_exceeded", "holds 256"),
        ({"messages": [{"role": "user", "content": "好" * 2000}], "stream": True}, "context_length_exceeded", "256"),
        ({"max_tokens": 13}, "invalid_max_tokens", "from 1 to 12"),
        ({"temperature": -1}, "invalid_temperature", "from 0 to 2"),
        ({"logprobs": True, "top_logprobs": 2}, "unsupported_parameter", "logprobs is True"),
        ({"top_logprobs": 2}, "unsupported_parameter", "top_logprobs is 2"),
        ({"n": 2}, "unsupported_parameter", "n is 2"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "invalid_messages", "no role 'wizard'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_messages", "both texts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "text": "x"}]}]},
            "invalid_messages",
            "both texts",
        ),
        ({"messages": "a"}, "invalid_messages", "must be a list"),
        ({"response_format": {"type": "yaml"}}, "invalid_request", "response_format"),
        ({"logit_bias": {"x": 1}}, "invalid_logit_bias", "'x'"),
        ({"logit_bias": {"99999999": 1}}, "invalid_logit_bias", "token ids from 0 to"),
        ({"logit_bias": {"-1": 1}}, "invalid_logit_bias", "'-1'"),
        ({"logit_bias": {"\u0665": 1}}, "invalid_logit_bias", "token ids"),
        ({"logit_bias": {"1": -1e39}}, "invalid_logit_bias", "from -1000 to 1000"),
        ({"extra_body": {"logit_bias": {"a": 1e39}, "logit_bias_type": "tokens"}}, "invalid_logit_bias", "1e+39"),
        ({"extra_body": {"repeat_penalty": 0}}, "invalid_repeat_penalty", "from 0.1 to 10"),
        ({"extra_body": {"repeat_penalty": "1e39"}}, "invalid_repeat_penalty", "'1e39'"),
        ({"reasoning_effort": "low"}, "unsupported_parameter", "reasoning_effort is 'low'"),
        ({"extra_body": {"extra_body": {"a": 1}}}, "unsupported_parameter", "extra_body is"),
        ({"extra_body": {"repetition_penalty": 1.1}}, "unsupported_parameter", "repetition_penalty is 1.1"),
        ({"extra_body": {"guided_choice": ["a"]}}, "unsupported_parameter", "guided_choice is"),
        ({"extra_body": {"chat_template_kwargs": {"x": 1}}}, "unsupported_parameter", "enable_thinking alone"),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": 2}}}, "invalid_enable_thinking", "is 2"),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}, "invalid_messages", "one way only"),
        ({"extra_body": {"enable_thinking": True}}, "invalid_messages", "one way only"),
    ],
)
def test_what_is_refused_names_the_cause(client: openai.OpenAI, asked: dict, code: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**{**ASKED, **asked})
    assert refused.value.code == code and words in refused.value.message and refused.value.status_code == 400


def test_members_that_ask_for_nothing_are_taken(client: openai.OpenAI) -> None:
    more = {"repetition_penalty": 1.0, "typical_p": 1, "cache_prompt": True, "guided_choice": [], "ignore_eos": False}
    more |= {"chat_template_kwargs": {"enable_thinking": False}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": None}}]
    wanted = text_of(client)
    assert text_of(client, extra_body=more, user="a", metadata={"a": "b"}, store=False) == wanted
    assert client.chat.completions.create(**ASKED, tools=tools).choices


DEADLY = {"type": "string", "pattern": r"^\$"}  # llama-cpp-python makes a grammar of it that llama.cpp cannot read
TOOL = {"name": "f", "parameters": DEADLY}


@pytest.mark.parametrize(
    "asked",
    [
        {"extra_body": {"grammar": "root ::= ((("}},
        {"response_format": {"type": "json_object", "schema": DEADLY}},
        {"response_format": {"type": "json_object", "schema": {"type": "string", "pattern": "^[z-a]$"}}},
        {"response_format": {"type": "json_object"}, "extra_body": {"min_tokens": 5}},
        {
            "tools": [{"type": "function", "function": TOOL}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
        },
        {"functions": [TOOL], "function_call": {"name": "f"}},
    ],
)
def test_no_grammar_of_a_client_ends_the_server(client: openai.OpenAI, asked: dict) -> None:
    """Unread grammars end the process with SIGSEGV, those that leave no token with SIGABRT."""
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**{**ASKED, **asked})
    assert refused.value.code == "unsupported_parameter"
    assert client.models.list().data


def test_json_without_a_schema(client: openai.OpenAI) -> None:
    assert text_of(client, response_format={"type": "json_object"}).startswith("{")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="a", extra_body={"grammar": "root ::= ((("})
    tools = [{"type": "function", "function": TOOL}]
    assert client.chat.completions.create(**ASKED, tools=tools, tool_choice="auto").choices


def test_other_refusals(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as large:
        text_of(client, messages=[{"role": "user", "content": "a" * (1 << 20)}])
    assert large.value.status_code == 413 and large.value.code == "request_too_large"
    with pytest.raises(openai.BadRequestError, match="not JSON"):
        client.post("/chat/completions", cast_to=object, content=b'{"messages": [')
    for create in (client.embeddings.create, client.responses.create):
        with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
            create(model="tiny", input="a")
    assert text_of(client) != ""
