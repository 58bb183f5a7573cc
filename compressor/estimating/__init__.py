"""What a run will take, before it begins: memory, disk, time."""

from compressor.estimating.estimate import FACTOR, Estimate, estimate_job, refuse_misfits

__all__ = ["FACTOR", "Estimate", "estimate_job", "refuse_misfits"]
