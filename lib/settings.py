"""The parameters of a run: every key with its type, default and meaning, and how they are read and checked."""

from __future__ import annotations

import ast
import contextlib
import difflib
import json
import math
import os
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
from lib.language import HELP, told, translated
from lib.progress import say

# Names of the formats that a model can be stored in. No library is needed to know them.


def _table(name: str) -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name(name).read_text(encoding="utf-8"))


_FORMATS = _table("formats.yaml")
_ERRORS = _table("settings_errors.yaml")
QUANTIZATION_TYPES, IMATRIX_TYPES = tuple(_FORMATS["quantization"]), tuple(_FORMATS["imatrix"])
UNQUANTIZED = tuple(_FORMATS["unquantized"])
TENSOR_TYPES, EXPORT_FORMATS = tuple(_FORMATS["tensor"]), tuple(_FORMATS["export"])

NF4 = "nf4"
"""The export format that rounds the matrices of the layers to 16 values a block (Dettmers et al. 2023)."""


def mix_name(budget: int) -> str:
    """What stands in place of a type for a file under a budget of so many bytes: MIX_300MB, MIX_1968KB."""
    return f"MIX_{budget // 10**6}MB" if budget % 10**6 == 0 else f"MIX_{budget / 1000:.0f}KB"


GRID_SIZABLE = 0.1
"""Share of a file's weights in types on the grid of the base's own weights from which tables mark the file."""


# The schema of a parameter file. The defaults are the values of params/quick.yaml.

RUN_VARIABLE = "WORKBOOK_RUN"
"""Environment variable: the run of notebooks that somebody works in by hand."""

OFFLINE_BASE = "offline"
SAMPLES = {"sample": "classification", "sample-ner": "instruction", "sample-qa": "instruction"}
"""The sample corpora that the workbook makes, and the tasks of their rows."""
UNTRAINED = "none"
"""The finetuning_type of a run whose base model goes through it as it is."""
FULL = "full"
"""The finetuning_type of a run in which every weight of the model is trained."""
OF_ADAPTERS = ("use_rslora", "use_dora", "init_lora_weights", "loraplus_lr_ratio")
"""Keys that ask for a variant of LoRA."""
DEQUANTIZED = "dequantized"
"""The merge_base of an adapter that goes into the weights as they were rounded to 4 bits."""
TAKEN_OUT, LOFTQ = ("pissa", "olora"), "loftq"
"""Beginnings of `init_lora_weights` that take a part out of the base, and that make up for its rounding to 4 bits."""
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


MOST_LABELS = 1000


def _distinct_labels(value: list[str]) -> list[str]:
    if len(set(value)) != len(value) or any(not name.strip() for name in value):
        raise ValueError("expected distinct, non-empty names")
    if len(value) > MOST_LABELS:
        raise ValueError(f"expected at most {MOST_LABELS:,} names: each is compared with every other")
    first: dict[str, str] = {}
    for name in value:
        if (same := first.setdefault(folded(name), name)) != name:
            raise ValueError(f"expected names that differ when labels are read; {same!r} and {name!r} do not")
    if spaced := [name for name in value if name != name.strip()]:
        raise ValueError(_ERRORS["spaces"].format(name=spaced[0]))
    return value


def _no_address(value: str) -> str:
    if "://" in value:
        raise ValueError(_ERRORS["address"])
    return value


def _known_fallbacks(value: list[dict[str, str | int]]) -> list[dict[str, str | int]]:
    for entry in value:
        typed = all(type(v) is (int if k == "rows" else str) and v for k, v in entry.items())
        known = entry.keys() <= {"base_model", "dataset", "revision", "rows", "sha256"}
        hashed = re.fullmatch("[0-9a-fA-F]{64}", str(entry.get("sha256", "0" * 64)))
        counted = "rows" not in entry or ("dataset" in entry and typed and entry["rows"] > 0)
        if not (typed and known and hashed and counted and ("base_model" in entry) != ("dataset" in entry)):
            raise ValueError(_ERRORS["fallbacks"].format(entry=entry))
        _no_address(str(entry.get("base_model", entry.get("dataset"))))
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


def _no_control_characters(value: Any) -> Any:
    texts = value if isinstance(value, list) else [value]
    for text in (text for text in texts if isinstance(text, str)):
        if found := re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", text):
            raise ValueError(_ERRORS["control"].format(character=ord(found[0])))
    return value


