"""Between a run's finished blocks and the folder they are written to: each block is quantised on its way.

The blocks come in order, after repair and finish. The calibration windows follow them through the quantised blocks,
so that a block's scales are chosen for the inputs that it will really get; the repair of later blocks, which is over or
saw float blocks, is not touched. All of it follows from blocks and windows: a run that goes on from its state makes the
same integers again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.linears import IgnoreRules, PrunableMatrix, observe_inputs, prunable_matrices
from compressor.models.source import BlockSource
from compressor.models.writer import CheckpointWriter
from compressor.perplexities import PerplexityStreams
from compressor.propagation import advance, embedded
from compressor.quantization.rounding import rounded_inputs
from compressor.quantization.scales import (
    PieceGram,
    Rounded,
    group_size_of,
    round_to_nearest,
    search_scales,
)
from compressor.sparsity import Mask
from compressor.statistics import BlockStatistics
from compressor.streams import Activations
from exporters.packing import STRIP_ROWS
from exporters.quantized import SCALES_NAME, Quantization, QuantizedWeight, write_quantization

__all__ = ["QuantizedBlock", "QuantizedModel", "QuantizingWriter", "with_quantized"]

_HEAD_BITS = 8  # of head and embedding, whatever the blocks have
_WINDOWS = 32  # calibration windows that are enough to choose a scale by


@dataclass(frozen=True)
class QuantizedBlock:
    """How much one block's outputs changed on the calibration windows.

    Attributes:
        index: The block.
        error: Mean squared change as a share of the mean square of the outputs; None without calibration.
        nearest_error: The same with steps that reach the largest weights.
        searched: Whether the steps that were searched for were better, and taken.
    """

    index: int
    error: float | None
    nearest_error: float | None
    searched: bool


@dataclass(frozen=True)
class QuantizedModel:
    """A quantised model: how, and what it cost.

    Attributes:
        bits: Of the blocks' weights.
        group_size: Columns that share a scale; 0 for whole rows.
        activation_bits: Of what enters a linear.
        perplexity: Of the PyTorch model with these weights, activations rounded as the ONNX file does it.
        blocks: In order.
    """

    bits: int
    group_size: int
    activation_bits: int
    perplexity: float
    blocks: tuple[QuantizedBlock, ...]


def with_quantized(perplexities: Mapping[str, float], quantized: QuantizedModel | None) -> dict[str, float]:
    """Perplexity by version, the quantised model's among them where there is one."""
    return {**perplexities, **({} if quantized is None else {"quantized": quantized.perplexity})}


