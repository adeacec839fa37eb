"""How far a block's error reaches the predictions, which its size at the block does not tell.

`obs` prices a block's error by its size and one curvature, but the layers after the block may damp or amplify it. So
for one block at a time, part of its groups is removed, the others are re-solved, and the residual stream of a few
samples is followed to the last layer. A block's divergence is KL(dense || changed) of the predictions, in nats per
token, at every second token, because a head takes as long as several layers. Its reach is this divergence over the cost
that `obs` gives the removal, relative to the median of the blocks of its kind: kinds keep their costs relative to each
other.
"""

from collections.abc import Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

from gradprune.models import BlockKey, PrunableModel
from gradprune.models.divergence import divergences
from gradprune.models.footprint import samples_followed
from gradprune.models.streams import Streams, stream_bytes
from gradprune.ranks import Ranks

# What costs less than this part of the whole block is lost in rounding.
_LEAST = 1e-6


class Followed:
    """The dense model's stream for a few samples, and one for each block with a part of its groups gone.

    Both advance layer by layer. Every rank has the same samples, and follows its share of the blocks.
    """

    def __init__(self, view: PrunableModel, batches: Sequence[Tensor], ranks: Ranks) -> None:
        """Of the first samples of the calibration batches of all ranks, [N, T] int64 each; they are of one length."""
        samples = torch.cat([batch for batch in batches if batch.shape[1] == batches[0].shape[1]])
        samples = samples[: samples_followed(sum(map(len, batches)), len(view.blocks))]
        self._view, self._ranks = view, ranks
        self._own = ranks.share(view.blocks)
        self._streams = Streams(view, [samples], (len(self._own) + 1) * stream_bytes(view, [samples]))
        (self._dense,) = self._streams.take_first()
        self._changed: dict[BlockKey, Tensor] = {}

    def pass_layer(self, layer: int, solved: Mapping[BlockKey, Sequence[Tensor]]) -> None:
        """Go through a layer, which is in memory.

        solved: each of its blocks' output projections, [O, I], with a part gone.
        """
        for key, stream in self._changed.items():
            self._changed[key] = self._passed(layer, stream)
        for block in self._own:
            if block.layer == layer:
                with block.writing_by(solved[block.key]):
                    self._changed[block.key] = self._passed(layer, self._dense)
        self._dense = self._passed(layer, self._dense)

    def divergences(self) -> dict[BlockKey, float]:
        """Of each block, in nats per token, after the last layer; the last call."""
        changed = [self._read(self._changed.pop(block.key)) for block in self._own]
        found = divergences(self._view.model, self._read(self._dense), changed)
        keys = [block.key for block in self._view.blocks]
        return dict(zip(keys, self._ranks.joined_json(found), strict=True))

    def _passed(self, layer: int, stream: Tensor) -> Tensor:
        return self._streams.run_layer(layer, 0, stream)

    def _read(self, stream: Tensor) -> Tensor:
        """[tokens, H] what the head reads of every second token, given the stream after the last layer."""
        hidden = self._streams.last_hidden(0, stream.to(self._view.device))
        return self._streams.keep(hidden[:, 1::2].flatten(0, -2))


def reaches(
    divergences: Mapping[BlockKey, float], costs: Mapping[BlockKey, tuple[float, float]]
) -> dict[BlockKey, float]:
    """Each block's divergence in proportion to its cost, relative to the median of its kind; 1 where one tells nothing.

    Args:
        divergences: of a part of each block's groups, see above.
        costs: what obs says that this part costs, and the whole block.
    """
    ratios = {
        key: divergence / costs[key][0]
        for key, divergence in divergences.items()
        if costs[key][0] > _LEAST * costs[key][1] and 0.0 < divergence < float("inf")
    }
    of_kind: dict[str, list[float]] = {}
    for key, ratio in ratios.items():
        of_kind.setdefault(key.kind, []).append(ratio)
    return {key: ratios[key] / median(of_kind[key.kind]) if key in ratios else 1.0 for key in divergences}
