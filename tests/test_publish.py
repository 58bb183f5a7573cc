"""Publishing: the final path is absent, old or complete."""

from __future__ import annotations

import errno
import itertools
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from compressor.errors import OutputRefused, ReportedError, UsageError
from compressor.run import publish
from compressor.run.output import OutputPlan, name_output, plan_output, reserve_output
from compressor.run.publish import Staging

FILE_PRODUCTS = {
    "sparse.onnx",
    "sparse.onnx.data",
    "sparse.hf",
    "sparse.report.json",
    "sparse.report.html",
    "sparse.manifest.json",
}


def write_products(plan: OutputPlan, content: str) -> None:
    """Write every product with ``content`` as its text; a folder output gets a tokenizer too."""
    for path in plan.products:
        if path == plan.hf:
            path.mkdir()
            (path / "config.json").write_text(content)
        else:
            path.write_text(content)
    if not plan.is_file:
        (plan.folder / f"tokenizer-{content}.json").write_text(content)
        plan.manifest.write_text(json.dumps({"files": [{"name": f"tokenizer-{content}.json"}]}))


def publish_output(out: Path, content: str, *, force: bool = False) -> tuple[Path, ...]:
    """Stage and publish products that hold ``content``."""
    with reserve_output(out, force) as plan, Staging(plan) as staging:
        write_products(staging.plan, content)
        return staging.publish()


def snapshot(folder: Path) -> dict[str, str]:
    """Path to text of every file below ``folder``."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["sparse.onnx", "model-folder"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An output path of each kind."""
    place = tmp_path / "place"
    place.mkdir()
    return place / str(request.param)


def test_publish_leaves_the_products_and_nothing_else(tmp_path: Path) -> None:
    """A file output puts six products beside each other; the staging folder is gone."""
    published = publish_output(tmp_path / "sparse.onnx", "new")
    assert {path.name for path in tmp_path.iterdir()} == FILE_PRODUCTS
    assert published[-1] == tmp_path / "sparse.onnx"


