"""How much memory a run takes at its peak, stage by stage.

Counted is what grows with the model and the text; what the process has already (libraries, embedding, head) is added by
the caller. Bytes of the blocks' side lie on the device, hidden states of all windows in host memory or, beyond
``--activation-memory``, in files.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from compressor.estimating.facts import FLOAT32, RunFacts
from compressor.finetuning.losses import LOGITS
from compressor.finetuning.sparse_model import KEPT_ACTIVATIONS_BYTES
from compressor.propagation import TOKENS_AT_ONCE

__all__ = ["Memory", "stream_bytes", "work_bytes"]

# A trained weight: itself, its gradient, Adam's two moments, the best step's copy; and its mask.
_TRAINED = 5 * FLOAT32 + 1
# What came into the repair, for the case that the device's memory runs out.
_CAME = FLOAT32
# Logits of the sparse and the dense model, their logarithms, and the gradient.
_LOGIT_COPIES = 5
# Of pruners that solve for weights: matrices of the inputs' size, and of the weight's, that live at the same time.
_SOLVER = {"sparsegpt": (4, 4), "admm": (5, 7), "alps": (5, 9)}


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of each stage, where blocks compute.

    Attributes:
        prune: A block's statistics and its solver, or the pass of windows through it.
        repair: Training of one window of blocks.
        together: Training of all blocks; 0 without.
        origin: In host memory: the window of blocks as its repair began.
    """

    prune: int
    repair: int
    together: int
    origin: int

    @property
    def peak(self) -> int:
        """The largest stage."""
        return max(self.prune, self.repair, self.together)

    @property
    def stage(self) -> str:
        """Its name."""
        return max(("prune", "repair", "together"), key=lambda name: int(getattr(self, name)))


def stream_bytes(facts: RunFacts) -> int:
    """Hidden states of all windows, at the most that there are at once."""
    states = facts.states_bytes(facts.training + facts.heldout)
    copies = 1 + facts.runs_dense_path
    if facts.repairs_blocks:
        copies += facts.recipe.recovery.targets != "model"
        # Windows that overlap: states before each of the two blocks.
        copies += 2 if facts.window_blocks == 2 else 0
        # Halves: the dense model's states before the block, and its midpoint.
        copies += 2 if facts.recipe.recovery.window == "split" else 0
    return copies * states + facts.versions * facts.states_bytes(facts.evaluation)


def work_bytes(facts: RunFacts) -> Memory:
    """What blocks take where they compute."""
    recovery, finish = facts.recipe.recovery, facts.recipe.finish
    opened = facts.window_blocks * facts.block_weights
    waiting = (FLOAT32 + 1) * facts.all_block_weights if facts.tunes_together else 0
    logits = FLOAT32 * 3 * facts.seqlen * facts.vocab  # of one evaluation window
    passing = TOKENS_AT_ONCE * facts.kept_per_token // 2
    prune = (
        (FLOAT32 + 1) * opened + FLOAT32 * facts.block_weights + max(passing, _pruner_bytes(facts), logits)
    )
    repair = origin = 0
    if facts.trains_blocks:
        tokens = facts.tokens_of_batch(recovery.batch_size)
        trial = FLOAT32 * opened if recovery.lr == "auto" and recovery.method == "ebft" else 0
        repair = _TRAINED * opened + trial + tokens * facts.kept_per_token * (facts.window_blocks + 1)
        origin = _CAME * opened
    together = 0
    if facts.tunes_together:
        kind = finish if finish.method == "kl" else recovery
        tokens = facts.tokens_of_batch(kind.batch_size)
        every = tokens * facts.kept_per_token * facts.blocks
        recomputes = facts.device.type == "cuda" or every > KEPT_ACTIVATIONS_BYTES
        kept = 2 * tokens * facts.kept_per_token if recomputes else every
        passed_on = FLOAT32 * tokens * facts.hidden * facts.blocks
        together = _TRAINED * facts.all_block_weights + kept + passed_on
        together += FLOAT32 * _LOGIT_COPIES * min(LOGITS, tokens * facts.vocab)
        if finish.method == "kl" and finish.runs_dense:
            together += FLOAT32 * facts.all_block_weights + passed_on
    return Memory(waiting + prune, waiting + repair if repair else 0, together, origin)


def _pruner_bytes(facts: RunFacts) -> int:
    """Statistics of all inputs of a block, and the largest solver."""
    copies = _SOLVER.get(facts.recipe.pruning.method)
    if copies is None or not facts.matrices:
        return 0
    # About half of the matrices of a width share their inputs with another: query, key and value; gate and up.
    widths = Counter(matrix.inputs for matrix in facts.matrices)
    sums = sum(-(-count // 2) * width**2 for width, count in widths.items())
    solver = max(copies[0] * m.inputs**2 + copies[1] * m.inputs * m.outputs for m in facts.matrices)
    return FLOAT32 * (sums + solver)
