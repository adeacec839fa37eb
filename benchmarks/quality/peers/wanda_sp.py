"""Wanda-sp: structured Wanda (Sun et al. 2023, arXiv:2306.11695), as FLAP's authors compare with it (arXiv:2312.11983).

A group's score is the sum of |W_ij| * ||x_j||_2 over its columns of the output projection, x_j being that column's
input over all calibration tokens. The lowest-scoring groups of each block are removed, the same number in every layer.
Blocks are pruned in order, and each sees its inputs in the model as pruned so far. There is no compensation.
"""

from collections.abc import Sequence

from torch import Tensor

from benchmarks.quality.peers.choice import PeerChoice, in_order, outputs_restored, uniform_counts, without_lowest
from gradprune.models import Block, PrunableModel


def wanda_sp(view: PrunableModel, batches: Sequence[Tensor], budget: int) -> PeerChoice:
    """Choose within each block, the same number of groups in every layer."""
    lost = uniform_counts(view, budget)

    def decide(block: Block, x: Tensor) -> Tensor:
        columns = wanda(block.output.weight, x)
        return without_lowest(block.output.fold_columns(columns), lost[block.kind.name])

    with outputs_restored(view):
        return PeerChoice(in_order(view, batches, decide))


def wanda(weight: Tensor, x: Tensor) -> Tensor:
    """[I] fp64: sum over rows of |weight [O, I]| times the norm of each column of x [tokens, I]."""
    return weight.double().abs().sum(0) * x.double().norm(dim=0)
