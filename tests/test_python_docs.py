"""The offline text source: splits, repeatability, and refusal of a Python without documentation."""

from __future__ import annotations

import sys
import sysconfig
from hashlib import sha256
from pathlib import Path

import pytest

from compressor.calibration import python_docs as source
from compressor.calibration.python_docs import Split, python_docs
from compressor.errors import InputRefused

SPLITS: tuple[Split, ...] = ("calibration", "evaluation", "train", "heldout")


def test_python_docs_evaluation_is_disjoint_from_the_rest() -> None:
    """No evaluation document occurs verbatim in a split that a model sees."""
    evaluation = set(python_docs("evaluation").documents)
    for split in ("calibration", "train", "heldout"):
        assert evaluation.isdisjoint(python_docs(split).documents)


def test_python_docs_train_and_heldout_make_up_calibration() -> None:
    """Calibration text is train and held-out text together, and these two share no document."""
    train, heldout = set(python_docs("train").documents), set(python_docs("heldout").documents)
    assert train.isdisjoint(heldout)
    assert train | heldout == set(python_docs("calibration").documents)


def test_python_docs_split_follows_the_modules_name() -> None:
    """Evaluation text comes from the modules whose hash says so, and none of their documents is calibrated on."""
    root = Path(sysconfig.get_paths()["stdlib"])
    named = [*source._topics(root), *source._docstrings(root)]
    reserved = {text for module, text in named if int(sha256(module.encode()).hexdigest(), 16) % 100 < 10}
    assert reserved.isdisjoint(python_docs("calibration").documents)
    lines = {line.strip() for text in reserved for line in text.splitlines()}
    evaluation = python_docs("evaluation").documents
    assert all(line.strip() in lines for text in evaluation for line in text.splitlines())


def test_python_docs_evaluation_quotes_no_calibration_paragraph() -> None:
    """No paragraph of 60 characters or more stands in both evaluation and calibration text."""

    def long_paragraphs(split: Split) -> set[str]:
        blocks = "\n\n".join(python_docs(split).documents).replace("\t", " ").split("\n\n")
        return {text for text in (" ".join(block.split()) for block in blocks) if len(text) >= 60}

    assert len(long_paragraphs("evaluation")) > 100
    assert long_paragraphs("evaluation").isdisjoint(long_paragraphs("calibration"))


def test_python_docs_cuts_quotations_only() -> None:
    """A long paragraph that occurs elsewhere goes, whatever its indentation; short and own ones stay as written."""
    long = "A paragraph that is long enough to count as a quotation of another text."
    documents = [f"Own words.\n\n  {long}\n\n  More own words.", "Return it unchanged.", long]
    others = [long, "Return it unchanged."]
    kept = source._without_quotations(documents, others)
    assert kept == ["Own words.\n\n  More own words.", "Return it unchanged."]


@pytest.mark.parametrize("split", SPLITS)
def test_python_docs_documents_are_distinct_and_long_enough(split: Split) -> None:
    """No split repeats a document, and each has text enough to measure on."""
    documents = python_docs(split).documents
    assert len(set(documents)) == len(documents)
    assert sum(map(len, documents)) > 40_000


def test_python_docs_repeats_itself_and_imports_nothing() -> None:
    """Reading the files anew gives the same documents in the same order, and imports no module."""
    first = {split: list(python_docs(split).documents) for split in SPLITS}
    before = set(sys.modules)
    assert source._split_documents.__wrapped__() == first
    assert set(sys.modules) == before


def test_python_docs_hash_tells_splits_apart() -> None:
    """Each split has a SHA-256 of its own."""
    digests = {python_docs(split).sha256 for split in SPLITS}
    assert len(digests) == len(SPLITS)
    assert all(len(digest) == 64 for digest in digests)


def test_python_docs_reads_topics_and_docstrings() -> None:
    """Both the help topics and the docstrings of the library are among the documents."""
    everything = {*python_docs("calibration").documents, *python_docs("evaluation").documents}
    assert any("for_stmt" in text and "suite" in text for text in everything)
    assert any(text.startswith("Create a decimal point instance") for text in everything)


def test_python_docs_runs_no_code(tmp_path: Path) -> None:
    """A source file with side effects gives its docstrings and has none."""
    path = tmp_path / "module.py"
    path.write_text('"""About the module."""\nraise SystemExit\ndef f():\n    """About f, twice."""\n')
    tree = source._parsed(path)
    assert tree is not None
    assert list(source._docstrings_of(tree)) == ["About the module.", "About f, twice."]


def test_python_docs_finds_nested_docstrings_in_order(tmp_path: Path) -> None:
    """Docstrings below conditions, handlers and classes are found in the file's order."""
    path = tmp_path / "module.py"
    path.write_text(
        "try:\n    def a():\n        'first'\nexcept OSError:\n    def b():\n        'second'\n"
        "if a:\n    class C:\n        'third'\n        async def d(self):\n            'fourth'\n"
    )
    tree = source._parsed(path)
    assert tree is not None
    assert list(source._docstrings_of(tree)) == ["first", "second", "third", "fourth"]


@pytest.mark.parametrize("library", [".", "absent"])
def test_python_docs_refuses_a_stripped_python(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that has no sources, or does not exist, is refused with the id and the folder's name."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / library)})
    with pytest.raises(InputRefused, match="found 0 in") as refusal:
        source._split_documents.__wrapped__()
    assert refusal.value.error_id == "E-PYTHON-DOCS-MISSING"
    assert str(tmp_path) in refusal.value.message
