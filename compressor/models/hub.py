"""A model of the hub as a local folder: safetensors, configs and tokenizer files, nothing else."""

from __future__ import annotations

import errno
from pathlib import Path

from compressor.errors import HubError, InputRefused, OutOfResources
from compressor.models.weight_files import pickle_refused

__all__ = ["fetch"]

_PATTERNS = ("*.json", "model*.safetensors", "*.model", "*.jinja", "*.txt", "LICENSE*", "LICENCE*", "NOTICE*")
_USE_POLICY = ("USE_POLICY*", "Use_Policy*")
# Folders below the top hold the same model in other formats.
_IGNORED = ("*/*",)


def fetch(repository: str, revision: str | None, *, code: bool = False) -> tuple[Path, str | None]:
    """The local folder of a hub model and the commit that it is at; what is cached is not fetched again.

    Args:
        repository: Hub id such as ``Qwen/Qwen3-0.6B``.
        revision: Branch, tag or commit; the default branch where none is given.
        code: Fetch Python files too.

    Raises:
        InputRefused: E-MODEL-NOT-FOUND: the text cannot be a hub id; E-MODEL-PICKLE: no safetensors there.
        HubError: E-HUB-NOT-FOUND, E-HUB-REVISION, E-HUB-ACCESS, E-HUB-OFFLINE, E-HUB-UNREACHABLE.
    """
    from huggingface_hub import errors, snapshot_download

    patterns = [*_PATTERNS, *_USE_POLICY, *(("*.py",) if code else ())]
    try:
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=patterns, ignore_patterns=list(_IGNORED)
        )
    except errors.HFValidationError:
        raise InputRefused(
            "E-MODEL-NOT-FOUND",
            f"{repository} is neither a folder nor a hub id",
            "give the folder of a model, or a hub id such as Qwen/Qwen3-0.6B",
        ) from None
    except errors.GatedRepoError:
        raise HubError(
            "E-HUB-ACCESS",
            f"{repository} is gated",
            "ask for access on its page, then log in with `hf auth login`",
        ) from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            "E-HUB-NOT-FOUND",
            f"{repository} is no folder here, and the hub has no such model or hides it",
            "check the spelling; for a private model log in with `hf auth login`",
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(
            "E-HUB-REVISION", f"{repository} has no revision {revision}", "check --revision"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise _offline(repository) from None
    except Exception as error:  # the hub's libraries raise a dozen unrelated types for one broken transfer
        raise _not_fetched(repository, error) from None
    path = Path(folder)
    if not any(path.glob("*.safetensors")):
        _refuse_pickles(repository, path.name)
    return path, path.name if len(path.name) == 40 else None


def _not_fetched(repository: str, error: Exception) -> HubError | OutOfResources:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return OutOfResources(
            "E-DISK-FULL",
            f"the disk is full; {repository} could not be fetched",
            "free some space, or let HF_HOME point to another disk",
        )
    return HubError(
        "E-HUB-UNREACHABLE",
        f"{repository} could not be fetched: {type(error).__name__}",
        "check the network and try again; what is already fetched is kept",
    )


def _refuse_pickles(repository: str, commit: str) -> None:
    """Say so where the hub has the weights as pickles only; they were not fetched."""
    from huggingface_hub import list_repo_files

    try:
        names = list_repo_files(repository, revision=commit)
    except Exception:  # offline, so that the missing weights are all that can be told
        return
    pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if pickles:
        raise pickle_refused(repository, pickles[0])


def _offline(repository: str) -> HubError:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return HubError(
            "E-HUB-OFFLINE",
            f"{repository} is no folder here and not in the cache, and HF_HUB_OFFLINE forbids to fetch it",
            "unset HF_HUB_OFFLINE once to fetch it, or give a local folder",
        )
    return HubError(
        "E-HUB-UNREACHABLE",
        f"{repository} is no folder here and not in the cache, and the hub cannot be reached",
        "check the network, or give a local folder",
    )
