"""Combines the states of the ranks' engines as if one engine had run all batches."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gradprune.ranks import in_order

# Entries of a state that hold one value per step, and one per sample; all others are sums.
_BY_STEP, _BY_SAMPLE = ("scales", "statistics."), ("gates", "losses")


def joined_state(states: Sequence[Mapping[str, Tensor]], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """The state that an engine would have if it had run all batches.

    Sums are added in fp64 in the order of the ranks; the values of steps and samples are put in the order of the
    batches.

    Args:
        states: the state of each rank's engine, which has run its share of the batches; empty if its share is empty.
        batches: [N, T] each, the batches of all ranks.
    """
    sizes = [[len(batch) for batch in batches[rank :: len(states)]] for rank in range(len(states))]
    whole: dict[str, Tensor] = {}
    # The first rank ran the first step, so its state has every entry that any rank's state has.
    for name, _first in states[0].items():
        values = [state.get(name, torch.empty(0)) for state in states]
        own = name.split(".", 2)[-1]
        if own.startswith(_BY_STEP):
            whole[name] = torch.stack(in_order([list(value) for value in values]))
        elif own in _BY_SAMPLE:
            whole[name] = torch.cat(in_order([_by_step(*each) for each in zip(values, sizes, strict=True)]))
        else:
            found = [state[name] for state in states if name in state]
            whole[name] = sum(found[1:], found[0])
    return whole


def _by_step(values: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Split `values`, one per sample of the first steps, by step; `sizes`: the number of samples in each step."""
    ends = itertools.accumulate(sizes)
    return [values[end - size : end] for size, end in zip(sizes, ends, strict=True) if end <= len(values)]
