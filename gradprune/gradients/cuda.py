"""The gradient ops in CUDA, for tensors on a GPU: one launch for all gradients, nothing copied to the host."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from gradprune.errors import BackendUnavailableError
from gradprune.gradients.cpp import dense, dtype_code

# Long enough that a run's overhead vanishes, short enough that one large tensor keeps every processor busy.
RUN_ELEMENTS = 65536
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def grad_stats_cuda(grads: Sequence[Tensor]) -> Tensor:
    """Statistics of each gradient, all of them in one launch that reads every element once.

    Args:
        grads: K tensors of any shape and strides on one CUDA device, fp32, bf16, fp16 or fp64. One that does not fill
            its memory without gaps is copied.

    Returns:
        [K, 5] fp64 on the device, as `grad_stats_cpp`. Sums of 256 elements in fp32 (fp64 for fp64), over those in
        fp64, in fixed order: the same bits every time.

    Raises:
        BackendUnavailableError: the extension was built without CUDA.
        ValueError: a gradient is not a floating-point tensor on the first one's device; names it.
    """
    extension = _extension()
    checked = [dense(tensor) for tensor in _checked(grads)]
    out = torch.empty(len(checked), 5, dtype=torch.float64, device=checked[0].device)
    table, first_run = run_table(checked)
    with torch.cuda.device(out.device):
        runs, offsets = table.to(out.device), first_run.to(out.device)
        parts = torch.empty(len(table), 5, dtype=torch.float64, device=out.device)
        extension.grad_stats_cuda(
            runs.data_ptr(),
            len(table),
            offsets.data_ptr(),
            len(checked),
            parts.data_ptr(),
            out.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )
    return out


def scale_gradients_cuda(grads: Sequence[Tensor], scales: Sequence[float]) -> None:
    """grads[k] <- grads[k] * scales[k], in place, all of them in one launch.

    Args:
        grads: K tensors of any shape and strides on one CUDA device, fp32, bf16, fp16 or fp64, that share no memory.
            One that does not fill its memory without gaps goes through a copy.
        scales: K numbers. A gradient whose scale is 1 is not touched.

    The product is formed in fp32 with the scale in fp32 (fp64 for fp64), then rounded to nearest even.

    Raises:
        BackendUnavailableError: the extension was built without CUDA.
        ValueError: a gradient is not a floating-point tensor on the first one's device; names it.
    """
    extension = _extension()
    checked = _checked(grads)
    packed = [dense(tensor) for tensor in checked]
    table, _ = run_table(packed)
    device = checked[0].device
    with torch.cuda.device(device):
        runs = table.to(device)
        factors = torch.tensor([float(scale) for scale in scales], dtype=torch.float64).to(device)
        extension.scale_gradients_cuda(
            runs.data_ptr(), len(table), factors.data_ptr(), torch.cuda.current_stream().cuda_stream
        )
    for grad, scaled, scale in zip(checked, packed, scales, strict=True):
        if scale == 1.0:
            continue
        if grad.data_ptr() != scaled.data_ptr():
            grad.copy_(scaled)
        torch.autograd.graph.increment_version(grad)


def built_with_cuda() -> bool:
    """Whether the extension has the CUDA kernels."""
    try:
        from gradprune import _C
    except ImportError:
        return False
    return bool(_C.build_info()["cuda"])


def run_table(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The runs of gap-free tensors, [runs, 4] int64: address, elements, type, gradient; and [K + 1] each one's first.

    Runs are `RUN_ELEMENTS` long, whatever the device.
    """
    rows = [
        (
            tensor.data_ptr() + first * tensor.element_size(),
            min(RUN_ELEMENTS, tensor.numel() - first),
            dtype_code(tensor.dtype),
            k,
        )
        for k, tensor in enumerate(tensors)
        for first in range(0, tensor.numel(), RUN_ELEMENTS)
    ]
    counts = [-(-tensor.numel() // RUN_ELEMENTS) for tensor in tensors]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 4), torch.tensor([0, *accumulate(counts)])


def _checked(grads: Sequence[Tensor]) -> list[Tensor]:
    for k, grad in enumerate(grads):
        if not grad.is_cuda or grad.device != grads[0].device or grad.layout != torch.strided:
            raise ValueError(f"grads[{k}]: is {grad.layout} on {grad.device}; all must be strided on one CUDA device")
        if grad.dtype not in _DTYPES:
            raise ValueError(f"grads[{k}]: dtype {grad.dtype} is not one of float32, bfloat16, float16, float64")
        if any(stride == 0 and size > 1 for size, stride in zip(grad.shape, grad.stride(), strict=True)):
            raise ValueError(f"grads[{k}]: is expanded, its elements share memory; pass a clone")
    return [grad.detach() for grad in grads]


def _extension() -> Any:
    if not built_with_cuda():
        raise BackendUnavailableError("backend: 'cuda' cannot run: the extension was built without a CUDA compiler")
    from gradprune import _C

    return _C
