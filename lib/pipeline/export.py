"""Checkpoints exported without a run: merged, made in every wanted format, checked. What `workbook export` does.

Each checkpoint becomes a folder of its own: merged_model/, a folder a format, gguf/, and the papers about them. What is
there already and was made of the same things is not made again.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.errors import InputError, refusal
from lib.hub import fetching
from lib.hub.sources import SourceError
from lib.models import base_model as bases
from lib.models.adapters import base_named, folder_kind
from lib.models.loading import quantization_method
from lib.models.weights import open_weights
from lib.pipeline.formats import FOLDERS, GGUF, MERGED, REPORT, title_of
from lib.pipeline.merge_pair import Pair, find_pair, merge_pair
from lib.pipeline.papers import write_papers
from lib.progress import say
from lib.prompts.tasks import ConversationTask, Task
from lib.prompts.templates import read_block
from lib.runs import files
from lib.runs.locks import locked
from lib.runs.machine import cpu_name
from lib.runs.manifest import hash_folder, version_of
from lib.scoring.generation import ask_prompt
from lib.scoring.measure import Text
from lib.scoring.text_metrics import UNFINISHED, longest_loop, repeated_share
from lib.scoring.word_lists import read_terms
from lib.settings import IMATRIX_TYPES, UNQUANTIZED
from lib.stages.convert.official import check_conversion, convert_folder
from lib.stages.evaluate.standalone import ModelOptions, ask_models, evaluate_models, tokenizer_of
from lib.stages.export.sizes import predict_folder
from lib.stages.export.stage import CALIBRATED, FORMATS, make_format
from lib.stages.quantize.calibration import Windows, collect, text_windows
from lib.stages.quantize.files import Options, quantize_files

TERMS = "cryptography"
"""List of the terms whose keeping is counted."""
WINDOW, WINDOWS = 512, 64
"""Tokens and number of the windows of --text that calibrate."""
_LEFT_OUT = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.py", "*.gguf", "trainer_state.json", "optimizer*")
"""Of a full model's folder: pickles, code, and what only a training reads."""


@dataclass(frozen=True)
class Wanted:
    """What is made of every checkpoint.

    Attributes:
        formats, recipes: see `lib.pipeline.formats.read_formats`.
        base_model: base of adapters; None = the one that adapter_config.json names.
        tokenizer: "adapter" (where it brings its own) or "base".
        text: what GPTQ and importance matrices are calibrated on, and its file; None = neither.
        rows, task, source: rows to score every format on; what they are, in words.
        prompts: {"prompt", "reference"} that every format answers; max_new_tokens: most tokens of an answer.
        n_threads: of llama.cpp; 0 = physical cores.
        force: make everything again.
    """

    formats: Sequence[str]
    recipes: Sequence[str]
    base_model: str | None = None
    tokenizer: str = "adapter"
    text: tuple[Text, Path] | None = None
    rows: Sequence[Mapping[str, Any]] = ()
    task: Task | None = None
    source: Mapping[str, Any] = field(default_factory=dict)
    prompts: Sequence[Mapping[str, str]] = ()
    max_new_tokens: int = 64
    n_threads: int = 0
    force: bool = False


def check_wanted(wanted: Wanted) -> None:
    """Refuse what no checkpoint could become, before the first is looked at.

    Raises:
        InputError: what has to be calibrated, without a text.
    """
    if wanted.text is None:
        needing = [name for name in wanted.formats if name in CALIBRATED]
        needing += [f"{GGUF}:{name}" for name in wanted.recipes if name in IMATRIX_TYPES]
        if needing:
            raise refusal("pipeline/without-text", needing=", ".join(needing))


# Checkpoints: what each is, and the folder that it gets.


