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

from compressor.errors import HubError, InputRefused, ReportedError, UsageError

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
        InputRefused: E-DATASET-SCRIPT, E-TEXT-NOT-FOUND, E-TEXT-NO-COLUMN.
        UsageError: E-DATASET-CONFIG, E-DATASET-SPLIT.
        HubError: E-DATASET-NOT-FOUND, E-HUB-OFFLINE, E-HUB-UNREACHABLE.
    """
    import datasets

    folder = Path(os.path.expanduser(request.source))
    if os.path.isdir(folder) and any(folder.glob("*.py")):
        raise _script(request.source)
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
    if os.path.isdir(folder) and (
        (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
    ):
        return _choose(request, datasets.load_from_disk(str(folder)))
    source = str(folder) if os.path.isdir(folder) else request.source
    if (
        not os.path.isdir(folder)
        and (request.split is None or "[" not in request.split)
        and _is_large(request)
    ):
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


def _is_large(request: DatasetRequest) -> bool:
    """Whether a dataset on the hub is too large to fetch whole; not where its size is unknown."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        files = HfApi().dataset_info(request.source, files_metadata=True).siblings or []
    except Exception:  # whatever is wrong, fetching it will tell
        return False
    return sum(file.size or 0 for file in files) > _LARGE_BYTES


def _refusal(request: DatasetRequest, error: Exception) -> ReportedError:
    """The library's error in this project's terms."""
    from huggingface_hub import constants

    text = " ".join(str(error).split())
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "script" in text.lower() and ("support" in text or "trust_remote_code" in text):
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
    if constants.HF_HUB_OFFLINE or "OfflineModeIsEnabled" in kinds:
        return HubError(
            "E-HUB-OFFLINE",
            f"{request.source} is no file here and not in the cache, and HF_HUB_OFFLINE is set",
            "unset HF_HUB_OFFLINE once to fetch it, or give a local file",
        )
    if "DatasetNotFoundError" in kinds:
        return HubError(
            "E-DATASET-NOT-FOUND",
            f"{request.source} is no file here, and the hub has no such dataset or hides it",
            "check the spelling; for a private or gated dataset log in with `hf auth login`",
        )
    return HubError(
        "E-HUB-UNREACHABLE",
        f"{request.source} could not be fetched: {type(error).__name__}: {text[:160]}",
        "check the network and try again, or give a local file",
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
