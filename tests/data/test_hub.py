"""Every way in which the hub can fail becomes a sentence; no network is used."""

from __future__ import annotations

import datasets
import httpx
import pytest
from huggingface_hub import errors

from lib.data.reading import read_table
from lib.errors import InputError


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "http://hub.invalid/x"))


FAILURES = {
    "offline": (errors.OfflineModeIsEnabled("offline"), "HF_ENDPOINT"),
    "no network": (ConnectionError("Couldn't reach 'a/b' on the Hub"), "HF_ENDPOINT"),
    "time-out": (httpx.ConnectTimeout("slow"), "HF_ENDPOINT"),
    "not found": (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"), "HF_TOKEN"),
    "gated": (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."), "HF_TOKEN"),
    "script": (RuntimeError("Dataset scripts are no longer supported, but found b.py"), "never run"),
    "configurations": (ValueError("Config name is missing. Please pick one"), "several configurations"),
    "revision": (errors.RevisionNotFoundError("404", response=response(404)), "no revision 'v9'"),
    "server": (errors.HfHubHTTPError("502 Bad Gateway", response=response(502)), "the hub refused"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_sentences(home, monkeypatch: pytest.MonkeyPatch, name: str):
    error, words = FAILURES[name]

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=words):
        read_table("someone/reviews", "v9")


def test_a_cause_further_down_is_found(home, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise ValueError("could not prepare") from httpx.ConnectError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match="cannot be reached"):
        read_table("someone/reviews")


def test_an_unknown_failure_is_not_hidden(home, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ZeroDivisionError):
        read_table("someone/reviews")


def test_splits_get_the_workbooks_names(home, monkeypatch: pytest.MonkeyPatch):
    table = datasets.Dataset.from_list([{"text": "好", "label": 1}])
    asked = {}

    def load(name: str, **options: object) -> datasets.DatasetDict:
        asked.update(options, name=name)
        return datasets.DatasetDict({"test": table, "dev": table, "train": table, "extra": table})

    monkeypatch.setattr(datasets, "load_dataset", load)
    result = read_table("someone/reviews", "abc123")
    assert list(result.splits) == ["train", "validation", "test"]
    assert asked == {"name": "someone/reviews", "revision": "abc123"}
    assert result.source == "hub data set someone/reviews, revision abc123"
