"""Finding a run's base model and adapter: in local folders, on the hub or ModelScope, or among the listed fallbacks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lib.errors import InputError, refusal
from lib.hub import fetching
from lib.hub import sources as hub_sources
from lib.hub.sources import SourceError
from lib.models import language_model
from lib.models.adapters import adapter_config, refuse_adapter, require_adapter
from lib.models.configurations import check_language_model, read_configuration
from lib.models.gguf_file import check_model_gguf, read_metadata
from lib.models.language_model import holds_more, language_model_of, text_configuration
from lib.models.tokenizer_files import FILES, TEMPLATES, chat_templates, reader
from lib.models.unpack import RECORD, asked_in, identity, is_identity, notes_of, unpacked, without_dtype
from lib.models.weights import Weights, open_weights
from lib.prompts.tasks import read_task, texts_of
from lib.prompts.templates import describe_template
from lib.runs.files import data_file, read_json, read_jsonl, remembered_sha256, sha256_json, user_path
from lib.runs.run import Run
from lib.settings import OFFLINE_BASE, Settings


@dataclass(frozen=True)
class Base:
    """A base model on the disk.

    Attributes:
        path: its folder.
        id: what the user called it: a hub id, a folder, a GGUF file, or "offline".
        revision: commit of a hub model; hash of a folder's files or of a GGUF file; key of the offline base.
        offline: True for the project's own small model, which is no Qwen result.
        unpacked: what `lib.models.unpack` says of weights that came out of a GGUF file; None for others.
        taken: what `lib.models.language_model` says of a language model that was taken out of a larger one.
    """

    path: Path
    id: str
    revision: str
    offline: bool
    unpacked: Mapping[str, Any] | None = None
    taken: Mapping[str, Any] | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What every page must say of it."""
        taken = () if self.taken is None else language_model.notes_of(self.taken)
        return taken if self.unpacked is None else notes_of(self.unpacked)

    @property
    def facts(self) -> dict[str, Any]:
        """For the manifest: what is known of the file that the weights came out of."""
        return {} if self.unpacked is None else {"unpacked": dict(self.unpacked)}


def resolve_base(
    base_model: str, revision: str = "main", gguf_dtype: str = "auto", gguf_off_grid: bool = False
) -> Base:
    """The folder of a base model: a local one, an unpacked GGUF file, or a hub model (downloaded if need be).

    Args:
        gguf_dtype, gguf_off_grid: of a GGUF file, as `lib.models.unpack.unpack` takes them.

    Raises:
        InputError: no such folder or hub model, no access, no network, or a folder that is not a usable model.
    """
    local = user_path(base_model)
    if local.is_dir():
        return _of_folder(local, base_model, fingerprint)
    if local.is_file() and local.suffix.lower() == ".gguf":
        folder, record = unpacked(local, gguf_dtype, gguf_off_grid)
        return Base(folder, base_model, identity(record), False, record)
    if _is_no_id(base_model, local):
        raise _no_base(base_model, local)
    found = fetching.fetch(base_model, revision, "model")
    return _of_folder(found.path, hub_sources.parse(base_model, revision, "model").name, lambda _: found.revision)


def _of_folder(folder: Path, name: str, revision: Callable[[Path], str]) -> Base:
    """The causal language model of a folder: all of it, or what it holds of one."""
    weights = check_model_folder(folder)
    if not holds_more(read_configuration(folder), weights):
        return Base(folder, name, revision(folder), False)
    alone, record = language_model_of(folder)
    return Base(alone, name, revision(folder), False, taken=record)


SHIPPED: dict[str, dict[str, Any]] = data_file("models/known.yaml")
"""config.json of the models that the profiles name, as far as sizes are told from it, by id."""


def configuration_of(base_model: str, revision: str = "main") -> tuple[dict[str, Any], str]:
    """config.json of a model, and where it is from: "folder", "shipped" with the workbook, or "hub": that file alone,
    from its cache or the network.

    Raises:
        InputError: as `resolve_base`; a configuration that cannot be used.
    """
    local = user_path(base_model)
    if local.is_dir():
        return text_configuration(read_configuration(local), local), "folder"
    if base_model in SHIPPED:
        return SHIPPED[base_model], "shipped"
    if _is_no_id(base_model, local):
        raise _no_base(base_model, local)
    text = fetching.fetch_text(base_model, revision, "model", "config.json")
    with tempfile.TemporaryDirectory(prefix="workbook-config-") as name:
        (Path(name) / "config.json").write_text(text, encoding="utf-8")
        return text_configuration(read_configuration(Path(name)), base_model), "hub"


