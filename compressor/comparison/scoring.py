"""Zero-shot tasks on the dense model and on the models that cells end with; each one is kept as soon as it is done."""

from __future__ import annotations

import shutil
from pathlib import Path

from compressor.comparison.fingerprint import Surroundings
from compressor.comparison.folder import ResultsFolder
from compressor.comparison.request import ScoringRequest
from compressor.comparison.results import Scores, TaskFacts
from compressor.comparison.schedule import WHOLE, ModelChoice
from compressor.comparison.task_set import TaskSet
from compressor.comparison.workers import CellFailed, Stop, Worker
from compressor.progress import Progress, StageStarted

_DENSE = "dense"


class Scoring:
    """Scores models on tasks, and finds what was scored before.

    A cell writes the model that it ends with into a folder of its own, and that is scored in a process of its own: so
    the peak memory of a cell is that of its methods, with tasks and without.

    Args:
        tasks: Tasks.
        choice: The dense model, and where models compute.
        surroundings: What the cells have in common.
        folder: Where scores are kept.
        worker: Who runs the tasks.
        stop: Asked after each answer.
    """

    def __init__(
        self,
        tasks: TaskSet,
        choice: ModelChoice,
        surroundings: Surroundings,
        folder: ResultsFolder,
        worker: Worker,
        stop: Stop,
    ) -> None:
        self._tasks, self._choice, self._surroundings = tasks, choice, surroundings
        self._folder, self._worker, self._stop = folder, worker, stop
        self._known: dict[str, Scores] = {}

    def of(self, fingerprint: str) -> Scores | None:
        """The scores of the model that a cell ended with; None where it was not scored."""
        if fingerprint not in self._known:
            found = self._folder.scores(self._surroundings.scores(fingerprint, self._tasks.digest))
            if found is None:
                return None
            self._known[fingerprint] = found
        return self._known[fingerprint]

    def facts(self) -> TaskFacts:
        """The tasks, and what the dense model scored."""
        return self._tasks.facts(self.of(_DENSE))

    def score_dense(self, progress: Progress) -> None:
        """Score the dense model, unless that was done before.

        Raises:
            ReportedError: The tasks cannot be loaded or run: no cell could be scored.
            StoppedSafely: ``stop`` said so.
        """
        if self.of(_DENSE) is not None:
            return
        progress(StageStarted("tasks", "on the dense model"))
        try:
            self._score(_DENSE, self._choice.model, self._choice.revision, progress)
        except CellFailed as failed:
            raise failed.failure.raised() from failed

    def score(self, fingerprint: str, progress: Progress) -> None:
        """Score the model that a cell left in :meth:`place`, and remove it.

        Raises:
            CellFailed: It came to no end.
            StoppedSafely: ``stop`` said so; the model stays, for the next call to go on with.
        """
        place = self.place(fingerprint)
        try:
            self._score(fingerprint, str(place), None, progress)
        except CellFailed:
            shutil.rmtree(place, ignore_errors=True)
            raise
        shutil.rmtree(place, ignore_errors=True)

    def place(self, fingerprint: str) -> Path:
        """Where a cell writes the model that it ends with."""
        return self._folder.shared / "finished" / fingerprint[:32]

    def has_model(self, fingerprint: str) -> bool:
        """Whether that model is there as a whole."""
        return (self.place(fingerprint) / WHOLE).is_file()

    def model_is_whole(self, fingerprint: str) -> None:
        """Say that it is."""
        (self.place(fingerprint) / WHOLE).touch()

    def _score(self, subject: str, model: str, revision: str | None, progress: Progress) -> None:
        request = ScoringRequest(
            model=model,
            revision=revision,
            trust_remote_code=self._choice.trust_remote_code,
            device=self._choice.device,
            tasks=self._tasks.choice,
        )
        scores = self._worker.score(request, self._stop, progress)
        self._folder.keep_scores(self._surroundings.scores(subject, self._tasks.digest), scores)
        self._known[subject] = scores
