import math

import pytest
import torch

from gradprune.ops.reference import gradient_statistics, mask_gradient_reference, taylor_score_reference
from gradprune.ops.vectors import GradientStatistics

NAN, INF = math.nan, math.inf
GRADIENTS = [torch.tensor(values, dtype=torch.float64) for values in ([3.0, -4.0, NAN], [], [0.5, INF, -INF], [-2.0])]


def test_statistics_by_name() -> None:
    assert gradient_statistics(GRADIENTS[0]).to_float() == GradientStatistics(
        sum_abs=7.0, sum_square=25.0, max_abs=4.0, min_abs=3.0, non_finite=1.0
    )
    assert gradient_statistics(GRADIENTS[1]).to_float() == GradientStatistics(0.0, 0.0, 0.0, INF, 0.0)


def test_merged_statistics_are_those_of_all_elements() -> None:
    found = GradientStatistics.stack([gradient_statistics(g) for g in GRADIENTS])
    assert found.to_list() == [gradient_statistics(g).to_float() for g in GRADIENTS]
    assert found.merge().to_float() == gradient_statistics(torch.cat(GRADIENTS)).to_float()


def test_scaled_statistics_are_those_of_scaled_gradients() -> None:
    factors = [2.0, 4.0, 0.5, 1.0]
    found = GradientStatistics.stack([gradient_statistics(g) for g in GRADIENTS]).scale(factors)
    expected = [gradient_statistics(s * g).to_float() for s, g in zip(factors, GRADIENTS, strict=True)]
    assert found.to_list() == expected


def test_packed_statistics_unpack_to_views() -> None:
    packed = torch.arange(10.0).reshape(2, 5)
    found = GradientStatistics.unpack(packed)
    assert found.non_finite.tolist() == [4.0, 9.0]
    assert found.max_abs.data_ptr() == packed[0, 2].data_ptr()
    assert torch.equal(found.pack(), packed)


def test_statistics_of_fp32_gradients_are_stacked_in_fp64() -> None:
    found = GradientStatistics.stack([gradient_statistics(g.float()) for g in GRADIENTS])
    assert found.pack().dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_reference_multiplies_and_adds_half_precision_in_fp32(dtype: torch.dtype) -> None:
    w, g = (torch.randn(5, 300, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    product = w.double() * g.double()
    found = taylor_score_reference(w, g)
    torch.testing.assert_close(found.row_abs.double(), product.abs().sum(1), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found.column_square.double(), product.square().sum(0), rtol=1e-5, atol=0.0)
    mask = mask_gradient_reference(w[None], g[None])
    torch.testing.assert_close(mask.gradient[0].double(), product.sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mask.input_square[0].double(), w.double().square().sum(0), rtol=1e-5, atol=0.0)


def test_the_reference_multiplies_a_narrower_weight_by_a_wider_gradient_in_fp32() -> None:
    w, g = torch.tensor([[3.0]]).bfloat16(), torch.tensor([[1.0 + 2.0**-20]])
    assert taylor_score_reference(w, g).row_abs.tolist() == [3.0 + 3.0 * 2.0**-20]
    assert mask_gradient_reference(w[None], g[None]).gradient.tolist() == [[3.0 + 3.0 * 2.0**-20]]
