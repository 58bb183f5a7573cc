"""A whole comparison on a tiny llama: what it measures, keeps, makes again, and leaves behind when a cell fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
from compare_bench import LISTS, Bench
from workshop import Workshop

from compressor.comparing import ComparisonResult
from compressor.comparison.request import CellRequest
from compressor.comparison.results import CellRow, Figures
from compressor.comparison.workers import CellFailed, OwnProcess, ThisProcess
from compressor.errors import OutputRefused, ReportedError, StoppedSafely, UsageError
from compressor.progress import CellProgress, Event
from compressor.recipe import EvaluationRecipe
from exporters.read import read_model


@pytest.fixture(scope="module")
def bench(workshop: Workshop) -> Bench:
    """Comparisons."""
    return Bench(workshop)


@pytest.fixture(scope="module")
def whole(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> ComparisonResult:
    """Two pruners with and without EBFT, shared masks."""
    return bench.run(tmp_path_factory.mktemp("compare") / "out", LISTS)


def by_name(result: ComparisonResult) -> dict[tuple[str, str], CellRow]:
    """The cells by pruner and method."""
    return {(cell.pruner, cell.method): cell for cell in result.comparison.cells}


def figures(result: ComparisonResult, pruner: str, method: str) -> Figures:
    """What a cell measured."""
    found = by_name(result)[pruner, method].figures
    assert found is not None
    return found


def perplexities(result: ComparisonResult) -> list[Any]:
    """Perplexities of all cells, in order."""
    return [cell.figures and cell.figures.perplexity for cell in result.comparison.cells]


# What is measured


def test_compare_leaves_its_products_and_no_shared_files(whole: ComparisonResult) -> None:
    """Four files and the state; what the cells shared is gone."""
    assert {path.name for path in whole.folder.iterdir()} == {
        "compare.json",
        "compare.csv",
        "compare.md",
        "compare.html",
        ".compare",
    }
    assert {path.name for path in (whole.folder / ".compare").iterdir()} == {"cells", "state.json"}
    assert json.loads((whole.folder / "compare.json").read_text("utf-8")) == whole.comparison.tree()
    assert len((whole.folder / "compare.csv").read_text("utf-8").splitlines()) == 5


def test_compare_shared_masks_give_one_pruned_model(whole: ComparisonResult) -> None:
    """All recoveries of a pruner start from the same perplexity and the same seconds of pruning."""
    for pruner in ("wanda", "sparsegpt"):
        none, ebft = figures(whole, pruner, "none"), figures(whole, pruner, "ebft")
        (text,) = none.perplexity
        assert none.perplexity[text].pruned == ebft.perplexity[text].pruned == none.perplexity[text].recovered
        assert none.perplexity[text].pruned != ebft.perplexity[text].recovered
        assert none.seconds.pruning == ebft.seconds.pruning > 0
        assert none.sparsity == pytest.approx(0.5, abs=1e-9)


def test_compare_cells_tell_what_the_repair_did(whole: ComparisonResult) -> None:
    """Losses fall, the learning rate and the trained weights are told, and nothing of it without a repair."""
    ebft, none = figures(whole, "wanda", "ebft"), figures(whole, "wanda", "none")
    assert ebft.losses is not None
    assert ebft.losses.heldout < ebft.losses.heldout_before
    assert ebft.learning_rate is not None
    assert ebft.learning_rate.chosen == 1e-3
    assert ebft.trained_parameters
    assert ebft.seconds.recovery > 0
    assert [block.index for block in ebft.blocks] == [0, 1]
    assert (none.losses, none.learning_rate, none.trained_parameters, none.seconds.recovery) == (
        None,
        None,
        None,
        0,
    )


def test_compare_with_own_masks_is_what_run_gives(bench: Bench, workshop: Workshop, tmp_path: Path) -> None:
    """Perplexities, sparsity and recipe digest equal those of ``compress run``, bit for bit, whatever was shared."""
    result = bench.run(tmp_path / "out", {**LISTS, "pruners": ["sparsegpt"], "masks": "own"})
    for recovery in ("none", "ebft"):
        settings = {"recovery__method": recovery, "recovery__window": "block"}
        alone = workshop.quick(tmp_path / f"{recovery}.onnx", pruning__method="sparsegpt", **settings)
        found = figures(result, "sparsegpt", recovery)
        (values,) = found.perplexity.values()
        assert values.model_dump() == {key: alone.report["perplexity"][key] for key in values.model_dump()}
        assert found.sparsity == alone.report["sparsity"]["measured"]
        assert found.recipe_sha256 == read_model(alone.out).metadata["blockpress.recipe_sha256"]
    assert "each cell's own" in (result.folder / "compare.md").read_text("utf-8")


def test_compare_sharing_changes_no_figure(bench: Bench, whole: ComparisonResult, tmp_path: Path) -> None:
    """Without room for the dense model's states every cell computes them, to the same perplexities."""
    again = bench.run(tmp_path / "out", LISTS, shared_bytes=0)
    assert perplexities(again) == perplexities(whole)


