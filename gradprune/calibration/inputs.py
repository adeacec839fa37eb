"""Checks of an engine's inputs: the model must be a causal LM, and batches must be token ids."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradprune.errors import GradPruneError, UnsupportedArchitectureError


def check_model(model: PreTrainedModel) -> None:
    """Refuse a model without a language-model head.

    Raises:
        UnsupportedArchitectureError: the model is not a causal LM.
    """
    if model.get_output_embeddings() is None:
        raise UnsupportedArchitectureError(
            f"model: a {type(model).__name__} predicts no next token; load it with AutoModelForCausalLM"
        )


def on_device(input_ids: Tensor, device: torch.device) -> Tensor:
    """[N, T] int64: the ids on `device`, copied without waiting for the device."""
    ids = input_ids.to(torch.int64)
    if device.type == "cuda" and ids.device.type == "cpu":
        # A copy from pageable memory would wait until the GPU has finished the work queued before.
        ids = ids.pin_memory()
    return ids.to(device, non_blocking=True)


def check_ids(input_ids: Tensor, vocabulary: int) -> None:
    """Refuse anything except a batch of token ids: [N, T] int64 or int32, from 0 to `vocabulary` - 1.

    Raises:
        GradPruneError: `input_ids` is something else; says what it is, and what is needed.
    """
    if not isinstance(input_ids, Tensor):
        raise GradPruneError(
            f"input_ids: is a {type(input_ids).__name__}; a tensor [N, T] of token ids is needed "
            "(if it is a tokenizer's output, pass its input_ids as a tensor)"
        )
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise GradPruneError(f"input_ids: has dtype {input_ids.dtype}; token ids are int64 or int32")
    if input_ids.ndim != 2 or not len(input_ids) or input_ids.shape[1] < 2:
        raise GradPruneError(
            f"input_ids: has shape {tuple(input_ids.shape)}; [N, T] with at least one sample of two tokens is needed"
        )
    # On an accelerator, reading the ids' values would wait for the device.
    if input_ids.device.type == "cpu" and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocabulary:
        raise GradPruneError(
            f"input_ids: go from {int(input_ids.min())} to {int(input_ids.max())}; the model's vocabulary has ids "
            f"from 0 to {vocabulary - 1}"
        )
