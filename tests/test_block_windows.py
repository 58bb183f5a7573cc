"""Windows of blocks: overlapping pairs train each block twice, commit in order, and aim at the dense model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import architectures
import pytest
import tiny_models
import torch
from torch import Tensor, nn

from compressor.block_pass import BlockPass
from compressor.block_result import PassResult
from compressor.block_windows import windows_of
from compressor.errors import UsageError
from compressor.linears import IgnoreRules
from compressor.models.checkpoint import open_checkpoint
from compressor.models.source import LoadedSource, open_source
from compressor.progress import BlockFinished, Event
from compressor.recipe_file import read_overrides
from compressor.recovery import RECOVERIES, ebft
from compressor.recovery.block_io import Repaired
from compressor.sparsity import Mask, SparsityPattern

BLOCKS = 4


class Collected:
    """A writer that keeps what is committed, in the order in which it comes."""

    def __init__(self) -> None:
        self.blocks: dict[int, dict[str, Tensor]] = {}
        self.masks: dict[int, dict[str, Mask]] = {}

    def commit(self, index: int, block: nn.Module, masks: Mapping[str, Mask]) -> None:
        """Keep a copy."""
        self.blocks[index] = {name: weight.clone() for name, weight in block.named_parameters()}
        self.masks[index] = dict(masks)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> LoadedSource:
    """A llama of four blocks."""
    folder = tmp_path_factory.mktemp("model") / "llama"
    model = architectures.build("llama", num_hidden_layers=BLOCKS)
    return open_source(open_checkpoint(tiny_models.save_model(folder, model)), torch.device("cpu"))


def press(source: LoadedSource, *told: Any, **settings: Any) -> tuple[Collected, PassResult]:
    """A pass over the blocks with a short repair."""
    recipe = read_overrides(
        {"recovery.epochs": 2, "recovery.batch_size": 4, "recovery.lr": 1e-2}
        | {f"recovery.{key}": value for key, value in settings.items()}
    )
    ids = torch.randint(4, 90, (16, 12), generator=torch.Generator().manual_seed(0))
    written = Collected()
    passed = BlockPass(
        source,
        ids[:8],
        ids[8:12],
        ids[12:],
        recipe=recipe,
        pattern=SparsityPattern.unstructured(0.5),
        ignore=IgnoreRules(()),
        device=torch.device("cpu"),
        stop=lambda: False,
        progress=told[0] if told else lambda event: None,
    ).run(written)
    return written, passed


def test_windows_overlap_by_one_block() -> None:
    """Both ends alone and all pairs between, so that each block is in two windows; a block leaves with its second."""
    windows = windows_of(4, overlap=True)
    assert [window.blocks for window in windows] == [(0,), (0, 1), (1, 2), (2, 3), (3,)]
    assert [window.finished for window in windows] == [(), (0,), (1,), (2,), (3,)]
    assert [window.blocks[-1] for window in windows if window.is_last_of] == [0, 1, 2, 3]
    assert [window.blocks for window in windows_of(2, overlap=True)] == [(0,), (0, 1), (1,)]
    assert [window.blocks for window in windows_of(1, overlap=True)] == [(0,)]
    assert [(w.blocks, w.finished) for w in windows_of(3, overlap=False)] == [((i,), (i,)) for i in range(3)]


def test_overlap_trains_each_block_twice(source: LoadedSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """The repair sees one block, then pairs, then the last; the second block of a pair is the first of the next."""
    seen: list[list[dict[str, Tensor]]] = []
    names = []

    def spy(block: nn.Module, masks: Any, io: Any, recipe: Any, **keywords: Any) -> Repaired:
        result = ebft.repair(block, masks, io, recipe, **keywords)
        parts = list(block.children()) if isinstance(block, nn.ModuleList) else [block]
        seen.append([{n: w.clone() for n, w in part.named_parameters()} for part in parts])
        names.append(io.name)
        return result

    monkeypatch.setitem(RECOVERIES, "ebft", spy)
    written, _ = press(source, window="overlap")
    layers = [f"model.layers.{index}" for index in range(BLOCKS)]
    assert names == [
        layers[0],
        *(f"{a} and {b}" for a, b in itertools.pairwise(layers)),
        layers[3],
    ]
    assert list(written.blocks) == [0, 1, 2, 3]
    for index in range(BLOCKS - 1):  # what is committed is what its second window left
        assert all(torch.equal(seen[index + 1][0][n], w) for n, w in written.blocks[index].items())
    assert all(torch.equal(seen[-1][0][n], w) for n, w in written.blocks[3].items())
    assert not torch.equal(seen[0][0]["mlp.up_proj.weight"], seen[1][0]["mlp.up_proj.weight"])


def test_overlap_aims_at_the_dense_model_behind_each_window(source: LoadedSource) -> None:
    """Told losses are those at the window's end: the last one is that of the finished model's last block."""
    written, passed = press(source, window="overlap")
    ids = torch.randint(4, 90, (16, 12), generator=torch.Generator().manual_seed(0))[8:12]
    dense = sparse = source.embed(ids)
    for index in range(BLOCKS):
        block = source.load_block(index)
        dense = source.forward(index, block, dense)
        block.load_state_dict(written.blocks[index], strict=False)
        sparse = source.forward(index, block, sparse)
    told = passed.blocks[-1].repaired
    assert told is not None
    assert told.loss_after == pytest.approx(float((sparse - dense).square().mean()), rel=1e-4)


def test_overlap_keeps_every_mask(source: LoadedSource) -> None:
    """Masks are those that came with the block, zeros bit for bit, through both trainings."""
    written, passed = press(source, window="overlap")
    for index, masks in written.masks.items():
        assert set(masks) <= set(written.blocks[index])  # by the block's own names
        for name, mask in masks.items():
            assert not written.blocks[index][name][~mask].any()
            assert mask.float().mean() == 0.5
    assert [block.index for block in passed.blocks] == [0, 1, 2, 3]
    steps = [block.repaired.steps for block in passed.blocks if block.repaired]
    assert steps == [2, 2, 2, 4]  # half of two epochs of two batches; the last block ends two windows


def test_overlap_tells_each_block_once(source: LoadedSource) -> None:
    """One event and one row per block, in order, as with single blocks."""
    told: list[Event] = []
    press(source, told.append, window="overlap")
    assert [event.index for event in told if isinstance(event, BlockFinished)] == [0, 1, 2, 3]


def test_overlap_ends_nearer_to_the_dense_model(source: LoadedSource) -> None:
    """At equal passes the last block's output is nearer to the dense one's after pairs than after single blocks."""
    after = {}
    for window in ("block", "overlap"):
        repaired = press(source, window=window, epochs=6)[1].blocks[-1].repaired
        assert repaired is not None
        after[window] = repaired.loss_after
    assert after["overlap"] < after["block"]


def test_overlap_wants_the_dense_models_activations() -> None:
    """A pair aims at what the dense model has behind it; another target is refused by name."""
    for targets in ("block", "blend"):
        with pytest.raises(UsageError, match="targets must be model"):
            read_overrides({"recovery.window": "overlap", "recovery.targets": targets})


@pytest.mark.parametrize(("share", "same"), [(0.0, "block"), (1.0, "model")])
def test_blended_targets_end_at_both_pure_ones(source: LoadedSource, share: float, same: str) -> None:
    """A share of 0 is the dense block's outputs, of 1 the dense model's, to the rounding of the mixture."""
    blended = press(source, targets="blend", targets_blend=share)[1]
    pure = press(source, targets=same)[1]
    for one, other in zip(blended.blocks, pure.blocks, strict=True):
        assert one.repaired is not None
        assert other.repaired is not None
        assert one.repaired.loss_before == pytest.approx(other.repaired.loss_before, rel=1e-3, abs=1e-9)


def test_blended_targets_lie_between() -> None:
    """Halfway between is what the recipe's default says."""
    assert read_overrides({"recovery.targets": "blend"}).recovery.targets_blend == 0.5


@pytest.mark.parametrize("window", ["block", "overlap"])
def test_least_squares_start_lowers_what_the_repair_starts_from(source: LoadedSource, window: str) -> None:
    """With an idle repair the kept weights are those of least squares: lower losses, told from the pruned block."""
    idle = {"lr": 1e-30, "window": window}
    started, plain = (press(source, start=start, **idle)[1] for start in ("least_squares", "pruned"))
    one, other = started.blocks[0].repaired, plain.blocks[0].repaired
    assert one is not None
    assert other is not None
    assert one.loss_before == pytest.approx(other.loss_before, rel=1e-6)
    assert one.loss_after < other.loss_after == pytest.approx(other.loss_before, rel=1e-6)
