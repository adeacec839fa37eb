"""Cut the pruned groups out of the weights, and write the new widths into the configuration."""

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
    keeps no group is removed together with its norm; the residual stream then passes it unchanged.

    Args:
        model: a supported causal LM, which may have been pruned before.
        masks: the groups that each block keeps; blocks of a kind that the masks do not contain stay as they are.
        inplace: cut `model` itself, layer by layer. Otherwise `model` is unchanged, and the result is a new model
            that shares memory with it for every tensor that was not cut.

    A streamed model's weights are cut when they are read.

    Returns:
        The cut model: of its original class if the architecture's configuration can state the widths, which have to be
        the same in all layers; else of the class in `modeling_gradprune`, with `per_layer_config` in its configuration.

    Raises:
        ValueError: a mask's length is not its block's number of groups, or a block has no mask.
        UnsupportedArchitectureError: the model's class is neither the architecture's own causal LM class nor the class
            that gradprune derives from it; or the model cannot be copied, see `check_copyable`.
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
    """Refuse a class that cutting would replace by another, losing what it adds, such as a classifier's head.

    Raises:
        UnsupportedArchitectureError: it is such a class, or no model of transformers; the message names the class, and
            for a model of transformers the class to load it as.
    """
    if not hasattr(getattr(model, "config", None), "model_type"):
        raise UnsupportedArchitectureError(
            f"model: is a {type(model).__name__}; a causal LM of transformers is needed, e.g. from gradprune.load_model"
        )
    name = causal_lm(model.config.model_type)
    stock = stock_class(type(model))
    # A model loaded with trust_remote_code has a class that is named as gradprune's, but defined by the file beside its
    # weights; so names are compared.
    if stock.__name__ != name or not (type(model) is stock or type(model).__name__.startswith(f"Pruned{name}")):
        raise UnsupportedArchitectureError(f"model: a {type(model).__name__} cannot be cut; load it as {name}")


def check_copyable(model: PreTrainedModel) -> None:
    """Refuse modules whose forward has been replaced by a function: a copy would run it on the original's modules.

    Raises:
        UnsupportedArchitectureError: there is such a module; the first one is named.
    """
    for name, module in model.named_modules():
        # Methods, and partial functions such as accelerate's hooks, are copied together with their module.
        if isinstance(module.__dict__.get("forward"), FunctionType):
            raise UnsupportedArchitectureError(
                f"model: the forward of {name or 'the whole model'} is replaced by a function, which a copy would run "
                "on the dense model's modules; put the original back (del module.forward), or bind it "
                "(types.MethodType)"
            )


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Copy modules and parameters, but share the weights' memory, or the weights' files if the model is streamed.

    The two models' dtypes and gradients are independent. A weight that is changed in place changes in both.

    Raises:
        UnsupportedArchitectureError: see `check_copyable`.
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
