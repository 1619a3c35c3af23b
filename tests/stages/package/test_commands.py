"""The guide's commands, read by a shell."""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from lib.stages.package.documents import chat_command, example_turn, question_command, request_command
from tests import tiny_run


def test_quoting_for_the_shell() -> None:
    system, user = 'it\'s `$HOME`\n"two" \\n lines', "say \\t: {text}"
    facts: Any = SimpleNamespace(task=replace(tiny_run.TASK, system_prompt=system, user_prompt=user))
    facts.n_ctx, facts.most, facts.switches = 512, 8, True
    words = shlex.split(question_command("llama-cli", "m.gguf", facts).replace(" \\\n", " "))
    assert words[words.index("-sys") + 1] == system and words[words.index("-p") + 1] == example_turn(facts)
    assert "--no-escape" in words and words[words.index("--reasoning") + 1] == "off"
    shown = subprocess.run(
        ["/bin/sh", "-c", request_command(facts).replace("curl", "printf '%s|'", 1)], capture_output=True
    )
    body = json.loads(shown.stdout.decode().split("|-d|")[1].removesuffix("|"))
    assert [message["content"] for message in body["messages"]] == [system, example_turn(facts)]
    facts.task = replace(facts.task, system_prompt="")
    assert "-sys" not in chat_command("llama-cli", "m.gguf", facts)
