"""Access to the extension `gradprune._C`, and the checks and conversions of arguments for the C++ and CUDA ops."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from gradprune.errors import BackendUnavailableError

ISAS = ("auto", "scalar", "avx2", "avx512")


@cache
def require_extension(isa: str = "auto") -> None:
    """Check that the extension can be imported and that this CPU can run `isa`, or raise.

    Raises:
        BackendUnavailableError: the extension is not built, or the CPU lacks `isa`.
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
    """Return the extension's code for an element type that `check_tensor` accepts."""
    from gradprune import _C

    codes: dict[torch.dtype, int] = {
        torch.float32: _C.FLOAT32,
        torch.bfloat16: _C.BFLOAT16,
        torch.float16: _C.FLOAT16,
        torch.float64: _C.FLOAT64,
    }
    return codes[dtype]


def check_tensor(name: str, tensor: Tensor, device: str = "cpu") -> Tensor:
    """Return `tensor`, detached, if the extension's ops for `device` can read it.

    Raises:
        ValueError: it is not a strided tensor of fp32, bf16, fp16 or fp64 on `device`; the message calls it `name`.
    """
    if tensor.device.type != device or tensor.layout != torch.strided:
        ops, where = ("CUDA", "CUDA") if device == "cuda" else ("C++", "CPU")
        raise ValueError(
            f"{name}: is {tensor.layout} on {tensor.device}; the {ops} ops work on strided {where} tensors"
        )
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"{name}: dtype {tensor.dtype} is not one of float32, bfloat16, float16, float64")
    return tensor.detach()


def check_grads(grads: Sequence[Tensor], device: str = "cpu") -> list[Tensor]:
    """Return the gradients, detached; see `check_tensor` for errors."""
    return [check_tensor(f"grads[{k}]", grad, device) for k, grad in enumerate(grads)]


def check_scaling(grads: Sequence[Tensor], scales: Sequence[float], device: str = "cpu") -> list[Tensor]:
    """Return the gradients, detached, if they can be scaled in place.

    Raises:
        ValueError: a gradient overlaps itself or the lengths differ; see also `check_tensor`.
    """
    if len(grads) != len(scales):
        raise ValueError(f"scales: has {len(scales)} entries for {len(grads)} gradients; one for each is needed")
    checked = check_grads(grads, device)
    for k, grad in enumerate(checked):
        # Contiguity is tested first, because that test is quick and nearly always true.
        if not grad.is_contiguous() and any(
            stride == 0 and size > 1 for size, stride in zip(grad.shape, grad.stride(), strict=True)
        ):
            raise ValueError(f"grads[{k}]: is expanded, so its elements share memory; pass a clone")
    return checked


def finish_scaling(grads: Sequence[Tensor], scaled: Sequence[Tensor], scales: Sequence[float]) -> None:
    """Copy back the gradients that were scaled in a copy, and tell autograd that all were changed in place."""
    for grad, dense_grad, scale in zip(grads, scaled, scales, strict=True):
        if scale == 1.0:
            continue
        if grad.data_ptr() != dense_grad.data_ptr():
            grad.copy_(dense_grad)
        torch.autograd.graph.increment_version(grad)


def dense(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return each tensor itself if its memory has no gaps (in any order of its dimensions), else a contiguous copy."""
    return [tensor if _is_dense(tensor) else tensor.contiguous() for tensor in tensors]


def _is_dense(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return True
    sizes = [(stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    expected = 1
    for stride, size in sorted(sizes):
        if stride != expected:
            return False
        expected *= size
    return True
