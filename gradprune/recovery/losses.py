"""The distillation loss of a recovery: the divergence from the teacher's predictions."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradprune.models.divergence import divergence
from gradprune.models.loss import logits_of


def distillation_loss(student: PreTrainedModel, teacher: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Mean over tokens of KL(teacher || student), see `gradprune.models.divergence`.

    Args:
        student, teacher: causal LMs with the same vocabulary; no gradient reaches the teacher.
        input_ids: [N, T] int64.

    Returns:
        A scalar in nats per token, fp32 (fp64 for fp64 models); differentiable in the student's parameters.
    """
    with torch.no_grad():
        teacher_hidden = teacher.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
    hidden = student.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
    return divergence(student, hidden, teacher_hidden, logits_of(teacher))
