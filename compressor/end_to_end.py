"""The stages after the pass over the blocks that need all of them at once; until then blocks wait in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from compressor.devices import mixed_precision
from compressor.errors import StoppedSafely
from compressor.finetuning import Finetuned, SparseModel, Stage, Step, Windows, stages_of, with_masks
from compressor.finetuning.memory import room_for
from compressor.linears import PrunableMatrix
from compressor.micro_batch import MicroBatch
from compressor.models.source import BlockSource
from compressor.models.writer import BlockWriter
from compressor.perplexities import EvaluationStreams
from compressor.progress import FinetuningFinished, FinetuningProgress, Notice, Progress, StageStarted
from compressor.ranks import ALONE, Ranks
from compressor.recipe import Recipe
from compressor.run.faults import reach
from compressor.sparsity import Mask
from validators.validate import available_memory_bytes


def finish_for(
    source: BlockSource,
    recipe: Recipe,
    *,
    windows: int,
    seqlen: int,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> tuple[str, str | None]:
    """The finish that a recipe stands for, ``auto`` decided by recovery and memory; and why, in one line.

    Args:
        source: The dense blocks.
        recipe: What is asked for.
        windows: Calibration and held-out windows together.
        seqlen: Tokens of each.
        device: Where it would happen.
        ranks: Who shares the windows, and on each machine the memory.
    """
    if not recipe.may_finish:
        return "none", None
    if recipe.finish.method != "auto":
        return recipe.finish.method, None
    room = room_for(
        [source.block_structure(index) for index in range(source.num_blocks)],
        tokens=recipe.finish.batch_size * seqlen,
        hidden_size=source.hidden_size,
        vocab_size=source.vocab_size,
        stored_tokens=-(-windows // ranks.world) * seqlen,
        runs_dense=recipe.finish.runs_dense,
        device=device,
        free_host_bytes=available_memory_bytes() // ranks.local_world,
    )
    if room.fits:
        return "kl", f"finish kl taken: the whole model {room} on {device}"
    return "none", f"finish left out: the whole model {room} on {device}; a smaller batch needs less"


@dataclass(frozen=True)
class _Held:
    """A block that waits: pruned, repaired, float32."""

    block: nn.Module
    masks: Mapping[str, Mask]
    matrices: Sequence[PrunableMatrix]


class EndToEnd:
    """Holds the blocks of a run, tunes them together, and commits them in order.

    Args:
        source: Embedding, head, and how blocks are run.
        recipe: Says which stages there are.
        device: Where all blocks are.
        stop: Asked after each step; true ends the run.
        progress: Receives events.
        ranks: Who shares the windows.
    """

    def __init__(
        self,
        source: BlockSource,
        recipe: Recipe,
        *,
        device: torch.device,
        stop: Callable[[], bool],
        progress: Progress,
        ranks: Ranks = ALONE,
    ) -> None:
        self._ranks = ranks
        self._source, self._recipe, self._device = source, recipe, device
        self._stop, self._progress = stop, progress
        self._held: list[_Held] = []
        self.stages: tuple[Stage, ...] = stages_of(recipe)

    @property
    def needs_dense(self) -> bool:
        """Whether a stage asks for the dense model's last hidden states."""
        return any(stage.needs_dense for stage in self.stages)

    @property
    def held(self) -> list[tuple[nn.Module, Mapping[str, Mask]]]:
        """Every block that waits, in order, with its masks."""
        return [(held.block, held.masks) for held in self._held]

    def hold(self, block: nn.Module, masks: Mapping[str, Mask], matrices: Sequence[PrunableMatrix]) -> None:
        """Keep the next block, in order, until :meth:`commit`."""
        self._held.append(_Held(block, masks, matrices))

    def tune(
        self,
        training: Windows,
        heldout: Windows,
        micro_batch: MicroBatch,
        load: Callable[[int], tuple[nn.Module, Mapping[str, Mask]]] | None = None,
    ) -> tuple[Finetuned, ...]:
        """Run every stage over the held blocks; what each of them brought.

        Args:
            training: Windows to train on.
            heldout: Windows that only select.
            micro_batch: How many of them go through at once.
            load: A held block as it was before all stages, from which they begin again where the device's memory
                ran out; ``None``: copies in host memory are kept for that, of blocks on a device of its own.

        Raises:
            StoppedSafely: ``stop`` said so between two steps.
            ReportedError: A loss is not finite before the first step, and the like.
        """
        if load is None and self._device.type == "cpu":  # whose memory does not end with an error
            return self._tune(training, heldout, micro_batch.size)
        load = load or self._copies()

        def begin_again() -> None:
            for index, held in enumerate(self._held):
                block, masks = load(index)
                self._held[index] = _Held(block, masks, held.matrices)

        return micro_batch.attempt(
            lambda size: self._tune(training, heldout, size),
            again=begin_again,
            batch_size=min(self._batch_size(stage) for stage in self.stages),
            what=f"the {' and the '.join(stage.name for stage in self.stages)} of all blocks together",
            remedy="give --finish none, a shorter --seqlen, a larger --max-device-memory where one is set, or "
            "--device cpu",
        )

    def _copies(self) -> Callable[[int], tuple[nn.Module, Mapping[str, Mask]]]:
        copies = [
            ([weight.detach().to("cpu", copy=True) for weight in held.block.parameters()], held.masks)
            for held in self._held
        ]

        def load(index: int) -> tuple[nn.Module, Mapping[str, Mask]]:
            values, masks = copies[index]
            block = self._held[index].block
            with torch.no_grad():
                for weight, value in zip(block.parameters(), values, strict=True):
                    weight.copy_(value)
            return block, masks

        return load

    def _batch_size(self, stage: Stage) -> int:
        recipe = self._recipe
        return recipe.finish.batch_size if stage.name == "finish" else recipe.recovery.batch_size

    def _tune(self, training: Windows, heldout: Windows, micro_batch: int | None) -> tuple[Finetuned, ...]:
        reach("tuning: before")
        model = self._model(training, heldout, micro_batch)
        done = []
        for stage in self.stages:
            self._progress(StageStarted(stage.name, f"{stage.method}, all blocks together"))
            tuned = stage.tune(model, self._recipe.seed, partial(self._tell, stage))
            model = with_masks(model, tuned)
            self._tell_finished(stage, tuned)
            if tuned.note:
                self._progress(Notice(tuned.note, shortfall=True))
            done.append(tuned)
        self._held = [
            _Held(held.block, masks, held.matrices)
            for held, masks in zip(self._held, model.masks, strict=True)
        ]
        return tuple(done)

    def commit(self, writer: BlockWriter, evaluation: EvaluationStreams) -> None:
        """Store every held block, and push the evaluation windows through it."""
        for index, held in enumerate(self._held):
            writer.commit(index, held.block, held.masks)  # rounds to the exported type
            evaluation.advance("recovered", index, held.block)
        self._held.clear()

    def _model(self, training: Windows, heldout: Windows, micro_batch: int | None) -> SparseModel:
        return SparseModel(
            blocks=[held.block for held in self._held],
            masks=[held.masks for held in self._held],
            matrices=[held.matrices for held in self._held],
            training=training,
            heldout=heldout,
            embed=self._source.embed,
            forward=self._source.forward,
            head=self._source.head,
            load_dense=self._source.load_block,
            vocab_size=self._source.vocab_size,
            device=self._device,
            amp_dtype=mixed_precision(self._device),
            micro_batch=micro_batch,
            ranks=self._ranks,
        )

    def _tell(self, stage: Stage, step: Step) -> None:
        self._progress(FinetuningProgress(stage.name, step.number, step.total, step.lr, step.trial))
        reach("tuning: after a step")
        if self._stop():
            raise StoppedSafely(
                "E-STOPPED",
                f"stopped in the {stage.name} after step {step.number} of {step.total}",
                "run the same command again",
            )

    def _tell_finished(self, stage: Stage, tuned: Finetuned) -> None:
        self._progress(
            FinetuningFinished(
                stage=stage.name,
                method=tuned.method,
                loss=tuned.loss,
                loss_before=tuned.loss_before,
                loss_after=tuned.loss_after,
                best_step=tuned.best_step,
                steps=tuned.steps,
                lr=tuned.lr,
                tried=tuned.tried,
                trained_parameters=tuned.trained_parameters,
                elapsed_s=tuned.elapsed_s,
            )
        )
