"""cheapest_removals in C++ equals the reference, for every instruction set and for rows of any length."""

import pytest
import torch

from gradprune.ops.cpp import cheapest_removals_cpp
from gradprune.ops.removals import cheapest_removals_reference

pytest.importorskip("gradprune._C", reason="the extension is not built")


@pytest.mark.parametrize(("width", "count"), [(1, 1), (7, 7), (8, 3), (9, 5), (64, 60), (257, 90)])
def test_equals_the_reference(width: int, count: int, isa: str) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(2 * width + 3, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, width, generator=generator, dtype=torch.float64)
    matrices = (torch.linalg.inv(x.T @ x / len(x)), weight.T @ weight)
    found, expected = cheapest_removals_cpp(*matrices, 1, count, isa), cheapest_removals_reference(*matrices, 1, count)
    assert torch.equal(found.taken, expected.taken)
    torch.testing.assert_close(found.costs, expected.costs, rtol=1e-10, atol=0.0)
