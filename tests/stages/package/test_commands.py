"""The guide's commands, read by a shell."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from dataclasses import replace

from lib.stages.package.documents import guide, sentences_for
from tests import tiny_run
from tests.stages.package.test_parts import facts


def test_quoting_for_the_shell() -> None:
    system, user = 'it\'s `$HOME`\n"two" \\n lines', "say \\t: {text}"
    known = facts(replace(tiny_run.TASK, system_prompt=system, user_prompt=user))
    turn = user.replace("{text}", sentences_for(known.task)[0])
    text = guide(replace(known, switches=True))
    question = re.search("# one question.*?\n(llama-cli.*?)\npip install", text, re.S)[1]
    words = shlex.split(question.replace(" \\\n", " "))
    assert words[words.index("-sys") + 1] == system and words[words.index("-p") + 1] == turn
    assert "--no-escape" in words and words[words.index("--reasoning") + 1] == "off"
    request = re.search("\n(curl http.*?)\n```", text, re.S)[1]
    shown = subprocess.run(["/bin/sh", "-c", request.replace("curl", "printf '%s|'", 1)], capture_output=True)
    body = json.loads(shown.stdout.decode().split("|-d|")[1].removesuffix("|"))
    assert [message["content"] for message in body["messages"]] == [system, turn]
    assert "-sys" not in guide(replace(known, task=replace(known.task, system_prompt="")))
