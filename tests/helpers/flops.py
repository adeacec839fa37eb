"""Count the floating-point operations of matrix products, even if `torch.autograd.grad` runs in the forward pass."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# Torch has no formulas for products that are added to a sum in place; each is counted as the operation given here.
_COUNTED_AS = {torch.ops.aten.addmm_: torch.ops.aten.addmm}


class CountFlops(TorchDispatchMode):
    """Counts by torch's own formulas; torch's FlopCounterMode tracks modules, which fails in such a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        op = func._overloadpacket
        formula = flop_registry.get(_COUNTED_AS.get(op, op))
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out
