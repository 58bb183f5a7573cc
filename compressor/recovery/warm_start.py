"""Where a repair starts: the kept weights as the pruner left them, or the best ones of each matrix for itself.

The second solves, for each matrix with its frozen mask M, on the inputs X that the dense block gives it from the
sparse blocks before,

    min_V  || X (M * V)^T - X W^T ||^2

row by row (compressor.least_squares, a little damped towards W); ALPS (arXiv 2406.07831) has this as its last step.
It knows nothing of what follows the matrix in the block, which is what the repair then mends.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from compressor.least_squares import masked_least_squares
from compressor.linears import observe_inputs
from compressor.recipe import RecoveryRecipe
from compressor.recovery.block_io import BlockIO
from compressor.recovery.frozen_masks import FrozenMasks
from compressor.recovery.heldout import BestWeights
from compressor.recovery.reconstruction import step_0
from compressor.sparsity import Mask
from compressor.statistics import BlockStatistics, Gram
from compressor.streams import in_order, prefetched


def warm_start(block: nn.Module, masks: Mapping[str, Mask], io: BlockIO, recipe: RecoveryRecipe) -> float:
    """Sets the kept weights to the least squares of each matrix; the held-out loss of the block as it came.

    With ``selection: heldout`` they stay only if the block's held-out loss is lower for it.

    Args:
        block: Pruned, on ``io.device``.
        masks: Parameter path in the block -> bool mask of the parameter's shape, ``True`` = kept.
        io: Windows, matrices and the dense block.
        recipe: Batch size, loss and selection.

    Raises:
        InputRefused: No windows; inputs that are NaN or infinite, or linearly dependent.
    """
    assert io.load_dense is not None
    loss, before, _ = step_0(block, io, recipe)
    given = BestWeights([block.get_parameter(name) for name in masks], before)
    dense = io.load_dense()
    matrices = [matrix for matrix in io.matrices if matrix.parameter in masks]
    grams = BlockStatistics(Gram, {m.name: m.of(dense).shape[1] for m in matrices}, io.device)
    with torch.no_grad(), observe_inputs(dense, matrices, grams.receive):
        for (hidden,) in prefetched([io.inputs], in_order(len(io.inputs), io.at_once(recipe.batch_size))):
            io.forward(dense, hidden)
    grams.finish(io.inputs.ranks)
    for matrix in matrices:
        gram = grams[matrix.name]
        assert isinstance(gram, Gram)
        mask = matrix.of_mask(masks[matrix.parameter]).to(io.device)
        name = f"{io.name}.{matrix.name}"
        matrix.of(block).copy_(masked_least_squares(matrix.of(dense), gram.gram(), mask, name=name))
    if recipe.selection == "heldout" and not loss.heldout(block, io, recipe.batch_size) < before:
        given.restore()
    FrozenMasks(block, masks).verify()
    return before
