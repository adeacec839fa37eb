"""Each method's importance from its components, so that a scale on the gradients needs no second pass."""

from collections.abc import Callable
from typing import Any

from gradprune.config import Method

# Components from the weights alone, those that a forward pass adds, and those that a backward pass adds. `taylor_2nd`
# is the sum of two: `taylor` and `fisher`.
WEIGHT_COMPONENTS = ("magnitude",)
FORWARD_COMPONENTS = ("wanda", *WEIGHT_COMPONENTS)
GRADIENT_COMPONENTS = ("taylor", "fisher", "group_fisher", *FORWARD_COMPONENTS)
# "obs" needs another forward pass, layer by layer, and is collected only on request.
COMPONENTS = (*GRADIENT_COMPONENTS, "obs")


def components_of(method: Method) -> tuple[str, ...]:
    """The components that the importance by `method` is made of."""
    return ("taylor", "fisher") if method == "taylor_2nd" else (method,)


def importance(method: Method, component: Callable[[str], Any], scale: Any) -> Any:
    """The importance of groups by `method`, of gradients multiplied by `scale`.

    Args:
        method: the method.
        component: gives one of `COMPONENTS`, of the gradients as they are: an array or tensor over groups.
        scale: a number, or one per group: first-order terms are multiplied by it, second-order terms by its square.
    """
    if method == "taylor":
        return scale * component("taylor")
    if method in ("fisher", "group_fisher", "obs"):
        return scale * scale * component(method)
    if method == "taylor_2nd":
        return scale * component("taylor") + scale * scale * component("fisher")
    return component(method)
