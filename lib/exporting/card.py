"""README.md of an export folder: what it is, what it cost, and the lines that load it."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from lib.exporting.formats import Format
from lib.models.conversations import ConversationTask
from lib.models.tasks import AnyTask
from lib.run.files import write_text

SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
messages = [
    {{"role": "system", "content": {system!r}}},
    {{"role": "user", "content": {user!r}}},
]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, enable_thinking={thinking}, return_tensors="pt", return_dict=True
)
answer = model.generate(**prompt, max_new_tokens={tokens}, do_sample=False)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def snippet(task: AnyTask, row: dict[str, Any]) -> str:
    """Python that loads the folder it is run in and asks the run's question about one row."""
    if isinstance(task, ConversationTask):
        system, user = (message["content"] for message in row["messages"][:2])
        return SNIPPET.format(system=system, user=user, thinking=task.thinking, tokens=256)
    system, user = (message["content"] for message in task.messages(row["text"]))
    return SNIPPET.format(system=system, user=user, thinking=False, tokens=8)


def write_card(folder: Path, made: Format, record: dict[str, Any], code: str, lineage: str, notes: list[str]) -> None:
    """Write README.md with YAML front matter.

    Args:
        record: the format's entry of exports.json.
        code: the usage, see `snippet`.
        lineage: what was merged, in words.
        notes: sentences that every page of the run must say (sample data, offline base).
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        language="zh", library_name="transformers", pipeline_tag="text-generation", tags=["quantized", made.name]
    )
    packages = ["torch", "transformers", *made.needs]
    versions = " ".join(f"{name}=={metadata.version(name).partition('+')[0]}" for name in packages)
    group = f"| group size | {record['group_size']} weights a scale |\n" if "group_size" in record else ""
    calibrated = (
        f"| calibrated on | {record['calibration_rows']} training rows, {record['calibration_tokens']:,} tokens |\n"
        if "calibration_rows" in record
        else ""
    )
    check = record["check"]
    write_text(
        folder / "README.md",
        f"""---
{data.to_yaml()}
---

# Merged model as {made.name}

{"".join(f"> {note}{chr(10)}>{chr(10)}" for note in notes)}
{lineage} Format: {made.title}. {made.note}

| | |
|---|---|
| weights | {record["weights"]:,}, {record["bytes"] / 1e6:.2f} MB, {record["bits_per_weight"]:.2f} bits each |
{group}{calibrated}| made in | {record["seconds"]:.1f} s, {record["peak_memory_mib"]:.0f} MiB at most |
| against the merged model | mean KL divergence {check["mean_kld"]:.2g} nats, {check["same_top"]:.1%} equal top tokens \
({check["positions"]} positions) |

## Use

Made and tested with `{versions}`.

```python
{code}```
""",
    )
