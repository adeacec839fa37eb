"""`grouped_linear_importance` on ragged batches: each backend against fp64 gradients added up row by row."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gradprune.ops.cpp import grouped_linear_importance_cpp, linear_importance_cpp
from gradprune.ops.dispatch import grouped_linear_importance, linear_importance
from gradprune.ops.vectors import GradientStatistics, GroupedVectors, Side
from helpers.devices import require_backend

BACKENDS = ["reference", "cpp", "triton"]
# Rows of each sample, by expert: none for a sample, none for an expert, a single row, more than a block of tokens.
RAGGED = ((3, 0, 17), (0, 0, 0), (1, 0, 0), (70, 2, 1), (0, 33, 16))
UNIT = 2.0**-23


def operands(
    counts=RAGGED, outputs: int = 19, inputs: int = 37, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x [R, I], dy [R, O], w [E, O, I] and the offsets of `counts`, the numbers of rows by expert and sample."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.tensor(counts).flatten()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), flat.cumsum(0)])
    shapes = (int(flat.sum()), inputs), (int(flat.sum()), outputs), (len(counts), outputs, inputs)
    return *(torch.randn(shape, generator=generator).to(dtype) for shape in shapes), offsets


def gradients(x: Tensor, dy: Tensor, offsets: Tensor, experts: int) -> Tensor:
    """Return the gradients [E, N, O, I] in fp64, added up from the outer products of single rows."""
    samples = (len(offsets) - 1) // experts
    found = torch.zeros(experts * samples, dy.shape[1], x.shape[1], dtype=torch.float64)
    for segment in range(experts * samples):
        for row in range(int(offsets[segment]), int(offsets[segment + 1])):
            found[segment] += torch.outer(dy[row].double(), x[row].double())
    return found.view(experts, samples, dy.shape[1], x.shape[1])


def assert_equals_fp64(found: GroupedVectors, x: Tensor, dy: Tensor, w: Tensor, offsets: Tensor) -> None:
    """Allow r + 1 roundings of the summed magnitudes for a gradient of r rows, and for sums one more per term."""
    found = replace(found, statistics=GradientStatistics.unpack(found.statistics.pack().cpu()))
    g = gradients(x, dy, offsets, len(w))
    most = int(offsets.diff().max()) if len(offsets) > 1 else 0
    noise = gradients(x.abs(), dy.abs(), offsets, len(w)) * (most + 1) * UNIT
    terms = w.double()[:, None] * g, w.double().abs()[:, None] * noise
    for side, summed in (("rows", (1, 3)), ("columns", (1, 2))):
        if getattr(found, side) is None:
            continue
        for k, power in enumerate((1, 2)):
            exact = terms[0].abs() ** power
            error = (terms[0].abs() + terms[1]) ** power - exact
            bound = (error + (g.shape[1] * max(g.shape[2:]) + 5) * UNIT * (exact + error)).sum(summed)
            assert ((found.sums(side)[:, k].cpu().double() - exact.sum(summed)).abs() <= bound).all()
    statistics = found.statistics
    every = (noise + g.numel() * UNIT * g.abs()).sum((1, 2, 3))
    assert ((statistics.sum_abs.double() - g.abs().sum((1, 2, 3))).abs() <= every).all()
    largest, smallest = g.abs().amax((1, 2, 3)), g.abs().amin((1, 2, 3))
    assert ((statistics.max_abs.double() - largest).abs() <= noise.amax((1, 2, 3))).all()
    assert ((statistics.min_abs.double() - smallest).abs() <= noise.amax((1, 2, 3))).all()
    torch.testing.assert_close(statistics.sum_square.double(), g.square().sum((1, 2, 3)), rtol=1e-4, atol=0.0)
    assert not statistics.non_finite.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_fp64_on_ragged_tokens(backend: str, dtype: torch.dtype, device: str) -> None:
    require_backend(backend, device)
    given = operands(dtype=dtype)
    for side in ("rows", "columns", "both"):
        found = grouped_linear_importance(*(each.to(device) for each in given), side, backend)
        assert (found.rows is None) == (side == "columns")
        assert (found.columns is None) == (side == "rows")
        assert_equals_fp64(found, *given)


@pytest.mark.parametrize(
    ("counts", "outputs", "inputs"),
    [
        (((1,),), 1, 1),
        (((5, 6),), 130, 64),
        (((0, 4), (2, 2)), 16, 300),
        (((260, 1), (3, 0)), 5, 9),
        (((2,), (0,), (65,)), 121, 257),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_that_do_not_fill_tiles(backend: str, counts, outputs: int, inputs: int, device: str) -> None:
    require_backend(backend, device)
    given = operands(counts, outputs, inputs)
    assert_equals_fp64(grouped_linear_importance(*(each.to(device) for each in given), "both", backend), *given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_operands(backend: str, device: str) -> None:
    require_backend(backend, device)
    x, dy, w, offsets = operands()
    apart = torch.full((len(w), 2 * w.shape[1], w.shape[2] + 3), float("nan"))[:, ::2, 1:-2].copy_(w)
    wide = torch.full((len(x), x.shape[1] + 5), float("nan"))[:, 2:-3].copy_(x)
    turned = dy.T.contiguous().T
    found = grouped_linear_importance(*(each.to(device) for each in (wide, turned, apart, offsets)), "both", backend)
    assert_equals_fp64(found, x, dy, w, offsets)


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_may_be_strided(backend: str, device: str) -> None:
    require_backend(backend, device)
    x, dy, w, offsets = operands()
    apart = torch.stack([offsets, torch.full_like(offsets, len(x))], 1).to(device)[:, 0]
    found = grouped_linear_importance(x.to(device), dy.to(device), w.to(device), apart, "both", backend)
    assert_equals_fp64(found, x, dy, w, offsets)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_expert_with_equal_samples_is_linear_importance(backend: str, device: str) -> None:
    """Bit for bit except with Triton: the other backends add the same terms in the same order."""
    require_backend(backend, device)
    x, dy, w, offsets = (each.to(device) for each in operands(((7, 7, 7),), 130, 300))
    found = grouped_linear_importance(x, dy, w, offsets, "both", backend)
    expected = linear_importance(x.view(3, 7, -1), dy.view(3, 7, -1), w[0], "both", backend)
    exact = {"rtol": 0.0, "atol": 0.0} if backend != "triton" else {"rtol": 1e-5, "atol": 0.0}
    torch.testing.assert_close(found.rows[0], expected.rows, **exact)
    torch.testing.assert_close(found.columns[0], expected.columns, **exact)
    torch.testing.assert_close(found.statistics.pack()[0], expected.statistics.pack(), **(exact | {"atol": 1e-6}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_elements_are_counted_where_they_are(backend: str, device: str) -> None:
    require_backend(backend, device)
    x, dy, w, offsets = operands()
    x[1], dy[1] = 0.0, 0.0
    x[1, 7], dy[1, 3] = 1e30, 1e30  # expert 0's first sample: element (3, 7) overflows
    x, dy, w, offsets = (each.to(device) for each in (x, dy, w, offsets))
    found = grouped_linear_importance(x, dy, w, offsets, "both", backend)
    assert found.statistics.non_finite.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert found.statistics.pack()[:, :4].isfinite().all()
    assert (~found.rows.isfinite()).nonzero().tolist() == [[0, 0, 3], [0, 1, 3]]
    assert (~found.columns.isfinite()).nonzero().tolist() == [[0, 0, 7], [0, 1, 7]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_without_tokens_and_layers_without_any(backend: str, device: str) -> None:
    require_backend(backend, device)
    x, dy, w, offsets = (each.to(device) for each in operands(((0, 0), (0, 0))))
    found = grouped_linear_importance(x, dy, w, offsets, "both", backend)
    assert not found.rows.any()
    assert not found.columns.any()
    # Their gradients are zero, and count in the statistics.
    assert found.statistics.pack().tolist() == [[0.0] * 5] * 2


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_every_instruction_set_and_number_of_threads(isa: str, restore_threads: None) -> None:
    from gradprune import _C

    if isa not in _C.build_info()["isas"]:
        pytest.skip(f"this CPU has no {isa}")
    given = operands(((40, 0, 90), (300, 7, 5)), 150, 300, torch.float64)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(grouped_linear_importance_cpp(*given, "both", isa))
    assert torch.equal(found[0].rows, found[1].rows)
    assert torch.equal(found[0].columns, found[1].columns)
    assert found[0].rows.dtype == torch.float64
    x, dy, w, offsets = given
    for expert, weight in enumerate(w):
        ends = offsets[3 * expert : 3 * expert + 4].tolist()
        alone = [linear_importance_cpp(x[None, a:b], dy[None, a:b], weight) for a, b in itertools.pairwise(ends)]
        torch.testing.assert_close(found[0].rows[expert], sum(each.rows for each in alone), rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_arguments_are_named(backend: str, device: str) -> None:
    require_backend(backend, device)
    x, dy, w, offsets = (each.to(device) for each in operands())

    def refused(match: str, *arguments: Tensor, side: Side = "both") -> None:
        with pytest.raises(ValueError, match=match):
            grouped_linear_importance(*arguments, side, backend)

    refused(r"w: has shape \(19, 37\)", x, dy, w[0], offsets)
    refused(r"x: has shape \(143, 36\); \[R, 37\]", x[:, 1:], dy, w, offsets)
    refused(r"dy: has shape \(142, 19\)", x, dy[1:], w, offsets)
    refused(r"offsets: is torch.int64 \(15,\); int64 \[5 \* samples \+ 1\]", x, dy, w, offsets[1:])
    refused(r"offsets: is torch.int32", x, dy, w, offsets.int())
    refused("side: 'left'", x, dy, w, offsets, side="left")  # type: ignore[arg-type]


def test_offsets_that_descend_or_exceed_the_rows_are_refused() -> None:
    x, dy, w, offsets = operands()
    with pytest.raises(ValueError, match="offsets: must not descend"):
        grouped_linear_importance_cpp(x, dy, w, torch.cat([offsets[:3].flip(0), offsets[3:]]))
    with pytest.raises(ValueError, match="offsets: the last is 143, but x has 142 rows"):
        grouped_linear_importance_cpp(x[1:], dy[1:], w, offsets)


def test_the_same_bits_every_time(device: str) -> None:
    require_backend("triton", device)
    given = tuple(each.to(device) for each in operands(dtype=torch.bfloat16))
    first, again = (grouped_linear_importance(*given, "both", "triton") for _ in range(2))
    assert torch.equal(first.rows, again.rows)
    assert torch.equal(first.columns, again.columns)


def test_a_small_workspace_gives_the_same_sums(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require_backend("triton", device)
    from gradprune.kernels import linear_importance as kernel

    monkeypatch.setattr(kernel, "WORKSPACE", 1)
    given = operands()
    assert_equals_fp64(grouped_linear_importance(*(each.to(device) for each in given), "both", "triton"), *given)
