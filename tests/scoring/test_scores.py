"""Scores of rows: order, saving, ties, truncation, broken models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lib.errors import InputError
from lib.scoring.llama_backend import LlamaCppBackend
from lib.scoring.log_probabilities import Scores, score_rows
from lib.scoring.torch_backend import TransformersBackend
from tests.scoring import tiny


class Fixed:
    """A backend that answers from a table, by the prompt's length."""

    name, device, vocab_size, settings, peak_memory_mib = "fixed", "nowhere", 512, {}, 0.0

    def __init__(self, values):
        self.values = np.array(values)

    def label_log_probs(self, prompts, answers, work=None):
        return self.values

    def window_log_probs(self, ids, first=0):
        raise AssertionError

    def close(self):
        pass


def test_both_backends_agree_and_rows_keep_their_order(small):
    rows = tiny.rows(30)
    theirs = score_rows(TransformersBackend(small.model, 8), small.tokenizer, small.task, rows, "scoring")
    with LlamaCppBackend(small.gguf, cache_type="f32", flash_attention=False, n_threads=1) as backend:
        ours = score_rows(backend, small.tokenizer, small.task, rows, "scoring")
    np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=1e-4)
    assert ours.ids == [row["id"] for row in rows]
    mixed = rows[::-1]
    again = score_rows(TransformersBackend(small.model, 8), small.tokenizer, small.task, mixed, "scoring")
    np.testing.assert_array_equal(again.log_probs[::-1], theirs.log_probs)
    assert 0 < theirs.seconds_per_sample < 1
    assert theirs.truncated.sum() == 0


def test_numbers_of_scores():
    scores = Scores(
        ids=["a", "b", "c"],
        labels=np.array([0, 1, 1]),
        log_probs=np.log([[0.3, 0.1], [0.2, 0.21], [0.5, 0.25]]),
        truncated=np.array([False, True, False]),
        seconds=1.5,
    )
    assert scores.predictions.tolist() == [0, 1, 0]
    assert scores.correct.tolist() == [True, True, False]
    assert scores.correct.mean() == pytest.approx(2 / 3)
    assert scores.margins == pytest.approx(np.log([1 / 3, 1.05, 0.5]))
    assert scores.near_ties == 1
    assert scores.probabilities[0] == pytest.approx([0.75, 0.25])
    assert scores.seconds_per_sample == 0.5
    three = replace(scores, log_probs=np.log([[0.5, 0.1, 0.2]] * 3))
    assert three.margins == pytest.approx(np.log([2.5] * 3))


def test_save_and_load(tmp_path, small):
    scores = score_rows(TransformersBackend(small.model), small.tokenizer, small.task, tiny.rows(4), "scoring")
    scores.save(tmp_path / "scores.jsonl")
    loaded = Scores.load(tmp_path / "scores.jsonl")
    np.testing.assert_array_equal(loaded.log_probs, scores.log_probs)
    assert loaded.ids == scores.ids and loaded.labels.tolist() == scores.labels.tolist()
    assert loaded.seconds == pytest.approx(scores.seconds)


def test_long_texts_are_cut_and_counted(small):
    rows = tiny.rows(3)
    rows[1]["text"] *= 200
    scores = score_rows(TransformersBackend(small.model), small.tokenizer, small.task, rows, "scoring")
    assert scores.truncated.tolist() == [False, True, False]


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_numbers_that_are_none_are_an_error(small, bad):
    with pytest.raises(InputError, match=r"fixed gives .* for row test-00001 \(1 of 2 rows"):
        score_rows(Fixed([[0.0, 0.0], [bad, 0.0]]), small.tokenizer, small.task, tiny.rows(2), "scoring")


def test_no_rows(small):
    with pytest.raises(InputError, match="no rows"):
        score_rows(Fixed([]), small.tokenizer, small.task, [], "scoring")
