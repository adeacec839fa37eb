"""What an engine is given: a causal LM, and batches of token ids."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradprune.errors import GradPruneError, UnsupportedArchitectureError


def check_model(model: PreTrainedModel) -> None:
    """Refuse a model that predicts no token.

    Raises:
        UnsupportedArchitectureError: it is no causal LM.
    """
    if model.get_output_embeddings() is None:
        raise UnsupportedArchitectureError(
            f"model: a {type(model).__name__} predicts no next token; load it with AutoModelForCausalLM"
        )


def on_device(input_ids: Tensor, device: torch.device) -> Tensor:
    """[N, T] int64 on `device`, without waiting for it."""
    ids = input_ids.to(torch.int64)
    if device.type == "cuda" and ids.device.type == "cpu":
        # A copy from pageable memory waits until the GPU has done what was queued before.
        ids = ids.pin_memory()
    return ids.to(device, non_blocking=True)


def check_ids(input_ids: Tensor, vocabulary: int) -> None:
    """Refuse anything but a batch of token ids.

    Raises:
        GradPruneError: saying what it is, and what is needed.
    """
    if not isinstance(input_ids, Tensor):
        raise GradPruneError(
            f"input_ids: is a {type(input_ids).__name__}; a tensor [N, T] of token ids is needed "
            "(of a tokenizer's output, its input_ids as a tensor)"
        )
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise GradPruneError(f"input_ids: has dtype {input_ids.dtype}; token ids are int64 or int32")
    if input_ids.ndim != 2 or not len(input_ids) or input_ids.shape[1] < 2:
        raise GradPruneError(
            f"input_ids: has shape {tuple(input_ids.shape)}; [N, T] with at least one sample of two tokens is needed"
        )
    # On an accelerator this would wait for it.
    if input_ids.device.type == "cpu" and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocabulary:
        raise GradPruneError(
            f"input_ids: go from {int(input_ids.min())} to {int(input_ids.max())}; the model's vocabulary has ids "
            f"from 0 to {vocabulary - 1}"
        )
