"""What a peer chooses, how it is applied to a model, and the two ways in which peers spend their budget."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradprune.models import Block, BlockKey, PrunableModel
from gradprune.models.masks import GroupMasks
from gradprune.models.modes import evaluation_mode, values_restored
from gradprune.models.streams import Streams
from gradprune.surgery.masking import mask_output, masked

Decide = Callable[[Block, Tensor], Tensor]
"""Function from a block and its output projection's inputs [tokens, I] to the groups that are kept, [groups] bool. It
may change the projection's weights."""


@dataclass(frozen=True)
class PeerChoice:
    """What a peer keeps, and how it compensates for the rest.

    weights: the weights [O, I] of output projections that the peer changed, by block. biases: the vectors [O] that it
    adds to blocks' outputs; the architectures have no such bias, so the pruned model gains O parameters for each.
    """

    masks: GroupMasks
    weights: Mapping[BlockKey, Tensor] = field(default_factory=dict)
    biases: Mapping[BlockKey, Tensor] = field(default_factory=dict)


Peer = Callable[[PrunableModel, Sequence[Tensor], int], PeerChoice]
"""Function from a model, batches of calibration ids ([N, T] int64 each), and the number of parameters that may be
removed at most. It leaves the model as it was."""


def obstacle(view: PrunableModel, uniform: bool) -> str | None:
    """Why a peer cannot prune the model, or None.

    uniform: whether the peer removes the same number of groups from every layer.
    """
    shapes: dict[str, set[tuple[int, int]]] = {}
    for block in view.blocks:
        shapes.setdefault(block.kind.name, set()).add((block.groups, block.cost))
    if set(shapes) != {"attention", "mlp"}:
        return f"it prunes attention and mlp blocks, but the model's blocks are {', '.join(shapes)}"
    if uniform and (len(view.blocks) != 2 * len(view.layers) or any(len(of_kind) > 1 for of_kind in shapes.values())):
        return "it removes the same number of groups from every layer, but the model's layers differ"
    return None


@contextmanager
def applied(view: PrunableModel, choice: PeerChoice) -> Iterator[None]:
    """While active, the model computes what the peer's pruned model would compute."""
    with ExitStack() as stack:
        stack.enter_context(outputs_restored(view))
        for block in view.blocks:
            if block.key in choice.weights:
                with torch.no_grad():
                    block.output.weight.copy_(choice.weights[block.key])
            if block.key in choice.biases:
                bias = choice.biases[block.key]
                hook = block.output.linear.register_forward_hook(lambda _m, _x, y, bias=bias: y + bias.to(y))
                stack.callback(hook.remove)
        stack.enter_context(masked(view, choice.masks))
        yield


def take_gradients(model: PreTrainedModel, batches: Sequence[Tensor]) -> None:
    """Add the gradients of the mean loss of all windows to `.grad`; batches: ids [N, T] int64 each; N may differ."""
    windows = sum(len(ids) for ids in batches)
    for ids in batches:
        ids = ids.to(model.device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        (loss * (len(ids) / windows)).backward()


@torch.no_grad()
def in_order(view: PrunableModel, batches: Sequence[Tensor], decide: Decide) -> GroupMasks:
    """Decide block by block, in forward order: each sees its inputs in the model as pruned so far.

    The output projections keep what `decide` writes into them, with the pruned columns zeroed.
    """
    kept: dict[BlockKey, Tensor] = {}
    with evaluation_mode(view.model):
        streams = Streams(view, batches)
        current = streams.take_first()
        for layer in range(len(view.layers)):
            written: list[dict[torch.nn.Module, Tensor]] = [{} for _ in current]
            for block in view.of_layer(layer):
                inputs = [streams.output_input(block, k, stream, written[k]) for k, stream in enumerate(current)]
                kept[block.key] = decide(block, torch.cat([x.flatten(0, -2) for x in inputs]))
                mask_output(block, kept[block.key])
                for batch, x in enumerate(inputs):
                    written[batch][block.module] = block.output.linear(x)
            current = [streams.run_layer(layer, k, stream, written[k]) for k, stream in enumerate(current)]
    return GroupMasks(kept, len(view.layers))


def outputs_restored(view: PrunableModel) -> AbstractContextManager[None]:
    """Context manager that restores the output projections on exit to what they were on entry."""
    return values_restored(parameter for block in view.blocks for _, parameter in block.output_parameters())


def uniform_counts(view: PrunableModel, budget: int, layers: Sequence[int] | None = None) -> dict[str, int]:
    """Return by kind how many groups to remove from each of `layers` (None: all), at most `budget` parameters in total.

    KV groups are coarse: their share is rounded down, and MLP channels make up for it. At least one group of each kind
    stays in every layer.
    """
    count = len(view.layers if layers is None else layers)
    attention, mlp = (next(b for b in view.blocks if b.kind.name == kind) for kind in ("attention", "mlp"))
    of_layer = budget // count
    share = of_layer / (attention.groups * attention.cost + mlp.groups * mlp.cost)
    lost_heads = min(int(share * attention.groups), attention.groups - 1)
    lost_channels = min((of_layer - lost_heads * attention.cost) // mlp.cost, mlp.groups - 1)
    return {"attention": lost_heads, "mlp": lost_channels}


def uniform_masks(
    view: PrunableModel, scores: Mapping[BlockKey, Tensor], budget: int, layers: Sequence[int] | None = None
) -> GroupMasks:
    """Remove the groups that score lowest in each of `layers` (None: all), the same number in each; none elsewhere."""
    lost = uniform_counts(view, budget, layers)
    kept = {
        block.key: without_lowest(
            scores[block.key], lost[block.kind.name] if layers is None or block.layer in layers else 0
        )
        for block in view.blocks
    }
    return GroupMasks(kept, len(view.layers))


def global_masks(view: PrunableModel, scores: Mapping[BlockKey, Tensor], budget: int) -> GroupMasks:
    """Remove the groups that score lowest in the whole model, skipping those that no longer fit into the budget."""
    masks = GroupMasks(
        {block.key: torch.ones(block.groups, dtype=torch.bool) for block in view.blocks}, len(view.layers)
    )
    groups = [(block, group) for block in view.blocks for group in range(block.groups)]
    order = torch.cat([scores[block.key] for block in view.blocks]).argsort(stable=True).tolist()
    for block, group in (groups[position] for position in order):
        if block.cost <= budget:
            masks[block][group] = False
            budget -= block.cost
    return masks


def without_lowest(scores: Tensor, count: int) -> Tensor:
    """[groups] bool: all but the `count` that score lowest."""
    kept = torch.ones(len(scores), dtype=torch.bool)
    kept[scores.argsort(stable=True)[:count].to(kept.device)] = False
    return kept