def _is_no_id(base_model: str, local: Path) -> bool:
    """Whether a base model that is no folder can be no repository of a hub either."""
    return local.is_file() or hub_sources.looks_like_path(base_model) or base_model.lower().endswith(".gguf")


def _no_base(base_model: str, local: Path) -> InputError:
    named = base_model.lower().endswith(".gguf")
    kind = "a file" if local.is_file() else "no file" if named else "no folder"
    do = "download it: make smollm2" if named and local.parent.name == "smollm2" else "correct the path"
    return refusal("models/no-base-model", SourceError, base_model=base_model, kind=kind, local=local, do=do)


def refuse_without_template(base_model: str) -> None:
    """Refuse a GGUF file without a working chat template as the base of a run, before it is unpacked.

    Raises:
        InputError: no template, or one that cannot be rendered; or the file is damaged.
    """
    path = user_path(base_model)
    if not path.is_file() or path.suffix.lower() != ".gguf":
        return
    if not read_metadata(check_model_gguf(path)).get("tokenizer.chat_template"):
        raise refusal("models/no-template-in-file", base_model=base_model, path=path)
    refuse_bad_template(path)


def refuse_bad_template(path: Path, system_turn: bool = True) -> None:
    """Refuse a GGUF file or folder whose chat template cannot be rendered: tried in a child process, within limits.

    Args:
        system_turn: whether prompts will have one, as those of runs always do.

    Raises:
        InputError: the template fails, takes too long or too much memory; or a file is damaged.
    """
    template = template_of(path)
    found = describe_template(template) if template else {"problem": None, "no_system_turn": None}
    if problem := found["problem"]:
        raise InputError(f"{path}: {problem}.", "a template that renders a user turn.", "take another file.")
    if system_turn and (problem := found["no_system_turn"]):
        raise refusal("models/no-system-turn", path=path, problem=problem)


def template_of(path: Path) -> str:
    """The chat template of a GGUF file or folder; "" where it has none."""
    if path.is_dir():
        template: Any = chat_templates(path, reader(path)("tokenizer_config.json")).get("default")
    else:
        template = read_metadata(path).get("tokenizer.chat_template")
    return template if isinstance(template, str) else ""


def check_base_folder(path: Path) -> None:
    """Refuse a folder that a run would refuse, now or when it has been trained on.

    Raises:
        InputError: as `check_model_folder` and `refuse_bad_template`; or the weights are quantized.
    """
    weights, config = check_model_folder(path), read_configuration(path)
    if holds_more(config, weights):
        language_model.check_part(path, weights)
    if config.get("quantization_config"):
        raise refusal("models/quantized-base", path=path)
    refuse_bad_template(path)


def choose_base(settings: Settings) -> tuple[Base | None, tuple[str, ...]]:
    """The first available source: base_model, then the listed fallbacks in order.

    Of a fallback "sha256" is compared and "revision" used.

    Returns:
        The base model, None for the offline one, which is made from the run's rows; and what every page must say: that
        it is a fallback, and why; that it comes out of a GGUF file.

    Raises:
        InputError: none can be had; or the first that can be had is not usable, or not the one that was listed.
    """

    def get(source: str, revision: str) -> Base | None:
        refuse_without_template(source)
        if source == OFFLINE_BASE:
            return None
        base = resolve_base(source, revision, **settings.pick("gguf_dtype", "gguf_off_grid"))
        if base.unpacked is None:
            check_base_folder(base.path)
        return base

    entry, base, failures = first_available("base_model", settings, get)
    if base is not None and "sha256" in entry:
        _check_weights(base, str(entry["sha256"]))
    if settings.gguf_off_grid and not failures and (base is None or base.unpacked is None):
        raise refusal("models/off-grid-without-file", settings=settings)
    notes = fallback_note("base model", settings.base_model, entry["base_model"], failures)
    return base, (*notes, *(base.notes if base else ()))


Found = TypeVar("Found")


