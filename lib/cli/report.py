"""The keys of a parameter file, from the schema itself.
What `workbook report` does: one run, or one a seed of training and the choice among them.
"""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

import typer

from lib.cli.console import show, tell
from lib.errors import InputError
from lib.settings import Settings

# The keys of a parameter file, from the schema itself.


def _type_words(annotation: Any) -> str:
    """A key's type in words: 'one of …', 'list of text', 'number'."""
    words = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    if typing.get_origin(annotation) is typing.Literal:
        return "one of " + ", ".join(typing.get_args(annotation))
    if typing.get_origin(annotation) is list:
        return f"list of {words.get(typing.get_args(annotation)[0], 'values')}"
    return words.get(annotation, str(annotation))


def keys() -> list[dict[str, Any]]:
    """Name, type, default and meaning of every key, in the order of the stages."""
    return [
        {
            "key": name,
            "type": _type_words(field.annotation),
            "default": field.default,
            "meaning": field.description or "",
        }
        for name, field in Settings.model_fields.items()
    ]


def as_text(found: list[dict[str, Any]]) -> str:
    """One paragraph a key."""
    return "\n".join(
        f"{key['key']}: {json.dumps(key['default'], ensure_ascii=False)}\n    {key['meaning']} ({key['type']})"
        for key in found
    )


# What `workbook report` does: one run, or one a seed of training and the choice among them.

FAST = {"max_train_rows": 300, "max_eval_rows": 120, "perplexity_tokens": 1024, "imatrix_chunks": 8}
"""Most rows and tokens of a run with `--fast`: enough to see every page, too few for most verdicts."""


def report(
    params_file: Path,
    pairs: list[str],
    start_from: str | None,
    end_at: str | None,
    seeds: int,
    fast: bool,
    timeout: float,
    as_json: bool,
) -> None:
    """Run the notebooks and print where the pages are; with several seeds also which run is taken."""
    from lib import settings

    texts = [text.partition("=") for text in pairs]
    given = {key: settings.parse_override(key, value) for key, _, value in texts}
    overrides = with_fewer_rows(settings, params_file, given) if fast else given
    if seeds == 1:
        made = _one(params_file, overrides, start_from, end_at, timeout)
        show(made, as_json, made["index"])
        return
    siblings = seed_overrides(settings.load(params_file, overrides), seeds)
    results = [_one(params_file, overrides | own, start_from, end_at, timeout) for own in siblings]
    from lib.cli.select import choose

    choice = choose([own["run_name"] for own in siblings], None)
    text = "\n".join([*(made["index"] for made in results), choice["text"]])
    show({"runs": results, "choice": choice}, as_json, text)


def with_fewer_rows(settings: Any, params_file: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The overrides of `--fast`: keys that were given stay, but the run name is never that of the whole run."""
    fewer = fast_overrides(settings.load(params_file, given))
    return {**fewer, **given, "run_name": fewer["run_name"]}


def fast_overrides(settings: Any) -> dict[str, Any]:
    """What `--fast` replaces: at most the rows and tokens of `FAST`, under a run name of their own."""
    fewer = {key: most for key, most in FAST.items() if not 0 < getattr(settings, key) <= most}
    fewer["perplexity_tokens"] = max(fewer.get("perplexity_tokens", settings.perplexity_tokens), settings.n_ctx)
    return {**fewer, "run_name": f"{settings.run_name}-fast"}


def seed_overrides(settings: Any, seeds: int) -> list[dict[str, Any]]:
    """run_name and train_seed of sibling runs: RUN-s42, RUN-s43, … The split's seed stays the same in all.

    Raises:
        InputError: an adapter that is adopted, for which no seed is used.
    """
    if settings.adapter:
        raise InputError(
            f"--seeds {seeds} with adapter {settings.adapter!r}.",
            "a training: an adopted adapter has no seed.",
            "leave out --seeds, or set adapter to nothing.",
        )
    first = settings.training_seed
    return [{"run_name": f"{settings.run_name}-s{seed}", "train_seed": seed} for seed in range(first, first + seeds)]


def _one(
    params_file: Path, overrides: dict[str, Any], start_from: str | None, end_at: str | None, timeout: float
) -> dict[str, Any]:
    from lib.report.runner import ReportError, run_report

    try:
        made = run_report(params_file, overrides, start_from, end_at=end_at, timeout=timeout)
    except ReportError as error:
        tell(str(error))
        if error.detail:
            tell(error.detail)
        if error.evidence:
            tell(f"The partial notebook is kept: {error.evidence}")
        raise typer.Exit(error.exit_code) from None
    return {
        "run": made.run,
        "index": str(made.index),
        "pages": [str(page) for page in made.pages],
        "seconds": round(made.seconds, 1),
    }
