"""Each method's importance from its parts, so that gradients repaired by a scale need no second pass."""

from collections.abc import Callable
from typing import Any

from gradprune.config import Method

# `taylor_2nd` is the sum of two of them.
PARTS = ("taylor", "fisher", "group_fisher", "wanda", "magnitude")
GRADIENT_PARTS = ("taylor", "fisher", "group_fisher")


def importance(method: Method, part: Callable[[str], Any], scale: Any) -> Any:
    """The importance of groups by `method`, of gradients multiplied by `scale`.

    Args:
        method: the method.
        part: gives the importance by one of `PARTS`, of the gradients as they are: an array or tensor over groups.
        scale: a number, or one a group: first order goes with it, second order with its square.
    """
    if method == "taylor":
        return scale * part("taylor")
    if method in ("fisher", "group_fisher"):
        return scale * scale * part(method)
    if method == "taylor_2nd":
        return scale * part("taylor") + scale * scale * part("fisher")
    return part(method)