def find_checkpoint(checkpoint: str, base_model: str | None) -> Pair | Path:
    """An adapter with its base, or the folder of a full model; fetched if need be.

    Raises:
        InputError: neither; an adapter whose base is not told; a quantized model.
    """
    folder = files.user_path(checkpoint)
    if folder.is_file() or checkpoint.lower().endswith(".gguf"):
        raise refusal("pipeline/gguf-checkpoint", checkpoint=checkpoint)
    if not folder.exists():
        folder = _fetched(checkpoint)
    kind = folder_kind(folder)
    if kind == "unknown":
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir() and folder_kind(path) != "unknown")
        hint = f"name one of its folders: {', '.join(inside)}." if inside else "check the path."
        raise refusal("pipeline/no-checkpoint", folder=folder, hint=hint)
    if kind == "adapter":
        return find_pair(base_named(folder, base_model), checkpoint)
    bases.check_model_folder(folder)
    if method := quantization_method(folder):
        raise refusal("pipeline/quantized-already", folder=folder, method=method)
    return folder


def _fetched(checkpoint: str) -> Path:
    """The folder of a hub id, whichever of the two it is."""
    try:
        return fetching.fetch(checkpoint, "main", "model").path
    except SourceError as error:
        if checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") > 1 or "\\" in checkpoint:
            raise refusal("pipeline/no-folder", checkpoint=checkpoint, error=error) from None
        raise


# One checkpoint, from its files to the papers.


