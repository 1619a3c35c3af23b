"""The parameters of a run: every key with its type, default and meaning, and how they are read and checked."""

from __future__ import annotations

import ast
import contextlib
import difflib
import itertools
import json
import math
import re
import unicodedata
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
    model_validator,
)

from lib import parameter_file
from lib.errors import InputError, refusal, refusing

# Names of the formats that a model can be stored in. No library is needed to know them.


def _table(name: str) -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name(name).read_text(encoding="utf-8"))


_FORMATS = _table("formats.yaml")
_ERRORS = _table("settings_errors.yaml")
QUANTIZATION_TYPES, IMATRIX_TYPES = tuple(_FORMATS["quantization"]), tuple(_FORMATS["imatrix"])
TENSOR_TYPES, EXPORT_FORMATS = tuple(_FORMATS["tensor"]), tuple(_FORMATS["export"])

NF4 = "nf4"
"""The export format that rounds the matrices of the layers to 16 values a block (Dettmers et al. 2023)."""


def mix_name(budget: int) -> str:
    """What stands in place of a type for a file under a budget of so many bytes: MIX_300MB, MIX_1968KB."""
    return f"MIX_{budget // 10**6}MB" if budget % 10**6 == 0 else f"MIX_{budget / 1000:.0f}KB"


GRID_SIZABLE = 0.1
"""Share of a file's weights in types on the grid of the base's own weights from which tables mark the file."""


# The schema of a parameter file. The defaults are the values of params/quick.yaml.

OFFLINE_BASE = "offline"
SAMPLE_DATASET = "sample"
SENTIMENT_PROMPT = "你是情感分析助手。"


def _slug(value: str) -> str:
    if not re.fullmatch(r"[^\W_][\w.-]{0,79}", value):
        raise ValueError("expected letters, digits, '.', '_' or '-', starting with a letter or digit")
    return value


def folded(value: Any) -> str:
    """A label as it is compared: without capitals, forms of Unicode, and what stands around a whole number."""
    text = unicodedata.normalize("NFKC", str(value)).strip().casefold()
    whole = re.fullmatch(r"\+?0*([0-9]+)(\.0*)?", text)
    return whole[1] if whole else text


def _distinct_labels(value: list[str]) -> list[str]:
    if len(set(value)) != len(value) or any(not name.strip() for name in value):
        raise ValueError("expected distinct, non-empty names")
    if same := next((pair for pair in itertools.combinations(value, 2) if folded(pair[0]) == folded(pair[1])), None):
        raise ValueError(f"expected names that differ when labels are read; {same[0]!r} and {same[1]!r} do not")
    if spaced := [name for name in value if name != name.strip()]:
        raise ValueError(_ERRORS["spaces"].format(name=spaced[0]))
    return value


def _known_fallbacks(value: list[dict[str, str | int]]) -> list[dict[str, str | int]]:
    for entry in value:
        typed = all(type(v) is (int if k == "rows" else str) and v for k, v in entry.items())
        known = entry.keys() <= {"base_model", "dataset", "revision", "rows", "sha256"}
        hashed = re.fullmatch("[0-9a-fA-F]{64}", str(entry.get("sha256", "0" * 64)))
        counted = "rows" not in entry or ("dataset" in entry and typed and entry["rows"] > 0)
        if not (typed and known and hashed and counted and ("base_model" in entry) != ("dataset" in entry)):
            raise ValueError(_ERRORS["fallbacks"].format(entry=entry))
    return value


def _no_slot(value: str) -> str:
    if slot := next((slot for slot in ("{text}", "{label_names}", "{labels}") if slot in value), None):
        raise ValueError(f"{slot} would reach the model as it is: a system turn is never filled in")
    return value


def _one_text(value: str) -> str:
    if value.count("{text}") != 1 or "{{text}}" in value or "${text}" in value:
        raise ValueError("expected exactly one {text}, without further braces or $ (they would reach the model)")
    if other := re.search(r"\{(?!text\})[^\W\d]\w*\}", value):
        raise ValueError(_ERRORS["slot"].format(slot=other[0]))
    return value


def _each_known_once(value: list[str], known: Sequence[str], what: str, usual: Callable[[str], str]) -> list[str]:
    """The names, if all are known and none occurs twice; `usual` gives a name the case of the known ones."""
    for name in value:
        if name not in known:
            near = difflib.get_close_matches(usual(name), known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"unknown {what} {name!r}{hint} Known: {', '.join(known)}")
    if len(set(value)) != len(value):
        raise ValueError(f"expected each {what.split()[-1]} once")
    return value


