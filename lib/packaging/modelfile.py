"""Modelfile: the packaged file for Ollama, with the prompt that the model was trained on."""

from __future__ import annotations

from collections.abc import Sequence

from lib.packaging.turns import ROLES, Turns

_QUOTES = '"""'


def go_template(turns: Turns) -> str:
    """The chat template in the language of Ollama (Go's text/template).

    `begin` is left out: llama.cpp itself adds the token that begins a text where the file asks for one.
    """

    def literal(text: str) -> str:
        return text.replace("{{", '{{ "{{" }}')

    branches = []
    for number, role in enumerate(ROLES):
        test = f'{{{{ {"else if" if number else "if"} eq .Role "{role}" }}}}'
        branches.append(f"{test}{literal(turns.opening[role])}{{{{ .Content }}}}{literal(turns.closing[role])}")
    return f"{{{{ range .Messages }}}}{''.join(branches)}{{{{ end }}}}{{{{ end }}}}{literal(turns.answer)}"


def modelfile(
    gguf: str, turns: Turns, system: str, stops: Sequence[str], labelled: bool, n_ctx: int, most: int
) -> tuple[str, list[str]]:
    """Text of the Modelfile, and notes on what it could not hold.

    Args:
        gguf: name of the file beside it.
        stops: texts at which an answer ends.
        labelled: answers are single words: the likeliest token is taken, nothing drawn.
        n_ctx, most: tokens of context and of an answer.
    """
    lines = [f"# ollama create NAME -f Modelfile, in this folder; then: ollama run NAME\nFROM ./{gguf}"]
    lines.append(f"TEMPLATE {_QUOTES}{go_template(turns)}{_QUOTES}")
    notes = []
    if _QUOTES in system:
        notes.append(f"the system prompt holds {_QUOTES}, which a Modelfile cannot: send it as a message")
        lines.append(f"# No SYSTEM: {notes[0]}.")
    else:
        lines.append(f"SYSTEM {_QUOTES}{system}{_QUOTES}")
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    drawn = {"temperature": 0} if labelled else {"temperature": 0.7, "top_p": 0.8}
    numbers = {**drawn, "num_ctx": n_ctx, "num_predict": most}
    lines += [f"PARAMETER {key} {value}" for key, value in numbers.items()]
    return "\n".join(lines) + "\n", notes
