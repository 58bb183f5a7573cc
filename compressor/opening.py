"""The model of a run or an export: opened, checked, and described for what comes after."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from compressor.calibration.tokens import refuse_tokenizer_beyond
from compressor.devices import QUANTIZED, dtype_name, export_dtype, resolve_device
from compressor.models.checkpoint import Checkpoint, open_checkpoint
from compressor.models.source import BlockSource, open_source
from compressor.report.schema import ModelFacts
from compressor.sparsity import SparsityPattern


@dataclass(frozen=True)
class Subject:
    """The model that goes out, and what is known of where it came from.

    Attributes:
        command: Which command makes it.
        facts: The model that went in.
        blocks_name: Path of its decoder blocks, such as ``model.layers``.
        source_bytes: Bytes of its weight files.
        pattern: What pruning aimed at; None where nothing is pruned here.
        dtype: Type of the exported weights.
        device: Where it is made.
        trust_remote_code: Whether code that came with the checkpoint was allowed.
    """

    command: Literal["run", "export"]
    facts: ModelFacts
    blocks_name: str
    source_bytes: int
    pattern: SparsityPattern | None
    dtype: torch.dtype
    device: torch.device
    trust_remote_code: bool

    @property
    def target_sparsity(self) -> float | None:
        """Share of zeros that pruning aimed at."""
        return None if self.pattern is None else self.pattern.sparsity

    @property
    def n_m(self) -> str | None:
        """``"2:4"`` for such a pattern, None for an unstructured one or none."""
        return str(self.pattern) if self.pattern is not None and self.pattern.is_n_m else None


@dataclass(frozen=True)
class OpenModel:
    """A model whose blocks can be taken, the device that computes and the type that is exported."""

    checkpoint: Checkpoint
    source: BlockSource
    device: torch.device
    dtype: torch.dtype
    export_type: str  # what a user calls it: int8 and int4 stand on float32

    def load_tokenizer(self) -> Any:
        """The model's tokenizer; the embedding has a row for every token that it can emit.

        Raises:
            InputRefused: E-TOKENIZER-NOT-FOUND, E-TOKEN-OUT-OF-RANGE.
        """
        tokenizer = self.checkpoint.load_tokenizer()
        refuse_tokenizer_beyond(tokenizer, self.source.vocab_size)
        return tokenizer

    def subject(self, command: Literal["run", "export"], pattern: SparsityPattern | None) -> Subject:
        """What the export and the report need to know, without the weights."""
        return Subject(
            command=command,
            facts=ModelFacts(
                name=self.checkpoint.name,
                architecture=self.source.architecture.label,
                revision=self.checkpoint.revision,
                parameters=self.source.num_parameters,
                checkpoint_dtype=dtype_name(self.checkpoint.dtype),
                export_dtype=self.export_type,
            ),
            blocks_name=self.source.blocks_name,
            source_bytes=self.checkpoint.source_bytes,
            pattern=pattern,
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=self.checkpoint.trust_remote_code,
        )


def open_model(
    model: str | Path, *, dtype: str, device: str, revision: str | None, trust_remote_code: bool
) -> OpenModel:
    """The model that a path or hub id names, its weights in host memory.

    Args:
        model: A local Hugging Face folder or a hub id.
        dtype: Type of the exported weights, or ``auto``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:i``.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Allow code that comes with the checkpoint.

    Raises:
        ReportedError: The device is absent; the model is absent, unsafe, broken or unsupported.
    """
    where = resolve_device(device)
    checkpoint = open_checkpoint(model, revision=revision, trust_remote_code=trust_remote_code)
    stored = export_dtype(dtype, checkpoint.dtype)
    export_type = dtype if dtype in QUANTIZED else dtype_name(stored)
    source = open_source(checkpoint, where, stored_dtype=stored)
    return OpenModel(checkpoint, source, where, stored, export_type)
