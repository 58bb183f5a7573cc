"""DSnoT: the mask of each row moved, weight by weight, until its expected error is gone; nothing is trained.

Source: Zhang et al., "Dynamic Sparse No Training", arXiv 2310.08915, and its published code.

Notation: W (out, in) is a matrix, m_j the mean over windows of the sum over tokens of its input column j, v_j
the variance of that column within a window, ||X_j|| its length. What weight ij adds to the row's output, summed
over the tokens of a window, is expected to be c_ij = W_ij * m_j, so a row misses

    e_i = sum over its pruned weights of c_ij

Each cycle swaps one pair of weights per row while |e_i| is above a threshold: the pruned weight whose
contribution has the sign of e_i and is the largest in units of v_j grows back, and the kept weight with the
lowest Wanda score |W_ij| * ||X_j|| among those whose contribution has the other sign is pruned, so that both
steps bring e_i towards 0. For N:M the pruned weight is the lowest of the grown one's own group.

Deviations from the published code:

* A row stops when it has no candidate left. There it grows a kept weight or prunes a pruned one, and the
  number of zeros changes.
* For N:M, a swap that would not shrink |e_i| is passed over. There it is made, as the weight that is pruned
  may add to the error what the grown one has taken off (2:4 on examples/tiny-llm after all 50 cycles:
  perplexity 56.2 with this rule, 71.2 without).
* The scores are the same for every pruner. After SparseGPT there, they are computed from a Hessian that is
  never summed up, and the mask becomes arbitrary.
* Where the pruner has updated its kept weights (SparseGPT), their change is part of e_i.
* With ``selection: heldout`` a block keeps the masks of the best number of cycles on held-out windows: none,
  1, 2, 4, ... or all. 50 swaps change one weight in 25 of a row of a 7B model at 70 %, and more than the whole
  row at width 128.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.linears import IgnoreRules, PrunableMatrix, observe_inputs
from compressor.recipe import DsnotRecipe, RecoveryRecipe
from compressor.recovery.block_io import BlockIO, Repaired
from compressor.recovery.frozen_masks import FrozenMasks
from compressor.recovery.reconstruction import step_0
from compressor.sparsity import Mask, SparsityPattern
from compressor.statistics import BlockStatistics, Statistic
from compressor.streams import in_order, prefetched


def repair(
    block: nn.Module,
    masks: Mapping[str, Mask],
    io: BlockIO,
    recipe: RecoveryRecipe,
    *,
    lr: float = 0.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Repaired:
    """Moves the masks of ``block`` in place and returns them; as many zeros per row, or per group, as before.

    A weight that grows back gets its dense value; one that stays keeps the value that it came with.

    Args:
        block: On ``io.device``. Masked weights are set to 0 first, whatever they hold.
        masks: Parameter path in the block -> bool mask of the parameter's shape, ``True`` = kept.
        io: Windows, matrices, pattern and the dense block.
        recipe: Selection and the section ``dsnot``. ``best_step`` and ``steps`` of the result are cycles.
        lr: Of no effect, as nothing is trained.
        seed: Of no effect, as nothing is drawn.
        progress: Called after each matrix with (matrices done, matrices in all).

    Raises:
        InputRefused: No windows; a loss or a statistic that is NaN or infinite.
    """
    started = time.perf_counter()
    FrozenMasks(block, masks).zero_weights()
    loss, before, power = step_0(block, io, recipe)
    cycles = recipe.dsnot.max_cycle_time
    swaps = _Swaps(block, masks, io, recipe.dsnot, progress)
    stops = (
        [cycles]
        if recipe.selection == "last"
        else [*(2**k for k in range((cycles - 1).bit_length())), cycles]
    )
    kept, after = 0, before
    for stop in stops:
        swaps.apply(stop)
        found = loss.heldout(block, io, recipe.batch_size)
        if found < after or recipe.selection == "last":
            kept, after = stop, found
    moved = swaps.apply(kept)
    FrozenMasks(block, moved).verify()
    return Repaired(
        loss_before=before,
        loss_after=after,
        target_power=power,
        train_loss_first=None,
        train_loss_last=None,
        best_step=kept,
        steps=cycles,
        lr=0.0,
        diverged=False,
        elapsed_s=time.perf_counter() - started,
        masks=moved,
        trained_parameters=0,
    )


class _Swaps:
    """The swaps of all matrices of a block, which can be made up to any cycle."""

    def __init__(
        self,
        block: nn.Module,
        masks: Mapping[str, Mask],
        io: BlockIO,
        settings: DsnotRecipe,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        assert io.load_dense is not None
        skipped = IgnoreRules(settings.skip)
        matrices = [m for m in io.matrices if not skipped.ignores(f"{io.name}.{m.name}")]
        dense = io.load_dense()
        moments = window_moments(dense, io, matrices)
        self._block, self._masks = block, masks
        self._present = {name: block.get_parameter(name).detach().clone() for name in masks}
        self._when: dict[str, Tensor] = {}  # cycle in which a weight moves, 0 for never; int32, by parameter
        for done, matrix in enumerate(matrices, start=1):
            columns = moments[matrix.name]
            assert isinstance(columns, WindowMoments)
            columns.check_finite(f"{io.name}.{matrix.name}")
            mask = matrix.of_mask(masks[matrix.parameter]).to(io.device)
            W, W_dense = matrix.of(block), matrix.of(dense)
            rows = rows_of(W, W_dense, mask, columns, io.inputs.total, settings)
            name = matrix.parameter
            when = self._when.setdefault(name, torch.zeros_like(self._present[name], dtype=torch.int32))
            matrix.of_mask(when).copy_(swap_cycles(rows, settings, io.pattern))
            grown = matrix.of_mask(self._present[name])
            grown.copy_(torch.where(mask, W, W_dense))
            if progress is not None:
                progress(done, len(matrices))

    @torch.no_grad()
    def apply(self, cycles: int) -> dict[str, Mask]:
        """Sets the block's weights to what they are after this many cycles; the masks, by parameter."""
        moved = {}
        for name, mask in self._masks.items():
            when = self._when.get(name)
            moved[name] = mask if when is None else mask ^ ((when > 0) & (when <= cycles)).to(mask.device)
            kept = moved[name].to(self._present[name].device)
            self._block.get_parameter(name).copy_(self._present[name].masked_fill(~kept, 0.0))
        return moved


