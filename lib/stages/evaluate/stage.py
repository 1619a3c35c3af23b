"""The product `evaluation`: per-row scores of base and fine-tuned model, what they say, and what the models write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.models.base_model import Base, base_of
from lib.models.loading import load_tokenizer, load_trained
from lib.prompts.tasks import read_task
from lib.runs.files import read_json, read_jsonl, sha256_json, write_json, write_jsonl
from lib.runs.machine import compute_dtype, device_name
from lib.scoring.backend import Keep, found_done
from lib.scoring.generation import Asked, Questions, Sampling, end_ids, sameness_notes, with_likeness, write_all
from lib.scoring.log_probabilities import score_rows
from lib.scoring.word_lists import prompt_set, read_prompts
from lib.settings import FULL
from lib.stages.evaluate import results

if TYPE_CHECKING:
    from lib.runs.run import Product, ProductDraft, Run
    from lib.scoring.torch_backend import TransformersBackend
    from lib.settings import Settings


# The models that notebook 03 judges: the base, and the base with the run's adapter, where it has one.


@dataclass(frozen=True)
class Candidate:
    """One of these models.

    Attributes:
        name: `BASE` or `FINETUNED`.
        base: the base model.
        adapter: the product of the adapter, or of the model where every weight was trained; None for the base alone.
        dtype: in which it computes.
    """

    name: str
    base: Base
    adapter: Product | None
    dtype: str

    @property
    def words(self) -> str:
        """What it is, in a sentence."""
        return f"the {results.SHOWN[self.name]} model"

    @property
    def in_4bit(self) -> bool:
        """Whether the base is held in 4 bits, as it was while the adapter was trained."""
        return self.adapter is not None and self.adapter.entry.facts.get("method") == "QLoRA"

    @property
    def whole(self) -> bool:
        """Whether the product is the model itself."""
        return self.adapter is not None and self.adapter.entry.facts.get("method") == FULL

    def title(self, alone: str) -> str:
        """What it is, exactly; `alone` stands behind the id of the base alone."""
        if self.adapter is None:
            return f"{self.base.id}{alone} ({self.dtype})"
        if self.whole:
            return f"{self.base.id}, every weight trained ({self.dtype})"
        return f"{self.base.id} with the adapter ({'NF4 base, ' if self.in_4bit else ''}{self.dtype})"

    def keep(self, folder: Path) -> Keep:
        """Where its scores are kept as they come."""
        digest = self.adapter.entry.digest if self.adapter else None
        weights = [self.base.id, self.base.revision, digest, self.in_4bit, self.dtype]
        return Keep(folder / f"kept-{self.name}.jsonl", sha256_json(weights))

    def opened(self, batch_size: int) -> TransformersBackend:
        """The loaded model."""
        from lib.scoring.torch_backend import TransformersBackend

        model = load_trained(self.base.path, self.adapter, self.dtype)
        return TransformersBackend(model, batch_size, self.words)


def candidates(run: Run, dtype: str) -> list[Candidate]:
    """The base and the fine-tuned model of a run; the base alone where nothing was trained."""
    base = base_of(run)
    adapters = {results.BASE: None} if run.untrained else {results.BASE: None, results.FINETUNED: run.adapter()}
    return [Candidate(name, base, adapter, dtype) for name, adapter in adapters.items()]


# The product.


def evaluate(settings: Settings, run: Run) -> results.EvaluationResult:
    """Score base and fine-tuned model (where nothing was trained, the base alone) on the test rows, or take the scores
    of last time.

    Raises:
        InputError: data or adapter missing; a model that cannot be loaded; log-probabilities that are not numbers.
    """
    data = run.require("data").path
    kind = results.result_of(read_task(data))
    product = run.produce(
        "evaluation",
        lambda work: _build(settings, run, work),
        parameters=kind.parameters(settings),
        inputs=("data", "adapter"),
        force=settings.force,
        keep_partial=True,
    )
    return kind.read(product, product.path, data, settings, read_json(product.path / results.SUMMARY))


def _build(settings: Settings, run: Run, work: ProductDraft) -> None:
    data = run.require("data")
    task, rows = read_task(data.path), read_jsonl(data.path / "test.jsonl")
    kind, tokenizer = results.result_of(task), load_tokenizer(data.path / "tokenizer")
    dtype, reason = compute_dtype(settings.dtype)
    models = candidates(run, dtype)
    work.device = device_name()
    encoded = [task.encode(tokenizer, row) for row in rows]
    questions = None
    if kind.writes:
        sources = read_prompts(prompt_set(settings)) if settings.generated_rows > 0 else ()
        questions = Questions.of(settings, tokenizer, task, rows, sources)
    notes: dict[str, str] = {}
    found: dict[str, list[str]] = {}
    wrote: dict[str, Replies] = {}
    for model in models:
        with model.opened(settings.per_device_eval_batch_size) as backend:
            keep, what = model.keep(work.folder), f"scoring test rows with {model.words}"
            scores = score_rows(backend, tokenizer, task, rows, what, keep, encoded)
            found[model.name] = [scores.found]
            if questions is not None:
                wrote[model.name] = write_with(backend, questions, keep)
                found[model.name] += wrote[model.name].found
            notes[model.name] = "; ".join(filter(None, (backend.note, task.note(tokenizer))))
        scores.save(work.folder / f"scores-{model.name}.jsonl")
    known: dict[str, Any] = {"titles": {model.name: model.title(kind.alone) for model in models}}
    if questions is None:
        known["scoring"] = notes
    else:
        conditions = {
            "set": Path(prompt_set(settings)).name,
            "system_prompt": task.system_prompt,
            "device": work.device,
            "dtype": dtype,
        }
        known |= _save_written(work.folder, questions, wrote, conditions)
        last = models[-1].name
        texts = [answer["text"] for answer in wrote[last].answers]
        work.notes += sameness_notes(results.SHOWN[last], texts, [one.reference for one in questions.asked])
        known["turns_cut"] = sum(one.turns_cut for one in encoded)
    result = kind.read(None, work.folder, data.path, settings, known)
    write_json(work.folder / results.SUMMARY, result.to_json())
    for path in work.folder.glob("kept-*.jsonl"):  # kept for an interruption
        path.unlink()
    facts = data.entry.facts
    work.facts |= {
        **{key: facts[key] for key in ("task", "source", "sample_data", "prompt_hash") if key in facts},
        "base_model": models[0].base.id,
        "base_revision": models[0].base.revision,
        "offline_base": models[0].base.offline,
        "dtype": dtype,
        "dtype_reason": reason,
        "found_done": found_done(found),
    }
    work.metrics |= result.headline()


# What both models write: answers to some test rows, and to a few prompts for human reading.

GREEDY, SAMPLED = "greedy", "sampled"


@dataclass(frozen=True)
class Replies:
    """What one model wrote.

    Attributes:
        answers: greedy, to the rows (see `Questions.told`).
        replies: {"greedy", "sampled"} to each prompt.
        found: what an interrupted run had already written of them, in words.
    """

    answers: list[dict[str, Any]]
    replies: list[dict[str, Any]]
    found: list[str]


def write_with(backend: TransformersBackend, questions: Questions, keep: Keep | None = None) -> Replies:
    """Let a model answer.

    Args:
        keep: of the model's scores; beside it every answer is kept as it comes.
    """
    ends, found = end_ids(questions.tokenizer), []

    def ask(asked: Sequence[Asked], what: str, drawn: Sampling | None = None) -> list[dict[str, Any]]:
        own, prompts = keep and keep.part(what.replace(" ", "-")), [one.ids for one in asked]
        written, done = write_all(backend, prompts, questions.most, ends, own, what, drawn)
        found.append(done)
        return questions.told(asked, written)

    answers = ask(questions.asked, "answers")
    for prompt in questions.prompts[:1]:
        backend.new_text()(prompt.ids)  # latencies of a model that is warm, whatever was found done
    greedy, drawn = ask(questions.prompts, "replies"), ask(questions.prompts, "drawn replies", questions.sampling)
    replies = [{GREEDY: one, SAMPLED: other} for one, other in zip(greedy, drawn, strict=True)]
    return Replies(answers, replies, found)


def generated_rows(questions: Questions, answers: Mapping[str, Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Question, reference and every model's answer to the chosen rows, one mapping a row."""
    made = []
    for place, (row, asked) in enumerate(zip(questions.rows, questions.asked, strict=True)):
        given = {name: own[place] for name, own in answers.items()}
        line = {"id": row["id"], "group": row["group"], "question": asked.question, "reference": asked.reference}
        line |= {name: answer["text"] for name, answer in given.items()}
        keys = ("ended", "tokens", "measured")
        made.append(line | {key: {name: answer[key] for name, answer in given.items()} for key in keys})
    return made


