"""Each method's importance from its components, so that a scale on the gradients needs no second pass."""

from collections.abc import Callable
from typing import Any

from gradprune.config import Method

# What can be said of the weights alone, what a forward pass adds, and what a backward pass adds. `taylor_2nd` is the
# sum of two of them.
WEIGHT_COMPONENTS = ("magnitude",)
FORWARD_COMPONENTS = ("wanda", *WEIGHT_COMPONENTS)
GRADIENT_COMPONENTS = ("taylor", "fisher", "group_fisher", *FORWARD_COMPONENTS)
# "obs" takes another forward pass, layer by layer, and is collected where it is asked for.
COMPONENTS = (*GRADIENT_COMPONENTS, "obs")


def components_of(method: Method) -> tuple[str, ...]:
    """The components that the importance by `method` is made of."""
    return ("taylor", "fisher") if method == "taylor_2nd" else (method,)


def importance(method: Method, component: Callable[[str], Any], scale: Any) -> Any:
    """The importance of groups by `method`, of gradients multiplied by `scale`.

    Args:
        method: the method.
        component: gives one of `COMPONENTS`, of the gradients as they are: an array or tensor over groups.
        scale: a number, or one per group: the first order goes with it, the second with its square.
    """
    if method == "taylor":
        return scale * component("taylor")
    if method in ("fisher", "group_fisher", "obs"):
        return scale * scale * component(method)
    if method == "taylor_2nd":
        return scale * component("taylor") + scale * scale * component("fisher")
    return component(method)
