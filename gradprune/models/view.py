"""Find a model's blocks of given kinds, without checking that cutting them is correct for its architecture."""

from collections.abc import Collection

from torch import nn
from transformers import PreTrainedModel

from gradprune.errors import UnsupportedArchitectureError
from gradprune.models.blocks import Block, PrunableModel
from gradprune.models.experts import NO_EXPERTS, find_experts, find_shared_experts
from gradprune.models.inspection import find_block
from gradprune.models.kinds import DEFAULT_KINDS, KINDS, BlockKey, Kind
from gradprune.models.modeling_gradprune import DroppedAttention, DroppedMLP, decoder_layers, place_of

# By name, because a model loaded by remote code has classes of its own.
_DROPPED = (DroppedAttention.__name__, DroppedMLP.__name__)


def view_of(model: PreTrainedModel, kinds: Collection[str] = DEFAULT_KINDS) -> PrunableModel:
    """Find the blocks of the given kinds; layers that have no such block, or none in a known form, are skipped.

    Raises:
        UnsupportedArchitectureError: a projection is not a plain floating-point linear layer, or experts' weights are
            not floating-point parameters.
    """
    layers = layers_of(model)
    blocks: list[Block] = []
    dropped = set()
    for index, layer in enumerate(layers):
        for kind in KINDS:
            if kind.name not in kinds:
                continue
            place = place_of(layer, kind.name)
            if place is not None and type(getattr(layer, place)).__name__ in _DROPPED:
                dropped.add(BlockKey(index, kind.name))
                continue
            found = _find(layer, index, kind)
            if isinstance(found, Block):
                blocks.append(found)
    return PrunableModel(model, layers, tuple(blocks), frozenset(dropped))


def missing_kinds(model: PreTrainedModel) -> dict[str, str]:
    """For each kind without a prunable block, the reason; kinds of experts that the model does not have are omitted."""
    layers = layers_of(model)
    reasons = {}
    for kind in KINDS:
        found = [_find(layer, index, kind) for index, layer in enumerate(layers)]
        if kind.optional and all(each == NO_EXPERTS for each in found):
            continue
        if all(isinstance(each, str) for each in found):
            reasons[kind.name] = str(found[-1])
    return reasons


def _find(layer: nn.Module, index: int, kind: Kind) -> Block | str:
    if kind.name == "shared_experts":
        return find_shared_experts(layer, index, kind)
    return find_experts(layer, index, kind) if kind.optional else find_block(layer, index, kind)


def layers_path(model: PreTrainedModel) -> str:
    """The path of the list of decoder layers in the model, such as "model.layers"."""
    layers = layers_of(model)
    path: str = next(name for name, module in model.named_modules() if module is layers)
    return path


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The model's decoder layers.

    Raises:
        UnsupportedArchitectureError: the model has no list with as many modules as its configuration states layers.
    """
    try:
        return decoder_layers(model, model.config)
    except (StopIteration, AttributeError) as error:
        raise UnsupportedArchitectureError(
            f"base_model: a {type(model).__name__} has no list of decoder layers under num_hidden_layers"
        ) from error
