"""The gradient ops in C++, for CPU tensors, and the way to the extension that holds all C++ ops."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from gradprune.errors import BackendUnavailableError

ISAS = ("auto", "scalar", "avx2", "avx512")


def grad_stats_cpp(grads: Sequence[Tensor], isa: str = "auto") -> Tensor:
    """Statistics of each gradient, all of them in one call that reads every element once.

    Args:
        grads: K CPU tensors of any shape and strides, fp32, bf16, fp16 or fp64. One that does not fill its memory
            without gaps is copied.
        isa: instruction set, "auto" or one of `_C.build_info()["isas"]`.

    Returns:
        [K, 5] fp64: sum|g|, sum g^2, max|g|, min|g|, number of non-finite elements (which enter none of the other
        four). An empty gradient has max|g| = 0 and min|g| = inf. Sums of 4096 elements in fp32 (fp64 for fp64), over
        those in fp64. The same bits for any number of threads.

    Raises:
        BackendUnavailableError: the extension is not built, or the CPU lacks `isa`.
        ValueError: a gradient is not a floating-point CPU tensor; names it.
    """
    require_extension(isa)
    from gradprune import _C

    # Held here, so that copies live until the call returns.
    packed = [dense(check_tensor(f"grads[{k}]", grad)) for k, grad in enumerate(grads)]
    out = torch.empty(len(packed), 5, dtype=torch.float64)
    _C.grad_stats(_table(packed), out.data_ptr(), torch.get_num_threads(), isa)
    return out


def scale_gradients_cpp(grads: Sequence[Tensor], scales: Sequence[float], isa: str = "auto") -> None:
    """grads[k] <- grads[k] * scales[k], in place, all of them in one call.

    Args:
        grads: K CPU tensors of any shape and strides, fp32, bf16, fp16 or fp64, that share no memory. One that does
            not fill its memory without gaps goes through a copy.
        scales: K numbers. A gradient whose scale is 1 is not touched.
        isa: instruction set, "auto" or one of `_C.build_info()["isas"]`.

    The product is formed in fp32 with the scale in fp32 (fp64 for fp64), then rounded to nearest even: the same bits
    as `grad.mul_(scale)`, for any number of threads.

    Raises:
        BackendUnavailableError: the extension is not built, or the CPU lacks `isa`.
        ValueError: a gradient is not a floating-point CPU tensor, or overlaps itself, or the lengths differ.
    """
    if len(grads) != len(scales):
        raise ValueError(f"scales: has {len(scales)} entries for {len(grads)} gradients; one for each is needed")
    require_extension(isa)
    from gradprune import _C

    checked = [check_tensor(f"grads[{k}]", grad) for k, grad in enumerate(grads)]
    for k, grad in enumerate(checked):
        if any(stride == 0 and size > 1 for size, stride in zip(grad.shape, grad.stride(), strict=True)):
            raise ValueError(f"grads[{k}]: is expanded, its elements share memory; pass a clone")
    packed = [dense(grad) for grad in checked]
    _C.scale_gradients(_table(packed), [float(scale) for scale in scales], torch.get_num_threads(), isa)
    for grad, scaled, scale in zip(checked, packed, scales, strict=True):
        if scale == 1.0:
            continue
        if grad.data_ptr() != scaled.data_ptr():
            grad.copy_(scaled)
        # The version counter tells autograd of a change in place that it cannot see.
        torch.autograd.graph.increment_version(grad)


@cache
def require_extension(isa: str = "auto") -> None:
    """Do nothing if `from gradprune import _C` works and can run `isa`.

    Raises:
        BackendUnavailableError: it is not built, or the CPU lacks `isa`.
        ValueError: `isa` is not the name of an instruction set.
    """
    try:
        from gradprune import _C
    except ImportError as error:
        raise BackendUnavailableError(
            f"backend: 'cpp' cannot run: the extension gradprune._C does not import ({error}); "
            "reinstall gradprune with a C++ compiler"
        ) from error
    if isa not in ISAS:
        raise ValueError(f"isa: {isa!r} is none of {', '.join(ISAS)}")
    available = _C.build_info()["isas"]
    if isa != "auto" and isa not in available:
        raise BackendUnavailableError(f"isa: {isa!r} cannot run on this CPU; it has {', '.join(available)}")


@cache
def dtype_code(dtype: torch.dtype) -> int:
    """The extension's code of an element type that `check_tensor` lets through."""
    from gradprune import _C

    codes: dict[torch.dtype, int] = {
        torch.float32: _C.FLOAT32,
        torch.bfloat16: _C.BFLOAT16,
        torch.float16: _C.FLOAT16,
        torch.float64: _C.FLOAT64,
    }
    return codes[dtype]


def check_tensor(name: str, tensor: Tensor) -> Tensor:
    """`tensor` detached, if the C++ ops can read it.

    Raises:
        ValueError: it is not a dense CPU tensor of fp32, bf16, fp16 or fp64; names the argument.
    """
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise ValueError(f"{name}: is {tensor.layout} on {tensor.device}; the C++ ops work on strided CPU tensors")
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"{name}: dtype {tensor.dtype} is not one of float32, bfloat16, float16, float64")
    return tensor.detach()


def dense(tensor: Tensor) -> Tensor:
    """`tensor` itself if it fills its memory without gaps, in whatever order of dimensions; else a copy."""
    sizes = [(stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    expected = 1
    for stride, size in sorted(sizes):
        if stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor


def _table(tensors: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    codes = {dtype: dtype_code(dtype) for dtype in {tensor.dtype for tensor in tensors}}
    return [(tensor.data_ptr(), tensor.numel(), codes[tensor.dtype]) for tensor in tensors]