def test_compare_measures_several_texts(bench: Bench, workshop: Workshop, tmp_path: Path) -> None:
    """Each text has its own perplexities, the first one the same as alone."""
    texts = [workshop.texts.evaluation, workshop.texts.calibration]
    chosen = [EvaluationRecipe(source=str(text), max_windows=8) for text in texts]
    one = {**LISTS, "pruners": ["wanda"], "recoveries": ["none"]}
    both = figures(bench.run(tmp_path / "both", one, evaluations=chosen), "wanda", "none")
    first = figures(bench.run(tmp_path / "first", one, evaluations=chosen[:1]), "wanda", "none")
    assert list(both.perplexity) == [text.name for text in texts]
    assert both.perplexity[texts[0].name] == first.perplexity[texts[0].name]
    assert both.perplexity[texts[0].name] != both.perplexity[texts[1].name]


def test_compare_variants_keep_the_evaluation_windows(bench: Bench, tmp_path: Path) -> None:
    """Shorter calibration windows in one variant change its masks, not what perplexity is measured on."""
    variants = [{"name": "short", "set": {"calibration.seqlen": 12}}, {"name": "usual"}]
    grid = {**LISTS, "pruners": ["wanda"], "recoveries": ["none"], "variants": variants}
    result = bench.run(tmp_path / "out", grid)
    short, usual = figures(result, "wanda", "none · short"), figures(result, "wanda", "none")
    (text,) = short.perplexity
    assert short.perplexity[text].dense == usual.perplexity[text].dense
    assert short.perplexity[text].pruned != usual.perplexity[text].pruned
    assert result.comparison.texts[text].window == 24


# Going on


def test_compare_again_makes_nothing(bench: Bench, whole: ComparisonResult, tmp_path: Path) -> None:
    """The same grid in the same folder is all there; a part of it, too."""
    folder = shutil.copytree(whole.folder, tmp_path / "out")
    again = bench.run(folder, LISTS)
    assert bench.made() == []
    assert again.comparison == whole.comparison
    bench.run(folder, {**LISTS, "pruners": ["sparsegpt"]})
    assert bench.made() == []


def test_compare_makes_a_lost_cell_alone(bench: Bench, whole: ComparisonResult, tmp_path: Path) -> None:
    """A cell whose file is gone, or cannot be read, is made again and no other, to the same figures."""
    folder = shutil.copytree(whole.folder, tmp_path / "out")
    file = folder / ".compare" / "cells" / f"{by_name(whole)['wanda', 'ebft'].fingerprint}.json"
    for damage in (file.unlink, lambda: file.write_text("{", encoding="utf-8")):
        damage()
        again = bench.run(folder, LISTS)
        assert bench.made() == ["wanda · 50 % · ebft"]
        assert perplexities(again) == perplexities(whole)


def test_compare_makes_what_has_changed(bench: Bench, whole: ComparisonResult, tmp_path: Path) -> None:
    """Another learning rate concerns the repaired cells alone, another evaluation text all of them."""
    folder = shutil.copytree(whole.folder, tmp_path / "out")
    grid = {**LISTS, "pruners": ["wanda"]}
    bench.run(folder, {"tables": [{**grid, "set": {"recovery.lr": 2e-3}}]})
    assert bench.made() == ["wanda · 50 % · ebft"]
    text = EvaluationRecipe(source=str(bench.workshop.texts.calibration), max_windows=8)
    bench.run(folder, grid, evaluations=[text])
    assert bench.made() == ["wanda · 50 % · none", "wanda · 50 % · ebft"]


