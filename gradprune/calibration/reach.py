"""How far a block's error reaches the predictions, which its size at the block does not tell.

`obs` prices what a block no longer writes by its size and one curvature. What becomes of it depends on the layers
behind, which damp it or add to it. So of each block, alone, a part of the groups goes and the others are re-solved, and
the residual stream is followed to the end for a few samples. With d the change of what the head reads, W [V, H] the
head's weight, and p the dense model's predictions,

    divergence = 1/2 mean over tokens of d^T M d,  M = mean over tokens of W^T (diag p - p p^T) W,

which is the Kullback-Leibler divergence to second order with one curvature for all tokens. The reach of a block is this
in proportion to what obs says that the removal costs, relative to the median of the blocks of its kind: how much kinds
cost beside each other stays as it was.
"""

from collections.abc import Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

from gradprune.calibration.gram import accumulation_dtype, add_gram, mirror, same_rounding
from gradprune.models import Block, BlockKey, PrunableModel
from gradprune.models.loss import CUDA_LOGITS, LOGITS, MIN_TOKENS, logits_of
from gradprune.models.streams import Streams, stream_bytes
from gradprune.ranks import Ranks

SAMPLES, TOKENS = 2, 512
"""So many samples are followed at least, and so many of their tokens."""
# What costs less than this part of the whole block is lost in rounding.
_LEAST = 1e-6


class Followed:
    """The dense model's stream for a few samples, and one for each block with a part of its groups gone.

    Both advance layer by layer. Every rank has the same samples, and follows every so manieth block.
    """

    def __init__(self, view: PrunableModel, batches: Sequence[Tensor], ranks: Ranks) -> None:
        """Of the first samples of calibration batches, [N, T] int64 each."""
        needed = max(SAMPLES, -(-TOKENS // batches[0].shape[1]))
        samples = torch.cat(list(batches[:needed]))[:needed]
        self._view, self._ranks = view, ranks
        own = -(-len(view.blocks) // ranks.world)
        self._streams = Streams(view, [samples], (own + 1) * stream_bytes(view, [samples]))
        (self._dense,) = self._streams.take_first()
        self._changed: dict[BlockKey, Tensor] = {}

    def pass_layer(self, layer: int, solved: Mapping[BlockKey, Sequence[Tensor]]) -> None:
        """Go through a layer, which is in memory.

        solved: each of its blocks' output projections, [O, I], with a part gone.
        """
        for key, stream in self._changed.items():
            self._changed[key] = self._passed(layer, stream)
        for block in self._view.of_layer(layer):
            if self._follows(block):
                with block.writing_by(solved[block.key]):
                    self._changed[block.key] = self._passed(layer, self._dense)
        self._dense = self._passed(layer, self._dense)

    def divergences(self) -> dict[BlockKey, float]:
        """Of each block, in nats per token, behind the last layer; the last call."""
        dense = self._read(self._dense)
        curvature = _curvature(self._view, dense)
        found = []
        for block in self._view.blocks:
            if self._follows(block):
                change = (self._read(self._changed.pop(block.key)).double() - dense.double()).to(curvature)
                with same_rounding(change):
                    bent = change @ curvature
                found.append(float((bent * change).sum(1).mean()) / 2.0)
        keys = [block.key for block in self._view.blocks]
        return dict(zip(keys, self._ranks.joined_json(found), strict=True))

    def _follows(self, block: Block) -> bool:
        return self._view.blocks.index(block) % self._ranks.world == self._ranks.rank

    def _passed(self, layer: int, stream: Tensor) -> Tensor:
        return self._streams.layer(layer, 0, stream, {})

    def _read(self, stream: Tensor) -> Tensor:
        """[tokens, H] what the head reads, given the stream behind the last layer."""
        return self._streams.last_hidden(0, stream.to(self._view.device)).flatten(0, -2)


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


def _curvature(view: PrunableModel, hidden: Tensor) -> Tensor:
    """M [H, H] of what the head reads, [tokens, H]; symmetric, in `accumulation_dtype`."""
    head, weight = logits_of(view.model), view.model.get_output_embeddings().weight
    hidden = hidden.to(weight.device)
    dtype = accumulation_dtype(weight)
    vocabulary, width = weight.shape
    seen, mean, spread = (
        torch.zeros(size, dtype=dtype, device=weight.device) for size in ((vocabulary,), (width, width), (width, width))
    )
    chunk = max(MIN_TOKENS, (CUDA_LOGITS if hidden.is_cuda else LOGITS) // vocabulary)
    for part in hidden.split(chunk):
        predicted = head(part).to(dtype).softmax(-1)
        seen += predicted.sum(0)
        with same_rounding(predicted):
            add_gram(mean, predicted @ weight.to(dtype))
    rows = max(MIN_TOKENS, (CUDA_LOGITS if hidden.is_cuda else LOGITS) // width)
    for of_rows, often in zip(weight.split(rows), seen.split(rows), strict=True):
        add_gram(spread, of_rows.to(dtype) * often.sqrt()[:, None])
    return mirror(spread.sub_(mean)).div_(len(hidden))
