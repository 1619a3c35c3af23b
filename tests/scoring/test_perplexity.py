"""Perplexity and KL divergence against the plain definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lib.errors import InputError
from lib.scoring.llama_backend import LlamaCppBackend
from lib.scoring.perplexity import open_reference, store_reference, text_windows
from lib.scoring.torch_backend import TransformersBackend
from tests.scoring import tiny
from tests.scoring.tiny import kl_table, perplexity

pytestmark = pytest.mark.usefixtures("forked_children")


def ids(n: int) -> list[int]:
    return np.random.default_rng(2).integers(0, 512, n).tolist()


@pytest.fixture(scope="module")
def other():
    """A second model near the first: its weights rounded to bfloat16."""
    model = tiny.make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return TransformersBackend(model)


def log_probs(backend, windows) -> np.ndarray:
    """Float64 log-probabilities of the scored positions of all windows."""
    rows = []
    for window in windows:
        with torch.inference_mode():
            logits = backend.model(input_ids=torch.tensor([window])).logits[0].double()
        rows.append(torch.log_softmax(logits, -1)[len(window) // 2 : -1].numpy())
    return np.concatenate(rows)


def test_windows():
    text = list(range(1000))
    assert text_windows(text, 300, 700) == [text[:300], text[300:600]]
    assert len(text_windows(text, 300, 10_000)) == 3
    with pytest.raises(InputError, match="200 tokens of held-out text"):
        text_windows(text[:200], 300, 10_000)


@pytest.mark.parametrize("n_ctx", [64, 65])
def test_perplexity_is_the_definition(small, n_ctx):
    windows = text_windows(ids(300), n_ctx, 300)
    backend = TransformersBackend(small.model)
    found = perplexity(backend, windows)
    targets = np.concatenate([window[n_ctx // 2 + 1 :] for window in windows])
    losses = -log_probs(backend, windows)[np.arange(len(targets)), targets]
    assert found["n_tokens"] == 4 * (n_ctx - 1 - n_ctx // 2)
    assert found["ppl"] == pytest.approx(np.exp(losses.mean()), rel=1e-5)
    standard_error = losses.std(ddof=1) / np.sqrt(len(losses))
    assert found["ppl_uncertainty"] == pytest.approx(found["ppl"] * standard_error, rel=1e-4)
    with LlamaCppBackend(small.gguf, n_ctx=65, cache_type="f32", flash_attention=False, n_threads=1) as gguf:
        assert perplexity(gguf, windows)["ppl"] == pytest.approx(found["ppl"], rel=1e-5)


def test_kl_table_is_the_definition(small, other, tmp_path):
    windows = text_windows(ids(600), 100, 600)
    base = TransformersBackend(small.model)
    found = kl_table(base, other, windows)
    p, q = log_probs(base, windows), log_probs(other, windows)
    targets = np.concatenate([window[51:] for window in windows])
    rows = np.arange(len(targets))
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    dp = np.exp(q[rows, targets]) - np.exp(p[rows, targets])
    ratio = p[rows, targets] - q[rows, targets]
    assert found["n_tokens"] == len(kl) == 294
    assert found["kld_mean"] == pytest.approx(kl.mean(), rel=2e-3) and found["kld_mean"] > 1e-6
    assert found["kld_uncertainty"] == pytest.approx(kl.std(ddof=1) / np.sqrt(len(kl)), rel=1e-2)
    for value, level in (
        (found["kld_median"], 0.5),
        (found["kld_p90"], 0.9),
        (found["kld_p99"], 0.99),
        (found["kld_p999"], 0.999),
        (found["kld_max"], 1),
    ):
        assert value == pytest.approx(np.quantile(kl, level), rel=2e-2)
    assert found["mean_dp"] == pytest.approx(dp.mean(), rel=2e-2)
    assert found["rms_dp"] == pytest.approx(np.sqrt((dp**2).mean()), rel=1e-2)
    assert found["same_top"] == pytest.approx((p.argmax(1) == q.argmax(1)).mean(), abs=1 / 294)
    assert found["ln_ppl_ratio"] == pytest.approx(ratio.mean(), abs=1e-4)
    assert found["ln_ppl_ratio_uncertainty"] == pytest.approx(ratio.std(ddof=1) / np.sqrt(len(kl)), rel=1e-2)
    assert found["ppl_ratio"] == pytest.approx(np.exp(ratio.mean()), rel=1e-4)
    assert found["ppl_reference"] == pytest.approx(perplexity(base, windows)["ppl"], rel=1e-3)
    path = tmp_path / "reference"
    with store_reference(base, windows, path, "storing") as reference:
        stored = {key: value for key, value in found.items() if not key.endswith("_exact")}  # it holds rounded ones
        assert kl_table(reference, other, windows) == stored
        assert kl_table(open_reference(path, windows, 512), other, windows) == stored
        assert reference.perplexity == perplexity(base, windows)
        assert path.stat().st_size == 2 * 294 * (512 + 4)
        with pytest.raises(InputError, match="one vocabulary"):
            open_reference(path, windows, 256)
    assert not path.exists()


def test_a_model_against_itself_is_zero(small):
    windows = text_windows(ids(200), 100, 200)
    backend = TransformersBackend(small.model)
    found = kl_table(backend, backend, windows)
    assert abs(found["kld_mean"]) < 1e-6 and found["kld_max"] < 2e-5  # 1.003e-5 on a processor with AVX2 alone
    assert found["same_top"] == 1
    assert found["rms_dp"] < 1e-4


def test_other_vocabulary_is_refused(small):
    windows = [np.random.default_rng(0).integers(0, 100, 64).tolist()]
    with pytest.raises(InputError, match="reference of 512 tokens and a model of 256"):
        kl_table(TransformersBackend(small.model), TransformersBackend(tiny.make_model(256)), windows)


def test_broken_model_is_an_error():
    model = tiny.make_model()
    backend = TransformersBackend(model)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(InputError, match="not numbers"):
        perplexity(backend, [ids(64)])


# Printed by llama.cpp's own perplexity() and kl_divergence() (tools/perplexity/perplexity.cpp of the commit in
# llama-cpp-python 0.3.36, lines 27-295, 442-655 and 1675-1984 compiled unchanged behind a main() that reads token ids),
# with 32-bit cache, no flash attention and one thread, for the files of tiny.golden_pair, window 128:
#   oracle a.gguf ids.txt 128 base.kld ppl f32; oracle b.gguf ids.txt 128 base.kld kld f32
GOLDEN = {
    "ppl": (432.399132, 1e-4),
    "ppl_uncertainty": (34.038555, 1e-4),
    "ppl_reference": (435.445036, 1e-3),
    "ppl_reference_uncertainty": (34.258051, 1e-4),
    "ln_ppl_ratio": (-0.007020, 2e-6),
    "ln_ppl_ratio_uncertainty": (0.004391, 1e-6),
    "ppl_ratio": (0.993005, 2e-6),
    "ppl_ratio_uncertainty": (0.004361, 1e-6),
    "kld_mean": (0.002634, 1e-6),
    "kld_uncertainty": (0.000049, 1e-6),
    "kld_max": (0.006003, 2e-6),
    "kld_p999": (0.005897, 2e-6),
    "kld_p99": (0.005171, 2e-6),
    "kld_p95": (0.003975, 2e-6),
    "kld_p90": (0.003604, 2e-6),
    "kld_median": (0.002554, 2e-6),
    "mean_dp": (0.00005, 1e-5),
    "rms_dp": (0.00064, 1e-5),
    "rms_dp_uncertainty": (0.00007, 1e-5),
    "same_top": (0.90873, 1e-5),
    "same_top_uncertainty": (0.01818, 1e-5),
}


def test_equals_llama_perplexity(tmp_path):
    text = tiny.golden_pair(tmp_path / "a.gguf", tmp_path / "b.gguf")
    windows = text_windows(text, 128, 10_000)
    exact = {"n_ctx": 128, "cache_type": "f32", "flash_attention": False, "n_threads": 1}
    with LlamaCppBackend(tmp_path / "a.gguf", **exact) as a, LlamaCppBackend(tmp_path / "b.gguf", **exact) as b:
        alone = perplexity(a, windows)
        table = kl_table(a, b, windows)
    assert (alone["ppl"], alone["ppl_uncertainty"]) == (
        pytest.approx(435.4454, abs=2e-3),
        pytest.approx(34.25808, abs=2e-4),
    )
    assert table["n_tokens"] == 252
    for key, (value, tolerance) in GOLDEN.items():
        assert table[key] == pytest.approx(value, abs=tolerance), key
