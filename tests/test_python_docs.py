"""The offline text source: its splits, its repeatability, and its refusal of a Python without documentation."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from compressor.calibration import python_docs as source
from compressor.calibration.python_docs import Split, python_docs
from compressor.errors import InputRefused

SPLITS: tuple[Split, ...] = ("calibration", "evaluation", "train", "heldout")


def forget_texts() -> None:
    """Empty the in-process caches, so that the next call reads the files again."""
    python_docs.cache_clear()
    source._split_documents.cache_clear()


@pytest.fixture
def unread_texts() -> Iterator[None]:
    """Empty the caches before a test that points the source elsewhere, and after it."""
    forget_texts()
    yield
    forget_texts()


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
    """Evaluation text comes from the modules whose hash says so, and none of their text is calibrated on."""
    root = Path(sysconfig.get_paths()["stdlib"])
    named = [*source._topics(root), *source._docstrings(root)]
    reserved = {text for module, text in named if int(sha256(module.encode()).hexdigest(), 16) % 100 < 10}
    assert reserved == set(python_docs("evaluation").documents)
    assert reserved.isdisjoint(python_docs("calibration").documents)


@pytest.mark.parametrize("split", SPLITS)
def test_python_docs_documents_are_distinct_and_long_enough(split: Split) -> None:
    """No split repeats a document, and each has text enough to measure on."""
    documents = python_docs(split).documents
    assert len(set(documents)) == len(documents)
    assert sum(map(len, documents)) > 40_000


def test_python_docs_repeats_itself(unread_texts: None) -> None:
    """Reading the files a second time gives the same documents in the same order."""
    first = python_docs("evaluation")
    forget_texts()
    second = python_docs("evaluation")
    assert first is not second
    assert first == second


def test_python_docs_hash_tells_splits_apart() -> None:
    """Each split has a SHA-256 of its own."""
    digests = {python_docs(split).sha256 for split in SPLITS}
    assert len(digests) == len(SPLITS)
    assert all(len(digest) == 64 for digest in digests)


def test_python_docs_imports_nothing(unread_texts: None) -> None:
    """The library's modules are read as text: reading them imports none."""
    sysconfig.get_paths()  # imports the build's own configuration
    before = set(sys.modules)
    python_docs("evaluation")
    assert set(sys.modules) == before


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


def test_python_docs_refuses_a_stripped_python(
    unread_texts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library without sources is refused with the text's error id and the folder's name."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(InputRefused, match="found 0 in") as refusal:
        python_docs("calibration")
    assert refusal.value.error_id == "E-PYTHON-DOCS-MISSING"
    assert str(tmp_path) in refusal.value.message


def test_python_docs_refuses_an_absent_library(
    unread_texts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library folder that does not exist is refused, not a traceback."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "absent")})
    with pytest.raises(InputRefused, match="absent"):
        python_docs("evaluation")
