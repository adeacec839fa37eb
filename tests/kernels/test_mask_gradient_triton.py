import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: its kernels are NOT tested here")

from gradprune.kernels.mask_gradient import MaskGradientConfig
from gradprune.kernels.mask_gradient import mask_gradient_triton as launch
from gradprune.ops.triton import mask_gradient_triton
from helpers.devices import DEVICE, TRITON_TESTS

pytestmark = TRITON_TESTS
SMALL = MaskGradientConfig(BLOCK_T=4, BLOCK_I=32, num_warps=4)


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, dx = (torch.randn(shape, generator=generator).to(dtype).to(DEVICE) for _ in range(2))
    return x, dx


def assert_equals_fp64(found: tuple[Tensor, Tensor], x: Tensor, dx: Tensor) -> None:
    """A sum of n fp32 terms errs by at most n + 2 roundings of the sum of their magnitudes."""
    x, dx = x.double(), dx.double()
    tokens = x.shape[1]
    error = (found[0].double() - (x * dx).sum(1)).abs()
    assert (error <= (tokens + 2) * 2.0**-24 * (x * dx).abs().sum(1)).all()
    square = x.square().sum(1)
    assert ((found[1].double() - square).abs() <= (tokens + 2) * 2.0**-24 * square).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 31), (3, 4, 32), (2, 63, 60), (1, 5, 127), (3, 0, 9)])
def test_equals_fp64_on_awkward_shapes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, dx = inputs(shape, dtype)
    assert_equals_fp64(launch(x, dx, SMALL), x, dx)


def test_the_shipped_configuration_equals_fp64() -> None:
    x, dx = inputs((2, 35, 140), torch.float32)
    assert_equals_fp64(launch(x, dx), x, dx)


def test_strided_inputs() -> None:
    x, dx = inputs((4, 20, 50), torch.float32)
    for view in (lambda t: t[::2, ::3, 3:40], lambda t: t.transpose(0, 1), lambda t: t[..., ::2]):
        assert_equals_fp64(mask_gradient_triton(view(x), view(dx)), view(x), view(dx))


def test_every_sum_is_written_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    real, buffers = torch.empty, []

    def guarded(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        size = torch.Size(shape).numel()
        buffer = real(size + 64, dtype=dtype, device=device).fill_(12345.0)
        buffer[32 : 32 + size] = float("nan")
        buffers.append(buffer)
        return buffer[32 : 32 + size].view(shape)

    x, dx = inputs((2, 5, 37), torch.float32)
    monkeypatch.setattr(torch, "empty", guarded)
    found = launch(x, dx, SMALL)
    monkeypatch.undo()
    assert_equals_fp64(found, x, dx)
    (buffer,) = buffers
    assert (buffer[:32] == 12345.0).all()
    assert (buffer[-32:] == 12345.0).all()


def test_without_samples_there_are_no_sums() -> None:
    found = mask_gradient_triton(*inputs((0, 3, 5), torch.float32))
    assert found.gradient.shape == found.input_square.shape == (0, 5)


def test_wrong_arguments_are_named() -> None:
    x, dx = inputs((2, 3, 4), torch.float32)
    with pytest.raises(ValueError, match=r"x: has shape \(3, 4\)"):
        mask_gradient_triton(x[0], dx[0])
    with pytest.raises(ValueError, match=r"dx: has shape \(2, 3, 3\)"):
        mask_gradient_triton(x, dx[..., 1:])
    with pytest.raises(ValueError, match=r"dx: dtype torch.float64"):
        mask_gradient_triton(x, dx.double())
