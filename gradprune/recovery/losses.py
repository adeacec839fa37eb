"""What recovery minimises: the distance from the teacher's predictions, or the text's own loss."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from gradprune.models.loss import LOGITS, MIN_TOKENS, Head, logits_of


def distillation_loss(student: PreTrainedModel, teacher: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Mean over tokens of KL(teacher || student), the distillation of Hinton et al. (2015) at temperature 1.

    Both heads run over chunks of tokens, and the backward pass recomputes each chunk's logits, so that all logits
    never exist at once.

    Args:
        student, teacher: causal LMs of the same vocabulary; no gradient reaches the teacher.
        input_ids: [N, T] int64.

    Returns:
        A scalar in nats per token, fp32 (fp64 for fp64 models); differentiable in the student's parameters.
    """
    with torch.no_grad():
        taught = teacher.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
    hidden = student.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
    heads = logits_of(student), logits_of(teacher)
    chunk = max(MIN_TOKENS, LOGITS // student.get_output_embeddings().weight.shape[0])
    sums = [
        checkpoint(_kl_sum, *heads, *each, use_reentrant=False, preserve_rng_state=False)
        for each in zip(hidden.split(chunk), taught.split(chunk), strict=True)
    ]
    return torch.stack(sums).sum() / len(hidden)


def _kl_sum(student_head: Head, teacher_head: Head, hidden: Tensor, taught: Tensor) -> Tensor:
    """Sum over tokens of KL(teacher || student), given hidden states [K, H] of both."""
    with torch.no_grad():
        expected = F.log_softmax(_exact(teacher_head(taught)), dim=-1)
    found = F.log_softmax(_exact(student_head(hidden)), dim=-1)
    return F.kl_div(found, expected, reduction="sum", log_target=True)


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
