"""Activations in host memory: what is written is read, in any order, batch by batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from compressor.streams import Activations, in_order, limited_activations, prefetched, shuffled


def hidden(windows: int = 5) -> Tensor:
    """Distinct hidden states, (windows, 3, 2)."""
    return torch.arange(windows * 6, dtype=torch.float32).view(windows, 3, 2)


def test_activations_give_back_what_was_written() -> None:
    """Batches written one after the other are read by index lists in any order."""
    store = Activations(5, 3, 2)
    for rows in in_order(5, 2):
        store.write(rows.start, hidden()[rows.start : rows.stop])
    assert torch.equal(store.read([4, 0, 4]), hidden()[[4, 0, 4]])
    assert store.shape == (5, 3, 2)
    assert len(store) == 5


def test_activations_read_copies() -> None:
    """Writing to a batch does not reach the store."""
    store = Activations.filled(hidden())
    store.read(range(2)).zero_()
    assert torch.equal(store.states, hidden())


def test_activations_keep_their_storage_type() -> None:
    """A bfloat16 store takes two bytes a number and is read as float32."""
    store = Activations.filled(hidden() + 1 / 3, dtype=torch.bfloat16)
    assert store.size_bytes == 2 * 30
    assert store.read([1]).dtype == torch.float32
    assert torch.equal(store.read([1]), (hidden() + 1 / 3)[[1]].bfloat16().float())


def test_map_in_place_reaches_every_window() -> None:
    """Mapping applies the step to all windows, the shorter last batch included, and makes no graph."""
    store = Activations.filled(hidden())
    weight = torch.ones((), requires_grad=True)
    assert store.map(lambda batch: batch * weight + 1, batch_size=2) is store
    assert torch.equal(store.states, hidden() + 1)
    assert not store.states.requires_grad


def test_map_into_another_store_leaves_the_first() -> None:
    """With an output store the inputs stay."""
    store, out = Activations.filled(hidden()), Activations(5, 3, 2)
    store.map(lambda batch: batch * 2, batch_size=3, out=out)
    assert torch.equal(store.states, hidden())
    assert torch.equal(out.states, hidden() * 2)


def test_in_order_covers_all_windows_once() -> None:
    """Consecutive ranges, the last one shorter; no window, no batch."""
    assert [list(rows) for rows in in_order(5, 2)] == [[0, 1], [2, 3], [4]]
    assert in_order(0, 2) == []


def test_shuffled_is_a_seeded_permutation() -> None:
    """Every window comes once an epoch; the same seed gives the same order, the next epoch another one."""
    generator = torch.Generator().manual_seed(3)
    first, second = shuffled(40, 8, generator), shuffled(40, 8, generator)
    assert sorted(row for rows in first for row in rows) == list(range(40))
    assert first != second
    assert shuffled(40, 8, torch.Generator().manual_seed(3)) == first


def test_prefetched_keeps_stores_in_step() -> None:
    """Inputs and targets of the same rows come together, in the order asked for."""
    inputs, targets = Activations.filled(hidden()), Activations.filled(-hidden())
    batches = [[3, 1], [0], [4, 2]]
    for rows, (x, y) in zip(batches, prefetched([inputs, targets], batches), strict=True):
        assert torch.equal(x, hidden()[rows])
        assert torch.equal(y, -hidden()[rows])


def test_activations_beyond_the_limit_lie_in_files_without_a_name(tmp_path: Path) -> None:
    """They read and write like others; the folder stays empty, and memory that a store leaves is given to the next."""
    with limited_activations(2 * 30 * 4, tmp_path):
        first, second = Activations.filled(hidden()), Activations.filled(hidden())
        third = Activations.filled(hidden())
        assert [in_a_file(store, tmp_path) for store in (first, second, third)] == [False, False, True]
        third.write(1, hidden()[:2] + 100)
        assert torch.equal(third.read([0, 1, 2]), torch.cat([hidden()[:1], hidden()[:2] + 100]))
        assert in_a_file(third.empty_like(), tmp_path)
        del first
        assert not in_a_file(Activations.filled(hidden()), tmp_path)
    assert not in_a_file(Activations(100, 3, 2), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_told_as_a_store_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when a page is touched, where it would end the program; and no file is left."""

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with limited_activations(0, tmp_path), pytest.raises(OSError, match="No space"):
        Activations(5, 3, 2)
    assert list(tmp_path.iterdir()) == []


def in_a_file(store: Activations, folder: Path) -> bool:
    """Whether a store's states are mapped from a file of the folder."""
    at = store.states.data_ptr()
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        span, *_, path = line.split(maxsplit=5)
        first, last = (int(address, 16) for address in span.split("-"))
        if first <= at < last:
            return path.startswith(str(folder))
    raise AssertionError("no mapping holds the states")
