"""The pass over the decoder blocks: capture, prune, repair, measure, commit; one block in memory at a time.

Block l sees what the already sparse and repaired blocks before it give. Its masks come from those inputs, and are
frozen before the repair begins. Where an end-to-end stage follows (``end_to_end``), finished blocks stay in memory
and are committed after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.devices import mixed_precision
from compressor.end_to_end import EndToEnd
from compressor.errors import StoppedSafely
from compressor.finetuning import Finetuned, Windows
from compressor.linears import IgnoreRules, PrunableMatrix, observe_inputs, prunable_matrices
from compressor.models.source import BlockSource
from compressor.models.writer import CheckpointWriter
from compressor.perplexities import PerplexityStreams, Version
from compressor.progress import BlockFinished, BlockProgress, LearningRateChosen, Notice, Progress
from compressor.propagation import advance, embedded, visit
from compressor.pruning import PRUNERS
from compressor.pruning.pruner import Pruned, check_pattern
from compressor.recipe import Recipe
from compressor.recovery import RECOVERIES
from compressor.recovery.block_io import BlockIO, Repaired
from compressor.recovery.lr_probe import LearningRateProbe
from compressor.sparsity import Mask, SparsityPattern
from compressor.statistics import BlockStatistics
from compressor.streams import Activations


@dataclass(frozen=True)
class BlockResult:
    """One committed block: ``repaired`` is None without a repair, ``notes`` are the pruner's, one per matrix."""

    index: int
    repaired: Repaired | None
    notes: tuple[str, ...]
    elapsed_s: float


@dataclass(frozen=True)
class PassResult:
    """All blocks, the perplexities that came out of the same pass, and the learning rate that was used.

    ``finetuned`` has one entry for each end-to-end stage after the pass.
    """

    blocks: tuple[BlockResult, ...]
    perplexities: dict[str, float]
    lr: float | None
    lr_tried: tuple[float, ...]
    finetuned: tuple[Finetuned, ...] = ()

    @property
    def notices(self) -> tuple[str, ...]:
        """What the pruner had to say, one line per matrix."""
        return tuple(note for block in self.blocks for note in block.notes)


@dataclass
class _Calibration:
    """Calibration and held-out windows before the current block: sparse path, and dense path where it is needed."""

    sparse: Activations
    sparse_heldout: Activations
    dense: Activations | None
    dense_heldout: Activations | None


def check_plan(source: BlockSource, pattern: SparsityPattern, ignore: IgnoreRules) -> int:
    """Number of weights to prune, after every matrix of every block has been checked against the pattern.

    Raises:
        InputRefused: N:M does not divide a matrix' inputs.
        UsageError: An ignore pattern matches nothing, or everything is ignored.
    """
    count = 0
    for index in range(source.num_blocks):
        block = source.block_structure(index)
        for matrix in prunable_matrices(block, f"{source.blocks_name}.{index}", ignore):
            W = matrix.of(block)
            check_pattern(f"{source.blocks_name}.{index}.{matrix.name}", W.shape[1], pattern)
            count += W.numel()
    ignore.check_all_matched(source)
    return count


