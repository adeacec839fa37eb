"""How a backward pass is run: without autocast, with attention adding in fixed order, with float16 kept in range."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gradprune.models.precision import products, set_products

_FLOAT16_SCALE = 2.0**12


def loss_scale(dtype: torch.dtype) -> float:
    """The power of two that a loss is multiplied by before the backward pass, and the results divided by after it.

    float16 has no numbers below 6e-8, and few digits below 6e-5, the range of gradients of a mean over hundreds of
    tokens; other types need no scale, 1 (Micikevicius et al. 2018, arXiv:1710.03740). It is the same for every batch,
    so that no result depends on earlier batches, and nothing waits for a GPU to report whether the scale fits.
    """
    return _FLOAT16_SCALE if dtype == torch.float16 else 1.0


def backpropagated(losses: Tensor, dtype: torch.dtype) -> Tensor:
    """The scalar to backpropagate: the sum of samples' losses [N], scaled for a model of `dtype`."""
    total, scale = losses.sum(), loss_scale(dtype)
    return total if scale == 1.0 else total * scale


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Turn autocast off for a backward pass, so that gradients are computed in the forward pass's types.

    The threads of a backward pass on a GPU inherit that autocast is on, but not its type: they would convert bfloat16
    gradients to float16, autocast's default.
    """
    with torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def deterministic_attention() -> Iterator[None]:
    """Make the backward pass of PyTorch's fused attention add in fixed order: the same inputs give the same bits.

    On GPUs PyTorch does so only while it is set to deterministic algorithms, a setting with which it would also refuse
    some of a model's matrix products. So this is set only while a fused attention's gradient is computed; and cuDNN's
    attention, which has no deterministic algorithm, is not used. The factors of attention's products are not rounded in
    the backward pass, nor does `rounded_products` round them in the forward pass. The context has to be open in both
    passes; on exit the settings are restored, after an exception, too. Several contexts may be open at the same time,
    and may be closed in any order.
    """
    settings = _settings()
    _FIXED_ORDER.open()
    try:
        yield
    finally:
        _FIXED_ORDER.close()
        # If a backward pass raised an exception inside attention, `end` has not restored them.
        _set(settings)


class _FixedOrder:
    """Replaces PyTorch's fused attention by one that adds in fixed order while any context is open; counts contexts."""

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
        # If a program has set the precision of products by device (None), it could not be restored, so it is left.
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
    """The fused attention's node in the graph of `output`, which is a view of its result; None if there is none."""
    node = output.grad_fn
    while node is not None and "ScaledDotProduct" not in node.name():
        node = node.next_functions[0][0] if len(node.next_functions) == 1 else None
    return node


# Whether algorithms have to be deterministic, whether others only cause a warning, whether new memory is filled, and
# the precision of products, see `products`.
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