def test_compare_stopped_keeps_what_is_finished(
    bench: Bench, whole: ComparisonResult, tmp_path: Path
) -> None:
    """A stop inside the second cell drops that one; the next call makes it and the rest, to the same figures."""

    def second_began() -> bool:
        return any(isinstance(event, CellProgress) and event.number == 2 for event in bench.events)

    with pytest.raises(StoppedSafely, match="after 1 of 4 cells"):
        bench.run(tmp_path / "out", LISTS, stop=second_began)
    statuses = [row["status"] for row in json.loads((tmp_path / "out" / "compare.json").read_text())["cells"]]
    assert statuses == ["done", "open", "open", "open"]
    assert "3 not made yet" in (tmp_path / "out" / "compare.html").read_text("utf-8")
    again = bench.run(tmp_path / "out", LISTS)
    assert bench.made() == ["wanda · 50 % · ebft", "sparsegpt · 50 % · none", "sparsegpt · 50 % · ebft"]
    assert perplexities(again) == perplexities(whole)


def test_compare_tells_windows_of_other_lengths_apart(bench: Bench, tmp_path: Path) -> None:
    """The same tokens in shorter windows make another cell."""
    variants = [
        {"name": "long", "set": {"calibration.num_samples": 8}},
        {"name": "short", "set": {"calibration.num_samples": 16, "calibration.seqlen": 12}},
    ]
    grid = {**LISTS, "pruners": ["wanda"], "recoveries": ["ebft"], "variants": variants}
    long, short = bench.run(tmp_path / "out", grid).comparison.cells
    assert long.fingerprint != short.fingerprint
    assert long.figures
    assert short.figures
    assert long.figures.perplexity != short.figures.perplexity


def test_compare_force_starts_over(bench: Bench, whole: ComparisonResult, tmp_path: Path) -> None:
    """With ``force`` every cell is made again."""
    folder = shutil.copytree(whole.folder, tmp_path / "out")
    bench.run(folder, {**LISTS, "pruners": ["wanda"]}, force=True)
    assert bench.made() == ["wanda · 50 % · none", "wanda · 50 % · ebft"]


# What fails


def test_compare_failed_cell_is_recorded_and_the_others_go_on(bench: Bench, tmp_path: Path) -> None:
    """A pattern that does not divide the inputs fails its cells, by ``compress run``'s error; it is tried again."""
    grid = {**LISTS, "pruners": ["wanda"], "sparsities": [], "patterns": ["3:7", "2:4"]}
    result = bench.run(tmp_path / "out", grid)
    assert [cell.status for cell in result.comparison.cells] == ["failed", "failed", "done", "done"]
    assert {cell.failure.error_id for cell in result.failed if cell.failure} == {"E-PATTERN-DIVIDES"}
    assert len(result.failed) == 2
    assert "E-PATTERN-DIVIDES" in (tmp_path / "out" / "compare.html").read_text("utf-8")
    bench.run(tmp_path / "out", grid)
    assert bench.made() == ["wanda · 3:7 · none", "wanda · 3:7 · ebft"]


