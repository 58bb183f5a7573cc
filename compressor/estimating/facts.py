"""The counts that an estimate is made of: windows, widths, weights of a run that is planned and has not begun.

Notation: N training, H held-out and E evaluation windows of T tokens, hidden width D.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from compressor.block_pass import versions_of
from compressor.finetuning import stages_of
from compressor.finetuning.sparse_model import kept_bytes_per_token
from compressor.linears import prunable_matrices
from compressor.planning import Job
from compressor.recipe import Recipe
from compressor.recovery import RECOVERIES

__all__ = ["Matrix", "RunFacts", "facts_of_job"]

FLOAT32 = 4


@dataclass(frozen=True)
class Matrix:
    """A matrix of a block that is pruned: rows are outputs."""

    outputs: int
    inputs: int


@dataclass(frozen=True)
class RunFacts:
    """What a run is, in numbers.

    Attributes:
        recipe: As it is used.
        device: Where blocks compute.
        dtype: Type of the exported weights.
        sparsity: Share of zeros, or of weights that go.
        training: N.
        heldout: H.
        evaluation: E.
        seqlen: T.
        hidden: D.
        vocab: Rows of the embedding.
        blocks: How many.
        block_weights: Of the largest block.
        all_block_weights: Of all blocks.
        other_weights: Of embedding, norm and head.
        kept_per_token: Bytes that a backward pass keeps of each token of the largest block.
        matrices: Of the largest block, those that are pruned.
        pruned_weights: Of all blocks.
        shapes: Every pruned matrix' weights -> how many there are of that size.
    """

    recipe: Recipe
    device: torch.device
    dtype: torch.dtype
    sparsity: float
    training: int
    heldout: int
    evaluation: int
    seqlen: int
    hidden: int
    vocab: int
    blocks: int
    block_weights: int
    all_block_weights: int
    other_weights: int
    kept_per_token: int
    matrices: tuple[Matrix, ...]
    pruned_weights: int
    shapes: Mapping[int, int]

    @property
    def window_blocks(self) -> int:
        """Blocks that are repaired together."""
        overlap = self.recipe.recovery.method == "ebft" and self.recipe.recovery.window == "overlap"
        return 2 if overlap and self.blocks > 1 else 1

    @property
    def repairs_blocks(self) -> bool:
        """Whether blocks are repaired one window after the other."""
        return RECOVERIES.get(self.recipe.recovery.method) is not None

    @property
    def trains_blocks(self) -> bool:
        """Whether that repair is a training."""
        return self.recipe.recovery.method in ("ebft", "ebft-mask")

    @property
    def tunes_together(self) -> bool:
        """Whether all blocks are tuned together."""
        return bool(stages_of(self.recipe))

    @property
    def versions(self) -> int:
        """Versions of the model whose perplexity is measured."""
        return len(versions_of(self.recipe))

    @property
    def runs_dense_path(self) -> bool:
        """Whether the dense model's states are kept beside the sparse one's."""
        aims = self.repairs_blocks and self.recipe.recovery.targets != "block"
        return aims or any(stage.needs_dense for stage in stages_of(self.recipe))

    def states_bytes(self, windows: int) -> int:
        """Hidden states of windows, float32."""
        return FLOAT32 * windows * self.seqlen * self.hidden

    def tokens_of_batch(self, batch_size: int) -> int:
        """Of a step, in a run that has not so many windows, fewer."""
        return min(batch_size, self.training) * self.seqlen


def facts_of_job(job: Job, dtype: torch.dtype) -> RunFacts:
    """The counts of a planned run that exports in ``dtype``."""
    source, windows = job.source, job.calibration.windows
    structures = [source.block_structure(index) for index in range(source.num_blocks)]
    sizes = [sum(weight.numel() for weight in block.parameters()) for block in structures]
    largest = sizes.index(max(sizes))
    found = [
        [
            Matrix(*matrix.of(block).shape)
            for matrix in prunable_matrices(block, f"{source.blocks_name}.{index}", job.ignore)
        ]
        for index, block in enumerate(structures)
    ]
    shapes: dict[int, int] = {}
    for matrix in (matrix for matrices in found for matrix in matrices):
        size = matrix.outputs * matrix.inputs
        shapes[size] = shapes.get(size, 0) + 1
    return RunFacts(
        recipe=job.recipe,
        device=job.device,
        dtype=dtype,
        sparsity=job.pattern.sparsity,
        training=len(windows.ids),
        heldout=len(windows.heldout),
        evaluation=len(job.evaluation.ids),
        seqlen=job.calibration.seqlen,
        hidden=source.hidden_size,
        vocab=source.vocab_size,
        blocks=source.num_blocks,
        block_weights=sizes[largest],
        all_block_weights=sum(sizes),
        other_weights=source.num_parameters - sum(sizes),
        kept_per_token=kept_bytes_per_token([structures[largest]]),
        matrices=tuple(found[largest]),
        pruned_weights=sum(size * count for size, count in shapes.items()),
        shapes=shapes,
    )
