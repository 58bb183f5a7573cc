"""Weights from a checked checkpoint into transformers' own model class, on the host."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import InputRefused, OutOfResources, ReportedError
from compressor.models.checkpoint import Checkpoint, first_line
from compressor.models.experts import FusedExperts
from compressor.models.quiet import quiet_transformers
from compressor.models.structure import apply_structure

__all__ = [
    "load_causal_lm",
    "load_without_experts",
    "plain_outline",
    "refuse_unusable",
    "restore_float32_buffers",
]


def load_causal_lm(checkpoint: Checkpoint, dtype: torch.dtype, *, traceable: bool = False) -> Any:
    """The whole model on the CPU, its parameters in ``dtype``, in eval mode and without gradients.

    Args:
        checkpoint: The model.
        dtype: What its parameters become.
        traceable: Choose implementations that ``torch.export`` can follow, at a price in memory.

    Raises:
        InputRefused: E-CONFIG-INVALID, E-CONFIG-SIZE; E-WEIGHTS-MISSING, E-WEIGHTS-SHAPE, E-WEIGHTS-UNREADABLE:
            the files do not fill the model.
        OutOfResources: E-MEMORY: the host's memory does not hold it.
    """
    _refuse_far_larger(checkpoint, _outline(checkpoint))
    return _load(checkpoint, dtype, _loader(checkpoint), traceable=traceable)


def load_without_experts(
    checkpoint: Checkpoint, dtype: torch.dtype, *, traceable: bool = False
) -> tuple[Any, FusedExperts]:
    """The same, and what fills its fused experts, whose parameters lie on the meta device; see ``FusedExperts``.

    Raises:
        As ``load_causal_lm``.
    """
    outline = _outline(checkpoint)
    _refuse_far_larger(checkpoint, outline)
    # Widths of a structure are another change to the class; no pruner makes them of a model with experts.
    stored = checkpoint.architecture.stored_experts if checkpoint.structure is None else None
    experts = FusedExperts(outline, stored, checkpoint.weights, dtype)
    loader = _own_class(checkpoint, experts.take_out) if experts else _loader(checkpoint)
    model = _load(checkpoint, dtype, loader, traceable=traceable)
    experts.put_back(model)
    return model, experts


def _load(checkpoint: Checkpoint, dtype: torch.dtype, loader: Any, *, traceable: bool) -> Any:
    """The model that ``loader`` makes of the checkpoint, checked to be whole."""
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers():
            model, info = loader.from_pretrained(
                checkpoint.folder,
                config=None if loader is AutoModelForCausalLM else copy.deepcopy(checkpoint.config),
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=checkpoint.architecture.remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **checkpoint.architecture.implementations(traceable=traceable),
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise OutOfResources(
            "E-MEMORY",
            f"{checkpoint.name} does not fit into this machine's memory",
            "use a machine with more memory",
        ) from None
    except Exception as error:  # shapes that do not fit surface as whatever the loader's threads raised
        raise _unreadable(checkpoint, error) from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputRefused(
            "E-WEIGHTS-MISSING",
            f"{checkpoint.name} lacks {missing[0]}"
            + (f" and {len(missing) - 1} more" if missing[1:] else ""),
            "fetch the model again; a base model without its language model head cannot be used",
        )
    for name, stored, described in sorted(info["mismatched_keys"]):
        raise InputRefused(
            "E-WEIGHTS-SHAPE",
            f"{name} is stored as {list(stored)}, config.json asks for {list(described)}",
            "fetch the model again: config.json and weights do not belong together",
        )
    _return_logits_alone(model.config)
    return model.eval().requires_grad_(False)


def refuse_unusable(tensors: Iterable[tuple[str, Tensor]], stored: torch.dtype) -> None:
    """Refuse weights that are not finite, or would not be in the dtype that they are to be stored in.

    Raises:
        InputRefused: E-WEIGHTS-NONFINITE, E-WEIGHTS-OVERFLOW, naming the first such tensor.
    """
    for name, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = torch.aminmax(tensor.detach())  # both are NaN where any element is
        if not (torch.isfinite(low) and torch.isfinite(high)):
            count = int((~torch.isfinite(tensor)).sum())
            raise InputRefused(
                "E-WEIGHTS-NONFINITE",
                f"{name} has {count} weights of {tensor.numel()} that are NaN or infinite",
                "fetch the model again, or use another checkpoint",
            )
        largest = max(-low.item(), high.item())
        if not torch.isfinite(torch.tensor(largest).to(stored)):
            raise InputRefused(
                "E-WEIGHTS-OVERFLOW",
                f"{name} has a weight of {largest:.3g}, beyond {str(stored).removeprefix('torch.')}",
                "give --dtype bfloat16 or float32",
            )


def restore_float32_buffers(model: Any) -> None:
    """Give buffers that are computed from the config, not stored, their float32 values again.

    A model that is loaded in bfloat16 rounds them too: Gemma's embedding scale √2304 = 48 is exact, √1152 =
    33.94 becomes 34. All computing here is in float32, where the model loaded in float32 has the exact value.
    """
    for module in model.modules():
        rounded = [
            name
            for name, buffer in module.named_buffers(recurse=False)
            if name in module._non_persistent_buffers_set
            and buffer.is_floating_point()
            and buffer.dtype != torch.float32
        ]
        if rounded:
            _initialise_again(model, module, rounded)


def _initialise_again(model: Any, module: nn.Module, buffers: list[str]) -> None:
    for name in buffers:
        module.register_buffer(name, getattr(module, name).float(), persistent=False)
    for tensor in module.parameters(recurse=False):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # what transformers then leaves alone
    with torch.no_grad():
        model._init_weights(module)


def _return_logits_alone(config: Any) -> None:
    """Undo what a config may ask to be returned otherwise; no logit depends on it."""
    config.return_dict = True
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False  # for a training loss, which wants the routers of all blocks


def plain_outline(checkpoint: Checkpoint, widths: Mapping[str, int] | None = None) -> Any:
    """The model that the config alone describes, without weights, on the meta device.

    Args:
        checkpoint: The model; its structure is left aside.
        widths: Values of the config that are to be others.

    Raises:
        Exception: Whatever transformers raises for a config that it does not allow.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = checkpoint.config
    if widths:
        config = CONFIG_MAPPING[config.model_type].from_dict({**checkpoint.settings, **widths})
    with torch.device("meta"), quiet_transformers():
        return AutoModelForCausalLM.from_config(config, trust_remote_code=checkpoint.architecture.remote_code)


