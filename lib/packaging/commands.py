"""The guide's commands for llama.cpp, with the prompt of the training, quoted for a POSIX shell.

Options as in common/arg.cpp of the llama.cpp that llama-cpp-python 0.3.36 is built from: `-sys` is one of llama-cli
alone (the server takes the system turn from each request), `--reasoning on|off` one of both, and of the texts only
that of `-p` has its escapes processed.
"""

from __future__ import annotations

import json
import shlex

from lib.models.prompting import Task
from lib.packaging.checks import QUESTIONS, REVIEWS
from lib.packaging.facts import Facts

ADDRESS = "http://127.0.0.1:8080"


def example_turn(facts: Facts) -> str:
    """A whole user turn: one of the project's own sentences in the wording of the training."""
    return facts.task.user_prompt.replace("{text}", REVIEWS[0]) if isinstance(facts.task, Task) else QUESTIONS[0]


def chat_command(program: str, path: str, facts: Facts) -> str:
    """llama-cli as a chat that begins with the trained system turn."""
    system = facts.task.system_prompt
    options = f" \\\n  -sys {shlex.quote(system)}" if system else ""
    return f"{program} -m {path} -c {facts.n_ctx} -n {facts.most} --temp 0{switch(facts)}{options}"


def question_command(program: str, path: str, facts: Facts) -> str:
    """llama-cli with one question, answered once."""
    turn = example_turn(facts)
    raw = " --no-escape" if "\\" in turn else ""
    return f"{chat_command(program, path, facts)} \\\n  -st{raw} -p {shlex.quote(turn)}"


def request_command(facts: Facts) -> str:
    """The same question for a server."""
    turns = (("system", facts.task.system_prompt), ("user", example_turn(facts)))
    messages = [{"role": role, "content": content} for role, content in turns]
    body = json.dumps({"messages": messages, "temperature": 0, "max_tokens": facts.most}, ensure_ascii=False)
    head = f"curl {ADDRESS}/v1/chat/completions -H 'Content-Type: application/json'"
    return f"{head} \\\n  -d {shlex.quote(body)}"


def switch(facts: Facts) -> str:
    """The option that makes the template write the prompt of the training, where the template has two."""
    return f" --reasoning {'on' if facts.thinks else 'off'}" if facts.switches else ""
