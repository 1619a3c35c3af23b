"""The server of the phone page: this folder alone, behind its token; ranges, headers, results that are checked."""

from __future__ import annotations

import copy
import json
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from lib.errors import InputError
from lib.runs.files import read_json
from lib.serve.listening import ServeOptions, listen, make_server
from lib.serve.phone import _reachable, announce, encryption_of, make_application, serve_phone
from lib.stages.compare.speed import MOST_BYTES, check_result, read_result, save_result
from tests.conftest import PROJECT

SPEED = {"tokens": 32, "tokens_per_second": [7.5, 8.25]}
RESULT: dict[str, Any] = {
    "format": 1,
    "run": "quick",
    "file": "m.gguf",
    "sha256": "a" * 64,
    "measured": "2026-01-01T00:00:00Z",
    "device": {"name": "Pixel 8 / ../x", "browser": "Chrome", "user_agent": "Mozilla", "cores": 8, "memory_gb": None},
    "runtime": {"wllama": "3.8.1", "threads": 4, "isolated": True, "compat": False},
    "load": {"seconds": [1.5]},
    "prompt": SPEED,
    "generation": SPEED,
    "checks": {"n": 5, "exact": 5, "tokens": 9, "same_tokens": 9, "prompts_as_stored": 5},
    "rows": {"n": 0, "agree": 0, "largest_gap_nats": None, "source": "own"},
}


@contextmanager
def served(folder: Path, devices: Path, tell: Callable[[str], None], **options: Any) -> Iterator[int]:
    """The port at which a folder is served, with the token "token"."""
    started = threading.Event()
    server = make_server(make_application(folder, devices, "token", tell), started.set, **options)
    with listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        assert started.wait(30)
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join(30)


@pytest.fixture
def phone(tmp_path: Path) -> Iterator[SimpleNamespace]:
    folder = tmp_path / "package"
    (folder / "web").mkdir(parents=True)
    (folder / "web" / "index.html").write_text("<p>page", encoding="utf-8")
    (folder / "web" / "x.wasm").write_bytes(b"\0asm")
    (folder / "m.gguf").write_bytes(bytes(range(100)))
    (folder / ".hidden").write_text("secret", encoding="utf-8")
    (tmp_path / "outside.txt").write_text("secret", encoding="utf-8")
    (folder / "link.txt").symlink_to(tmp_path / "outside.txt")
    told: list[str] = []
    with (
        served(folder, tmp_path / "devices", told.append) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        yield SimpleNamespace(client=client, told=told, devices=tmp_path / "devices")


def test_the_page_is_isolated_and_typed(phone: SimpleNamespace) -> None:
    page = phone.client.get("/token/web/")
    assert page.text == "<p>page" and page.headers["content-type"].startswith("text/html")
    assert page.headers["cross-origin-opener-policy"] == "same-origin"
    assert page.headers["cross-origin-embedder-policy"] == "require-corp"
    assert phone.client.get("/token/web/x.wasm").headers["content-type"] == "application/wasm"
    head = phone.client.head("/token/m.gguf")
    assert head.content == b"" and head.headers["content-length"] == "100"


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/web/",
        "/other/web/",
        "/tokenx/web/",
        "/token/../outside.txt",
        "/token/%2e%2e/outside.txt",
        "/token/absent",
        "/token/.hidden",
        "/token/link.txt",
        "/token//etc/passwd",
        "/token/web",
        "/token/%00",
        "/t%C3%B6ken/web/",
        "/token/" + "a" * 300,
    ],
)
def test_nothing_else_is_served(path: str, phone: SimpleNamespace) -> None:
    raw = phone.client.build_request("GET", phone.client.base_url)
    raw.url = raw.url.copy_with(raw_path=path.encode())
    assert phone.client.send(raw).status_code == 404


def test_an_address_that_is_none_gets_an_answer(phone: SimpleNamespace) -> None:
    with socket.create_connection(("127.0.0.1", phone.client.base_url.port), timeout=30) as raw:
        raw.sendall(b"GET http://[x HTTP/1.1\r\nHost: a\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 404")


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [("bytes=0-3", 0, 3), ("bytes=90-", 90, 99), ("bytes=-5", 95, 99), ("bytes=98-500", 98, 99), ("bytes=-500", 0, 99)],
)
def test_ranges(asked: str, first: int, last: int, phone: SimpleNamespace) -> None:
    answer = phone.client.get("/token/m.gguf", headers={"Range": asked})
    assert answer.status_code == 206 and answer.content == bytes(range(first, last + 1))
    assert answer.headers["content-range"] == f"bytes {first}-{last}/100"


