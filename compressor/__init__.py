"""Blockpress: a language model in, a smaller and proven sparse ONNX model out.

    from compressor import compress, read_recipe

    result = compress("examples/tiny-llm", "sparse.onnx", read_recipe(None, {"pruning.sparsity": 0.5}))

Names are loaded on first use, so importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.comparing import ComparisonResult, compare
    from compressor.delivery import CompressionResult
    from compressor.exporting import export
    from compressor.pipeline import compress
    from compressor.recipe import Recipe
    from compressor.recipe_file import read_recipe
    from compressor.validation import validate_export as validate
    from exporters.errors import ReportedError
    from exporters.inspect import inspect_model as inspect

__all__ = [
    "ComparisonResult",
    "CompressionResult",
    "Recipe",
    "ReportedError",
    "compare",
    "compress",
    "export",
    "inspect",
    "read_recipe",
    "validate",
]

_HOMES = {
    "ComparisonResult": ("compressor.comparing", "ComparisonResult"),
    "CompressionResult": ("compressor.delivery", "CompressionResult"),
    "Recipe": ("compressor.recipe", "Recipe"),
    "ReportedError": ("exporters.errors", "ReportedError"),
    "compare": ("compressor.comparing", "compare"),
    "compress": ("compressor.pipeline", "compress"),
    "export": ("compressor.exporting", "export"),
    "inspect": ("exporters.inspect", "inspect_model"),
    "read_recipe": ("compressor.recipe_file", "read_recipe"),
    "validate": ("compressor.validation", "validate_export"),
}


def __getattr__(name: str) -> Any:
    """The public name from the module it lives in, or the version of the installed distribution."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("blockpress")
        except PackageNotFoundError:
            return "source, not installed"
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    """The public names."""
    return sorted([*__all__, "__version__"])
