"""Prints, as JSON, what an estimate says of a run's blocks and what they take; in a process of its own.

python tests/estimate_peak.py FOLDER PRUNER FINISH
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import tiny_models

from compressor.estimating import estimate_job
from compressor.linears import IgnoreRules
from compressor.models.writer import CheckpointWriter
from compressor.opening import open_model
from compressor.planning import pattern_of, plan, run_blocks
from compressor.progress import silent
from compressor.run.measure import peak_host_bytes
from compressor.run.output import plan_output


def main(folder: Path, pruner: str, finish: str) -> None:
    """Estimate, then prune and repair; bytes beyond those that the process had before."""
    shape = {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    model = tiny_models.save_variant(folder / "model", "llama", **shape, max_position_embeddings=128)
    recipe = tiny_models.short_recipe(
        tiny_models.write_texts(folder),
        pruning__method=pruner,
        recovery__window="overlap",
        recovery__batch_size=8,
        calibration__num_samples=18,
        calibration__seqlen=64,
        finish__method=finish,
        finish__epochs=1,
        finish__lr=1e-4,
    )
    opened = open_model(model, dtype="auto", device="cpu", revision=None, trust_remote_code=False)
    job = plan(opened, recipe, pattern_of(recipe.pruning), IgnoreRules(()), silent)
    before = psutil.Process().memory_info().rss
    estimate = estimate_job(job, opened.dtype, plan_output(folder / "out.onnx"))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    run_blocks(job, CheckpointWriter(folder / "hf", job.source, opened.dtype), lambda: False, silent)
    measured = (peak_host_bytes() or 0) - before
    told = {"estimated": estimate.host_bytes - before, "measured": measured, "stage": estimate.stage}
    print(json.dumps({**told, "states": estimate.activations_bytes}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
