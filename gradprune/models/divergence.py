"""How far a model's predictions are from its teacher's: the Kullback-Leibler divergence, in memory of a few logits."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from gradprune.models.loss import Head, logits_of, times, tokens_at_once


def divergence(student: PreTrainedModel, hidden: Tensor, taught: Tensor, taught_by: Head | None = None) -> Tensor:
    """Mean over tokens of KL(teacher || student), the distillation of Hinton et al. (2015) at temperature 1.

    Both heads run over chunks of tokens, so that all logits never exist at once. If the student's is a linear layer,
    each runs once, and gradients are computed in the forward pass; otherwise the backward pass recomputes both.

    Args:
        student: a causal LM.
        hidden: [K, H], its decoder's last hidden states.
        taught: [K, H of the teacher], the teacher's; no gradient reaches them.
        taught_by: the teacher's head; by default the student's own.

    Returns:
        A scalar in nats per token, fp32 (fp64 for fp64 models); differentiable in `hidden` and the student's head.
    """
    head = logits_of(student)
    taught_by = taught_by or head
    weight = student.get_output_embeddings().weight
    hidden = hidden.to(weight.device)
    chunk = tokens_at_once(weight.shape[0], cuda=hidden.is_cuda)
    if type(head) is nn.Linear:
        total: Tensor = _LinearHeadKl.apply(hidden, head.weight, head.bias, taught, taught_by, chunk)  # type: ignore[no-untyped-call]
        return total / len(hidden)
    sums = [
        checkpoint(_kl_sum, head, taught_by, *each, use_reentrant=False, preserve_rng_state=False)
        for each in zip(hidden.split(chunk), taught.split(chunk), strict=True)
    ]
    return torch.stack(sums).sum() / len(hidden)


@torch.no_grad()
def divergences(model: PreTrainedModel, hidden: Tensor, changed: Sequence[Tensor]) -> list[float]:
    """Of each of several hidden states, the mean over tokens of KL(the model's own || changed), in nats per token.

    Args:
        model: a causal LM.
        hidden: [K, H], its decoder's last hidden states.
        changed: [K, H] each.
    """
    head, weight = logits_of(model), model.get_output_embeddings().weight
    chunk = tokens_at_once(weight.shape[0], cuda=weight.is_cuda)
    sums = torch.zeros(len(changed), dtype=torch.float64, device=weight.device)
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        log_p = F.log_softmax(_exact(head(hidden[part].to(weight.device))), dim=-1)
        p = log_p.exp()
        for number, other in enumerate(changed):
            log_q = F.log_softmax(_exact(head(other[part].to(weight.device))), dim=-1)
            sums[number] += torch.linalg.vecdot(p, log_q.neg_().add_(log_p)).sum(dtype=torch.float64)
    return (sums / len(hidden)).tolist()


def _kl_sum(student_head: Head, teacher_head: Head, hidden: Tensor, taught: Tensor) -> Tensor:
    """Sum over tokens of KL(teacher || student), given hidden states [K, H] of both."""
    with torch.no_grad():
        expected = F.log_softmax(_exact(teacher_head(taught)), dim=-1)
    found = F.log_softmax(_exact(student_head(hidden)), dim=-1)
    return F.kl_div(found, expected, reduction="sum", log_target=True)


class _LinearHeadKl(torch.autograd.Function):
    """`_kl_sum` of a student whose head is logits = W h + b, with its gradients computed in the forward pass.

    With p the teacher's probabilities and q the student's, d KL / d logits = q - p. So
    d KL / d h = (q - p) W, and summed over tokens d KL / d W = (q - p)^T h and d KL / d b = q - p.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, taught: Tensor, teacher_head: Head, chunk: int
    ) -> Tensor:
        d_hidden, d_weight, d_bias = (
            torch.zeros_like(x) if needed and x is not None else None
            for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        total = torch.zeros((), dtype=_exact(hidden[:0]).dtype, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            log_p = F.log_softmax(_exact(teacher_head(taught[part])), dim=-1)
            log_q = F.log_softmax(_exact(F.linear(hidden[part], weight, bias)), dim=-1)
            p = log_p.exp()
            total += torch.linalg.vecdot(p, log_p.sub_(log_q)).sum()
            # In place, because these are the largest tensors.
            d_logits = log_q.exp_().sub_(p).to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[part] = times(d_logits, weight)
            if d_weight is not None:
                torch.addmm(d_weight, d_logits.T, hidden[part], out=d_weight)
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            del log_p, log_q, p, d_logits
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        found = (None if each is None else (each * upstream).to(each.dtype) for each in ctx.saved_tensors)
        return (*found, None, None, None)


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
