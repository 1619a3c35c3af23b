"""The stage `data`: read, clean, audit, split, measure, and write the product."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError, refusal
from lib.models import loading
from lib.models.base_model import Base, choose_base, refuse_without_template, resolve_base
from lib.models.offline_base import ensure_tokenizer
from lib.models.tokenizer_files import FILES, copy_tokenizer
from lib.models.unpack import RECORD as UNPACKED
from lib.prompts.tasks import Task, read_task, task_of, texts_of
from lib.runs.files import read_json, read_jsonl, user_path, write_json, write_jsonl
from lib.runs.run import Product, ProductDraft, Run
from lib.scoring.metric import rows_of_folds
from lib.settings import OFFLINE_BASE, SAMPLES, Settings, folded
from lib.stages.data import near_duplicates, sample
from lib.stages.data.beside import classes_beside
from lib.stages.data.cleaning import UNASKED, LabelledRows, Row, Splits, clean_split, unlabelled
from lib.stages.data.data_files import file_fingerprint
from lib.stages.data.dialogues import Conversations, clean_conversations
from lib.stages.data.reading import SPLITS, Table, choose_data, read_table
from lib.stages.data.text_audit import audit_texts, token_lengths, worked_example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = LabelledRows | Conversations

STAMPS = {
    (True, True): "offline base model, sample data: not a result about Qwen or {corpus}",
    (True, False): "offline base model: not a result about Qwen",
    (False, True): "sample data: not a result about {corpus}",
}
"""What every page must say, by (offline base, sample data)."""


@dataclass(frozen=True)
class DataResult:
    """The product `data` for readers.

    Attributes:
        product: folder and manifest entry.
        task: prompts, label names, length limit.
        source: where the rows really came from, in words.
        split_rule: how the split came about, in words.
        flow: rows read, dropped (and why), used; one dict a step, ready to be a table.
        changes: what was changed in texts or files, and how often.
        balance: rows a label and split; without labels rows and turns a split.
        duplicates: copies and conflicts within each split, and over all rows.
        overlaps: rows of one split that are copies of another's, as read.
        overlaps_used: the same after splitting (equal to `overlaps` when the split is the given one).
        leaked_examples: after splitting, as text. conflict_examples: as read.
        lengths: tokens of each used row, by split; length_table: percentiles and truncated share.
        example: one row as the model sees it (see `worked_example`).
        floor: the linear floor (see `baseline.linear_floor`); empty without labels: there is nothing to classify.
        text_audit: what the characters of the used rows are (see `text_audit.audit_texts`).
    """

    product: Product
    task: Task
    source: str
    split_rule: str
    flow: list[dict[str, Any]]
    changes: dict[str, int]
    balance: list[dict[str, Any]]
    duplicates: list[dict[str, Any]]
    overlaps: list[dict[str, Any]]
    overlaps_used: list[dict[str, Any]]
    leaked_examples: list[dict[str, Any]]
    conflict_examples: list[dict[str, Any]]
    lengths: dict[str, list[int]]
    length_table: list[dict[str, Any]]
    example: dict[str, Any]
    floor: dict[str, Any]
    text_audit: dict[str, Any]

    @classmethod
    def read(cls, product: Product) -> DataResult:
        """From the product's files."""
        folder = product.path
        floor = read_json(folder / "floor.json") if (folder / "floor.json").is_file() else {}
        return cls(product=product, task=read_task(folder), floor=floor, **read_json(folder / "audit.json"))

    @property
    def folds(self) -> int:
        """How many models are trained, so that every row is a test row once; 1 = the rows are divided once."""
        return self.product.entry.facts.get("folds", 1)

    def tested(self) -> list[dict[str, Any]]:
        """The test rows, of all folds that are there."""
        others = [self.product.path.parent / f"fold-{i}" / "data" / "test.jsonl" for i in range(2, self.folds + 1)]
        return rows_of_folds([self.rows("test"), *(read_jsonl(path) for path in others if path.is_file())])

    def rows(self, split: str) -> list[dict[str, Any]]:
        """The rows of a split: id, text and label (or messages), group, leaked, and what else they brought."""
        return read_jsonl(self.product.path / f"{split}.jsonl")


