"""What a package says of its file: model card, guide, Modelfile for Ollama, requirements, a report for machines, and
what the file answered here, for the package's own test.

The texts stand in templates/; here are the values in them.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from scipy.special import log_softmax

from lib.language import translated
from lib.prompts.conversations import escape
from lib.prompts.templates import ROLES, Turns, end_of_turn_id
from lib.runs.child import run_child
from lib.runs.files import data_file
from lib.runs.packages import closure, environment_versions, pin
from lib.runs.render import render
from lib.scoring.generation import end_ids, write
from lib.scoring.llama_backend import LlamaCppBackend
from lib.stages.package.facts import TOLERANCE, TOLERANCE_SHARE, Facts, sentences_for
from lib.statistics.losses import kept_words

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

_TEMPLATES = Path(__file__).with_name("templates")

_TRAINING: list[str] = data_file("stages/package/card.yaml")["training"]
"""Settings that the card shows."""
_LABELLED, _WRITTEN = {"accuracy": ".4f"}, {"answer_ppl": ".3f", "answer_ratio": ".4f"}
"""What the card shows of the evaluation, with the form of the numbers."""


def card(facts: Facts, licence_files: Sequence[str] = ()) -> str:
    """README.md, the model card.

    Args:
        licence_files: of the base model, beside the file.
    """
    labelled, mix = bool(facts.task.label_names), facts.report["mix"]
    values: dict[str, Any] = {
        "license": facts.report["licences"]["id"],
        **({"language": facts.languages} if facts.languages else {}),
        "library_name": "gguf",
        "pipeline_tag": "text-classification" if labelled else "text-generation",
        "tags": ["gguf", "quantized", facts.task.kind, facts.chosen.type],
    }
    training = facts.report["lineage"]
    base = training["base_model"]
    if base.count("/") == 1 and ":" not in base and ":" not in training["base_revision"]:  # a hub id, not a folder
        values |= {"base_model": base, "base_model_relation": "quantized"}
    return render(
        _TEMPLATES / "README.md.j2",
        facts=facts,
        labelled=labelled,
        front=yaml.safe_dump(values, allow_unicode=True, sort_keys=False),
        types=Counter(mix["types"].values()).most_common() if mix else [],
        measures=_LABELLED if labelled else _WRITTEN,
        why=facts.chosen.told or facts.chosen.words,
        kept=kept_words(facts.chosen.entry),
        verdict=facts.chosen.entry["verdict"],
        settings={key: training["training"][key] for key in _TRAINING if key in training["training"]},
        licence_files=licence_files,
    )


# requirements.txt: the versions with which the package was made and tested.


def requirements(facts: Facts) -> str:
    """What the GGUF file needs, and in a second part what the folders for transformers need."""
    lines = [f"# {translated('The GGUF file: test_model.py and usage_examples.py')}", *closure("llama_cpp_python")]
    tree = facts.report["export_tree"]
    if tree.keys() - {"gguf"}:
        kinds = {what.partition(":")[0] for what in tree.values()}
        onnx = {kind for kind in kinds if kind.startswith("onnx")}
        wanted = ["torch", "transformers", "accelerate"] if tree.keys() - {"gguf", "onnx", "mnn"} else ["transformers"]
        wanted += ["bitsandbytes"] if kinds & {"int8", "nf4"} else []
        wanted += ["compressed_tensors"] if kinds & {"gptq", "autoround"} else []
        wanted += ["onnxruntime_genai"] if onnx else []
        folders = translated("The folders for transformers (torch in the build that suits the device)")
        lines += ["", f"# {folders}", *map(pin, wanted)]
        lines += [f"mnn=={environment_versions('mnn')['mnn']}"] if "mnn" in tree else []
    return "\n".join(lines) + "\n"


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

BANDWIDTHS = {
    f"{kind}-{transfers}": transfers * 1e6 * 8
    for kind, transfers in (("LPDDR4X", 4266), ("LPDDR5", 6400), ("LPDDR5X", 8533))
}
"""Memory of phones: bytes a second on a bus of 64 bits; the name holds mega-transfers a second (JEDEC)."""


BATCHED = (3.43, 2.07)
"""Rows a second in batches and one by one (docs/measured.md)."""
REUSED = (381, 6.2, 0.27)
"""Tokens of a prompt; seconds until its answer with a new beginning, and with that of the request before."""


def guide(facts: Facts, turns: Turns, prompts: Sequence[Sequence[int]]) -> str:
    """deployment_guide.md; its questions are one of the project's own sentences in the wording of the training.

    Args:
        prompts: token ids of stored prompts, whose common beginning a server keeps.
    """
    turn = facts.task.user_prompt.replace("{text}", sentences_for(facts.task)[0])
    messages = [{"role": "system", "content": facts.task.system_prompt}, {"role": "user", "content": turn}]
    request = {"messages": messages, "temperature": 0, "max_tokens": facts.most}
    asked = [
        {"role": role, "content": text} for role, text in zip(ROLES, (facts.task.system_prompt, "\0"), strict=False)
    ]
    ahead, behind = replace(turns, begin="").render(asked).split("\0")
    wording = facts.task.user_prompt.partition("{text}") if facts.task.label_names else ("", "", "")
    return render(
        _TEMPLATES / "deployment_guide.md.j2",
        facts=facts,
        labelled=bool(facts.task.label_names),
        bandwidths=BANDWIDTHS,
        quoted=shlex.quote,
        quoted_text=partial(_literal, "\\u{:04x}"),
        swift=partial(_literal, "\\u{{{:x}}}"),
        ahead=ahead + wording[0],
        behind=wording[2] + behind,
        shared=sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*prompts, strict=False))),
        slot=facts.n_ctx * facts.report["cache_bytes_per_token"],
        batched=BATCHED,
        reused=REUSED,
        turn=turn,
        request=json.dumps(request, ensure_ascii=False),
        llama_version=metadata.version("llama_cpp_python"),
    )


def _literal(form: str, text: str) -> str:
    """A text between the quotation marks of Kotlin or Swift, in which $ and \\( would be filled in.

    Args:
        form: of a character by its number.
    """
    return '"' + "".join(form.format(ord(c)) if c in '"\\$' or ord(c) < 32 else c for c in text) + '"'


# model_info.json: how the packaged file is asked, and what it answered here to five prompts, for test_model.py.

CHECKED_TOKENS = 24


@dataclass(frozen=True)
class PackedModel:
    """The packaged file, and how it is asked."""

    facts: Facts
    turns: Turns
    tokenizer: PreTrainedTokenizerBase
    gguf: Path
    n_threads: int

    def prompts(self, texts: Sequence[str]) -> tuple[list[str], list[list[int]]]:
        """The prompts for texts, names of special tokens inside them made harmless; and their token ids."""
        task, prompts = self.facts.task, []
        for text in texts:
            turns = {"system": task.system_prompt, "user": task.user_prompt.replace("{text}", text)}
            harmless = [{"role": role, "content": escape(self.tokenizer, turn)} for role, turn in turns.items()]
            prompts.append(self.turns.render(harmless))
        return prompts, [self.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]

    def answers(
        self, ids: list[list[int]], labels: list[list[int]], most: int, ends: Sequence[int] = (), what: str = ""
    ) -> list[dict[str, Any]]:
        """What the file answers to prompts, in a process of its own; see `answer`.

        Raises:
            InputError: llama.cpp refuses the file or dies of it.
        """
        request = {"path": self.gguf, "prompts": ids, "labels": labels, "most": most, "ends": list(ends)}
        request["n_threads"] = self.n_threads
        return run_child("lib.stages.package.documents:answer", request, f"asking {self.gguf.name}{what}")["answers"]


def model_info(packed: PackedModel) -> dict[str, Any]:
    """The content of model_info.json.

    Raises:
        InputError: as `PackedModel.answers`.
    """
    facts, task, tokenizer = packed.facts, packed.facts.task, packed.tokenizer
    texts, labels = sentences_for(task), task.answer_words(tokenizer)
    prompts, ids = packed.prompts(texts)
    ends, end_of_turn = end_ids(tokenizer), end_of_turn_id(tokenizer)
    answers = packed.answers(ids, labels, min(CHECKED_TOKENS, facts.most), sorted(ends))
    checked = zip(texts, prompts, ids, answers, strict=True)
    return {
        "format": 1,
        "file": facts.file,
        "sha256": facts.report["file"]["sha256"],
        "system": task.system_prompt,
        "user": task.user_prompt,
        "labels": [{"name": name, "ids": own} for name, own in zip(task.label_names, labels, strict=True)],
        "turns": asdict(packed.turns),
        "special_tokens": list(tokenizer.all_special_tokens),
        "stops": tokenizer.convert_ids_to_tokens([end_of_turn, *sorted(ends - {end_of_turn})]),
        "n_ctx": facts.n_ctx,
        "max_tokens": facts.most,
        "tolerance": TOLERANCE,
        "tolerance_share": TOLERANCE_SHARE,
        "examples": texts[:3],
        "folders": [name for name in facts.report["export_tree"] if name != "gguf"],
        "checks": [
            {"text": text, "prompt": prompt, "prompt_ids": own, **answer} for text, prompt, own, answer in checked
        ],
    }


# What the packaged file answers here: greedy tokens, their log-probabilities, label scores. For a child process.


def answer(argument: dict[str, Any]) -> dict[str, Any]:
    """Open a GGUF file and answer prompts.

    Args:
        argument: "path"; "prompts": token ids; "labels": token ids of the answer words, or []; "most": tokens of an
            answer; "ends": ids that end it; "n_threads".

    Returns:
        "answers": for every prompt {"ids" (without the ending token), "log_probs" (of each id, nats), "labels"
        (log-probability of each label)}.
    """
    prompts, labels = argument["prompts"], argument["labels"]
    longest = max(map(len, prompts)) + max([argument["most"], *map(len, labels)]) + 1
    options = {"n_ctx": longest, "n_threads": argument["n_threads"], "flash_attention": True}
    with LlamaCppBackend(Path(argument["path"]), **options) as backend:
        scores = [[_score(backend, ids, label) for label in labels] for ids in prompts]
        answers = [_greedy(backend, ids, argument["most"], argument["ends"]) for ids in prompts]
    return {"answers": [{**written, "labels": own} for written, own in zip(answers, scores, strict=True)]}


def _score(backend: LlamaCppBackend, prompt: Sequence[int], label: Sequence[int]) -> float:
    """Log-probability of a label, one sequence at a time as programs do: batches of many round otherwise."""
    feed, given, total = backend.new_text(), list(prompt), 0.0
    for token in label:
        total += float(log_softmax(feed(given))[token])
        given = [token]
    return total


def _greedy(backend: LlamaCppBackend, prompt: Sequence[int], most: int, ends: Sequence[int]) -> dict[str, Any]:
    feed, found = backend.new_text(), []

    def remember(ids: Sequence[int]) -> np.ndarray:
        logits = feed(ids)
        found.append(float(log_softmax(logits).max()))  # of the likeliest token, which greedy takes
        return logits

    written = write(remember, prompt, most, set(ends))
    return {"ids": written.ids, "log_probs": found[: len(written.ids)]}
