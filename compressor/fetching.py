"""Why something could not be fetched from the hub, read from what the hub's libraries raise."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass

from compressor.errors import HubError, OutOfResources, OutputRefused, ReportedError

__all__ = ["HubAnswer", "came_from_network", "hub_answer", "shared_refusal"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NETWORK_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp", "fsspec")


@dataclass(frozen=True)
class HubAnswer:
    """An HTTP answer that refuses something.

    Attributes:
        status: Such as 401.
        says: The hub's own words, which may be none.
    """

    status: int
    says: str

    @property
    def hides(self) -> bool:
        """Whether it is the answer to somebody unknown who asks for what is private or not there."""
        return self.status == 401 and not self.rejects_token

    @property
    def rejects_token(self) -> bool:
        """Whether the hub does not know the token that came with the request."""
        return self.status == 401 and "credentials" in self.says


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and all that lie behind it, however often they were wrapped in others."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


def hub_answer(error: BaseException) -> HubAnswer | None:
    """The hub's answer that the exception comes from; None where there was no answer."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(status, int):
            return HubAnswer(status, str(getattr(response, "headers", {}).get("X-Error-Message") or ""))
    return None


def came_from_network(error: BaseException) -> bool:
    """Whether a connection failed, in contrast to what came over it."""
    return any(
        isinstance(cause, (ConnectionError, TimeoutError))
        or type(cause).__module__.partition(".")[0] in _NETWORK_LIBRARIES
        for cause in _causes(error)
    )


def shared_refusal(error: BaseException, name: str, absent: str) -> ReportedError | None:
    """The refusal for what befalls models and datasets alike; None for anything else.

    Args:
        error: What a library raised while ``name`` was fetched.
        name: The hub id.
        absent: A sentence's beginning that says that ``name`` is not here, going on with "it".
    """
    local = [cause for cause in _causes(error) if isinstance(cause, OSError) and cause.errno is not None]
    if any(cause.errno in _FULL for cause in local):
        return OutOfResources(
            "E-DISK-FULL",
            f"the disk is full; {name} could not be fetched",
            "free some space, or let HF_HOME point to another disk",
        )
    answer = hub_answer(error)
    if answer is not None:
        return None if answer.hides else _refused(answer, name, absent)
    # The errors of connections have numbers too, but no file names.
    unwritable = next((cause for cause in local if cause.filename is not None), None)
    if unwritable is None or came_from_network(error):
        return None
    return OutputRefused(
        "E-CACHE-NOT-WRITABLE",
        f"{name} could not be kept: {unwritable.filename}: {unwritable.strerror}",
        "let HF_HOME point to a folder that you can write",
    )


def _refused(answer: HubAnswer, name: str, absent: str) -> HubError:
    if answer.rejects_token:
        return HubError(
            "E-HUB-ACCESS",
            f"{name} could not be fetched: the hub does not know the token that was sent",
            "log in again with `hf auth login`, or unset HF_TOKEN",
        )
    if answer.status == 403:
        return HubError(
            "E-HUB-ACCESS",
            f"{name} could not be fetched: the hub forbids it" + (f" ({answer.says})" if answer.says else ""),
            "look at its page on the hub, and log in with `hf auth login` as somebody who has access",
        )
    return HubError(
        "E-HUB-UNREACHABLE",
        f"{absent} could not be fetched: the hub answered {answer.status}",
        "try again later; what is already fetched is kept",
    )
