"""Data sets of the hub, each way to fail turned into a sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib.data.reading import SPLIT_OF_NAME, SPLITS, quiet_datasets
from lib.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

_LOCAL = "or download it elsewhere and set dataset to the folder"


def read_hub(name: str, revision: str) -> dict[str, Dataset]:
    """A hub data set's splits under the workbook's names; scripts are never run.

    Raises:
        InputError: not reachable, not found, gated, a script data set, several configurations, or no train split.
    """
    with quiet_datasets() as datasets:
        try:
            loaded = datasets.load_dataset(name, revision=revision)
        except Exception as error:  # the hub client has no common base class; unknown ones are raised again
            if explained := _explain(name, revision, error):
                raise explained from None
            raise
    splits = {SPLIT_OF_NAME[key]: table for key, table in loaded.items() if key in SPLIT_OF_NAME}
    if "train" not in splits:
        raise InputError(f"{name} has the splits {', '.join(loaded)}.", "a split train.", "choose another data set.")
    return {key: splits[key] for key in SPLITS if key in splits}


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what caused it."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _explain(name: str, revision: str, error: Exception) -> InputError | None:
    """The InputError for a failure of the hub; None for one that is not known."""
    import datasets
    import httpx
    from huggingface_hub import errors

    chain = _chain(error)
    text = " ".join(str(link) for link in chain).lower()

    def is_a(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if is_a(errors.GatedRepoError) or "gated" in text:
        do = f"ask for access on its page and set HF_TOKEN, {_LOCAL}."
        return InputError(f"the hub data set {name} is gated.", "access granted to you.", do)
    if "dataset scripts are no longer supported" in text or "trust_remote_code" in text:
        plain, do = (
            "a data set of plain files (csv, json, parquet).",
            f"look for a converted copy on the hub, {_LOCAL}.",
        )
        return InputError(f"{name} is a script data set; its code is never run.", plain, do)
    if is_a(errors.RevisionNotFoundError) or ("revision" in text and "doesn't exist" in text):
        return InputError(f"{name} has no revision {revision!r}.", "a branch, tag or commit.", "correct revision.")
    offline = is_a(errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)
    if offline or is_a(ConnectionError, httpx.TransportError, TimeoutError) or "couldn't reach" in text:
        network = "a network connection, or the data set in the local cache."
        do = f"set HF_ENDPOINT to a mirror (and HF_HUB_OFFLINE=0), {_LOCAL}."
        return InputError(f"the hub cannot be reached for the data set {name}.", network, do)
    if is_a(datasets.exceptions.DatasetNotFoundError, errors.RepositoryNotFoundError):
        exists = "one that exists (for a private one, HF_TOKEN)."
        return InputError(f"no file, folder or hub data set {name!r}.", exists, "correct dataset.")
    if is_a(errors.HfHubHTTPError):
        reason = " ".join(str(error).split())[:200]
        return InputError(f"the hub refused {name} ({reason}).", "the data set.", f"try again later, {_LOCAL}.")
    if "config name is missing" in text:
        one = "one table with its splits."
        return InputError(f"{name} has several configurations.", one, "download one and set dataset to it.")
    return None
