"""What to validate and what to compare with: one JSON document, so that it can cross to the child process."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from validators.checks import Gates

# Two hours: a guard against a hang, not a budget. A 7B model on two cores needs well under one.
DEFAULT_TIME_LIMIT_S = 7200.0


@dataclass(frozen=True)
class TaskRequest:
    """Zero-shot tasks of lm-eval to run on the ONNX model and on the reference.

    Attributes:
        names: Tasks, groups or tags.
        tokenizer_factory: "module:function" that returns the model's tokenizer; called in the child with
            ``tokenizer_arguments``.
        tokenizer_arguments: Keyword arguments of the factory, JSON-able.
        max_tokens: Tokens that the model takes at once.
        folder: A folder of local tasks.
        limit: Documents per task; None: all.
    """

    names: tuple[str, ...]
    tokenizer_factory: str
    tokenizer_arguments: Mapping[str, Any]
    max_tokens: int
    folder: str | None = None
    limit: int | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TaskRequest:
        """The request that ``dataclasses.asdict`` wrote."""
        return cls(**{**content, "names": tuple(content["names"])})


@dataclass(frozen=True)
class ValidationRequest:
    """One validation. Paths are strings; relative ones are taken from the current directory of the caller.

    Attributes:
        model_path: The ``.onnx`` file.
        manifest_path: Its manifest, or None: hashes and pruned weights are then unknown.
        masks_path: The masks file by state-dict name (``exporters.masks``), or None.
        pattern: "N:M" that the pruned weights must hold; None takes the manifest's.
        reference_factory: "module:function" that returns a ``validators.reference.Reference``; called in the
            child with ``reference_arguments``. None: no reference.
        reference_arguments: Keyword arguments of the factory, JSON-able.
        parity_ids_path: ``.npy`` file, int64 (N, T): windows of real text that parity is measured on. None
            takes the first of ``windows_path``.
        windows_path: ``.npy`` file, int64 (N, T): the evaluation windows that perplexity is measured on.
        known_perplexity: By ``checks.PERPLEXITY_KEYS``: what was measured already on the same windows.
        dense_factory: Like ``reference_factory``, for the dense model; only its perplexity is measured.
        dense_arguments: Keyword arguments of ``dense_factory``.
        gates: Limits that differ from the defaults.
        require: Names of checks that must not be skipped.
        lm_eval: Measure perplexity once more with lm-eval's own backend; so does its check among ``require``.
        tasks: Tasks to run; None: none.
        structure_only: Judge the file by itself, without parity and perplexity.
        parity: How parity and perplexity run the ONNX model: ``whole``, ``blocks`` (one block in memory at a time), or
            ``auto``: blocks where the whole does not fit.
        provider: "auto" (CUDA where it works, else CPU), or an execution provider's name, such as
            "CPUExecutionProvider", "CPU" or "cuda".
        time_limit_s: The child is stopped after this long.
        memory_limit_bytes: The child is stopped when its resident memory passes this; None: all that is available.
    """

    model_path: str
    manifest_path: str | None = None
    masks_path: str | None = None
    pattern: str | None = None
    reference_factory: str | None = None
    reference_arguments: Mapping[str, Any] = field(default_factory=dict)
    parity_ids_path: str | None = None
    windows_path: str | None = None
    known_perplexity: Mapping[str, float | None] = field(default_factory=dict)
    dense_factory: str | None = None
    dense_arguments: Mapping[str, Any] = field(default_factory=dict)
    gates: Gates = field(default_factory=Gates)
    require: tuple[str, ...] = ()
    lm_eval: bool = False
    tasks: TaskRequest | None = None
    structure_only: bool = False
    parity: str = "auto"
    provider: str = "auto"
    time_limit_s: float = DEFAULT_TIME_LIMIT_S
    memory_limit_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The request as a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ValidationRequest:
        """The request that ``to_json`` wrote."""
        parts = {
            "gates": Gates(**content["gates"]),
            "require": tuple(content["require"]),
            "tasks": None if content["tasks"] is None else TaskRequest.from_json(content["tasks"]),
        }
        return cls(**{**content, **parts})
