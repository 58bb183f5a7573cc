"""What a planned run takes: memory on host and device, disk, time, bytes of its output; and whether that is there."""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from compressor.devices import free_device_bytes
from compressor.errors import OutOfResources
from compressor.estimating.disk import OutputSize, output_size, state_bytes
from compressor.estimating.facts import RunFacts, facts_of_job
from compressor.estimating.memory import stream_bytes, work_bytes
from compressor.estimating.step import block_seconds, measure_pace, tuning_seconds
from compressor.planning import Job
from compressor.report.units import byte_size, duration
from compressor.run.output import OutputPlan
from validators.validate import available_memory_bytes

__all__ = ["FACTOR", "Estimate", "estimate_job", "refuse_misfits"]

# Estimates of memory are within this factor of what was measured (tests/test_estimate.py): what needs more than so
# many times what is free does not fit.
FACTOR = 1.5


@dataclass(frozen=True)
class Estimate:
    """What a run takes at its peak, and what is free.

    Attributes:
        host_bytes: Resident memory of the process, all that it has already included.
        host_free_bytes: What the machine can give, what the process has already included.
        device_bytes: On a CUDA device; None on the CPU.
        device_free_bytes: Free there.
        stage: The stage of the peak: ``prune``, ``repair`` or ``together`` (all blocks).
        activations_bytes: Hidden states of all windows, in memory and spilled.
        spilled_bytes: Those beyond ``--activation-memory``, on the disk.
        state_bytes: The state that a stopped run goes on from.
        output: ONNX files by encoding, and the PyTorch model.
        output_bytes: Of the encoding that is asked for, with the PyTorch model.
        disk_free_bytes: Where the output goes.
        block_s: Seconds for one block; None where it could not be measured.
        blocks_s: Seconds for all blocks, trials of learning rates and tuning of all blocks included.
        blocks: How many.
    """

    host_bytes: int
    host_free_bytes: int
    device_bytes: int | None
    device_free_bytes: int | None
    stage: str
    activations_bytes: int
    spilled_bytes: int
    state_bytes: int
    output: OutputSize
    output_bytes: int
    disk_free_bytes: int
    block_s: float | None
    blocks_s: float | None
    blocks: int

    @property
    def disk_bytes(self) -> int:
        """All that lies on the disk at once."""
        return self.spilled_bytes + self.state_bytes + self.output_bytes

    def tree(self) -> dict[str, Any]:
        """The estimate as JSON."""
        return {**dataclasses.asdict(self), "disk_bytes": self.disk_bytes}

    def lines(self) -> tuple[str, str]:
        """What is needed and what is free; how long it takes."""
        memory = f"memory {byte_size(self.host_bytes)} of {byte_size(self.host_free_bytes)}"
        if self.device_bytes is not None:
            memory += f" · device {byte_size(self.device_bytes)} of {byte_size(self.device_free_bytes)}"
        spilled = f", {byte_size(self.spilled_bytes)} activations" if self.spilled_bytes else ""
        disk = (
            f"disk {byte_size(self.disk_bytes)} of {byte_size(self.disk_free_bytes)} "
            f"({byte_size(self.state_bytes)} state, {byte_size(self.output_bytes)} output{spilled})"
        )
        if self.block_s is None or self.blocks_s is None:
            return f"{memory} · {disk}", "time not measured: one window does not fit into the device"
        each = f"{duration(self.block_s)} a block, {duration(self.blocks_s)} for {self.blocks} blocks"
        return f"{memory} · {disk}", f"{each}, export and validation not counted"


def estimate_job(
    job: Job, dtype: torch.dtype, out: OutputPlan, activation_memory: int | None = None
) -> Estimate:
    """The estimate for a planned run. Writes nothing.

    Args:
        job: Its model is open, its texts are cut.
        dtype: Type of the exported weights.
        out: Where the output goes.
        activation_memory: What hidden states may take of memory.
    """
    facts = facts_of_job(job, dtype)
    streams, work = stream_bytes(facts), work_bytes(facts)
    spilled = 0 if activation_memory is None else max(0, streams - activation_memory)
    own = psutil.Process().memory_info().rss
    on_device = job.device.type == "cuda"
    host = own + streams - spilled + work.origin
    device = device_free = None
    if on_device:
        device = work.peak + 4 * facts.other_weights
        device_free = free_device_bytes(job.device) + torch.cuda.memory_allocated(job.device)
    else:
        host += work.peak
    size = output_size(facts)
    block_s, blocks_s = _seconds(job, facts)
    return Estimate(
        host_bytes=host,
        host_free_bytes=available_memory_bytes() + own,
        device_bytes=device,
        device_free_bytes=device_free,
        stage=work.stage,
        activations_bytes=streams,
        spilled_bytes=spilled,
        state_bytes=state_bytes(facts),
        output=size,
        output_bytes=size.of(job.recipe.export.encoding) + size.hf,
        disk_free_bytes=shutil.disk_usage(_existing(out.folder)).free,
        block_s=block_s,
        blocks_s=blocks_s,
        blocks=facts.blocks,
    )


def refuse_misfits(estimate: Estimate, factor: float = 1.0) -> None:
    """Refuse what needs more than ``factor`` times what is free.

    Raises:
        OutOfResources: E-ESTIMATE-DEVICE, E-ESTIMATE-MEMORY, E-ESTIMATE-DISK, with what to change.
    """
    if estimate.device_bytes is not None and estimate.device_bytes > factor * (
        estimate.device_free_bytes or 0
    ):
        raise OutOfResources(
            "E-ESTIMATE-DEVICE",
            _lacking("device memory", estimate.device_bytes, estimate.device_free_bytes or 0),
            _less_work(estimate.stage),
        )
    if estimate.host_bytes > factor * estimate.host_free_bytes:
        states = estimate.activations_bytes - estimate.spilled_bytes
        over = estimate.host_bytes - estimate.host_free_bytes
        remedy = _less_work(estimate.stage)
        if over < 0.9 * states:
            mib = max(1, int(0.9 * (states - over)) // 2**20)
            remedy = (
                f"give --activation-memory {mib}MiB, fewer --num-calibration-samples, or a shorter --seqlen"
            )
        raise OutOfResources(
            "E-ESTIMATE-MEMORY", _lacking("memory", estimate.host_bytes, estimate.host_free_bytes), remedy
        )
    if estimate.disk_bytes > factor * estimate.disk_free_bytes:
        raise OutOfResources(
            "E-ESTIMATE-DISK",
            _lacking("disk", estimate.disk_bytes, estimate.disk_free_bytes),
            "give an --out on another disk, fewer --num-calibration-samples, or a shorter --seqlen",
        )


def _seconds(job: Job, facts: RunFacts) -> tuple[float | None, float | None]:
    pace = measure_pace(job, facts)
    if pace is None:
        return None, None
    block_s, trials_s = block_seconds(facts, pace)
    return block_s, facts.blocks * block_s + trials_s + tuning_seconds(facts, pace)


def _lacking(what: str, needed: int, free: int) -> str:
    return f"the run needs about {byte_size(needed)} of {what}, {byte_size(free)} are there"


def _less_work(stage: str) -> str:
    """What makes a stage smaller."""
    return {
        "together": "give --finish none, a smaller --set finish.batch_size=1, or a shorter --seqlen",
        "repair": "give a smaller --batch-size, --set recovery.window=block, or a shorter --seqlen",
        "prune": "give --pruner wanda, or a shorter --seqlen",
    }[stage]


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return folder if os.path.isdir(folder) else _existing(folder.parent)
