"""Copies many small tensors from a device to the host in one transfer."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gradprune.calibration.accumulator import StepRecord
from gradprune.models import BlockKey
from gradprune.ops.vectors import GradientStatistics


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on the CPU, with one copy per device and dtype; tensors already there are returned unchanged."""
    found = list(tensors)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.device.type != "cpu":
            groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    for indices in groups.values():
        flat = torch.cat([tensors[index].reshape(-1) for index in indices]).cpu()
        parts = flat.split([tensors[index].numel() for index in indices])
        for index, part in zip(indices, parts, strict=True):
            found[index] = part.view(tensors[index].shape)
    return found


def records_on_host(records: Mapping[BlockKey, Sequence[StepRecord]]) -> dict[BlockKey, list[StepRecord]]:
    """Copies of the blocks' records, with all tensors on the CPU."""
    flat: list[Tensor] = []
    for steps in records.values():
        for record in steps:
            flat += [value for found in record.statistics.values() for value in found.numbers()]
            flat += [] if record.gate is None else [record.gate]
    values = iter(on_host(flat))

    def copied(record: StepRecord) -> StepRecord:
        statistics = {
            path: GradientStatistics(*(next(values) for _ in found.numbers()))
            for path, found in record.statistics.items()
        }
        return StepRecord(statistics, None if record.gate is None else next(values), record.scale)

    return {key: [copied(record) for record in steps] for key, steps in records.items()}
