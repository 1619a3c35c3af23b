"""`workbook ask`: the same prompts to several models, as transformers itself answers them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lib.cli.__main__ import app
from lib.errors import InputError
from lib.scoring.generation import Sampling, end_ids
from lib.scoring.text_metrics import SHIPPED_PROMPTS, read_prompts
from lib.stages.evaluate.standalone import ModelOptions, ask_models
from tests.scoring.conftest import Tiny, small  # noqa: F401

PROMPTS = [{"prompt": text, "reference": ""} for text in ("很好", "房间太小了", "very good")]
OPTIONS = ModelOptions(dtype="float32", n_threads=1)


def expected(tiny: Tiny, prompt: str, most: int) -> str:
    """What transformers' own `generate` writes."""
    turns = [{"role": "system", "content": "你是助手。"}, {"role": "user", "content": prompt}]
    given = tiny.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = tiny.model.generate(
        **given, max_new_tokens=most, do_sample=False, eos_token_id=sorted(end_ids(tiny.tokenizer))
    )
    return tiny.tokenizer.decode(made[0, given["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_a_folder_and_its_gguf_answer_as_generate_does(small: Tiny) -> None:  # noqa: F811
    found = ask_models([small.folder, small.gguf], PROMPTS, OPTIONS, "你是助手。", max_new_tokens=6)
    assert [one["prompt"] for one in found["prompts"]] == [prompt["prompt"] for prompt in PROMPTS]
    for one in found["prompts"]:
        first, second = one["answers"]
        assert first["text"] == second["text"] == expected(small, one["prompt"], 6)
        assert first["chrf"] is None and (second["same_text"], second["same_start"], second["chrf"]) == (
            True,
            1.0,
            100.0,
        )
        assert first["tokens"] <= 6 and first["first_token_seconds"] > 0
    assert found["decoding"] == {"max_new_tokens": 6, "method": "greedy"}
    assert [told["model"] for told in found["models"]] == [str(small.folder), str(small.gguf)]
    assert all(told["peak_memory_mib"] > 0 and told["tokens_per_second"] > 0 for told in found["models"])


def test_drawn_answers_repeat_with_their_seed(small: Tiny) -> None:  # noqa: F811
    def texts(seed: int) -> list[str]:
        drawn = Sampling(temperature=5.0, top_p=1.0, seed=seed)
        found = ask_models([small.gguf], PROMPTS, ModelOptions(n_threads=1), max_new_tokens=12, sampling=drawn)
        return [one["answers"][0]["text"] for one in found["prompts"]]

    assert texts(1) == texts(1) != texts(2)


def test_a_prompt_beyond_the_context_is_refused(small: Tiny) -> None:  # noqa: F811
    for model in (small.folder, small.gguf):
        with pytest.raises(InputError, match="which the model was made for"):
            ask_models([model], [{"prompt": "好" * 40_000, "reference": ""}])


def test_the_command_shows_answers_side_by_side(small: Tiny, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "mine.txt").write_text("# questions\n二加三？\t五\n", encoding="utf-8")
    given = ["ask", str(small.gguf), str(small.folder), "--prompt", "很好", "--prompts", str(tmp_path / "mine.txt")]
    given += ["--max-new-tokens", "4", "--output", str(tmp_path / "answers.json")]
    for _ in range(2):  # a result of its own may be replaced
        done = CliRunner().invoke(app, given)
        assert done.exit_code == 0, done.output
    assert "── 2. 二加三？ (reference: 五)" in done.output and "same answers" in done.output
    written = json.loads((tmp_path / "answers.json").read_text(encoding="utf-8"))
    assert written["prompts"][1]["reference"] == "五" and len(written["models"]) == 2


def test_without_a_prompt_the_sets_are_named(small: Tiny) -> None:  # noqa: F811
    done = CliRunner().invoke(app, ["ask", str(small.gguf)])
    assert done.exit_code == 2 and "counselling, cryptography, general, sentiment" in done.output


@pytest.mark.parametrize("name", SHIPPED_PROMPTS)
def test_shipped_sets_have_five_prompts(name: str) -> None:
    assert len(read_prompts(name)) == 5
