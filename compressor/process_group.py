"""Ranks that are processes of torch.distributed: gradients by NCCL between GPUs, everything else by gloo.

What decides something (losses, flags, digests) travels as float64 or bytes between the CPUs and is put together in the
order of the ranks, so that all of them hold the same bits. A rank that fails tells why through the key-value store that
brought the ranks together; those that only lost it keep quiet.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from compressor.errors import OutOfResources, ReportedError, UsageError
from compressor.ranks import Ranks
from compressor.run.launch import Launch, tell_by

__all__ = ["PeerFailed", "ProcessGroup", "open_ranks"]

_ERROR_BYTES = 4096
_TOLD = "blockpress: an error was told"  # key of the store
_HEARD = "blockpress: ranks that know of it"
_HEAR_CAUSE_S = 2.0  # how long a rank waits for rank 0 to tell of the same error
_HEAR_LOSS_S = 4.0  # and one that lost another waits for that one to tell why
_LINGER_S = 1.0  # and rank 0 waits for the others to know


class PeerFailed(OutOfResources):
    """Another rank failed; what it said, and its exit code."""

    def __init__(self, error_id: str, message: str, remedy: str, exit_code: int = 5) -> None:
        super().__init__(error_id, message, remedy)
        self.exit_code = exit_code


class ProcessGroup(Ranks):
    """All processes of one launch.

    Args:
        launch: Which of them this one is.

    Raises:
        OutOfResources: E-RANK-LOST: they did not come together in time.
    """

    def __init__(self, launch: Launch) -> None:
        self.rank, self.world, self.local_world = launch.rank, launch.world, launch.local_world
        self._nccl = torch.cuda.is_available() and dist.is_nccl_available()
        timeout = timedelta(seconds=launch.timeout_s)
        with self._joint():
            store, rank, world = next(iter(rendezvous("env://", timeout=timeout)))
            store.set_timeout(timeout)
            # A launcher that starts the processes anew may keep the store, with what the dead ones left in it.
            store = PrefixStore(f"blockpress/{launch.attempt}", store)
            self._store = store
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if self._nccl else "gloo",
                store=store,
                rank=rank,
                world_size=world,
                timeout=timeout,
            )
        tell_by(self._tells)

    def part(self) -> None:
        """Let every rank go its way: none waits for another from here on."""
        self.any(False)
        dist.destroy_process_group()

    def total(self, *parts: float) -> tuple[float, ...]:
        """The sum of each number over all ranks, in float64 and in the order of the ranks."""
        each = self.gathered(torch.tensor(parts, dtype=torch.float64))
        return tuple(sum(values) for values in zip(*(one.tolist() for one in each), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return self.total(float(flag))[0] > 0

    def agreed(self, stop: Callable[[], bool]) -> Callable[[], bool]:
        """``stop``, answered with yes on all ranks if it is yes on any."""
        return lambda: self.any(stop())

    def text(self, text: str) -> str:
        """Rank 0's."""
        content = torch.frombuffer(bytearray(text.encode() + b" "), dtype=torch.uint8)
        size = torch.tensor([len(content)])
        self.from_root([size])
        if not self.is_root:
            content = torch.empty(int(size), dtype=torch.uint8)
        self.from_root([content])
        return content.numpy().tobytes().decode()[:-1]

    def summed(self, part: Tensor) -> Tensor:
        """The sum of ``part`` over all ranks; equal shapes and types."""
        total = part.detach().clone().contiguous()
        with self._joint():
            dist.all_reduce(total)
        return total

    def gathered(self, part: Tensor) -> list[Tensor]:
        """``part`` of every rank, on the CPU; equal shapes and types."""
        own = part.detach().cpu().contiguous()
        each = [torch.empty_like(own) for _ in range(self.world)]
        with self._joint():
            dist.all_gather(each, own)
        return each

    def from_root(self, tensors: Sequence[Tensor]) -> None:
        """Set ``tensors`` to rank 0's, in place."""
        with self._joint(), torch.no_grad():
            for tensor in tensors:
                flags = tensor.dtype == torch.bool
                sent = (tensor.view(torch.uint8) if flags else tensor).detach().contiguous()
                dist.broadcast(sent, src=0)
                tensor.copy_(sent.view(torch.bool) if flags else sent)

    def sum_gradients(self, weights: Sequence[nn.Parameter]) -> None:
        """Set each weight's gradient to the sum over all ranks; None stays where no rank has one."""
        here = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.int32)
        anywhere = self.summed(here).tolist()
        with self._joint():
            under_way = []
            for weight, count in zip(weights, anywhere, strict=True):
                if not count:
                    continue
                gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
                weight.grad = gradient.contiguous()
                under_way.append(dist.all_reduce(weight.grad, async_op=True))
            for work in under_way:
                assert work is not None
                work.wait()

    def exchange(
        self, sent: Mapping[int, Tensor], expected: Mapping[int, tuple[int, ...]], like: Tensor
    ) -> dict[int, Tensor]:
        """Send tensors to ranks, and receive others from ranks, of type and device of ``like``."""
        received = {
            rank: torch.empty(shape, dtype=like.dtype, device=like.device) for rank, shape in expected.items()
        }
        moves = [dist.P2POp(dist.isend, tensor.contiguous(), rank) for rank, tensor in sent.items()]
        moves += [dist.P2POp(dist.irecv, tensor, rank) for rank, tensor in received.items()]
        with self._joint():
            for work in dist.batch_isend_irecv(moves) if moves else ():
                work.wait()
        return received

    def send_rows(self, rows: Tensor, rank: int) -> None:
        """Send ``rows`` (n, ...), on the CPU, to a rank that asks for them."""
        with self._joint():
            for row in rows:
                dist.send(row.contiguous(), rank)

    def receive_rows(self, into: Tensor, places: range, rank: int) -> None:
        """Write what a rank sends into rows of ``into``, on the CPU."""
        with self._joint():
            for place in places:
                dist.recv(into[place], rank)

    def check_same(self, name: str, digest: bytes) -> None:
        """Do nothing where all ranks have the same digest of ``name``.

        Raises:
            OutOfResources: E-RANKS-DIVERGED.
        """
        each = self.gathered(torch.frombuffer(bytearray(digest), dtype=torch.uint8))
        others = [rank for rank, found in enumerate(each) if not torch.equal(found, each[0])]
        if others:
            raise OutOfResources(
                "E-RANKS-DIVERGED",
                f"{name} is not the same on rank {others[0]} as on rank 0",
                "give all ranks the same files, software and kind of device, and run again",
            )

    @contextmanager
    def together(self) -> Iterator[None]:
        """All ranks come out of the context, or none: the error of one is the error of all."""
        try:
            yield
        except Exception as error:
            self._share_errors(error)
            raise
        self._share_errors(None)

    def _share_errors(self, error: Exception | None) -> None:
        """Tell the others of ``error``.

        Raises:
            PeerFailed: This rank has none, another one has.
        """
        told = b""
        if error is not None:
            reported = error if isinstance(error, ReportedError) else None
            facts = (
                [reported.error_id, reported.message[:1000], reported.remedy[:300], reported.exit_code]
                if reported
                else [
                    "E-INTERNAL",
                    f"{type(error).__name__} on rank {self.rank}",
                    "see that rank's output",
                    1,
                ]
            )
            told = json.dumps(facts).encode()[:_ERROR_BYTES]
        each = self.gathered(torch.frombuffer(bytearray(told.ljust(_ERROR_BYTES)), dtype=torch.uint8))
        if error is not None:
            return
        for content in each:
            found = content.numpy().tobytes().strip()
            if found:
                raise PeerFailed(*json.loads(found))

    @contextmanager
    def _joint(self) -> Iterator[None]:
        """A collective operation.

        Raises:
            PeerFailed: E-RANK-LOST: another rank is gone or does not answer.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise PeerFailed(
                "E-RANK-LOST",
                f"rank {self.rank} of {self.world} has lost another rank: {_reason(error)}",
                "look at what that rank printed, and run the same command again: it goes on behind the last block",
            ) from error

    def _tells(self, error: BaseException) -> bool:
        """Whether this rank tells the user of ``error``: one rank does, rank 0 where it knows."""
        lost = isinstance(error, PeerFailed)
        grace_s = 0.0 if self.is_root and not lost else _HEAR_LOSS_S if lost else _HEAR_CAUSE_S
        try:
            told = self._waits(grace_s, lambda: self._store.check([_TOLD]))
            if told or self._store.add(_TOLD, 1) > 1:
                self._store.add(_HEARD, 1)
                return False
            if self.is_root:  # which keeps the store, where torchrun does not
                self._waits(_LINGER_S, lambda: self._store.add(_HEARD, 0) >= self.world - 1)
            return True
        except RuntimeError:  # the store went with rank 0, which kept it and may have told
            return not lost or self.rank == 1

    @staticmethod
    def _waits(seconds: float, until: Callable[[], bool]) -> bool:
        """Wait at most so long; whether it has come."""
        end = time.monotonic() + seconds
        while not until():
            if time.monotonic() >= end:
                return False
            time.sleep(0.05)
        return True


def _reason(error: RuntimeError) -> str:
    """The first sentence of what a library says, without the place in its source."""
    text = re.sub(r"^\[\S+:\d+\]\s*", "", " ".join(str(error).split()))
    return re.split(r"\. (?=[A-Z])", text)[0][:200]


def open_ranks(launch: Launch, device: str) -> tuple[ProcessGroup, str]:
    """All processes of a launch, once they have come together, and the device of this one.

    Args:
        launch: Which of them this one is.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ReportedError: One of them has no such device, or they did not come together.
    """
    ranks = ProcessGroup(launch)
    with ranks.together():
        name = _device_of(device, launch)
    if name != "cpu":
        torch.cuda.set_device(name)
    return ranks, name


def _device_of(name: str, launch: Launch) -> str:
    """The device of one of several processes: its own GPU, or the CPU.

    Raises:
        UsageError: E-RANKS-DEVICE: one GPU is named for all of them.
        OutOfResources: E-DEVICE-ABSENT: the machine has fewer GPUs than processes.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(
            "E-RANKS-DEVICE",
            f"several processes cannot share the one device {name}",
            "give --device auto, cuda or cpu: each process takes the GPU of its local rank",
        )
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if launch.local_rank >= count:
        raise OutOfResources(
            "E-DEVICE-ABSENT",
            f"device cuda:{launch.local_rank} is not here; this machine shows {count} CUDA devices",
            "start one process for each GPU, or give --device cpu",
        )
    return f"cuda:{launch.local_rank}"
