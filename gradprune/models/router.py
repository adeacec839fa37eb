"""The router of a mixture of experts: which module chooses the experts of a token, and what it has by expert."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradprune.models.modeling_gradprune import name_in
from gradprune.models.modes import forward_replaced

_NAMES = ("gate", "router")
CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
"""What configurations call the number of experts that a token gets; the first that is there."""
SETS, SETS_CHOSEN = ("n_group", "num_expert_group"), ("topk_group", "num_limited_groups")
"""What they call the number of sets of experts, and of those that a token's are chosen from."""

Logits = Callable[..., Tensor]
"""Computes a router's logits [..., E], as `torch.nn.functional.linear` does of x [..., H], weight [E, H] and bias."""


@dataclass(frozen=True)
class Router:
    """What chooses the experts of each token.

    path: of its weight in the block; weight: [E, H]. module: what computes with it.
    by_expert: parameters and buffers with an entry for every expert: path in the block, and the dimension.
    corrections: those of them that are added to scores before experts are chosen.
    parameters: elements of the parameters among `by_expert`.
    sets: the router first chooses among so many sets of neighbouring experts, where it is more than 1.
    min_kept: experts of each set that have to stay for a token to get as many experts as before.
    """

    path: str
    weight: nn.Parameter
    module: nn.Module
    by_expert: tuple[tuple[str, int], ...]
    corrections: tuple[Tensor, ...]
    parameters: int
    sets: int
    min_kept: int

    @contextmanager
    def logits_by(self, logits: Logits) -> Iterator[None]:
        """Inside the context the router's logits are what `logits` computes."""
        own = self.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with _LinearReplaced(len(self.weight), logits):
                return own(*args, **kwargs)

        with forward_replaced(self.module, forward):
            yield


class _LinearReplaced(TorchFunctionMode):
    """Inside the context linear layers with that many outputs compute something else."""

    def __init__(self, outputs: int, replacement: Logits) -> None:
        super().__init__()
        self._outputs = outputs
        self._replacement = replacement

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replaced = func is F.linear and len(args[1]) == self._outputs
        return (self._replacement if replaced else func)(*args, **(kwargs or {}))


def find_router(parent: nn.Module, experts: Any, count: int) -> Router | str:
    """The router of a module with `count` experts, or why there is none that can be cut, for messages.

    Args:
        parent: the module that routes tokens and calls the experts' module.
        experts: the experts' module, which knows the configuration.
        count: of experts.
    """
    name = next((name for name in _NAMES if isinstance(getattr(parent, name, None), nn.Module)), None)
    if name is None:
        return "no router under a known name"
    module: nn.Module = getattr(parent, name)
    weights = [(path, own) for path, own in module.named_parameters() if own.ndim == 2 and len(own) == count]
    if len(weights) != 1:
        return f"its {name} has {len(weights)} weights with a row for each expert"
    own = {f"{name}.{path}": tensor for path, tensor in named_tensors(module)}
    own |= dict(named_tensors(parent, recurse=False))
    found = {path: (tensor, tensor.shape.index(count)) for path, tensor in own.items() if count in tensor.shape}
    chosen = experts_of_token(experts.config)
    if chosen is None:
        return "its configuration does not state how many experts a token gets"
    sets, of_sets = stated(experts.config, SETS), stated(experts.config, SETS_CHOSEN) or 1
    # Sets are compared by their two best experts.
    min_kept = chosen if sets is None else max(2, -(-chosen // of_sets))
    return Router(
        path=f"{name}.{weights[0][0]}",
        weight=weights[0][1],
        module=module,
        by_expert=tuple((path, dim) for path, (_, dim) in found.items()),
        corrections=tuple(tensor for path, (tensor, _) in found.items() if "bias" in path.rpartition(".")[2]),
        parameters=sum(tensor.numel() for tensor, _ in found.values() if isinstance(tensor, nn.Parameter)),
        sets=sets or 1,
        min_kept=min_kept,
    )


def experts_of_token(config: Any) -> int | None:
    """How many experts a token gets, where the configuration states it."""
    return stated(config, CHOSEN)


def named_tensors(module: nn.Module, *, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The module's parameters and buffers."""
    return itertools.chain(module.named_parameters(recurse=recurse), module.named_buffers(recurse=recurse))


def stated(config: Any, names: tuple[str, ...]) -> int | None:
    """The number that the configuration has under the first of the names that it knows; None where it knows none."""
    name = name_in(config, names)
    return None if name is None else int(getattr(config, name))
