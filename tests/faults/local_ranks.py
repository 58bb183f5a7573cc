"""The environment of processes on this machine that share one run, as a launcher such as torchrun sets it."""

from __future__ import annotations

import socket

__all__ = ["environment_of", "free_port"]


def free_port() -> int:
    """A port that nobody listens to just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment_of(rank: int, world: int, port: int) -> dict[str, str]:
    """The variables of one of ``world`` processes; the first one listens to ``port``."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
