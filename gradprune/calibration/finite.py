"""Checks for NaN and infinite values that name the sample and the layer in which they first appeared."""

from functools import partial

import torch
from torch import Tensor, nn

from gradprune.calibration.accumulator import StepRecord
from gradprune.errors import NonFiniteError
from gradprune.models import BlockKey, PrunableModel
from gradprune.models.modes import hooks_removed


def raise_non_finite_loss(view: PrunableModel, batches: list[Tensor], losses: Tensor, first: int) -> None:
    """Raise if a loss is not finite.

    Args:
        view: the model.
        batches: [N, T] int64 each, together the K samples to which the losses belong; T may differ.
        losses: [K], each sample's loss.
        first: the index of the first of these samples in the calibration set.

    Raises:
        NonFiniteError: names the sample, and the first layer whose output is not finite.
    """
    bad = (~losses.isfinite()).nonzero()
    if not len(bad):
        return
    index = int(bad[0])
    layer = _first_non_finite_layer(view, [sample for batch in batches for sample in batch][index][None])
    where = "after the last decoder layer" if layer is None else f"first in the output of layer {layer}"
    raise NonFiniteError(
        f"loss of calibration sample {first + index} is {losses[index].item()}, {where}; "
        "check the checkpoint's weights, or load in a wider dtype (bfloat16 or float32)"
    )


def raise_non_finite_gradient(records: dict[BlockKey, list[StepRecord]], unit: str, first: int) -> None:
    """Raise if a block's gradient is not finite.

    Args:
        records: each block's records of the same steps.
        unit: what one gradient belongs to: "sample" or "batch".
        first: the index of the steps' first sample (batch) in the calibration set.

    Raises:
        NonFiniteError: names the sample (batch), and the layer in which the value arose.
    """
    # The backward pass reaches the last block first, so the value arose in the last block that has one.
    for key, steps in reversed(records.items()):
        gates = [record.gate for record in steps if record.gate is not None]
        values = torch.cat(gates) if gates else torch.empty(0)
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            raise NonFiniteError(
                f"gradient of calibration {unit} {first + int(bad[0])} is {values[bad[0]].item()} "
                f"in layer {key.layer} ({key.kind}); load the model in a wider dtype (bfloat16 or float32)"
            )


def raise_overflow(records: dict[BlockKey, list[StepRecord]]) -> None:
    """Raise if elements of a weight's gradient are not finite, or their sum overflows.

    records: see `raise_non_finite_gradient`.

    Raises:
        NonFiniteError: names the layer and the weight.
    """
    for key, steps in records.items():
        for path in steps[0].statistics if steps else ():
            of_steps = [record.statistics[path] for record in steps if path in record.statistics]
            if not all(found.non_finite == 0 and found.sum_abs.isfinite() for found in of_steps):
                raise NonFiniteError(f"gradient: elements of layer {key.layer}'s {path} overflow")


def _first_non_finite_layer(view: PrunableModel, sample: Tensor) -> int | None:
    finite: dict[int, bool] = {}

    def check(layer: int, _module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        finite[layer] = bool(hidden.isfinite().all())

    handles = [layer.register_forward_hook(partial(check, index)) for index, layer in enumerate(view.layers)]
    with hooks_removed(handles), torch.no_grad():
        view.model(input_ids=sample, use_cache=False)
    return next((layer for layer in sorted(finite) if not finite[layer]), None)
