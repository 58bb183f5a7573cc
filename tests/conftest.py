"""Every test runs with one torch thread, no network and a cache folder of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from workshop import Workshop

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded; the tests run side by side
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Where blockpress-runtime is not installed (no C++ compiler), its Python part is tested from its folder.
sys.path.append(str(Path(__file__).parent.parent / "runtime"))

# Files with the longest tests go first: of two processes, none then waits minutes for the last one of the other.
_FIRST = ("test_tiny_llm", "test_variants", "test_validate_export", "test_validate_examine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest tests first and leave the others in their order."""
    items.sort(key=lambda item: item.path.stem not in _FIRST)


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which this test's locks and logs lie."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("BLOCKPRESS_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session", autouse=True)
def shared_traces(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The folder in which the processes of one run leave their traces for each other (remembered_traces.py)."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = tmp_path_factory.getbasetemp().parent / "traces"
        folder.mkdir(exist_ok=True)
        os.environ["BLOCKPRESS_TEST_TRACES"] = str(folder)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A tiny model, its texts, and runs on it that are made when the first test asks for them."""
    from workshop import open_workshop  # it imports torch, which most tests do without

    return open_workshop(tmp_path_factory.mktemp("workshop"))
