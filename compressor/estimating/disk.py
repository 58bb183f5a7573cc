"""How many bytes a run writes: its state, its output by encoding, and what memory does not hold."""

from __future__ import annotations

from dataclasses import dataclass

from compressor.estimating.facts import FLOAT32, RunFacts
from exporters.encoding import MIN_SAVING
from exporters.protobuf import expected_index_bytes

__all__ = ["OutputSize", "output_size", "state_bytes"]


@dataclass(frozen=True)
class OutputSize:
    """Bytes of an export by encoding, from the target sparsity.

    Attributes:
        dense: All weights dense.
        sparse: Every pruned matrix as a sparse initializer.
        auto: Each in the smaller form.
        hf: The PyTorch sparse model beside it, masks included.
    """

    dense: int
    sparse: int
    auto: int
    hf: int

    def of(self, encoding: str) -> int:
        """Of the ONNX files, by the recipe's encoding."""
        return {"dense": self.dense, "sparse": self.sparse, "auto": self.auto}[encoding]


def output_size(facts: RunFacts) -> OutputSize:
    """The sizes that the target sparsity leads to."""
    width = facts.dtype.itemsize
    weights = facts.all_block_weights + facts.other_weights
    masks = facts.pruned_weights // 8
    if facts.recipe.pruning.method == "flap":
        left = width * (weights - int(facts.sparsity * facts.pruned_weights))
        return OutputSize(left, left, left, left)
    dense = width * weights
    sparse = auto = dense
    density = 1 - facts.sparsity
    for size, count in facts.shapes.items():
        stored = int(density * size * width) + expected_index_bytes(size, density)
        sparse += count * (stored - width * size)
        if stored <= (1 - MIN_SAVING) * width * size:
            auto += count * (stored - width * size)
    return OutputSize(dense, sparse, auto, dense + masks)


def state_bytes(facts: RunFacts) -> int:
    """The folder of a run's state at its largest: finished blocks, and three commits' streams while one is written."""
    moving = (1 + facts.runs_dense_path) * facts.states_bytes(facts.training + facts.heldout)
    moving += facts.versions * facts.states_bytes(facts.evaluation)
    finished = FLOAT32 * facts.all_block_weights + facts.pruned_weights // 8
    tuned = finished if facts.tunes_together else 0
    opened = FLOAT32 * facts.block_weights if facts.window_blocks == 2 else 0
    return finished + tuned + 3 * (moving + opened)
