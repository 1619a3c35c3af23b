"""README.md of the package, its model card; and export_report.json, the same for machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from lib.packaging.facts import Facts
from lib.statistics import in_words, kept_words

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
