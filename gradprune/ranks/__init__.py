"""The ranks of a job: processes, started by torchrun, that share its work and end together.

Work is divided by striding: of a sequence of parts, rank r takes parts r, r + world, ... The results are joined in the
order of the parts, or added in the order of the ranks, so every rank holds the same bits. With one process (`ALONE`)
each of these operations is the identity. Nothing is pickled: the ranks exchange JSON, safetensors and plain tensors.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from gradprune.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

_T = TypeVar("_T")

PIECE = 2**24
"""Tensors are added in pieces of this many bytes; at any time every rank holds one piece from each rank."""

# The environment variables that a launcher sets for each process.
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """A process of a job; an instance of this class itself is the job's only process.

    rank: its number, from 0. world: the number of processes. local: its number on its machine.
    """

    rank = 0
    world = 1
    local = 0

    @property
    def leads(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    def share(self, parts: Sequence[_T]) -> Sequence[_T]:
        """Return the parts that this rank works on."""
        return parts if self.world == 1 else parts[self.rank :: self.world]

    def gather(self, tensors: "Mapping[str, Tensor]") -> "list[dict[str, Tensor]]":
        """Return every rank's tensors in the order of the ranks; if exchanged, they are on the CPU, sorted by name."""
        return [dict(tensors)]

    def gather_json(self, value: Any) -> list[Any]:
        """Return every rank's JSON-serialisable value, in the order of the ranks."""
        return [value]

    def joined(self, own: "Sequence[Tensor]") -> "list[Tensor]":
        """Return one tensor per part, in the order of the parts; `own`: the tensors of this rank's share."""
        if self.world == 1:
            return list(own)
        return in_order([list(found.values()) for found in self.gather({f"{k:09}": own[k] for k in range(len(own))})])

    def joined_json(self, own: Sequence[Any]) -> list[Any]:
        """Return one JSON-serialisable value per part, in the order of the parts; `own`: those of this rank's share."""
        return in_order(self.gather_json(list(own)))

    def sum(self, own: "Tensor") -> "Tensor":
        """Add the ranks' tensors of one shape in rank order and in their dtype; the sum is on the device of `own`."""
        return own

    def check_same(self, stated: Mapping[str, Any]) -> None:
        """Raise, on all ranks, unless all of them state the same values.

        stated: JSON-serialisable values by the name of the option or file that they come from.

        Raises:
            ConfigError: a value differs; the message names the first one that does.
        """
        first, *others = self.gather_json(dict(stated))
        for rank, other in enumerate(others, start=1):
            for name in first:
                if other.get(name) != first[name]:
                    raise ConfigError(
                        f"{name}: is {first[name]} in rank 0 and {other.get(name)} in rank {rank}; give all ranks the "
                        "same"
                    )

    def after_lead(self, act: Callable[[], _T]) -> _T:
        """Return `act()`, which the leading rank finishes before the others begin, so that they find what it made."""
        if self.leads:
            found = act()
            self.gather_json(None)
            return found
        self.gather_json(None)
        return act()


ALONE = Ranks()


def in_order(shares: Sequence[Sequence[_T]]) -> list[_T]:
    """Return the parts of all ranks' shares in the order that they had before they were divided."""
    world = len(shares)
    return [shares[k % world][k // world] for k in range(sum(map(len, shares)))]


_current: Ranks = ALONE
# Whether this process reports how the job ended; None if it has not connected to the other ranks.
_speaks: bool | None = None


def current() -> Ranks:
    """The ranks of the job that this process is part of."""
    return _current


def speaks() -> bool:
    """Whether this process reports how the job ended; defined even if it has not connected to the other ranks."""
    if _speaks is not None:
        return _speaks
    alone = None in [os.environ.get(name) for name in _LAUNCHED]
    return alone or os.environ["RANK"] == "0"


@contextmanager
def launched() -> Iterator[Ranks]:
    """Context manager that connects the ranks that a launcher started; at the end they all leave together.

    Raises:
        RankError: on every rank, if one of them failed; the message names it and says why.
        ConfigError: the launcher's environment variables do not state a rank.
    """
    global _current, _speaks
    place = _launcher()
    if place is None:
        yield ALONE
        return
    from gradprune.ranks.process_group import connected

    ranks = connected(*place)
    _current = ranks
    try:
        yield ranks
        ranks.finish()
    except Exception as error:
        ranks.fail(error)
        raise
    finally:
        _current, _speaks = ALONE, ranks.speaks
        ranks.leave()


def _launcher() -> tuple[int, int, int] | None:
    """Return this process's rank, the number of ranks and its number on its machine; None if it was started alone."""
    said = [os.environ.get(name) for name in _LAUNCHED]
    if None in said or said[1] == "1":
        return None
    try:
        rank, world, local = (int(os.environ.get(name, said[0] or "")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except ValueError:
        raise ConfigError(
            f"RANK, WORLD_SIZE: '{said[0]}' and '{said[1]}' are not whole numbers; torchrun sets them"
        ) from None
    return rank, world, local
