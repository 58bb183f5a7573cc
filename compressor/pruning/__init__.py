"""The pruners, one line each: recipe name to the object that prunes one matrix."""

from __future__ import annotations

from compressor.pruning.admm import ADMM
from compressor.pruning.alps import ALPS
from compressor.pruning.magnitude import Magnitude
from compressor.pruning.pruner import Pruned, Pruner, check_pattern
from compressor.pruning.sparsegpt import SparseGPT
from compressor.pruning.wanda import Wanda

__all__ = ["PRUNERS", "Pruned", "Pruner", "check_pattern"]

PRUNERS: dict[str, Pruner] = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "sparsegpt": SparseGPT(),
    "admm": ADMM(),
    "alps": ALPS(),
}