def _outline(checkpoint: Checkpoint) -> Any:
    """The model without its weights, on the meta device.

    Raises:
        InputRefused: E-CONFIG-INVALID: the config describes no model.
    """
    try:
        if checkpoint.structure is None:
            return plain_outline(checkpoint)
        with torch.device("meta"), quiet_transformers():
            return _loader(checkpoint)(copy.deepcopy(checkpoint.config))
    except ReportedError:
        raise
    except Exception as error:  # each model class raises its own kind for a value that it does not know
        raise InputRefused(
            "E-CONFIG-INVALID",
            f"config.json describes no {checkpoint.architecture.label} model that can be built: "
            f"{type(error).__name__}: {first_line(error)}",
            "fetch the model again",
        ) from None


def _loader(checkpoint: Checkpoint) -> Any:
    """What builds the model: transformers' own class, or one whose modules have the structure's shapes."""
    from transformers import AutoModelForCausalLM

    structure = checkpoint.structure
    if structure is None:
        return AutoModelForCausalLM
    return _own_class(checkpoint, lambda model: apply_structure(model, structure))


def _own_class(checkpoint: Checkpoint, change: Callable[[Any], None]) -> Any:
    """The checkpoint's model class, whose models are changed as they are built."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    own: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(checkpoint.config)]

    def build(model: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        own.__init__(model, config, *args, **kwargs)
        change(model)

    return type(own.__name__, (own,), {"__init__": build, "__module__": own.__module__})


def _refuse_far_larger(checkpoint: Checkpoint, outline: nn.Module) -> None:
    """Refuse a config that describes a model of another size before its memory is asked for."""
    described = sum(parameter.numel() for parameter in outline.parameters())
    stored = sum(tensor.numel for tensor in checkpoint.weights.tensors.values())
    # A factor of two leaves the precise refusals (missing tensors, other shapes) to the loading itself.
    if described > 2 * stored:
        raise InputRefused(
            "E-CONFIG-SIZE",
            f"config.json describes {described} weights, the files hold {stored}",
            "fetch the model again: config.json and weights do not belong together",
        )


def _unreadable(checkpoint: Checkpoint, error: Exception) -> InputRefused:
    return InputRefused(
        "E-WEIGHTS-UNREADABLE",
        f"{checkpoint.name} cannot be loaded: {type(error).__name__}: {first_line(error)}",
        "fetch the model again",
    )
