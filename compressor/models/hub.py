"""A model of the hub as a local folder: safetensors, configs and tokenizer files, nothing else."""

from __future__ import annotations

from pathlib import Path

from compressor.errors import HubError, InputRefused, ReportedError
from compressor.fetching import hub_answer, shared_refusal
from compressor.models.weight_files import PICKLE_SUFFIXES, pickle_refused

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
        OutOfResources: E-DISK-FULL.
        OutputRefused: E-CACHE-NOT-WRITABLE.
    """
    from huggingface_hub import snapshot_download

    patterns = [*_PATTERNS, *_USE_POLICY, *(("*.py",) if code else ())]
    try:
        path = Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=patterns, ignore_patterns=list(_IGNORED)
            )
        )
    except Exception as error:  # the hub's libraries raise a dozen unrelated types for one broken transfer
        raise _refusal(repository, revision, error) from None
    if not any(path.glob("*.safetensors")):
        _refuse_pickles(repository, path)
    return path, path.name if len(path.name) == 40 else None


def _refuse_pickles(repository: str, path: Path) -> None:
    """Say so where the hub has the weights as pickles only; they were not fetched."""
    from huggingface_hub import list_repo_files

    if not (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return  # no whole model; that matters more than the form of its weights
    try:
        names = list_repo_files(repository, revision=path.name)
    except Exception:  # offline, so that the missing weights are all that can be told
        return
    pickles = sorted(name for name in names if "/" not in name and name.endswith(PICKLE_SUFFIXES))
    if pickles:
        raise pickle_refused(repository, pickles[0])


def _refusal(repository: str, revision: str | None, error: Exception) -> ReportedError:
    """What the hub's libraries raise, in this project's terms."""
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return InputRefused(
            "E-MODEL-NOT-FOUND",
            f"{repository} is neither a folder nor a hub id",
            "give the folder of a model, or a hub id such as Qwen/Qwen3-0.6B",
        )
    if isinstance(error, errors.GatedRepoError):
        return HubError(
            "E-HUB-ACCESS",
            f"{repository} is gated",
            "ask for access on its page, then log in with `hf auth login`",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError("E-HUB-REVISION", f"{repository} has no revision {revision}", "check --revision")
    answer = hub_answer(error)
    # Without a token the hub answers 401 for what is missing; the library knows that for https addresses only.
    if isinstance(error, errors.RepositoryNotFoundError) or (answer is not None and answer.hides):
        return HubError(
            "E-HUB-NOT-FOUND",
            f"there is no folder {repository} here, and the hub has no such model or hides it",
            "check the spelling; for a private model log in with `hf auth login`",
        )
    absent = f"there is no folder {repository} here; as a hub id it"
    return shared_refusal(error, repository, absent) or _unreachable(absent, error)


def _unreachable(absent: str, error: Exception) -> HubError:
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return HubError(
            "E-HUB-OFFLINE",
            f"{absent} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it",
            "unset HF_HUB_OFFLINE once to fetch it, or give a local folder",
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return HubError(
            "E-HUB-UNREACHABLE",
            f"{absent} is not in the cache, and the hub at {constants.ENDPOINT} cannot be reached",
            "check the network, or give a local folder",
        )
    return HubError(
        "E-HUB-UNREACHABLE",
        f"{absent} could not be fetched: {type(error).__name__}",
        "check the network and try again; what is already fetched is kept",
    )
