"""The importance and gradient ops as C++ kernels of the extension, for CPU tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradprune.accumulation import accumulation_dtype
from gradprune.ops.extension import (
    check_grads,
    check_scaling,
    check_tensor,
    dense,
    dtype_code,
    finish_scaling,
    require_extension,
)
from gradprune.ops.removals import Removals, cheapest_removals_reference, check_removals
from gradprune.ops.vectors import (
    GradientStatistics,
    GroupedVectors,
    ImportanceVectors,
    MaskGradient,
    Side,
    check_grouped,
    sides,
)


def taylor_score_cpp(w: Tensor, g: Tensor, side: Side = "both", isa: str = "auto") -> ImportanceVectors:
    """Compute row and column sums of |w g| and w^2 g^2, and the statistics of g, reading each matrix once.

    Args:
        w: [O, I] CPU tensor, fp32, bf16, fp16 or fp64, the weight.
        g: [O, I] CPU tensor of any of these types, the gradient of w. If exactly one of w and g is fp64, it is
            converted to fp32 first. A tensor whose rows are not contiguous is copied.
        side: which sums to compute.
        isa: instruction set, "auto" or one of `_C.build_info()["isas"]`. Their results differ by rounding.

    Within tiles of at most 120 rows and 4096 columns sums are accumulated in fp32, and across tiles in fp64 (fp64
    throughout if both tensors are fp64). Deterministic: the bits depend neither on the number of threads nor on whether
    one side or both are computed. The calling thread keeps the memory for the tiles' sums for its next call: at most
    1/60 of the size of w in fp32.

    Raises:
        BackendUnavailableError: the extension is not built, or the CPU lacks `isa`.
        ValueError: a tensor is not a floating-point CPU matrix, or the shapes differ; the message names the tensor.
    """
    w, g = check_tensor("w", w), check_tensor("g", g)
    if w.ndim != 2:
        raise ValueError(f"w: has shape {tuple(w.shape)}; a matrix [O, I] is needed")
    if g.shape != w.shape:
        raise ValueError(f"g: has shape {tuple(g.shape)}; w has {tuple(w.shape)}, and both must be the same")
    dtype = accumulation_dtype(w, g)
    if (w.dtype == torch.float64) != (g.dtype == torch.float64):
        w, g = w.to(torch.float32), g.to(torch.float32)
    w, g = _unit_stride(w), _unit_stride(g)
    require_extension(isa)
    from gradprune import _C

    vectors, addresses = _outputs(w, dtype, side)
    _C.taylor_score(_matrix(w), _matrix(g), w.shape[0], w.shape[1], side, addresses, torch.get_num_threads(), isa)
    return vectors


def linear_importance_cpp(
    x: Tensor, dy: Tensor, w: Tensor, side: Side = "both", isa: str = "auto"
) -> ImportanceVectors:
    """Compute `taylor_score` of each sample's weight gradient g_n = dy_n^T x_n, and sum the results over samples.

    Args:
        x: [N, T, I] CPU tensor, fp32, bf16, fp16 or fp64, the layer's input.
        dy: [N, T, O] CPU tensor of any of these types, the gradient of each sample's loss with respect to the output.
        w: [O, I] CPU tensor of any of these types, the weight. Unless all three tensors are fp64, any fp64 tensor is
            converted to fp32 first. A tensor whose last dimension is not contiguous is copied.
        side: which sums to compute.
        isa: see `taylor_score_cpp`.

    The gradient is computed in fp32 (fp64 if all tensors are fp64), one tile at a time, and scored while the tile is in
    the cache of the core that computed it. Takes the memory of a copy of one sample's x and dy. Sums over tiles and
    samples are accumulated in fp64. Deterministic: the bits depend neither on the number of threads nor on whether one
    side or both are computed.

    Raises:
        BackendUnavailableError: the extension is not built, or the CPU lacks `isa`.
        ValueError: a tensor is not a floating-point CPU tensor, or the shapes do not fit; the message names the tensor.
    """
    x, dy, w = check_tensor("x", x), check_tensor("dy", dy), check_tensor("w", w)
    _check_linear_shapes(x, dy, w)
    require_extension(isa)
    from gradprune import _C

    x, dy, w, dtype = _readable(x, dy, w)
    vectors, addresses = _outputs(w, dtype, side)
    sizes = (x.shape[0], x.shape[1], w.shape[0], w.shape[1])
    _C.linear_importance(
        _activations(x), _activations(dy), _matrix(w), sizes, side, addresses, torch.get_num_threads(), isa
    )
    return vectors


def grouped_linear_importance_cpp(
    x: Tensor, dy: Tensor, w: Tensor, offsets: Tensor, side: Side = "both", isa: str = "auto"
) -> GroupedVectors:
    """Compute `linear_importance` of each expert's weight on the tokens that the expert sees, a ragged batch.

    Args:
        x: [R, I] CPU tensor, fp32, bf16, fp16 or fp64, the inputs, ordered by expert and then by sample.
        dy: [R, O] CPU tensor of any of these types, the gradient of each sample's loss with respect to the outputs.
        w: [E, O, I] CPU tensor of any of these types, the weights. Types and strides are treated as by
            `linear_importance_cpp`.
        offsets: [E * N + 1] int64, the row at which each sample's rows of each expert begin, and the end of the last.
        side: which sums to compute.
        isa: see `taylor_score_cpp`.

    One call serves all experts. Accumulates as `linear_importance_cpp` does, and is as deterministic.

    Raises:
        BackendUnavailableError: the extension is not built, or the CPU lacks `isa`.
        ValueError: a tensor is not a floating-point CPU tensor, the shapes do not fit, or the offsets descend.
    """
    x, dy, w = check_tensor("x", x), check_tensor("dy", dy), check_tensor("w", w)
    samples = check_grouped(x, dy, w, offsets)
    ends = offsets.tolist()
    if ends[-1] > len(x):
        raise ValueError(f"offsets: the last is {ends[-1]}, but x has {len(x)} rows")
    require_extension(isa)
    from gradprune import _C

    x, dy, w, dtype = _readable(x, dy, w)
    experts, outputs, inputs = w.shape
    rows, columns = (
        w.new_empty((experts, 2, length), dtype=dtype) if asked else None
        for length, asked in zip((outputs, inputs), sides(side), strict=True)
    )
    statistics = w.new_empty((experts, 5), dtype=dtype)
    firsts = [sums[:1, k] if sums is not None else None for sums in (rows, columns) for k in range(2)]
    addresses = [0 if first is None else first.data_ptr() for first in (*firsts, statistics)]
    weights = (w.data_ptr(), w.stride(1), dtype_code(w.dtype))
    _C.grouped_linear_importance(
        _activations(x[None]), _activations(dy[None]), weights, w.stride(0), ends, (experts, samples, outputs, inputs),
        side, addresses, torch.get_num_threads(), isa,
    )  # fmt: skip
    return GroupedVectors(rows, columns, GradientStatistics.unpack(statistics))


def mask_gradient_cpp(x: Tensor, dx: Tensor, isa: str = "auto") -> MaskGradient:
    """Compute each sample's gradient of a mask on a linear layer's input columns, and the input's sums of squares.

    Args:
        x: [N, T, I] CPU tensor, fp32, bf16, fp16 or fp64, the layer's input.
        dx: [N, T, I] CPU tensor of any of these types, the gradient of each sample's loss with respect to x. If the
            types differ, both are converted to fp32 first. A tensor whose last dimension is not contiguous is copied.
        isa: see `taylor_score_cpp`.

    Up to 128 tokens are summed in fp32, and these sums in fp64 (fp64 throughout if both tensors are fp64).
    Deterministic: the bits do not depend on the number of threads.

    Raises:
        BackendUnavailableError: the extension is not built, or the CPU lacks `isa`.
        ValueError: a tensor is not a floating-point CPU tensor [N, T, I], or the shapes differ; the message names the
            tensor.
    """
    x, dx = check_tensor("x", x), check_tensor("dx", dx)
    for name, tensor in (("x", x), ("dx", dx)):
        if tensor.ndim != 3 or tensor.shape != x.shape:
            raise ValueError(f"{name}: has shape {tuple(tensor.shape)}; x and dx must have one shape [N, T, I]")
    if x.dtype != dx.dtype:
        x, dx = x.to(torch.float32), dx.to(torch.float32)
    x, dx = _unit_stride(x), _unit_stride(dx)
    require_extension(isa)
    from gradprune import _C

    samples, tokens, width = x.shape
    dtype = accumulation_dtype(x)
    gradient, square = x.new_empty((2, samples, width), dtype=dtype).unbind()
    addresses = (gradient.data_ptr(), square.data_ptr())
    sizes = (samples, tokens, width)
    _C.mask_gradient(_activations(x), _activations(dx), sizes, addresses, torch.get_num_threads(), isa)
    return MaskGradient(gradient, square)


def cheapest_removals_cpp(inverse: Tensor, gram: Tensor, columns: int, count: int, isa: str = "auto") -> Removals:
    """Remove the cheapest group of columns `count` times, see `gradprune.ops.removals`.

    Args:
        inverse: [k * c, k * c] fp64 CPU tensor, A^-1, positive definite.
        gram: [k * c, k * c] fp64 CPU tensor, M. A matrix whose rows are not contiguous is copied.
        columns: c, the number of columns of each group. If it is above 1, the reference runs instead: such groups are
            few, and it removes them by matrix products.
        count: number of groups to remove, 0 to k.
        isa: see `taylor_score_cpp`.

    Uses one thread. Deterministic; ties are broken by the lower index. The calling thread keeps about 16 * count * k
    bytes for its next call.

    Raises:
        BackendUnavailableError: the extension is not built, or the CPU lacks `isa`.
        ValueError: the arguments do not fit; the message names the argument.
    """
    groups = check_removals(inverse, gram, columns, count)
    inverse, gram = check_tensor("inverse", inverse), check_tensor("gram", gram)
    require_extension(isa)
    if columns > 1:
        return cheapest_removals_reference(inverse, gram, columns, count)
    from gradprune import _C

    inverse, gram = _unit_stride(inverse), _unit_stride(gram)
    found = Removals(torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.float64))
    addresses = (found.taken.data_ptr(), found.costs.data_ptr())
    inputs = ((inverse.data_ptr(), inverse.stride(0)), (gram.data_ptr(), gram.stride(0)))
    _C.cheapest_removals(*inputs, groups, count, addresses, isa)
    return found


def _outputs(w: Tensor, dtype: torch.dtype, side: Side) -> tuple[ImportanceVectors, list[int]]:
    """Allocate the results for a weight [O, I]; return them and their addresses, 0 for a side that is not computed."""
    rows, columns = (
        w.new_empty((2, length), dtype=dtype) if asked else None
        for length, asked in zip(w.shape, sides(side), strict=True)
    )
    statistics = w.new_empty(5, dtype=dtype)
    vectors = [vector for sums in (rows, columns) for vector in ((None, None) if sums is None else sums.unbind())]
    addresses = [0 if vector is None else vector.data_ptr() for vector in (*vectors, statistics)]
    return ImportanceVectors(rows, columns, GradientStatistics.unpack(statistics)), addresses


def _matrix(matrix: Tensor) -> tuple[int, int, int]:
    return matrix.data_ptr(), matrix.stride(0), dtype_code(matrix.dtype)


def _activations(tensor: Tensor) -> tuple[int, int, int, int]:
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1), dtype_code(tensor.dtype)


def _check_linear_shapes(x: Tensor, dy: Tensor, w: Tensor) -> None:
    if w.ndim != 2:
        raise ValueError(f"w: has shape {tuple(w.shape)}; a matrix [O, I] is needed")
    if x.ndim != 3 or x.shape[2] != w.shape[1]:
        raise ValueError(f"x: has shape {tuple(x.shape)}; [N, T, {w.shape[1]}] is needed, for w {tuple(w.shape)}")
    if dy.shape != (*x.shape[:2], w.shape[0]):
        raise ValueError(f"dy: has shape {tuple(dy.shape)}; {(*x.shape[:2], w.shape[0])} is needed")


def _readable(x: Tensor, dy: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
    """Return tensors that the extension can read, copies where needed, and the dtype of the results."""
    dtype = accumulation_dtype(x, dy, w)
    if dtype == torch.float32:
        x, dy, w = (t.to(dtype) if t.dtype == torch.float64 else t for t in (x, dy, w))
    return _unit_stride(x), _unit_stride(dy), _unit_stride(w), dtype


def _unit_stride(tensor: Tensor) -> Tensor:
    """Return `tensor` itself if its last dimension is contiguous, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def grad_stats_cpp(grads: Sequence[Tensor], isa: str = "auto") -> GradientStatistics[Tensor]:
    """Compute the statistics of each gradient, in one call that reads every element once.

    Args:
        grads: K CPU tensors of any shape and strides, fp32, bf16, fp16 or fp64. A tensor with gaps in its memory is
            copied.
        isa: instruction set, "auto" or one of `_C.build_info()["isas"]`.

    Returns:
        Statistics with fields [K] fp64. Each run of 4096 elements is summed in fp32 (fp64 for fp64 gradients), and
        these sums in fp64. The bits do not depend on the number of threads.

    Raises:
        BackendUnavailableError: the extension is not built, or the CPU lacks `isa`.
        ValueError: a gradient is not a floating-point CPU tensor; the message names it.
    """
    require_extension(isa)
    from gradprune import _C

    # This local variable keeps the copies alive until the call returns.
    grads = dense(check_grads(grads))
    out = torch.empty(len(grads), 5, dtype=torch.float64)
    _C.grad_stats(_table(grads), out.data_ptr(), torch.get_num_threads(), isa)
    return GradientStatistics.unpack(out)


