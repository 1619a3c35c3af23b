"""`workbook ask`: the same prompts to several models, as transformers itself answers them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lib.cli.__main__ import app
from lib.errors import InputError
from lib.scoring.generation import Sampling, end_ids
from lib.scoring.word_lists import SHIPPED_PROMPTS, read_prompts
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed", "-1", "--temperature", "0.5"], "--seed"),
        (["--top-p", "0.5"], "--top-p without --temperature"),
        (["--seed", "7", "--top-p", "1"], "--top-p and --seed without --temperature"),
        (["--revision", "abc"], "--revision for models that it changes nothing of"),
        (["--thinking"], "--thinking for models that it changes nothing of"),
        (["--n-threads", "100000"], "--n-threads"),
        (["--max-new-tokens", "1000000000"], "which the model was made for"),
        (["--prompt", "A.\\nB."], "no line end"),
        (["--system-prompt", "A.\\tB."], "no line end"),
    ],
)
def test_options_that_do_nothing_or_cannot_be_are_refused(small: Tiny, options: list[str], words: str) -> None:  # noqa: F811
    done = CliRunner().invoke(app, ["ask", str(small.gguf), "--prompt", "x", *options])
    assert done.exit_code == 2 and words in done.output


def test_windows_longer_than_the_text_ask_for_no_room(small: Tiny, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "t.txt").write_text("very good", encoding="utf-8")
    given = ["perplexity", str(small.gguf), "--text", str(tmp_path / "t.txt"), "--n-ctx", "1000000000"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 2 and "at least one window of 1000000000 tokens" in done.output


def test_a_run_says_how_its_model_is_asked(small: Tiny, home: Path) -> None:  # noqa: F811
    from tests import tiny_run

    tiny_run.make_base(home / "base")
    run = tiny_run.make_run(home / "base")
    words = ["ask", str(small.gguf), "--run", run.name, "--prompt", "很好", "--max-new-tokens", "2", "--json"]
    made = CliRunner().invoke(app, words)
    assert made.exit_code == 0, made.output
    found = json.loads(made.output[made.output.index("{\n") :])
    assert found["system_prompt"] == tiny_run.TASK.system_prompt
    assert found["prompts"][0]["prompt"] == tiny_run.TASK.user_prompt.replace("{text}", "很好")
