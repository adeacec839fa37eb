from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: its kernels are NOT tested here")

from gradprune.kernels import linear_importance as kernel
from gradprune.kernels.linear_importance import LinearImportanceConfig
from gradprune.ops.reference import linear_importance_reference
from gradprune.ops.triton import linear_importance_triton
from gradprune.ops.vectors import GradientStatistics
from helpers.devices import DEVICE, TRITON_TESTS

pytestmark = TRITON_TESTS
SMALL = LinearImportanceConfig(BLOCK_A=16, BLOCK_B=32, BLOCK_T=16, GROUP_A=2, num_warps=4)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# N, T, O, I: each in turn is 1, a block, one less and one more than a block, and several blocks.
SHAPES = [
    *((2, tokens, 18, 35) for tokens in (1, 15, 16, 17, 63)),
    *((2, 9, rows, 35) for rows in (1, 15, 16, 17, 63)),
    *((2, 9, 18, columns) for columns in (1, 31, 32, 33, 63, 64)),
    *((samples, 20, 49, 70) for samples in (1, 3)),
    (2, 16, 32, 64),
    (1, 1, 60, 127),
    (3, 63, 16, 24),
]
both_sides = pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])


def tensors(shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return random x [N, T, I], dy [N, T, O] and w [O, I]; `shape` is N, T, O, I."""
    samples, tokens, rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    shapes = (samples, tokens, columns), (samples, tokens, rows), (rows, columns)
    x, dy, w = (torch.randn(shape, generator=generator).to(dtype).to(DEVICE) for shape in shapes)
    return x, dy, w


def assert_equals_fp64(found: tuple[Tensor, Tensor], x: Tensor, dy: Tensor, w: Tensor, columns: bool) -> None:
    """Compare with sums over fp64 gradients; the tolerance bounds every rounding of the fp32 computation.

    A gradient is a sum of T products. Its error, `noise`, is at most T + 1 ulps of the sum of their magnitudes. The
    error of a sum of n such terms is at most their noise and n + 5 ulps of their magnitudes. An ulp is 2^-23, because
    tensor cores truncate.
    """
    sums, statistics = (part.double().cpu() for part in found)
    x, dy, w = (tensor.double().cpu() for tensor in (x, dy, w))
    ulp, count = 2.0**-23, x.shape[0] * max(*w.shape) + 5
    g = torch.einsum("nto,nti->noi", dy, x)
    noise = torch.einsum("nto,nti->noi", dy.abs(), x.abs()) * (x.shape[1] + 1) * ulp
    largest = g.abs() + noise
    terms = (((w * g).abs(), w.abs() * noise), ((w * g) ** 2, w**2 * (largest**2 - g**2)))
    summed = (0, 1 if columns else 2)
    for k, (term, error) in enumerate(terms):
        bound = (error + count * ulp * (term.abs() + error)).sum(summed)
        assert ((sums[k] - term.sum(summed)).abs() <= bound).all(), k
    every = g.numel() * ulp
    sum_abs, sum_square, max_abs, min_abs, bad = statistics
    assert (sum_abs - g.abs().sum()).abs() <= noise.sum() + every * largest.sum()
    assert (sum_square - g.square().sum()).abs() <= (largest**2 - g**2).sum() + every * largest.square().sum()
    assert (max_abs - g.abs().max()).abs() <= noise.max()
    assert (min_abs - g.abs().min()).abs() <= noise.max()
    assert bad == 0


@both_sides
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_fp64_on_awkward_shapes(shape: tuple[int, int, int, int], dtype: torch.dtype, columns: bool) -> None:
    x, dy, w = tensors(shape, dtype)
    assert_equals_fp64(kernel.linear_importance_triton(x, dy, w, columns, SMALL), x, dy, w, columns)


@both_sides
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 70, 33, 130), (2, 70, 160, 64)])
def test_the_shipped_configurations_equal_fp64(
    shape: tuple[int, int, int, int], dtype: torch.dtype, columns: bool
) -> None:
    x, dy, w = tensors(shape, dtype)
    assert_equals_fp64(kernel.linear_importance_triton(x, dy, w, columns), x, dy, w, columns)


@both_sides
@pytest.mark.parametrize("shape", [(3, 17, 24, 40), (2, 63, 16, 72), (1, 1, 8, 32)])
def test_descriptors_and_pointers_give_the_same_bits(
    shape: tuple[int, int, int, int], columns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles extend beyond the matrix, and tokens beyond a sample, where the next sample must not be read."""
    x, dy, w = tensors(shape, torch.float16)
    if not kernel.descriptors_work(x, dy, w):
        pytest.skip("this device has no tensor descriptors: they are NOT tested here")
    found = kernel.linear_importance_triton(x, dy, w, columns, SMALL)
    assert_equals_fp64(found, x, dy, w, columns)
    monkeypatch.setattr(kernel, "descriptors_work", lambda *_tensors: False)
    by_pointers = kernel.linear_importance_triton(x, dy, w, columns, SMALL)
    assert torch.equal(found[0], by_pointers[0])
    assert torch.equal(found[1], by_pointers[1])


def test_descriptors_are_used_only_where_the_hardware_can_read_them() -> None:
    aligned = torch.zeros(2, 4, 16, dtype=torch.float16)
    assert kernel.is_describable(aligned)
    assert kernel.is_describable(aligned[:, ::2])
    assert not kernel.is_describable(torch.zeros(2, 4, 12, dtype=torch.float16))  # rows of 24 bytes
    assert not kernel.is_describable(torch.zeros(2, 4, 24, dtype=torch.float16)[..., 4:20])  # begins at byte 8
    assert not kernel.is_describable(aligned[:1].expand(2, 4, 16))
    assert not kernel.is_describable(aligned[:0])


@both_sides
def test_memory_around_the_tensors_is_neither_read_nor_written(columns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs are surrounded by NaN; the scratch is NaN before the kernel runs, and surrounded by canaries."""
    buffers = []

    def guarded(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 64,), 12345.0, dtype=dtype, device=device)
        buffer[32 : 32 + size] = float("nan")
        buffers.append(buffer)
        return buffer[32 : 32 + size].view(shape)

    x, dy, w = tensors((2, 19, 21, 43), torch.float32)
    views = []
    for tensor in (x, dy, w):
        surrounded = torch.full([size + 9 for size in tensor.shape], float("nan"), device=DEVICE)
        view = surrounded[tuple(slice(4, 4 + size) for size in tensor.shape)]
        views.append(view.copy_(tensor))
    monkeypatch.setattr(torch, "empty", guarded)
    found = kernel.linear_importance_triton(*views, columns, SMALL)
    monkeypatch.undo()
    assert_equals_fp64(found, x, dy, w, columns)
    assert len(buffers) == 4  # partial and total sums and statistics
    assert all((buffer[:32] == 12345.0).all() and (buffer[-32:] == 12345.0).all() for buffer in buffers)


@both_sides
@pytest.mark.parametrize("workspace", [1, 2 * 4 * 2 * 24 * 3])
def test_a_small_workspace_only_changes_which_program_adds_the_samples(
    workspace: int, columns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program adds all five samples in turn, or two, of which the last program has only one."""
    x, dy, w = tensors((5, 9, 24, 40), torch.float32)
    monkeypatch.setattr(kernel, "WORKSPACE", workspace)
    in_turn = kernel.samples_in_turn(5, 2, 24)
    assert in_turn == {1: 5, 2 * 4 * 2 * 24 * 3: 2}[workspace]
    assert_equals_fp64(kernel.linear_importance_triton(x, dy, w, columns, SMALL), x, dy, w, columns)


def test_partial_sums_stay_within_the_workspace() -> None:
    """For Llama-3-405B's gate_proj and 128 samples they would be 6.5 GiB if each sample had partial sums of its own."""
    tiles_b, height = 16384 // 128, 53248
    in_turn = kernel.samples_in_turn(128, tiles_b, height)
    assert -(-128 // in_turn) * tiles_b * 2 * height * 4 <= max(kernel.WORKSPACE, tiles_b * 2 * height * 4)
    assert kernel.samples_in_turn(1, tiles_b, height) == 1
    assert kernel.samples_in_turn(2, 4, 4096) == 1


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[..., 3:20],
        lambda t: t[..., ::2, :],
        lambda t: t[..., 5:, 1:30],
        lambda t: t[..., ::2],
        lambda t: t.transpose(-2, -1).contiguous().transpose(-2, -1),
    ],
    ids=["columns", "every_second_row", "corner", "every_second_column", "transposed"],
)
def test_strided_and_transposed_inputs(view) -> None:
    x, dy, w = (view(torch.randn(size, generator=torch.Generator().manual_seed(1), device="cpu").to(DEVICE))
                for size in ((2, 31, 31), (2, 31, 31), (31, 31)))  # fmt: skip
    w = w[:1].expand(dy.shape[2], x.shape[2])  # rows that share their memory
    found = linear_importance_triton(x, dy, w)
    for side in ("rows", "columns"):
        sums = torch.stack([*found.sums(side)])
        assert_equals_fp64((sums, found.statistics.pack()), x, dy, w, side == "columns")


@both_sides
def test_samples_are_not_summed_before_they_are_scored(columns: bool) -> None:
    x, dy, w = tensors((1, 10, 18, 35), torch.float32)
    one, _ = kernel.linear_importance_triton(x, dy, w, columns, SMALL)
    opposite, _ = kernel.linear_importance_triton(x.repeat(2, 1, 1), torch.cat([dy, -dy]), w, columns, SMALL)
    torch.testing.assert_close(opposite, 2 * one, rtol=1e-6, atol=0.0)


@both_sides
def test_non_finite_gradients_are_counted_and_make_their_sums_non_finite(columns: bool) -> None:
    """One token of each sample makes only the element (row, column) overflow."""
    x, dy, w = tensors((3, 20, 20, 40), torch.float32)
    for sample, token, row, column, huge in ((0, 19, 3, 7, 1e30), (2, 0, 18, 39, -1e30), (1, 5, 3, 7, -1e30)):
        x[sample, token], dy[sample, token] = 0.0, 0.0
        x[sample, token, column], dy[sample, token, row] = abs(huge), huge
    sums, statistics = kernel.linear_importance_triton(x, dy, w, columns, SMALL)
    expected = linear_importance_reference(x, dy, w).statistics
    assert statistics[4] == 3
    torch.testing.assert_close(statistics, expected.pack(), rtol=1e-4, atol=0.0)
    for k in range(2):
        assert (~sums[k].isfinite()).nonzero().flatten().tolist() == ([7, 39] if columns else [3, 18])


@both_sides
def test_tiles_beyond_the_matrix_are_not_counted(columns: bool) -> None:
    """An infinite output gradient makes a row non-finite as far as the tile reaches, and a NaN input a column."""
    x, dy, w = tensors((2, 5, 20, 40), torch.float32)
    dy[0, 3, 19], x[1, 2, 39] = float("inf"), float("nan")
    sums, statistics = kernel.linear_importance_triton(x, dy, w, columns, SMALL)
    assert statistics[4] == 40 + 20
    expected = linear_importance_reference(x, dy, w).statistics
    torch.testing.assert_close(statistics, expected.pack(), rtol=1e-4, atol=0.0)
    assert not sums.isfinite().any()


def test_finite_elements_whose_sum_overflows_are_not_counted() -> None:
    """The sum is not finite, so the elements are examined again; all of them are finite."""
    x, dy, w = torch.full((1, 1, 40), 1e19), torch.full((1, 1, 20), 2e19), torch.ones(20, 40)
    _, statistics = kernel.linear_importance_triton(x.to(DEVICE), dy.to(DEVICE), w.to(DEVICE), False, SMALL)
    assert statistics[0] == float("inf")
    assert statistics[2:].tolist() == pytest.approx([2e38, 2e38, 0.0], rel=1e-6)


@both_sides
def test_uncounted_elements_make_the_sums_non_finite_and_nothing_else_differs(columns: bool) -> None:
    x, dy, w = tensors((2, 5, 20, 40), torch.float32)
    counted, uncounted = (
        kernel.linear_importance_triton(x, dy, w, columns, SMALL, counted=flag) for flag in (True, False)
    )
    assert all(map(torch.equal, counted, uncounted))
    x[1, 2, 39] = float("nan")
    sums, statistics = kernel.linear_importance_triton(x, dy, w, columns, SMALL, counted=False)
    assert torch.equal(sums.isfinite(), kernel.linear_importance_triton(x, dy, w, columns, SMALL)[0].isfinite())
    assert statistics[:2].isnan().all()
    assert statistics[4] == 0


@both_sides
@pytest.mark.parametrize("shape", [(3, 17, 24, 40), (2, 63, 16, 72), (1, 1, 8, 32), (5, 40, 200, 48)])
def test_persistent_programs_equal_fp64(shape: tuple[int, int, int, int], columns: bool) -> None:
    """With more tiles than programs, and with fewer; the bits are the same as with one program per tile."""
    x, dy, w = tensors(shape, torch.float16)
    if not kernel.descriptors_work(x, dy, w):
        pytest.skip("this device has no tensor descriptors: they are NOT tested here")
    config = replace(SMALL, persistent=True)
    found = kernel.linear_importance_triton(x, dy, w, columns, config)
    assert_equals_fp64(found, x, dy, w, columns)
    assert all(map(torch.equal, found, kernel.linear_importance_triton(x, dy, w, columns, SMALL)))


@both_sides
def test_the_same_bits_every_time(columns: bool) -> None:
    x, dy, w = tensors((3, 17, 20, 40), torch.bfloat16)
    first = kernel.linear_importance_triton(x, dy, w, columns, SMALL)
    for _ in range(2):
        again = kernel.linear_importance_triton(x, dy, w, columns, SMALL)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("descriptors", "from_registers"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("widths", [(4096, 4096), (4095, 4096)])
def test_a_choice_by_time_changes_no_bit(
    widths: tuple[int, int], descriptors: bool, from_registers: bool, dtype: torch.dtype
) -> None:
    """All configurations to choose from agree in everything that determines the order of summation."""
    configs = kernel.configs_for(*widths, dtype, descriptors, from_registers)
    assert len({(c.BLOCK_A, c.BLOCK_B, c.BLOCK_T, c.num_warps) for c in configs}) == 1


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 9), False), ((9, 0), False), ((10, 0), False), ((12, 0), True)]
)
def test_consumer_blackwell_multiplies_from_registers(
    capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert kernel.multiplies_from_registers(torch.device("cuda")) is expected
    assert not kernel.multiplies_from_registers(torch.device("cpu"))


@pytest.mark.parametrize("from_registers", [False, True])
def test_a_launch_chooses_among_the_configurations_for_its_device(
    from_registers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, dy, w = tensors((1, 4, 16, 32), torch.float16)
    if not kernel.descriptors_work(x, dy, w):
        pytest.skip("this device has no tensor descriptors: they are NOT tested here")
    offered: list[LinearImportanceConfig] = []
    monkeypatch.setattr(kernel, "multiplies_from_registers", lambda _device: from_registers)
    monkeypatch.setattr(kernel, "fastest", lambda configs, *_: offered.extend(configs) or configs[0])
    kernel.linear_importance_triton(x, dy, w, columns=False)
    assert [config.maxnreg for config in offered] == ([None] * 3 if from_registers else [128, 128, None])


@pytest.mark.parametrize("group", [1, 3, 8])
def test_the_order_of_tiles_changes_nothing(group: int) -> None:
    x, dy, w = tensors((1, 5, 80, 100), torch.float32)
    one, two = (kernel.linear_importance_triton(x, dy, w, False, replace(SMALL, GROUP_A=size)) for size in (2, group))
    assert torch.equal(one[0], two[0])


@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0)])
def test_empty_tensors(shape: tuple[int, int, int, int]) -> None:
    found = linear_importance_triton(*tensors(shape, torch.float32))
    assert found.row_abs.tolist() == [0.0] * shape[2]
    assert found.column_square.tolist() == [0.0] * shape[3]
    assert found.statistics.to_float() == GradientStatistics(0.0, 0.0, 0.0, float("inf"), 0.0)


