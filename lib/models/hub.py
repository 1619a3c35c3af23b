"""Downloading a base model from the hub (or a mirror), and saying what to do when that fails."""

from __future__ import annotations

from pathlib import Path

from lib.errors import InputError
from lib.models.quiet import quiet

PATTERNS = [
    "*.json",
    "*.jinja",
    "*.safetensors",
    "merges.txt",
    "vocab.txt",
    "*.model",
    "README.md",
    "LICENSE*",
    "NOTICE*",
]
"""Files that are fetched: weights only as safetensors, never pickles, never code."""

_CURES = (
    "set HF_ENDPOINT to a mirror's address, or set base_model to a local folder, or to offline; "
    "with a filled cache set HF_HUB_OFFLINE=1."
)


def download(repo: str, revision: str) -> Path:
    """The snapshot folder of a hub model at `revision`; its name is the resolved commit.

    Raises:
        InputError: unknown or gated repository, unknown revision, no network, disk full.
    """
    quiet()
    import httpx
    from huggingface_hub import errors, snapshot_download

    what = f"hub model {repo!r} (revision {revision!r})"
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=PATTERNS))
    except errors.HFValidationError:
        raise InputError(
            f"base_model {repo!r}: no such folder, and not a hub id.", "a folder or owner/name.", "correct base_model."
        ) from None
    except errors.GatedRepoError:
        raise InputError(
            f"{what} is gated.", "access granted to your account.", "accept its terms on its page and set HF_TOKEN."
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{what}: no such revision.", "a branch, tag or commit.", "correct revision.") from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{what} is not there, or private.",
            "an existing model.",
            "correct base_model; for a private one set HF_TOKEN.",
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, httpx.TransportError, TimeoutError) as error:
        reason = "offline" if isinstance(error, errors.OfflineModeIsEnabled) else type(error).__name__
        raise InputError(
            f"{what} is not in the cache and the hub cannot be reached ({reason}).", "a network.", _CURES
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise InputError(
                f"{what}: access refused ({status}).", "access.", "set HF_TOKEN to a valid token."
            ) from None
        raise InputError(
            f"{what}: the hub answered {status}.", "a download.", f"try again later, or {_CURES}"
        ) from None
    except OSError as error:
        raise InputError(
            f"{what} could not be stored ({error.strerror or error}).",
            "room and write access.",
            "set HF_HOME elsewhere.",
        ) from None
