"""What a package says of its file: model card, guide, Modelfile for Ollama, requirements, and a report for machines.

The texts stand in templates/; here are the values in them.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lib.prompts.templates import ROLES, Turns
from lib.runs.files import render
from lib.stages.package.facts import Facts
from lib.stages.package.self_test import TOLERANCE, TOLERANCE_SHARE, sentences_for
from lib.statistics.losses import kept_words
from lib.statistics.verdicts import in_words

_TEMPLATES = Path(__file__).with_name("templates")

_TRAINING = (
    *("learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("lora_r", "lora_alpha", "load_in_4bit", "seed"),
)
"""Settings that the card shows."""


def card(facts: Facts, contents: Mapping[str, str]) -> str:
    """README.md, the model card.

    Args:
        contents: {file or folder of the package: what it is}.
    """
    types = Counter(facts.mix["types"].values()).most_common() if facts.mix else []
    return render(
        _TEMPLATES / "README.md.j2",
        facts=facts,
        labelled=bool(facts.task.label_names),
        front=_front_matter(facts),
        tensors_by_type=", ".join(f"{kind} × {count}" for kind, count in types),
        evaluation=_evaluation(facts),
        settings={key: facts.parameters[key] for key in _TRAINING if key in facts.parameters},
        contents=contents,
    )


def _front_matter(facts: Facts) -> str:
    import yaml

    values: dict[str, Any] = {
        "license": facts.licences["id"],
        **({"language": facts.languages} if facts.languages else {}),
        "library_name": "gguf",
        "pipeline_tag": "text-classification" if facts.task.label_names else "text-generation",
        "tags": ["gguf", "quantized", facts.task.kind, facts.chosen.type],
    }
    if facts.base.count("/") == 1 and ":" not in facts.base and ":" not in facts.revision:  # a hub id, not a folder
        values |= {"base_model": facts.base, "base_model_relation": "quantized"}
    return yaml.safe_dump(values, allow_unicode=True, sort_keys=False)


def _evaluation(facts: Facts) -> list[tuple[str, str, str]]:
    """Name, value of the file, value of the reference."""
    entry, reference = facts.chosen.entry, facts.chosen.reference
    keys = {"accuracy": ".4f"} if facts.task.label_names else {"answer_ppl": ".3f", "answer_ratio": ".4f"}
    rows = [(key, _interval(entry, key, form), _interval(reference, key, form)) for key, form in keys.items()]
    free, free_reference = entry.get("leak_free"), reference.get("leak_free")
    if free and free_reference and facts.task.label_names:
        values = (_interval(part, "accuracy", ".4f") for part in (free, free_reference))
        rows.append((f"accuracy, {free['n']:,} leak-free rows", *values))
    rows.append(("mean KL divergence, nats", f"{entry['kld_mean']:.2g}", "0"))
    if kept := kept_words(entry):
        rows.append(("share kept of what fine-tuning changed", kept, "1"))
    return [*rows, ("verdict", in_words(entry), "reference")]


def _interval(entry: Mapping[str, Any], key: str, form: str) -> str:
    value, interval = entry.get(key), entry.get(f"{key}_interval")
    if value is None:
        return "–"
    return f"{value:{form}}" + (f" [{interval[0]:{form}}, {interval[1]:{form}}]" if interval else "")


def export_report(facts: Facts, sha256: str, prompts: int) -> dict[str, Any]:
    """The content of export_report.json: the card for machines.

    Args:
        sha256: of the GGUF file.
        prompts: that test_model.py asks.
    """
    return {
        "format": 1,
        "run": facts.run,
        "file": {"name": facts.file, "bytes": facts.bytes, "sha256": sha256, "type": facts.chosen.type},
        "choice": {"standing": facts.chosen.standing, "words": facts.chosen.words},
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
        "evaluation": {"file": facts.chosen.entry, "reference": facts.chosen.reference},
        "conditions": facts.comparison["conditions"],
        "bytes_read_per_token": facts.bytes_per_token,
        "licences": facts.licences,
        "export_tree": facts.tree,
        "page_rows": facts.page_rows,
        "checks": {"prompts": prompts, "tolerance_nats": TOLERANCE, "tolerance_share": TOLERANCE_SHARE},
        "versions": {name: metadata.version(name) for name in ("llama_cpp_python", "gguf", "transformers", "numpy")},
        "notes": facts.notes,
    }


# requirements.txt: the versions with which the package was made and tested.


def requirements(facts: Facts) -> str:
    """What the GGUF file needs, and in a second part what the folders for transformers need."""
    lines = ["# The GGUF file: test_model.py and usage_examples.py", *_closure("llama_cpp_python")]
    if facts.tree.keys() - {"gguf"}:
        kinds = {what.partition(":")[0] for what in facts.tree.values()}
        wanted = ["torch", "transformers", "accelerate"]
        wanted += ["bitsandbytes"] if kinds & {"int8", "nf4"} else []
        wanted += ["compressed_tensors"] if "gptq" in kinds else []
        lines += ["", "# The folders for transformers (torch in the build that suits the device)", *map(_pin, wanted)]
    return "\n".join(lines) + "\n"


def _pin(name: str) -> str:
    return f"{name}=={metadata.version(name).partition('+')[0]}"


def _closure(wanted: str) -> list[str]:
    """A package and everything that it needs without extras, with the installed versions."""
    todo, found = [wanted], {}
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


def modelfile(facts: Facts, turns: Turns, stops: Sequence[str]) -> tuple[str, list[str]]:
    """Text of the Modelfile, and notes on what it could not hold.

    Answers that are single words are the likeliest ones; others are drawn.

    Args:
        stops: texts at which an answer ends.
    """
    problems = []
    if '"""' in facts.task.system_prompt:
        problems.append('the system prompt holds """, which a Modelfile cannot: send it as a message')
    template = _TEMPLATES / "Modelfile.j2"
    return render(template, facts=facts, turns=go_template(turns), stops=stops, problems=problems), problems


