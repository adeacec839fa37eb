"""The sizes of a model that memory use depends on, read from its modules, which need not have weights in memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from transformers import PreTrainedModel

from gradprune.models.blocks import Block, LinearBlock
from gradprune.models.experts import ExpertsBlock, has_experts
from gradprune.models.inspection import cached_width
from gradprune.models.modeling_gradprune import EXPERT_WIDTHS, text_config
from gradprune.models.router import experts_of_token, stated
from gradprune.models.view import layers_of, view_of


@dataclass(frozen=True)
class ExpertShape:
    """The shape of a routed expert.

    output: rows and columns of its output projection. number: experts per layer. seen: experts per token.
    """

    output: tuple[int, int]
    number: int
    seen: int


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that memory use depends on.

    layer_parameters: the number of parameters of each decoder layer.
    outside: the number of parameters outside the decoder layers; tied parameters count once.
    hidden, vocabulary: hidden size and vocabulary size.
    heads, intermediate: the width of all query heads together, and of the MLP; both of the widest layer. If no MLP can
        be pruned, `intermediate` is the width of the experts that a token sees.
    outputs: rows and columns of the output projection of each block of linear layers, in order.
    read_width: how many numbers the block that reads most reads at its output projections for each token; for experts,
        at those of all experts that a token sees together.
    groups: the number of groups of all blocks together.
    has_experts: whether any layer has routed experts. Their weights are assembled from each expert's when a streamed
        layer is read, and taken apart when it is saved.
    expert: the widest routed expert; None if no experts can be pruned.
    cached: how many numbers all layers cache for each token, keys and values together.
    itemsize: bytes per weight.
    """

    layer_parameters: tuple[int, ...]
    outside: int
    hidden: int
    heads: int
    intermediate: int
    vocabulary: int
    outputs: tuple[tuple[int, int], ...]
    read_width: int
    groups: int
    has_experts: bool
    expert: ExpertShape | None
    cached: int
    itemsize: int

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model."""
        return self.outside + sum(self.layer_parameters)

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""
        return self.parameters * self.itemsize

    @property
    def layer_bytes(self) -> int:
        """Bytes of the largest decoder layer's weights."""
        return max(self.layer_parameters) * self.itemsize

    @property
    def output_bytes(self) -> int:
        """Bytes of the weights of all output projections in `outputs`."""
        return sum(rows * columns for rows, columns in self.outputs) * self.itemsize


def model_shape(model: PreTrainedModel, itemsize: int | None = None) -> ModelShape:
    """Return the sizes of a model, which may be on the meta device or streamed.

    Args:
        model: a causal LM with decoder layers.
        itemsize: bytes per weight; by default those of the model's dtype.

    Raises:
        UnsupportedArchitectureError: the model has no list of decoder layers, or a projection is not a plain
            floating-point linear layer.
    """
    own = tuple(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers_of(model))
    outside = sum(parameter.numel() for parameter in model.parameters()) - sum(own)
    view = view_of(model)
    blocks = view.linear_blocks
    config = text_config(model.config)
    return ModelShape(
        layer_parameters=own,
        outside=outside,
        hidden=config.hidden_size,
        heads=_widest(blocks, "attention"),
        # If layers have experts instead of an MLP, the width of all experts that a token passes through.
        intermediate=_widest(blocks, "mlp") or (experts_of_token(config) or 1) * (stated(config, EXPERT_WIDTHS) or 0),
        vocabulary=config.vocab_size,
        outputs=tuple((each.output.weight.shape[0], each.output.weight.shape[1]) for each in blocks),
        read_width=max((block.read_width for block in view.blocks), default=0),
        groups=sum(block.groups for block in view.blocks),
        has_experts=any(map(has_experts, layers_of(model))),
        expert=_widest_expert(view.blocks),
        cached=sum(map(cached_width, layers_of(model))),
        itemsize=itemsize or model.dtype.itemsize,
    )


def vocabulary_of(model: PreTrainedModel) -> int:
    """The size of the model's vocabulary: token ids are less than this."""
    return int(text_config(model.config).vocab_size)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; on the CPU, those that are available without swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def with_unit(size: int) -> str:
    """Format a number of bytes, such as "14.9 GiB" or "3.2 MiB"."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:,.1f} MiB"


def _widest_expert(blocks: Sequence[Block]) -> ExpertShape | None:
    routed = [block for block in blocks if isinstance(block, ExpertsBlock)]
    if not routed:
        return None
    widest = max(routed, key=lambda block: block.channels)
    rows, columns = widest.down.weight(0).shape
    return ExpertShape((rows, columns), widest.experts, widest.read_width // columns)


def _widest(blocks: tuple[LinearBlock, ...], kind: str) -> int:
    return max((block.width for block in blocks if block.kind.name == kind), default=0)