def test_samples_without_tokens_have_zero_gradients() -> None:
    found = linear_importance_triton(*tensors((2, 0, 5, 6), torch.float32))
    assert found.row_abs.tolist() == [0.0] * 5
    assert found.statistics.to_float() == GradientStatistics(0.0, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float16), (torch.float16, torch.float32)])
def test_inputs_of_two_dtypes_are_multiplied_in_the_wider(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, dy, w = tensors((2, 5, 6, 7), torch.float32)
    x, dy, w = x.to(dtypes[0]), dy.to(dtypes[1]), w.bfloat16()
    found = linear_importance_triton(x, dy, w)
    expected = linear_importance_reference(x.double(), dy.double(), w.double())
    torch.testing.assert_close(found.row_abs.double(), expected.row_abs, rtol=1e-5, atol=0.0)


def test_wrong_arguments_are_named() -> None:
    x, dy, w = tensors((2, 3, 4, 5), torch.float32)
    with pytest.raises(ValueError, match=r"x: has shape \(3, 5\)"):
        linear_importance_triton(x[0], dy, w)
    with pytest.raises(ValueError, match=r"dy: has shape \(2, 2, 4\)"):
        linear_importance_triton(x, dy[:, 1:], w)
    with pytest.raises(ValueError, match=r"dy: has shape \(1, 3, 4\)"):
        linear_importance_triton(x, dy[1:], w)
    with pytest.raises(ValueError, match=r"w: has shape \(5, 4\); dy and x require \(4, 5\)"):
        linear_importance_triton(x, dy, w.T)
    with pytest.raises(ValueError, match=r"dy: dtype torch.float64"):
        linear_importance_triton(x, dy.double(), w)
