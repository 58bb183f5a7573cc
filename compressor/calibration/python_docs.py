"""The offline text `python-docs`: what every machine with Python has to read.

It is the help topics of `pydoc_data.topics` and the docstrings of the standard library. The
sources are parsed with `ast` and never imported, so nothing of them runs. A text belongs to a split by a hash
of its module's name, so that evaluation text shares no module with calibration or training text; what evaluation
modules quote from the others is cut from them.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from compressor.errors import InputRefused

__all__ = ["CORPUS_FORMAT", "Corpus", "Split", "python_docs"]

Split = Literal["calibration", "evaluation", "train", "heldout"]

# Raised when the choice or the cleaning of the texts changes, so that reports can tell the texts apart.
CORPUS_FORMAT = 1

# Tests, data tables and programs whose docstrings are absent, generated or copies of one another.
SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "dist-packages"}
    | {"test", "tests", "idle_test", "turtledemo", "lib-dynload", "config"}
)
MIN_DOCUMENT_CHARS = 16
# A complete Python gives about 2 million; one stripped of sources or docstrings gives next to none.
MIN_CORPUS_CHARS = 400_000

# Topics quote one another: 18 % of the evaluation modules' text stands word for word elsewhere too. Shorter
# paragraphs, "Return True if successful.", are a phrase of the language rather than a quotation.
MIN_QUOTATION_CHARS = 60
PARAGRAPH_BREAK = re.compile(r"\n(?:[ \t]*\n)+")

EVALUATION_PERCENT = 10
HELDOUT_PERCENT = 4


@dataclass(frozen=True)
class Corpus:
    """The documents of one split, in a fixed order.

    Attributes:
        documents: Cleaned texts, none of them twice.
        version: Format of the corpus and the Python that it was read from; another Python gives other text.
        sha256: Hex digest over the documents in order.
    """

    documents: tuple[str, ...]
    version: str
    sha256: str


@functools.cache
def python_docs(split: Split) -> Corpus:
    """Return the documents of one split of the running Python's documentation.

    `evaluation` shares no module, no document and no long paragraph with the others. `calibration` is all the
    rest; `train` is `calibration` without `heldout`, the slice on which the example model's training picks its
    checkpoint.

    Raises:
        InputRefused: E-PYTHON-DOCS-MISSING where the standard library's sources cannot be read or carry
            too few docstrings.
    """
    documents = tuple(_split_documents()[split])
    digest = hashlib.sha256()
    for document in documents:
        encoded = document.encode("utf-8")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    version = f"python-docs {CORPUS_FORMAT}, {platform.python_implementation()} {platform.python_version()}"
    return Corpus(documents, version, digest.hexdigest())


@functools.cache
def _split_documents() -> dict[Split, list[str]]:
    """Return the documents per split; a document that several modules carry goes to one split only."""
    root = Path(sysconfig.get_paths()["stdlib"])
    named = [*_topics(root), *_docstrings(root)]
    total_chars = sum(len(text) for _, text in named)
    if total_chars < MIN_CORPUS_CHARS:
        raise InputRefused(
            "E-PYTHON-DOCS-MISSING",
            f"python-docs needs {MIN_CORPUS_CHARS} characters of docstrings, found {total_chars} in {root}",
            "use a Python that has its library's sources, or name texts with --calibration and --eval-data",
        )
    # Claimed in this order, so that a text which an evaluation module repeats is never calibrated on.
    evaluation = dict.fromkeys(text for module, text in named if _bucket(module) < EVALUATION_PERCENT)
    heldout = dict.fromkeys(
        text
        for module, text in named
        if EVALUATION_PERCENT <= _bucket(module) < EVALUATION_PERCENT + HELDOUT_PERCENT
        and text not in evaluation
    )
    calibration = dict.fromkeys(
        text for module, text in named if _bucket(module) >= EVALUATION_PERCENT and text not in evaluation
    )
    return {
        "evaluation": _without_quotations(evaluation, calibration),
        "heldout": list(heldout),
        "calibration": list(calibration),
        "train": [text for text in calibration if text not in heldout],
    }


def _without_quotations(documents: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return the documents without the long paragraphs that occur in others; what is left over is distinct."""
    quoted = {_words(paragraph) for text in others for paragraph in PARAGRAPH_BREAK.split(text)}
    kept: dict[str, None] = {}
    for text in documents:
        paragraphs = PARAGRAPH_BREAK.split(text)
        own = [p for p in paragraphs if len(_words(p)) < MIN_QUOTATION_CHARS or _words(p) not in quoted]
        remainder = text if len(own) == len(paragraphs) else "\n\n".join(own).strip()
        if len(remainder) >= MIN_DOCUMENT_CHARS:
            kept[remainder] = None
    return list(kept)


def _words(paragraph: str) -> str:
    """Return a paragraph's words with single spaces, so that its indentation does not count."""
    return " ".join(paragraph.split())


@functools.cache
def _bucket(module: str) -> int:
    """Return the module's bucket, 0 to 99, from a hash of its name."""
    return int.from_bytes(hashlib.sha256(module.encode("utf-8")).digest(), "big") % 100


def _topics(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (pseudo-module, text) of each help topic by name; nothing where they are absent."""
    tree = _parsed(root / "pydoc_data" / "topics.py")
    assignments = [node.value for node in tree.body if isinstance(node, ast.Assign)] if tree else []
    for value in assignments:
        topics = ast.literal_eval(value)
        for name in sorted(topics):
            yield f"pydoc_data.topics:{name}", inspect.cleandoc(topics[name])


def _docstrings(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (module, docstring) of the standard library, by module name and then by place in the file."""
    by_module = {_module_name(path.relative_to(root)): path for path in _source_files(root)}
    for module in sorted(by_module):
        tree = _parsed(by_module[module])
        for text in _docstrings_of(tree) if tree else ():
            if len(text) >= MIN_DOCUMENT_CHARS:
                yield module, text


def _source_files(folder: Path) -> Iterator[Path]:
    """Yield the Python files below a folder, the skipped folders left out; none where it cannot be read."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    for entry in entries:
        if entry.suffix == ".py":
            yield entry
        elif not entry.suffix and not _is_skipped(entry.name) and entry.is_dir():
            yield from _source_files(entry)


def _is_skipped(folder_name: str) -> bool:
    # Build configurations stand in folders such as config-3.11-x86_64-linux-gnu.
    return folder_name in SKIPPED_FOLDERS or folder_name.startswith("config-")


def _module_name(relative: Path) -> str:
    """Return the dotted name of a module from its path below the standard library."""
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _parsed(path: Path) -> ast.Module | None:
    """Return the syntax tree of a file, None where it cannot be read or parsed."""
    try:
        source = path.read_bytes()
        with warnings.catch_warnings():
            # Old escape sequences in the library's sources are no concern of who reads its docstrings.
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (OSError, SyntaxError, ValueError):
        return None


def _docstrings_of(node: ast.AST) -> Iterator[str]:
    """Yield the cleaned docstrings of a module, its classes and its functions, in the order of the file."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node)
        if text:
            yield text.strip()
    for statement in _statements_of(node):
        yield from _docstrings_of(statement)


def _statements_of(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the statements directly below a node that may hold definitions; expressions are not entered."""
    for field in ("body", "handlers", "orelse", "finalbody"):
        children = getattr(node, field, ())
        # A lambda and a conditional expression have one expression there, not a list of statements.
        yield from children if isinstance(children, list) else ()