class WindowMoments(Statistic):
    """What DSnoT knows of each input column; each contribution is the tokens of one window, (tokens, in).

    The sum has the rows: sum of x, sum of (x - the window's own mean)^2, sum of x^2.
    """

    @staticmethod
    def shape(in_features: int) -> tuple[int, ...]:
        """``(3, in)``."""
        return (3, in_features)

    @staticmethod
    def of(X: Tensor) -> Tensor:
        """The three sums over one window's tokens, (3, in)."""
        total = X.sum(0)
        deviations = X - total / len(X)
        return torch.stack([total, deviations.square().sum(0), X.square().sum(0)])

    def mean_of_sums(self, windows: int) -> Tensor:
        """m_j = mean over ``windows`` of the sum over tokens, (in,); a window without tokens counts as 0."""
        return self._sum[0] / windows

    def variances(self) -> Tensor:
        """v_j, (in,): variances within a window, weighted by its tokens; 0 where there were none."""
        return self._sum[1] / max(self.tokens, 1)

    def norms(self) -> Tensor:
        """||X_j||_2, (in,)."""
        return self._sum[2].sqrt()


def window_moments(dense: nn.Module, io: BlockIO, matrices: Sequence[PrunableMatrix]) -> BlockStatistics:
    """Moments of the inputs of each matrix in the dense block, which sees ``io.inputs`` window by window."""
    widths = {matrix.name: matrix.of(dense).shape[1] for matrix in matrices}
    moments = BlockStatistics(WindowMoments, widths, io.device)
    with torch.no_grad(), observe_inputs(dense, matrices, moments.receive):
        for (window,) in prefetched([io.inputs], in_order(len(io.inputs), 1)):
            io.forward(dense, window)
    moments.finish(io.inputs.ranks)
    return moments


@dataclass(frozen=True)
class Rows:
    """The rows of one matrix before their masks move.

    Attributes:
        mask: (out, in) bool, ``True`` = kept.
        contributions: c_ij, (out, in): of the weight that is there, or of the dense one that could grow back.
        growth: How much a pruned weight helps, (out, in): |c_ij| / v_j^p.
        scores: |W_ij| * ||X_j||, (out, in).
        error: e_i, (out,) float64.
    """

    mask: Mask
    contributions: Tensor
    growth: Tensor
    scores: Tensor
    error: Tensor


def rows_of(
    W: Tensor, W_dense: Tensor, mask: Mask, columns: WindowMoments, windows: int, settings: DsnotRecipe
) -> Rows:
    """What DSnoT looks at in one matrix. ``W``: pruned, ``W_dense``: before, both (out, in) float32."""
    m = columns.mean_of_sums(windows)
    C = torch.where(mask, W, W_dense) * m
    return Rows(
        mask=mask,
        contributions=C,
        growth=C.abs() / columns.variances().pow(settings.pow_of_var_regrowing),
        scores=W.abs() * columns.norms(),
        error=(W_dense - W).double() @ m.double(),
    )


def swap_cycles(rows: Rows, settings: DsnotRecipe, pattern: SparsityPattern | None) -> Tensor:
    """The cycle, from 1, in which each weight is grown or pruned, (out, in) int32; 0: it stays as it is.

    Each cycle swaps one pair in each row that is still at work, and no weight moves twice.
    """
    if pattern is not None and pattern.m is not None:
        return _swapped_in_groups(rows, settings, pattern.m)
    return _swapped(rows, settings)


