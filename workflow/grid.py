"""The runs of a sweep: parameter files times a grid of settings; the table over a batch of exports.

workflow/Snakefile asks for both by command, in the workbook's own environment: what a job may ask for is decided by the
schema of parameter files, before any job starts.

    python -m workflow.grid plan < CONFIG.json      runs and bases with the options of `workbook report`; exports
    python -m workflow.grid table REPORT.json …     what `workbook export --json` said, as one Markdown table
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib import settings
from lib.errors import InputError
from lib.runs import files

SWEEP = {"params": None, "set": {}, "grid": {}, "files": True}
"""Keys of workflow/sweep.yaml, and what is taken where one is missing; None: it must be there."""
EXPORT = {"exports": None, "formats": "fp16,int8,int4", "options": [], "output": "exports"}
"""Those of workflow/export.yaml."""
COMMON = {"python": ".venv/bin/python"}
EMPTY_BASE = {"finetuning_type": settings.UNTRAINED, "adapter": "", "folds": 1}
"""Settings of a run that only fetches or makes what the runs of a sweep share: rows, tokenizer, base model."""


def plan(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the Snakefile makes of its configuration: "home", and the plan of a sweep or of a batch of exports.

    Raises:
        InputError: anything that `workbook report` or `workbook export` would refuse of these settings; two runs of one
            name.
    """
    known = EXPORT if "exports" in config else SWEEP
    for key in config:
        if key not in known | COMMON:
            names = ", ".join(known | COMMON)
            raise InputError(f"{key!r} in the file of the workflow.", f"one of {names}.", "correct or remove it.")
    if missing := [key for key, default in known.items() if default is None and not config.get(key)]:
        raise InputError(f"no {missing[0]} in the file of the workflow.", "see workflow/sweep.yaml.", "add it.")
    values = {**known, **config}
    return {"home": str(files.home()), **(_exports(values) if known is EXPORT else _sweep(values))}


# A sweep.


def _sweep(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sweep's "name", "files" (whether 04 to 07 are made), "runs" and "bases" by name.

    Each has "params" (the file) and "options" (of `workbook report`), a run also "base" (the name of its base).
    """
    profiles = [config["params"]] if isinstance(config["params"], str) else config["params"]
    common, grid = _parsed(config["set"] or {}), _axes(config["grid"] or {})
    shared = _keys_of_data() & set(grid)
    runs: dict[str, Any] = {}
    bases: dict[str, Any] = {}
    first = ""
    for profile in profiles:
        read = settings.load(profile, common)
        name, given = read.run_name, read.model_dump(exclude_unset=True)
        first = first or name
        for point in itertools.product(*grid.values()):
            chosen = dict(zip(grid, point, strict=True))
            own = {key: value for key, value in chosen.items() if key in shared}
            run, base = f"{name}{_suffix(chosen)}", f"{name}-base{_suffix(own)}"
            if run in runs:
                raise InputError(f"two runs {run!r}.", "a name for each.", "leave one of them out, or rename it.")
            runs[run] = {**_run(run, profile, given, common | chosen), "base": base}
            if base not in bases:
                bases[base] = _run(base, profile, given, common | own | EMPTY_BASE)
    return {"name": first, "files": bool(config["files"]), "runs": runs, "bases": bases}


def _run(name: str, profile: str, given: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, str]:
    """The parameter file, which gives these keys, and the options of a run; refused as `workbook report` would."""
    overrides = {**overrides, "run_name": name}
    settings.check({**given, **overrides}, profile, overrides)
    options = " ".join(f"-p {key} {shlex.quote(_text(value))}" for key, value in overrides.items())
    return {"params": profile, "options": options}


def _axes(grid: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The grid with values as a parameter file has them."""
    found = {}
    for key, values in grid.items():
        if key == "run_name" or not isinstance(values, list) or not values:
            what = f"grid: {key}: {values!r}"
            raise InputError(
                f"{what}.", "a key of parameter files with a list of values.", "write e.g. lora_r: [8, 16]."
            )
        found[key] = [_parsed({key: value})[key] for value in values]
    return found


def _parsed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as ``-p KEY VALUE`` reads them, so that 1e-3 is a number here, too."""
    return {key: settings.parse_override(key, _text(value)) for key, value in values.items()}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _suffix(values: Mapping[str, Any]) -> str:
    """What the values of a grid add to a run's name: -lora_r8-s42 (seeds as `workbook report --seeds` writes them)."""
    parts = (f"{'s' if key == 'train_seed' else key}{_short(value)}" for key, value in values.items())
    return "".join(f"-{part}" for part in parts)


def _short(value: Any) -> str:
    """A value in a file's name: of a path or a hub id the last part."""
    text = _text(value).rstrip("/").rpartition("/")[2] if isinstance(value, str) else _text(value)
    return re.sub(r"[^\w.-]+", "-", text).strip("-")


def _keys_of_data() -> set[str]:
    """The settings that notebook 01 takes: runs that differ in none of them share rows and base model."""
    from lib.report.runner import declared

    notebook = next(iter(sorted((files.PROJECT / "notebooks").glob("01_*.ipynb"))))
    return set(declared(notebook, settings.Settings().model_dump())) - {"run_name", "force", "language"}


# A batch of exports.


def _exports(config: Mapping[str, Any]) -> dict[str, Any]:
    """ "output", and "exports" by name: the arguments of `workbook export`, but for its folder."""
    from lib.pipeline.formats import read_formats

    read_formats(config["formats"])
    found = {}
    for name, entry in config["exports"].items():
        if not isinstance(entry, dict) or "checkpoint" not in entry or entry.keys() - {"checkpoint", "base_model"}:
            raise InputError(f"exports: {name}: {entry!r}.", "checkpoint, and base_model of an adapter.", "correct it.")
        if not re.fullmatch(r"[^\W_][\w.-]*", name):
            raise InputError(f"exports: {name!r}.", "a name of letters, digits, '.', '_' and '-'.", "rename it.")
        words = [entry["checkpoint"], *(["--base-model", entry["base_model"]] if entry.get("base_model") else [])]
        found[name] = shlex.join([*words, "--formats", config["formats"], *map(str, config["options"])])
    return {"output": config["output"], "exports": found}


def table(reports: Sequence[Path]) -> str:
    """One Markdown table over the reports of `workbook export --json`: the checkpoint's name before every format."""
    from lib.pipeline.papers import table_rows

    rows = [{"export": path.stem, **row} for path in reports for row in table_rows(files.read_json(path))]
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (names, ["---"] * len(names), *cells))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str]) -> int:
    """The exit code of the commands above: 2 where the workbook refuses something, which it says on stderr."""
    try:
        if arguments[0] == "plan":
            print(json.dumps(plan(json.load(sys.stdin)), ensure_ascii=False))
        else:
            print(table([Path(name) for name in arguments[1:]]))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
