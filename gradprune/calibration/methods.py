"""Each method's importance from its components, so that a scale on the gradients needs no second pass."""

from collections.abc import Callable
from enum import IntEnum
from typing import Any

from gradprune.config import Method


class Depth(IntEnum):
    """How much of a calibration step is observed; each includes what those before it observe.

    NOTHING: the step is not run. INPUTS: the output projections' inputs, in a forward pass. MASKS: the gradients at
    these inputs too, in a backward pass that takes no weight's gradient. WEIGHTS: every weight's gradient.
    """

    NOTHING = 0
    INPUTS = 1
    MASKS = 2
    WEIGHTS = 3


# "obs" is none of these: it takes another forward pass, layer by layer, and is collected only on request.
_COLLECTED: dict[Depth, tuple[str, ...]] = {
    Depth.NOTHING: ("magnitude",),
    # "reap" of whole experts only.
    Depth.INPUTS: ("wanda", "reap"),
    Depth.MASKS: ("group_fisher",),
    # `taylor_2nd` is the sum of the two.
    Depth.WEIGHTS: ("taylor", "fisher"),
}


def components_at(depth: Depth) -> tuple[str, ...]:
    """The components that steps of this depth collect."""
    return tuple(name for level in reversed(Depth) if level <= depth for name in _COLLECTED[level])


def needed_depth(method: Method) -> Depth:
    """How deep each step has to be for the importance by `method`."""
    if method == "obs":
        return Depth.MASKS
    return max(depth for depth, names in _COLLECTED.items() if set(names) & set(components_of(method)))


def components_of(method: Method) -> tuple[str, ...]:
    """The components that the importance by `method` is made of."""
    return ("taylor", "fisher") if method == "taylor_2nd" else (method,)


def importance(method: Method, component: Callable[[str], Any], scale: Any) -> Any:
    """The importance of groups by `method`, of gradients multiplied by `scale`.

    Args:
        method: the method.
        component: gives a component by name, of the gradients as they are: an array or tensor over groups.
        scale: a number, or one per group: first-order terms are multiplied by it, second-order terms by its square.
    """
    if method == "taylor":
        return scale * component("taylor")
    if method in ("fisher", "group_fisher", "obs"):
        return scale * scale * component(method)
    if method == "taylor_2nd":
        return scale * component("taylor") + scale * scale * component("fisher")
    return component(method)
