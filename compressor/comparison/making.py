"""The cells of a comparison, made one after the other; each one is kept as soon as it is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from compressor.comparison.failures import CellFailure
from compressor.comparison.folder import ResultsFolder
from compressor.comparison.pace import Pace
from compressor.comparison.results import Figures
from compressor.comparison.schedule import Planned, Requests
from compressor.comparison.scoring import Scoring
from compressor.comparison.workers import CellFailed, Stop, Worker
from compressor.errors import StoppedSafely
from compressor.progress import (
    BlockFinished,
    BlockProgress,
    CellFinished,
    CellProgress,
    Event,
    FinetuningProgress,
    Progress,
    StageStarted,
    TaskProgress,
)


class Making:
    """Goes through the cells that are not there yet.

    Args:
        planned: All cells, in order.
        requests: What each one is given.
        folder: Where finished cells are kept, and found again.
        worker: Who makes them.
        stop: Asked between cells, and by the worker between blocks.
        progress: Receives events.
        scoring: Runs zero-shot tasks on what cells end with; None runs none.
    """

    def __init__(
        self,
        planned: Sequence[Planned],
        requests: Requests,
        folder: ResultsFolder,
        worker: Worker,
        stop: Stop,
        progress: Progress,
        scoring: Scoring | None = None,
    ) -> None:
        self._scoring = scoring
        self._planned, self._requests, self._folder = planned, requests, folder
        self._worker, self._stop, self._progress = worker, stop, progress
        self.figures: dict[str, Figures] = {}
        self.failures: dict[str, CellFailure] = {}
        self._dense: dict[str, dict[str, float]] = {}
        for one in planned:
            found = folder.figures(one.fingerprint) if one.fingerprint is not None else None
            if found is not None:
                self._note(one, found)
        self.found = sum(self.is_done(one) for one in planned)

    def is_done(self, one: Planned) -> bool:
        """Whether all that is asked of a cell was measured."""
        if one.fingerprint is None or one.fingerprint not in self.figures:
            return False
        return self._scoring is None or self._scoring.of(one.fingerprint) is not None

    def run(self, after_each: Callable[[], None]) -> None:
        """Make what is missing; ``after_each`` is called after each cell, finished or failed.

        Raises:
            StoppedSafely: ``stop`` said so; what is finished is kept.
            ReportedError: The model cannot be opened, or the tasks cannot be run, so no cell can be made.
        """
        self._score_dense()
        missing = [one for one in self._planned if one.failure is None and not self.is_done(one)]
        open_cells = list({one.fingerprint: one for one in missing}.values())
        total, pace = len(self._planned), Pace(one.cell.recovery for one in open_cells)
        for place, one in enumerate(open_cells):
            number = total - len(open_cells) + place + 1
            if self._stop():
                raise _stopped(number - 1, total)
            pace.start()
            teller = _Teller(number, total, one.cell.label, pace, self._progress)
            try:
                self._make(one, open_cells[place + 1 :], teller)
            except StoppedSafely:
                raise _stopped(number - 1, total) from None
            except CellFailed as failed:
                if failed.opening:
                    raise failed.failure.raised() from failed
                self._fail(one, failed.failure)
            self._release(one, open_cells[place + 1 :])
            elapsed_s = pace.finish(one.cell.recovery)
            self._progress(self._finished(one, number, elapsed_s, pace.left_s()))
            after_each()

    def _make(self, one: Planned, later: Sequence[Planned], teller: _Teller) -> None:
        assert one.fingerprint is not None
        scoring = self._scoring
        if scoring is None or one.fingerprint not in self.figures or not scoring.has_model(one.fingerprint):
            base = self._base(one, teller) if one.base is not None else None
            self._pass(one, base, teller, record=any(other.base == one.fingerprint for other in later))
        if scoring is not None:
            teller.first("tasks")
            scoring.score(one.fingerprint, teller)

    def _pass(self, one: Planned, base: Figures | None, teller: _Teller, *, record: bool) -> None:
        """Make the figures of a cell, and the models that others start from or tasks are run on."""
        assert one.fingerprint is not None
        finished = self._scoring.place(one.fingerprint) if self._scoring and self._is_scored(one) else None
        request = self._requests.cell(
            one, dense=self._known_dense(one), base=base, record=record, finished=finished
        )
        figures = self._worker.make(request, self._stop, teller)
        if record:
            self._requests.pruned_is_whole(one.fingerprint)
        if self._scoring is not None and finished is not None:
            self._scoring.model_is_whole(one.fingerprint)
        if one.fingerprint not in self.figures:
            self._folder.keep(one.fingerprint, figures)
            self._note(one, figures)

    def _is_scored(self, one: Planned) -> bool:
        """Whether tasks are yet to be run: not on a pruned model that is in no table."""
        return not self.is_done(one) and any(other.fingerprint == one.fingerprint for other in self._planned)

    def _score_dense(self) -> None:
        if self._scoring is None:
            return
        try:
            self._scoring.score_dense(self._progress)
        except StoppedSafely:
            raise _stopped(self.found, len(self._planned)) from None

    def _release(self, one: Planned, later: Sequence[Planned]) -> None:
        """Remove the pruned model that ``one`` started from once no later cell needs it."""
        if one.base is not None and all(other.base != one.base for other in later):
            self._requests.forget_pruned(one.base)

    def _base(self, one: Planned, teller: _Teller) -> Figures:
        """Figures of the pass whose pruned model ``one`` starts from; the model lies there when this returns.

        Raises:
            CellFailed: That pass failed, now or before.
        """
        assert one.base is not None
        if one.base in self.failures and one.base not in self.figures:  # else its tasks alone have failed
            raise CellFailed(self.failures[one.base], opening=False)
        if not self._requests.has_pruned(one.base) or one.base not in self.figures:
            base = self._requests.base(one)
            teller.first(f"pruning by {one.cell.pruner}, once for all recoveries")
            try:
                self._pass(base, None, teller, record=True)
            except CellFailed as failed:
                self._fail(base, failed.failure)
                raise
        return self.figures[one.base]

    def _known_dense(self, one: Planned) -> Mapping[str, float]:
        assert one.cell.recipe is not None
        return self._dense.get(one.cell.recipe.export.dtype, {})

    def _note(self, one: Planned, figures: Figures) -> None:
        assert one.cell.recipe is not None
        assert one.fingerprint is not None
        self.figures[one.fingerprint] = figures
        dense = {name: found.dense for name, found in figures.perplexity.items()}
        self._dense.setdefault(one.cell.recipe.export.dtype, dense)

    def _fail(self, one: Planned, failure: CellFailure) -> None:
        assert one.fingerprint is not None
        self.failures[one.fingerprint] = failure

    def _finished(self, one: Planned, number: int, elapsed_s: float, left_s: float | None) -> CellFinished:
        assert one.fingerprint is not None
        label, total = one.cell.label, len(self._planned)
        failure = self.failures.get(one.fingerprint)
        if failure is not None:
            return CellFinished(
                number,
                total,
                label,
                elapsed_s,
                error_id=failure.error_id,
                error=failure.message,
                left_s=left_s,
            )
        found = next(iter(self.figures[one.fingerprint].perplexity.values()))
        return CellFinished(
            number, total, label, elapsed_s, pruned=found.pruned, recovered=found.recovered, left_s=left_s
        )


class _Teller:
    """Turns the events of the pass inside a cell into where the cell is."""

    def __init__(self, number: int, total: int, label: str, pace: Pace, progress: Progress) -> None:
        self._number, self._total, self._label = number, total, label
        self._pace, self._progress = pace, progress
        self._tell("")

    def first(self, detail: str) -> None:
        """Something comes before the cell itself."""
        self._tell(detail)

    def __call__(self, event: Event) -> None:
        """Show where the pass is."""
        if isinstance(event, (BlockProgress, BlockFinished)):
            done = event.index + (1 if isinstance(event, BlockFinished) else 0)
            self._tell(f"block {min(done + 1, event.total)} of {event.total}")
        elif isinstance(event, FinetuningProgress):
            self._tell(f"{event.stage}, step {event.step} of {event.steps}")
        elif isinstance(event, TaskProgress):
            self._tell(f"tasks, {event.done} of {event.total} requests")
        elif isinstance(event, StageStarted):
            self._tell(event.name)

    def _tell(self, detail: str) -> None:
        left_s = self._pace.left_s(present=True)
        self._progress(CellProgress(self._number, self._total, self._label, detail, left_s))


def _stopped(done: int, total: int) -> StoppedSafely:
    return StoppedSafely(
        "E-STOPPED",
        f"stopped after {done} of {total} cells",
        "run the same command again: it goes on from there",
    )
