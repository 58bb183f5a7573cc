"""SparseGPT with N:M and the choice of N:M masks against the published way of doing each.

Both sides get the same weights and statistics and take turns (A B A B ...), so that a machine that slows down slows
both. Published SparseGPT (arXiv 2301.00774): the inverse Hessian's factor by Cholesky, inverse, Cholesky; blocks of
128 columns updated lazily; a loop over each column, at every M-th of which the next group's mask is chosen by topk.
Published Wanda (arXiv 2306.11695): a loop over the groups of M columns, topk and scatter in each. Ours is the whole
pruner with its checks; "q, k, v" is three linears that share their inputs, where ours factorises once.

A second table has the time and the output error of every pruner on the same problems.

    OMP_NUM_THREADS=1 python bench/pruners.py --sizes 1024,2048
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import click
import torch
from torch import Tensor

from compressor.pruning import PRUNERS
from compressor.pruning.pruner import lowest_in_groups
from compressor.pruning.wanda import wanda_score
from compressor.recipe import PruningRecipe
from compressor.sparsity import SparsityPattern
from compressor.statistics import ColumnNorms, Gram

RECIPE = PruningRecipe(method="sparsegpt")


def published_sparsegpt(W: Tensor, G: Tensor, n: int, m: int) -> Tensor:
    """``W`` (out, in) pruned to n:m and compensated, column by column."""
    Q, H = W.clone(), G.clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    Q[:, dead] = 0
    H.diagonal().add_(RECIPE.damping * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    for start in range(0, Q.shape[1], RECIPE.column_block):
        stop = min(start + RECIPE.column_block, Q.shape[1])
        block, factor = Q[:, start:stop].clone(), U[start:stop, start:stop]
        errors, pruned = torch.zeros_like(block), torch.zeros_like(block, dtype=torch.bool)
        for i in range(stop - start):
            if i % m == 0:
                S = block[:, i : i + m] ** 2 / factor.diagonal()[i : i + m].reshape(1, -1) ** 2
                pruned.scatter_(1, i + torch.topk(S, m - n, dim=1, largest=False).indices, True)
            column = block[:, i].clone()
            column[pruned[:, i]] = 0
            errors[:, i] = (block[:, i] - column) / factor[i, i]
            block[:, i:] -= errors[:, i : i + 1].matmul(factor[i : i + 1, i:])
            Q[:, start + i] = column
        Q[:, stop:] -= errors.matmul(U[start:stop, stop:])
    return Q


def published_choice(S: Tensor, n: int, m: int) -> Tensor:
    """Where the m - n lowest of each group of ``S`` (out, in) are, group by group of columns."""
    pruned = torch.zeros_like(S, dtype=torch.bool)
    for i in range(S.shape[1]):
        if i % m == 0:
            group = S[:, i : i + m].float()
            pruned.scatter_(1, i + torch.topk(group, m - n, dim=1, largest=False).indices, True)
    return pruned


@dataclass(frozen=True)
class Problem:
    """Weights (size, size), the Gram matrix of correlated inputs, and one pattern."""

    W: Tensor
    statistic: Gram
    norms: ColumnNorms
    pattern: SparsityPattern

    @classmethod
    def random(cls, size: int, pattern: SparsityPattern, device: torch.device) -> Problem:
        """Always the same for a size."""
        generator = torch.Generator().manual_seed(size)
        W = torch.randn(size, size, generator=generator)
        mix = torch.randn(size, size, generator=generator) / size**0.5 + 0.3 * torch.eye(size)
        X = (torch.randn(2 * size, size, generator=generator) @ mix).to(device)
        statistic, norms = Gram(size, device), ColumnNorms(size, device)
        statistic.add(X)
        norms.add(X)
        return cls(W.to(device), statistic, norms, pattern)

    @property
    def n_m(self) -> tuple[int, int]:
        """N and M."""
        assert self.pattern.n is not None
        assert self.pattern.m is not None
        return self.pattern.n, self.pattern.m

    def error(self, V: Tensor) -> float:
        """Squared output error of ``V`` as a share of the squared output."""
        change, G = self.W - V, self.statistic.gram()
        return float(((change @ G) * change).sum() / ((self.W @ G) * self.W).sum())


@dataclass(frozen=True)
class Comparison:
    """Two ways to the same; ``agreement`` says how alike their results are."""

    name: str
    published: Callable[[], Tensor]
    ours: Callable[[], Tensor]
    agreement: Callable[[Tensor, Tensor], str]


def comparisons(problem: Problem) -> list[Comparison]:
    """SparseGPT for one linear and for three that share their inputs, and the choice of a mask."""
    n, m = problem.n_m
    W, statistic, G = problem.W, problem.statistic, problem.statistic.gram()
    S = wanda_score(W, G.diagonal().sqrt())

    def published(linears: int) -> Tensor:
        return [published_sparsegpt(W, G, n, m) for _ in range(linears)][-1]

    def ours(linears: int) -> Tensor:
        statistic.forget()  # the first linear factorises
        pruner = PRUNERS["sparsegpt"]
        return [pruner.prune(W, statistic, problem.pattern, RECIPE).weight for _ in range(linears)][-1]

    def errors(theirs: Tensor, mine: Tensor) -> str:
        return f"error {problem.error(theirs):.4%} / {problem.error(mine):.4%}"

    def equality(theirs: Tensor, mine: Tensor) -> str:
        return f"{float((theirs == mine).double().mean()):.4%} of the mask equal"

    return [
        Comparison("SparseGPT", lambda: published(1), lambda: ours(1), errors),
        Comparison("SparseGPT, q k v", lambda: published(3), lambda: ours(3), errors),
        Comparison(
            "choice of the mask",
            lambda: published_choice(S, n, m),
            lambda: lowest_in_groups(S, problem.pattern),
            equality,
        ),
    ]


def measured(comparison: Comparison, repeats: int, clock: Callable[[], float]) -> tuple[float, float, float]:
    """Medians of both sides in seconds, and the median of the ratios of each turn."""
    pairs = []
    for _ in range(repeats + 1):
        times = []
        for work in (comparison.published, comparison.ours):
            started = clock()
            work()
            times.append(clock() - started)
        pairs.append((times[0], times[1]))
    pairs = pairs[1:]  # the first turn warms both
    theirs, mine = (statistics.median(side) for side in zip(*pairs, strict=True))
    return theirs, mine, statistics.median(first / second for first, second in pairs)


def cost(problem: Problem, method: str, repeats: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Median seconds of a pruner on one linear, statistics at hand, and the output error that it leaves."""
    pruner, recipe = PRUNERS[method], PruningRecipe.model_validate({"method": method})
    statistic = problem.norms if pruner.statistic is ColumnNorms else problem.statistic
    times, error = [], float("nan")
    for _ in range(repeats + 1):
        statistic.forget()
        started = clock()
        pruned = pruner.prune(problem.W, statistic, problem.pattern, recipe)
        times.append(clock() - started)
        error = problem.error(pruned.weight)
    return statistics.median(times[1:]), error