def _share_or_updates(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError(_ERRORS["updates"].format(steps=value))
    return value


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "run_name": _slug,
    **dict.fromkeys(("base_model", "adapter", "dataset"), _no_address),
    "label_names": _distinct_labels,
    "user_prompt": _one_text,
    "system_prompt": _no_slot,
    "fallbacks": _known_fallbacks,
    "ladder": partial(
        _each_known_once,
        known=(*UNQUANTIZED, *QUANTIZATION_TYPES, *IMATRIX_TYPES),
        what="quantization type",
        usual=str.upper,
    ),
    "tensor_types": _regex_and_type,
    "output_tensor_type": _tensor_type,
    "warmup_steps": _share_or_updates,
    "token_embedding_type": _tensor_type,
    "export_formats": partial(_each_known_once, known=EXPORT_FORMATS, what="export format", usual=str.lower),
}


def _field(key: str, default: Any, meaning: str, one_of: Sequence[str] = (), **limits: float) -> tuple[Any, Any]:
    """Type and limits of a key of settings.yaml."""
    kind: Any = Literal[tuple(one_of)] if one_of else type(default)
    if kind is list:
        kind = list[dict[str, str | int]] if key == "fallbacks" else list[str]
    checks = [] if one_of else [AfterValidator(check) for check in (_no_control_characters, _CHECKS.get(key)) if check]
    checked = Annotated[(kind, *checks)] if checks else kind
    return checked, Field(default, description=meaning, **limits)


_Keys: Any = create_model("_Keys", **{key: _field(key, **entry) for key, entry in _table("settings.yaml").items()})


_OF_ANSWERS, _OF_LABELS = (
    {key: _Keys.model_fields[key].default for key in keys}
    for keys in (
        ("answer_metric", "terms", "prompts_file"),
        ("text_column", "label_column", "label_names", "user_prompt"),
    )
)
"""Keys that only rows without labels use, and only rows with labels, and their defaults."""


PART = "part"
"""Validation context of a notebook's parameters, which are a part of a run's: the task may not be among them."""


