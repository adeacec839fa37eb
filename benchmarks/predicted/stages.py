"""Count the stages of `prune` after calibration: removal paths of `obs`, repair, distillation and the last perplexity.

Repair and distillation run unchanged, on meta tensors. If they branch on a number, a stand-in answers: everything is
finite and positive definite, and no other ridge is better, so that three are tried. A removal path branches on numbers
throughout; each of its rounds is assumed to remove as many groups as it may.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import Mock, patch

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.predicted.counted import Counted, Launch, counted_gpu, llama
from gradprune.calibration import gram, obs
from gradprune.models import PrunableModel, describe
from gradprune.models.loss import sample_losses
from gradprune.models.masks import GroupMasks
from gradprune.ops import dispatch
from gradprune.ops.dispatch import ImportanceOps
from gradprune.surgery import distillation, moments
from gradprune.surgery.cut import cut
from gradprune.surgery.distillation import distil
from gradprune.surgery.least_squares import least_squares


def uniform_masks(view: PrunableModel, lost: float) -> GroupMasks:
    """Masks with which every block loses the fraction `lost` of its groups."""
    kept = {block.key: torch.arange(block.groups) >= round(lost * block.groups) for block in view.blocks}
    return GroupMasks(kept, len(view.layers))


def lost_at(size: str, ratio: float) -> float:
    """The fraction of all groups that is removed with the fraction `ratio` of the model's parameters."""
    view = describe(llama(size))
    return ratio * view.parameters / view.prunable


def repair_pass(size: str, layers: int, lost: float, batches: int, held_out: int, shape: tuple[int, int]) -> Counted:
    """Count `least_squares` of a model whose blocks lose the fraction `lost` of their groups.

    batches and held_out are numbers of batches, and `shape` is the shape [N, T] of each.
    """
    with counted_gpu() as counted, _numbers_answered(counted):
        view = describe(llama(size, layers))
        ids = torch.zeros(shape, dtype=torch.int64, device="meta")
        masks = uniform_masks(view, lost)
        with counted:
            least_squares(view, masks, [ids] * batches, [ids] * held_out)
    return counted


def cut_forward_pass(size: str, layers: int, lost: float, samples: int, tokens: int) -> Counted:
    """Count a forward pass of the cut model, with each sample's loss."""
    with counted_gpu() as counted:
        model = llama(size, layers)
        model = cut(model, uniform_masks(describe(model), lost), inplace=True)
        with counted, torch.no_grad():
            sample_losses(model, torch.zeros(samples, tokens, dtype=torch.int64, device="meta"))
    return counted


def distillation_pass(size: str, layers: int, lost: float, samples: int, held_out: int, tokens: int) -> Counted:
    """Count `distil` of a model whose blocks have lost the fraction `lost`, with activations recomputed."""

    def mean_loss(model: PreTrainedModel, batches: Sequence[Tensor]) -> float:
        with torch.no_grad():
            for batch in batches:
                sample_losses(model, batch)
        return 0.5

    with counted_gpu() as counted, _numbers_answered(counted), patch.object(distillation, "mean_loss", mean_loss):
        model = llama(size, layers)
        view = describe(cut(model, uniform_masks(describe(model), lost), inplace=True))
        ids = torch.zeros(samples + held_out, tokens, dtype=torch.int64, device="meta")
        dense = torch.empty(samples, tokens, model.config.hidden_size, dtype=torch.bfloat16, device="meta")
        with counted:
            distil(view, ids[:samples], ids[samples:], dense, recompute=True)
    return counted


def removal_of_all(outputs: int, groups: int, columns: int) -> Counted:
    """Count the removal path of a block with an output projection of [outputs, groups * columns].

    Every round removes as many groups as it may.
    """

    def each_round(block: Any, quota: int, ops: ImportanceOps) -> tuple[Tensor, list[float]]:
        count = min(quota, len(block))
        block.costs()
        matrices = block.matrices_of(torch.arange(min(obs._SURPLUS * quota, len(block))))
        ops.cheapest_removals(*matrices, block.columns, count)
        return torch.arange(count), [0.0] * count

    with counted_gpu() as counted, _numbers_answered(counted), patch.object(obs, "_round", each_round), counted:
        weight = torch.empty(outputs, groups * columns, dtype=torch.bfloat16, device="meta")
        gram = torch.empty(groups * columns, groups * columns, device="meta")
        obs.removal_path(weight, gram, columns, ops=dispatch._importance_triton())
    return counted


def gram_sum(tokens: int, width: int) -> Counted:
    """Count the addition of one batch's `tokens` tokens to a Gram matrix [width, width] of `obs`."""
    with counted_gpu() as counted, _numbers_answered(counted), counted:
        total = torch.empty(width, width, device="meta")
        gram.add_gram(total, torch.empty(tokens, width, dtype=torch.bfloat16, device="meta"))
    return counted


@contextmanager
def _numbers_answered(counted: Counted) -> Iterator[None]:
    """Context manager under which meta tensors have the numbers that code branches on.

    Half precision is multiplied as on a GPU.
    """

    def product(total: Tensor, left: Tensor, right: Tensor) -> None:
        made = torch.empty_like(total)
        moved = sum(each.numel() * each.element_size() for each in (left, right, made))
        counted.launches.append(Launch("mm", moved, 2 * left.shape[0] * total.numel(), left.dtype))
        total += made

    def factor(matrix: Tensor) -> tuple[Tensor, bool]:
        made = torch.empty_like(matrix)
        counted.launches.append(Launch("cholesky", 2 * made.nbytes, made.numel() * made.shape[-1] / 3, made.dtype))
        return made, False

    with ExitStack() as stack:
        for module in (gram, moments, distillation):
            stack.enter_context(patch.object(module, "add_product", product))
        for name, answer in {"__bool__": True, "__float__": 0.5, "item": 0.5, "__le__": False}.items():
            stack.enter_context(patch.object(Tensor, name, _answering(getattr(Tensor, name), answer)))
        stack.enter_context(patch("torch.linalg.cholesky_ex", factor))
        stack.enter_context(patch("torch.Generator", lambda _device: Mock(manual_seed=lambda _seed: None)))
        yield


def _answering(method: Callable[..., Any], answer: object) -> Callable[..., Any]:
    """A method of `Tensor` that returns `answer` for meta tensors without dimensions, and is unchanged for others."""
    return lambda tensor, *others: method(tensor, *others) if tensor.ndim or not tensor.is_meta else answer
