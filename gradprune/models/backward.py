"""How a backward pass is run: without autocast, attention adding in fixed order, float16 within its range."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gradprune.models.precision import products, set_products

_FLOAT16_SCALE = 2.0**12


def loss_scale(dtype: torch.dtype) -> float:
    """What a model's loss is multiplied by before the backward pass, and what is found is divided by: a power of two.

    float16 has no numbers below 6e-8, and few digits below 6e-5, where gradients of a mean over hundreds of tokens
    are; other types need no scale (Micikevicius et al. 2018, arXiv:1710.03740). It is the same for every batch, so that
    no result depends on what was computed before, and nothing waits for a GPU to tell whether it fits.
    """
    return _FLOAT16_SCALE if dtype == torch.float16 else 1.0


def backpropagated(losses: Tensor, dtype: torch.dtype) -> Tensor:
    """[], the sum of samples' losses [N] of a model of `dtype`, scaled for its backward pass."""
    total, scale = losses.sum(), loss_scale(dtype)
    return total if scale == 1.0 else total * scale


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Gradients are computed in the types of the forward pass.

    The threads of a backward pass on a GPU take over that autocast is on, but not the type it was given: they would
    convert bfloat16 gradients to float16, autocast's default.
    """
    with torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def deterministic_attention() -> Iterator[None]:
    """The backward pass of PyTorch's fused attention adds in fixed order: the same inputs give the same bits.

    On GPUs it does so only where deterministic algorithms are asked for, which for a whole model would refuse products
    too. So they are asked for while a fused attention's gradient is computed, and nowhere else; and cuDNN's attention,
    which has no such algorithm, is not chosen. Its products are exact in the backward pass, as they are in the forward
    pass inside `rounded_products`. The context has to be open in both; on exit the settings are as they were, whatever
    happened. Several may be open, and close in any order.
    """
    settings = _settings()
    _FIXED_ORDER.open()
    try:
        yield
    finally:
        _FIXED_ORDER.close()
        # A backward pass that raised inside an attention did not come to its end.
        _set(settings)


class _FixedOrder:
    """What is in the place of PyTorch's fused attention for as long as a context is open."""

    def __init__(self) -> None:
        self._contexts = 0

    def open(self) -> None:
        if not self._contexts:
            self._attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
            self._cudnn = torch.backends.cuda.cudnn_sdp_enabled()
            ALL_ATTENTION_FUNCTIONS["sdpa"] = _in_fixed_order(self._attention)
            torch.backends.cuda.enable_cudnn_sdp(False)
        self._contexts += 1

    def close(self) -> None:
        self._contexts -= 1
        if not self._contexts:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = self._attention
            torch.backends.cuda.enable_cudnn_sdp(self._cudnn)


_FIXED_ORDER = _FixedOrder()


def _in_fixed_order(attention: Callable[..., Any]) -> Callable[..., Any]:
    before: _Settings

    def begin(_gradients: Any) -> None:
        nonlocal before
        before = _settings()
        # Where a program set products by device, nothing could restore them.
        _set((*_DETERMINISTIC, before[-1] and "highest"))

    def end(_inputs: Any, _outputs: Any) -> None:
        _set(before)

    def forward(*args: Any, **kwargs: Any) -> Any:
        output, weights = attention(*args, **kwargs)
        node = _fused_attention(output)
        if node is not None:
            node.register_prehook(begin)
            node.register_hook(end)
        return output, weights

    return forward


def _fused_attention(output: Tensor) -> torch.autograd.graph.Node | None:
    """The node of fused attention that `output` comes from; only views of its result lie between. None if none does."""
    node = output.grad_fn
    while node is not None and "ScaledDotProduct" not in node.name():
        node = node.next_functions[0][0] if len(node.next_functions) == 1 else None
    return node


# Whether algorithms are to be deterministic, whether others only warn, whether new memory is filled; products.
_Settings = tuple[bool, bool, bool, str | None]
_DETERMINISTIC = (True, False, False)


def _settings() -> _Settings:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        products(),
    )


def _set(settings: _Settings) -> None:
    enabled, warn_only, fill, precision = settings
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
    set_products(precision)