def prepare(settings: Settings, run: Run) -> DataResult:
    """Make (or find) the product `data` of a run.

    With a given split no row is dropped but empty and unlabelled ones: copies stay, and leaked rows are flagged, so
    that results compare with the literature. Splitting by cluster drops copies and texts with two labels first.
    `leaked` refers to all training rows, also when `max_train_rows` uses fewer.

    Raises:
        InputError: the data set or the base model's tokenizer cannot be used; the message says what to do.
    """
    parameters = settings.pick(*_kind(settings).keys)
    if settings.dataset in SAMPLES:
        parameters["sample_version"] = sample.VERSION
    elif (path := user_path(settings.dataset)).exists():
        parameters["dataset_sha256"] = file_fingerprint(path)
        if classes := classes_beside(path, label_names=_kind(settings).names)[0]:
            parameters["dataset_classes"] = classes
    if settings.fallbacks:
        parameters["fallbacks"] = [_with_hash(entry) for entry in settings.fallbacks]
    parameters |= base_parameters(settings)
    if settings.folds > 1:
        parameters |= {"folds": settings.folds, "fold": run.fold}
    product = run.produce("data", lambda work: _build(settings, run.fold, work), parameters, force=settings.force)
    return DataResult.read(product)


def _kind(settings: Settings) -> Kind:
    task = task_of(settings)
    return LabelledRows(settings, task) if task.label_names else Conversations(settings, task)


def _with_hash(entry: Mapping[str, str | int]) -> dict[str, str | int]:
    """An entry of `fallbacks`; a local data set with the hash of its files, so that a change is seen."""
    path = user_path(str(entry.get("dataset", "")))
    local = entry.get("dataset") not in (None, *SAMPLES) and path.exists()
    return {**entry, "files_sha256": file_fingerprint(path)} if local else dict(entry)


_FLAGS = {"true": True, "1": True, "false": False, "0": False}