def test_ranges_that_cannot_be(phone: SimpleNamespace) -> None:
    for beyond in ("100-", f"{'9' * 5000}-", f"{'9' * 5000}-{'9' * 5000}"):
        assert phone.client.get("/token/m.gguf", headers={"Range": f"bytes={beyond}"}).status_code == 416
    asked = {"Range": f"bytes={'0' * 5000}7-{'9' * 5000}"}
    assert phone.client.get("/token/m.gguf", headers=asked).content == bytes(range(7, 100))
    assert phone.client.get("/token/m.gguf", headers={"Range": f"bytes=-{'9' * 5000}"}).content == bytes(range(100))
    assert phone.client.get("/token/m.gguf", headers={"Range": "lines=1-2"}).content == bytes(range(100))


def test_a_result_is_saved_once_each(phone: SimpleNamespace) -> None:
    for _ in range(2):
        assert phone.client.post("/token/result", json={**RESULT, "more": "dropped"}).status_code == 201
    paths = sorted(phone.devices.iterdir())
    assert len(paths) == 2 and all("pixel-8-x" in path.name for path in paths) and len(phone.told) == 2
    assert all(read_json(path) == RESULT for path in paths)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("device", "name", 3),
        ("device", "name", "x" * 3000),
        ("runtime", "isolated", 1),
        ("load", "seconds", []),
        ("load", "seconds", [-1.0]),
        ("load", "seconds", ["1"]),
        ("prompt", "tokens", True),
        ("prompt", "tokens", None),
        ("checks", "tokens", None),
        ("rows", "agree", None),
        ("rows", "n", "5"),
        ("rows", "n", 2.5),
        pytest.param("rows", "n", 10**400, id="more-than-a-float"),
        ("rows", "agree", 1),
        ("checks", "exact", 6),
        ("checks", "prompts_as_stored", 6),
        ("checks", "same_tokens", 10),
        ("load", "seconds", [None]),
        ("load", "seconds", [1e10]),
        ("device", "name", "a\x1b[31mred"),
        ("device", "name", "a\u202etxt.exe"),
        ("device", "browser", "a\ud800"),
        ("device", "user_agent", "a\nb"),
    ],
)
def test_other_values_are_refused(section: str, key: str, value: Any, phone: SimpleNamespace) -> None:
    content = copy.deepcopy(RESULT)
    content[section][key] = value
    answer = phone.client.post("/token/result", content=json.dumps(content))
    assert answer.status_code == 400 and f"{section}.{key}" in answer.text
    assert not phone.devices.exists()


def test_what_a_browser_may_keep_to_itself(phone: SimpleNamespace) -> None:
    content = copy.deepcopy(RESULT)
    content["device"] |= {"name": "小米 手机 👩‍🔬", "cores": None, "memory_gb": 0.25}
    assert phone.client.post("/token/result", json=content).status_code == 201


def test_results_that_arrive_together_are_all_kept(tmp_path: Path) -> None:
    """The same device in the same second, from sixteen threads."""
    together = threading.Barrier(16)

    def save(number: int) -> Path:
        together.wait()
        return save_result(tmp_path, {**RESULT, "run": f"r{number}"})

    with ThreadPoolExecutor(16) as threads:
        paths = list(threads.map(save, range(16)))
    assert len(set(paths)) == 16 and sorted(paths) == sorted(tmp_path.iterdir())
    assert {read_json(path)["run"] for path in paths} == {f"r{number}" for number in range(16)}


def test_a_result_that_cannot_be_saved_is_no_silent_loss(phone: SimpleNamespace) -> None:
    phone.devices.write_text("a file where the folder should be", encoding="utf-8")
    assert phone.client.post("/token/result", json=RESULT).status_code == 500
    (line,) = phone.told
    assert "could not be saved" in line and str(phone.devices) in line


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"format": 1, "rows": ' + b"9" * 5000 + b"}", b"\xff", json.dumps(RESULT)[:-1].encode()],
)
def test_a_damaged_file_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "phone.json").write_bytes(content)
    with pytest.raises(InputError, match=r"phone\.json is damaged"):
        read_result(tmp_path / "phone.json")


def test_bodies_that_are_no_result(phone: SimpleNamespace) -> None:
    post = phone.client.post
    assert post("/token/result", content=b"x" * (MOST_BYTES + 1)).status_code == 413
    assert post("/token/result", content=b"[" * 100_000).status_code == 400
    assert post("/token/result", content=b'{"format": NaN}').status_code == 400
    assert post("/other/result", json=RESULT).status_code == 404
    assert post("/token/web/", json=RESULT).status_code == 404
    assert not phone.devices.exists()
    with pytest.raises(InputError, match="sha256"):
        check_result({**RESULT, "sha256": "A" * 64})


