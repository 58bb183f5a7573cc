"""What a dry run prints: needed against free, bytes of the output by encoding, time."""

from __future__ import annotations

from compressor.estimating import FACTOR, Estimate
from compressor.report.units import MISSING, byte_size, duration

_STAGES = {
    "prune": "pruning a block",
    "repair": "repairing a window of blocks",
    "together": "tuning all blocks together",
}


def estimate_text(estimate: Estimate) -> str:
    """A table, and what it leaves out."""
    output = estimate.output
    rows = [
        ("memory", byte_size(estimate.host_bytes), f"of {byte_size(estimate.host_free_bytes)}"),
        ("  hidden states", byte_size(estimate.activations_bytes - estimate.spilled_bytes), "of all windows"),
    ]
    if estimate.device_bytes is not None:
        free = byte_size(estimate.device_free_bytes)
        rows.append(("device memory", byte_size(estimate.device_bytes), f"of {free}"))
    rows += [
        ("  most of it in", _STAGES[estimate.stage], ""),
        ("disk", byte_size(estimate.disk_bytes), f"of {byte_size(estimate.disk_free_bytes)}"),
        ("  state", byte_size(estimate.state_bytes), "removed at the end"),
        ("  hidden states", byte_size(estimate.spilled_bytes), "beyond --activation-memory"),
        ("  output", byte_size(estimate.output_bytes), f"{byte_size(output.hf)} of it the PyTorch model"),
        ("ONNX, auto", byte_size(output.auto), ""),
        ("ONNX, dense", byte_size(output.dense), ""),
        ("ONNX, sparse", byte_size(output.sparse), "every pruned matrix"),
        ("time of a block", MISSING if estimate.block_s is None else duration(estimate.block_s), ""),
        (
            "time of the blocks",
            MISSING if estimate.blocks_s is None else duration(estimate.blocks_s),
            f"{estimate.blocks} blocks, without export and validation",
        ),
    ]
    lines = [f"{label:<20} {value:<28} {note}".rstrip() for label, value, note in rows]
    return "\n".join([*lines, f"Memory is within a factor of {FACTOR:g}, time within about 2. It fits."])
