"""The gradient ops as CUDA kernels: one launch for all gradients of a model, without waiting for the GPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradprune.errors import BackendUnavailableError
from gradprune.ops.backends import cuda_fault
from gradprune.ops.extension import check_grads, check_scaling, dense, dtype_code, finish_scaling
from gradprune.ops.vectors import GradientStatistics

# The length of the chunk that each thread block works on: long enough that the block's reduction costs little beside
# its loads, and short enough that the last blocks do not run alone for long. The chunks determine the order of
# summation, so their length is the same on every GPU.
CHUNK_ELEMENTS = 32768


def grad_stats_cuda(grads: Sequence[Tensor]) -> GradientStatistics[Tensor]:
    """Compute the statistics of each gradient: one launch reads every element once, a second one combines chunks.

    Args:
        grads: K tensors of any shape and strides on one CUDA device, fp32, bf16, fp16 or fp64. A tensor with gaps
            in its memory is copied.

    Returns:
        Statistics with fields [K] fp64 on that device, which may not be computed yet. Each thread sums 128 elements in
        fp32 (fp64 for fp64 gradients), and these sums are added in fp64. Deterministic: the same bits at any alignment
        and on any GPU.

    Raises:
        BackendUnavailableError: the extension is not built with CUDA, or cannot run on this GPU.
        ValueError: a gradient is not a floating-point CUDA tensor, or is not on the device of the first gradient; the
            message names it.
    """
    _require_cuda()
    from gradprune import _C

    checked = check_grads(grads, "cuda")
    if not checked:
        return GradientStatistics.unpack(torch.empty(0, 5, dtype=torch.float64, device="cuda"))
    device = _common_device(checked)
    with torch.cuda.device(device):
        tensors = dense(checked)
        rows, first = chunk_rows(tensors)
        chunks, first_chunks = _to_device(rows, first, device)
        of_chunks = torch.empty(len(rows), 5, dtype=torch.float64, device=device)
        out = torch.empty(len(tensors), 5, dtype=torch.float64, device=device)
        _C.grad_stats_cuda(
            (chunks.data_ptr(), len(rows)), first_chunks.data_ptr(), len(tensors), of_chunks.data_ptr(), out.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    return GradientStatistics.unpack(out)


def scale_gradients_cuda(grads: Sequence[Tensor], scales: Sequence[float]) -> None:
    """Multiply grads[k] by scales[k] in place, for all k in one launch, without waiting for the GPU.

    Args:
        grads: K tensors of any shape and strides on one CUDA device, fp32, bf16, fp16 or fp64, that share no memory.
            A tensor with gaps in its memory is scaled in a copy and copied back.
        scales: K numbers. A gradient whose scale is 1 is not touched.

    The product is computed in fp32 with the scale in fp32 (both fp64 for fp64 gradients), then rounded to nearest even.
    This gives the same bits as `grad.mul_(scale)`.

    Raises:
        BackendUnavailableError: the extension is not built with CUDA, or cannot run on this GPU.
        ValueError: a gradient is not a floating-point CUDA tensor, is not on the device of the first gradient or
            overlaps itself, or the lengths differ.
    """
    _require_cuda()
    from gradprune import _C

    checked = check_scaling(grads, scales, "cuda")
    if not checked:
        return
    device = _common_device(checked)
    with torch.cuda.device(device):
        scaled = dense(checked)
        rows, _ = chunk_rows(scaled)
        # The fp64 scales are reinterpreted as int64, so that one copy transfers the table and the scales.
        factors = torch.tensor([float(scale) for scale in scales], dtype=torch.float64).view(torch.int64)
        chunks, device_scales = _to_device(rows, factors, device)
        _C.scale_gradients_cuda(
            (chunks.data_ptr(), len(rows)), device_scales.data_ptr(), torch.cuda.current_stream().cuda_stream
        )
        finish_scaling(checked, scaled, scales)


def chunk_rows(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Build the table of chunks that the kernels work through.

    Returns:
        The table, [chunks, 4] int64: each chunk's address, number of elements, element type code and tensor index. And
        [K + 1] int64: the row at which each tensor's chunks begin, and the number of rows.
    """
    codes = {dtype: dtype_code(dtype) for dtype in {tensor.dtype for tensor in tensors}}
    columns = [(t.data_ptr(), t.numel(), codes[t.dtype], t.element_size()) for t in tensors]
    address, elements, code, size = torch.tensor(columns, dtype=torch.int64).reshape(-1, 4).unbind(1)
    chunks = (elements + CHUNK_ELEMENTS - 1) // CHUNK_ELEMENTS
    first = torch.cat([chunks.new_zeros(1), chunks.cumsum(0)])
    index = torch.repeat_interleave(chunks)
    start = (torch.arange(len(index)) - first[index]) * CHUNK_ELEMENTS
    count = (elements[index] - start).clamp(max=CHUNK_ELEMENTS)
    return torch.stack([address[index] + start * size[index], count, code[index], index], 1), first


def _to_device(rows: Tensor, numbers: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Copy two int64 tensors to `device` in one transfer on the current stream; return them flat.

    The copy is from pinned memory, which PyTorch reuses only after the copies that read it have finished.
    """
    packed = torch.cat([rows.reshape(-1), numbers]).pin_memory().to(device, non_blocking=True)
    return packed[: rows.numel()], packed[rows.numel() :]


def _require_cuda() -> None:
    fault = cuda_fault("cuda")
    if fault is not None:
        raise BackendUnavailableError(f"backend: 'cuda' cannot run: {fault}")


def _common_device(grads: Sequence[Tensor]) -> torch.device:
    for k, grad in enumerate(grads):
        if grad.device != grads[0].device:
            raise ValueError(f"grads[{k}]: is on {grad.device}, grads[0] on {grads[0].device}; all must be on one")
    return grads[0].device