def export_checkpoint(checkpoint: str, folder: Path, wanted: Wanted) -> dict[str, Any]:
    """Make the export tree of one checkpoint.

    Returns:
        The content of export_report.json: "finished", "checkpoint", "kind", "base_model", "merged_model" ("bytes",
        "files", …), "formats" (one record each: "format", "path", "bytes", "bits_per_weight", "checks", …),
        "skipped" ("format", "reason"), "answers" (of all to the prompts; see `ask_models`), "evaluation" (with rows),
        "notes".

    Raises:
        InputError: a checkpoint that cannot be merged or loaded, a folder that holds something else, no room.
    """
    found = find_checkpoint(checkpoint, wanted.base_model)
    _former(folder, checkpoint, wanted.force)  # refuses before anything is written
    with _alone(folder):
        former = _former(folder, checkpoint, wanted.force)
        merged, notes = _merge(found, folder, wanted, former)
        idle = "note: --base-model changes nothing: this is a full model"
        if not isinstance(found, Pair) and wanted.base_model and idle not in notes:
            notes = [*notes, idle]
        report: dict[str, Any] = {
            "format": 1,
            "finished": False,
            "simulated": False,
            "checkpoint": checkpoint,
            "kind": "adapter" if isinstance(found, Pair) else "model",
            "base_model": found.base_model if isinstance(found, Pair) else None,
            "merged_model": merged,
            "formats": [],
            "skipped": [],
            "notes": notes,
            "machine": {"processor": cpu_name(), "transformers": version_of("transformers")},
        }
        maker = _Maker(folder, wanted, report, former)
        maker.save()
        maker.take_over()
        maker.make_folders()
        maker.make_gguf()
        maker.ask()
        maker.evaluate()
        write_papers(folder, report, wanted.prompts)
        report["finished"] = True
        maker.save()
    return report


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The folder, written by no other export meanwhile; gone again where nothing came into it."""
    lock, found = files.writable(folder) / ".lock", f"{folder} is being written by another export."
    try:
        with locked(lock, found, "one export a folder.", "wait for it, or choose another --output-dir."):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    finally:
        with contextlib.suppress(OSError):  # it holds something
            folder.rmdir()


def _former(folder: Path, checkpoint: str, force: bool) -> dict[str, Any]:
    """The report of an earlier export into the same folder; empty where there is none to build on.

    Raises:
        InputError: the folder holds something else, or the export of another checkpoint.
    """
    report = files.object_or_empty(folder / REPORT)
    others = [path.name for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    if others and not report:
        raise refusal("pipeline/other-folder", folder=folder, shown=", ".join(sorted(others)[:4]))
    if report and report.get("checkpoint") != checkpoint and not force:
        raise refusal("pipeline/other-export", folder=folder, other=report.get("checkpoint"))
    return {} if force or report.get("simulated") or report.get("format") != 1 else report


def _merge(found: Pair | Path, folder: Path, wanted: Wanted, former: Mapping[str, Any]) -> tuple[dict[str, Any], list]:
    """merged_model/: its record, and what is to be said of it."""
    target = folder / MERGED
    source = found.key if isinstance(found, Pair) else {"model": bases.fingerprint(found)}
    made_with = files.sha256_json([source, wanted.tokenizer])
    record = former.get(MERGED) or {}
    if record.get("made_with") == made_with and _unchanged(target, record["files"]):
        say(f"{MERGED}: made before, unchanged")
        return record, former["notes"]
    shutil.rmtree(target, ignore_errors=True)
    notes: list[str] = []
    if isinstance(found, Pair):
        notes = merge_pair(found, target, None, wanted.tokenizer).notes
    else:
        weights = open_weights(found)
        files.require_space(folder, weights.nbytes, MERGED)
        kept = {path.name for path in weights.files}
        with files.new_folder(target) as new:
            for path in (p for p in sorted(found.iterdir()) if p.is_file() and not p.name.startswith(".")):
                if path.name in kept:
                    files.link_or_copy(path.resolve(), new / path.name)
                elif path.suffix != ".safetensors" and not any(path.match(pattern) for pattern in _LEFT_OUT):
                    shutil.copyfile(path, new / path.name)
    weights = open_weights(target)
    record = {"bytes": weights.nbytes, "weights": weights.parameters, "made_with": made_with}
    return {**record, "files": hash_folder(target)}, notes


def _unchanged(folder: Path, listed: Mapping[str, Any]) -> bool:
    return folder.is_dir() and hash_folder(folder) == listed


class _Maker:
    """The formats of one merged model: made or taken over, then asked and scored beside it."""

    def __init__(self, folder: Path, wanted: Wanted, report: dict[str, Any], former: Mapping[str, Any]) -> None:
        self.folder, self.wanted, self.report = folder, wanted, report
        self.merged, self.former = folder / MERGED, former
        self.kept = {record["format"]: record for record in former.get("formats", ())}
        self.calibrated = files.sha256_file(wanted.text[1]) if wanted.text else None

    def save(self) -> None:
        """What is there so far: an interrupted export goes on from it."""
        files.write_json(self.folder / REPORT, self.report)

    def take_over(self) -> None:
        """Formats of earlier exports that nobody asks for now: they stay if they are of this merged model, else go."""
        asked = {*self.wanted.formats, *(f"{GGUF}:{recipe}" for recipe in self.wanted.recipes)}
        same = self.former.get(MERGED, {}).get("made_with") == self.report[MERGED]["made_with"]
        for name in [name for name in self.kept if name not in asked]:
            path = self.folder / self.kept[name]["path"]
            if not (same and self._made_before(name, self.kept[name]["made_with"])):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _made_before(self, name: str, made_with: str) -> bool:
        """Take over what an earlier export made of the same things."""
        record = self.kept.get(name)
        if record is None or record["made_with"] != made_with:
            return False
        path = self.folder / record["path"]
        same = _unchanged(path, record["files"]) if path.is_dir() else _hash(path) == record["files"].get(path.name)
        if same:
            say(f"{name}: made before, unchanged")
            self.report["formats"].append(record)
        return same

    def _key(self, maker: str, text: bool) -> str:
        weights = {name: file["sha256"] for name, file in self.report[MERGED]["files"].items()}
        return files.sha256_json([weights, maker, self.calibrated if text else None])

    def _windows(self) -> Windows:
        assert self.wanted.text is not None
        return text_windows(self.merged, *self.wanted.text, WINDOW, WINDOWS)

    def make_folders(self) -> None:
        """The formats that transformers loads."""
        todo = []
        for name in self.wanted.formats:
            made_with = self._key(f"{name} by {FORMATS[name].maker()}", name in CALIBRATED)
            if not self._made_before(name, made_with):
                todo.append((name, made_with))
        if not todo:
            return
        shapes = {name: tensor.shape for name, tensor in open_weights(self.merged).tensors.items()}
        files.require_space(self.folder, sum(predict_folder(shapes, name) for name, _ in todo), "the export formats")
        tokenizer = tokenizer_of(self.merged, self.merged)
        task = ConversationTask("instruction", "", max_seq_length=0)
        asked = [ask_prompt(tokenizer, task, dict(prompt), False).ids for prompt in self.wanted.prompts]
        needs_text = any(name in CALIBRATED for name, _ in todo)
        texts = [prompt["prompt"] for prompt in self.wanted.prompts]
        argument = {"source": self.merged, "prompts": asked, "texts": texts}
        argument["calibration"] = self._windows().windows if needs_text else []
        text = self.wanted.text
        card = {
            "made_of": _made_of(self.report),
            "notes": self.report["notes"],
            "asked": {"system": "", "user": self.wanted.prompts[0]["prompt"], "thinking": False, "most_tokens": 256},
            "calibrated_on": f"windows of {WINDOW} tokens of {text[1].name}" if text else "",
        }
        for place, (name, made_with) in enumerate(todo, 1):
            target = self.folder / FOLDERS[name]
            record = make_format(FORMATS[name], target, argument, card, f"({place} of {len(todo)})")
            if "reason" in record:
                self.report["skipped"].append(record)
            else:
                self.report["formats"].append({**record, "path": FOLDERS[name], "made_with": made_with})
            self.save()

    def make_gguf(self) -> None:
        """The files for llama.cpp: of 16 bits by our converter, smaller ones by llama.cpp's quantizer."""
        folder, title = self.folder / GGUF, title_of(self.report["checkpoint"])
        todo = []
        for recipe in self.wanted.recipes:
            made_with = self._key(f"{recipe} by llama.cpp {version_of('llama_cpp_python')}", recipe not in UNQUANTIZED)
            if not self._made_before(f"gguf:{recipe}", made_with):
                todo.append((recipe, made_with))
        if not todo:
            return
        try:
            check_conversion(self.merged)
        except InputError as error:  # of another architecture: the folders are made all the same
            self.report["skipped"] += [{"format": f"{GGUF}:{recipe}", "reason": error.found} for recipe, _ in todo]
            return
        folder.mkdir(exist_ok=True)
        small = [recipe for recipe, _ in todo if recipe not in UNQUANTIZED]
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=self.folder) as name:
            source, options = Path(name) / f"{title}-F16.gguf", Options()
            reports = {}
            for recipe, _ in todo:
                if recipe in UNQUANTIZED:
                    made = convert_folder(self.merged, folder / f"{title}-{recipe}.gguf", recipe.lower())
                    bits = 8 * made.bytes_after / made.parameters
                    reports[recipe] = {"bits_per_weight": bits, "seconds": made.seconds, "fallbacks": 0}
            if small:
                convert_folder(self.merged, source, "f16", title)
                if self.wanted.text is not None:
                    matrix = Path(name) / f"{self.wanted.text[1].stem}.imatrix.gguf"
                    collect(self.merged, self._windows(), matrix)
                    options = Options(matrix)
                for made in quantize_files(source, folder, small, options, self.wanted.n_threads):
                    facts = {key: getattr(made, key) for key in ("bits_per_weight", "seconds", "peak_memory_mib")}
                    reports[made.type] = {**facts, "fallbacks": len(made.fallbacks), "imatrix": made.imatrix}
        for recipe, made_with in todo:
            path = folder / f"{title}-{recipe}.gguf"
            record = {"format": f"gguf:{recipe}", "title": f"GGUF, {recipe}", "path": f"{GGUF}/{path.name}"}
            record |= {"bytes": path.stat().st_size, **reports[recipe], "made_with": made_with}
            self.report["formats"].append({**record, "files": {path.name: _hash(path)}})
        self.save()

    @property
    def _records(self) -> list[dict[str, Any]]:
        return [self.report[MERGED], *self.report["formats"]]

    def _of_all(self, part: str, made_with: Any, make: Callable[[list[Path]], dict[str, Any]]) -> dict[str, Any]:
        """What `make` says of the merged model and every format; or an earlier export, if it was of the same things.

        Args:
            part: of the report. made_with: what else it depends on.
        """
        key = files.sha256_json([[record["files"] for record in self._records], made_with])
        found = self.former.get(part) or {}
        if found.get("key") != key:
            names = [MERGED, *(record["path"] for record in self.report["formats"])]
            found = {"key": key, **make([self.folder / name for name in names])}
            for told, name in zip(found["models"], names, strict=True):
                told["model"] = name
        self.report[part] = found
        self.save()
        return found

    def ask(self) -> None:
        """Answers of all to the same prompts, and what they show of characters, terms, reasoning and coherence."""
        prompts, most = self.wanted.prompts, self.wanted.max_new_tokens
        options = ModelOptions(n_threads=self.wanted.n_threads)
        answers = self._of_all(
            "answers", [prompts, most], lambda models: ask_models(models, prompts, options, max_new_tokens=most)
        )
        own = [prompt["answers"][0]["text"] for prompt in answers["prompts"]]
        for place, record in enumerate(self._records):
            record["checks"] = check_answers([prompt["answers"][place] for prompt in answers["prompts"]], own)

    def evaluate(self) -> None:
        """Quality on rows, if there are any."""
        rows, task, source = self.wanted.rows, self.wanted.task, self.wanted.source
        self.report["evaluation"] = None
        if task is not None:
            options, keep = ModelOptions(n_threads=self.wanted.n_threads), self.folder / ".scores"
            made_with = [[dict(row) for row in rows], task.to_json()]
            self._of_all(
                "evaluation", made_with, lambda models: evaluate_models(models, rows, task, source, options, keep)
            )


