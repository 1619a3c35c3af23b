"""requirements.txt of the package: the versions with which it was made and tested.
Modelfile: the packaged file for Ollama, with the prompt that the model was trained on.
README.md of the package, its model card; and export_report.json, the same for machines.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

from lib.stages.package.facts import Facts
from lib.stages.package.self_test import ROLES, Turns
from lib.statistics.losses import kept_words
from lib.statistics.verdicts import in_words

# requirements.txt of the package: the versions with which it was made and tested.


def requirements(formats: Iterable[str], exports: Iterable[str] = ()) -> str:
    """The text: what the GGUF file needs, and in a second part what the folders for transformers need.

    Args:
        formats: folders of the export tree.
        exports: packages of the formats in them, beside torch and transformers.
    """
    lines = ["# The GGUF file: test_model.py and usage_examples.py", *_closure(["llama_cpp_python"])]
    if {*formats} - {"gguf"}:
        own = {line.partition("==")[0].lower() for line in lines}
        wanted = ["torch", "transformers", "accelerate", *exports]
        lines += ["", "# The folders for transformers (torch in the build that suits the device)"]
        lines += [line for line in _direct(wanted) if line.partition("==")[0].lower() not in own]
    return "\n".join(lines) + "\n"


def _pin(name: str) -> str:
    return f"{name}=={metadata.version(name).partition('+')[0]}"


def _direct(names: Iterable[str]) -> list[str]:
    return [_pin(name) for name in dict.fromkeys(names)]


def _closure(names: list[str]) -> list[str]:
    """The packages and everything that they need without extras, with the installed versions."""
    todo, found = list(names), {}
    while todo:
        name = todo.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in found:
            continue
        found[key] = _pin(name)
        for need in metadata.requires(name) or []:
            needed, _, marker = need.partition(";")
            if not marker.strip():
                todo.append(re.match(r"[A-Za-z0-9._-]+", needed)[0])
    return [found[key] for key in sorted(found)]


# Modelfile: the packaged file for Ollama, with the prompt that the model was trained on.

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


# README.md of the package, its model card; and export_report.json, the same for machines.

_TRAINING = (
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lora_r",
    "lora_alpha",
    "load_in_4bit",
    "seed",
)


def card(facts: Facts, contents: Mapping[str, str]) -> str:
    """The model card.

    Args:
        contents: {file or folder of the package: what it is}.
    """
    parts = [_front(facts), f"# {facts.title}\n", _warnings(facts), _what(facts), _choice(facts), _evaluation(facts)]
    parts += [_training(facts), _limits(facts), _licences(facts), _contents(contents)]
    return "\n".join(parts)


def _front(facts: Facts) -> str:
    import yaml

    values: dict[str, Any] = {
        "license": facts.licences["id"],
        **({"language": facts.languages} if facts.languages else {}),
        "library_name": "gguf",
        "pipeline_tag": "text-classification" if facts.labelled else "text-generation",
        "tags": ["gguf", "quantized", facts.kind, facts.choice.type],
    }
    if facts.base.count("/") == 1 and ":" not in facts.base and ":" not in facts.revision:  # a hub id, not a folder
        values |= {"base_model": facts.base, "base_model_relation": "quantized"}
    return f"---\n{yaml.safe_dump(values, allow_unicode=True, sort_keys=False)}---\n"


def _warnings(facts: Facts) -> str:
    return "".join(f"> {note}\n>\n" for note in facts.notes)


def _what(facts: Facts) -> str:
    answers = f"one of {', '.join(facts.task.label_names)}" if facts.labelled else "written answers"
    return f"""`{facts.base}` (revision `{facts.revision}`), fine-tuned by {facts.method} in the run `{facts.run}` for
{facts.kind}, merged, converted to GGUF and quantized to {facts.choice.type}: {facts.bytes / 1e6:.2f} MB,
{facts.choice.entry["bits_per_weight"]:.2f} bits a weight. It gives {answers}. How to run it: deployment_guide.md.
{_types(facts)}"""


def _types(facts: Facts) -> str:
    """What a file under a size budget is: its name is that of no recipe."""
    if facts.mix is None:
        return ""
    kinds = ", ".join(f"{kind} × {count}" for kind, count in Counter(facts.mix["types"].values()).most_common())
    return f"""
{facts.choice.type} is no recipe of llama.cpp: under a budget of {facts.mix["budget_bytes"]:,} bytes every tensor has
the type that measured sensitivity on {_measured_on(facts.mix)} chose for it ({kinds}).
Every program that runs these types runs the file; some name it by its commonest type. The choice predicted a KL
divergence of {_predicted(facts.mix)}.
"""


def _measured_on(mix: Mapping[str, Any]) -> str:
    """What decided, by the share that the answers had."""
    weight = mix.get("answer_weight") or 0.0
    if not weight:
        return "training text"
    answers = "the answers of training rows"
    return answers if weight == 1 else f"training text and on {answers} (of weight {weight:g})"


def _predicted(mix: Mapping[str, Any]) -> str:
    text, at_answers = f"{mix['predicted_kld']:.2g} nats a token of text", mix.get("predicted_answer_kld")
    return text if at_answers is None else f"{text} and {at_answers:.2g} nats at a token of an answer"


def _choice(facts: Facts) -> str:
    return f"""## Why this file