def _swapped(rows: Rows, settings: DsnotRecipe) -> Tensor:
    """Swaps within rows.

    With ``without_same_sign`` the error may overshoot and is then brought back from the other side; without, a
    row stops before the swap that would turn the sign.
    """
    error, C = rows.error.clone(), rows.contributions
    when = torch.zeros_like(C, dtype=torch.int32)
    grow = _Candidates(rows.growth, C, ~rows.mask, settings.max_cycle_time)
    prune = _Candidates(-rows.scores, C, rows.mask, settings.max_cycle_time)
    active = torch.ones_like(error, dtype=torch.bool)
    for cycle in range(1, settings.max_cycle_time + 1):
        side = (error < 0).long()
        grown, c_grown = grow.first(side)
        pruned, c_pruned = prune.first(1 - side)
        after = error - c_grown + c_pruned
        active &= (error.abs() > settings.update_threshold) & (c_grown != 0) & (c_pruned != 0)
        if not settings.without_same_sign:
            active &= after.sign() == rows.error.sign()
        if not bool(active.any()):
            break
        _note(when, grown, active, cycle)
        _note(when, pruned, active, cycle)
        error = torch.where(active, after, error)
        grow.take(side, active)
        prune.take(1 - side, active)
    return when


def _swapped_in_groups(rows: Rows, settings: DsnotRecipe, m: int) -> Tensor:
    """Swaps within groups of ``m``.

    As published, a row stops before the swap that would turn the sign of its error, and what has grown is safe
    from pruning. A candidate whose group has grown all it can, or whose swap would not shrink |e_i|, is passed
    over.
    """
    error, C = rows.error.clone(), rows.contributions
    when = torch.zeros_like(C, dtype=torch.int32)
    grow = _Candidates(rows.growth, C, ~rows.mask, settings.max_cycle_time)
    live = rows.scores.masked_fill(~rows.mask, torch.inf)  # (out, in); what may still be pruned
    places = torch.arange(m, device=C.device)
    active = torch.ones_like(error, dtype=torch.bool)
    for cycle in range(1, settings.max_cycle_time + 1):
        side = (error < 0).long()
        grown, c_grown = grow.first(side)
        group = (grown // m)[:, None] * m + places  # (out, m)
        lowest, place = live.gather(1, group).min(dim=1)
        pruned = _at(group, place)
        after = error - c_grown + _at(C, pruned).double()
        free = lowest.isfinite() & (after.abs() < error.abs())
        active &= (error.abs() > settings.update_threshold) & (c_grown != 0)
        active &= ~free | (after.sign() == rows.error.sign())
        if not bool(active.any()):
            break
        swaps = active & free
        _note(when, grown, swaps, cycle)
        _note(when, pruned, swaps, cycle)
        live.scatter_(1, pruned[:, None], torch.where(swaps, torch.inf, lowest)[:, None])
        error = torch.where(swaps, after, error)
        grow.take(side, active)
    return when


class _Candidates:
    """For each row two queues of columns, best first: contributions above 0, and below 0."""

    def __init__(self, worth: Tensor, contributions: Tensor, allowed: Tensor, length: int) -> None:
        queues = [
            _queue(worth, contributions, allowed & chosen, length)
            for chosen in (contributions > 0, contributions < 0)
        ]
        self._columns = torch.stack([columns for columns, _ in queues])  # (2, out, length)
        self._contributions = torch.stack([c for _, c in queues])
        self._rows = torch.arange(len(worth), device=worth.device)
        self._next = torch.zeros(2, len(worth), dtype=torch.long, device=worth.device)

    def first(self, side: Tensor) -> tuple[Tensor, Tensor]:
        """Column and contribution of each row's next candidate; contribution 0: there is none. ``side``: (out,)."""
        place = side, self._rows, self._next[side, self._rows]
        return self._columns[place], self._contributions[place]

    def take(self, side: Tensor, taken: Tensor) -> None:
        """Move on to the next candidate in the rows that are ``taken``, (out,) bool."""
        self._next[side, self._rows] += taken.long()


def _queue(worth: Tensor, contributions: Tensor, allowed: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Columns of the highest ``worth``, (out, length + 1), and their contributions, float64; 0 ends a queue."""
    order = worth.masked_fill(~allowed, -torch.inf).argsort(dim=1, descending=True, stable=True)
    order = order[:, :length].clone()
    held = contributions.gather(1, order).double().masked_fill(~allowed.gather(1, order), 0.0)
    return nn.functional.pad(order, (0, 1)), nn.functional.pad(held, (0, 1))


def _at(tensor: Tensor, columns: Tensor) -> Tensor:
    """One element of each row, (out,). ``columns``: (out,)."""
    return tensor.gather(1, columns[:, None])[:, 0]


def _note(when: Tensor, columns: Tensor, swaps: Tensor, cycle: int) -> None:
    """Writes ``cycle`` to one column of each row in which ``swaps``; (out,) each."""
    when.scatter_(1, columns[:, None], torch.where(swaps, cycle, _at(when, columns))[:, None])