def _regex_and_type(value: list[str]) -> list[str]:
    for entry in value:
        pattern, _, name = entry.partition("=")
        if not pattern or name.lower() not in map(str.lower, TENSOR_TYPES):
            raise ValueError(f"expected REGEX=TYPE, e.g. attn_v=q8_0. Types: {', '.join(TENSOR_TYPES)}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression ({error})") from None
        if pattern != pattern.lower():
            raise ValueError(f"{pattern!r} has capital letters, which llama-quantize lowers: write it in lower case")
    return value


def _tensor_type(value: str) -> str:
    if value and value.lower() not in map(str.lower, TENSOR_TYPES):
        raise ValueError(f"expected the type of one tensor: {', '.join(TENSOR_TYPES)}")
    return value


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "run_name": _slug,
    "label_names": _distinct_labels,
    "user_prompt": _one_text,
    "system_prompt": _no_slot,
    "fallbacks": _known_fallbacks,
    "ladder": partial(
        _each_known_once, known=(*QUANTIZATION_TYPES, *IMATRIX_TYPES), what="quantization type", usual=str.upper
    ),
    "tensor_types": _regex_and_type,
    "output_tensor_type": _tensor_type,
    "token_embedding_type": _tensor_type,
    "export_formats": partial(_each_known_once, known=EXPORT_FORMATS, what="export format", usual=str.lower),
}


def _field(key: str, default: Any, meaning: str, one_of: Sequence[str] = (), **limits: float) -> tuple[Any, Any]:
    """Type and limits of a key of settings.yaml."""
    kind: Any = Literal[tuple(one_of)] if one_of else type(default)
    if kind is list:
        kind = list[dict[str, str | int]] if key == "fallbacks" else list[str]
    checked = Annotated[kind, AfterValidator(_CHECKS[key])] if key in _CHECKS else kind
    return checked, Field(default, description=meaning, **limits)


_Keys: Any = create_model("_Keys", **{key: _field(key, **entry) for key, entry in _table("settings.yaml").items()})


_OF_ANSWERS, _OF_LABELS = (
    {key: _Keys.model_fields[key].default for key in keys}
    for keys in (("terms", "prompts_file"), ("text_column", "label_column", "label_names", "user_prompt"))
)
"""Keys that only rows without labels use, and only rows with labels, and their defaults."""


PART = "part"
"""Validation context of a notebook's parameters, which are a part of a run's: the task may not be among them."""


