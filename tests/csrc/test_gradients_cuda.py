"""grad_stats and scale_gradients in CUDA, against sums in 80-bit floating point and against PyTorch's product.

On a GPU the kernels are tested. On any machine the functions that each of their threads runs are tested: they are
compiled for the host and called for one thread after the other. This checks which elements a thread processes, and its
arithmetic, but neither launches nor barriers.

Tolerance. A thread sums at most 128 elements in T, and everything else is summed in fp64. So a term passes through at
most L = min(n, 128) roundings of relative size u in T, one more if its square is rounded first, and 16 + n / 2^23 of
relative size 2^-53.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gradprune.ops.backends import cuda_fault
from gradprune.ops.cuda import CHUNK_ELEMENTS, chunk_rows, grad_stats_cuda, scale_gradients_cuda
from gradprune.ops.vectors import GradientStatistics
from helpers.cuda_compiler import nvcc

pytest.importorskip("gradprune._C", reason="the extension is not built")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [0, 1, 7, 8, 9, 63, 255, 256, 257, 2047, 2048, 2049, 8191, 8193, 32767, 32768, 32769, 70_001]


@dataclass(frozen=True)
class CudaOps:
    device: str
    grad_stats: Callable[[Sequence[Tensor]], GradientStatistics[Tensor]]
    scale_gradients: Callable[[Sequence[Tensor], Sequence[float]], None]


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> CudaOps:
    library = tmp_path_factory.mktemp("emulation") / "emulate_cuda.so"
    # A GPU traps on a misaligned access; the host does so only with these options.
    host_options = "-fPIC,-fsanitize=alignment,-fsanitize-undefined-trap-on-error"
    source = Path(__file__).with_name("emulate_cuda.cu")
    nvcc("-shared", "-Xcompiler", host_options, "-o", str(library), str(source))
    kernels = ctypes.CDLL(str(library))

    def address(tensor: Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(tensor.data_ptr())

    def grad_stats(grads: Sequence[Tensor]) -> GradientStatistics[Tensor]:
        rows, first = chunk_rows(grads)
        of_chunks, out = (
            torch.full((count, 5), float("nan"), dtype=torch.float64) for count in (len(rows), len(grads))
        )
        kernels.grad_stats(
            address(rows), ctypes.c_int64(len(rows)), address(first), ctypes.c_int64(len(grads)),
            address(of_chunks), address(out),
        )  # fmt: skip
        return GradientStatistics.unpack(out)

    def scale_gradients(grads: Sequence[Tensor], scales: Sequence[float]) -> None:
        rows, _ = chunk_rows(grads)
        factors = torch.tensor(scales, dtype=torch.float64)
        kernels.scale_gradients(address(rows), ctypes.c_int64(len(rows)), address(factors))

    return CudaOps("cpu", grad_stats, scale_gradients)


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def ops(request: pytest.FixtureRequest) -> CudaOps:
    if request.param == "emulated":
        found: CudaOps = request.getfixturevalue("emulation")
        return found
    _require_cuda_build()
    return CudaOps("cuda", grad_stats_cuda, scale_gradients_cuda)


def _require_cuda_build() -> None:
    fault = cuda_fault("cuda")
    if fault is not None:
        pytest.skip(f"the CUDA kernels are NOT tested here: {fault}")


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _misaligned(values: Tensor, elements: int) -> Tensor:
    """Copy `values` into memory that begins `elements` elements after the start of an allocation."""
    view = torch.empty(len(values) + elements, dtype=values.dtype, device=values.device)[elements:]
    return view.copy_(values)


def _assert_correct(found: GradientStatistics[float], g: Tensor) -> None:
    magnitude = np.abs(g.double().cpu().numpy().astype(np.longdouble)).reshape(-1)
    magnitude = magnitude[np.isfinite(magnitude)]
    unit = 2.0**-53 if g.dtype == torch.float64 else 2.0**-24
    bound = (min(g.numel(), 128) + 2) * unit + (g.numel() / 2**23 + 16) * 2.0**-53
    for value, exact in ((found.sum_abs, magnitude.sum()), (found.sum_square, (magnitude * magnitude).sum())):
        assert abs(value - exact) <= bound * exact
    assert found.max_abs == (magnitude.max() if magnitude.size else 0.0)
    assert found.min_abs == (magnitude.min() if magnitude.size else np.inf)
    assert found.non_finite == g.numel() - magnitude.size


def test_chunks_cover_every_element_once() -> None:
    tensors = [torch.empty(size, dtype=dtype) for size in SIZES for dtype in DTYPES]
    rows, first = chunk_rows(tensors)
    assert len(first) == len(tensors) + 1
    assert first[-1] == len(rows)
    for k, tensor in enumerate(tensors):
        at = tensor.data_ptr()
        for address, count, _, index in rows[first[k] : first[k + 1]].tolist():
            assert (address, index) == (at, k)
            assert 0 < count <= CHUNK_ELEMENTS
            at += count * tensor.element_size()
        assert at == tensor.data_ptr() + tensor.nbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3, 7])
def test_every_element_counts_once(ops: CudaOps, dtype: torch.dtype, offset: int) -> None:
    """Sums of small integers are exact in any order."""
    grads = [_misaligned((torch.arange(size) % 13 - 6).to(ops.device, dtype), offset) for size in SIZES]
    for found, grad in zip(ops.grad_stats(grads).to_list(), grads, strict=True):
        exact = grad.double().abs()
        assert (found.sum_abs, found.sum_square) == (exact.sum().item(), exact.square().sum().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_match_exact_sums(ops: CudaOps, dtype: torch.dtype) -> None:
    grads = [_random((size,), dtype, size).to(ops.device) for size in SIZES]
    found = ops.grad_stats(grads)
    assert found.pack().shape == (len(SIZES), 5)
    assert found.pack().dtype == torch.float64
    assert found.pack().device.type == ops.device
    for of_one, grad in zip(found.to_list(), grads, strict=True):
        _assert_correct(of_one, grad)


def test_alignment_changes_no_bit(ops: CudaOps) -> None:
    for dtype in DTYPES:
        g = _random((70_001,), dtype, 5).to(ops.device)
        g[40_000] = float("nan")
        first, *others = ops.grad_stats([_misaligned(g, offset) for offset in range(9)]).to_list()
        assert all(other == first for other in others)


def test_mixed_dtypes_in_one_launch(ops: CudaOps) -> None:
    grads = [_random((size,), dtype, 6).to(ops.device) for size in (70_001, 0, 5) for dtype in DTYPES]
    for of_one, grad in zip(ops.grad_stats(grads).to_list(), grads, strict=True):
        _assert_correct(of_one, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, 100, 32767, 32768, 69_999, 70_000])
def test_non_finite_elements(ops: CudaOps, place: int, dtype: torch.dtype) -> None:
    g = _random((70_001,), dtype, 2).to(ops.device)
    g[place] = float("nan")
    g[69_000], g[69_001] = float("inf"), float("-inf")
    infinities = torch.full((33,), float("inf"), dtype=dtype, device=ops.device)
    found = ops.grad_stats([g, g[:place], infinities]).to_list()
    _assert_correct(found[0], g)
    assert found[0].non_finite == 3
    _assert_correct(found[1], g[:place])
    assert found[2] == GradientStatistics(0.0, 0.0, 0.0, float("inf"), 33.0)


def test_finite_elements_whose_sum_overflows(ops: CudaOps) -> None:
    g = torch.full((100_000,), 3e38, device=ops.device)
    (found,) = ops.grad_stats([g]).to_list()
    assert found.sum_abs == pytest.approx(3e43, rel=1e-6)
    assert (found.max_abs, found.min_abs, found.non_finite) == (g[0].item(), g[0].item(), 0.0)


def test_only_empty_gradients(ops: CudaOps) -> None:
    found = ops.grad_stats([torch.empty(0, device=ops.device), torch.empty(3, 0, device=ops.device)])
    assert found.to_list() == [GradientStatistics(0.0, 0.0, 0.0, float("inf"), 0.0)] * 2
    ops.scale_gradients([torch.empty(0, device=ops.device)], [2.0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.3, -1.7, 0.0, 2.0**-12, 1e-4, 3e4])
def test_scales_as_pytorch_does(ops: CudaOps, scale: float, dtype: torch.dtype) -> None:
    grads = [_misaligned(_random((size,), dtype, size).to(ops.device), size % 5) for size in SIZES]
    expected = [grad * scale for grad in grads]
    ops.scale_gradients(grads, [scale] * len(grads))
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.3, 0.5, 2.0**-9, 1.25, 700.0])
def test_scales_every_half_precision_value(ops: CudaOps, scale: float, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(ops.device)
    found, expected = every.clone(), every * scale
    ops.scale_gradients([found], [scale])
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0.5), expected.nan_to_num(0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_nothing_beside_its_gradient(ops: CudaOps, dtype: torch.dtype) -> None:
    for size in (1, 2, 9, 63, 255, 2049, 32769):
        for offset in (16, 17, 19, 23):
            buffer = torch.full((size + 48,), 7.0, dtype=dtype, device=ops.device)
            ops.scale_gradients([buffer[offset : offset + size]], [2.0])
            expected = [7.0] * offset + [14.0] * size + [7.0] * (48 - offset)
            assert buffer.tolist() == expected


def test_each_gradient_has_its_own_scale(ops: CudaOps) -> None:
    grads = [torch.full((33_000,), 3.0, dtype=dtype, device=ops.device) for dtype in DTYPES for _ in range(2)]
    scales = [2.0**k for k in range(len(grads))]
    ops.scale_gradients(grads, scales)
    assert [set(grad.tolist()) for grad in grads] == [{3.0 * scale} for scale in scales]


def test_scale_1_touches_nothing(ops: CudaOps) -> None:
    """Even a signalling NaN keeps its bits; any product would make it quiet."""
    g = torch.full((100,), 0x7F800001, dtype=torch.int32, device=ops.device).view(torch.float32)
    ops.scale_gradients([g], [1.0])
    assert (g.view(torch.int32) == 0x7F800001).all()


@pytest.mark.gpu
def test_same_bits_over_repeats() -> None:
    _require_cuda_build()
    grads = [_random((size,), dtype, 4).cuda() for size in (1, 70_001, 3_000_001) for dtype in DTYPES]
    first = grad_stats_cuda(grads).pack()
    assert all(torch.equal(grad_stats_cuda(grads).pack(), first) for _ in range(250))
    expected = [grad * 0.3 for grad in grads]
    for _ in range(250):
        copies = [grad.clone() for grad in grads]
        scale_gradients_cuda(copies, [0.3] * len(copies))
        assert all(torch.equal(a, b) for a, b in zip(copies, expected, strict=True))


@pytest.mark.gpu
def test_strides() -> None:
    _require_cuda_build()
    base = _random((60, 90), torch.float32, 1).cuda()
    views = [base, base.T, base[::2, 1::3], base[:, :1].expand(60, 70), base[0, 0]]
    for of_one, grad in zip(grad_stats_cuda(views).to_list(), views, strict=True):
        _assert_correct(of_one, grad)
    for view in (lambda t: t.T, lambda t: t[::2, 1::3], lambda t: t[3]):
        found, expected = base.clone(), base.clone()
        scale_gradients_cuda([view(found)], [0.3])
        view(expected).mul_(0.3)
        assert torch.equal(found, expected)


@pytest.mark.gpu
def test_works_on_the_current_stream_without_waiting_for_it() -> None:
    """The ops follow a slow kernel; on another stream they would read the values from before it."""
    _require_cuda_build()
    stream = torch.cuda.Stream()
    for warm in (False, True):  # the first time loads kernels and allocates pinned memory, which may wait
        with torch.cuda.stream(stream):
            g = torch.zeros(1_000_000, device="cuda")
            torch.cuda._sleep(200_000_000)
            g.fill_(2.0)
            scale_gradients_cuda([g], [3.0])
            found = grad_stats_cuda([g])
            assert not warm or not stream.query()
        stream.synchronize()
        assert found.to_list() == [GradientStatistics(6e6, 36e6, 6.0, 6.0, 0.0)]


@pytest.mark.gpu
def test_writes_all_of_its_output_and_nothing_else() -> None:
    from gradprune import _C

    _require_cuda_build()
    grads = [_random((size,), torch.float32, 3).cuda() for size in (1, 70_001, 0)]
    rows, first = chunk_rows(grads)
    table, first = rows.cuda(), first.cuda()
    of_chunks, out = (torch.full((5 * n + 16,), 12345.0, dtype=torch.float64, device="cuda") for n in (len(rows), 3))
    of_chunks[8:-8] = out[8:-8] = float("nan")
    stream = torch.cuda.current_stream().cuda_stream
    _C.grad_stats_cuda(
        (table.data_ptr(), len(rows)), first.data_ptr(), 3, of_chunks[8:].data_ptr(), out[8:].data_ptr(), stream
    )
    assert torch.equal(out[8:-8].reshape(-1, 5), grad_stats_cuda(grads).pack())
    for buffer in (of_chunks, out):
        assert (buffer[:8] == 12345.0).all()
        assert (buffer[-8:] == 12345.0).all()


@pytest.mark.gpu
def test_autograd_sees_the_change() -> None:
    _require_cuda_build()
    parameter = torch.ones(4, requires_grad=True, device="cuda")
    squared = parameter.square().sum()
    scale_gradients_cuda([parameter], [2.0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


@pytest.mark.gpu
def test_refuses_what_it_cannot_read() -> None:
    _require_cuda_build()
    one = torch.ones(1, device="cuda")
    with pytest.raises(ValueError, match=r"grads\[1\]: is torch.strided on cpu; the CUDA ops"):
        grad_stats_cuda([one, torch.ones(1)])
    with pytest.raises(ValueError, match=r"grads\[0\]: dtype torch.int64"):
        scale_gradients_cuda([one.long()], [2.0])
    with pytest.raises(ValueError, match=r"grads\[0\]: is expanded"):
        scale_gradients_cuda([one.expand(3)], [2.0])
    with pytest.raises(ValueError, match="scales: has 1 entries for 2 gradients"):
        scale_gradients_cuda([one, one], [1.0])
    assert grad_stats_cuda([]).to_list() == []
