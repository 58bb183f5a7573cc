"""One cell: the pass of ``compress run`` over the blocks, without an export, and what it measured."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from compressor.block_pass import BlockPass, check_plan, versions_of
from compressor.combinations import check_combination
from compressor.comparison.figures import figures_of
from compressor.comparison.request import CellRequest, load_windows
from compressor.comparison.results import Figures, TextPerplexity
from compressor.dense_path import RememberedPath
from compressor.end_to_end import finish_for
from compressor.linears import IgnoreRules
from compressor.models.source import BlockSource
from compressor.models.writer import BlockWriter, CheckpointWriter, round_block, stored_mask
from compressor.opening import OpenModel
from compressor.perplexities import PerplexityStreams, Version
from compressor.planning import as_used, pattern_of
from compressor.progress import Progress
from compressor.pruned_model import NoPrunedModel, PrunedModel, StoredPrunedModel
from compressor.sparsity import Mask
from compressor.streams import Activations


def run_cell(
    request: CellRequest,
    opened: OpenModel,
    *,
    started: float,
    stop: Callable[[], bool],
    progress: Progress,
) -> Figures:
    """The figures of one cell; peak memory is left to the caller, who knows whose it is.

    Args:
        request: What to do.
        opened: The model; it is not changed.
        started: ``time.perf_counter()`` of when the cell began.
        stop: Asked between blocks; true ends the cell.
        progress: Receives the events of the pass.

    Raises:
        StoppedSafely: ``stop`` said so.
        ReportedError: The pattern does not fit the model, numbers are not finite, and the like.
    """
    source, windows = opened.source, load_windows(request.windows)
    calibration, heldout = windows["calibration"], windows["heldout"]
    pattern, ignore = pattern_of(request.recipe.pruning), IgnoreRules(request.recipe.pruning.ignore)
    check_combination(request.recipe)
    check_plan(source, pattern, ignore)
    seqlen, counted = calibration.shape[1], len(calibration) + len(heldout)
    finish, why = finish_for(source, request.recipe, windows=counted, seqlen=seqlen, device=opened.device)
    recipe = as_used(request.recipe, pattern, seqlen, finish)
    texts = EvaluationTexts(request, opened, versions_of(recipe))
    finished = _finished_model(request, opened)
    writer = ZeroCounter(source, opened, finished)
    block_pass = BlockPass(
        source,
        calibration,
        heldout,
        texts,
        recipe=recipe,
        pattern=pattern,
        ignore=ignore,
        device=opened.device,
        stop=stop,
        progress=progress,
        dense_path=RememberedPath(source, Path(request.dense_states), request.shared_bytes),
        pruned_model=_pruned_model(request, source),
    )
    passed = block_pass.run(writer)
    if finished is not None:
        finished.finish()
    return figures_of(
        passed,
        recipe,
        perplexity=texts.by_text(),
        sparsity=writer.sparsity if passed.taken_out is None else passed.taken_out,
        pruning_s=request.start.pruning_s if request.start is not None else None,
        cell_s=time.perf_counter() - started,
        notices=(*((why,) if why else ()), *passed.notices),
    )


class EvaluationTexts:
    """The windows of every evaluation text on their way through the versions of the model that are not known yet."""

    def __init__(self, request: CellRequest, opened: OpenModel, versions: tuple[Version, ...]) -> None:
        self._streams: dict[str, PerplexityStreams] = {}
        for name, path in request.evaluation.items():
            known = {"dense": request.dense[name]} if name in request.dense else {}
            if request.start is not None:
                known["pruned"] = request.start.perplexity[name]
            ids = load_windows(path)["windows"]
            self._streams[name] = PerplexityStreams(opened.source, ids, opened.device, versions, known)
        self._found: dict[str, dict[str, float]] = {}

    @property
    def streams(self) -> Mapping[str, Activations]:
        """Hidden states by text and version."""
        named = ((name, streams.streams) for name, streams in self._streams.items())
        return {f"{name}.{version}": states for name, found in named for version, states in found.items()}

    def advance(self, version: Version, index: int, block: nn.Module) -> None:
        """Push all texts' windows through one version of block ``index``."""
        for streams in self._streams.values():
            streams.advance(version, index, block)

    def perplexities(self) -> dict[str, float]:
        """Perplexity by version, of the first text; call it after the last block."""
        self._found = {name: streams.perplexities() for name, streams in self._streams.items()}
        return dict(next(iter(self._found.values())))

    def by_text(self) -> dict[str, TextPerplexity]:
        """Perplexity of all texts, after :meth:`perplexities`; what nothing repairs ends as it was pruned."""
        return {
            name: TextPerplexity(
                dense=found["dense"],
                pruned=found["pruned"],
                recovered=found.get("recovered", found["pruned"]),
            )
            for name, found in self._found.items()
        }


class ZeroCounter:
    """Takes finished blocks as the writer of a run does, rounding included, and keeps the count of their zeros.

    Args:
        source: Where the blocks came from.
        opened: The model.
        then: Takes each block afterwards.
    """

    def __init__(self, source: BlockSource, opened: OpenModel, then: BlockWriter | None = None) -> None:
        self._blocks_name, self._dtype, self._then = source.blocks_name, opened.dtype, then
        self._kept = self._all = 0

    def commit(self, index: int, block: nn.Module, masks: Mapping[str, Mask]) -> None:
        """Round the block in place and count.

        Raises:
            InputRefused: E-WEIGHTS-NONFINITE, E-WEIGHTS-OVERFLOW: a weight could not be stored.
            ReportedError: E-MASK-BROKEN: a pruned weight is not zero.
        """
        prefix = f"{self._blocks_name}.{index}."
        round_block(block, prefix, self._dtype)
        for name, mask in masks.items():
            kept = stored_mask(prefix + name, block.get_parameter(name), mask).unpack()
            self._kept += int(kept.sum())
            self._all += kept.size
        if self._then is not None:
            self._then.commit(index, block, masks)

    @property
    def sparsity(self) -> float:
        """Share of zeros in the pruned parameters."""
        return 1 - self._kept / self._all if self._all else 0.0


def _finished_model(request: CellRequest, opened: OpenModel) -> CheckpointWriter | None:
    """What writes the model that the cell ends with, where tasks are to be run on it."""
    if request.finished is None:
        return None
    folder = Path(request.finished)
    shutil.rmtree(folder, ignore_errors=True)  # of a cell that came to no end
    return CheckpointWriter(folder, opened.source, opened.dtype)


def _pruned_model(request: CellRequest, source: BlockSource) -> PrunedModel:
    if request.start is not None:
        return StoredPrunedModel(Path(request.start.folder), source.load_block, recording=False)
    if request.record is not None:
        return StoredPrunedModel(Path(request.record), source.load_block, recording=True)
    return NoPrunedModel()
