"""What ranks do for each other, tried by two forked processes: ``python rank_checks.py`` ends with 0 if all holds."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

from faults.local_ranks import environment_of, free_port  # noqa: E402  # its folder has to be known first

from compressor.errors import InputRefused, ReportedError  # noqa: E402
from compressor.moments import Moments  # noqa: E402
from compressor.process_group import PeerFailed, ProcessGroup  # noqa: E402
from compressor.run.launch import launched  # noqa: E402
from compressor.statistics import BlockStatistics, ColumnNorms  # noqa: E402
from compressor.streams import Activations, dealt  # noqa: E402

WORLD = 2


def sums_gradients(ranks: ProcessGroup) -> None:
    """A weight without gradient on one rank counts as 0 there; one without on all keeps none."""
    both, first, none = (nn.Parameter(torch.zeros(3)) for _ in range(3))
    both.grad = torch.full((3,), ranks.rank + 1.0)
    first.grad = torch.full((3,), 5.0) if ranks.is_root else None
    ranks.sum_gradients([both, first, none])
    assert both.grad.tolist() == [3, 3, 3]
    assert first.grad is not None
    assert first.grad.tolist() == [5, 5, 5]
    assert none.grad is None


def adds_statistics(ranks: ProcessGroup) -> None:
    """Sums are of the tokens of all ranks, also where matrices share a statistic on one rank and not on the other."""
    statistics = BlockStatistics(ColumnNorms, {"q": 2, "expert": 2, "idle": 2})
    statistics.receive("q", torch.full((1, 2), 3.0))
    if not ranks.is_root:
        statistics.receive("expert", torch.full((2, 2), 1.0))
    statistics.finish(ranks)
    q, expert, idle = (statistics[name] for name in ("q", "expert", "idle"))
    assert isinstance(q, ColumnNorms)
    assert [q.tokens, expert.tokens, idle.tokens] == [2, 2, 0]
    assert torch.equal(q.norms.square().round(), torch.full((2,), 18.0))
    moments, whole = Moments(2), Moments(2)
    tokens = torch.arange(12.0).view(6, 2)
    moments.add(tokens[:1] if ranks.is_root else tokens[1:])
    whole.add(tokens)
    moments.merge_ranks(ranks)
    assert moments.tokens == 6
    torch.testing.assert_close(moments.mean, whole.mean)
    torch.testing.assert_close(moments.variance, whole.variance)


def deals_windows(ranks: ProcessGroup) -> None:
    """Each rank gets half of a batch, whoever holds its windows; rank 0 can put them together and share them out."""
    whole = torch.arange(5.0).view(5, 1, 1).expand(5, 2, 3).contiguous()
    store = Activations(5, 2, 3, ranks=ranks)
    store.take_share(whole if ranks.is_root else None)
    seen = [
        (list(own), hidden[:, 0, 0].tolist()) for own, (hidden,) in dealt([store], [[4, 3, 2], [1, 0], [3]])
    ]
    assert all([float(row) for row in own] == found for own, found in seen)
    counts = [len(own) for own, _ in seen]
    assert counts[1] == 1
    assert int(ranks.total(counts[0])[0]) == 3
    together = store.whole()
    assert torch.equal(together, whole if ranks.is_root else store.states)


def tells_errors(ranks: ProcessGroup) -> None:
    """The error of one rank is the error of all, with its exit code."""

    def look() -> None:
        with ranks.together():
            if not ranks.is_root:
                raise InputRefused("E-EXAMPLE", "this rank has no file", "give it one")

    with pytest.raises(ReportedError) as raised:
        look()
    assert (raised.value.error_id, raised.value.exit_code) == ("E-EXAMPLE", 3)
    assert isinstance(raised.value, PeerFailed) == ranks.is_root


def finds_differences(ranks: ProcessGroup) -> None:
    """Unlike digests end the run on all ranks."""
    ranks.check_same("a block", b"same")
    with pytest.raises(ReportedError, match="E-RANKS-DIVERGED: a block is not the same on rank 1"):
        ranks.check_same("a block", bytes([ranks.rank]))


CHECKS: tuple[Callable[[ProcessGroup], None], ...] = (
    sums_gradients,
    adds_statistics,
    deals_windows,
    tells_errors,
    finds_differences,
)


def main() -> int:
    """Fork, wait, and tell how many ranks failed."""
    port, children = free_port(), []
    for rank in range(WORLD):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                os.environ.update(environment_of(rank, WORLD, port))
                launch = launched()
                assert launch is not None
                ranks = ProcessGroup(launch)
                for check in CHECKS:
                    check(ranks)
                assert ranks.text("of rank 0 ✓" if ranks.is_root else "") == "of rank 0 ✓"
                assert ranks.any(not ranks.is_root)
                ranks.part()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


if __name__ == "__main__":
    sys.exit(main())