def prompts_json(
    questions: Questions, replies: Mapping[str, Sequence[dict[str, Any]]], conditions: dict[str, Any]
) -> dict[str, Any]:
    """The content of prompts.json.

    Returns:
        `conditions`, "decoding" (of "greedy" and "sampled"), "latency" (what the seconds are), "prompts": {"prompt",
        "reference", "answers": {model: {"greedy", "sampled"}}}, each answer as `Questions.told` gives it, a
        greedy one also `with_likeness` to the base's.
    """
    greedy = with_likeness({name: [reply[GREEDY] for reply in own] for name, own in replies.items()})
    most = {"max_new_tokens": questions.most}
    return {
        **conditions,
        "decoding": {GREEDY: most, SAMPLED: {**most, **asdict(questions.sampling)}},
        "latency": "first_token_seconds: reading the prompt, to the first token; tokens_per_second: the later tokens; "
        "one prompt at a time, the first one read once before to warm up",
        "prompts": [
            {**source, "answers": {name: {**own[place], GREEDY: greedy[name][place]} for name, own in replies.items()}}
            for place, source in enumerate(questions.sources)
        ],
    }


def _save_written(
    folder: Path, questions: Questions, wrote: Mapping[str, Replies], conditions: dict[str, Any]
) -> dict[str, Any]:
    """Save what the models wrote, for reading; what evaluation.json says of it in numbers."""
    answers = {results.SHOWN[name]: own.answers for name, own in wrote.items()}
    replies = {results.SHOWN[name]: own.replies for name, own in wrote.items()}
    write_jsonl(folder / results.GENERATED, generated_rows(questions, answers))
    write_json(folder / results.PROMPTS_FILE, prompts_json(questions, replies, conditions))
    return {**questions.conditions(), "answers": questions.summarise(answers, results.SHOWN[results.BASE])}