class QuantizingWriter:
    """Quantises blocks, embedding and head, and hands them to the writer of the folder.

    Args:
        writer: Writes the folder, in float32.
        folder: That folder.
        source: The model.
        bits: 8 or 4, of the blocks' linears.
        activation_bits: 8 where activations will be rounded too, else 32.
        calibration: Windows (N, T) to choose scales by; None takes the steps that reach the largest weights.
        evaluation: Windows (E, T) on which the quantised model's perplexity is measured.
        device: Where blocks compute.
    """

    def __init__(
        self,
        writer: CheckpointWriter,
        folder: Path,
        source: BlockSource,
        *,
        bits: int,
        activation_bits: int,
        calibration: Tensor | None,
        evaluation: Tensor,
        device: torch.device,
    ) -> None:
        self._writer, self._folder, self._source = writer, folder, source
        self._bits, self._activation_bits = bits, activation_bits
        self._weights: dict[str, QuantizedWeight] = {}
        self._ends = {name: self._quantized_end(name, module) for name, module in source.ends().items()}
        self._blocks: list[QuantizedBlock] = []
        with self._quantized_ends():
            self._states = None if calibration is None else embedded(source, calibration[:_WINDOWS], device)
            self._evaluation = PerplexityStreams(source, evaluation, device, ("quantized",))

    def commit(self, index: int, block: nn.Module, masks: Mapping[str, Mask]) -> None:
        """Quantise and write the next block, in order; ``block`` itself stays as it is."""
        prefix = f"{self._source.blocks_name}.{index}"
        matrices = _packable(prunable_matrices(block, prefix, IgnoreRules()), block)
        nearest: Mapping[str, Rounded] = {m.name: self._nearest(m, block) for m in matrices}
        chosen, report = self._with(block, matrices, nearest), QuantizedBlock(index, None, None, False)
        rounded = nearest
        if self._states is not None and matrices:
            rounded, chosen, report = self._choose(index, block, matrices, nearest)
        self._blocks.append(report)
        scales: dict[str, list[Tensor]] = {}  # by parameter; of experts one below the other
        for matrix in matrices:
            scales.setdefault(matrix.parameter, []).append(rounded[matrix.name].scales)
        for parameter, parts in scales.items():
            weight = QuantizedWeight(self._bits, group_size_of(self._bits), torch.cat(parts).cpu().numpy())
            self._weights[f"{prefix}.{parameter}"] = weight
        self._writer.commit(index, chosen, masks)
        with self._rounding(chosen, matrices):
            self._evaluation.advance("quantized", index, chosen)

    def finish(self) -> None:
        """Write what is no block, and the scales of all."""
        with self._quantized_ends():
            self._writer.finish()
        quantization = Quantization(self._weights, self._activation_bits)
        write_quantization(self._folder / SCALES_NAME, quantization)

    def result(self) -> QuantizedModel:
        """What came out, its perplexity measured; call it after the last block."""
        with self._quantized_ends():
            perplexity = self._evaluation.perplexities()["quantized"]
        return QuantizedModel(
            self._bits, group_size_of(self._bits), self._activation_bits, perplexity, tuple(self._blocks)
        )

    def _choose(
        self, index: int, block: nn.Module, matrices: list[PrunableMatrix], nearest: Mapping[str, Rounded]
    ) -> tuple[Mapping[str, Rounded], nn.Module, QuantizedBlock]:
        """The better of two roundings of a block; the calibration windows go on behind it."""
        entering = self._states
        assert entering is not None
        widths = {matrix.name: matrix.of(block).shape[1] for matrix in matrices}
        statistics = BlockStatistics(PieceGram, widths, entering.device)
        with observe_inputs(block, matrices, statistics.receive):
            aimed_at = advance(self._source, index, block, entering, entering.empty_like())
        statistics.finish()
        searched = {m.name: self._searched(m, block, statistics) for m in matrices}
        outputs, errors, blocks = [], [], []
        for candidate in (nearest, searched):
            quantized = self._with(block, matrices, candidate)
            with self._rounding(quantized, matrices):
                outputs.append(advance(self._source, index, quantized, entering, entering.empty_like()))
            errors.append(_relative_error(outputs[-1], aimed_at))
            blocks.append(quantized)
        better = errors[1] < errors[0]
        self._states = outputs[better]
        report = QuantizedBlock(index, errors[better], errors[0], better)
        return (searched if better else nearest), blocks[better], report

    def _with(
        self, block: nn.Module, matrices: list[PrunableMatrix], rounded: Mapping[str, Rounded]
    ) -> nn.Module:
        """A copy of the block with rounded matrices."""
        config = self._source.config  # shared: a copy would cost more than small blocks do
        quantized = copy.deepcopy(block, {id(config): config}).requires_grad_(False)
        for matrix in matrices:
            matrix.of(quantized).copy_(rounded[matrix.name].values)
        return quantized

    def _nearest(self, matrix: PrunableMatrix, block: nn.Module) -> Rounded:
        return round_to_nearest(matrix.of(block).float(), self._bits, group_size_of(self._bits))

    def _searched(self, matrix: PrunableMatrix, block: nn.Module, statistics: BlockStatistics) -> Rounded:
        statistic = statistics[matrix.name]
        assert isinstance(statistic, PieceGram)
        statistic.check_finite(matrix.name)
        return search_scales(matrix.of(block).float(), self._bits, group_size_of(self._bits), statistic)

    def _rounding(self, block: nn.Module, matrices: list[PrunableMatrix]) -> AbstractContextManager[None]:
        paths = dict.fromkeys(matrix.module for matrix in matrices)
        return rounded_inputs(map(block.get_submodule, paths) if self._activation_bits == 8 else [])

    def _quantized_end(self, name: str, module: nn.Module) -> Tensor:
        """Embedding or head, (V, D), a scale per token; its own values stay."""
        weight = module.get_parameter("weight").detach()
        rounded = round_to_nearest(weight.float(), _HEAD_BITS, 0)
        self._weights[name] = QuantizedWeight(_HEAD_BITS, 0, rounded.scales.cpu().numpy())
        return rounded.values.to(weight.dtype)

    @contextmanager
    def _quantized_ends(self) -> Iterator[None]:
        """Embedding and head of the source with their quantised values, what enters the head rounded."""
        parameters = {name: end.get_parameter("weight") for name, end in self._source.ends().items()}
        before = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = self._ends[name]
            with rounded_inputs([self._source.output_module()] if self._activation_bits == 8 else []):
                yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = before[name]


def _packable(matrices: list[PrunableMatrix], block: nn.Module) -> list[PrunableMatrix]:
    """Those that a file can hold as integers: in the packed format each expert begins with a strip of rows."""
    uneven = {m.module for m in matrices if m.expert is not None and m.of(block).shape[0] % STRIP_ROWS}
    return [matrix for matrix in matrices if matrix.module not in uneven]


def _relative_error(found: Activations, expected: Activations) -> float:
    """Mean squared difference as a share of the mean square of ``expected``."""
    squares = [torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    for row in range(len(expected)):
        target = expected.states[row].double()
        squares[0] += (found.states[row].double() - target).square().sum()
        squares[1] += target.square().sum()
    return float(squares[0] / squares[1]) if squares[1] > 0 else float(squares[0])
