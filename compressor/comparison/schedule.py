"""Which cells are made, in which order, from what: the pruned model that recoveries share comes first."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from compressor.comparison.cells import Cell
from compressor.comparison.failures import CellFailure, failure_of
from compressor.comparison.fingerprint import Surroundings, base_of, is_base
from compressor.comparison.folder import ResultsFolder
from compressor.comparison.request import CellRequest, PrunedStart
from compressor.comparison.results import Figures
from compressor.comparison.texts import GridTexts
from compressor.errors import ReportedError
from compressor.planning import Calibration
from compressor.recipe import Recipe

WHOLE = "whole"  # the file that says that a model was written to its last block


@dataclass(frozen=True)
class Planned:
    """A cell whose windows are cut, or which failed before it began.

    Attributes:
        cell: What the grid asks for.
        calibration: Its windows; None where it failed.
        fingerprint: Of its figures; None where it failed.
        base: Fingerprint of the pruned model that it starts from; None where it prunes itself.
        failure: Why it cannot be made.
    """

    cell: Cell
    calibration: Calibration | None = None
    fingerprint: str | None = None
    base: str | None = None
    failure: CellFailure | None = None


def planned_cells(cells: Sequence[Cell], texts: GridTexts, surroundings: Surroundings) -> list[Planned]:
    """Every cell with its windows and fingerprints; a text that cannot be used fails the cells that ask for it."""
    return [_planned(cell, texts, surroundings) for cell in cells]


def _planned(cell: Cell, texts: GridTexts, surroundings: Surroundings) -> Planned:
    if cell.recipe is None:
        return Planned(cell, failure=cell.failure)
    try:
        calibration = texts.calibration(cell.recipe)
    except ReportedError as error:
        return Planned(cell, failure=failure_of(error))
    cell = replace(cell, recipe=cell.recipe.model_copy(update={"evaluation": texts.first}))
    assert cell.recipe is not None
    sha256, shared = calibration.windows.sha256, cell.masks == "shared"
    base = None
    if shared and not is_base(cell.recipe):
        base = surroundings.fingerprint(base_of(cell.recipe), sha256, shared=False)
    fingerprint = surroundings.fingerprint(cell.recipe, sha256, shared=shared)
    return Planned(cell, calibration, fingerprint, base)


@dataclass(frozen=True)
class ModelChoice:
    """The model as cells open it."""

    model: str
    revision: str | None
    trust_remote_code: bool
    device: str


class Requests:
    """Writes what cells read, and says what each one is given.

    Args:
        folder: Of the comparison.
        texts: Windows.
        surroundings: What the cells have in common.
        choice: The model.
        shared_bytes: What the dense model's hidden states may take on the disk.
    """

    def __init__(
        self,
        folder: ResultsFolder,
        texts: GridTexts,
        surroundings: Surroundings,
        choice: ModelChoice,
        shared_bytes: int,
    ) -> None:
        self._folder, self._texts, self._surroundings = folder, texts, surroundings
        self._choice, self._shared_bytes = choice, shared_bytes

    def cell(
        self,
        planned: Planned,
        *,
        dense: Mapping[str, float],
        base: Figures | None = None,
        record: bool = False,
        finished: Path | None = None,
    ) -> CellRequest:
        """What a cell is given.

        Args:
            planned: The cell.
            dense: Perplexity of the dense model by the name of the text, where it is known.
            base: Figures of the pass that made the pruned model which it starts from.
            record: Whether its own pruned model is kept for others.
            finished: Where the model goes that it ends with; None writes none.
        """
        assert planned.cell.recipe is not None
        assert planned.calibration is not None
        assert planned.fingerprint is not None
        start = None
        if base is not None:
            assert planned.base is not None
            pruned = {name: found.pruned for name, found in base.perplexity.items()}
            place = str(self.pruned_folder(planned.base))
            start = PrunedStart(folder=place, pruning_s=base.seconds.pruning, perplexity=pruned)
        recipe, windows = planned.cell.recipe, planned.calibration.windows
        shared = self._folder.shared
        states = shared / "dense" / self._surroundings.dense_states(recipe, windows.sha256)[:32]
        return CellRequest(
            model=self._choice.model,
            revision=self._choice.revision,
            trust_remote_code=self._choice.trust_remote_code,
            device=self._choice.device,
            recipe=recipe,
            windows=self._texts.save_calibration(shared / "windows", planned.calibration),
            evaluation=self._texts.save_evaluations(shared / "windows"),
            dense=dict(dense),
            dense_states=str(states),
            shared_bytes=self._shared_bytes,
            start=start,
            record=str(self.pruned_folder(planned.fingerprint)) if record else None,
            finished=None if finished is None else str(finished),
        )

    def base(self, planned: Planned) -> Planned:
        """The cell whose pruned model ``planned`` starts from."""
        assert planned.cell.recipe is not None
        recipe: Recipe = base_of(planned.cell.recipe)
        cell = Cell(
            table=planned.cell.table,
            pruner=planned.cell.pruner,
            recovery="none",
            target=planned.cell.target,
            variant=planned.cell.variant,
            settings=planned.cell.settings,
            masks=planned.cell.masks,
            recipe=recipe,
        )
        return Planned(cell, planned.calibration, planned.base)

    def pruned_folder(self, base: str) -> Path:
        """Where the pruned model of a base lies."""
        return self._folder.shared / "pruned" / base[:32]

    def has_pruned(self, base: str) -> bool:
        """Whether that model is there to its last block."""
        return (self.pruned_folder(base) / WHOLE).is_file()

    def pruned_is_whole(self, base: str) -> None:
        """Say that it is."""
        (self.pruned_folder(base) / WHOLE).touch()

    def forget_pruned(self, base: str) -> None:
        """Remove it: no cell will ask for it any more."""
        shutil.rmtree(self.pruned_folder(base), ignore_errors=True)