def test_publish_folder_replaces_a_stale_product(tmp_path: Path) -> None:
    """A file of the older export that the new one lacks goes; a file of the user stays."""
    publish_output(tmp_path / "out", "old")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    publish_output(tmp_path / "out", "new", force=True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "tokenizer-old.json" not in names
    assert {"tokenizer-new.json", "notes.txt", "model.onnx"} <= names
    assert not [name for name in names if name.startswith(".")]


def test_publish_into_an_empty_folder_keeps_that_folder(tmp_path: Path) -> None:
    """A folder that exists (it may be a mount) is filled, not replaced."""
    out = tmp_path / "out"
    out.mkdir()
    inode = out.stat().st_ino
    publish_output(out, "new")
    assert out.stat().st_ino == inode
    assert (out / "model.onnx").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_publish_refuses_a_file_that_does_not_belong(tmp_path: Path) -> None:
    """A stray file in the staging folder is our bug, and nothing is published."""
    with reserve_output(tmp_path / "sparse.onnx") as plan, Staging(plan) as staging:
        write_products(staging.plan, "new")
        (staging.plan.folder / "stray").touch()
        with pytest.raises(ValueError, match="stray"):
            staging.publish()
    assert list(tmp_path.iterdir()) == []


def test_publish_needs_the_onnx_file(tmp_path: Path) -> None:
    """Without its graph there is no output."""
    with (
        reserve_output(tmp_path / "sparse.onnx") as plan,
        Staging(plan) as staging,
        pytest.raises(ValueError, match=r"sparse\.onnx was not written"),
    ):
        staging.publish()


def test_publish_failure_while_writing_leaves_the_old_output(out: Path) -> None:
    """An error before publication removes the staging folder and touches nothing else."""
    publish_output(out, "old")
    before = snapshot(out.parent)
    with reserve_output(out, True) as plan:
        staging = Staging(plan)
        with staging:
            write_products(staging.plan, "new")
        assert not staging.root.exists()
    assert snapshot(out.parent) == before


def test_publish_failure_at_any_rename_brings_the_old_output_back(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever rename fails, the older output is whole again; with no failure the new one is."""
    publish_output(out, "old")
    before = snapshot(out.parent)
    calls = 0
    while True:
        fail_at, calls = calls, 0
        real = os.replace

        def moving(source: Path, target: Path, *, fail_at: int = fail_at, real=real) -> None:  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            if calls == fail_at + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(publish, "_move", moving)
            try:
                publish_output(out, "new", force=True)
                break
            except OSError:
                assert snapshot(out.parent) == before
        calls = fail_at + 1
    assert fail_at >= 8  # every product left and came
    assert "old" not in snapshot(out.parent).values()


def test_publish_on_a_disk_that_flushes_no_more_brings_the_old_output_back(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever flush is the first to fail, those behind it fail too; the staging folder goes all the same."""
    publish_output(out, "old")
    before, real = snapshot(out.parent), publish.flush_folder
    for flushes in itertools.count():
        left = iter(range(flushes))

        def flushing(folder: Path, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(folder)

        with monkeypatch.context() as patch:
            patch.setattr(publish, "flush_folder", flushing)
            try:
                publish_output(out, "new", force=True)
                break
            except OSError:
                assert snapshot(out.parent) == before
                assert not list(out.parent.rglob("*.staging"))
    assert flushes >= 3  # what is new, the journal's folder, the output's
    assert "old" not in snapshot(out.parent).values()


KILLED = """
import os, sys
from pathlib import Path
from compressor.run import publish
sys.path.insert(0, sys.argv[1])
from test_publish import publish_output
left, real = int(sys.argv[3]), os.replace
def moving(source, target):
    global left
    if left == 0:
        os._exit(9)
    left -= 1
    real(source, target)
publish._move = moving
publish_output(Path(sys.argv[2]), "new", force=True)
"""


@pytest.mark.parametrize("moves", [0, 1, 5, 7, 11])
def test_publish_killed_midway_is_completed_by_the_next_run(tmp_path: Path, moves: int) -> None:
    """After a kill the .onnx is absent, old or new; the next run first completes the publication."""
    out = tmp_path / "sparse.onnx"
    publish_output(out, "old")
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(out), str(moves)]
    killed = subprocess.run(command, check=False, cwd=Path(__file__).parents[1])
    assert killed.returncode == 9
    if out.exists():
        assert out.read_text() == ("old" if moves == 0 else "new")
    with pytest.raises(OutputRefused) as refused, reserve_output(out):
        pass
    assert refused.value.error_id == "E-OUTPUT-EXISTS"
    assert set(snapshot(tmp_path).values()) == {"new"}
    assert {path.name for path in tmp_path.iterdir()} == FILE_PRODUCTS


def test_publish_leftovers_of_a_killed_run_are_removed(out: Path) -> None:
    """A staging folder without a journal is debris of a killed run, in both places where it can lie."""
    debris = out.parent / f".{out.name}.staging" / "new"
    debris.mkdir(parents=True)
    (debris / "half").write_text("half")
    publish_output(out, "new")
    assert not debris.exists()


def test_publish_ignores_a_journal_that_points_elsewhere(tmp_path: Path) -> None:
    """A journal is a file that others could write: a path in it is refused."""
    root = tmp_path / ".sparse.onnx.staging"
    root.mkdir()
    (root / "journal.json").write_text(json.dumps({"leaving": ["../victim"], "coming": []}))
    with pytest.raises(OutputRefused) as refused, reserve_output(tmp_path / "sparse.onnx"):
        pass
    assert refused.value.error_id == "E-OUTPUT-JOURNAL"


def test_publish_keeps_the_modes_of_the_umask(tmp_path: Path) -> None:
    """Files written with private modes get what the umask asks for, as any new file would."""
    old = os.umask(0o027)
    try:
        with reserve_output(tmp_path / "sparse.onnx") as plan, Staging(plan) as staging:
            write_products(staging.plan, "new")
            staging.plan.data.chmod(0o600)
            staging.publish()
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "sparse.onnx.data").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "sparse.hf").stat().st_mode) == 0o750