def rows_from_file(
    source: str | Path,
    label_names: Sequence[str],
    text_column: str = "",
    label_column: str = "",
    conversations: Task | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows to evaluate on, from a file (all rows) or a folder or hub id (its test split), and what became of them.

    The columns `id`, `leaked` and `group` of a run's own test.jsonl are kept; other rows are numbered, count as not
    leaked, and are grouped by near-duplication.

    Args:
        conversations: the task of rows without labels; None = texts with labels.

    Returns:
        The rows, and {"rows_available": rows that were read, "left_out": why some cannot be used -> how many, and
        where there are splits "split": test, or where it lacks validation, or train}.

    Raises:
        InputError: unreadable, or without usable rows.
    """
    table = read_table(str(source), label_column=label_column, label_names=label_names)
    labelled = {name: rows for name, rows in table.splits.items() if not unlabelled(rows, label_column)} or table.splits
    name = next(split for split in ("test", "validation", "all", "train") if split in labelled)
    ours = {"id", "leaked", "group"}
    keep = (*ours, "pattern") if ours <= table.splits[name][0].keys() else ()
    if keep and any(folded(label).isdecimal() for label in label_names):  # of its own rows a run writes the numbers
        label_names = [str(number) for number in range(len(label_names))]
    whole = [row for rows in labelled.values() for row in rows]  # numbers of labels mean what they do in 01
    if conversations is not None:
        rows, counts = clean_conversations(table.splits[name], str(source), conversations)
        kind = Conversations(Settings(), conversations)
        kind.require_any({name: rows}, {(why, name): n for why, n in counts.items() if why.startswith("dropped")})
        kind.audit({name: rows})  # of one split: the groups alone
        for row in rows if keep else ():
            row.extra |= {key: table.splits[name][row.index][key] for key in ours}
    else:
        rows, counts = clean_split(table.splits[name], str(source), text_column, label_column, label_names, keep, whole)
        if not rows:
            raise refusal("data/no-usable-row", where=source)
        groups = near_duplicates.find_duplicates([row.text for row in rows]).groups.tolist()
        for row, group in zip(rows, groups, strict=True):
            row.group = group
    for row in rows:
        if keep:  # a table of texts holds them as texts
            said = row.extra["leaked"]
            if (leaked := _FLAGS.get(folded(said))) is None:
                raise InputError(f"{source}: leaked {said!r}.", "true or false in every row.", "remove the column.")
            own = folded(row.extra["group"])
            row.extra |= {"leaked": leaked, "group": int(own) if own.isdecimal() else own}
    dropped = "dropped: "
    left_out = {why.removeprefix(dropped): count for why, count in counts.items() if why.startswith(dropped)}
    split = {} if name == "all" else {"split": name}
    told = {"rows_available": len(table.splits[name]), "left_out": left_out, **split}
    return [row.to_json("row") for row in rows], told


# Making the product.

Flow = dict[tuple[str, str], int]
"""Rows by step and split, in the order of the steps."""


def _build(settings: Settings, fold: int, work: ProductDraft) -> None:
    table = choose_data(settings)
    divided = divide(settings, table, fold)
    kind, splits, notes = divided.kind, divided.splits, divided.notes
    base, base_notes = choose_base(settings)
    tokenizer, base_facts = put_tokenizer(base, kind.task, splits["train"], work.folder / "tokenizer")
    before = {name: len(rows) for name, rows in splits.items()}
    splits, lengths, length_table, left = measure(tokenizer, divided)
    notes += _much_dropped(before, left)
    shown = {
        "source": table.source,
        "split_rule": divided.rule,
        "flow": [{"step": step, "split": split, "rows": rows} for (step, split), rows in (divided.flow | left).items()],
        "changes": dict(divided.changes + table.changes),
        **divided.audit,
        "overlaps_used": divided.audit_after["overlaps"],
        "leaked_examples": divided.audit_after["leaked_examples"],
        "balance": [kind.shape(name, rows) for name, rows in splits.items()],
        "text_audit": audit_texts({name: [kind.audited(row) for row in rows] for name, rows in splits.items()}),
        "lengths": lengths,
        "length_table": length_table,
        "example": worked_example(tokenizer, kind, splits["train"], lengths["train"]),
    }
    write_json(work.folder / "task.json", kind.task.to_json())
    write_json(work.folder / "audit.json", shown)
    for name, rows in splits.items():
        write_jsonl(work.folder / f"{name}.jsonl", [row.to_json(name) for row in rows])
    leaked = sum(row.leaked for row in splits["test"])
    work.metrics |= {"test_rows": len(splits["test"]), "leaked_test_rows": leaked}
    if floor := kind.floor(splits):
        clean = floor["test"]["leak_free"]
        write_json(work.folder / "floor.json", floor)
        work.metrics["floor_accuracy"] = floor["test"]["accuracy"]
        work.metrics["floor_accuracy_leak_free"] = clean["accuracy"] if clean else None
    else:
        work.facts["task"] = kind.task.kind
    if base is not None and base.unpacked is not None:  # other weights must make another product
        write_json(work.folder / UNPACKED, dict(base.unpacked))
    _record_sources(work, table, base_facts, base_notes, splits)
    work.facts["folds"] = settings.folds
    work.facts["prompt_hash"] = kind.task.fingerprint(tokenizer)
    work.notes += notes


MUCH_DROPPED = 0.1
"""Share of a split's rows from which on every page says that they were left out."""


@dataclass(frozen=True)
class DividedRows:
    """The rows of a table as the settings read and divide them.

    Attributes:
        notes: what every page must say. rule: of the split, in words. flow, changes: what became of rows and texts.
        audit, audit_after: copies and leaks as read, and after the split.
    """

    kind: Kind
    splits: Splits
    notes: list[str]
    rule: str
    flow: Flow
    changes: Counter[str]
    audit: dict[str, Any]
    audit_after: dict[str, Any]


def divide(settings: Settings, table: Table, fold: int = 1) -> DividedRows:
    """Clean, audit, split and subsample the rows of a table, before any tokenizer is asked.

    Args:
        fold: of `settings.folds`, whose rows are the test rows.

    Raises:
        InputError: rows that cannot be used so, in the words of the step that refuses them.
    """
    kind = _kind(settings)
    notes = kind.usable(table)
    splits, flow, changes = _clean(table, kind)
    notes += _much_dropped({name: flow["read", name] for name in splits}, flow)
    if unasked := changes[UNASKED]:
        notes.append(f"{unasked:,} questions have no options, and the labels are letters: a model can only guess them")
    found = kind.audit(splits)
    splits, rule, dropped = _divide(splits, kind, settings, fold)
    flow |= {(reason, "all"): count for reason, count in dropped.items()}
    why = "the data comes with test rows of its own" if rule.startswith("given") else f"{settings.folds} folds"
    if (rule.startswith("given") or settings.folds > 1) and settings.test_share != Settings().test_share:
        notes.append(f"test_share {settings.test_share:g} has no effect: {why}")
    used = found if rule == GIVEN else kind.audit(splits)
    for name, rows in splits.items():
        key = "max_train_rows" if name == "train" else "max_eval_rows"
        splits[name] = near_duplicates.subsample(rows, getattr(settings, key), settings.seed)
        if over := len(rows) - len(splits[name]):
            flow[f"left out: over {key}", name] = over
    kind.require_each(splits)
    return DividedRows(kind, splits, notes, rule, flow, changes, found, used)


def measure(
    tokenizer: PreTrainedTokenizerBase, divided: DividedRows
) -> tuple[Splits, dict[str, list[int]], list[dict[str, Any]], Flow]:
    """The rows that fit, their lengths in tokens as a list and as a table, and the last steps of the flow.

    Raises:
        InputError: none of a split fits, or the labels cannot be told apart.
    """
    kind, splits = divided.kind, divided.splits
    kind.write_tags_of(tokenizer, splits, divided.changes)
    before = {name: len(rows) for name, rows in splits.items()}
    fitting, lengths, length_table = token_lengths(tokenizer, kind, splits)
    return fitting, lengths, length_table, _left(kind.task, before, fitting)


def _clean(table: Table, kind: Kind) -> tuple[Splits, Flow, Counter[str]]:
    """The rows of every split, how many were read and dropped, and what was altered in the others."""
    splits: Splits = {}
    flow: Flow = {}
    changes: Counter[str] = Counter()
    for name in [name for name in (*SPLITS, "all") if name in table.splits]:
        splits[name], counts = kind.clean(table.splits[name], name)
        lost = Counter({reason: count for reason, count in counts.items() if reason.startswith("dropped")})
        changes += counts - lost
        flow["read", name] = len(table.splits[name])
        flow |= {(reason, name): count for reason, count in lost.items()}
    kind.require_any(splits, flow)
    return splits, flow, changes


def _much_dropped(read: Mapping[str, int], flow: Flow) -> list[str]:
    """What every page must say of splits that lost many of the rows that were read: how many, and why most of them."""
    notes = []
    for name, rows in read.items():
        lost = {step: count for (step, split), count in flow.items() if split == name and step.startswith("dropped")}
        if (total := sum(lost.values())) > MUCH_DROPPED * rows:
            most = max(lost, key=lost.__getitem__)
            share = f"{total:,} of {rows:,} rows{'' if name == 'all' else f' of {name}'}"
            why = f"{lost[most]:,} of them {most.replace('dropped: ', 'for: ')}"
            notes.append(f"{share} were left out when the data was read, {why}")
    return notes


GIVEN = "given: kept as it came, leaked rows flagged"


def _divide(splits: Splits, kind: Kind, settings: Settings, fold: int) -> tuple[Splits, str, Counter[str]]:
    """The three splits, the rule in words, and rows dropped on the way (`group` is set on all rows)."""
    if settings.split == "given" and "test" not in splits:
        raise refusal("data/given-without-test")
    if settings.folds > 1 and "test" in splits and settings.split != "cluster":
        raise refusal("data/folds-of-given", folds=settings.folds)
    if "test" in splits and settings.split != "cluster":
        if "validation" in splits:
            return splits, GIVEN, Counter()
        parts = near_duplicates.split_by_cluster(splits["train"], settings.seed, {"train": 0.9, "validation": 0.1})
        rule = f"given, but validation is a tenth of train, by {kind.cluster}"
        return {**parts, "test": splits["test"]}, rule, Counter()
    rows = [row for split in splits.values() for row in split]
    for index, row in enumerate(rows if len(splits) > 1 else []):
        row.index = index
    kept, dropped = near_duplicates.drop_copies(rows)
    kind.refuse_few(kept)
    by, seed = kind.rule.format(seed=settings.seed), settings.seed
    if settings.folds > 1:
        rule = f"fold {fold} of {settings.folds} is tested, validation is a tenth of the rest, by {by}"
        return near_duplicates.split_fold(kept, seed, settings.folds, fold), rule, dropped
    shares = near_duplicates.shares_of(settings.test_share)
    ratio = " : ".join(f"{10 * share:g}" for share in shares.values())
    rule = f"{ratio} by {by}"
    return near_duplicates.split_by_cluster(kept, seed, shares), rule, dropped


def _left(task: Task, before: Mapping[str, int], splits: Splits) -> Flow:
    """Steps of the flow: rows too long, and rows used; a split without any is refused with its reason."""
    what = "no answer with its reasoning within" if task.thinking else "first exchange over"
    reason = f"dropped: {what} {task.max_seq_length} tokens"
    flow = {(reason, name): before[name] - len(rows) for name, rows in splits.items() if before[name] > len(rows)}
    for name, rows in splits.items():
        if not rows:
            why = f" ({flow[reason, name]:,} rows {reason})" if (reason, name) in flow else ""
            raise InputError(f"{name}: no usable row{why}.", "at least one.", "add rows, or raise max_seq_length.")
    return flow | {("used", name): len(rows) for name, rows in splits.items()}


# The base model: its tokenizer, and the stamps of what is not real.


def base_parameters(settings: Settings) -> dict[str, Any]:
    """What the product depends on, beside the name of the base model: the hash of a local one, how it is unpacked."""
    path = user_path(settings.base_model)
    gguf = settings.pick("gguf_dtype", "gguf_off_grid")
    listed = [str(entry.get("base_model", "")) for entry in settings.fallbacks]
    asked = settings.gguf_off_grid or any(name.lower().endswith(".gguf") for name in listed)
    if settings.base_model == OFFLINE_BASE or not path.exists():
        return gguf if asked else {}
    refuse_without_template(settings.base_model)
    unpacking = gguf if path.is_file() or asked else {}
    return {"base_revision": resolve_base(settings.base_model, settings.revision, **gguf).revision, **unpacking}


def put_tokenizer(
    base: Base | None, task: Task, rows: Sequence[Row], folder: Path
) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """Put the run's tokenizer into `folder`; also the facts about the base model.

    The offline base's tokenizer is made of the training rows; answer words and prompts should cost it few tokens.
    """
    facts = {"base_model": base.id if base else OFFLINE_BASE, "offline_base": base is None}
    if base is None:
        words = [*task.label_names, task.system_prompt, *task.user_prompt.split("{text}")]
        texts = [text for row in rows for text in texts_of(row.content)]
        made = ensure_tokenizer(texts, [word for word in words if word.strip()])
        shutil.copytree(made, folder)
        return loading.load_tokenizer(folder), facts | {"base_revision": made.name}
    tokenizer = loading.load_tokenizer(base.path)
    if any((base.path / name).is_file() for name in FILES if name.endswith(".model")):
        # transformers saves neither the SentencePiece model nor what llama.cpp's converter reads beside it
        copy_tokenizer(base.path, folder)
    else:
        tokenizer.save_pretrained(folder)
    return tokenizer, facts | {"base_revision": base.revision, **base.facts}


def _record_sources(
    work: ProductDraft, table: Table, base: Mapping[str, Any], base_notes: Sequence[str], splits: Splits
) -> None:
    """What the manifest and every page say of where the rows and the base model came from."""
    from_sample = table.asked in SAMPLES
    stamp = STAMPS.get((base["offline_base"], from_sample), "")
    corpus = "ChnSentiCorp" if table.asked == "sample" else "real text"
    work.notes += [*([stamp.format(corpus=corpus)] if stamp else []), *base_notes, *table.notes]
    work.facts |= {
        "source": table.source,
        "sample_data": from_sample,
        "dataset": {"source": table.asked, "revision": table.revision, "rows": table.rows, "sha256": table.hashes},
        **base,
        "rows": {name: len(rows) for name, rows in splits.items()},
    }
