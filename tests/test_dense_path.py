"""The dense model's hidden states, remembered between passes: the same numbers, as long as the budget lasts."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch

from compressor.dense_path import RememberedPath
from compressor.models.checkpoint import open_checkpoint
from compressor.models.source import LoadedSource, open_source
from compressor.propagation import advance, embedded
from compressor.streams import Activations

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> LoadedSource:
    """A tiny llama."""
    folder = tiny_models.save_variant(tmp_path_factory.mktemp("model") / "llama", "llama")
    return open_source(open_checkpoint(folder), CPU)


def states(source: LoadedSource) -> Activations:
    """What enters the first block for five windows."""
    ids = torch.arange(40).view(5, 8) % source.vocab_size
    return embedded(source, ids, CPU)


def test_dense_path_remembers_bit_for_bit(source: LoadedSource, tmp_path: Path) -> None:
    """A second pass reads what the first one wrote, without running a block, and gets the same bits."""
    expected, first, second = states(source), states(source), states(source)
    for index in range(source.num_blocks):
        block = source.load_block(index)
        advance(source, index, block, expected)
        RememberedPath(source, tmp_path / "dense", 2**30).advance("calibration", index, block, first)
        block.register_forward_hook(lambda *_: pytest.fail("the block ran"))
        RememberedPath(source, tmp_path / "dense", 2**30).advance("calibration", index, block, second)
        assert torch.equal(first.states, expected.states)
        assert torch.equal(second.states, expected.states)


def test_dense_path_keeps_roles_apart(source: LoadedSource, tmp_path: Path) -> None:
    """What calibration windows left behind is not taken for held-out ones."""
    path, block = RememberedPath(source, tmp_path / "dense", 2**30), source.load_block(0)
    path.advance("calibration", 0, block, states(source))
    heldout = states(source)
    heldout.states.mul_(2)
    expected = advance(source, 0, block, Activations.filled(heldout.states))
    path.advance("heldout", 0, block, heldout)
    assert torch.equal(heldout.states, expected.states)


def test_dense_path_stays_within_its_budget(source: LoadedSource, tmp_path: Path) -> None:
    """What does not fit is computed and not written; the budget counts all folders beside."""
    size = states(source).size_bytes
    path = RememberedPath(source, tmp_path / "dense" / "one", 2 * size)
    for index in range(source.num_blocks):
        path.advance("calibration", index, source.load_block(index), states(source))
    other = RememberedPath(source, tmp_path / "dense" / "two", 2 * size)
    moved = states(source)
    other.advance("calibration", 0, source.load_block(0), moved)
    assert len(list((tmp_path / "dense").rglob("*.f32"))) == 2
    assert torch.equal(moved.states, advance(source, 0, source.load_block(0), states(source)).states)


def test_dense_path_takes_a_cut_file_for_none(source: LoadedSource, tmp_path: Path) -> None:
    """A file of another size is computed again and replaced."""
    path, block = RememberedPath(source, tmp_path / "dense", 2**30), source.load_block(0)
    path.advance("calibration", 0, block, states(source))
    file = tmp_path / "dense" / "calibration-0.f32"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    moved = states(source)
    path.advance("calibration", 0, block, moved)
    assert file.read_bytes() == whole == moved.states.numpy().tobytes()
