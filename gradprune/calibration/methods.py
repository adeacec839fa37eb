"""How each method's importance is made from components, so that scaling the gradients needs no second pass."""

from collections.abc import Callable
from enum import IntEnum
from typing import Any

from gradprune.config import Method


class Depth(IntEnum):
    """How much of a calibration step is observed; each depth includes the ones before it.

    NOTHING: the step is not run. INPUTS: the output projections' inputs, in a forward pass. MASKS: also the gradients
    with respect to these inputs, in a backward pass that computes no weight gradient. WEIGHTS: also every weight's
    gradient.
    """

    NOTHING = 0
    INPUTS = 1
    MASKS = 2
    WEIGHTS = 3


# "obs" is not among these: it needs another forward pass, layer by layer, and is collected only on request.
_COLLECTED: dict[Depth, tuple[str, ...]] = {
    Depth.NOTHING: ("magnitude",),
    # "reap" is collected for whole experts only.
    Depth.INPUTS: ("wanda", "reap"),
    Depth.MASKS: ("group_fisher",),
    # "taylor_2nd" is the sum of these two.
    Depth.WEIGHTS: ("taylor", "fisher"),
}


def components_at(depth: Depth) -> tuple[str, ...]:
    """The names of the components that steps of this depth collect."""
    return tuple(name for level in reversed(Depth) if level <= depth for name in _COLLECTED[level])


def needed_depth(method: Method) -> Depth:
    """The depth that each step needs for the importance by `method`."""
    if method == "obs":
        return Depth.MASKS
    return max(depth for depth, names in _COLLECTED.items() if set(names) & set(components_of(method)))


def components_of(method: Method) -> tuple[str, ...]:
    """The names of the components from which the importance by `method` is made."""
    return ("taylor", "fisher") if method == "taylor_2nd" else (method,)


def importance(method: Method, component: Callable[[str], Any], scale: Any) -> Any:
    """The importance of groups by `method`, with gradients multiplied by `scale`.

    Args:
        method: the method.
        component: returns the component of a given name for the unscaled gradients, an array or tensor over groups.
        scale: one number, or one per group; first-order terms are multiplied by it, second-order terms by its square.
    """
    if method == "taylor":
        return scale * component("taylor")
    if method in ("fisher", "group_fisher", "obs"):
        return scale * scale * component(method)
    if method == "taylor_2nd":
        return scale * component("taylor") + scale * scale * component("fisher")
    return component(method)
