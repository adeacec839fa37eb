"""`--serve`: check, before calibration, what a runtime requires beyond the selection's limits, and write its file."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradprune.config import Constraints
from gradprune.errors import ExportError
from gradprune.export.gguf import Outtype, check_gguf, export_gguf
from gradprune.models import PrunableModel

GGUF_FILE = "model.gguf"


def check_serve(view: PrunableModel, tokenizer: PreTrainedTokenizerBase | None, constraints: Constraints) -> None:
    """Refuse, before pruning, a model that the runtime named by `--serve` could not serve after it.

    Raises:
        ExportError: the pruned model cannot be served; the message gives the reason.
    """
    if constraints.serve == "vllm":
        _check_attention(view)
    if constraints.tensor_parallel > 1:
        _check_divisible(view, constraints.tensor_parallel)
    if constraints.serve == "gguf":
        try:
            check_gguf(view.model, tokenizer, alike=constraints.same_widths)
        except ExportError as error:
            raise ExportError(f"serve: no gguf file can be written: {str(error).partition(': ')[2]}") from error


def write_served(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, constraints: Constraints, folder: Path
) -> None:
    """Write the runtime's own file into `folder`, beside the checkpoint: `model.gguf` for gguf, none for the others."""
    if constraints.serve == "gguf":
        export_gguf(model, tokenizer, folder / GGUF_FILE, outtype=_outtype(model))


def _check_attention(view: PrunableModel) -> None:
    without = sorted(key.layer for key in view.dropped if key.kind == "attention")
    if without:
        raise ExportError(
            f"serve: vllm loads no model with a layer that has no attention block, and layer {without[0]} of this one "
            "has none; choose hf, or gguf"
        )


def _check_divisible(view: PrunableModel, devices: int) -> None:
    """Check that `devices` divides the width of every block, since a block that loses nothing keeps it, or raise."""
    for block in view.blocks:
        width = block.groups // block.sets
        if width % devices:
            raise ExportError(
                f"tensor_parallel: {devices} does not divide the {width} {block.kind.groups} of layer "
                f"{block.layer}; choose a divisor"
            )


def _outtype(model: PreTrainedModel) -> Outtype:
    """The 16-bit type that holds all weights: bf16 for bf16 models or weights beyond the range of f16, else f16."""
    if model.dtype == torch.bfloat16:
        return "bf16"
    most = torch.finfo(torch.float16).max
    return "f16" if all(parameter.abs().max() <= most for parameter in model.parameters()) else "bf16"
