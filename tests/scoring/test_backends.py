"""Both backends against brute force and against one another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lib.errors import InputError
from lib.progress import Progress
from lib.scoring.backend import Work, make_jobs
from lib.scoring.llama_backend import LlamaCppBackend
from lib.scoring.torch_backend import TransformersBackend
from tests.scoring import tiny

EXACT = {"cache_type": "f32", "flash_attention": False, "n_threads": 1}
ANSWERS = {"single": [[300], [301]], "several": [[300], [301, 17, 40], [301, 17, 41], [301, 9]]}


def prompts_of(small, n: int = 21) -> list[list[int]]:
    return [small.task.encode(small.tokenizer, {"text": row["text"]}).prompt_ids for row in tiny.rows(n)]


def brute_force(model, prompts, answers) -> np.ndarray:
    """One forward pass a prompt and answer, float64 log-softmax: the definition."""
    result = np.empty((len(prompts), len(answers)))
    for i, prompt in enumerate(prompts):
        for j, answer in enumerate(answers):
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
            log_p = torch.log_softmax(logits, dim=-1)
            result[i, j] = sum(log_p[len(prompt) - 1 + k, token].item() for k, token in enumerate(answer))
    return result


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS.keys())
@pytest.mark.parametrize("batch_size", [1, 8])
def test_transformers_equals_brute_force(small, answers, batch_size):
    prompts = prompts_of(small)
    found = TransformersBackend(small.model, batch_size).label_log_probs(prompts, answers)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, brute_force(small.model, prompts, answers), atol=2e-5)


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS.keys())
def test_llama_cpp_equals_brute_force(small, answers):
    prompts = prompts_of(small)
    with LlamaCppBackend(small.gguf, **EXACT) as backend:
        assert backend.vocab_size == 512
        found = backend.label_log_probs(prompts, answers)
    np.testing.assert_allclose(found, brute_force(small.model, prompts, answers), atol=1e-4)


def test_padding_mistake_is_caught(small, monkeypatch):
    """The parity test has teeth: left padding without a mask moves the numbers by far more than rounding does."""

    def left(sequences):
        longest = max(map(len, sequences))
        return torch.tensor([[0] * (longest - len(ids)) + ids for ids in sequences])

    prompts = prompts_of(small)
    right = TransformersBackend(small.model, 1).label_log_probs(prompts, ANSWERS["single"])
    monkeypatch.setattr(TransformersBackend, "_pad", staticmethod(left))
    wrong = TransformersBackend(small.model, 8).label_log_probs(prompts, ANSWERS["single"])
    assert np.abs(wrong - right).max() > 0.1


def test_labels_share_forward_passes():
    jobs = make_jobs([[1, 2, 3], [1, 2]], ANSWERS["several"])
    assert [(job.prompt, job.ids) for job in jobs] == [(1, [1, 2, 301, 17]), (0, [1, 2, 3, 301, 17])]
    assert len(make_jobs([[1, 2, 3]], ANSWERS["single"])) == 1


def test_more_prompts_than_sequences_and_no_common_beginning(small):
    prompts = [[i, *range(i, i + 3 * i % 40)] for i in range(1, 60)]
    with LlamaCppBackend(small.gguf, **EXACT) as backend:
        found = backend.label_log_probs(prompts, ANSWERS["single"])
        again = backend.label_log_probs(prompts, ANSWERS["single"])
    np.testing.assert_array_equal(found, again)
    np.testing.assert_allclose(found, brute_force(small.model, prompts, ANSWERS["single"]), atol=1e-4)


def test_prompts_as_long_as_the_context_and_longer(small):
    rng = np.random.default_rng(0)
    fits = [rng.integers(0, 512, 300).tolist() for _ in range(9)]  # 2700 tokens: more than one batch holds
    with LlamaCppBackend(small.gguf, n_ctx=300, **EXACT) as backend:
        found = backend.label_log_probs(fits, ANSWERS["single"])
        with pytest.raises(InputError, match=r"301 tokens for tiny-F32\.gguf, opened with a context of 300"):
            backend.label_log_probs([[1] * 301], ANSWERS["single"])
        with pytest.raises(InputError, match="context of 300"):
            backend.window_log_probs([1] * 301)
    np.testing.assert_allclose(found, brute_force(small.model, fits, ANSWERS["single"]), atol=1e-4)


@pytest.mark.parametrize("prompt, problem", [([1, 512], "token id 512"), ([-1], "token id -1"), ([], "without tokens")])
def test_bad_ids_never_reach_the_model(small, prompt, problem):
    with LlamaCppBackend(small.gguf, **EXACT) as backend:
        for which in (backend, TransformersBackend(small.model)):
            with pytest.raises(InputError, match=problem):
                which.label_log_probs([prompt], ANSWERS["single"])
            with pytest.raises(InputError, match=problem):
                which.window_log_probs(prompt)
    with pytest.raises(InputError, match="token id 700"):
        TransformersBackend(small.model).label_log_probs([[1]], [[700]])


@pytest.mark.parametrize("first", [0, 130])
def test_window_log_probs(small, first):
    ids = np.random.default_rng(1).integers(0, 512, 400).tolist()
    with torch.inference_mode():
        expected = torch.log_softmax(small.model(input_ids=torch.tensor([ids])).logits[0].double(), -1)[first:].numpy()
    with LlamaCppBackend(small.gguf, **EXACT) as backend:
        for which in (backend, TransformersBackend(small.model)):
            found = which.window_log_probs(ids, first)
            assert found.shape == (400 - first, 512) and found.dtype == np.float32
            np.testing.assert_allclose(found, expected, atol=1e-4)


def test_usual_llama_cpp_settings_stay_close(small):
    prompts = prompts_of(small)
    with LlamaCppBackend(small.gguf) as backend:
        found = backend.label_log_probs(prompts, ANSWERS["single"])
    assert np.abs(found - brute_force(small.model, prompts, ANSWERS["single"])).max() < 0.1


def test_adapted_model(small):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny.make_model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    prompts = prompts_of(small, 5)
    found = TransformersBackend(model.eval(), 4).label_log_probs(prompts, ANSWERS["several"])
    np.testing.assert_allclose(found, brute_force(model, prompts, ANSWERS["several"]), atol=2e-5)
    assert np.abs(found - brute_force(small.model, prompts, ANSWERS["several"])).max() > 0.1


def test_logits_changed_behind_the_head_are_the_models_own():
    model = tiny.make_model()
    forward = model.forward

    def capped(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = torch.tanh(output.logits)
        return output

    model.forward = capped
    ids = [3, 9, 4, 1, 7]
    own = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1).detach().numpy()
    assert np.abs(TransformersBackend(model).window_log_probs(ids) - own).max() < 1e-5


def test_progress_counts_prompts(small, capsys):
    prompts = prompts_of(small, 10)
    with LlamaCppBackend(small.gguf, **EXACT) as backend:
        for which in (backend, TransformersBackend(small.model, 3)):
            progress = Progress("scoring", 10)
            which.label_log_probs(prompts, ANSWERS["several"], Work(progress))
            assert progress.done == 10


FILES = {
    "missing": (None, "no file"),
    "empty": (b"", "is empty"),
    "zeros": (bytes(600), "starts with zeros"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "page": (b"<!DOCTYPE html><html></html>", "HTML or XML page"),
    "pickle": (b"PK\x03\x04" + bytes(40), "PyTorch pickle"),
    "cut": (b"GGUF\x03\x00\x00\x00", "cut off"),
    "garbage": (b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, "llama.cpp cannot load"),
}


@pytest.mark.parametrize("content, problem", FILES.values(), ids=FILES.keys())
def test_bad_files(tmp_path, content, problem, capfd):
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=problem):
        LlamaCppBackend(path)
    assert capfd.readouterr().err == ""


def test_truncated_file(small, tmp_path):
    path = tmp_path / "half.gguf"
    path.write_bytes(small.gguf.read_bytes()[:100_000])
    with pytest.raises(InputError, match=r"llama\.cpp cannot load .*(data|tensor|file|bounds|corrupt)"):
        LlamaCppBackend(path)


def test_llama_cpp_is_silent_and_closes_twice(small, capfd):
    backend = LlamaCppBackend(small.gguf, **EXACT)
    backend.label_log_probs([[1, 2, 3]], ANSWERS["single"])
    backend.close()
    backend.close()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("in_4bit", [False, True])
def test_bfloat16_and_4_bits(small, in_4bit):
    """Reduced precision moves numbers by rounding only, whatever the batch."""
    from lib.models.loading import load_model
    from lib.runs.machine import bitsandbytes_problem

    if in_4bit and (problem := bitsandbytes_problem()):
        pytest.skip(problem)
    model = load_model(small.folder, dtype="bfloat16", load_in_4bit=in_4bit, device="cpu")
    prompts = prompts_of(small)
    one = TransformersBackend(model, 1).label_log_probs(prompts, ANSWERS["several"])
    eight = TransformersBackend(model, 8).label_log_probs(prompts, ANSWERS["several"])
    exact = brute_force(model, prompts, ANSWERS["several"])
    assert np.abs(one - eight).max() < 0.15 and np.abs(one - exact).max() < 0.15
    assert np.abs(one - brute_force(small.model, prompts, ANSWERS["several"])).max() > 1e-3
