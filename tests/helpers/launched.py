"""Run the command as several ranks: the processes that torchrun would start."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.commands import Process, start


def start_ranks(
    cwd: Path,
    world: int,
    *arguments: object,
    prepare: dict[int, Callable[[], object]] | None = None,
    own: dict[int, tuple[object, ...]] | None = None,
    timeout: float = 60.0,
) -> list[Process]:
    """Start `gradprune arguments` as `world` ranks.

    prepare: by rank, what its process calls first. own: by rank, its additional arguments, after the common ones.
    timeout: seconds that a rank waits for the others.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def place(rank: int) -> Callable[[], None]:
        def become() -> None:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "GRADPRUNE_RANK_TIMEOUT": str(timeout),
            }
            (prepare or {}).get(rank, lambda: None)()

        return become

    return [start(cwd, *arguments, *(own or {}).get(rank, ()), prepare=place(rank)) for rank in range(world)]


def run_ranks(cwd: Path, world: int, *arguments: object, **options: Any) -> list[tuple[int, str]]:
    """Run the ranks to their end; return each one's exit code and output. For the options see `start_ranks`."""
    return [process.wait() for process in start_ranks(cwd, world, *arguments, **options)]
