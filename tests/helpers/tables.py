"""Group tables with random scores."""

import numpy as np

from gradprune.scoring.table import GroupTable

ATTENTION_COST, MLP_COST = 48, 6


def make_table(layers: int = 4, heads: int = 3, channels: int = 12, seed: int = 0) -> GroupTable:
    """A table of groups with random scores that all differ."""
    sizes = [heads, channels] * layers
    kinds = np.repeat(np.tile([0, 1], layers), sizes)
    count = sum(sizes)
    score = np.random.default_rng(seed).permutation(count).astype(float)
    return GroupTable(
        layer=np.repeat(np.repeat(np.arange(layers), 2), sizes),
        kind=kinds,
        index=np.concatenate([np.arange(size) for size in sizes]),
        cost=np.where(kinds == 0, ATTENTION_COST, MLP_COST),
        importance=score,
        prior=np.full(count, np.nan),
        score=score,
        layers=layers,
    )