class Settings(_Keys):
    """All parameters of a run: the keys of settings.yaml."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Settings:
        part = info.context == PART and "task" not in self.model_fields_set
        rounded = self.merge_base == DEQUANTIZED or (info.context == PART and "merge_base" not in self.model_fields_set)
        usual = _Keys.model_fields
        labelled, needing = self.task == "classification", [name for name in self.ladder if name in IMATRIX_TYPES]
        found = {
            "matrix": needing and self.imatrix in ("", "none"),
            "budgets": self.size_budget_mb and self.size_budget_bpw,
            "window": self.perplexity_tokens < self.n_ctx,
            "sample": SAMPLES.get(self.dataset, self.task) != self.task,
            "folds": self.folds > 1 and self.adapter,
            "answers": self.answer_metric != "none" and not self.generated_rows,
            "untrained_folds": self.folds > 1 and self.finetuning_type == UNTRAINED,
            "untrained_adapter": self.adapter and self.finetuning_type == UNTRAINED,
            "full_adapter": self.adapter and self.finetuning_type == FULL,
            "full_4bit": self.load_in_4bit and self.finetuning_type == FULL,
            "taught": self.teacher and (self.adapter or self.finetuning_type == UNTRAINED or self.folds > 1),
            "no_teacher": not self.teacher and self.distillation_weight != usual["distillation_weight"].default,
            "qat": self.qat != "none" and self.finetuning_type != FULL,
            "full_variant": self.finetuning_type == FULL and self.variants,
            "taken_out": self.load_in_4bit and str(self.init_lora_weights).startswith(TAKEN_OUT),
            "loftq": self.init_lora_weights == LOFTQ and not (self.load_in_4bit and rounded),
            "fsdp_alone": self.sharded and self.num_processes < 2,
            "fsdp_full": self.sharded and self.finetuning_type == FULL,
            "fsdp_4bit": self.sharded and self.load_in_4bit,
            "thinking": labelled and self.thinking,
            "prompt": not labelled and self.system_prompt == SENTIMENT_PROMPT,
        }
        if first := next((text for name, text in _ERRORS["contradictions"].items() if found[name]), None):
            values: dict[str, Any] = {
                "variants": ", ".join(self.variants),
                "needing": ", ".join(needing),
                "prompt": SENTIMENT_PROMPT,
                "sample": SAMPLES.get(self.dataset),
            }
            raise ValueError(first.format(own=self, **values))
        for key, default in ({} if part else _OF_ANSWERS if labelled else _OF_LABELS).items():
            if getattr(self, key) != default:
                raise ValueError(f"{key} has no effect with task {self.task}: leave it out")
        return self

    @property
    def training_seed(self) -> int:
        """The seed that training uses: `train_seed` where it is given, else `seed`."""
        return self.seed if self.train_seed < 0 else self.train_seed

    @property
    def sharded(self) -> bool:
        """Whether each process holds a share of the base alone."""
        return self.fsdp != "none"

    @property
    def variants(self) -> list[str]:
        """The keys of `OF_ADAPTERS` that are set."""
        return [key for key in OF_ADAPTERS if getattr(self, key) != _Keys.model_fields[key].default]

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
            plain = format(number, ".12g") if error["type"] == "int_type" else yaml_value(number)
            return refusal("lib/number-as-text", key=key, value=value, place=place, plain=plain)
    do = f"correct {key} ({Settings.model_fields[key].description})."
    shown = re.sub(r"://\S*@", "://…@", repr(value))  # a password is told nobody
    return InputError(f"{key}: {shown} {place}.", f"{message[0].lower()}{message[1:]}.", do)


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


_DATA = (".csv", ".tsv", ".xlsx", ".jsonl", ".parquet")
"""Ends of names of data, which a parameter file has none of."""


def load(path: Path | str, overrides: dict[str, Any] | None = None) -> Settings:
    """Read a parameter file.

    Args:
        path: flat YAML, UTF-8.
        overrides: keys that replace those of the file (the command line's ``-p``).

    Raises:
        InputError: missing file, not YAML, not a flat mapping, or any refused key.
    """
    path = Path(path)
    if path.is_dir():
        raise refusal("lib/data-file", path=path)
    if not path.is_file():
        near = sorted(p.as_posix() for p in Path("params").glob("*.yaml"))
        known = ", ".join(near) if near else "params/quick.yaml of a clone"
        raise InputError(f"no file {path}.", "a parameter file (flat YAML).", f"use one of: {known}.")
    if path.suffix.lower() in _DATA:
        raise refusal("lib/data-file", path=path)
    with refusing(UnicodeDecodeError, "lib/file-no-text", path=path):
        text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        raise refusal("lib/data-file", path=path)
    values = parameter_file.parse(text, str(path), _texts())
    return check({**values, **(overrides or {})}, str(path), overrides or ())


def as_yaml(values: dict[str, Any]) -> str:
    """Parameters as the text of a parameter file, each with its meaning and, where it differs, its default."""
    lines = []
    for key, value in values.items():
        field = Settings.model_fields[key]
        default = "" if value == field.default else told(f" (default: {yaml_value(field.default)})")
        lines.append(f"{key}: {yaml_value(value)}  # {translated(field.description, HELP)}{default}")
    return "\n".join(lines)


def yaml_value(value: Any) -> str:
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

    Names that papermill injected and the workbook does not know are refused (papermill itself only warns). A run_name
    that is neither injected nor changed in the parameters cell is that of `RUN_VARIABLE`, where it is set: by hand the
    seven notebooks are of one run, whose name is set once.
    """
    fields = Settings.model_fields
    known = {key: namespace[key] for key in fields if key in namespace}
    injected: dict[str, Any] = {}
    for source in namespace.get("In", []):
        if source.startswith("# Parameters\n"):
            targets = [t for node in ast.parse(source).body if isinstance(node, ast.Assign) for t in node.targets]
            injected |= {t.id: namespace.get(t.id) for t in targets if isinstance(t, ast.Name)}
    unknown = {key: value for key, value in injected.items() if key not in fields}
    where = "the parameters of this notebook"
    name, default = os.environ.get(RUN_VARIABLE, ""), fields["run_name"].default
    if name and "run_name" not in injected and known.get("run_name", default) == default != name:
        known["run_name"], where = name, f"{where}, whose run_name is {RUN_VARIABLE}"
        say(f"run {name}, as {RUN_VARIABLE} says")
    return check({**known, **unknown}, where, context=PART)
