"""What decides a cell's figures, as one digest: equal digests, equal figures but for seconds and memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compressor.recipe import Recipe

# Of the versions that a report names, those that can change a figure.
_DECISIVE = ("blockpress", "torch", "transformers", "tokenizers")
_NO_PART = ("evaluation", "gates", "calibration")  # windows stand for the texts


@dataclass(frozen=True)
class Surroundings:
    """What all cells of a comparison have in common.

    Attributes:
        model: Digest of the model's files.
        evaluations: Digests of the evaluation windows.
        device: Kind of device, such as ``cpu``.
        versions: Of libraries.
    """

    model: str
    evaluations: Sequence[str]
    device: str
    versions: Mapping[str, str]

    def fingerprint(self, recipe: Recipe, windows_sha256: str, *, shared: bool) -> str:
        """Digest of one cell.

        Args:
            recipe: Its settings.
            windows_sha256: Digest of its calibration windows.
            shared: Whether it starts from a pruned model that others start from, too.
        """
        return self._digest(
            "cell", settings=_settings(recipe), windows=windows_sha256, shared=shared and not is_base(recipe)
        )

    def dense_states(self, recipe: Recipe, windows_sha256: str) -> str:
        """Digest of the dense model's hidden states for these windows; embeddings are rounded to the exported type."""
        return self._digest("dense", dtype=recipe.export.dtype, windows=windows_sha256)

    def scores(self, subject: str, tasks_sha256: str) -> str:
        """Digest of what tasks give on the model that the cell with the fingerprint ``subject`` ends with."""
        return self._digest("scores", subject=subject, tasks=tasks_sha256)

    def _digest(self, kind: str, **facts: Any) -> str:
        common = {
            "model": self.model,
            "device": self.device,
            "versions": {name: self.versions.get(name) for name in _DECISIVE},
        }
        if kind == "cell":
            common["evaluations"] = list(self.evaluations)
        content = json.dumps([kind, common, facts], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def is_base(recipe: Recipe) -> bool:
    """Whether nothing follows the pruning."""
    return recipe.recovery.method == "none" and not recipe.may_finish


def base_of(recipe: Recipe) -> Recipe:
    """The same pruning with nothing after it."""
    none = {"method": "none"}
    return recipe.model_copy(
        update={
            "recovery": recipe.recovery.model_copy(update=none),
            "finish": recipe.finish.model_copy(update=none),
        }
    )


def _settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that count: a recovery or finish that there is not has none."""
    settings = {key: value for key, value in recipe.model_dump(mode="json").items() if key not in _NO_PART}
    if recipe.recovery.method == "none":
        settings["recovery"] = "none"
    if not recipe.may_finish:
        settings["finish"] = "none"
    settings["export"] = settings["export"]["dtype"]
    return settings
