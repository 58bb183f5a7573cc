"""Masks in a file, one bit per weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from exporters.errors import ExportError
from exporters.masks import nonzero_mask, pack_mask, read_masks, write_masks


def drawn(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A mask with about half of the weights kept."""
    return np.random.default_rng(seed).random(shape) < 0.5


def test_masks_survive_the_file(tmp_path: Path) -> None:
    """Masks of any shape, given whole or packed, come back as they were."""
    masks = {"b.weight": drawn((3, 5)), "a.experts": drawn((2, 3, 7), 1), "c.weight": drawn((8, 8), 2)}
    write_masks(tmp_path / "m.safetensors", {**masks, "c.weight": pack_mask(masks["c.weight"])})
    found = read_masks(tmp_path / "m.safetensors")
    assert sorted(found) == sorted(masks)
    assert all(np.array_equal(found[name], mask) for name, mask in masks.items())


def test_masks_take_one_bit_a_weight(tmp_path: Path) -> None:
    """The file is plain safetensors with numpy's packed bits, first weight in the lowest bit."""
    write_masks(tmp_path / "m.safetensors", {"w": np.arange(16).reshape(4, 4) % 8 == 0})
    assert load_file(tmp_path / "m.safetensors")["w"].tolist() == [1, 1]


def test_equal_masks_give_equal_bytes(tmp_path: Path) -> None:
    """Neither the order in which they are given nor the run shows in the file."""
    masks = {f"layer.{i}": drawn((4, 4), i) for i in range(20)}
    write_masks(tmp_path / "a.safetensors", masks)
    write_masks(tmp_path / "b.safetensors", dict(reversed(masks.items())))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 64, None])
def test_masks_file_that_is_none_is_refused(tmp_path: Path, content: bytes | None) -> None:
    """A missing or damaged file is refused by id, not by safetensors' own error."""
    path = tmp_path / "m.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExportError) as refused:
        read_masks(path)
    assert refused.value.error_id == "E-MASKS-UNREADABLE"


@pytest.mark.parametrize(
    "shapes",
    [None, "[]", '{"w": [9, 9]}', '{"w": [-2, -4]}', '{"w": "8"}', '{"v": [8]}', '{"w": [8'],
    ids=str,
)
def test_masks_whose_shapes_do_not_fit_are_refused(tmp_path: Path, shapes: str | None) -> None:
    """A header that does not describe the tensors is refused before a mask is unpacked."""
    path = tmp_path / "m.safetensors"
    save_file({"w": np.zeros(1, np.uint8)}, path, metadata=None if shapes is None else {"shapes": shapes})
    with pytest.raises(ExportError) as refused:
        read_masks(path)
    assert refused.value.error_id == "E-MASKS-UNREADABLE"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8, np.uint8])
def test_nonzero_is_what_numpy_finds(dtype: type) -> None:
    """The comparison of bits finds the same places as the comparison of numbers, in arrays of any layout."""
    values = np.random.default_rng(0).integers(0, 3, (40, 30)).astype(dtype)
    assert np.array_equal(nonzero_mask(values), values != 0)
    assert np.array_equal(nonzero_mask(values.T), values.T != 0)


def test_nonzero_counts_nan_and_tiny_numbers_but_not_negative_zero() -> None:
    """Only the two zeros are zero."""
    values = np.array([0.0, -0.0, np.nan, 1e-45, -np.inf], np.float32)
    assert nonzero_mask(values).tolist() == [False, False, True, True, True]
