"""A model folder as the reference of an ONNX file: float32 arithmetic on the stored weights."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.models.checkpoint import Checkpoint, open_checkpoint, open_tokenizer
from compressor.models.mapped_model import MappedModel
from compressor.models.quiet import quiet_transformers
from compressor.quantization.rounding import quantized_modules, rounds_its_inputs
from exporters.probe import BlockList, find_blocks
from exporters.quantized import SCALES_NAME, read_quantization
from validators.reference import Floats, Ids, Reference, position_ids

__all__ = ["TorchReference", "load_reference", "load_tokenizer", "reference_of"]


class TorchReference:
    """Logits and block outputs of a model in PyTorch.

    Args:
        model: A causal language model of transformers in eval mode.
        device: Where it lies and computes.
        blocks: Its decoder blocks, where they are known.
    """

    def __init__(self, model: nn.Module, device: torch.device, blocks: BlockList | None = None) -> None:
        self._model = model
        self._device = device
        self._blocks = blocks or find_blocks(model)

    def logits(self, ids: Ids, attention_mask: Ids | None = None) -> Floats:
        """Logits (B, T, V) float32. ``ids``, ``attention_mask``: (B, T); no mask means no padding."""
        return self._numpy(self._run(ids, attention_mask))

    def block_outputs(self, ids: Ids, attention_mask: Ids | None = None) -> list[Floats]:
        """Hidden states (B, T, D) float32 that leave each decoder block, first block first."""
        outputs: list[Floats] = []

        def hook(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            outputs.append(self._numpy(output[0] if isinstance(output, tuple) else output))

        hooks = [block.register_forward_hook(hook) for block in self._blocks.modules]
        try:
            self._run(ids, attention_mask)
        finally:
            for handle in hooks:
                handle.remove()
        return outputs

    def _run(self, ids: Ids, attention_mask: Ids | None) -> Tensor:
        mask = np.ones_like(ids) if attention_mask is None else attention_mask
        inputs = {"input_ids": ids, "attention_mask": mask}
        # OPT and BLOOM take their positions from the mask and have no such argument.
        if "position_ids" in self._accepted:
            inputs["position_ids"] = position_ids(mask)
        tensors = {name: torch.from_numpy(values).to(self._device) for name, values in inputs.items()}
        with torch.no_grad(), quiet_transformers():
            logits: Tensor = self._model(**tensors, use_cache=False).logits
        return logits

    @property
    def _accepted(self) -> frozenset[str]:
        return frozenset(inspect.signature(self._model.forward).parameters)

    def _numpy(self, tensor: Tensor) -> Floats:
        array: Floats = tensor.detach().float().cpu().numpy()
        return array


def load_reference(folder: str, trust_remote_code: bool = False, device: str = "cpu") -> Reference:
    """The model in ``folder`` (or of a hub id) as a reference.

    Raises:
        InputRefused: It is no model that can be loaded.
        HubError: It is a hub id that cannot be fetched.
    """
    checkpoint = open_checkpoint(folder, trust_remote_code=trust_remote_code)
    return reference_of(checkpoint, torch.device(device))


def reference_of(checkpoint: Checkpoint, device: torch.device) -> TorchReference:
    """The checkpoint's model as a reference that has one block in memory at a time, as it runs.

    Where scales lie beside its weights, activations are rounded as the ONNX file of that model rounds them.

    Raises:
        InputRefused: It is no model that can be loaded.
    """
    mapped = MappedModel(checkpoint, torch.float32, device)
    quantization = read_quantization(checkpoint.folder / SCALES_NAME)
    if quantization is not None and quantization.activation_bits == 8:
        for module in quantized_modules(mapped.model, quantization.weights):
            rounds_its_inputs(module)
    return TorchReference(mapped.fill_as_they_run(), device, mapped.blocks)


def load_tokenizer(folder: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model's folder, which may be without weights.

    Raises:
        InputRefused: There is none, or it cannot be read.
    """
    return open_tokenizer(Path(folder), trust_remote_code=trust_remote_code)[0]