class Settings(_Keys):
    """All parameters of a run: the keys of settings.yaml."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Settings:
        part = info.context == PART and "task" not in self.model_fields_set
        labelled, needing = self.task == "classification", [name for name in self.ladder if name in IMATRIX_TYPES]
        found = {
            "matrix": needing and self.imatrix in ("", "none"),
            "budgets": self.size_budget_mb and self.size_budget_bpw,
            "window": self.perplexity_tokens < self.n_ctx,
            "sample": not labelled and self.dataset == SAMPLE_DATASET,
            "folds": self.folds > 1 and self.adapter,
            "thinking": labelled and self.thinking,
            "prompt": not labelled and self.system_prompt == SENTIMENT_PROMPT,
        }
        if first := next((text for name, text in _ERRORS["contradictions"].items() if found[name]), None):
            raise ValueError(first.format(own=self, needing=", ".join(needing), prompt=SENTIMENT_PROMPT))
        for key, default in ({} if part else _OF_ANSWERS if labelled else _OF_LABELS).items():
            if getattr(self, key) != default:
                raise ValueError(f"{key} has no effect with task {self.task}: leave it out")
        return self

    @property
    def training_seed(self) -> int:
        """The seed that training uses: `train_seed` where it is given, else `seed`."""
        return self.seed if self.train_seed < 0 else self.train_seed

    @property
    def size_budget(self) -> str:
        """The key that sets a size budget; empty without one."""
        return next((key for key in ("size_budget_mb", "size_budget_bpw") if getattr(self, key)), "")

    def pick(self, *keys: str) -> dict[str, Any]:
        """The named keys with their values, in that order: the parameters a stage depends on."""
        return {key: getattr(self, key) for key in keys}


# Parameters from a file, the command line or a notebook, checked against the schema.
#
# A parameter file is flat YAML; unknown keys, wrong types and contradictions are refused in one sentence that names the
# key, the value and what was expected.


def _sentence(place: str, error: dict[str, Any]) -> InputError:
    """One pydantic error as found – expected – do this; `place`: "in FILE", or "given by -p"."""
    key, value, message = str(next(iter(error["loc"]), "")), error["input"], error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return InputError(f"a contradiction {place}.", f"{message}.", "change one of the two.")
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, Settings.model_fields, 1)
        do = f"write {near[0]!r}." if near else "remove it; `workbook params` lists every key."
        return InputError(f"unknown parameter {key!r} {place}.", "a key of the workbook.", do)
    if isinstance(value, str) and error["type"] in ("float_type", "int_type"):
        with contextlib.suppress(ValueError):  # any other text
            number = float(value)
            if not math.isfinite(number):
                raise ValueError(value)
            plain = format(number, ".12g") if error["type"] == "int_type" else _yaml_value(number)
            return refusal("lib/number-as-text", key=key, value=value, place=place, plain=plain)
    do = f"correct {key} ({Settings.model_fields[key].description})."
    return InputError(f"{key}: {value!r} {place}.", f"{message[0].lower()}{message[1:]}.", do)


def check(values: dict[str, Any], where: str, replaced: Collection[str] = (), context: str | None = None) -> Settings:
    """Validate a mapping of parameters.

    Args:
        where: the file or notebook that they come from, but for `replaced`, which were given by -p.
        context: `PART` where they are only some of a run's.

    Raises:
        InputError: the first problem, with the number of further ones.
    """
    try:
        return Settings.model_validate(values, context=context)
    except ValidationError as error:
        first, *others = error.errors()
        by_hand = bool(first["loc"]) and first["loc"][0] in replaced
        problem = _sentence("given by -p" if by_hand else f"in {where}", first)
        if others:
            problem = InputError(problem.found, problem.expected, f"{problem.do} ({len(others)} more after this one.)")
        raise problem from None
    except TypeError:
        raise refusal("lib/key-no-text", where=where) from None


def load(path: Path | str, overrides: dict[str, Any] | None = None) -> Settings:
    """Read a parameter file.

    Args:
        path: flat YAML, UTF-8.
        overrides: keys that replace those of the file (the command line's ``-p``).

    Raises:
        InputError: missing file, not YAML, not a flat mapping, or any refused key.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(p.as_posix() for p in Path("params").glob("*.yaml"))
        known = ", ".join(near) if near else "params/quick.yaml of a clone"
        raise InputError(f"no file {path}.", "a parameter file (flat YAML).", f"use one of: {known}.")
    with refusing(UnicodeDecodeError, "lib/file-no-text", path=path):
        text = path.read_text(encoding="utf-8-sig")
    values = parameter_file.parse(text, str(path), _texts())
    return check({**values, **(overrides or {})}, str(path), overrides or ())


def as_yaml(values: dict[str, Any]) -> str:
    """Parameters as the text of a parameter file, each with its meaning and, where it differs, its default."""
    lines = []
    for key, value in values.items():
        field = Settings.model_fields[key]
        default = "" if value == field.default else f" (default: {_yaml_value(field.default)})"
        lines.append(f"{key}: {_yaml_value(value)}  # {field.description}{default}")
    return "\n".join(lines)


def _yaml_value(value: Any) -> str:
    """JSON, which is YAML but for an exponent without a dot and for characters that nobody sees."""
    text = "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in json.dumps(value, ensure_ascii=False))
    return text.replace("e", ".0e") if isinstance(value, float) and "." not in text else text


def parse_override(key: str, text: str) -> Any:
    """The value of ``-p KEY TEXT``: as in a parameter file; a text needs no marks, and a list no brackets.

    Raises:
        InputError: something that YAML reads otherwise than it looks.
    """
    kind = Settings.model_fields[key].annotation if key in Settings.model_fields else None
    if kind is str:
        parameter_file.refuse_escape(key, text, f"-p {key}")
        return text
    if kind == list[str] and not text.lstrip().startswith("["):
        if text.lstrip()[:1] not in ('"', "'"):
            return [part.strip() for part in text.split(",")]
        text = f"[{text}]"
    return parameter_file.parse_value(text, key, key in _texts())


def _texts() -> set[str]:
    """Keys whose values are texts or lists of texts, whatever they look like; also those inside `fallbacks`."""
    kinds = (str, list[str])
    return {key for key, field in Settings.model_fields.items() if field.annotation in kinds} | {"sha256"}


def from_notebook(namespace: dict[str, Any]) -> Settings:
    """Settings from a notebook's variables: call it as ``from_notebook(globals())`` after the parameters cell.

    Names that papermill injected and the workbook does not know are refused (papermill itself only warns).
    """
    fields = Settings.model_fields
    known = {key: namespace[key] for key in fields if key in namespace}
    injected: dict[str, Any] = {}
    for source in namespace.get("In", []):
        if source.startswith("# Parameters\n"):
            targets = [t for node in ast.parse(source).body if isinstance(node, ast.Assign) for t in node.targets]
            injected |= {t.id: namespace.get(t.id) for t in targets if isinstance(t, ast.Name)}
    unknown = {key: value for key, value in injected.items() if key not in fields}
    return check({**known, **unknown}, "the parameters of this notebook", context=PART)