def test_compare_unforeseen_error_fails_its_cell(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug in one cell is recorded as one, and the next cell is made."""
    make = ThisProcess.make

    def stumble(worker: ThisProcess, request: CellRequest, *rest: Any) -> Figures:
        if request.recipe.pruning.method == "wanda":
            monkeypatch.setattr("compressor.comparison.cell.check_plan", lambda *_: 1 / 0)
        else:
            monkeypatch.undo()
        return make(worker, request, *rest)

    monkeypatch.setattr(ThisProcess, "make", stumble)
    result = bench.run(tmp_path / "out", {**LISTS, "recoveries": ["none"]})
    assert [cell.status for cell in result.comparison.cells] == ["failed", "done"]
    (failed,) = result.failed
    assert failed.failure is not None
    assert (failed.failure.error_id, failed.failure.exit_code) == ("E-COMPARE-BROKEN", 1)
    assert "ZeroDivisionError" in failed.failure.message


def test_compare_model_that_cannot_be_opened_ends_it_at_once(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would fail every cell alike is the comparison's own error."""
    error = UsageError("E-EXAMPLE", "no such model", "give another one")

    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("compressor.comparison.workers.open_model", refuse)
    with pytest.raises(ReportedError, match="no such model") as caught:
        bench.run(tmp_path / "out", LISTS)
    assert caught.value.exit_code == 2
    assert bench.made() == []


@pytest.mark.parametrize("name", ["notes.txt", "compare.csv"])
def test_compare_refuses_a_folder_of_other_things(bench: Bench, tmp_path: Path, name: str) -> None:
    """A folder that is not empty and no comparison is not written into, unless forced; then what lies there stays."""
    (tmp_path / name).write_text("mine", encoding="utf-8")
    grid = {**LISTS, "pruners": ["magnitude"], "recoveries": ["none"]}
    with pytest.raises(OutputRefused, match=f"holds {name}"):
        bench.run(tmp_path, grid)
    bench.run(tmp_path, grid, force=True)
    assert (tmp_path / "compare.html").is_file()
    assert name != "notes.txt" or (tmp_path / name).read_text("utf-8") == "mine"


def test_compare_refuses_a_file_and_the_model_itself(bench: Bench, tmp_path: Path) -> None:
    """``--out`` is a folder, and not the model's."""
    with pytest.raises(UsageError, match="names a file"):
        bench.run(tmp_path / "compare.onnx", LISTS)
    with pytest.raises(OutputRefused, match="would lie in the input model"):
        bench.run(bench.workshop.model / "out", LISTS)


# A process for each cell


def test_compare_in_processes_of_their_own_gives_the_same_figures(
    bench: Bench, whole: ComparisonResult, tmp_path: Path
) -> None:
    """The default way: equal perplexities, and each cell's own peak memory."""
    result = bench.run(tmp_path / "out", {**LISTS, "pruners": ["wanda"]}, isolate=True)
    for recovery in ("none", "ebft"):
        found, expected = figures(result, "wanda", recovery), figures(whole, "wanda", recovery)
        assert found.perplexity == expected.perplexity
        assert expected.peak_memory_bytes.host is None
        assert found.peak_memory_bytes.host is not None
        assert 50e6 < found.peak_memory_bytes.host < 4e9


def test_compare_killed_cell_is_out_of_memory_and_the_next_one_runs(bench: Bench, tmp_path: Path) -> None:
    """A cell that the system kills is recorded as such, and the process that makes cells goes on."""
    seen = bench.events
    original, killed = seen.append, []

    def kill_first(event: Event) -> None:
        original(event)
        if isinstance(event, CellProgress) and event.detail and not killed:
            (server,) = psutil.Process().children()
            (cell,) = server.children()
            cell.kill()
            killed.append(cell.pid)

    grid = {**LISTS, "recoveries": ["none"], "pruners": ["wanda", "magnitude"]}
    result = bench.run(tmp_path / "out", grid, isolate=True, progress=kill_first)
    assert [cell.status for cell in result.comparison.cells] == ["failed", "done"]
    assert result.failed[0].failure is not None
    assert result.failed[0].failure.error_id == "E-OUT-OF-MEMORY"
    assert result.failed[0].failure.exit_code == 5
    assert psutil.Process().children() == []


def test_compare_process_can_be_stopped_and_tells_of_refusals(bench: Bench, tmp_path: Path) -> None:
    """A stop reaches the cell between blocks; a model that cannot be opened is told of as that."""
    worker = OwnProcess()
    request = CellRequest(
        model=str(tmp_path / "nowhere"),
        recipe=bench.workshop.recipe(),
        windows="none",
        evaluation={},
        dense_states="none",
        shared_bytes=0,
    )
    try:
        with pytest.raises(CellFailed, match="nowhere") as caught:
            worker.make(request, lambda: False, bench.events.append)
        assert caught.value.opening
        assert caught.value.failure.error_id == "E-MODEL-NOT-FOUND"
    finally:
        worker.close()
    grid = {**LISTS, "pruners": ["wanda"]}
    with pytest.raises(StoppedSafely, match="after 0 of 2 cells"):
        bench.run(tmp_path / "out", grid, isolate=True, stop=bench.began)
    assert psutil.Process().children() == []
