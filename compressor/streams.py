"""What flows between blocks: hidden states of the calibration windows, in host memory or, past a limit, in files.

Notation: N windows, T tokens each, hidden width D, B windows in a batch.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from compressor.ranks import ALONE, Ranks, deal


class Activations:
    """Hidden states of N windows, (N, T, D), in host memory, page-locked where CUDA reads them; see also
    ``limited_activations``.

    Several ranks share the windows out, and N is what this one holds of ``total``.

    Attributes:
        states: The store itself, (N, T, D).
        device: Where batches are wanted.
        total: The windows of all ranks.
        ranks: Who shares.
    """

    def __init__(
        self,
        windows: int,
        seqlen: int,
        hidden: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        ranks: Ranks = ALONE,
    ) -> None:
        self.device = torch.device(device)
        self.total, self.ranks = windows, ranks
        shape = (len(ranks.share(windows)), seqlen, hidden)
        if _limit is not None and not _limit.grants(self, shape, dtype):
            self.states = _limit.file_backed(shape, dtype)
        else:
            self.states = _host_memory(shape, dtype, pinned=self.device.type == "cuda")

    @classmethod
    def filled(
        cls, hidden: Tensor, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Activations:
        """A store that holds a copy of ``hidden`` (N, T, D)."""
        windows, seqlen, width = hidden.shape
        made = cls(windows, seqlen, width, dtype=dtype, device=device)
        made.write(0, hidden)
        return made

    def empty_like(self) -> Activations:
        """A store of the same shape, type and place whose states are not written yet."""
        shape = self.total, *self.shape[1:]
        return Activations(*shape, dtype=self.states.dtype, device=self.device, ranks=self.ranks)

    def copy(self) -> Activations:
        """The same states in a store of their own."""
        made = self.empty_like()
        made.write(0, self.states)
        return made

    @property
    def shape(self) -> torch.Size:
        """(N, T, D)."""
        return self.states.shape

    @property
    def size_bytes(self) -> int:
        """Bytes of the states."""
        return self.states.numel() * self.states.element_size()

    def __len__(self) -> int:
        return len(self.states)

    def write(self, start: int, hidden: Tensor) -> None:
        """Set the windows from ``start`` on to ``hidden`` (B, T, D); complete when this returns."""
        self.states[start : start + len(hidden)] = hidden.detach().to(self.states.dtype)

    def read(self, rows: Sequence[int]) -> Tensor:
        """A copy of the windows ``rows``, (B, T, D) float32, on the device.

        Row by row, since each window is one contiguous stretch: from page-locked memory it needs no gathering
        on the host and its copy does not block.
        """
        if self.device.type == "cpu":
            return self.states[list(rows)].float()
        batch = torch.empty((len(rows), *self.shape[1:]), dtype=self.states.dtype, device=self.device)
        for place, row in enumerate(rows):
            batch[place].copy_(self.states[row], non_blocking=True)
        return batch.float()

    def whole(self) -> Tensor:
        """The windows of all ranks on rank 0, (total, T, D); what this one holds on the others."""
        if not self.ranks.is_root:
            self.ranks.send_rows(self.states, rank=0)
        if not self.ranks.is_root or self.ranks.world == 1:
            return self.states
        whole = Activations(self.total, *self.shape[1:], dtype=self.states.dtype).states
        whole[: len(self)] = self.states
        for rank in range(1, self.ranks.world):
            self.ranks.receive_rows(whole, self.ranks.share(self.total, rank), rank)
        return whole

    def take_share(self, whole: Tensor | None) -> None:
        """Set the states of each rank to its windows out of ``whole`` (total, T, D), which rank 0 has."""
        if whole is None:
            self.ranks.receive_rows(self.states, range(len(self)), 0)
            return
        self.write(0, whole[: len(self)])
        for rank in range(1, self.ranks.world):
            rows = self.ranks.share(self.total, rank)
            self.ranks.send_rows(whole[rows.start : rows.stop], rank)

    def map(
        self, step: Callable[[Tensor], Tensor], batch_size: int, out: Activations | None = None
    ) -> Activations:
        """``step``, (B, T, D) -> (B, T, D), applied to all windows, into ``out`` or in place; that store."""
        target = self if out is None else out
        batches = in_order(len(self), batch_size)
        with torch.no_grad():
            for rows, (hidden,) in zip(batches, prefetched([self], batches), strict=True):
                target.write(rows.start, step(hidden))
        return target


class _Limit:
    """How much memory stores may take together; what comes beyond is mapped from unnamed files of a folder."""

    def __init__(self, limit_bytes: int, folder: Path) -> None:
        self._free_bytes, self._folder = limit_bytes, folder

    def grants(self, store: Activations, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether memory is left for a store; it is taken until the store is gone."""
        size_bytes = torch.Size(shape).numel() * dtype.itemsize
        if size_bytes > self._free_bytes:
            return False
        self._free_bytes -= size_bytes
        weakref.finalize(store, self._give_back, size_bytes)
        return True

    def file_backed(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """States whose pages the system may write to the disk when it needs the memory."""
        count = torch.Size(shape).numel()
        descriptor, name = tempfile.mkstemp(prefix="activations-", dir=self._folder)
        try:
            # All of it now: on a full disk a page that is touched later would end the program.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, max(1, count * dtype.itemsize))
            return torch.from_file(name, shared=True, size=count, dtype=dtype).view(shape)
        finally:
            os.close(descriptor)
            os.unlink(name)  # the mapping keeps it; nothing is left however the program ends

    def _give_back(self, size_bytes: int) -> None:
        self._free_bytes += size_bytes


_limit: _Limit | None = None


@contextmanager
def limited_activations(limit_bytes: int | None, folder: Path) -> Iterator[None]:
    """Stores that are made while the context lasts take at most ``limit_bytes`` of memory together; None sets no limit.

    What comes beyond lies in files without a name in ``folder``, which go when the stores do.

    Raises:
        OSError: The disk is full, as a store is made.
    """
    global _limit
    before = _limit
    _limit = None if limit_bytes is None else _Limit(limit_bytes, folder)
    try:
        yield
    finally:
        _limit = before


def in_order(windows: int, batch_size: int) -> list[range]:
    """Row ranges of consecutive batches; the last one may be shorter."""
    return [range(start, min(start + batch_size, windows)) for start in range(0, windows, batch_size)]


def shuffled(windows: int, batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """Row lists of one epoch in random order; every window once, the last batch may be shorter."""
    order = torch.randperm(windows, generator=generator).tolist()
    return [order[rows.start : rows.stop] for rows in in_order(windows, batch_size)]


def prefetched(
    stores: Sequence[Activations], batches: Iterable[Sequence[int]]
) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of several stores, batch after batch; on CUDA the next one travels while one is used."""
    if stores[0].device.type != "cuda":
        for rows in batches:
            yield tuple(store.read(rows) for store in stores)
        return
    yield from _prefetched_cuda(stores, batches)


def dealt(
    stores: Sequence[Activations], batches: Iterable[Sequence[int]]
) -> Iterator[tuple[Sequence[int], tuple[Tensor, ...]]]:
    """This rank's part of each batch: its rows out of the windows of all ranks, and those rows of several stores.

    Every rank gets as many windows of a batch as the others, so some of them travel. All of them without other ranks.
    """
    ranks, total = stores[0].ranks, stores[0].total
    if ranks.world == 1:
        kept = list(batches)
        yield from zip(kept, prefetched(stores, kept), strict=True)
        return
    for rows in batches:
        parts = deal(rows, total, ranks)
        yield parts[ranks.rank], tuple(_exchanged(store, parts) for store in stores)


def _exchanged(store: Activations, parts: Sequence[Sequence[int]]) -> Tensor:
    """The windows ``parts[rank]`` (B, T, D) on each rank, whoever holds them."""
    ranks = store.ranks
    held, mine = ranks.share(store.total), parts[ranks.rank]
    leaving = {
        rank: [row for row in part if row in held] for rank, part in enumerate(parts) if rank != ranks.rank
    }
    sent = {rank: store.read([row - held.start for row in rows]) for rank, rows in leaving.items() if rows}
    batch = torch.empty((len(mine), *store.shape[1:]), device=store.device)
    coming: dict[int, list[int]] = {}  # places in the batch by the rank that holds them
    for place, row in enumerate(mine):
        coming.setdefault(ranks.holder(row, store.total), []).append(place)
    here = coming.pop(ranks.rank, [])
    if here:
        batch[here] = store.read([mine[place] - held.start for place in here])
    shapes = {rank: (len(places), *store.shape[1:]) for rank, places in coming.items()}
    for rank, hidden in ranks.exchange(sent, shapes, batch).items():
        batch[coming[rank]] = hidden
    return batch


def _prefetched_cuda(
    stores: Sequence[Activations], batches: Iterable[Sequence[int]]
) -> Iterator[tuple[Tensor, ...]]:
    side = torch.cuda.Stream(stores[0].device)  # type: ignore[no-untyped-call]
    main = torch.cuda.current_stream(stores[0].device)

    def fetch(rows: Sequence[int]) -> tuple[tuple[Tensor, ...], torch.cuda.Event]:
        with torch.cuda.stream(side):
            fetched = tuple(store.read(rows) for store in stores)
            return fetched, side.record_event()

    ahead = None
    for rows in batches:
        ready, ahead = ahead, fetch(rows)
        if ready is not None:
            yield _arrived(ready, main)
    if ahead is not None:
        yield _arrived(ahead, main)


def _arrived(
    fetched: tuple[tuple[Tensor, ...], torch.cuda.Event], main: torch.cuda.Stream
) -> tuple[Tensor, ...]:
    batch, event = fetched
    main.wait_event(event)
    for hidden in batch:
        hidden.record_stream(main)  # the allocator must not hand it out again while the main stream reads it
    return batch


def _host_memory(shape: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> Tensor:
    """Uninitialised host memory; pageable where no page-locked one is granted (correct, only slower)."""
    if pinned:
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        except RuntimeError:
            pass
    return torch.empty(shape, dtype=dtype)