def test_the_disk_is_not_filled(phone: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.stages.compare.speed.MOST_FILES", 1)
    assert [phone.client.post("/token/result", json=RESULT).status_code for _ in range(2)] == [201, 400]


def test_https(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "a.json").write_text("{}", encoding="utf-8")
    options = ServeOptions(port=0, cert=tmp_path / "cert.pem", key=tmp_path / "key.pem")
    told: list[str] = []
    with served(tmp_path, tmp_path / "devices", told.append, **encryption_of(options)) as port:
        address = f"https://127.0.0.1:{port}/token/a.json"
        with pytest.raises(httpx.ConnectError):
            httpx.get(address)  # a certificate that nobody vouches for; the server says nothing and goes on
        assert httpx.get(address, verify=ssl.create_default_context(cafile=tmp_path / "cert.pem")).json() == {}
    assert told == []


def test_the_address_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    announce("http://10.0.0.2:8080/t/web/", ServeOptions("0.0.0.0"), told.append)
    assert told[0].startswith("Warning: 0.0.0.0 is not this machine alone") and "one thread" in told[1]
    assert "█" in told[2] and "same network" in told[3]
    assert told[-1].startswith("The phone page is served at http://10.0.0.2:8080/t/web/")
    assert _reachable("0.0.0.0") != "0.0.0.0" and _reachable("::1") == "[::1]"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_a_page_for_this_machine_alone_says_what_lets_a_phone_in(host: str) -> None:
    """A code that leads a phone to itself would help nobody."""
    told: list[str] = []
    announce("http://127.0.0.1:8123/t/web/", ServeOptions(host), told.append)
    assert "--host 0.0.0.0" in told[0] and "adb reverse tcp:8123 tcp:8123" in told[0]
    assert len(told) == 2 and "█" not in "".join(told) and "served at http://127.0.0.1:8123/t/web/" in told[1]


PAGE_IN_WORDS = (
    '<html lang="en"><title data-t>Packaged model</title><p data-t>Not told</p><p>Packaged model</p>'
    '<script type="module" src="app.js"></script>'
)


@pytest.mark.parametrize(
    ("accepted", "tag"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh-CN"),
        ("zh", "zh-CN"),
        ("de-DE,de;q=0.9,zh-TW;q=0.5", "zh-CN"),
        ("en-US,en;q=0.9,zh;q=0.8", "en"),
        ("en;q=0.5, zh;q=0.7", "zh-CN"),
        ("de", "en"),
        ("*", "en"),
        ("", "en"),
        ("zh;q=x,;;,q=", "en"),
        ("zh;q=0", "en"),
    ],
)
def test_the_page_speaks_the_language_of_the_browser(accepted: str, tag: str, phone: SimpleNamespace) -> None:
    web = phone.devices.parent / "package" / "web"
    (web / "index.html").write_text(PAGE_IN_WORDS, encoding="utf-8")
    (web / "words.json").write_text('{"zh": {"Packaged model": "打包的模型 <b>"}}', encoding="utf-8")
    answer = phone.client.get("/token/web/", headers={"Accept-Language": accepted})
    assert answer.headers["content-language"] == tag and "Accept-Language" in answer.headers["vary"]
    told = PAGE_IN_WORDS.replace("data-t>Packaged model", "data-t>打包的模型 &lt;b&gt;").replace(
        'lang="en"', 'lang="zh-CN"'
    )
    assert answer.text == (told if tag == "zh-CN" else PAGE_IN_WORDS)
    head = phone.client.head("/token/web/", headers={"Accept-Language": accepted})
    assert head.content == b"" and int(head.headers["content-length"]) == len(answer.content)


@pytest.mark.parametrize("words", ["", "[", '{"zh": []}', '{"zh": {"Packaged model": 3}}'])
def test_a_page_with_damaged_words_is_served(words: str, phone: SimpleNamespace) -> None:
    web = phone.devices.parent / "package" / "web"
    (web / "index.html").write_text(PAGE_IN_WORDS, encoding="utf-8")
    (web / "words.json").write_text(words, encoding="utf-8")
    assert phone.client.get("/token/web/", headers={"Accept-Language": "zh"}).status_code == 200


def test_what_cannot_be_served(tmp_path: Path, phone: SimpleNamespace) -> None:
    with pytest.raises(InputError, match="workbook package RUN --web"):
        serve_phone(tmp_path, tmp_path, ServeOptions(), print)
    taken = phone.client.base_url.port
    with pytest.raises(InputError, match="cannot be used"):
        listen("127.0.0.1", taken)
    (tmp_path / "cert.pem").write_text("no certificate", encoding="utf-8")
    with pytest.raises(InputError, match=r"cert\.pem cannot be used"):
        encryption_of(ServeOptions(port=0, cert=tmp_path / "cert.pem"))


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_serves_until_a_signal(sent: signal.Signals, code: int, tmp_path: Path) -> None:
    (tmp_path / "p" / "web").mkdir(parents=True)
    (tmp_path / "p" / "web" / "index.html").write_text("<p>page", encoding="utf-8")
    (tmp_path / "p" / "model_info.json").write_text("{}", encoding="utf-8")
    command = [sys.executable, "-m", "lib.cli", "serve", str(tmp_path / "p"), "--phone", "--port", "0"]
    process = subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True)
    address = next(found[1] for line in process.stderr if (found := re.search(r"served at (http://\S+)", line)))
    assert httpx.get(address).text == "<p>page"
    process.send_signal(sent)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code and "Traceback" not in said and "Interrupted" in said
