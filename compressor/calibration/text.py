"""Text by the name that a user gives it: the built-in documentation, a file, a folder, or a dataset."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from compressor.calibration.datasets_library import DatasetRequest, read_dataset
from compressor.calibration.python_docs import python_docs
from compressor.errors import InputRefused

__all__ = ["TextSource", "read_text", "stretch_of"]

Role = Literal["calibration", "evaluation"]
Kind = Literal["text", "documents"]

PYTHON_DOCS = "python-docs"
DEFAULT_COLUMN = "text"
_TEXT_SUFFIXES = (".txt", ".raw")
_ALL_SUFFIXES = (*_TEXT_SUFFIXES, ".jsonl", ".parquet")

# A text longer than this many characters for each token that is needed is not tokenized whole.
_CHARACTERS_PER_NEEDED_TOKEN = 24
_MIN_STRETCH_CHARACTERS = 200_000


@dataclass(frozen=True)
class TextSource:
    """A text and where it came from.

    Attributes:
        spec: What the user gave.
        documents: The documents in order; a single text is one.
        kind: "text" is one text, "documents" are texts that have nothing to do with each other.
        description: Where it came from, for the report.
        sha256: Hex digest over the documents in order.
    """

    spec: str
    documents: tuple[str, ...]
    kind: Kind
    description: str
    sha256: str


def read_text(
    source: str,
    *,
    role: Role,
    dataset_config: str | None = None,
    split: str | None = None,
    text_column: str | None = None,
) -> TextSource:
    """The text that ``source`` names.

    Args:
        source: ``python-docs``; a ``.txt`` or ``.raw`` file, which is one text; a ``.jsonl`` or ``.parquet``
            file of documents; a dataset folder; or the id of a dataset on the hub.
        role: What the text is for; ``python-docs`` and datasets have a part for each.
        dataset_config: Configuration of a dataset.
        split: Split of a dataset; by default train for calibration, test for evaluation, where they exist.
        text_column: Column of files and datasets; by default ``text``.

    Raises:
        InputRefused: E-TEXT-NOT-FOUND, E-TEXT-FORMAT, E-TEXT-NOT-UTF8, E-TEXT-BAD-JSONL, E-TEXT-BAD-PARQUET,
            E-TEXT-NO-COLUMN, E-CALIBRATION-EMPTY, E-EVAL-EMPTY.
        UsageError: E-DATASET-CONFIG, E-DATASET-SPLIT.
        HubError: The dataset cannot be fetched.
    """
    column = text_column or DEFAULT_COLUMN
    path = Path(os.path.expanduser(source))
    kind: Kind = "documents"
    description = path.name
    if source == PYTHON_DOCS:
        corpus = python_docs(role)
        documents, description = list(corpus.documents), f"{corpus.version}, {role} part"
    elif os.path.isfile(path):  # Path.is_file raises for a name that is too long
        documents = _read_file(path, column)
        kind = "text" if path.suffix.lower() in _TEXT_SUFFIXES else "documents"
    elif source and (os.path.isdir(path) or not _looks_like_path(source)):
        found = read_dataset(DatasetRequest(source, role, dataset_config, split, column))
        documents, kind, description = found.documents, found.kind, found.description
    else:
        raise InputRefused(
            "E-TEXT-NOT-FOUND",
            f"there is no file {source or 'without a name'}",
            f"give {PYTHON_DOCS}, a file, or a dataset of the hub",
        )
    if not any(document.strip() for document in documents):
        raise InputRefused(
            "E-CALIBRATION-EMPTY" if role == "calibration" else "E-EVAL-EMPTY",
            f"{source} has no text in it",
            f"give another text with --{'calibration' if role == 'calibration' else 'eval-data'}",
        )
    return TextSource(source, tuple(documents), kind, description, _digest(source, documents))


def stretch_of(text: str, needed_tokens: int, rng: random.Random) -> str:
    """The text, or of a very long one a stretch of whole lines, drawn with ``rng``, that is long enough."""
    length = max(_MIN_STRETCH_CHARACTERS, needed_tokens * _CHARACTERS_PER_NEEDED_TOKEN)
    if len(text) <= length:
        return text
    start = rng.randrange(len(text) - length + 1)
    line = text.find("\n", start, start + length // 2)
    return text[start if line < 0 else line + 1 : start + length]


def _looks_like_path(source: str) -> bool:
    """Whether a text that is no file was meant as one, and not as ``name`` or ``owner/name`` on the hub."""
    return (
        source.startswith((".", "/", "~"))
        or "\\" in source
        or source.count("/") > 1
        or Path(source).suffix.lower() in (*_ALL_SUFFIXES, ".json", ".csv", ".tsv", ".gz", ".zst")
    )


def _read_file(path: Path, column: str) -> list[str]:
    readers: dict[str, Callable[[Path, str], list[str]]] = {
        ".txt": _read_plain,
        ".raw": _read_plain,
        ".jsonl": _read_jsonl,
        ".parquet": _read_parquet,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputRefused(
            "E-TEXT-FORMAT",
            f"{path.name}: its ending says nothing of its format",
            f"name the file with one of {', '.join(_ALL_SUFFIXES)}",
        )
    try:
        return reader(path, column)
    except OSError as error:
        raise InputRefused(
            "E-TEXT-NOT-FOUND",
            f"{path.name} cannot be read: {error.strerror}",
            "check the file and its rights",
        ) from None


def _read_plain(path: Path, _column: str) -> list[str]:
    return [_decode(path.name, path.read_bytes())]


def _read_jsonl(path: Path, column: str) -> list[str]:
    return list(_jsonl_documents(path, column))


def _jsonl_documents(path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        where = f"{path.name} line {number}"
        text = _decode(where, line).strip()
        if not text:
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            raise _bad_line(where, f"is no JSON ({reason})") from None
        if not isinstance(row, dict):
            raise _bad_line(where, "is no JSON object")
        if column not in row:
            raise _no_column(where, column, row)
        if not isinstance(row[column], str):
            raise _bad_line(where, f"has a {column} that is no string")
        yield row[column]


def _read_parquet(path: Path, column: str) -> list[str]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if column not in names:
                raise _no_column(path.name, column, names)
            values = [
                value
                for batch in table.iter_batches(columns=[column])
                for value in batch.column(0).to_pylist()
            ]
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputRefused(
            "E-TEXT-BAD-PARQUET",
            f"{path.name} is no readable parquet file: {(str(error).splitlines() or [''])[0][:160]}",
            "write the file again",
        ) from None
    documents = [value for value in values if value is not None]
    if not all(isinstance(document, str) for document in documents):
        raise InputRefused(
            "E-TEXT-NO-COLUMN", f"{path.name}: column {column} holds no text", "give --text-column"
        )
    return documents


def _decode(where: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputRefused(
            "E-TEXT-NOT-UTF8",
            f"{where} is not UTF-8: byte {error.start} is 0x{content[error.start]:02x}",
            "save the text in UTF-8",
        ) from None


def _bad_line(where: str, what: str) -> InputRefused:
    return InputRefused("E-TEXT-BAD-JSONL", f"{where} {what}", "mend the line; each one is a JSON object")


def _no_column(where: str, column: str, columns: Iterable[Any]) -> InputRefused:
    shown = ", ".join(str(name) for name in list(columns)[:10])
    return InputRefused(
        "E-TEXT-NO-COLUMN",
        f"{where} has no column {column}, but {shown or 'none at all'}",
        "give --text-column",
    )


def _digest(source: str, documents: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for number, document in enumerate(documents, start=1):
        try:
            encoded = document.encode("utf-8")
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair
            raise InputRefused(
                "E-TEXT-NOT-UTF8", f"{source}: document {number} holds half a character", "mend the document"
            ) from None
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()