**{facts.choice.standing[0].upper()}{facts.choice.standing[1:]}.** {facts.choice.words}
"""


def _interval(entry: Mapping[str, Any], key: str, form: str) -> str:
    value, interval = entry.get(key), entry.get(f"{key}_interval")
    if value is None:
        return "–"
    return f"{value:{form}}" + (f" [{interval[0]:{form}}, {interval[1]:{form}}]" if interval else "")


def _evaluation(facts: Facts) -> str:
    entry, reference, data = facts.choice.entry, facts.choice.reference, facts.comparison["data"]
    keys = [("accuracy", ".4f")] if facts.labelled else [("answer_ppl", ".3f"), ("answer_ratio", ".4f")]
    head = f"| | this file | {reference['type']}, unquantized |\n|---|---|---|\n"
    rows = [f"| {k} | {_interval(entry, k, form)} | {_interval(reference, k, form)} |\n" for k, form in keys]
    free, free_reference = entry.get("leak_free"), reference.get("leak_free")
    if free and free_reference and facts.labelled:
        name = f"accuracy, {free['n']:,} leak-free rows"
        rows.append(
            f"| {name} | {_interval(free, 'accuracy', '.4f')} | {_interval(free_reference, 'accuracy', '.4f')} |\n"
        )
    rows.append(f"| mean KL divergence, nats | {entry['kld_mean']:.2g} | 0 |\n")
    if kept := kept_words(entry):
        rows.append(f"| share kept of what fine-tuning changed | {kept} | 1 |\n")
    rows.append(f"| verdict | {in_words(entry)} | reference |\n")
    return f"""## Evaluation

{data["rows"]:,} test rows ({data["source"] or facts.source}), with 95 % intervals.

{head}{"".join(rows)}"""


def _training(facts: Facts) -> str:
    rows = ", ".join(f"{split} {count:,}" for split, count in facts.rows.items()) or "not recorded"
    settings = [f"| {key} | {facts.parameters[key]} |\n" for key in _TRAINING if key in facts.parameters]
    table = "| setting | value |\n|---|---|\n" + "".join(settings) if settings else "The settings are not recorded.\n"
    return f"""## Data and training

Data: {facts.source}; rows: {rows}.

{table}"""


def _limits(facts: Facts) -> str:
    judged = "The label that it gives" if facts.labelled else "Perplexity of given answers, which was measured,"
    own = "says nothing on texts unlike the training rows" if facts.labelled else "does not say that advice is right"
    return f"""## Limitations

- {judged} {own}.
- It was measured with one system turn and one wording of the question; with others it may do worse.
- Quantized weights are other weights: what the comparison cannot tell on these rows stays unknown.
- No phone measurement is part of this package.
"""


def _licences(facts: Facts) -> str:
    holds = (
        f"Of rows, web/rows.json holds {facts.page_rows}" if facts.page_rows else "The package holds no row of the data"
    )
    return f"""## Licences

- base model: {facts.licences["base"]}. The packaged weights inherit it.
- data: {facts.licences["data"]}. {holds}.
"""


def _contents(contents: Mapping[str, str]) -> str:
    rows = "".join(f"| {name} | {what} |\n" for name, what in contents.items())
    return f"## In this package\n\n| | |\n|---|---|\n{rows}"


def export_report(facts: Facts, sha256: str, checks: int, tolerance: float, share: float) -> dict[str, Any]:
    """The content of export_report.json.

    Args:
        sha256: of the GGUF file.
        checks, tolerance, share: prompts of test_model.py, nats within which their scores must agree, and the share of
            the stored value that is added.
    """
    return {
        "format": 1,
        "run": facts.run,
        "file": {"name": facts.file, "bytes": facts.bytes, "sha256": sha256, "type": facts.choice.type},
        "choice": {"standing": facts.choice.standing, "words": facts.choice.words},
        "mix": facts.mix,
        "recommendation": facts.comparison["recommendation"],
        "lineage": {
            "base_model": facts.base,
            "base_revision": facts.revision,
            "method": facts.method,
            "data": facts.source,
            "rows": facts.rows,
            "training": facts.parameters,
            "products": facts.products,
        },
        "task": facts.task.to_json(),
        "evaluation": {"file": facts.choice.entry, "reference": facts.choice.reference},
        "conditions": facts.comparison["conditions"],
        "bytes_read_per_token": facts.bytes_per_token,
        "licences": facts.licences,
        "export_tree": facts.tree,
        "page_rows": facts.page_rows,
        "checks": {"prompts": checks, "tolerance_nats": tolerance, "tolerance_share": share},
        "versions": {name: metadata.version(name) for name in ("llama_cpp_python", "gguf", "transformers", "numpy")},
        "notes": facts.notes,
    }