# deployment_guide.md: how the packaged file is run on phones and desktops, with the numbers of the run.
#
# Options as in common/arg.cpp of the llama.cpp that llama-cpp-python 0.3.36 is built from: `-sys` is one of llama-cli
# alone (the server takes the system turn from each request), `--reasoning on|off` one of both, and of the texts only
# that of `-p` has its escapes processed.

ADDRESS = "http://127.0.0.1:8080"

BANDWIDTHS = {
    f"{kind}-{transfers}": transfers * 1e6 * 8
    for kind, transfers in (("LPDDR4X", 4266), ("LPDDR5", 6400), ("LPDDR5X", 8533))
}
"""Memory of phones: bytes a second on a bus of 64 bits; the name holds mega-transfers a second (JEDEC)."""


def guide(facts: Facts) -> str:
    """deployment_guide.md."""
    return render(
        _TEMPLATES / "deployment_guide.md.j2",
        facts=facts,
        labelled=bool(facts.task.label_names),
        bandwidths=BANDWIDTHS,
        address=ADDRESS,
        chat_command=chat_command,
        question_command=question_command,
        request_command=request_command,
        reasoning_option=reasoning_option,
        llama_version=metadata.version("llama_cpp_python"),
    )


def example_turn(facts: Facts) -> str:
    """A whole user turn: one of the project's own sentences in the wording of the training."""
    return facts.task.user_prompt.replace("{text}", sentences_for(facts.task)[0])


def chat_command(program: str, path: str, facts: Facts) -> str:
    """llama-cli as a chat that begins with the trained system turn."""
    system = facts.task.system_prompt
    options = f" \\\n  -sys {shlex.quote(system)}" if system else ""
    return f"{program} -m {path} -c {facts.n_ctx} -n {facts.most} --temp 0{reasoning_option(facts)}{options}"


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


def reasoning_option(facts: Facts) -> str:
    """The option that makes the template write the prompt of the training, where the template has two."""
    return f" --reasoning {'on' if facts.task.thinking else 'off'}" if facts.switches else ""
