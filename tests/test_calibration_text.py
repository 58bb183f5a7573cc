"""Texts by name: what each kind of source gives, and how bad ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from compressor.calibration.text import read_text
from exporters.errors import ReportedError


def refusal(source: Path | str, **options: Any) -> ReportedError:
    """The error that reading ``source`` ends with."""
    with pytest.raises(ReportedError) as refused:
        read_text(str(source), **{"role": "calibration", **options})
    return refused.value


def write_lines(path: Path, *rows: object) -> Path:
    """A JSON lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_text_of_a_file_is_one_text(tmp_path: Path) -> None:
    """A .txt or .raw file is one text, its line ends kept and a byte order mark dropped."""
    for name in ("a.txt", "a.raw", "A.TXT"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n")
        text = read_text(str(tmp_path / name), role="calibration")
        assert (text.kind, text.documents) == ("text", ("one\r\n\r\ntwo\n",))


def test_text_of_json_lines_is_documents(tmp_path: Path) -> None:
    """Each line is a document, blank lines are passed over, another column can be named."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ä", "other": "1"}\n\n{"text": "b\\nc", "other": "2"}', encoding="utf-8")
    text = read_text(str(path), role="calibration")
    assert (text.kind, text.documents) == ("documents", ("ä", "b\nc"))
    assert read_text(str(path), role="calibration", text_column="other").documents == ("1", "2")


def test_text_of_parquet_is_documents(tmp_path: Path) -> None:
    """Rows are documents, nulls are passed over."""
    pq.write_table(pa.table({"text": ["a", None, "b"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    assert read_text(str(tmp_path / "a.parquet"), role="evaluation").documents == ("a", "b")
    assert refusal(tmp_path / "a.parquet", text_column="body").error_id == "E-TEXT-NO-COLUMN"
    assert refusal(tmp_path / "a.parquet", text_column="n").error_id == "E-TEXT-NO-COLUMN"


def test_text_of_python_docs_has_a_part_for_each_role() -> None:
    """The built-in text gives calibration and evaluation no document in common."""
    calibration, evaluation = (read_text("python-docs", role=role) for role in ("calibration", "evaluation"))
    assert calibration.kind == evaluation.kind == "documents"
    assert not set(calibration.documents) & set(evaluation.documents)
    assert "python-docs" in calibration.description


def test_text_hash_follows_the_documents(tmp_path: Path) -> None:
    """Equal documents have equal hashes wherever they stand; moving a border between two changes it."""
    one = read_text(str(write_lines(tmp_path / "a.jsonl", {"text": "ab"}, {"text": "c"})), role="calibration")
    same = read_text(str(write_lines(tmp_path / "b.jsonl", {"text": "ab"}, {"text": "c"})), role="evaluation")
    other = read_text(
        str(write_lines(tmp_path / "c.jsonl", {"text": "a"}, {"text": "bc"})), role="calibration"
    )
    assert one.sha256 == same.sha256 != other.sha256


@pytest.mark.parametrize(
    ("name", "content", "error_id", "said"),
    [
        ("a.txt", b"", "E-CALIBRATION-EMPTY", "a.txt"),
        ("a.txt", b" \n\t", "E-CALIBRATION-EMPTY", "a.txt"),
        ("a.jsonl", b"\n\n", "E-CALIBRATION-EMPTY", "a.jsonl"),
        ("a.jsonl", b'{"text": ""}', "E-CALIBRATION-EMPTY", "a.jsonl"),
        ("a.txt", b"abc\xff", "E-TEXT-NOT-UTF8", "byte 3"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "E-TEXT-NOT-UTF8", "line 2"),
        ("a.jsonl", b'{"text": "\\ud800"}', "E-TEXT-NOT-UTF8", "document 1"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": ', "E-TEXT-BAD-JSONL", "line 3"),
        ("a.jsonl", b'{"text": "a"}\n["b"]', "E-TEXT-BAD-JSONL", "line 2"),
        ("a.jsonl", b'{"text": 7}', "E-TEXT-BAD-JSONL", "line 1"),
        ("a.jsonl", b"[" * 100_000, "E-TEXT-BAD-JSONL", "line 1"),
        ("a.jsonl", b'{"body": "a"}', "E-TEXT-NO-COLUMN", "body"),
        ("a.parquet", b"PAR1 no", "E-TEXT-BAD-PARQUET", "a.parquet"),
        ("a.parquet", b"", "E-TEXT-BAD-PARQUET", "a.parquet"),
        ("a.csv", b"text\na", "E-TEXT-FORMAT", "a.csv"),
    ],
)
def test_text_refuses_bad_files(tmp_path: Path, name: str, content: bytes, error_id: str, said: str) -> None:
    """Each kind of damage has its id, and the message names file and line."""
    (tmp_path / name).write_bytes(content)
    error = refusal(tmp_path / name)
    assert (error.error_id, error.exit_code) == (error_id, 3)
    assert said in error.message


def test_text_names_the_role_of_an_empty_text(tmp_path: Path) -> None:
    """An empty evaluation text is told apart from an empty calibration text."""
    (tmp_path / "a.txt").write_text("")
    error = refusal(tmp_path / "a.txt", role="evaluation")
    assert error.error_id == "E-EVAL-EMPTY"
    assert "--eval-data" in error.remedy


@pytest.mark.parametrize("source", ["./a.jsonl", "/nowhere/a", "a.txt", "x/y/z", "~nobody/a.raw"])
def test_text_refuses_missing_files(source: str) -> None:
    """What looks like a file and is none is not asked for on the hub."""
    assert refusal(source).error_id == "E-TEXT-NOT-FOUND"


@pytest.mark.parametrize("source", ["somebody/no-such-dataset", "no-such-dataset"])
def test_dataset_says_that_it_is_offline(source: str) -> None:
    """A dataset that is not cached is not fetched while the hub may not be asked."""
    error = refusal(source)
    assert (error.error_id, error.exit_code) == ("E-HUB-OFFLINE", 7)


@pytest.fixture
def dataset_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the datasets library reads, with a train and a test split."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_lines(folder / "train.jsonl", {"text": "a", "body": "A"}, {"text": "b", "body": "B"})
    write_lines(folder / "test.jsonl", {"text": "c", "body": "C"})
    return folder


def test_dataset_folder_gives_each_role_its_split(dataset_folder: Path) -> None:
    """Calibration takes train, evaluation takes test, unless a split is named."""
    source = str(dataset_folder)
    assert read_text(source, role="calibration").documents == ("a", "b")
    assert read_text(source, role="evaluation").documents == ("c",)
    assert read_text(source, role="evaluation", split="train[1:]").documents == ("b",)
    assert read_text(source, role="evaluation", text_column="body").documents == ("C",)


def test_dataset_folder_saved_by_the_library(dataset_folder: Path, tmp_path: Path) -> None:
    """What save_to_disk left is read as well."""
    import datasets

    loaded = datasets.load_dataset(str(dataset_folder))
    loaded.save_to_disk(str(tmp_path / "saved"))
    assert read_text(str(tmp_path / "saved"), role="evaluation").documents == ("c",)


@pytest.mark.parametrize(
    ("options", "error_id", "exit_code"),
    [
        ({"split": "dev"}, "E-DATASET-SPLIT", 2),
        ({"dataset_config": "other"}, "E-DATASET-CONFIG", 2),
        ({"text_column": "title"}, "E-TEXT-NO-COLUMN", 3),
    ],
)
def test_dataset_refuses_what_it_lacks(
    dataset_folder: Path, options: dict[str, str], error_id: str, exit_code: int
) -> None:
    """A split, configuration or column that is not there is named."""
    error = refusal(dataset_folder, **options)
    assert (error.error_id, error.exit_code) == (error_id, exit_code)


def test_dataset_scripts_are_not_run(dataset_folder: Path) -> None:
    """A folder with a script is refused before the library sees it."""
    (dataset_folder / "corpus.py").write_text("raise SystemExit('this code was run')", encoding="utf-8")
    assert refusal(dataset_folder).error_id == "E-DATASET-SCRIPT"


def test_dataset_folder_without_data_is_refused(tmp_path: Path) -> None:
    """A folder that holds no data files is no dataset."""
    assert refusal(tmp_path).error_id == "E-TEXT-NOT-FOUND"
