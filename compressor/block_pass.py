"""The pass over the decoder blocks: capture, prune, repair, measure, commit; one window of blocks in memory at a time.

Block l sees what the already sparse and repaired blocks before it give. Its masks come from those inputs, and are
frozen before the repair begins; heads and neurons are chosen in a survey of the dense model before. A window is one
block, or two where windows overlap (``block_windows``); a block is committed when the last one leaves it. Where an
end-to-end stage follows (``end_to_end``), finished blocks stay in memory and are committed after it.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from compressor.block_pruning import BlockPruning, PrunedBlock, prepare_pruning
from compressor.block_result import BlockResult, PassResult
from compressor.block_windows import BlockWindow, OpenBlock, joined, training_of_a_window, windows_of
from compressor.calibration_states import CalibrationStates, States
from compressor.dense_path import ComputedPath, DensePath
from compressor.devices import mixed_precision, settle
from compressor.end_to_end import EndToEnd
from compressor.errors import StoppedSafely
from compressor.finetuning import Finetuned, Windows, stages_of
from compressor.linears import IgnoreRules, PrunableMatrix, observe_inputs, prunable_matrices
from compressor.micro_batch import MicroBatch
from compressor.models.source import BlockSource
from compressor.models.writer import BlockWriter
from compressor.pass_state import PassState
from compressor.perplexities import EvaluationStreams, PerplexityStreams, Version
from compressor.progress import BlockFinished, BlockProgress, LearningRateChosen, Progress
from compressor.pruned_model import NoPrunedModel, PrunedModel
from compressor.pruning.pruner import check_pattern
from compressor.ranks import ALONE, Ranks
from compressor.recipe import Recipe
from compressor.recovery import RECOVERIES
from compressor.recovery.block_io import BlockIO, Repaired
from compressor.recovery.lr_probe import LearningRateProbe
from compressor.recovery.warm_start import warm_start
from compressor.run.faults import reach
from compressor.sparsity import Mask, SparsityPattern
from compressor.streams import Activations
from compressor.structured import Anatomy


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


def versions_of(recipe: Recipe) -> tuple[Version, ...]:
    """Whose perplexity a pass measures, the one that ships last: a model that nothing repairs is the pruned one."""
    repaired = RECOVERIES.get(recipe.recovery.method) is not None or stages_of(recipe)
    return ("dense", "pruned", "recovered") if repaired else ("dense", "pruned")


class BlockPass:
    """Prunes and repairs the blocks of a model in order and commits each one to a writer.

    Args:
        source: The dense blocks.
        calibration: Training windows (N, T).
        heldout: Windows (H, T) that only select steps and the learning rate.
        evaluation: Evaluation windows (E, T), or streams that the caller has set up.
        recipe: What to do.
        pattern: The sparsity to reach.
        ignore: Which matrices stay dense.
        device: Where blocks compute.
        stop: Asked between blocks; true ends the pass.
        progress: Receives events.
        dense_path: Moves the dense model's hidden states; None runs every block.
        pruned_model: Blocks that were pruned before, or a place for those that are; None prunes all and keeps none.
        anatomy: The heads and neurons of ``source``, where they have been looked for already.
        state: Keeps what is done after each window, and may hold windows that an earlier run has done; None keeps none.
        ranks: Who shares the windows; ``stop`` says the same on all of them.
    """

    def __init__(
        self,
        source: BlockSource,
        calibration: Tensor,
        heldout: Tensor,
        evaluation: Tensor | EvaluationStreams,
        *,
        recipe: Recipe,
        pattern: SparsityPattern,
        ignore: IgnoreRules,
        device: torch.device,
        stop: Callable[[], bool],
        progress: Progress,
        dense_path: DensePath | None = None,
        pruned_model: PrunedModel | None = None,
        anatomy: Anatomy | None = None,
        state: PassState | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._source = source
        self._ranks = ranks
        self._state = state
        self._recipe = recipe
        self._pattern = pattern
        self._ignore = ignore
        self._device = device
        self._stop = stop
        self._progress = progress
        self._repair = RECOVERIES.get(
            recipe.recovery.method
        )  # an end-to-end recovery repairs no single block
        self._end_to_end = EndToEnd(source, recipe, device=device, stop=stop, progress=progress, ranks=ranks)
        self._anatomy = anatomy
        self._probe = LearningRateProbe(recipe.recovery)
        self._micro_batch = MicroBatch(progress, may_halve=ranks.world == 1)
        self._ships = versions_of(recipe)[-1]  # measured as it is committed, in the exported type
        self._evaluation: EvaluationStreams = (
            PerplexityStreams(source, evaluation, device, versions_of(recipe), ranks=ranks)
            if isinstance(evaluation, Tensor)
            else evaluation
        )
        self._pruned_model = pruned_model or NoPrunedModel()
        self._ids, self._heldout_ids = calibration, heldout
        recovery = recipe.recovery if self._repair is not None else None
        self._states = CalibrationStates(
            source,
            calibration,
            heldout,
            recovery,
            device=device,
            dense_path=dense_path or ComputedPath(source),
            needs_dense=self._end_to_end.needs_dense,
            ranks=ranks,
        )
        overlap = recipe.recovery.method == "ebft" and recipe.recovery.window == "overlap"
        self._windows = windows_of(source.num_blocks, overlap=overlap)
        twice = len(self._windows) > source.num_blocks
        self._training = training_of_a_window(recipe.recovery, twice=twice)
        self._open: dict[int, OpenBlock] = {}

    def run(self, writer: BlockWriter) -> PassResult:
        """Commit every block to ``writer``; the result of the pass.

        Raises:
            StoppedSafely: ``stop`` said so between two blocks.
            ReportedError: Weights or activations are not finite, a Hessian is singular, and the like.
        """
        results = self._go_on(writer)
        done = 0 if self._state is None else self._state.windows_done
        for number, window in enumerate(self._windows[done:], start=done + 1):
            if self._stop():
                raise StoppedSafely(
                    "E-STOPPED",
                    f"stopped before block {window.blocks[-1]} of {self._source.num_blocks}",
                    "run the same command again",
                )
            reach("blocks: before a window")
            result = self._one_window(window, writer)
            if window.is_last_of:
                results.append(result)
            if self._state is not None:
                opened = list(self._open.values())
                self._state.commit(number, results, self._trials(), self._streams, opened)
            reach("blocks: after a window")
        finetuned = self._tune_together(writer) if self._end_to_end.stages else ()
        perplexities = self._evaluation.perplexities()
        perplexities.setdefault("recovered", perplexities["pruned"])
        lr = (self._probe.lr or None) if self._repair else None  # 0: nothing was trained
        halved = tuple(self._micro_batch.notices)
        return PassResult(tuple(results), perplexities, lr, self._probe.tried, finetuned, halved)

    def _go_on(self, writer: BlockWriter) -> list[BlockResult]:
        """Take over what the state holds of an earlier run; the results of its blocks."""
        state = self._state
        if state is None or not state.windows_done:
            return []
        for index in state.finished_blocks():
            block, masks = state.load_finished(index)
            self._hand_on(index, block, masks, self._matrices(index, block), writer)
        state.restore(self._streams)
        self._probe.restore(state.probe)
        self._micro_batch.size = state.probe.get("micro_batch")
        for opened in state.open_blocks():
            self._open[opened.index] = self._reopened(opened)
        return state.results

    def _reopened(self, opened: OpenBlock) -> OpenBlock:
        """A block between two windows, with what its repair sees; it aims at the dense model's states, as pairs do."""
        opened.matrices = self._matrices(opened.index, opened.block)
        if self._repair is not None and self._states.dense is not None:
            opened.io = self._io(opened.index, opened.matrices, self._states.sparse, self._states.dense)
        return opened

    def _trials(self) -> dict[str, Any]:
        """What was found by trying: learning rates, and how much the device holds at once."""
        return {**self._probe.state(), "micro_batch": self._micro_batch.size}

    @property
    def _streams(self) -> dict[str, Activations]:
        """Every stream of the pass by name."""
        evaluated = {f"evaluation.{name}": stream for name, stream in self._evaluation.streams.items()}
        return {**self._states.streams, **evaluated}

    def _matrices(self, index: int, block: nn.Module) -> Sequence[PrunableMatrix]:
        return prunable_matrices(block, self._name(index), self._ignore)

    def _one_window(self, window: BlockWindow, writer: BlockWriter) -> BlockResult:
        """Prunes what is new in the window, repairs it, finishes what no later window repairs."""
        started = time.perf_counter()
        for index in window.blocks:
            if index not in self._open:
                self._open[index] = self._prune(index)
        blocks = [self._open[index] for index in window.blocks]
        last = blocks[-1]
        if last.io is not None:
            begun = time.perf_counter()
            module, masks, io = joined(blocks, self._states.sparse, self._source)
            last.add(self._repair_block(last.index, module, masks, io))
            last.recovery_s += self._since(begun)
        for one in blocks:
            check_same_block(self._ranks, self._name(one.index), one.block, one.masks)
        for index in window.finished:
            self._finish(self._open.pop(index), writer)
        last.elapsed_s += time.perf_counter() - started
        if window.is_last_of:
            self._tell_finished(last)
        return self._result(last)

    def _prune(self, index: int) -> OpenBlock:
        """The next block, pruned, with what its repair needs to know of the dense one."""
        block = self._source.load_block(index)
        matrices = self._matrices(index, block)
        self._evaluation.advance("dense", index, block)
        self._states.advance_dense(index, block)
        entering = self._states.sparse
        for before in self._open.values():
            entering = self._states.behind(before.index, before.block, entering)
        known = self._pruned_model.has(index)
        begun = time.perf_counter()
        statistics = None if known else self._pruning.new_statistics(block, matrices)
        pruning_s = self._since(begun)  # a survey, in the first block
        observed = observe_inputs(block, matrices, statistics.receive) if statistics else None
        targets = self._states.observe(index, block, entering, observed)
        if statistics is not None:
            statistics.finish(self._ranks)
            pruning_s = self._since(begun)
        io = self._io(index, matrices, entering, targets) if targets is not None else None
        begun, came_as = time.perf_counter(), _shapes(block, matrices)
        if known:
            pruned = PrunedBlock(*self._pruned_model.apply(index, block))
        else:
            pruned = self._pruning.prune(index, block, matrices, statistics)
            self._ranks.from_root([*block.parameters(), *pruned.masks.values()])
            pruning_s += self._since(begun)
            self._pruned_model.keep(index, block, pruned.masks, pruned.notes)
        if self._ships != "pruned":
            self._evaluation.advance("pruned", index, block)
        opened = OpenBlock(index, block, matrices, pruned, pruned.masks, io, came_as, pruning_s=pruning_s)
        recovery = self._recipe.recovery
        if io is not None and pruned.masks and (recovery.method, recovery.start) == ("ebft", "least_squares"):
            begun = time.perf_counter()
            opened.loss_before = warm_start(block, pruned.masks, io, recovery)
            self._ranks.from_root(list(block.parameters()))
            opened.recovery_s = self._since(begun)
        return opened

    def _io(
        self, index: int, matrices: Sequence[PrunableMatrix], entering: States, targets: States
    ) -> BlockIO:
        """What the repair of one block starts from and aims at."""
        dense = self._states.dense_inputs
        return BlockIO(
            inputs=entering.training,
            targets=targets.training,
            heldout_inputs=entering.heldout,
            heldout_targets=targets.heldout,
            forward=lambda module, hidden: self._source.forward(index, module, hidden),
            device=self._device,
            amp_dtype=mixed_precision(self._device),
            name=self._name(index),
            matrices=matrices,
            pattern=self._pruning.pattern(index),
            load_dense=lambda: self._source.load_block(index),
            dense_inputs=dense.training if dense else None,
            heldout_dense_inputs=dense.heldout if dense else None,
        )

    def _finish(self, finished: OpenBlock, writer: BlockWriter) -> None:
        """Hands a block on, and pushes calibration and evaluation windows through it."""
        index, block = finished.index, finished.block
        self._hand_on(index, block, finished.masks, finished.matrices, writer)
        if self._state is not None:
            self._state.store_finished(index, block, finished.masks)
        self._states.advance_sparse(index, block)
        if not self._end_to_end.stages:
            self._evaluation.advance(self._ships, index, block)

    def _hand_on(
        self,
        index: int,
        block: nn.Module,
        masks: dict[str, Mask],
        matrices: Sequence[PrunableMatrix],
        writer: BlockWriter,
    ) -> None:
        """A finished block to the end-to-end stages, or to the writer."""
        if self._end_to_end.stages:
            self._end_to_end.hold(block, masks, matrices)
        else:
            writer.commit(index, block, masks)  # rounds to the exported type: what flows on is what ships

    def _result(self, finished: OpenBlock) -> BlockResult:
        target, left = (
            self._pruning.pattern(finished.index).sparsity,
            _shapes(finished.block, finished.matrices),
        )
        return BlockResult(
            finished.index,
            finished.repaired,
            finished.pruned.notes,
            finished.elapsed_s,
            finished.pruning_s,
            finished.recovery_s,
            target=None if target == self._pattern.sparsity else target,
            shapes={} if finished.pruned.masks else {n: (finished.came_as[n], left[n]) for n in left},
        )

    def _name(self, index: int) -> str:
        return f"{self._source.blocks_name}.{index}"

    def _since(self, begun: float) -> float:
        """Seconds since ``begun``, with all that the device was given to do."""
        settle(self._device)
        return time.perf_counter() - begun

    @functools.cached_property
    def _pruning(self) -> BlockPruning:
        """How blocks are pruned; where that is shared out over all of them, the first use surveys the model."""
        return prepare_pruning(
            self._source,
            self._recipe,
            self._pattern,
            self._ignore,
            self._ids,
            self._device,
            stop=self._stop,
            progress=self._progress,
            anatomy=self._anatomy,
            ranks=self._ranks,
        )

    def _repair_block(self, index: int, block: nn.Module, masks: dict[str, Mask], io: BlockIO) -> Repaired:
        """Repair the window that ends with block ``index``, from its beginning again where memory ran out."""
        came = [weight.detach().to("cpu", copy=True) for weight in block.parameters()]

        def put_back() -> None:
            with torch.no_grad():
                for weight, values in zip(block.parameters(), came, strict=True):
                    weight.copy_(values)

        return self._micro_batch.attempt(
            lambda size: self._repair_once(index, block, masks, replace(io, micro_batch=size)),
            again=put_back,
            batch_size=self._training.batch_size,
            what=f"the repair of {io.name}",
            remedy="give a shorter --seqlen, --set recovery.window=block for one block at a time, a larger "
            "--max-device-memory where one is set, or --device cpu",
        )

    def _repair_once(self, index: int, block: nn.Module, masks: dict[str, Mask], io: BlockIO) -> Repaired:
        assert self._repair is not None
        reach("repair: before")
        seed = self._recipe.seed + index
        chosen = self._probe.lr_for(index, block, masks, io, seed=seed)
        if chosen.tried:
            self._progress(LearningRateChosen(chosen.lr, chosen.tried, index))
        total = self._source.num_blocks

        def told(step: int, steps: int) -> None:
            self._progress(BlockProgress(index, total, step, steps))
            reach("repair: after a step")

        return self._repair(block, masks, io, self._training, lr=chosen.lr, seed=seed, progress=told)

    def _tune_together(self, writer: BlockWriter) -> tuple[Finetuned, ...]:
        """The end-to-end stages over all blocks, which are committed afterwards."""
        finetuned = None if self._state is None else self._state.finetuned
        if finetuned is None:
            dense = self._states.dense
            finetuned = self._end_to_end.tune(
                Windows(self._ids, dense.training if dense else None),
                Windows(self._heldout_ids, dense.heldout if dense else None),
                self._micro_batch,
                None if self._state is None else self._state.load_finished,
            )
            for index, (block, masks) in enumerate(self._end_to_end.held):
                check_same_block(self._ranks, self._name(index), block, masks)
            if self._state is not None:
                self._state.commit_tuned(finetuned, self._end_to_end.held)
        self._end_to_end.commit(writer, self._evaluation)
        return finetuned

    def _tell_finished(self, finished: OpenBlock) -> None:
        repaired = finished.repaired
        self._progress(
            BlockFinished(
                index=finished.index,
                total=self._source.num_blocks,
                loss_before=repaired.loss_before if repaired else None,
                loss_after=repaired.loss_after if repaired else None,
                best_step=repaired.best_step if repaired else 0,
                steps=repaired.steps if repaired else 0,
                elapsed_s=finished.elapsed_s,
            )
        )


def check_same_block(ranks: Ranks, name: str, block: nn.Module, masks: Mapping[str, Mask]) -> None:
    """Do nothing where all ranks hold the same block, bit for bit.

    Raises:
        OutOfResources: E-RANKS-DIVERGED.
    """
    if ranks.world == 1:
        return
    digest = hashlib.sha256()
    for tensor in (*block.parameters(), *masks.values()):
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    ranks.check_same(name, digest.digest())


def _shapes(block: nn.Module, matrices: Sequence[PrunableMatrix]) -> dict[str, torch.Size]:
    """Shape of each parameter that holds matrices."""
    return {matrix.parameter: block.get_parameter(matrix.parameter).shape for matrix in matrices}
