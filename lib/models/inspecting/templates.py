"""A chat template tried out: in a process of its own, with little memory and time, because it is foreign code."""

from __future__ import annotations

import hashlib
from typing import Any

from lib.errors import InputError
from lib.run.child import run_child

SECONDS, BYTES = 20.0, 1 << 30
"""What the trial may take: wall time, address space."""
_USER = "QUESTION-7391"


def describe_template(template: str, render: bool) -> dict[str, Any]:
    """Hash and length of a template; whether it adds a system turn of its own; why it cannot be used, if so.

    Returns:
        {"sha256", "characters", "own_system_turn": True, False or None (not tried), "problem": None or words}.
    """
    found: dict[str, Any] = {
        "sha256": hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest(),
        "characters": len(template),
        "own_system_turn": None,
        "problem": None,
    }
    if not render:
        return found
    try:
        answer = run_child(
            "lib.models.inspecting.templates:try_out",
            {"template": template},
            "trying the chat template",
            timeout=SECONDS,
            heard=lambda _: None,
        )
    except InputError as error:
        return {**found, "problem": f"the chat template cannot be rendered: {error.found}"}
    return {**found, "own_system_turn": answer.get("own_system_turn"), "problem": answer.get("problem")}


def try_out(argument: dict[str, Any]) -> dict[str, Any]:
    """Render one user turn as transformers would; runs in the child process."""
    import resource

    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (int(SECONDS), int(SECONDS)))
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda _: "2026-01-01"
    try:
        text = environment.from_string(argument["template"]).render(
            messages=[{"role": "user", "content": _USER}], add_generation_prompt=True, bos_token="", eos_token=""
        )
    except (jinja2.TemplateError, MemoryError, RecursionError, OverflowError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        return {"problem": f"the chat template cannot be rendered: {reason}"}
    if _USER not in text:
        return {"problem": "the chat template leaves the user's words out"}
    return {"own_system_turn": "system" in text.partition(_USER)[0]}


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
