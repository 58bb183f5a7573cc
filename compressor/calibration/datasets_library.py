"""Text of a dataset, on the hub or in a folder, through the ``datasets`` library; no script of it is run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from compressor.calibration.dataset_folder import refuse_strays
from compressor.errors import HubError, InputRefused, ReportedError, UsageError
from compressor.fetching import came_from_network, hub_answer, shared_refusal

__all__ = ["DatasetRequest", "DatasetText", "read_dataset"]

# Which split a role takes where the user names none.
_SPLITS = {
    "calibration": ("train", "validation", "test"),
    "evaluation": ("test", "validation", "train"),
}
# A larger dataset is streamed from its beginning instead of being fetched whole.
_LARGE_BYTES = 2 * 2**30
_STREAMED_DOCUMENTS = 20_000
# The rows of these datasets are lines of one text, joined as the published perplexities do.
_LINES_OF_ONE_TEXT = {"wikitext": "\n\n", "ptb_text_only": " "}


@dataclass(frozen=True)
class DatasetRequest:
    """Which text of which dataset."""

    source: str
    role: Literal["calibration", "evaluation"]
    config: str | None
    split: str | None
    column: str


@dataclass(frozen=True)
class DatasetText:
    """The text of a dataset and words for where it came from."""

    documents: list[str]
    kind: Literal["text", "documents"]
    description: str


def read_dataset(request: DatasetRequest) -> DatasetText:
    """The text that the request names.

    Raises:
        InputRefused: E-DATASET-SCRIPT, E-DATASET-ESCAPES, E-TEXT-NOT-FOUND, E-TEXT-NO-COLUMN.
        UsageError: E-DATASET-CONFIG, E-DATASET-SPLIT.
        HubError: E-DATASET-NOT-FOUND, E-HUB-ACCESS, E-HUB-OFFLINE, E-HUB-UNREACHABLE.
        OutOfResources: E-DISK-FULL.
        OutputRefused: E-CACHE-NOT-WRITABLE.
    """
    import datasets

    folder = Path(os.path.expanduser(request.source))
    if os.path.isdir(folder):
        if any(folder.glob("*.py")):
            raise _script(request.source)
        refuse_strays(folder)
    try:
        with _quiet():
            split, rows = _rows(datasets, request)
            _check_column(request, rows)
            documents = [row[request.column] for row in rows]
    except ReportedError:
        raise
    except Exception as error:  # the library raises two dozen unrelated types, and wraps them in each other
        raise _refusal(request, error) from None
    if not all(isinstance(document, (str, type(None))) for document in documents):
        raise InputRefused(
            "E-TEXT-NO-COLUMN",
            f"{request.source}: column {request.column} holds no text",
            "give --text-column",
        )
    name = "/".join(part for part in (request.source, request.config, split) if part)
    return _as_text(request, [document for document in documents if document is not None], f"dataset {name}")


def _as_text(request: DatasetRequest, documents: list[str], description: str) -> DatasetText:
    joint = _LINES_OF_ONE_TEXT.get(request.source.rpartition("/")[2])
    if joint is None:
        return DatasetText(documents, "documents", description)
    return DatasetText([joint.join(documents)], "text", f"{description}, rows joined by {joint!r}")


def _rows(datasets: Any, request: DatasetRequest) -> tuple[str, Any]:
    """The split's name and its rows."""
    folder = Path(os.path.expanduser(request.source))
    source, large = str(folder), False
    if not os.path.isdir(folder):
        source, large = _on_hub(request.source)
    elif (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _choose(request, datasets.load_from_disk(str(folder)))
    if large and (request.split is None or "[" not in request.split):
        split, rows = _choose(request, datasets.load_dataset(source, request.config, streaming=True))
        return f"{split}, first {_STREAMED_DOCUMENTS} rows", _Beginning(rows)
    if request.split is not None:
        return request.split, datasets.load_dataset(source, request.config, split=request.split)
    return _choose(request, datasets.load_dataset(source, request.config))


class _Beginning:
    """The first rows of a stream."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows
        self.column_names = rows.column_names

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return islice(iter(self._rows), _STREAMED_DOCUMENTS)


def _choose(request: DatasetRequest, loaded: Any) -> tuple[str, Any]:
    """The split that is asked for, or that suits the role; a dataset without splits as it is."""
    if not isinstance(loaded, dict):
        return request.split or "", loaded
    wanted = [request.split] if request.split is not None else [*_SPLITS[request.role], *loaded]
    for split in wanted:
        if split in loaded:
            return split, loaded[split]
    raise UsageError(
        "E-DATASET-SPLIT",
        f"{request.source} has no split {request.split}",
        f"give --split with one of {', '.join(loaded)}",
    )


def _check_column(request: DatasetRequest, rows: Any) -> None:
    columns: Iterable[str] | None = rows.column_names
    if columns is not None and request.column not in columns:
        raise InputRefused(
            "E-TEXT-NO-COLUMN",
            f"{request.source} has no column {request.column}, but {', '.join(columns)}",
            "give --text-column",
        )


def _on_hub(source: str) -> tuple[str, bool]:
    """The name by which the hub knows a dataset today, and whether it is too large to fetch whole.

    Old names have no owner, such as ``wikitext``; the hub leads on to the new name, the library does not.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return source, False
    try:
        found = HfApi().dataset_info(source, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # whatever is wrong, fetching it will tell
        return source, False
    return found.id, sum(file.size or 0 for file in found.siblings or ()) > _LARGE_BYTES


def _refusal(request: DatasetRequest, error: Exception) -> ReportedError:
    """The library's error in this project's terms."""
    text = " ".join(str(error).split())
    if re.search(r"scripts are no longer supported|trust_remote_code", text):
        return _script(request.source)
    if re.search(r"Config name is missing|BuilderConfig .* not found", text):
        return UsageError("E-DATASET-CONFIG", f"{request.source}: {text[:300]}", "give --dataset-config")
    if re.search(r"Unknown split|should be one of", text):
        return UsageError("E-DATASET-SPLIT", f"{request.source}: {text[:200]}", "give --split")
    if os.path.isdir(Path(os.path.expanduser(request.source))):
        return InputRefused(
            "E-TEXT-NOT-FOUND",
            f"{request.source} is no dataset folder: {text[:200]}",
            "give a folder of .jsonl, .parquet or .txt files",
        )
    return _hub_refusal(request.source, error, text)


def _hub_refusal(source: str, error: Exception, text: str) -> ReportedError:
    from huggingface_hub import constants

    kinds = {kind.__name__ for kind in type(error).__mro__}
    absent = f"there is no file or folder {source} here; as a dataset of the hub it"
    if constants.HF_HUB_OFFLINE or "OfflineModeIsEnabled" in kinds:
        return HubError(
            "E-HUB-OFFLINE",
            f"{absent} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it",
            "unset HF_HUB_OFFLINE once to fetch it, or give a local file",
        )
    if "is a gated dataset" in text:
        return HubError(
            "E-HUB-ACCESS",
            f"{source} is gated",
            "ask for access on its page, then log in with `hf auth login`",
        )
    if {"DataFilesNotFoundError", "EmptyDatasetError"} & kinds:
        return InputRefused(
            "E-TEXT-NOT-FOUND",
            f"{source} on the hub has no files that can be read as text",
            "give a dataset of parquet, JSON lines or text files",
        )
    answer = hub_answer(error)
    # Without a token the hub answers 401 for what is missing; the library knows that for https addresses only.
    if "DatasetNotFoundError" in kinds or (answer is not None and answer.hides):
        return HubError(
            "E-DATASET-NOT-FOUND",
            f"there is no file or folder {source} here, and the hub has no such dataset or hides it",
            "check the spelling; for a private dataset log in with `hf auth login`",
        )
    return shared_refusal(error, source, absent) or _not_read(source, absent, error, text)


def _not_read(source: str, absent: str, error: Exception, text: str) -> ReportedError:
    """The refusal where the hub did not answer, or where its answer was no text."""
    from huggingface_hub import constants

    if isinstance(error, ConnectionError):
        return HubError(
            "E-HUB-UNREACHABLE",
            f"{absent} is not in the cache, and the hub at {constants.ENDPOINT} cannot be reached",
            "check the network, or give a local file",
        )
    if came_from_network(error):
        return HubError(
            "E-HUB-UNREACHABLE",
            f"{absent} could not be fetched: {type(error).__name__}: {text[:160]}",
            "check the network and try again, or give a local file",
        )
    return InputRefused(
        "E-TEXT-NOT-FOUND",
        f"{source} was fetched from the hub, but cannot be read: {type(error).__name__}: {text[:160]}",
        "give another dataset, or a local file",
    )


def _script(source: str) -> InputRefused:
    return InputRefused(
        "E-DATASET-SCRIPT",
        f"{source} is a dataset that needs a script of its own to be run",
        "use a version of it in parquet or JSON lines",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """The library without its progress bars; on again at the end where they were on."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()
