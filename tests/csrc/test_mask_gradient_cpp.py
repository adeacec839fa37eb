"""mask_gradient in C++: exact sums to rounding on awkward shapes, and the same bits for any number of threads."""

import pytest
import torch
from torch import Tensor

from gradprune.ops.cpp import mask_gradient_cpp
from helpers.exact_sums import DTYPES, random_tensor

pytest.importorskip("gradprune._C", reason="the extension is not built")

# Tokens: none, one, a few, about one block that is summed in fp32, several blocks. Columns: about a vector or a strip.
SHAPES = [
    (1, 1, 1), (2, 3, 7), (1, 4, 8), (3, 5, 15), (2, 127, 16), (1, 128, 17), (2, 129, 33), (1, 300, 1023),
    (2, 7, 1024), (1, 9, 1025), (1, 2, 2100), (0, 3, 5), (2, 0, 5), (2, 3, 0),
]  # fmt: skip


def assert_exact(found: tuple[Tensor, Tensor], x: Tensor, dx: Tensor) -> None:
    """Check the sums: a product, at most 128 additions and the result each err by half a unit in the last place."""
    x, dx = x.double(), dx.double()
    for have, terms in zip(found, (x * dx, x * x), strict=True):
        allowed = (min(x.shape[1], 128) + 3) * torch.finfo(have.dtype).eps / 2 * terms.abs().sum(1)
        assert ((have.double() - terms.sum(1)).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_exact_to_rounding(shape: tuple[int, int, int], dtype: torch.dtype, isa: str) -> None:
    x, dx = (random_tensor(shape, dtype, seed) for seed in (0, 1))
    found = mask_gradient_cpp(x, dx, isa)
    assert found.gradient.shape == found.input_square.shape == (shape[0], shape[2])
    assert found.gradient.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_exact(found, x, dx)


def test_mixed_dtypes_and_strides(isa: str) -> None:
    x, dx = random_tensor((4, 20, 50), torch.float64, 0), random_tensor((4, 20, 50), torch.bfloat16, 1)
    found = mask_gradient_cpp(x, dx, isa)
    assert found.gradient.dtype == torch.float32
    assert_exact(found, x.float(), dx)
    x, dx = x.float(), dx.float()
    for view in (lambda t: t[::2, ::3, 3:40], lambda t: t.transpose(0, 1), lambda t: t[..., ::2]):
        assert_exact(mask_gradient_cpp(view(x), view(dx), isa), view(x), view(dx))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_for_any_number_of_threads(dtype: torch.dtype, isa: str, restore_threads: None) -> None:
    x, dx = (random_tensor((3, 150, 3000), dtype, seed) for seed in (0, 1))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(torch.stack(mask_gradient_cpp(x, dx, isa)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_element_makes_only_its_own_sums_non_finite(value: float, isa: str) -> None:
    x, dx = (random_tensor((2, 9, 40), torch.float32, seed) for seed in (0, 1))
    x[1, 4, 33] = value
    for sums in mask_gradient_cpp(x, dx, isa):
        assert (~sums.isfinite()).nonzero().tolist() == [[1, 33]]


def test_wrong_arguments_are_named() -> None:
    x, dx = (random_tensor((2, 3, 4), torch.float32, seed) for seed in (0, 1))
    with pytest.raises(ValueError, match=r"x: has shape \(3, 4\)"):
        mask_gradient_cpp(x[0], dx[0])
    with pytest.raises(ValueError, match=r"dx: has shape \(2, 3, 3\)"):
        mask_gradient_cpp(x, dx[..., 1:])
    with pytest.raises(ValueError, match=r"x: dtype torch.int64"):
        mask_gradient_cpp(x.long(), dx)