def first_available(
    key: str, settings: Settings, get: Callable[[str, str], Found]
) -> tuple[Mapping[str, Any], Found, list[SourceError]]:
    """The first source that can be had: its entry, what it is, and why those before it could not be had.

    Args:
        key: "base_model" or "dataset": the setting, and what entries of `fallbacks` are looked at.
        get: what a source of a revision is.

    Raises:
        SourceError: the first one's, followed by why the fallbacks failed.
    """
    listed: list[Mapping[str, Any]] = [settings.pick(key, "revision"), *(f for f in settings.fallbacks if key in f)]
    failures: list[SourceError] = []
    for entry in listed:
        try:
            return entry, get(entry[key], entry.get("revision", "main")), failures
        except SourceError as error:
            failures.append(error)
    first, *others = failures
    if not others:
        raise first
    words = "; ".join(f"{entry[key]} {error.why}" for entry, error in zip(listed[1:], others, strict=True))
    raise SourceError(f"{first.found} Fallbacks failed too: {words}.", first.expected, first.do, first.why)


def fallback_note(what: str, asked: str, used: str, failures: Sequence[SourceError]) -> tuple[str, ...]:
    """The stamp for a source that was taken instead of the one asked for; empty when nothing failed."""
    if not failures:
        return ()
    why = failures[0].why
    return (f"fallback: {what} {asked} could not be had ({why}); {called(used)} was used instead of it",)


def called(source: str) -> str:
    """A source as pages call it: ids as they are, local files and folders by their last name."""
    path = user_path(source)
    return f"{'folder' if path.is_dir() else 'file'} {path.name}" if path.exists() else source


def _check_weights(base: Base, wanted: str) -> None:
    files = [user_path(base.id)] if base.unpacked is not None else open_weights(base.path).files
    hashes = {path.name: remembered_sha256(path) for path in files}
    found = next(iter(hashes.values())) if len(hashes) == 1 else sha256_json(hashes)
    if found != wanted.lower():
        raise refusal("models/other-hash", base=base, found=found, hashes=", ".join(hashes), wanted=wanted)


@dataclass(frozen=True)
class GivenAdapter:
    """A LoRA adapter that somebody else trained: its folder, the name the user gave, its commit or hash."""

    path: Path
    id: str
    revision: str


_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "training.json", "README.md")
"""The last two say what it was trained on (`trained_base`, and whether that was a 4-bit base)."""


def resolve_adapter(adapter: str) -> GivenAdapter:
    """The folder of an adapter: a local one, or a hub or ModelScope repository.

    Raises:
        InputError: cannot be had, a full model, a pickle, or no adapter.
    """
    local = user_path(adapter)
    if local.is_dir():
        require_adapter(local)
        there = [*(local / name for name in (*_ADAPTER, *FILES)), *sorted((local / TEMPLATES).glob("*.jinja"))]
        files = {str(path.relative_to(local)): remembered_sha256(path) for path in there if path.is_file()}
        return GivenAdapter(local, adapter, f"sha256:{sha256_json(files)[:16]}")
    if local.is_file() or hub_sources.looks_like_path(adapter):
        kind = "a file" if local.is_file() else "no folder"
        raise refusal("models/no-adapter", SourceError, adapter=adapter, kind=kind, local=local)
    found = fetching.fetch(adapter, "main", "adapter")
    require_adapter(found.path)
    return GivenAdapter(found.path, adapter, found.revision)


def base_of(run: Run) -> Base:
    """The base model that notebook 01 chose for this run (the offline one is made now if it is not there yet)."""
    data = run.require("data")
    facts = data.entry.facts
    if facts["base_model"] == OFFLINE_BASE:
        from lib.models.offline_base import ensure_base

        texts = [text for row in read_jsonl(data.path / "train.jsonl") for text in texts_of(row)]
        folder = ensure_base(texts, read_task(data.path), data.path / "tokenizer")
        return Base(folder, OFFLINE_BASE, folder.name, True)
    recorded = facts["base_revision"]
    commit = "main" if recorded.startswith("sha256:") else recorded  # that one is a local folder's, or a GGUF file's
    base = resolve_base(facts["base_model"], commit, **asked_in(recorded))
    if recorded != base.revision:
        raise refusal("models/base-changed", base=base, before=recorded)
    return base


def fingerprint(folder: Path) -> str:
    """Hash of the configuration and the weights of a model folder."""
    files = [folder / "config.json", *open_weights(folder).files]
    return "sha256:" + sha256_json({path.name: remembered_sha256(path) for path in files})[:16]


