"""Reach: how strongly a block's error affects the predictions, beyond what its size at the block's output tells.

`obs` prices a block's error by its size and one curvature, but the layers after the block may damp or amplify it. So
for one block at a time, part of its groups is removed, the others are re-solved, and the residual stream of a few
samples is followed to the last layer. The block's divergence is KL(dense || changed) of the predictions, in nats per
token, at every second token, because the head takes as long as several layers. Its reach is this divergence divided by
the cost that `obs` gives the removal, relative to the median over the blocks of its kind; so kinds keep their costs
relative to each other.
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

# A cost below this share of the whole block's cost is lost in rounding.
_LEAST = 1e-6


class Followed:
    """Residual streams of a few samples: the dense model's, and one for each block with part of its groups removed.

    All of them advance layer by layer. Every rank has the same samples, and follows its share of the blocks.
    """

    def __init__(self, view: PrunableModel, batches: Sequence[Tensor], ranks: Ranks) -> None:
        """Start at the first layer, with the first samples of one length.

        Args:
            view: the dense model.
            batches: [N, T] int64 each, the calibration batches of all ranks; those as long as the first are used.
            ranks: the processes that divide the blocks among themselves.
        """
        samples = torch.cat([batch for batch in batches if batch.shape[1] == batches[0].shape[1]])
        samples = samples[: samples_followed(sum(map(len, batches)), len(view.blocks))]
        self._view, self._ranks = view, ranks
        self._own = ranks.share(view.blocks)
        self._streams = Streams(view, [samples], (len(self._own) + 1) * stream_bytes(view, [samples]))
        (self._dense,) = self._streams.take_first()
        self._changed: dict[BlockKey, Tensor] = {}

    def pass_layer(self, layer: int, solved: Mapping[BlockKey, Sequence[Tensor]]) -> None:
        """Advance all streams through a layer, whose weights are in memory.

        solved: for each of the layer's blocks, its output projections [O, I] with part of the groups removed and the
            others re-solved.
        """
        for key, stream in self._changed.items():
            self._changed[key] = self._passed(layer, stream)
        for block in self._own:
            if block.layer == layer:
                with block.writing_by(solved[block.key]):
                    self._changed[block.key] = self._passed(layer, self._dense)
        self._dense = self._passed(layer, self._dense)

    def divergences(self) -> dict[BlockKey, float]:
        """Return each block's divergence in nats per token; to be called once, after the last layer."""
        changed = [self._read(self._changed.pop(block.key)) for block in self._own]
        found = divergences(self._view.model, self._read(self._dense), changed)
        keys = [block.key for block in self._view.blocks]
        return dict(zip(keys, self._ranks.joined_json(found), strict=True))

    def _passed(self, layer: int, stream: Tensor) -> Tensor:
        return self._streams.run_layer(layer, 0, stream)

    def _read(self, stream: Tensor) -> Tensor:
        """[tokens, H]: the head's input at every second token, given the stream after the last layer."""
        hidden = self._streams.last_hidden(0, stream.to(self._view.device))
        return self._streams.keep(hidden[:, 1::2].flatten(0, -2))


def reaches(
    divergences: Mapping[BlockKey, float], costs: Mapping[BlockKey, tuple[float, float]]
) -> dict[BlockKey, float]:
    """Each block's reach: its divergence divided by its cost, relative to the median of its kind.

    It is 1 if the cost is lost in rounding, or if the divergence is not positive and finite.

    Args:
        divergences: each block's divergence when part of its groups is removed.
        costs: for each block, the cost by `obs` of removing this part, and of removing the whole block.
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