def check_answers(answers: Sequence[Mapping[str, Any]], merged: Sequence[str]) -> dict[str, Any]:
    """The four checks of a format's answers beside the merged model's.

    Returns:
        "prompts"; "whole": answers of which every byte became a character; "terms": [kept, of those in the merged
        model's answers]; "thinking": [complete blocks, of those that were opened], null where none was; "repeated" and
        "looping": mean share of text that repeats itself, answers of which a third or more is one loop; "same_text",
        and "chrf" (mean), against the merged model's.
    """
    terms = read_terms(TERMS)
    assert terms is not None
    texts = [answer["text"] for answer in answers]
    known = [terms.found(text) for text in merged]
    kept = [terms.held(text) & own for text, own in zip(texts, known, strict=True)]
    blocks = [block for text in texts if (block := read_block(text)).parts[0]]
    alike = [answer["chrf"] for answer in answers if answer["chrf"] is not None]
    return {
        "prompts": len(texts),
        "whole": sum(not _broken(answer) for answer in answers),
        "terms": [sum(map(len, kept)), sum(map(len, known))],
        "thinking": [sum(block.complete for block in blocks), len(blocks)] if blocks else None,
        "repeated": sum(map(repeated_share, texts)) / len(texts),
        "looping": sum(3 * longest_loop(text) >= len(text) > 0 for text in texts),
        "same_text": sum(text == own for text, own in zip(texts, merged, strict=True)),
        "chrf": sum(alike) / len(alike) if alike else None,
    }


def _broken(answer: Mapping[str, Any]) -> bool:
    """Whether its characters are damaged; one that the limit of tokens cut inside a character is not."""
    return answer["problem"] not in ("", *(() if answer["ended"] else (UNFINISHED,)))


def _made_of(report: Mapping[str, Any]) -> dict[str, str]:
    if report["kind"] == "adapter":
        return {"kind": "adapter", "adapter": report["checkpoint"], "base": report["base_model"]}
    return {"kind": "model", "model": report["checkpoint"]}


def _hash(path: Path) -> dict[str, Any] | None:
    """A file as `hash_folder` tells of it; None where there is none."""
    if not path.is_file():
        return None
    return {"bytes": path.stat().st_size, "sha256": files.remembered_sha256(path)}
