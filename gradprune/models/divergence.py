"""How far a model's predictions are from its teacher's, and from the text; only few logits are in memory at a time."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from gradprune.accumulation import accumulation_dtype
from gradprune.models.loss import Head, logits_of, times, tokens_at_once


def divergence(
    student: PreTrainedModel, hidden: Tensor, teacher_hidden: Tensor, teacher_head: Head | None = None
) -> Tensor:
    """Mean over tokens of KL(teacher || student), the distillation loss of Hinton et al. (2015) at temperature 1.

    Both heads run over chunks of tokens, so that all logits never exist at the same time. If the student's head is a
    linear layer, each head runs once, and gradients are computed in the forward pass; otherwise the backward pass runs
    both heads again.

    Args:
        student: a causal LM.
        hidden: [K, H], the last hidden states of the student's decoder.
        teacher_hidden: [K, H of the teacher], the last hidden states of the teacher's decoder; they get no gradient.
        teacher_head: the teacher's head; None: the student's.

    Returns:
        A scalar in nats per token, fp32 (fp64 for fp64 models); differentiable in `hidden` and the student's head.
    """
    return _means(student, hidden, teacher_hidden, teacher_head or logits_of(student), None, 0.0)[0]


def divergence_with_text(
    student: PreTrainedModel, hidden: Tensor, teacher_hidden: Tensor, text: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """Weighted average of divergence and next-token loss (Hinton et al. 2015), and the divergence by itself.

    The average is (1 - share) KL(teacher || student) + share NLL(text).

    Args:
        student, hidden, teacher_hidden: see `divergence`; the teacher has the student's head.
        text: [K] int64, the token that follows each hidden state's token.
        share: weight of the text, from 0 to 1.

    Returns:
        The average and KL(teacher || student), both means over tokens; for units and dtype see `divergence`. The second
        is not differentiable.
    """
    return _means(student, hidden, teacher_hidden, logits_of(student), text, share)


@torch.no_grad()
def divergences(model: PreTrainedModel, hidden: Tensor, changed: Sequence[Tensor]) -> list[float]:
    """Mean over tokens of KL(unchanged || changed), in nats per token, for each of several changes of hidden states.

    Args:
        model: a causal LM, whose head makes all the predictions.
        hidden: [K, H], the last hidden states of its decoder.
        changed: the changed hidden states, [K, H] each.
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


def _means(
    student: PreTrainedModel,
    hidden: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Head,
    text: Tensor | None,
    share: float,
) -> tuple[Tensor, Tensor]:
    """See `divergence_with_text`; if `text` is None, both results are the divergence."""
    head = logits_of(student)
    weight = student.get_output_embeddings().weight
    hidden, text = hidden.to(weight.device), None if text is None else text.to(weight.device)
    chunk = tokens_at_once(weight.shape[0], cuda=hidden.is_cuda)
    if type(head) is nn.Linear:
        loss, kl = _LinearHeadSums.apply(
            hidden, head.weight, head.bias, teacher_hidden, teacher_head, text, share, chunk
        )  # type: ignore[no-untyped-call]
    else:
        texts = [None] * len(hidden.split(chunk)) if text is None else text.split(chunk)
        sums = [
            checkpoint(_sums, head, teacher_head, *each, share, use_reentrant=False, preserve_rng_state=False)
            for each in zip(hidden.split(chunk), teacher_hidden.split(chunk), texts, strict=True)
        ]
        loss, kl = (torch.stack(each).sum() for each in zip(*sums, strict=True))
    return loss / len(hidden), kl / len(hidden)


def _sums(
    student_head: Head, teacher_head: Head, hidden: Tensor, teacher_hidden: Tensor, text: Tensor | None, share: float
) -> tuple[Tensor, Tensor]:
    """See `_means`: the sums over tokens instead, for both models' hidden states [K, H]."""
    with torch.no_grad():
        expected = F.log_softmax(_exact(teacher_head(teacher_hidden)), dim=-1)
    found = F.log_softmax(_exact(student_head(hidden)), dim=-1)
    kl = F.kl_div(found, expected, reduction="sum", log_target=True)
    if text is None:
        return kl, kl.detach()
    return torch.lerp(kl, F.nll_loss(found, text, reduction="sum"), share), kl.detach()


class _LinearHeadSums(torch.autograd.Function):
    """`_sums` for a student whose head is logits = W h + b, with its gradients computed in the forward pass.

    With p the teacher's probabilities, q the student's, s the weight of the text, and y the text's token, the loss has
    d / d logits = q - (1 - s) p - s 1_y. So d / d h = (d / d logits) W, and summed over tokens
    d / d W = (d / d logits)^T h and d / d b = d / d logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_head: Head,
        text: Tensor | None,
        share: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        d_hidden, d_weight, d_bias = (
            torch.zeros_like(x) if needed and x is not None else None
            for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        kl = torch.zeros((), dtype=accumulation_dtype(hidden), device=hidden.device)
        of_text = torch.zeros_like(kl)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            log_p = F.log_softmax(_exact(teacher_head(teacher_hidden[part])), dim=-1)
            log_q = F.log_softmax(_exact(F.linear(hidden[part], weight, bias)), dim=-1)
            p = log_p.exp()
            kl += torch.linalg.vecdot(p, log_p.sub_(log_q)).sum()
            next_ones = None if text is None else text[part, None]
            if next_ones is not None:
                of_text -= log_q.gather(1, next_ones).sum()
            # In place, because these are the largest tensors.
            exact = log_q.exp_().sub_(p, alpha=1.0 - share)
            if next_ones is not None:
                exact.scatter_(1, next_ones, exact.gather(1, next_ones) - share)
            d_logits = exact.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[part] = times(d_logits, weight)
            if d_weight is not None:
                torch.addmm(d_weight, d_logits.T, hidden[part], out=d_weight)
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            del log_p, log_q, p, exact, d_logits
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.mark_non_differentiable(kl)
        return torch.lerp(kl, of_text, share), kl

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _of_kl: Tensor) -> tuple[Tensor | None, ...]:
        found = (None if each is None else (each * upstream).to(each.dtype) for each in ctx.saved_tensors)
        return (*found, None, None, None, None, None)


def _exact(logits: Tensor) -> Tensor:
    return logits.to(accumulation_dtype(logits))
