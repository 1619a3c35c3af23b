"""What is written in the product `evaluation`: answers to some test rows, and to a few prompts for human reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lib.models.tasks import spread
from lib.scoring.generation import Sampling, end_ids, torch_feed
from lib.scoring.writing import Asked, Writing, ask_prompt, ask_row, told, write_all
from lib.textmetrics import TermList, read_prompts, read_terms

if TYPE_CHECKING:
    from lib.models.conversations import ConversationTask, EncodedConversation
    from lib.scoring import Keep, TransformersBackend
    from lib.settings import Settings

PROMPTS_FILE = "counselling_prompts.json"
GREEDY, SAMPLED = "greedy", "sampled"


@dataclass(frozen=True)
class Questions:
    """What every model is asked.

    Attributes:
        tokenizer, terms, thinking: of the run.
        chosen: numbers of the test rows that are answered.
        asked: those rows.
        prompts: the prompts behind them, rendered; sources: as the file has them. Both empty where nothing is written
            (generated_rows: 0).
        most: tokens at which an answer is cut.
        sampling: of the second answer to a prompt.
    """

    tokenizer: Any
    terms: TermList | None
    thinking: bool
    chosen: list[int]
    asked: list[Asked]
    prompts: list[Asked]
    sources: list[dict[str, str]]
    most: int
    sampling: Sampling

    @classmethod
    def of(
        cls,
        settings: Settings,
        tokenizer: Any,
        task: ConversationTask,
        rows: Sequence[dict[str, Any]],
        encoded: Sequence[EncodedConversation],
    ) -> Questions:
        """As the settings want it.

        Raises:
            InputError: no such list of terms or prompts.
        """
        writes = settings.generated_rows > 0
        chosen = spread(range(len(rows)), settings.generated_rows) if writes else []
        sources = read_prompts(settings.prompts_file) if writes else []
        return cls(
            tokenizer=tokenizer,
            terms=read_terms(settings.terms),
            thinking=task.thinking,
            chosen=chosen,
            asked=[ask_row(tokenizer, rows[i], encoded[i]) for i in chosen],
            prompts=[ask_prompt(tokenizer, task, source) for source in sources],
            sources=sources,
            most=settings.max_new_tokens,
            sampling=Sampling(seed=settings.seed),
        )


@dataclass(frozen=True)
class Replies:
    """What one model wrote.

    Attributes:
        answers: greedy, to the rows (see `told`).
        replies: {"greedy", "sampled"} to each prompt.
        found: what of them an interrupted try had written, in words.
    """

    answers: list[dict[str, Any]]
    replies: list[dict[str, Any]]
    found: list[str]


def write_with(backend: TransformersBackend, questions: Questions, keep: Keep | None = None) -> Replies:
    """Let a model answer.

    Args:
        keep: of the model's scores; beside it every answer is kept as it comes.
    """
    model, ends, found = backend.model, end_ids(questions.tokenizer), []

    def ask(asked: Sequence[Asked], what: str, drawn: Sampling | None = None) -> list[dict[str, Any]]:
        plan = Writing(questions.most, ends, drawn, keep and keep.part(what.replace(" ", "-")), backend.settings)
        written, done = write_all(lambda: torch_feed(model), asked, plan, what, backend.name)
        found.append(done)
        rest = (questions.terms, questions.thinking)
        return [told(questions.tokenizer, one, made, *rest) for one, made in zip(asked, written, strict=True)]

    answers = ask(questions.asked, "answers")
    for prompt in questions.prompts[:1]:
        torch_feed(model)(prompt.ids)  # latencies of a model that is warm, whatever was found done
    greedy, drawn = ask(questions.prompts, "replies"), ask(questions.prompts, "drawn replies", questions.sampling)
    replies = [{GREEDY: one, SAMPLED: other} for one, other in zip(greedy, drawn, strict=True)]
    return Replies(answers, replies, found)


def generated_rows(
    rows: Sequence[dict[str, Any]], questions: Questions, answers: Mapping[str, Sequence[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Question, reference and every model's answer to the chosen rows, one mapping a row."""
    made = []
    for place, (number, asked) in enumerate(zip(questions.chosen, questions.asked, strict=True)):
        given = {name: own[place] for name, own in answers.items()}
        row = {"id": rows[number]["id"], "group": rows[number]["group"]}
        row |= {"question": asked.question, "reference": asked.reference}
        row |= {name: answer["text"] for name, answer in given.items()}
        keys = ("ended", "tokens", "measured")
        made.append(row | {key: {name: answer[key] for name, answer in given.items()} for key in keys})
    return made


def prompts_json(
    questions: Questions, replies: Mapping[str, Sequence[dict[str, Any]]], conditions: dict[str, Any]
) -> dict[str, Any]:
    """The content of counselling_prompts.json.

    Returns:
        `conditions`, "decoding" (of "greedy" and "sampled"), "latency" (what the seconds are), "prompts": {"prompt",
        "reference", "answers": {model: {"greedy", "sampled"}}}, each answer as `told` gives it.
    """
    most = {"max_new_tokens": questions.most}
    return {
        **conditions,
        "decoding": {GREEDY: most, SAMPLED: {**most, **questions.sampling.to_json()}},
        "latency": "first_token_seconds: reading the prompt, to the first token; tokens_per_second: the later tokens; "
        "one prompt at a time, the first one read once before to warm up",
        "prompts": [
            {**source, "answers": {name: own[place] for name, own in replies.items()}}
            for place, source in enumerate(questions.sources)
        ],
    }
