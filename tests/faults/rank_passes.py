"""Passes over the blocks of a tiny model by several processes: ``python rank_passes.py FOLDER WORLDS VARIANT...``.

``WORLDS`` is such as ``1,2,4``. For each of them that many children are forked; together they make the pass of every
variant, and each leaves what it holds in ``FOLDER/VARIANT-WORLD-RANK.json``: digests of the blocks, and what the pass
tells; rank 0 leaves masks beside it. No tensor is touched in this process, so that no thread of torch is lost in a
fork.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

from faults.local_ranks import environment_of, free_port  # noqa: E402  # its folder has to be known first

from compressor.block_pass import BlockPass  # noqa: E402
from compressor.linears import IgnoreRules  # noqa: E402
from compressor.models.checkpoint import open_checkpoint  # noqa: E402
from compressor.models.source import open_source  # noqa: E402
from compressor.models.writer import round_block  # noqa: E402
from compressor.process_group import ProcessGroup  # noqa: E402
from compressor.ranks import ALONE, Ranks  # noqa: E402
from compressor.recipe_file import read_overrides  # noqa: E402
from compressor.run.launch import launched  # noqa: E402
from compressor.sparsity import Mask, SparsityPattern  # noqa: E402

SHORT: dict[str, Any] = {
    "recovery.epochs": 2,
    "recovery.batch_size": 4,
    "recovery.lr": 3e-3,
    "pruning.method": "wanda",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {
        "recovery.window": "overlap",
        "recovery.lr": "auto",
        "recovery.probe.epochs": 1,
        "recovery.probe.candidates": [1e-3, 3e-3],
        "finish.method": "kl",
        "finish.epochs": 1,
        "finish.trials.candidates": [1e-4, 3e-4],
    },
    "overlap": {"recovery.window": "overlap", "recovery.lr": "auto", "recovery.probe.epochs": 1},
    "split": {"recovery.window": "split", "recovery.loss": "normalized", "recovery.first_token": "per_token"},
    "warm": {"recovery.window": "block", "recovery.start": "least_squares", "pruning.method": "sparsegpt"},
    "dsnot": {"recovery.method": "dsnot"},
    "mask": {"recovery.method": "ebft-mask"},
    "none": {"recovery.method": "none", "pruning.method": "admm"},
    "flap": {"pruning.method": "flap", "recovery.window": "overlap"},
    "owl": {"pruning.allocation": "owl", "recovery.window": "block"},
    "finish": {"finish.method": "kl", "finish.epochs": 1, "finish.lr": 1e-3, "recovery.window": "overlap"},
    "finish-expected": {
        "finish.method": "kl",
        "finish.epochs": 1,
        "finish.lr": 1e-3,
        "finish.noise": 0.3,
        "finish.noise_from": "model",
        "finish.noise_fades": True,
        "recovery.window": "overlap",
    },
    "finish-by-trial": {"finish.method": "kl", "finish.epochs": 1, "recovery.window": "block"},
    "masked-lora": {"recovery.method": "masked-lora", "recovery.masked_lora.lr": 1e-3},
    "squarehead": {"recovery.method": "squarehead"},
}
WITH_DROPOUT = {"masked-lora"}  # which draws for the windows of each rank
WINDOWS, SEQLEN = 22, 12  # 13 to train on, 3 held out, 6 to evaluate: no number of processes divides them all


class Digests:
    """A writer that keeps a digest of each block, as rounded, and its masks."""

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self.masks: dict[str, torch.Tensor] = {}

    def commit(self, index: int, block: nn.Module, masks: Mapping[str, Mask]) -> None:
        """Take a finished block."""
        round_block(block, f"{index}.", torch.float32)
        digest = hashlib.sha256()
        for name, weight in block.named_parameters():
            digest.update(name.encode() + weight.detach().numpy().tobytes())
            self.masks[f"{index}.{name}"] = weight.detach() != 0
        self.blocks.append(digest.hexdigest())


def one_pass(model: Path, name: str, ranks: Ranks) -> tuple[Digests, dict[str, Any]]:
    """The pass of a variant; digests, and what it tells."""
    cpu = torch.device("cpu")
    settings = {"finish.method": "none", **SHORT, **VARIANTS[name]}
    if settings.get("recovery.method", "ebft") != "ebft":
        del settings["recovery.lr"]
    recipe = read_overrides(settings)
    ids = torch.randint(4, 90, (WINDOWS, SEQLEN), generator=torch.Generator().manual_seed(0))
    digests = Digests()
    passed = BlockPass(
        open_source(open_checkpoint(model), cpu),
        ids[:13],
        ids[13:16],
        ids[16:],
        recipe=recipe,
        pattern=SparsityPattern.unstructured(0.3),
        ignore=IgnoreRules(()),
        device=cpu,
        stop=ranks.agreed(lambda: False),
        progress=lambda event: None,
        ranks=ranks,
    ).run(digests)
    repaired = [block.repaired for block in passed.blocks]
    told = {
        "blocks": digests.blocks,
        "perplexities": passed.perplexities,
        "lr": passed.lr,
        "losses": [
            None if one is None else [one.loss_before, one.loss_after, one.best_step] for one in repaired
        ],
        "stages": [[one.loss_before, one.loss_after, one.best_step, one.lr] for one in passed.finetuned],
    }
    return digests, told


def become_rank(folder: Path, names: list[str]) -> None:
    """All passes of one rank."""
    torch.set_num_threads(1)
    launch = launched()
    ranks = ALONE if launch is None else ProcessGroup(launch)
    for name in names:
        digests, told = one_pass(folder / "model", name, ranks)
        place = folder / f"{name}-{ranks.world}-{ranks.rank}"
        place.with_suffix(".json").write_text(json.dumps(told), encoding="utf-8")
        if ranks.is_root:
            torch.save(digests.masks, place.with_suffix(".pt"))
    ranks.part()


def main() -> int:
    """Fork, wait, and tell whether all went well."""
    folder, worlds, *names = sys.argv[1:]
    failed = 0
    for world in map(int, worlds.split(",")):
        port = free_port()
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    os.environ.update(environment_of(rank, world, port))
                    become_rank(Path(folder), names)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            children.append(child)
        failed += sum(os.waitpid(child, 0)[1] != 0 for child in children)
    return failed


if __name__ == "__main__":
    sys.exit(main())