class BlockPass:
    """Prunes and repairs the blocks of a model in order and commits each one to a writer.

    Args:
        source: The dense blocks.
        calibration: Training windows (N, T).
        heldout: Windows (H, T) that only select steps and the learning rate.
        evaluation: Evaluation windows (E, T).
        recipe: What to do.
        pattern: The sparsity to reach.
        ignore: Which matrices stay dense.
        device: Where blocks compute.
        stop: Asked between blocks; true ends the pass.
        progress: Receives events.
    """

    def __init__(
        self,
        source: BlockSource,
        calibration: Tensor,
        heldout: Tensor,
        evaluation: Tensor,
        *,
        recipe: Recipe,
        pattern: SparsityPattern,
        ignore: IgnoreRules,
        device: torch.device,
        stop: Callable[[], bool],
        progress: Progress,
    ) -> None:
        self._source = source
        self._recipe = recipe
        self._pattern = pattern
        self._ignore = ignore
        self._device = device
        self._stop = stop
        self._progress = progress
        self._repair = RECOVERIES.get(
            recipe.recovery.method
        )  # an end-to-end recovery repairs no single block
        self._end_to_end = EndToEnd(source, recipe, device=device, stop=stop, progress=progress)
        self._pruner = PRUNERS[recipe.pruning.method]
        self._probe = LearningRateProbe(recipe.recovery)
        versions: tuple[Version, ...] = (
            ("dense", "pruned", "recovered")
            if self._repair or self._end_to_end.stages
            else ("dense", "pruned")
        )
        self._evaluation = PerplexityStreams(source, evaluation, device, versions)
        self._ids, self._heldout_ids = calibration, heldout
        sparse, sparse_heldout = embedded(source, calibration, device), embedded(source, heldout, device)
        dense = dense_heldout = None
        self._model_targets = self._repair is not None and recipe.recovery.targets == "model"
        if self._model_targets or self._end_to_end.needs_dense:
            dense = Activations.filled(sparse.states, device=device)
            dense_heldout = Activations.filled(sparse_heldout.states, device=device)
        self._calibration = _Calibration(sparse, sparse_heldout, dense, dense_heldout)

    def run(self, writer: CheckpointWriter) -> PassResult:
        """Commit every block to ``writer``; the result of the pass.

        Raises:
            StoppedSafely: ``stop`` said so between two blocks.
            ReportedError: Weights or activations are not finite, a Hessian is singular, and the like.
        """
        results = []
        for index in range(self._source.num_blocks):
            if self._stop():
                raise StoppedSafely(
                    "E-STOPPED",
                    f"stopped before block {index} of {self._source.num_blocks}",
                    "run the same command again",
                )
            results.append(self._one_block(index, writer))
        finetuned = self._tune_together(writer) if self._end_to_end.stages else ()
        perplexities = self._evaluation.perplexities()
        perplexities.setdefault("recovered", perplexities["pruned"])
        lr = (self._probe.lr or None) if self._repair else None  # 0: nothing was trained
        return PassResult(tuple(results), perplexities, lr, self._probe.tried, finetuned)

    def _one_block(self, index: int, writer: CheckpointWriter) -> BlockResult:
        started = time.perf_counter()
        block = self._source.load_block(index)
        matrices = prunable_matrices(block, f"{self._source.blocks_name}.{index}", self._ignore)
        self._evaluation.advance("dense", index, block)
        statistics, io = self._capture(index, block, matrices)
        masks, notes = self._prune(index, block, matrices, statistics)
        del statistics
        self._evaluation.advance("pruned", index, block)
        repaired = self._repair_block(index, block, masks, io) if io is not None else None
        if repaired is not None and repaired.masks is not None:
            masks = {**masks, **repaired.masks}
        if self._end_to_end.stages:
            self._end_to_end.hold(block, masks, matrices)
        else:
            writer.commit(index, block, masks)  # rounds to the exported type, so what flows on is what ships
        for states in (self._calibration.sparse, self._calibration.sparse_heldout):
            advance(self._source, index, block, states)
        if not self._end_to_end.stages:
            self._evaluation.advance("recovered", index, block)
        elapsed_s = time.perf_counter() - started
        self._tell_finished(index, repaired, elapsed_s)
        return BlockResult(index, repaired, notes, elapsed_s)

    def _capture(
        self, index: int, block: nn.Module, matrices: list[PrunableMatrix]
    ) -> tuple[BlockStatistics | None, BlockIO | None]:
        """Statistics of the dense block's linears on the sparse inputs, and what the repair will aim at."""
        flow = self._calibration
        statistics = self._new_statistics(block, matrices)
        block_targets = self._repair is not None and not self._model_targets
        observed = observe_inputs(block, matrices, statistics.receive) if statistics else nullcontext()
        outputs = heldout_outputs = None
        with observed:
            if block_targets:  # one run of the dense block gives statistics and targets
                outputs = advance(self._source, index, block, flow.sparse, _like(flow.sparse))
            elif statistics is not None:
                visit(self._source, index, block, flow.sparse)
        if statistics is not None:
            statistics.finish()
        for dense in (flow.dense, flow.dense_heldout):
            if dense is not None:
                advance(self._source, index, block, dense)
        if self._repair is None:
            return statistics, None
        if block_targets:
            heldout_outputs = advance(
                self._source, index, block, flow.sparse_heldout, _like(flow.sparse_heldout)
            )
        else:
            outputs, heldout_outputs = flow.dense, flow.dense_heldout
        assert outputs is not None and heldout_outputs is not None  # noqa: PT018  # one fact: targets exist
        return statistics, BlockIO(
            inputs=flow.sparse,
            targets=outputs,
            heldout_inputs=flow.sparse_heldout,
            heldout_targets=heldout_outputs,
            forward=lambda module, hidden: self._source.forward(index, module, hidden),
            device=self._device,
            amp_dtype=mixed_precision(self._device),
            name=f"{self._source.blocks_name}.{index}",
            matrices=matrices,
            pattern=self._pattern,
            load_dense=lambda: self._source.load_block(index),
        )

    def _new_statistics(self, block: nn.Module, matrices: list[PrunableMatrix]) -> BlockStatistics | None:
        kind = self._pruner.statistic
        if kind is None:
            return None
        return BlockStatistics(
            kind, {matrix.name: matrix.of(block).shape[1] for matrix in matrices}, self._device
        )

    def _prune(
        self, index: int, block: nn.Module, matrices: list[PrunableMatrix], statistics: BlockStatistics | None
    ) -> tuple[dict[str, Mask], tuple[str, ...]]:
        """Masks by parameter, and the pruner's notes; the block's weights become the pruner's."""
        parameters = dict(block.named_parameters())
        masks: dict[str, Mask] = {}
        notes = []
        for matrix in matrices:
            name = f"{self._source.blocks_name}.{index}.{matrix.name}"
            statistic = statistics[matrix.name] if statistics is not None else None
            pruned: Pruned = self._pruner.prune(
                matrix.of(block), statistic, self._pattern, self._recipe.pruning, name=name
            )
            mask = masks.setdefault(
                matrix.parameter, torch.ones_like(parameters[matrix.parameter], dtype=torch.bool)
            )
            matrix.of_mask(mask).copy_(pruned.mask)
            with torch.no_grad():
                matrix.of(block).copy_(pruned.weight)
            if pruned.note:
                self._progress(Notice(f"{name}: {pruned.note}"))
                notes.append(f"block {index}, {matrix.name}: {pruned.note}")
        return masks, tuple(notes)

    def _repair_block(self, index: int, block: nn.Module, masks: dict[str, Mask], io: BlockIO) -> Repaired:
        assert self._repair is not None
        recovery, seed = self._recipe.recovery, self._recipe.seed + index
        chosen = self._probe.lr_for(index, block, masks, io, seed=seed)
        if chosen.tried:
            self._progress(LearningRateChosen(chosen.lr, chosen.tried, index))
        total = self._source.num_blocks

        def told(step: int, steps: int) -> None:
            self._progress(BlockProgress(index, total, step, steps))

        return self._repair(block, masks, io, recovery, lr=chosen.lr, seed=seed, progress=told)

    def _tune_together(self, writer: CheckpointWriter) -> tuple[Finetuned, ...]:
        """The end-to-end stages over all blocks, which are committed afterwards."""
        flow = self._calibration
        finetuned = self._end_to_end.tune(
            Windows(self._ids, flow.dense), Windows(self._heldout_ids, flow.dense_heldout)
        )
        self._end_to_end.commit(writer, self._evaluation)
        return finetuned

    def _tell_finished(self, index: int, repaired: Repaired | None, elapsed_s: float) -> None:
        self._progress(
            BlockFinished(
                index=index,
                total=self._source.num_blocks,
                loss_before=repaired.loss_before if repaired else None,
                loss_after=repaired.loss_after if repaired else None,
                best_step=repaired.best_step if repaired else 0,
                steps=repaired.steps if repaired else 0,
                elapsed_s=elapsed_s,
            )
        )


def _like(states: Activations) -> Activations:
    """An empty store of the same shape and place."""
    windows, seqlen, hidden = states.shape
    return Activations(windows, seqlen, hidden, device=states.device)
