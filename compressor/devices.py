"""Where a run computes and in which type it exports."""

from __future__ import annotations

import re

import torch

from compressor.errors import InputRefused, OutOfResources, UsageError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Multiples of float32 scales: what is not quantised, and the PyTorch model, is float32 too.
QUANTIZED = ("int8", "int4")


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def resolve_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``cuda:i`` stands for.

    Raises:
        UsageError: The name is none of these.
        OutOfResources: The device is not on this machine.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d{1,3}))?", name)
    if match is None:
        raise UsageError(
            "E-DEVICE-NAME", f"a device is auto, cpu, cuda or cuda:i; got {name!r}", "give --device auto"
        )
    index = int(match[1] or 0)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        raise OutOfResources(
            "E-DEVICE-ABSENT",
            f"device cuda:{index} is not here; this machine shows {count} CUDA devices",
            "give --device auto or cpu",
        )
    return torch.device(f"cuda:{index}")


def export_dtype(choice: str, checkpoint_dtype: torch.dtype) -> torch.dtype:
    """The type of the exported weights; ``auto`` keeps the checkpoint's, int8 and int4 stand on float32.

    Every one of them runs on ONNX Runtime's CPU provider: float16 through casts that it inserts itself, bfloat16
    because the graph stores it and casts to float32.

    Raises:
        InputRefused: The checkpoint's type is none that ONNX Runtime can run.
    """
    if choice in QUANTIZED:
        return torch.float32
    if choice != "auto":
        return DTYPES[choice]
    if checkpoint_dtype not in DTYPES.values():
        raise InputRefused(
            "E-MODEL-DTYPE",
            f"weights of type {dtype_name(checkpoint_dtype)} cannot be exported as they are",
            "give --dtype float32, float16 or bfloat16",
        )
    return checkpoint_dtype


def mixed_precision(device: torch.device) -> torch.dtype | None:
    """The type that repair computes products in: bfloat16 on CUDA where it is native, else float16; None on the CPU."""
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def settle(device: torch.device) -> None:
    """Wait until the device has done what it was given; clocks are read after that."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