def clock_of(name: str, device: torch.device) -> Callable[[], float]:
    """A clock that waits for the device first."""
    read = time.perf_counter if name == "wall" else time.process_time

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return read()

    return clock


@click.command(context_settings={"show_default": True})
@click.option("--sizes", default="1024,2048", help="Widths of square matrices.")
@click.option("--patterns", default="2:4,4:8", help="N:M patterns.")
@click.option("--repeats", default=5, type=click.IntRange(min=1), help="Turns of each comparison.")
@click.option("--device", default="cpu", help="cpu or cuda[:i].")
@click.option(
    "--clock",
    default="processor",
    type=click.Choice(["wall", "processor"]),
    help="processor: seconds of processor time, for a machine whose cores others use too.",
)
def main(sizes: str, patterns: str, repeats: int, device: str, clock: str) -> None:
    """Time our pruners against the published way and print a Markdown table."""
    place = torch.device(device)
    watch = clock_of(clock, place)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else platform.machine()
    click.echo(
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {clock} clock, float32"
    )
    problems = [
        Problem.random(size, SparsityPattern.parse(text), place)
        for size in map(int, sizes.split(","))
        for text in patterns.split(",")
    ]
    click.echo("| what | size | pattern | published, ms | ours, ms | ratio | results |")
    click.echo("|---|---|---|---|---|---|---|")
    for problem in problems:
        for comparison in comparisons(problem):
            alike = comparison.agreement(comparison.published(), comparison.ours())
            turns = repeats if "SparseGPT" in comparison.name else 3 * repeats
            theirs, mine, ratio = measured(comparison, turns, watch)
            click.echo(
                f"| {comparison.name} | {len(problem.W)} | {problem.pattern} | {1000 * theirs:.1f} "
                f"| {1000 * mine:.1f} | {ratio:.1f} | {alike} |"
            )
    click.echo("\n| pruner | size | pattern | ms | output error |\n|---|---|---|---|---|")
    for problem in problems:
        for method in PRUNERS:
            elapsed_s, error = cost(problem, method, min(repeats, 3), watch)
            click.echo(
                f"| {method} | {len(problem.W)} | {problem.pattern} | {1000 * elapsed_s:.1f} | {error:.2%} |"
            )


if __name__ == "__main__":
    main()