def test_publish_into_a_race_refuses_what_appeared(tmp_path: Path) -> None:
    """An output that appears after the plan was made is not overwritten."""
    plan = plan_output(tmp_path / "sparse.onnx")
    (tmp_path / "sparse.onnx").write_text("someone else's")
    with pytest.raises(OutputRefused), Staging(plan):
        pass
    assert snapshot(tmp_path) == {"sparse.onnx": "someone else's"}


def refusal(out: str | Path, **options: object) -> ReportedError:
    """The error that planning ``out`` raises."""
    with pytest.raises(ReportedError) as refused:
        plan_output(out, **options)  # type: ignore[arg-type]
    return refused.value


def test_output_that_exists_needs_force(tmp_path: Path) -> None:
    """Any one product that exists already is named and refused, and replaced with --force."""
    (tmp_path / "sparse.report.json").touch()
    error = refusal(tmp_path / "sparse.onnx")
    assert (error.error_id, error.exit_code) == ("E-OUTPUT-EXISTS", 6)
    assert "sparse.report.json" in error.message
    assert plan_output(tmp_path / "sparse.onnx", force=True).onnx == tmp_path / "sparse.onnx"


def test_output_folder_with_content_needs_force(tmp_path: Path) -> None:
    """An empty folder is free, one with any file is not."""
    assert plan_output(tmp_path).onnx == tmp_path / "model.onnx"
    (tmp_path / "notes.txt").touch()
    error = refusal(tmp_path)
    assert (error.error_id, error.exit_code) == ("E-OUTPUT-EXISTS", 6)
    assert "notes.txt" in error.message


def test_output_parent_must_exist(tmp_path: Path) -> None:
    """A missing parent is named with the command that makes it."""
    error = refusal(tmp_path / "no" / "sparse.onnx")
    assert (error.error_id, error.exit_code) == ("E-OUTPUT-PARENT", 6)
    assert error.remedy == f"create it: mkdir -p {tmp_path / 'no'}"


def test_output_kind_must_match(tmp_path: Path) -> None:
    """A folder called x.onnx and a file in the place of a folder are refused, --force or not."""
    (tmp_path / "x.onnx").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe.onnx")
    for name in ("x.onnx", "file", "pipe.onnx"):
        assert refusal(tmp_path / name, force=True).error_id == "E-OUTPUT-KIND"


@pytest.mark.parametrize("name", ["", "  ", ".onnx", "there/.onnx", "a\0b.onnx"])
def test_output_needs_a_name(name: str) -> None:
    """A path without a name is a usage error."""
    with pytest.raises(UsageError) as refused:
        name_output(name)
    assert refused.value.error_id == "E-OUTPUT-NAME"


def test_output_not_writable_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that takes no new entry is refused; mkdir fails here as on a read-only mount."""

    def read_only(self: Path, *_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    error = refusal(tmp_path / "sparse.onnx")
    assert (error.error_id, error.exit_code) == ("E-OUTPUT-NOT-WRITABLE", 6)
    assert "Read-only file system" in error.message


@pytest.mark.parametrize(
    ("out", "model"), [("m/sparse.onnx", "m"), ("m", "m"), ("m/sub", "m"), ("sparse.onnx", "sparse.hf")]
)
def test_output_stays_clear_of_the_input_model(tmp_path: Path, out: str, model: str) -> None:
    """An output inside the model's folder, or one that would replace it, is refused even with --force."""
    (tmp_path / model).mkdir()
    error = refusal(tmp_path / out, force=True, model=tmp_path / model)
    assert (error.error_id, error.exit_code) == ("E-OUTPUT-IS-INPUT", 6)


def test_output_beside_the_model_is_fine(tmp_path: Path) -> None:
    """A neighbour of the model's folder and a hub id collide with nothing."""
    (tmp_path / "m").mkdir()
    assert plan_output(tmp_path / "sparse.onnx", model=tmp_path / "m").is_file
    assert not plan_output(tmp_path / "m2", model="org/name").is_file
