"""Downloads against a hub on loopback: every fault ends in a resumed file, a retry, or a sentence with the cure."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path

import httpx
import pytest

from lib.errors import InputError
from lib.hub import fetching, transport
from lib.hub.fetching import HubRepository, fetch, fetch_text
from lib.hub.sources import SourceError, parse
from lib.progress import PROGRESS_FILE_VARIABLE
from tests.support.hub_fixture import hub  # noqa: F401
from tests.support.hub_server import Hub

WEIGHTS = bytes(hashlib.sha256(str(i).encode()).digest()[0] for i in range(40_000))
FILES = {
    "config.json": b'{"model_type": "qwen2"}',
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b"{}",
    "README.md": "说明".encode(),
    "modeling_evil.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "onnx/model.safetensors": b"not wanted",
}
WANTED = {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
PLACES = pytest.mark.parametrize("name", ["org/model", "modelscope:org/model"])


@pytest.fixture
def repository(hub: Hub) -> Hub:  # noqa: F811
    hub.add("models", "org/model", FILES)
    return hub


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@PLACES
def test_whole_download_then_cache(repository: Hub, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fetch(name, "main", "model")
    assert names(found.path) == WANTED
    assert all((found.path / file).read_bytes() == FILES[file] for file in WANTED)
    assert found.revision.startswith("sha256:") or found.revision == repository.commit("models", "org/model")
    repository.requests.clear()
    assert fetch(name, "main", "model") == found and repository.requests == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    repository.close()
    assert fetch(name, "main", "model") == found
    assert fetch_text(name, "main", "model", "config.json").encode() == FILES["config.json"]
    repository.__init__()  # the fixture closes it once more


def test_a_pinned_commit_is_taken_as_it_is(repository: Hub) -> None:
    commit = repository.commit("models", "org/model")
    assert fetch("org/model", commit, "model") == fetch(f"org/model@{commit}", "v9", "model")
    assert all(f"/revision/{commit}" in path for _, path, _ in repository.requests if "/revision/" in path)


def test_the_hub_client_finds_what_the_workbook_fetched(repository: Hub) -> None:
    from huggingface_hub import snapshot_download

    found = fetch("org/model", "main", "model")
    cache = Path(os.environ["HF_HOME"]) / "hub"
    again = snapshot_download("org/model", cache_dir=cache, local_files_only=True, allow_patterns=["*.json", "m*.s*"])
    assert Path(again) == found.path


def test_the_workbook_finds_what_the_hub_client_fetched(repository: Hub) -> None:
    from huggingface_hub import snapshot_download

    cache = Path(os.environ["HF_HOME"]) / "hub"
    path = snapshot_download("org/model", cache_dir=cache, endpoint=repository.url)
    repository.requests.clear()
    assert fetch("org/model", "main", "model").path == Path(path) and repository.requests == []


@PLACES
def test_slow_and_redirected(repository: Hub, name: str) -> None:
    repository.faults.pause, repository.faults.redirect = 0.02, True
    assert (fetch(name, "main", "model").path / "model.safetensors").read_bytes() == WEIGHTS


@PLACES
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_refusal_is_tried_again(repository: Hub, name: str, status: int) -> None:
    repository.faults.statuses = {"model.safetensors": [status, status], "/api/": [status]}
    assert (fetch(name, "main", "model").path / "model.safetensors").read_bytes() == WEIGHTS
    assert len(repository.fetched("model.safetensors")) == 3


def test_retry_after_is_obeyed(repository: Hub) -> None:
    repository.faults.statuses, repository.faults.retry_after = {"model.safetensors": [429]}, "1"
    began = time.monotonic()
    fetch("org/model", "main", "model")
    assert time.monotonic() - began >= 1.0


def test_a_server_that_asks_for_an_hour_is_not_waited_for(repository: Hub) -> None:
    repository.faults.statuses, repository.faults.retry_after = {"model.safetensors": [429]}, "3600"
    with pytest.raises(SourceError, match=r"asks to wait 3600 s.*HF_ENDPOINT to a mirror"):
        fetch("org/model", "main", "model")


@PLACES
def test_a_connection_cut_at_30_percent_is_continued(repository: Hub, name: str) -> None:
    repository.faults.cut["model.safetensors"] = 7  # more often than the tries of one request: each brings bytes
    assert (fetch(name, "main", "model").path / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [headers.get("Range") for headers in repository.fetched("model.safetensors")]
    assert ranges[:3] == [None, "bytes=12000-", "bytes=20400-"]


@PLACES
def test_an_interrupted_download_continues_in_the_next_run(
    repository: Hub, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(transport, "ATTEMPTS", 1)  # the process "dies" at the first cut
        repository.faults.cut["model.safetensors"] = 1
        with pytest.raises(SourceError, match="cannot be reached"):
            fetch(name, "main", "model")
    assert not any(names(folder) >= WANTED for folder in Path(os.environ["HF_HOME"]).rglob("snapshots/*"))
    repository.requests.clear()
    assert (fetch(name, "main", "model").path / "model.safetensors").read_bytes() == WEIGHTS
    assert [h["Range"] for h in repository.fetched("model.safetensors")] == ["bytes=12000-"]


SHARDS = {f"model-{i}-of-6.safetensors": WEIGHTS[i * 5000 :] for i in range(6)}


@PLACES
def test_shards_come_several_at_a_time(
    hub: Hub,  # noqa: F811
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(PROGRESS_FILE_VARIABLE, str(tmp_path / "progress"))
    hub.add(
        "models", "org/model", {**SHARDS, "copy/model-0-of-6.safetensors": WEIGHTS, "config.json": FILES["config.json"]}
    )
    hub.faults.pause = 0.1  # before each quarter of a file
    began = time.monotonic()
    found = fetch(name, "main", "model").path
    assert time.monotonic() - began < 0.4 * 6  # one after the other they would take more
    assert all((found / file).read_bytes() == content for file, content in SHARDS.items())
    assert transport.TOGETHER == 4
    whole = sum(map(len, SHARDS.values())) + len(FILES["config.json"])
    assert f"{whole} done" in (tmp_path / "progress").read_text()


@PLACES
def test_shards_that_were_cut_off_together_all_go_on(hub: Hub, name: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    hub.add("models", "org/model", {**SHARDS, "config.json": FILES["config.json"]})
    with monkeypatch.context() as patch:
        patch.setattr(transport, "ATTEMPTS", 1)
        hub.faults.cut.update(dict.fromkeys(SHARDS, 1))
        with pytest.raises(SourceError, match="cannot be reached"):
            fetch(name, "main", "model")
    left = {path.name: path.stat().st_size for path in Path(os.environ["HF_HOME"]).parent.rglob("*.incomplete")}
    assert left
    hub.faults.cut.clear()
    hub.requests.clear()
    found = fetch(name, "main", "model").path
    assert all((found / file).read_bytes() == content for file, content in SHARDS.items())
    ranges = [headers["Range"] for headers in hub.fetched("model-") if "Range" in headers]
    assert sorted(ranges) == sorted(
        f"bytes={size}-" for size in left.values() if size > 1000
    )  # the last is config.json


def test_the_first_lasting_refusal_ends_the_other_files(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(transport, "FIRST_WAIT", 30.0)
    hub.add("models", "org/model", {**SHARDS, "config.json": FILES["config.json"]})
    hub.faults.statuses = {"model-2": [403] * 9, "model-1": [503] * 9}  # one waits for its next try meanwhile
    began = time.monotonic()
    with pytest.raises(SourceError):
        fetch("modelscope:org/model", "main", "model")
    assert time.monotonic() - began < 10


@PLACES
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_wrong_bytes_are_fetched_once_more(repository: Hub, name: str, file: str) -> None:
    repository.faults.corrupt[file] = 1
    assert (fetch(name, "main", "model").path / file).read_bytes() == FILES[file]
    assert len(repository.fetched(file)) == 2


@PLACES
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_wrong_bytes_twice_are_refused(repository: Hub, name: str, file: str) -> None:
    repository.faults.corrupt[file] = 99
    with pytest.raises(SourceError, match=rf"{file} has (SHA-256|git hash) .* instead of .*, twice"):
        fetch(name, "main", "model")
    assert not list(Path(os.environ["HF_HOME"]).rglob("snapshots/*"))


def test_a_remainder_that_is_too_long_is_thrown_away(repository: Hub) -> None:
    blob = HubRepository(parse("org/model", "main", "model")).folder / "blobs" / hashlib.sha256(WEIGHTS).hexdigest()
    blob.parent.mkdir(parents=True)
    blob.with_name(f"{blob.name}.incomplete").write_bytes(b"x" * 50_000)
    assert (fetch("org/model", "main", "model").path / "model.safetensors").read_bytes() == WEIGHTS


SENTENCES = {
    "gated": ({"gated": True}, "is gated.*HF_TOKEN"),
    "private": ({"private": True}, "is not there, or private.*HF_TOKEN"),
    "down": ({"statuses": {"/api/": [500] * 99}}, "answered 500.*HF_ENDPOINT to a mirror.*local folder"),
    "forbidden": ({"statuses": {"/api/": [403] * 9}}, r"access refused \(403\).*HF_TOKEN"),
    "login page": ({"page": True}, "answered with a page.*HF_ENDPOINT"),
    "file missing": ({"statuses": {"/resolve/": [404]}}, "is not there"),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_lasting_refusals_are_sentences(repository: Hub, name: str) -> None:
    faults, words = SENTENCES[name]
    for key, value in faults.items():
        setattr(repository.faults, key, value)
    with pytest.raises(SourceError, match=words):
        fetch("org/model", "main", "model")


@pytest.mark.parametrize(
    ("source", "revision", "words"),
    [
        ("org/other", "main", "is not there, or private"),
        ("org/model", "v9", "no such revision"),
        ("modelscope:org/other", "main", "MODELSCOPE_API_TOKEN"),
        ("modelscope:org/model", "v9", "MODELSCOPE_API_TOKEN"),
    ],
)
def test_not_found(repository: Hub, source: str, revision: str, words: str) -> None:
    with pytest.raises(SourceError, match=words):
        fetch(source, revision, "model")


@PLACES
def test_nobody_answers(repository: Hub, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "http://127.0.0.1:9")
    with pytest.raises(SourceError, match=r"cannot be reached \(127.0.0.1:9: ConnectError\).*fallbacks"):
        fetch(name, "main", "model")


@PLACES
@pytest.mark.parametrize("address", ["ftp://mirror", "http://[bad", "http://a b/", "nonsense"])
def test_an_address_that_is_none(repository: Hub, name: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("MODELSCOPE_DOMAIN", address if "://" in address else f"x://{address}")
    with pytest.raises(SourceError, match="cannot be reached"):
        fetch(name, "main", "model")


@PLACES
@pytest.mark.parametrize("content", [None, "no certificate"])
def test_certificates_that_are_none(
    repository: Hub, name: str, content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content:
        (tmp_path / "ca.pem").write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with pytest.raises(
        SourceError, match=r"SSL_CERT_FILE or SSL_CERT_DIR names no certificates.*Do this: set SSL_CERT"
    ):
        fetch(name, "main", "model")


def test_a_certificate_that_is_not_trusted_is_the_cause() -> None:
    error = httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed (_ssl.c:1006)")

    def ask() -> None:
        raise error

    with pytest.raises(transport.UnreachableError, match="its certificate is not trusted here") as found:
        transport.patiently(ask)
    assert "SSL_CERT_FILE" in found.value.do


@PLACES
@pytest.mark.parametrize("token", ["“hf_abc”", "hf_a\tb", "hf a"])
def test_a_token_that_no_header_holds(repository: Hub, name: str, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = "MODELSCOPE_API_TOKEN" if ":" in name else "HF_TOKEN"
    monkeypatch.setenv(variable, token)
    with pytest.raises(SourceError, match=f"{variable} holds characters that no token has.*set {variable}") as refused:
        fetch(name, "main", "model")
    assert "abc" not in str(refused.value)


def test_a_line_end_of_a_token_is_none_of_its_characters(repository: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", " abc\n")
    fetch("modelscope:org/model", "main", "model")
    assert all(headers.get("Authorization") == "Bearer abc" for *_, headers in repository.requests)


def test_a_redirect_loop_ends(repository: Hub) -> None:
    repository.faults.circle = True
    with pytest.raises(SourceError, match="redirects in a circle"):
        fetch("org/model", "main", "model")


@PLACES
def test_offline_without_cache(repository: Hub, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceError, match=r"not in the cache.*unset HF_HUB_OFFLINE"):
        fetch(name, "main", "model")
    assert repository.requests == []


@PLACES
def test_a_damaged_cache_is_completed(repository: Hub, name: str) -> None:
    path = fetch(name, "main", "model").path / "tokenizer.json"
    path.resolve().unlink()
    assert (fetch(name, "main", "model").path / "tokenizer.json").read_bytes() == b"{}"
    assert len(repository.fetched("tokenizer.json")) == 2


def test_bytes_that_the_hub_client_did_not_check_are_checked(repository: Hub) -> None:
    from huggingface_hub import snapshot_download

    cache = Path(os.environ["HF_HOME"]) / "hub"
    path = Path(snapshot_download("org/model", cache_dir=cache, endpoint=repository.url)) / "model.safetensors"
    path.resolve().write_bytes(WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1]))  # same size
    repository.requests.clear()
    assert (fetch("org/model", "main", "model").path / "model.safetensors").read_bytes() == WEIGHTS
    assert len(repository.fetched("")) == 1, "the damaged file alone is fetched again"


@PLACES
def test_a_full_disk_is_seen_before_the_download(repository: Hub, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=60 << 20))
    with pytest.raises(InputError, match=r"63 MB free on the disk of .* 0 MB for .* 67 MB to spare") as caught:
        fetch(name, "main", "model")
    assert not isinstance(caught.value, SourceError), "a full disk is no reason for another source"
    assert repository.fetched("") == []


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, r"only pickled weights \(pytorch_model.bin\)"),
        ({"model-q4.gguf": b"GGUF"}, "only GGUF"),
        ({"README.md": b"soon"}, "no weights"),
    ],
)
def test_repositories_without_safetensors(hub: Hub, files: dict[str, bytes], words: str) -> None:  # noqa: F811
    hub.add("models", "org/model", files)
    for name in ("org/model", "modelscope:org/model"):
        with pytest.raises(SourceError, match=words):
            fetch(name, "main", "model")
    assert hub.fetched("") == []


@pytest.mark.parametrize(
    "text",
    [
        *("", "a b", "../up", "modelscope:", "modelscope:name", "a/..", "-x/y", "a/b--c", "a/b."),
        *("org/m.git", "modelscope:org/m.git", "a--b/c", "org/two--words", "org/m-", "org./m", "org/" + "m" * 97),
    ],
)
def test_what_is_no_id(text: str) -> None:
    with pytest.raises(InputError, match="not an id"):
        parse(text, "main", "model")


def test_what_is_an_id() -> None:
    for text in ("a/b@", "gpt2", "a/b.github", "0x/a-b_c.d", "modelscope:a/b"):
        assert parse(text, "main", "model").revision in ("main", "master")


@PLACES
def test_further_templates_are_fetched(hub: Hub, name: str) -> None:  # noqa: F811
    more = {f"additional_chat_templates/{file}": b"{{ 1 }}" for file in ("tool_use.jinja", "a.py", "rag.jinja")}
    hub.add("models", "org/model", {**FILES, **more})
    found = fetch(name, "main", "model")
    assert names(found.path / "additional_chat_templates") == {"tool_use.jinja", "rag.jinja"}
    hub.requests.clear()
    assert fetch(name, "main", "model") == found and hub.requests == []


@pytest.mark.parametrize("kind", ["model", "adapter", "dataset"])
def test_what_another_program_left_in_the_cache_is_completed(
    hub: Hub,  # noqa: F811
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    files = {
        "model": {
            "config.json": b"{}",
            "model.safetensors": WEIGHTS,
            "chat_template.jinja": b"a",
            "tokenizer.json": b"{}",
        },
        "adapter": {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS, "tokenizer.json": b"{}"},
        "dataset": {"train.csv": b"text,label", "test.csv": b"text,label"},
    }[kind]
    remote = parse("org/it", "main", kind)
    hub.add(f"{remote.repository_type}s", "org/it", files)
    place, commit = HubRepository(remote).folder, hub.commit(f"{remote.repository_type}s", "org/it")
    snapshot = place / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    for name in list(files)[:2] if kind != "dataset" else ["train.csv"]:
        (snapshot / name).write_bytes(files[name])
    if kind == "model":
        (snapshot / "tokenizer.json").write_bytes(b"{")  # cut
    with monkeypatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        assert fetch("org/it", "main", kind).path == snapshot
        assert "whether it is whole was not checked (cannot be reached: HF_HUB_OFF" in capsys.readouterr().err
    found = fetch("org/it", "main", kind)
    assert found.path == snapshot and {name: (snapshot / name).read_bytes() for name in files} == files
    assert any(f"/revision/{commit}" in path for _, path, _ in hub.requests)  # no newer one of the branch


def test_a_listing_that_leaves_the_cache_is_refused(repository: Hub) -> None:
    hub_files = {**FILES, "../../evil.json": b"{}"}
    repository.add("models", "org/model", hub_files)
    with pytest.raises(SourceError, match="its listing is not a hub's"):
        fetch("org/model", "main", "model")


@pytest.mark.parametrize("fault", ["unreachable", "gone", "wrong bytes"])
def test_behind_the_mirror_stands_the_hub(
    repository: Hub, fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mirror = Hub()
    mirror.add("models", "org/model", FILES)
    if fault == "gone":
        mirror.repositories.clear()
    mirror.faults.corrupt["model.safetensors"] = 99
    monkeypatch.setattr(fetching, "HUB", repository.url)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9" if fault == "unreachable" else mirror.url)
    monkeypatch.setenv("HF_TOKEN", "secret-of-the-mirror")
    assert (fetch("org/model", "main", "model").path / "model.safetensors").read_bytes() == WEIGHTS
    assert not any("Authorization" in headers for *_, headers in repository.requests)
    mirror.close()


def test_the_token_stays_with_the_hub(repository: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch("org/model", "main", "model")
    assert all(headers.get("Authorization") == "Bearer hf_secret" for *_, headers in repository.requests)
