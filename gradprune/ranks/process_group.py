"""Ranks that exchange data through `torch.distributed`."""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from gradprune.errors import ConfigError, GradPruneError, RankError, one_line
from gradprune.ranks import PIECE, Ranks

_TIMEOUT = "GRADPRUNE_RANK_TIMEOUT"
# An upper bound, in seconds, on how long a process takes to end.
_ENDING = 0.5


class _LostError(RankError):
    """Another rank was terminated, or does not answer."""


class LaunchedRanks(Ranks):
    """One of several processes. Every exchange begins with a check of whether any of them has failed.

    speaks: whether this rank reports what went wrong. That is rank 0 or, if the ranks have lost each other, the rank
        that notices first.
    """

    def __init__(self, rank: int, world: int, local: int, store: Store) -> None:
        """The process group must exist already; `store` is the one through which its processes met."""
        self.rank, self.world, self.local = rank, world, local
        self.speaks = self.leads
        self._store = store
        self._connected = True

    def gather(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """See `Ranks.gather`."""
        own = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        exchanged = map(safetensors.torch.load, self._exchange(safetensors.torch.save(own)))
        # Sort by name, because each process loads them in a different order.
        return [{name: found[name] for name in sorted(found)} for found in exchanged]

    def gather_json(self, value: Any) -> list[Any]:
        """See `Ranks.gather_json`."""
        return [json.loads(found) for found in self._exchange(json.dumps(value).encode())]

    def sum(self, own: Tensor) -> Tensor:
        """See `Ranks.sum`."""
        self._exchange(b"")
        flat = own.contiguous().flatten()
        total = torch.empty_like(flat)
        size = max(1, PIECE // flat.element_size())
        for piece, into in zip(flat.split(size), total.split(size), strict=True):
            pieces = self._all_gather(piece.contiguous())
            into.copy_(pieces[0])
            for other in pieces[1:]:
                into += other
        return total.view_as(own)

    def fail(self, error: Exception) -> None:
        """Tell the other ranks, which learn it in their next exchange, why this rank ends.

        Raises:
            RankError: always, unless the ranks have lost each other; on every rank with the message of the first rank
                that failed.
        """
        if not self._connected:
            return
        words = str(error) if isinstance(error, GradPruneError) or not str(error) else one_line(error)
        try:
            self._exchange((words or type(error).__name__).encode(), well=False)
        except _LostError:
            # The error itself is more informative than the fact that the other ranks are lost.
            return

    def finish(self) -> None:
        """Wait until all ranks are done."""
        self._exchange(b"")

    def leave(self) -> None:
        """Close the connections."""
        torch.distributed.destroy_process_group()

    def _exchange(self, payload: bytes, *, well: bool = True) -> list[bytes]:
        """Return every rank's payload. `well` is False if this rank has failed and its payload is the reason.

        Raises:
            RankError: a rank has failed, for the reason in its payload; or one does not answer.
        """
        heads = torch.stack(self._all_gather(torch.tensor([int(well), len(payload)]))).tolist()
        longest = max(length for _, length in heads)
        padded = torch.zeros(longest, dtype=torch.uint8)
        if payload:
            padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        found = self._all_gather(padded) if longest else [padded] * self.world
        payloads = [each[:length].numpy().tobytes() for each, (_, length) in zip(found, heads, strict=True)]
        failed = {
            rank: payloads[rank].decode(errors="replace") for rank, (is_well, _) in enumerate(heads) if not is_well
        }
        if failed:
            self._connected = False
            first, words = next(iter(failed.items()))
            raise RankError(words if first == 0 else f"rank {first}: {words}")
        return payloads

    def _all_gather(self, own: Tensor) -> list[Tensor]:
        found = [torch.empty_like(own) for _ in range(self.world)]
        try:
            torch.distributed.all_gather(found, own)
        except RuntimeError as error:
            self._connected = False
            self.speaks = self._first_to_notice()
            raise _LostError(
                f"ranks: rank {self.rank} lost the others: one of them was terminated, or did not answer within "
                f"{_seconds():g} seconds (environment variable {_TIMEOUT}): {one_line(error)}"
            ) from error
        return found

    def _first_to_notice(self) -> bool:
        """Whether no other rank has reported yet that the ranks have lost each other."""
        # Wait, because a process that is ending closes one connection after the other.
        time.sleep(_ENDING)
        try:
            # Try the address first, because PyTorch would write to standard error if the store were not there.
            socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=5.0).close()
            return int(self._store.add("lost", 1)) == 1
        except (OSError, RuntimeError):
            # The store was in rank 0, which has ended, so rank 1 reports it.
            return self.rank == 1


def connected(rank: int, world: int, local: int) -> LaunchedRanks:
    """Connect to the other ranks: by gloo on the CPU, by NCCL on the GPU with this rank's number on its machine.

    Raises:
        RankError: the ranks cannot connect within the timeout.
    """
    cuda = torch.cuda.is_available()
    try:
        if cuda:
            torch.cuda.set_device(local % torch.cuda.device_count())
        limit = timedelta(seconds=_seconds())
        store, _, _ = next(rendezvous("env://", rank, world, timeout=limit))
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        with _nothing_printed():
            torch.distributed.init_process_group(backend, timeout=limit, store=store, rank=rank, world_size=world)
    except (RuntimeError, ValueError) as error:
        raise RankError(f"ranks: rank {rank} of {world} cannot connect to the others: {one_line(error)}") from error
    return LaunchedRanks(rank, world, local, store)


@contextmanager
def _nothing_printed() -> Iterator[None]:
    """Silence standard output: older PyTorch writes there that gloo has connected, where a result may be expected."""
    if sys.__stdout__ is None:
        yield
        return
    output = os.dup(1)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(output, 1)
        os.close(output)


def _seconds() -> float:
    """Return how many seconds a rank waits for the others."""
    said = os.environ.get(_TIMEOUT, "3600")
    try:
        seconds = float(said)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < 1e8:
        raise ConfigError(f"{_TIMEOUT}: '{said}' is not a number of seconds above 0")
    return seconds
