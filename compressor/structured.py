"""Structured pruning, planned over all blocks: which heads and neurons go, and the block without them.

The plan is made from one survey of the dense model; the pass over the blocks then carries it out, block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from compressor.errors import InputRefused, UsageError
from compressor.linear_layers import weight_of
from compressor.linears import IgnoreRules, PrunableMatrix, observe_inputs, prunable_matrices
from compressor.models.source import BlockSource
from compressor.moments import Moments
from compressor.pruning.flap import channel_scores, compensation, member_scores
from compressor.pruning.unit_budget import UnitPool, share_out, weights_of
from compressor.ranks import ALONE, Ranks
from compressor.recipe import FlapRecipe
from compressor.sparsity import pruned_count
from compressor.survey import survey
from compressor.uniform_widths import uniform_counts
from compressor.units import UnitGroup, find_units, remove_channels

__all__ = ["Anatomy", "GroupCut", "StructuredPlan", "find_anatomy", "plan_removal", "prune_units"]

_PROBE_TOKENS = 8


@dataclass(frozen=True)
class Anatomy:
    """What of each block can be taken out, and how many weights count.

    Attributes:
        groups: Of each block.
        weights: Prunable weights of each block, those of matrices that cannot be cut included.
        per_unit: Of each group of each block: weights that go with one unit.
        uniform: How many units each kind of group gives up in every layer; ``None`` unless that was asked for.
        widths: Values for the config then; empty otherwise.
    """

    groups: tuple[tuple[UnitGroup, ...], ...]
    weights: tuple[int, ...]
    per_unit: tuple[tuple[int, ...], ...]
    uniform: Mapping[str, int] | None = None
    widths: Mapping[str, int] = field(default_factory=dict)

    @property
    def removable(self) -> int:
        """Weights that go when one unit of each group is left."""
        return sum(
            (group.units - 1) * each
            for groups, per_unit in zip(self.groups, self.per_unit, strict=True)
            for group, each in zip(groups, per_unit, strict=True)
        )


@dataclass(frozen=True)
class GroupCut:
    """What one group of a block loses.

    Attributes:
        group: Heads or neurons.
        kept: (channels,) bool.
        mean: E[x] of its channels, (channels,), for the bias that stands in for what goes; ``None`` for no bias.
    """

    group: UnitGroup
    kept: Tensor
    mean: Tensor | None

    @property
    def units_left(self) -> int:
        """Units that stay."""
        return int(self.kept.sum()) // (self.group.width * self.group.shared)


@dataclass(frozen=True)
class StructuredPlan:
    """What every block loses.

    Attributes:
        cuts: Of each block.
        removed: Weights that go, of each block.
        weights: Prunable weights of each block before.
    """

    cuts: tuple[tuple[GroupCut, ...], ...]
    removed: tuple[int, ...]
    weights: tuple[int, ...]

    @property
    def sparsity(self) -> float:
        """Share of all prunable weights that go."""
        return sum(self.removed) / sum(self.weights)


def find_anatomy(
    source: BlockSource, ignore: IgnoreRules, sparsity: float, *, uniform: bool = False
) -> Anatomy:
    """The units of every block, and whether so many weights can go with them.

    A group with an ignored matrix stays whole. Blocks of equal modules are tried once.

    Args:
        source: The dense blocks.
        ignore: Which matrices stay; they do not count as prunable.
        sparsity: Share of the prunable weights that is to go.
        uniform: Whether all layers are to stay alike, in widths that a config of transformers can state.

    Raises:
        InputRefused: E-FLAP-EXPERTS, E-FLAP-CODE, E-FLAP-STRUCTURE: the model has no such units.
        UsageError: E-FLAP-TARGET: they do not have that many weights; E-FLAP-UNIFORM.
    """
    _refuse_unfit(source)
    tried: dict[object, tuple[UnitGroup, ...]] = {}
    groups, weights, per_unit = [], [], []
    for index in range(source.num_blocks):
        block = source.block_structure(index)
        matrices = prunable_matrices(block, f"{source.blocks_name}.{index}", ignore)
        prunable = {matrix.parameter for matrix in matrices}
        form = (
            tuple((path, type(module)) for path, module in block.named_modules()),
            tuple((name, parameter.shape) for name, parameter in block.named_parameters()),
        )
        if form not in tried:
            tried[form] = _units_of(source, index)
        own = tuple(group for group in tried[form] if {f"{path}.weight" for path in group.layers} <= prunable)
        groups.append(own)
        weights.append(sum(matrix.of(block).numel() for matrix in matrices))
        per_unit.append(tuple(group.weights_per_unit(block) for group in own))
    ignore.check_all_matched(source)
    anatomy = Anatomy(tuple(groups), tuple(weights), tuple(per_unit))
    if not any(groups):
        raise InputRefused(
            "E-FLAP-STRUCTURE",
            f"no heads or neurons could be taken out of a block of this {source.architecture.label} model",
            "choose an unstructured pruner, such as --pruner wanda, or --ignore fewer matrices",
        )
    if pruned_count(sum(weights), sparsity) > anatomy.removable:
        raise UsageError(
            "E-FLAP-TARGET",
            f"heads and neurons that can go have {anatomy.removable / sum(weights):.1%} of the blocks' weights, "
            f"not {sparsity:.1%}",
            "lower --sparsity, or choose an unstructured pruner, such as --pruner wanda",
        )
    if not uniform:
        return anatomy
    counts, widths = uniform_counts(source, groups, per_unit[0], pruned_count(sum(weights), sparsity))
    return replace(anatomy, uniform=counts, widths=widths)


def plan_removal(
    source: BlockSource,
    ids: Tensor,
    device: torch.device,
    anatomy: Anatomy,
    recipe: FlapRecipe,
    sparsity: float,
    *,
    stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> StructuredPlan:
    """What each block loses, from one pass of the dense model over the calibration windows.

    Args:
        source: The dense blocks.
        ids: Calibration windows (N, T).
        device: Where blocks compute.
        anatomy: Of ``source``.
        recipe: Metric, allocation, bias compensation; the last two are the anatomy's where it is uniform.
        sparsity: Share of the prunable weights that goes. It is met to less than the weights of one neuron; with
            uniform widths, of one neuron in each layer.
        stop: Asked between blocks; true ends the survey.
        ranks: Who shares the windows.

    Raises:
        UsageError: E-FLAP-HEADS, E-FLAP-TARGET: the target cannot be met in this way.
        InputRefused: E-STATISTIC-NONFINITE.
        StoppedSafely: ``stop`` said so.
    """

    def examine(index: int, block: nn.Module, send: Callable[[], object]) -> list[_Surveyed]:
        name = f"{source.blocks_name}.{index}"
        return _surveyed(block, name, anatomy.groups[index], send, recipe, device, ranks)

    found = survey(source, ids, device, examine, stop=stop, ranks=ranks)
    pools = [
        UnitPool(group.kind, own.unit_scores, each, group.shared if group.kind == "heads" else 0)
        for groups, of_block, per_unit in zip(anatomy.groups, found, anatomy.per_unit, strict=True)
        for group, own, each in zip(groups, of_block, per_unit, strict=True)
    ]
    budget = pruned_count(sum(anatomy.weights), sparsity)
    counts = (
        share_out(pools, budget, recipe.structure, heads=recipe.remove_heads)
        if anatomy.uniform is None
        else tuple(anatomy.uniform[pool.kind] for pool in pools)
    )
    if budget - weights_of(pools, counts) >= _granule(pools, anatomy):
        way = recipe.structure if anatomy.uniform is None else "uniform widths"
        reached = weights_of(pools, counts) / sum(anatomy.weights)
        raise UsageError(
            "E-FLAP-TARGET",
            f"by {way} no more than {reached:.1%} of the blocks' weights can go, not {sparsity:.1%}",
            "lower --sparsity, or set pruning.flap.structure to AL-AM",
        )
    return _plan(anatomy, found, counts, compensate=recipe.bias_compensation and anatomy.uniform is None)


def prune_units(block: nn.Module, cuts: Sequence[GroupCut]) -> None:
    """Take what ``cuts`` say out of a dense block, in place; the means of what goes become biases."""
    for cut in cuts:
        if not bool(cut.kept.all()):
            W = weight_of(block.get_submodule(cut.group.output))
            bias = None if cut.mean is None else compensation(W, cut.kept, cut.mean)
            remove_channels(block, cut.group, cut.kept, bias)


@dataclass(frozen=True)
class _Surveyed:
    """What the survey keeps of one group: members of each unit, lowest scores first, their scores, input means."""

    members: Tensor  # (units, shared)
    unit_scores: Tensor  # (units,)
    mean: Tensor  # (channels,)


def _surveyed(
    block: nn.Module,
    name: str,
    groups: Sequence[UnitGroup],
    send: Callable[[], object],
    recipe: FlapRecipe,
    device: torch.device,
    ranks: Ranks,
) -> list[_Surveyed]:
    """Scores and means of a dense block's groups, after all windows have gone through it."""
    outputs = {f"{group.output}.weight": group for group in groups}
    moments = {path: Moments(group.channels, device) for path, group in outputs.items()}
    matrices = [PrunableMatrix(path, path) for path in outputs]
    with observe_inputs(block, matrices, lambda path, X: moments[path].add(X)):
        send()
    found = []
    for path, group in outputs.items():
        inputs = moments[path]
        inputs.merge_ranks(ranks)
        if not bool(torch.isfinite(inputs.variance).all()):
            raise InputRefused(
                "E-STATISTIC-NONFINITE",
                f"the calibration inputs of {name}.{path} hold NaN or infinity",
                "check the model's weights, or run with --device cpu to compute in float32",
            )
        W = weight_of(block.get_submodule(group.output))
        scores = member_scores(group, channel_scores(W, inputs, recipe.metric)).cpu()
        members = group.ranked(scores)
        found.append(_Surveyed(members, scores[members].mean(1), inputs.mean.cpu()))
    return found


