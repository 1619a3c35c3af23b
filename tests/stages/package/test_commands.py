"""The guide's commands, read by a shell."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from dataclasses import replace

import pytest

from lib.prompts.templates import ROLES, Turns
from lib.runs.render import megabytes
from lib.stages.package.documents import guide, sentences_for
from tests import tiny_run
from tests.stages.package.test_parts import facts

MARKS = ("# run here", "# run by the tests of the workbook", "# not run here")
TURNS = Turns("<s>", {role: f"<|{role}|>\n" for role in ROLES}, dict.fromkeys(ROLES, "</s>\n"), "<|assistant|>\n")
PROMPTS = [[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2, 3]]


def test_quoting_for_the_shell() -> None:
    system, user = 'it\'s `$HOME`\n"two" \\n lines', "say \\t: {text}"
    known = facts(replace(tiny_run.TASK, system_prompt=system, user_prompt=user))
    turn = user.replace("{text}", sentences_for(known.task)[0])
    text = guide(replace(known, switches=True), TURNS, PROMPTS)
    question = re.search("# one question.*?\n(llama-cli.*?)\nollama create", text, re.S)[1]
    words = shlex.split(question.replace(" \\\n", " "))
    assert words[words.index("-sys") + 1] == system and words[words.index("-p") + 1] == turn
    assert "--no-escape" in words and words[words.index("--reasoning") + 1] == "off"
    request = re.search("\n(curl http.*?)\n```", text, re.S)[1]
    shown = subprocess.run(["/bin/sh", "-c", request.replace("curl", "printf '%s|'", 1)], capture_output=True)
    body = json.loads(shown.stdout.decode().split("|-d|")[1].removesuffix("|"))
    assert [message["content"] for message in body["messages"]] == [system, turn]
    assert "-sys" not in guide(replace(known, task=replace(known.task, system_prompt="")), TURNS, PROMPTS)


def test_every_command_says_who_ran_it() -> None:
    blocks = re.findall("```bash\n(.*?)```", guide(facts(tiny_run.TASK), TURNS, PROMPTS), re.S)
    assert len(blocks) >= 6 and all(block.startswith(MARKS) for block in blocks), blocks


@pytest.mark.parametrize("system", ['你是 "$HOME" \\(x)\n助手。', ""])
def test_changes_to_the_sample_apps_send_the_trained_prompt(system: str) -> None:
    """The lines for Swift and Kotlin, read as those languages read them."""
    task = replace(tiny_run.TASK, system_prompt=system)
    text = guide(facts(task), TURNS, PROMPTS)
    ahead, behind = re.search(r"completion_init\(text: (\".*?\") \+ text \+ (\".*?\")\)", text).groups()
    shown = re.sub(r"\\u\{([0-9a-f]+)\}", lambda found: chr(int(found[1], 16)), f"{ahead[1:-1]}房间{behind[1:-1]}")
    turns = [("system", system), ("user", task.user_prompt.replace("{text}", "房间"))]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert shown == TURNS.render(messages).removeprefix("<s>")  # which llama.cpp adds
    kotlin = dict(re.findall(r"engine\.(setSystemPrompt|sendUserPrompt)\((\".*?\")[.)]", text))
    assert json.loads(kotlin["sendUserPrompt"]) == task.user_prompt
    assert json.loads(kotlin["setSystemPrompt"]) == system if system else "setSystemPrompt" not in kotlin


def test_what_serving_costs_is_computed() -> None:
    known = facts(tiny_run.TASK)
    known.chosen.entry["prompt_tokens_per_second"] = 100.0
    text = " ".join(guide(known, TURNS, PROMPTS).split())
    assert "first 3 tokens of the five stored prompts are the same" in text and "that is 30 ms less" in text
    assert f"-c {4 * known.n_ctx} -np 4" in text and f"{megabytes(known.n_ctx * 2_000)} MB of cache" in text
    assert "not measured (measured by one process)" in text