def scale_gradients_cpp(grads: Sequence[Tensor], scales: Sequence[float], isa: str = "auto") -> None:
    """Multiply grads[k] by scales[k] in place, for all k in one call.

    Args:
        grads: K CPU tensors of any shape and strides, fp32, bf16, fp16 or fp64, that share no memory. A tensor with
            gaps in its memory is scaled in a copy and copied back.
        scales: K numbers. A gradient whose scale is 1 is not touched.
        isa: instruction set, "auto" or one of `_C.build_info()["isas"]`.

    The product is computed in fp32 with the scale in fp32 (both fp64 for fp64 gradients), then rounded to nearest even.
    This gives the same bits as `grad.mul_(scale)`, for any number of threads.

    Raises:
        BackendUnavailableError: the extension is not built, or the CPU lacks `isa`.
        ValueError: a gradient is not a floating-point CPU tensor or overlaps itself, or the lengths differ.
    """
    require_extension(isa)
    from gradprune import _C

    checked = check_scaling(grads, scales)
    scaled = dense(checked)
    _C.scale_gradients(_table(scaled), [float(scale) for scale in scales], torch.get_num_threads(), isa)
    finish_scaling(checked, scaled, scales)


def _table(tensors: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    codes = {dtype: dtype_code(dtype) for dtype in {tensor.dtype for tensor in tensors}}
    return [(tensor.data_ptr(), tensor.numel(), codes[tensor.dtype]) for tensor in tensors]
