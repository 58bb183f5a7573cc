"""How the weights of a model folder were quantised: a file of scales beside weights that are their multiples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from exporters.errors import ExportError

SCALES_NAME = "scales.safetensors"
_FORMAT = "1"


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix (N, K) of integers times scales; of experts their matrices one below the other.

    Attributes:
        bits: 8 (-127 to 127) or 4 (-7 to 7).
        group_size: Columns that share a scale; 0 for a whole row.
        scales: float32 (N, G).
    """

    bits: int
    group_size: int
    scales: NDArray[np.float32]


@dataclass(frozen=True)
class Quantization:
    """The quantised weights of a model by full parameter name, and the bits that activations are rounded to.

    A matrix is seen as (outputs, inputs), whichever way the parameter lies; an embedding as (tokens, width).
    """

    weights: Mapping[str, QuantizedWeight]
    activation_bits: int


def write_quantization(path: Path, quantization: Quantization) -> None:
    """Write scales, bits and group sizes. Equal contents give equal bytes."""
    weights = quantization.weights
    kinds = ";".join(f"{name}={weights[name].bits},{weights[name].group_size}" for name in sorted(weights))
    # One key: safetensors writes several in no fixed order.
    metadata = {"quantization": f"{_FORMAT};{quantization.activation_bits};{kinds}"}
    save_file({name: np.ascontiguousarray(weights[name].scales) for name in sorted(weights)}, path, metadata)


def read_quantization(path: Path) -> Quantization | None:
    """What such a file says; None where there is none.

    Raises:
        ExportError: E-SCALES-UNREADABLE.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as opened:
            version, activation_bits, *kinds = (opened.metadata() or {})["quantization"].split(";")
            if version != _FORMAT:
                raise ValueError(f"format {version}")
            weights = {}
            for name, _, kind in (entry.rpartition("=") for entry in kinds if entry):
                bits, group_size = (int(part) for part in kind.split(","))
                weights[name] = QuantizedWeight(bits, group_size, opened.get_tensor(name))
            return Quantization(weights, int(activation_bits))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ExportError(
            "E-SCALES-UNREADABLE", f"{path.name}: no readable scales: {error}", "make the model again"
        ) from error
