"""Cholesky factors and inverses against torch's own, and their bits at different numbers of threads."""

import pytest
import torch
from torch import Tensor

from gradprune.calibration.cholesky import cholesky, inverse, solve
from gradprune.calibration.gram import add_gram, mirror

SIZES = (1, 2, 127, 128, 129, 300)


def positive(size: int) -> Tensor:
    x = torch.randn(size + 40, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    return x.T @ x / len(x) + 0.01 * torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES)
def test_factor_inverse_and_solution_equal_torchs(size: int) -> None:
    matrix, right = positive(size), torch.randn(size, 5, dtype=torch.float64)
    factor = cholesky(matrix)
    torch.testing.assert_close(factor, torch.linalg.cholesky(matrix), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(solve(factor, right), torch.linalg.solve(matrix, right), rtol=1e-8, atol=1e-8)
    inverted = inverse(factor)
    torch.testing.assert_close(inverted, torch.linalg.inv(matrix), rtol=1e-8, atol=1e-8)
    assert inverted.data_ptr() == factor.data_ptr()


def test_a_factor_overwrites_its_matrix_only_on_request() -> None:
    matrix = positive(300)
    kept, given = matrix.clone(), matrix.clone()
    factor = cholesky(given, overwrite=True)
    assert torch.equal(factor, cholesky(matrix))
    assert torch.equal(matrix, kept)
    assert factor.data_ptr() == given.data_ptr()


@pytest.mark.parametrize("size", SIZES)
def test_a_matrix_that_is_not_positive_definite_has_no_factor(size: int) -> None:
    matrix = positive(size)
    matrix[-1, -1] = -1.0
    assert cholesky(matrix) is None


@pytest.mark.parametrize("size", [100, 130, 172, 300, 400])
def test_the_same_bits_at_any_number_of_threads(size: int, restore_threads: None) -> None:
    matrix, found = positive(size), []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        factor = cholesky(matrix)
        gram = torch.zeros(40, 40, dtype=torch.float64)
        add_gram(gram, matrix[:, :40])
        found.append((factor, solve(factor, matrix), inverse(factor.clone()), gram))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("width", [1, 191, 192, 384, 385, 1024, 1600])
def test_mirroring_one_half_gives_the_whole_gram_matrix(width: int) -> None:
    x = torch.randn(20, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = torch.full((width, width), torch.nan, dtype=torch.float64).triu(1)
    add_gram(gram, x[:13])
    add_gram(gram, x[13:])
    torch.testing.assert_close(mirror(gram), x.T @ x, rtol=1e-12, atol=1e-12)


def test_half_precision_rows_are_summed_in_fp32() -> None:
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    gram = torch.zeros(8, 8)
    add_gram(gram, x)
    torch.testing.assert_close(mirror(gram), (x.double().T @ x.double()).float(), rtol=1e-5, atol=1e-2)
