import math

import torch

from gradprune.ops.reference import gradient_statistics
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
