"""Read mutated files in a forked worker, one after the other, and tell of every one that was not taken or refused.

    python tests/fuzz/fuzzing.py --mutations 10000 --commands 200 --processes 10

The second and third number are of mutations that the real command gets, a process for each: they take seconds, not
milliseconds. The second ones are forked from a process that has the imports done, as the worker has; the third ones
begin with the interpreter. Where it dies or takes more than ten seconds for one file, that file is a fault, and
another worker goes on behind it. A mutation is known by its format, the seed and its number: the same again with
``--formats F --seed S --first N --mutations 1``, or ``--mutations 0 --processes 1``.
"""

from __future__ import annotations

import collections
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from faults.interrupted_runs import fork_server  # its folder has to be known first
from fuzz.commands import COMMANDS, fuzz_commands, in_fork_of, in_own_process
from fuzz.formats import FORMATS, Format, make_samples
from fuzz.mutations import mutated

from compressor.errors import ReportedError

LIMIT_S = 10
_STILL = open(os.devnull, "w")  # noqa: SIM115  # for the life of the workers


class TooSlow(BaseException):
    """A file took more than ``LIMIT_S`` seconds."""


def fuzz(name: str, samples: Path, numbers: range, seed: int) -> dict[str, list[int]]:
    """Numbers of the mutations by what became of them: "taken", "refused E-…", or anything else, which is a fault."""
    outcomes: dict[str, list[int]] = collections.defaultdict(list)
    waiting = numbers
    while waiting:
        told = _worker(FORMATS[name], name, samples, waiting, seed)
        for number, outcome in told:
            outcomes[outcome].append(number)
        waiting = waiting[len(told) :]
    return outcomes


def is_fault(outcome: str) -> bool:
    """Whether a file was neither taken nor refused in the way it should be."""
    return outcome != "taken" and not outcome.startswith("refused E-")


def _worker(form: Format, name: str, samples: Path, numbers: range, seed: int) -> list[tuple[int, str]]:
    """What a forked child tells of the mutations until it is through, or dies: then the last row says so."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            _read_all(form, name, samples, numbers, seed, writing)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8", errors="replace") as lines:
        rows = [line.rstrip("\n").split(" ", 1) for line in lines if line.endswith("\n")]
    told = [(int(number), outcome) for number, outcome in rows]
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if len(told) < len(numbers):
        told.append((numbers[len(told)], f"died: {code}"))
    return told


def _read_all(form: Format, name: str, samples: Path, numbers: range, seed: int, writing: int) -> None:
    os.dup2(_STILL.fileno(), 1)
    os.dup2(_STILL.fileno(), 2)
    signal.signal(signal.SIGALRM, _too_slow)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "samples"
        shutil.copytree(samples, folder)
        os.chdir(folder)
        content, before = (folder / form.path).read_bytes(), _names(Path(scratch))
        for number in numbers:
            (folder / form.path).write_bytes(
                mutated(content, form.kind, random.Random(f"{name} {seed} {number}"))
            )
            outcome = _outcome(form, folder)
            if _names(Path(scratch)) != before:
                outcome = "escaped: files have come or gone"
            os.write(writing, f"{number} {outcome}\n".encode("utf-8", "replace"))


def _outcome(form: Format, folder: Path) -> str:
    try:
        with _time_limit():
            form.read(folder)
    except ReportedError as error:
        return f"refused {error.error_id}" if error.exit_code in (2, 3) else f"exit {error.exit_code}"
    except TooSlow:
        return f"slow: more than {LIMIT_S} s"
    except BaseException as error:
        text = str(error).replace("\n", " ")[:150]
        return f"broken: {type(error).__name__}: {text}"
    return "taken"


@contextmanager
def _time_limit() -> Iterator[None]:
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)


def _too_slow(_: int, __: FrameType | None) -> None:
    raise TooSlow


def _names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@dataclass(frozen=True)
class Stage:
    """What came of the mutations of one format, read in one way.

    Attributes:
        name: The format.
        how: "worker", "command" or "process".
        outcomes: Numbers of the mutations by what became of them.
        seconds: How long it took.
    """

    name: str
    how: str
    outcomes: dict[str, list[int]]
    seconds: float

    @property
    def faults(self) -> dict[str, list[int]]:
        """Those that are faults."""
        return {outcome: numbers for outcome, numbers in self.outcomes.items() if is_fault(outcome)}

    def count(self, beginning: str) -> int:
        """Mutations whose outcome begins like this."""
        return sum(
            len(numbers) for outcome, numbers in self.outcomes.items() if outcome.startswith(beginning)
        )

    def row(self) -> str:
        """The line of the table; faults below it."""
        faults, count = self.faults, self.count("")
        rate = count / self.seconds if self.seconds else 0.0
        figures = (count, self.count("taken"), self.count("refused"), sum(map(len, faults.values())))
        lines = [
            f"{self.name:<12}{self.how:<8}"
            + "".join(f"{one:>10}" for one in figures)
            + f"{self.seconds:>10.0f}{rate:>10.2f}"
        ]
        lines += [
            f"  {outcome}: {len(numbers)}, the first is {numbers[0]}" for outcome, numbers in faults.items()
        ]
        return "\n".join(lines)


_COLUMNS = ("mutations", "taken", "refused", "faults", "seconds", "a second")
HEAD = f"{'format':<12}{'by':<8}" + "".join(f"{name:>10}" for name in _COLUMNS)


@click.command(help=__doc__)
@click.option("--mutations", default=10_000, help="Of each format, in the worker.")
@click.option("--commands", default=0, help="Of each format but the report, by the real command, forked.")
@click.option("--processes", default=0, help="The same, in interpreters of their own.")
@click.option("--formats", default=",".join(FORMATS))
@click.option("--seed", default=0)
@click.option("--first", default=0, help="Number of the first mutation.")
def main(mutations: int, commands: int, processes: int, formats: str, seed: int, first: int) -> None:
    stages = []
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as open_until_the_end:
        samples = make_samples(Path(scratch))
        ways = {
            "worker": (mutations, fuzz),
            "process": (processes, partial(fuzz_commands, start=in_own_process)),
        }
        if commands:
            logs = Path(scratch) / "logs"
            logs.mkdir()
            server = open_until_the_end.enter_context(fork_server(logs))
            ways["command"] = (commands, partial(fuzz_commands, start=in_fork_of(server)))
        click.echo(HEAD)
        for how, (count, read) in ways.items():
            for name in formats.split(","):
                if not count or (how != "worker" and name not in COMMANDS):
                    continue
                started = time.perf_counter()
                outcomes = read(name, samples, range(first, first + count), seed)
                stages.append(Stage(name, how, outcomes, time.perf_counter() - started))
                click.echo(stages[-1].row())
    for how in ways:
        own = [stage for stage in stages if stage.how == how]
        if own:
            total, faults = sum(stage.count("") for stage in own), sum(len(stage.faults) for stage in own)
            minutes = sum(stage.seconds for stage in own) / 60
            click.echo(f"{how}: {total} mutations, {faults} kinds of faults, {minutes:.0f} min")
    sys.exit(any(stage.faults for stage in stages))


if __name__ == "__main__":
    main()
