"""Tensors that are read on the host are copied there in one copy for each device and dtype."""

import pytest
import torch
from torch import Tensor

from gradprune.calibration.accumulator import StepRecord
from gradprune.calibration.host import on_host, records_on_host
from gradprune.models import BlockKey
from gradprune.ops.vectors import GradientStatistics

KEY = BlockKey(0, "mlp")


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, int]]:
    """Dtype and number of elements of each copy from another device, for which the meta device stands."""
    found: list[tuple[torch.dtype, int]] = []

    def copied(tensor: Tensor) -> Tensor:
        found.append((tensor.dtype, tensor.numel()))
        return torch.arange(tensor.numel(), dtype=tensor.dtype)

    monkeypatch.setattr(Tensor, "cpu", copied)
    return found


def test_many_tensors_are_copied_once_for_each_dtype(copies: list[tuple[torch.dtype, int]]) -> None:
    here = torch.ones(3)
    there = [torch.empty(shape, device="meta") for shape in ((), (2, 2), (3,))]
    wide = torch.empty(2, dtype=torch.float64, device="meta")
    found = on_host([there[0], here, wide, *there[1:]])
    assert copies == [(torch.float32, 8), (torch.float64, 2)]
    assert found[1] is here
    assert [tensor.tolist() for tensor in found] == [
        0.0, [1.0] * 3, [0.0, 1.0], [[1.0, 2.0], [3.0, 4.0]], [5.0, 6.0, 7.0]
    ]  # fmt: skip


def test_all_records_are_copied_at_once(copies: list[tuple[torch.dtype, int]]) -> None:
    statistics = GradientStatistics.unpack(torch.empty(5, device="meta"))
    records = [StepRecord({"q": statistics, "k": statistics}, torch.empty(4, device="meta"), 2.0), StepRecord()]
    first, second = records_on_host({KEY: records})[KEY]
    assert copies == [(torch.float32, 14)]
    assert [float(value) for value in first.statistics["k"].pack()] == [5.0, 6.0, 7.0, 8.0, 9.0]
    assert first.gate.tolist() == [10.0, 11.0, 12.0, 13.0]
    assert (first.scale, second) == (2.0, StepRecord())
