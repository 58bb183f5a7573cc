"""Whether a launcher such as torchrun has started several processes for one run, and which of them this one is.

Loads neither torch nor anything that does: the command line asks before it takes the output's lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from compressor.errors import ReportedError, UsageError

__all__ = ["TIMEOUT_VARIABLE", "Launch", "launched", "may_tell", "tell_by"]

TIMEOUT_VARIABLE = "BLOCKPRESS_RANKS_TIMEOUT"
_DEFAULT_TIMEOUT_S = 1800.0
_PLACE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """One process of several.

    Attributes:
        rank: Its number, from 0.
        world: How many there are, at least 2.
        local_rank: Its number on its machine.
        local_world: How many there are on its machine.
        attempt: How often the launcher has started them anew.
        timeout_s: How long one waits for the others before it takes them for lost.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    attempt: int
    timeout_s: float


def launched(environment: Mapping[str, str] | None = None) -> Launch | None:
    """What torchrun's variables say; None where there are none, or where they tell of one process.

    Args:
        environment: In the place of the process's own.

    Raises:
        UsageError: E-RANKS-ENVIRONMENT: some of them are missing, or are no such numbers.
    """
    given = os.environ if environment is None else environment
    if given.get("WORLD_SIZE", "1").strip() == "1":
        return None
    missing = [name for name in _PLACE if not given.get(name)]
    if missing:
        raise _unusable(f"WORLD_SIZE is {given['WORLD_SIZE']!r} and {missing[0]} is not set")
    rank, world = _number(given, "RANK"), _number(given, "WORLD_SIZE")
    local_rank = _number(given, "LOCAL_RANK", rank)
    launch = Launch(
        rank=rank,
        world=world,
        local_rank=local_rank,
        local_world=max(1, _number(given, "LOCAL_WORLD_SIZE", world)),
        attempt=_number(given, "TORCHELASTIC_RESTART_COUNT", 0),
        timeout_s=_seconds(given),
    )
    if not 0 <= rank < world:
        raise _unusable(f"RANK is {rank} and WORLD_SIZE {world}")
    return launch


def _number(given: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = given.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdecimal() or len(text) > 6:
        raise _unusable(f"{name} is {text!r}")
    return int(text)


def _seconds(given: Mapping[str, str]) -> float:
    text = given.get(TIMEOUT_VARIABLE, "")
    try:
        seconds = float(text) if text else _DEFAULT_TIMEOUT_S
    except ValueError:
        raise _unusable(f"{TIMEOUT_VARIABLE} is {text!r}") from None
    if not 1 <= seconds <= 86400:
        raise _unusable(f"{TIMEOUT_VARIABLE} is {text!r}, not a number of seconds from 1 to 86400")
    return seconds


def _unusable(what: str) -> UsageError:
    return UsageError(
        "E-RANKS-ENVIRONMENT",
        f"the environment tells of several processes, but {what}",
        "start them with torchrun, or unset WORLD_SIZE for a run of one process",
    )


_judge: Callable[[BaseException], bool] | None = None


def tell_by(judge: Callable[[BaseException], bool] | None) -> None:
    """Let ``judge`` say which process tells of an error; None leaves it to the first one."""
    global _judge
    _judge = judge


def may_tell(error: BaseException) -> bool:
    """Whether this process is the one that tells the user of ``error``; always without other processes."""
    if _judge is not None:
        return _judge(error)
    try:
        launch = launched()
    except UsageError:
        return os.environ.get("RANK", "0") == "0"
    foreseen = (
        isinstance(error, (ReportedError, KeyboardInterrupt)) or type(error).__module__ == "click.exceptions"
    )
    return launch is None or launch.rank == 0 or not foreseen
