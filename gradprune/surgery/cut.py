"""Surgery: cut the pruned groups out of the weights, and write the new widths into the configuration."""

import copy
from types import FunctionType

from torch import Tensor
from transformers import PreTrainedModel

from gradprune.errors import UnsupportedArchitectureError
from gradprune.models import PrunableModel, whole_view
from gradprune.models.masks import GroupMasks
from gradprune.models.modeling_gradprune import causal_lm, stock_class
from gradprune.models.narrow import narrow, parameter_like
from gradprune.models.residency import residency_of


def cut(model: PreTrainedModel, masks: GroupMasks, *, inplace: bool = False) -> PreTrainedModel:
    """Remove the groups that `masks` does not keep.

    The result computes what `model` would if those groups' columns of the output projections were zero. A block that
    keeps nothing is removed together with its norm, which leaves the residual stream unchanged.

    Args:
        model: a supported causal LM, pruned before or not.
        masks: what each block keeps; blocks of a kind that they do not name stay as they are.
        inplace: cut `model` itself, layer by layer. Otherwise `model` is unchanged, and the result is a new model
            that shares memory with it for every tensor that was not cut.

    A streamed model's weights are cut when they are read.

    Returns:
        The cut model: of its original class where all layers have the same widths, else of the class in
        `modeling_gradprune`, with `per_layer_config` in its configuration.

    Raises:
        ValueError: a mask's length is not its block's number of groups, or a block has no mask.
        UnsupportedArchitectureError: not the architecture's own causal LM class, or one that gradprune made of it; or
            it cannot be copied, see `check_copyable`.
    """
    view = whole_view(model)
    check_class(model)
    _check_masks(view, masks)
    if not inplace:
        model = sharing_copy(model)
        view = whole_view(model)
    elif view.residency is not None:
        view.residency.release()
    narrow(view, masks)
    return model


def check_class(model: PreTrainedModel) -> None:
    """Refuse a class that cutting would replace by another, losing what it adds: a classifier's head, say.

    Raises:
        UnsupportedArchitectureError: naming the class, and the one to load it as; or it is no model of transformers.
    """
    if not hasattr(getattr(model, "config", None), "model_type"):
        raise UnsupportedArchitectureError(
            f"model: is a {type(model).__name__}; a causal LM of transformers is needed, e.g. of gradprune.load_model"
        )
    name = causal_lm(model.config.model_type)
    stock = stock_class(type(model))
    # A model loaded with trust_remote_code has a class of gradprune's name, defined by the file beside its weights.
    if stock.__name__ != name or not (type(model) is stock or type(model).__name__.startswith(f"Pruned{name}")):
        raise UnsupportedArchitectureError(f"model: a {type(model).__name__} cannot be cut; load it as {name}")


def check_copyable(model: PreTrainedModel) -> None:
    """Refuse modules whose forward someone has replaced: a copy would run the function on the modules that it is for.

    Raises:
        UnsupportedArchitectureError: naming the first.
    """
    for name, module in model.named_modules():
        # Methods, and partials such as accelerate's hooks, are copied with their module.
        if isinstance(module.__dict__.get("forward"), FunctionType):
            raise UnsupportedArchitectureError(
                f"model: the forward of {name or 'the whole model'} is replaced by a function, which a copy would run "
                "on the dense model's modules; put the original back (del module.forward), or bind it "
                "(types.MethodType)"
            )


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """New modules and parameters on the same memory, or the same files, where the model is streamed.

    The two models' dtypes and gradients are independent; a weight is until it is changed in place.

    Raises:
        UnsupportedArchitectureError: as `check_copyable`.
    """
    check_copyable(model)
    residency = residency_of(model)
    if residency is not None:
        residency.release()
    # deepcopy reuses the objects in its memo instead of copying them.
    memo: dict[int, Tensor] = {id(buffer): buffer for buffer in model.buffers()}
    memo |= {id(old): parameter_like(old, old.detach()) for old in model.parameters()}
    copied = copy.deepcopy(model, memo)
    if residency is not None:
        residency.copy_for(copied)
    return copied


def _check_masks(view: PrunableModel, masks: GroupMasks) -> None:
    given = {key: len(masks[key]) for key in masks}
    kinds = {key.kind for key in given}
    expected = {block.key: block.groups for block in view.blocks if block.kind.name in kinds}
    for key in sorted(expected.keys() | given.keys()):
        if expected.get(key, 0) != given.get(key, 0):
            raise ValueError(
                f"masks: layer {key.layer} {key.kind} has {given.get(key, 0)} entries, "
                f"but the model's block has {expected.get(key, 0)} groups"
            )
