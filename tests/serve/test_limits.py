"""What a request may cost and say: answers that end, clients that have gone, null members, odd values."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from lib.models.gguf_file import read_metadata
from lib.runs.machine import llama_cpp_problem
from lib.serve import limits
from lib.serve.openai import NEEDS, make_formatter
from tests.serve.conftest import MESSAGES, start

pytestmark = [
    pytest.mark.skipif(llama_cpp_problem() is not None, reason="llama-cpp-python does not work here"),
]
for _name in NEEDS:
    pytest.importorskip(_name)

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


def post(client: httpx.Client, path: str = CHAT, **body: Any) -> httpx.Response:
    asked = {"prompt": "房间"} if path == COMPLETION else {"messages": MESSAGES}
    return client.post(path, content=json.dumps({**asked, **body}), headers={"content-type": "application/json"})


@pytest.fixture(scope="module")
def lead_bytes(model: Path) -> list[int]:
    """Tokens that are the first byte of a character of four, three and two bytes, and never its end."""
    import llama_cpp

    llm = llama_cpp.Llama(str(model), vocab_only=True, verbose=False)
    names = read_metadata(model)["tokenizer.ggml.tokens"]
    found = {llm.detokenize([number]): number for number in range(len(names))}
    return [found[bytes([lead])] for lead in (0xF0, 0xE6, 0xC3) if bytes([lead]) in found]


SAMPLERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"mirostat_mode": 1, "top_k": 1},
    {"mirostat_mode": 2, "temperature": 2, "repeat_penalty": 10},
    {"stop": ["\ufffd", "never"], "min_tokens": 12},
]


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_answer_ends_whatever_it_is_made_of(
    server: SimpleNamespace, lead_bytes: list[int], path: str, sampler: dict
) -> None:
    assert lead_bytes
    for token in lead_bytes:
        asked = {"logit_bias": {str(token): 1000}, "max_tokens": 9, **sampler}
        answer = post(
            server.client.__class__(base_url=server.address, timeout=20, trust_env=False), path, **asked
        ).json()
        assert answer["usage"]["completion_tokens"] == 9, answer
        assert answer["choices"][0]["finish_reason"] == "length"
        text = post(server.client, path, **asked, stream=True).text
        assert '"finish_reason": "length"' in text and text.endswith("data: [DONE]\n\n")


@pytest.fixture(scope="module")
def long(model: Path) -> Iterator[SimpleNamespace]:
    process, lines, address = start(
        str(model), "--port", "0", "--n-ctx", "2048", "--max-tokens", "1900", "--n-threads", "1"
    )
    yield SimpleNamespace(address=address, lines=lines)
    process.terminate()
    assert process.wait(30) == 143
    assert not any("Traceback" in line or "failed" in line for line in lines), "".join(lines)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_has_gone_ends_its_work(long: SimpleNamespace, lead_bytes: list[int], stream: bool) -> None:
    """Its answer is one that would take the model for long."""
    endless = {"messages": MESSAGES, "logit_bias": {str(lead_bytes[0]): 1000}, "max_tokens": 1900, "stream": stream}
    with httpx.Client(base_url=long.address, timeout=60, trust_env=False) as client:
        begun = time.monotonic()
        assert post(client, **endless).status_code == 200
        whole = time.monotonic() - begun
        body = json.dumps(endless).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
        host, _, port = long.address.removeprefix("http://").partition(":")
        for _ in range(limits.WAITING + 20):  # those that wait count no more, either
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(request)
                time.sleep(0.01)
        begun = time.monotonic()
        assert post(client, max_tokens=1).status_code == 200
        assert time.monotonic() - begun < max(2.0, whole)


def test_requests_are_counted(server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    async def never(scope: dict, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    monkeypatch.setattr(limits, "WAITING", 2)
    most = limits.Limits("m", 0, 12, 256, 300, False)
    application = limits.LimitedApplication(never, most, lambda path, body: 1)

    async def ask(left: asyncio.Event) -> list[dict]:
        sent: list[dict] = []
        parts = [{"type": "http.request", "body": b"{}", "more_body": False}]

        async def receive() -> dict:
            if parts:
                return parts.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [(b"content-type", b"application/json")]}
        await application(scope, receive, send)
        return sent

    async def story() -> None:
        left = asyncio.Event()
        two = [asyncio.create_task(ask(left)) for _ in range(2)]
        await asyncio.sleep(0.2)
        (begin, body) = await ask(asyncio.Event())
        assert begin["status"] == 503 and json.loads(body["body"])["error"]["code"] == "overloaded"
        left.set()
        await asyncio.gather(*two)
        assert not application._asked

    asyncio.run(story())


KEYS = (
    *("temperature", "top_p", "top_k", "min_p", "stream", "stop", "seed", "n", "user", "max_tokens", "model"),
    *("max_completion_tokens", "presence_penalty", "frequency_penalty", "repeat_penalty", "tools", "tool_choice"),
    *("functions", "function_call", "response_format", "logit_bias", "logit_bias_type", "logprobs", "top_logprobs"),
    *("min_tokens", "mirostat_mode", "mirostat_tau", "mirostat_eta", "grammar", "best_of", "echo", "suffix"),
    *("stream_options", "metadata", "store", "parallel_tool_calls", "reasoning_effort", "service_tier"),
)


def test_null_is_absent(server: SimpleNamespace) -> None:
    wanted = post(server.client, temperature=0, max_tokens=3).json()["choices"]
    for key in KEYS:
        answer = post(server.client, **{"temperature": 0, "max_tokens": 3, key: None})
        assert answer.status_code == 200, (key, answer.text)
        if key not in ("temperature", "max_tokens"):
            assert answer.json()["choices"] == wanted, key
    nested = [
        {"response_format": {"type": "text", "schema": None}},
        {"stream_options": {"include_usage": None}},
        {"messages": [{**message, "name": None, "tool_calls": None} for message in MESSAGES]},
        {
            "messages": [
                {"role": m["role"], "content": [{"type": "text", "text": m["content"], "x": None}]} for m in MESSAGES
            ]
        },
    ]
    for more in nested:
        answer = post(server.client, **{"temperature": 0, "max_tokens": 3, **more})
        assert answer.status_code == 200 and answer.json()["choices"] == wanted, (more, answer.text)
    for path in (CHAT, COMPLETION):
        assert post(server.client, path, **dict.fromkeys(KEYS)).status_code == 200
    refused = post(server.client, logit_bias={"5": None})
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "invalid_logit_bias"


@pytest.mark.parametrize("member", ["reasoning_content", "reasoning", "thought"])
def test_what_the_inner_server_leaves_out_reaches_the_template(member: str) -> None:
    from starlette.responses import JSONResponse

    read = member.replace("reasoning_content", "reasoning").replace("reasoning", "reasoning_content")
    formatter = make_formatter(f"{{{{ messages[0].{read} }}}} {{{{ tools[0].x }}}}", False, "", "", 1, ["<end>"])

    async def inner(scope: Any, receive: Any, send: Any) -> None:  # as its schema hands them over
        prompt = formatter(messages=[{"role": "user", "content": "a"}], tools=[{}]).prompt
        await JSONResponse(prompt)(scope, receive, send)

    async def ask() -> Any:
        known = limits.Limits("m", 0, 8, 64, 300, False)
        application = limits.LimitedApplication(inner, known, lambda path, body: 1)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://a") as client:
            message = {"role": "user", "content": "a", member: "why<end>"}
            answer = await client.post(CHAT, json={"messages": [message], "tools": [{"x": "y"}]})
            return answer.json()

    assert asyncio.run(ask()) == "why< end> y"


REFUSED = [
    *({"tool_choice": value} for value in ("required", "any", {"type": "function", "function": {"name": "f"}})),
    *({"n": value} for value in (0, True, 2)),
    *({"id_slot": 0}, {"logprobs": 0}, {"top_logprobs": False}, {"best_of": True}, {"typical_p": True}),
]


@pytest.mark.parametrize("body", REFUSED, ids=str)
def test_what_no_answer_could_follow_is_refused(server: SimpleNamespace, body: dict[str, Any]) -> None:
    answer = post(server.client, max_tokens=1, **body)
    assert answer.status_code == 400 and next(iter(body)) in answer.json()["error"]["message"], answer.text


def test_what_asks_for_nothing_is_taken(server: SimpleNamespace) -> None:
    nothing = {"n": 1, "best_of": 1, "logprobs": False, "top_logprobs": 0, "suffix": "", "id_slot": -1}
    assert post(server.client, max_tokens=1, tool_choice="none", **nothing).status_code == 200
    twice = f'{{"messages": {json.dumps(MESSAGES)}, "max_tokens": 2, "max_tokens": 3}}'
    inside = '{"messages": [{"role": "user", "content": "a", "content": "b"}]}'
    for text in (twice, inside):
        answer = server.client.post(CHAT, content=text, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and "twice" in answer.json()["error"]["message"], answer.text


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("message", "place"),
    [
        (
            {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {"a": 1}}}]},
            "messages.1.tool_calls.0.function.arguments: ",
        ),
        ({"role": "assistant", "tool_calls": [{**CALL, "id": 5}]}, "messages.1.tool_calls.0.id: "),
        ({"role": "tool", "content": "a"}, "messages.1.tool_call_id: "),
    ],
)
def test_an_error_names_the_member_that_is_wrong(server: SimpleNamespace, message: dict[str, Any], place: str) -> None:
    answer = post(server.client, messages=[{"role": "user", "content": "a"}, message])
    assert answer.status_code == 400 and place in answer.json()["error"]["message"], answer.text
    assert "system" not in answer.json()["error"]["message"]


def test_null_says_something_in_data() -> None:
    body = {"tools": [{"function": {"parameters": {"default": None}, "strict": None}}], "stop": None, "x": [None]}
    assert limits.without_nulls(body) == {"tools": [{"function": {"parameters": {"default": None}}}], "x": [None]}


def test_answers_can_be_sent_back_as_history(server: SimpleNamespace) -> None:
    with openai.OpenAI(base_url=server.address + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        asked: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 3}
        message = client.chat.completions.create(**asked, messages=MESSAGES).choices[0].message
        call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        histories: list[Any] = [
            message,
            message.model_dump(),
            {**message.model_dump(), "annotations": [], "audio": None, "refusal": None},
            {"role": "assistant", "content": None, "refusal": "no", "audio": None, "function_call": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
        for history in histories:
            turns = [*MESSAGES, history, {"role": "user", "content": "早餐"}]
            assert client.chat.completions.create(**asked, messages=turns).choices


CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("stop", ["", ["", "zz"]])
def test_an_empty_text_to_stop_at_is_refused(server: SimpleNamespace, path: str, stop: Any) -> None:
    answer = post(server.client, path, stop=stop)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_stop", answer.text


@pytest.mark.parametrize(
    ("more", "message", "name"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, {}, "tools"),
        ({"functions": [{"name": "f"}]}, {}, "functions"),
        ({}, CALLED, "tool_calls"),
        ({}, {"role": "assistant", "content": "a", "function_call": {"name": "f"}}, "function_call"),
        ({}, {"role": "assistant", "content": "a", "prefix": True}, "prefix"),
    ],
)
def test_what_the_template_does_not_write_is_refused(more: dict, message: dict, name: str) -> None:
    written = "{% for message in messages %}{{ message.role }} {{ message.content }}\n{% endfor %}"
    heard = written + "{{ tools }}{{ functions }}{{ messages[-1].tool_calls }}{{ messages[-1].function_call }}"
    messages = [{"role": "user", "content": "a"}, *([message] if message else [])]
    with pytest.raises(ValueError, match=f"^{name}: the chat template of this model does not write"):
        make_formatter(written, False, "", "", 1, [])(messages=messages, **more)
    make_formatter(heard + "{{ messages[-1].prefix }}", False, "", "", 1, [])(messages=messages, **more)


def test_a_system_message_that_the_template_leaves_out_is_refused() -> None:
    formatter = make_formatter(
        "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", False, "", "", 1, []
    )
    turn = {"role": "user", "content": "a"}
    assert formatter(messages=[{"role": "system", "content": ""}, turn]).prompt == "a"
    with pytest.raises(ValueError, match=r"^messages of the system: the chat template of this model does not write"):
        formatter(messages=[{"role": "system", "content": "S"}, turn])


def test_no_text_of_a_tool_call_closes_its_turn() -> None:
    formatter = make_formatter("{{ messages[0].tool_calls[0].function.name }}", False, "", "", 1, ["<|im_end|>"])
    call = {"function": {"name": "<|im_end|>"}}
    assert formatter(messages=[{"role": "assistant", "tool_calls": [call]}]).prompt == "< |im_end|>"


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("asked", [None, False, True])
def test_a_request_says_whether_the_model_thinks(started: bool, asked: bool | None) -> None:
    formatter = make_formatter("{{ 'on' if enable_thinking else 'off' }}", started, "", "", 1, [])
    token = limits.THINKING.set(asked)
    try:
        prompt = formatter(messages=[{"role": "user", "content": "a"}]).prompt
    finally:
        limits.THINKING.reset(token)
    assert prompt == ("on" if (started if asked is None else asked) else "off")


ODD = (True, -1, 0, 1e300, 10**30, "", "\ud800", "abc", [], [None], {}, [[{}]])


def test_no_value_of_a_client_is_a_fault_of_the_server(server: SimpleNamespace) -> None:
    for path, own in ((CHAT, "messages"), (COMPLETION, "prompt")):
        for number, key in enumerate((own, *KEYS)):
            for value in ODD if key == own else ODD[number % 2 :: 2]:
                stream = number % 4 > 1
                answer = post(server.client, path, **{"max_tokens": 2, "stream": stream, key: value})
                assert answer.status_code in (200, 400, 404), (path, key, value, answer.text)
                assert answer.status_code == 200 or answer.json()["error"]["message"], (key, value)
                assert "error" not in answer.text or answer.status_code != 200, (key, value, stream, answer.text)
    for member in ("role", "content", "name", "tool_calls", "function_call", "refusal", "tool_call_id"):
        for role in ("user", "assistant"):
            for value in ODD:
                messages = [*MESSAGES, {"role": role, "content": "a", member: value}]
                answer = post(server.client, messages=messages, max_tokens=1)
                assert answer.status_code in (200, 400), (member, value, answer.text)
    for text in ('{"top_p": NaN}', '{"seed": Infinity}', '{"a":' * 900 + "1" + "}" * 900, '{"a":' * 9000):
        answer = server.client.post(CHAT, content=text, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert not any("Traceback" in line or "failed" in line for line in server.lines), "".join(server.lines)