def check_model_folder(path: Path) -> Weights:
    """The weights of a complete causal language model in safetensors; any other folder is refused before it is loaded.

    Raises:
        InputError: no config.json, an unknown model type (code of the folder is never run), no weights, pickled
            weights, a Git LFS pointer or a web page in place of a file, truncated or damaged weights.
    """
    if not path.is_dir():
        raise refusal("models/no-folder", what="no folder, but a file," if path.is_file() else "no folder", folder=path)
    refuse_adapter(path)
    config = read_configuration(path)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        own = " that brings its own code (auto_map), which is never run" if config.get("auto_map") else ""
        raise refusal("models/unknown-model-type", config=path / "config.json", kind=kind, own=own)
    return check_language_model(path, config)


# Which weights an adapter was trained on, as its files say: the same GGUF file can be unpacked in several ways.


def unpacking_of(adapter: Path) -> dict[str, Any]:
    """How the base of an adapter that this workbook trained was unpacked, as keywords of `resolve_base`.

    An adapter fits the weights it was trained on: channels rescaled or not. Empty where its files say nothing.
    """
    return asked_in(trained_base(adapter))


def trained_base(adapter: Path) -> str:
    """The revision of the base that an adapter was trained on, as its files say; empty where they do not.

    training.json is this workbook's; adapter_config.json, which the weights are never without, bears the revision too.
    """
    record = adapter / "training.json"
    content = read_json(record) if record.is_file() else {}
    base = content.get("base") if isinstance(content, dict) else None
    if isinstance(base, dict) and base.get("revision"):
        return str(base["revision"])
    return str(adapter_config(adapter).get("revision") or "")


def other_revision(adapter: Path, revision: str) -> str:
    """Which base an adapter's files name where that is not `revision`, as no shape would tell; else empty.

    A hub's commit and the hash of a folder cannot be compared; GGUF files are left to `refuse_other_weights`.
    """
    found = trained_base(adapter)
    kinds = {found.startswith("sha256:"), revision.startswith("sha256:")}
    comparable = len(kinds) == 1 and "" not in (found, revision) and found != "main" and not is_identity(found)
    return found if comparable and found != revision else ""


def named_otherwise(adapter: Path, *names: str) -> str:
    """The base that an adapter's files name, where its last part is that of none of the names; else empty."""

    def last(name: str) -> str:
        return name.partition("@")[0].rstrip("/").rpartition("/")[2].lower()

    found = str(adapter_config(adapter).get("base_model_name_or_path") or "")
    return found if found and last(found) not in map(last, names) else ""


def unchecked_base(adapter: Path, name: str, folder: Path, revision: str) -> str:
    """The base that an adapter's files name (and its commit), where nothing says whether this one is it; else empty."""
    said = trained_base(adapter)
    at = f" at {said}" if said not in ("", "main") and not revision else ""
    if (said and said == revision) or not (at or named_otherwise(adapter, name, str(folder))):
        return ""
    return f"{adapter_config(adapter).get('base_model_name_or_path') or 'a model'}{at}"


def refuse_other_weights(adapter: Path, base: Base) -> None:
    """Refuse an adapter on other weights of a GGUF file than those it was trained on: shapes do not tell them apart.

    Raises:
        InputError: it was trained on a GGUF base of another identity; or the base's channels are rescaled, and the
            adapter's files do not say that it was trained on exactly these.
    """
    found = trained_base(adapter)
    private = base.unpacked is not None and base.unpacked["off_grid"]
    if found == base.revision or not (is_identity(found) or private):
        return
    raise _other_weights(adapter, found, base.revision)


def refuse_other_folder(adapter: Path, folder: Path) -> None:
    """As `refuse_other_weights`, for a folder alone; its unpacked.json says which GGUF file it came out of.

    A folder that came out of none is refused to an adapter of rescaled channels only: an adapter that was trained on
    dequantized weights is often merged into the model that they were quantized from.

    Raises:
        InputError: the adapter was trained on another GGUF file, or on other scales of its channels.
    """
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else None
    own, found = identity(record) if record else "", trained_base(adapter)
    scaled = "gguf_off_grid" in asked_in(own) | asked_in(found)
    if without_dtype(own) != without_dtype(found) and (scaled or (own and is_identity(found))):
        raise _other_weights(adapter, found, own or f"{folder}, which came out of no GGUF file")


def _other_weights(adapter: Path, found: str, base: str) -> InputError:
    asked = {"gguf_dtype": "auto", "gguf_off_grid": False} | asked_in(found)
    needed = f"gguf_dtype: {asked['gguf_dtype']} and gguf_off_grid: {str(asked['gguf_off_grid']).lower()}"
    trained = found or "that its files do not name"
    return refusal("models/adapter-of-other-weights", adapter=adapter, trained=trained, base=base, needed=needed)
