"""The second stage of the reductions adds the partial sums and the statistics of many programs."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: its kernels are NOT tested here")

from gradprune.kernels import partial_sums as kernel
from helpers.devices import DEVICE, TRITON_TESTS

pytestmark = TRITON_TESTS


def statistics_of(entries: int) -> Tensor:
    """Return statistics as programs leave them, [entries, 5]; some programs saw only non-finite elements."""
    generator = torch.Generator().manual_seed(entries)
    found = torch.rand(entries, 5, generator=generator) + 0.1
    found[:, 4] = torch.randint(3, (entries,), generator=generator)
    found[::7, :4] = torch.tensor([0.0, 0.0, 0.0, float("inf")])
    return found.to(DEVICE)


@pytest.mark.parametrize("entries", [0, 1, 37, 4096, 32_768, 32_769, 9 * 4096, 9 * 4096 + 5])
@pytest.mark.parametrize(("parts", "width"), [(0, 3), (5, 130), (33, 64)])
def test_equals_fp64(entries: int, parts: int, width: int) -> None:
    sums = torch.rand(parts, 2, width, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    statistics = statistics_of(entries)
    found_sums, found = kernel.add_partial_sums(sums, statistics)
    torch.testing.assert_close(found_sums.double(), sums.double().sum(0), rtol=1e-6, atol=0.0)
    added = statistics.double()[:, [0, 1, 4]].sum(0)
    torch.testing.assert_close(found[[0, 1, 4]].double(), added, rtol=1e-6, atol=0.0)
    assert found[2] == max(statistics[:, 2].tolist(), default=0.0)
    assert found[3] == min(statistics[:, 3].tolist(), default=float("inf"))


@pytest.mark.parametrize("entries", [32_768, 32_769, 458_752])
def test_more_statistics_than_one_program_can_merge_take_another_launch(
    entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single program would take longer for those of Llama-3-8B's gate_proj and 16 samples than all other programs."""
    merged: dict[str, int] = {}

    class Counted:
        def __init__(self, name: str, argument: int) -> None:
            self.name, self.argument = name, argument

        def __getitem__(self, grid: tuple[int, ...]):
            def launch(*arguments: object, **_constants: int) -> None:
                merged[self.name] = len(arguments[self.argument])

            return launch

    monkeypatch.setattr(kernel, "_merge_kernel", Counted("before", 0))
    monkeypatch.setattr(kernel, "_add_kernel", Counted("alone", 1))
    kernel.add_partial_sums(torch.zeros(1, 2, 1), torch.zeros(entries, 5))
    assert merged == ({"alone": entries} if entries <= 32_768 else {"before": entries, "alone": -(-entries // 4096)})
