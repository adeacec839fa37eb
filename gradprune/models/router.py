"""The router of a mixture of experts: the module that chooses each token's experts, and its entries for each expert."""

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
"""Names of the number of experts per token in configurations; the first name that a configuration has counts."""
SETS, SETS_CHOSEN = ("n_group", "num_expert_group"), ("topk_group", "num_limited_groups")
"""Names of the number of sets of experts, and of the number of sets that a token's experts are chosen from."""

Logits = Callable[..., Tensor]
"""Computes a router's logits [..., E] from x [..., H], weight [E, H] and bias, like `torch.nn.functional.linear`."""


@dataclass(frozen=True)
class Router:
    """The router, which chooses the experts of each token.

    path: the path of its weight in the block. weight: [E, H]. module: the module that computes with the weight.
    by_expert: the parameters and buffers with an entry for every expert: path in the block, and the dimension that
        indexes experts.
    corrections: the tensors among `by_expert` that are added to the scores before experts are chosen.
    parameters: the number of elements of the parameters among `by_expert`.
    sets: the number of sets of neighbouring experts; if it is more than 1, the router first chooses among the sets.
    min_kept: the number of experts that each set has to keep for a token to get as many experts as before.
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
        """Context manager in which the router's logits are computed by `logits`."""
        own = self.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with _LinearReplaced(len(self.weight), logits):
                return own(*args, **kwargs)

        with forward_replaced(self.module, forward):
            yield


class _LinearReplaced(TorchFunctionMode):
    """While active, replaces `torch.nn.functional.linear` for weights with `outputs` rows."""

    def __init__(self, outputs: int, replacement: Logits) -> None:
        super().__init__()
        self._outputs = outputs
        self._replacement = replacement

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replaced = func is F.linear and len(args[1]) == self._outputs
        return (self._replacement if replaced else func)(*args, **(kwargs or {}))


def find_router(parent: nn.Module, experts: Any, count: int) -> Router | str:
    """Return the router of a mixture of experts, or the reason, for messages, why there is none that can be cut.

    Args:
        parent: the module that routes tokens and calls the experts' module.
        experts: the experts' module, which holds the configuration.
        count: the number of experts.
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
    # Sets are compared by their two best experts, so each needs at least two.
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
    """The number of experts per token; None if the configuration does not state it."""
    return stated(config, CHOSEN)


def named_tensors(module: nn.Module, *, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Return the names and tensors of a module's parameters and buffers."""
    return itertools.chain(module.named_parameters(recurse=recurse), module.named_buffers(recurse=recurse))


def stated(config: Any, names: tuple[str, ...]) -> int | None:
    """The number under the first of `names` that the configuration has; None if it has none of them."""
    name = name_in(config, names)
    return None if name is None else int(getattr(config, name))