def _plan(
    anatomy: Anatomy,
    found: Sequence[Sequence[_Surveyed]],
    counts: Sequence[int],
    *,
    compensate: bool,
) -> StructuredPlan:
    remaining = iter(counts)
    cuts, removed = [], []
    for groups, of_block, per_unit in zip(anatomy.groups, found, anatomy.per_unit, strict=True):
        own, gone = [], 0
        for group, surveyed, each in zip(groups, of_block, per_unit, strict=True):
            count = next(remaining)
            kept = group.keeping(surveyed.members[:count])
            own.append(GroupCut(group, kept, surveyed.mean if compensate else None))
            gone += count * each
        cuts.append(tuple(own))
        removed.append(gone)
    return StructuredPlan(tuple(cuts), tuple(removed), anatomy.weights)


def _granule(pools: Sequence[UnitPool], anatomy: Anatomy) -> int:
    """Weights that the target may be missed by: one of the smallest units; in each layer where all are alike."""
    smallest = min(pool.weights for pool in pools)
    return smallest * (1 if anatomy.uniform is None else len(anatomy.groups))


def _units_of(source: BlockSource, index: int) -> tuple[UnitGroup, ...]:
    """The units of one block, tried on a few tokens of noise."""
    tokens = min(_PROBE_TOKENS, source.max_seqlen)
    noise = torch.randn((1, tokens, source.hidden_size), generator=torch.Generator().manual_seed(0))

    def run(block: nn.Module) -> Tensor:
        hidden = noise.to(next(block.parameters()))
        with torch.no_grad():
            return source.forward(index, block, hidden)

    return find_units(lambda: source.load_block(index), run)


def _refuse_unfit(source: BlockSource) -> None:
    """Refuse what heads and neurons are not all of, or what could not be loaded again."""
    if source.architecture.experts is not None:
        raise InputRefused(
            "E-FLAP-EXPERTS",
            f"{source.architecture.label} keeps most of its weights in experts, which flap cannot cut",
            "choose an unstructured pruner, such as --pruner wanda",
        )
    if source.architecture.remote_code:
        raise InputRefused(
            "E-FLAP-CODE",
            f"{source.architecture.label} runs on code that comes with it, which would not know the new shapes",
            "choose an unstructured pruner, such as --pruner wanda",
        )
