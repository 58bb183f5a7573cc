"""The texts of a comparison: evaluation windows that are the same for all cells, calibration windows as cells ask."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from compressor.comparison.request import save_windows
from compressor.evaluation import Evaluation, evaluation_of
from compressor.planning import Calibration, calibration_of
from compressor.recipe import EvaluationRecipe, Recipe
from compressor.report.schema import portable_name


class GridTexts:
    """Windows, cut once for all cells that need the same, and the files that cells read them from.

    Evaluation windows have the length of ``base``'s calibration windows. They keep it in cells whose calibration
    windows have another one: else their perplexities could not be compared.

    Args:
        base: The recipe that cells start from.
        evaluations: The texts to measure on; none takes the recipe's.
        tokenizer: The model's.
        max_seqlen: The most tokens that the model has positions for.
        vocab_rows: Rows of its embedding.

    Raises:
        ReportedError: A text is absent, empty, not UTF-8, too short, or has tokens that the model lacks.
    """

    def __init__(
        self,
        base: Recipe,
        evaluations: Sequence[EvaluationRecipe],
        tokenizer: Any,
        max_seqlen: int,
        vocab_rows: int,
    ) -> None:
        self._tokenizer, self._max_seqlen, self._vocab_rows = tokenizer, max_seqlen, vocab_rows
        self._calibrations: dict[str, Calibration] = {}
        self.base = self.calibration(base)
        self.evaluations: dict[str, Evaluation] = {}
        chosen = tuple(evaluations) or (base.evaluation,)
        self.first = chosen[0]
        for recipe in chosen:
            evaluation = evaluation_of(recipe, tokenizer, self.base.seqlen, vocab_rows)
            self.evaluations[self._free_name(recipe.source)] = evaluation

    def _free_name(self, source: str) -> str:
        """The text's name, with a number behind it where another text has the same."""
        name = portable_name(source)
        count = sum(other == name or other.startswith(f"{name} (") for other in self.evaluations)
        return f"{name} ({count + 1})" if count else name

    def calibration(self, recipe: Recipe) -> Calibration:
        """The calibration windows of a cell.

        Raises:
            ReportedError: The text cannot be used.
        """
        key = json.dumps([recipe.calibration.model_dump(mode="json"), recipe.seed], sort_keys=True)
        if key not in self._calibrations:
            found = calibration_of(recipe, self._tokenizer, self._max_seqlen, self._vocab_rows)
            self._calibrations[key] = found
        return self._calibrations[key]

    def evaluation_digests(self) -> list[str]:
        """What tells the windows of each text from all others, in order."""
        return [evaluation.digest for evaluation in self.evaluations.values()]

    def save_evaluations(self, folder: Path) -> dict[str, str]:
        """Write the evaluation windows where they are missing; their files by the name of the text."""
        files = {}
        for name, evaluation in self.evaluations.items():
            path = folder / f"evaluation-{evaluation.digest}.safetensors"
            if not path.is_file():
                save_windows(path, windows=torch.from_numpy(evaluation.ids))
            files[name] = str(path)
        return files

    def save_calibration(self, folder: Path, calibration: Calibration) -> str:
        """Write the calibration windows where they are missing; their file."""
        windows = calibration.windows
        path = folder / f"calibration-{windows.sha256[:32]}.safetensors"
        if not path.is_file():
            save_windows(path, calibration=windows.ids, heldout=windows.heldout)
        return str(path)
