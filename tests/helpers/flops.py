"""Floating-point operations of matrix products, also where `torch.autograd.grad` runs inside the forward pass."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# Torch has no formula for the products that add to a sum in place.
_ALIKE = {torch.ops.aten.addmm_: torch.ops.aten.addmm}


class CountFlops(TorchDispatchMode):
    """Counts by torch's own formulas; its FlopCounterMode follows modules, which such a pass does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        op = func._overloadpacket
        formula = flop_registry.get(_ALIKE.get(op, op))
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out
