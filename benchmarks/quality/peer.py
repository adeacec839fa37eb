"""Torch-Pruning's choice of groups on a model that its graph can trace, as masks that this project cuts.

Scores are those of its `GroupTaylorImportance` with its defaults; the lowest of every layer go, the same share in all
layers, which is its default too (`global_pruning=False`). Its importances, its ranking; the same cut for both.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gradprune.models import Block, describe
from gradprune.models.masks import GroupMasks


def without_grouped_queries(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same function with one KV head a query head, by repeating KV heads.

    Torch-Pruning's graph of a model with two query heads a KV head does not end.
    """
    dense = model.config
    config = LlamaConfig.from_dict({**dense.to_dict(), "num_key_value_heads": dense.num_attention_heads})
    repeated = LlamaForCausalLM._from_config(config, dtype=model.dtype).eval()
    state = model.state_dict()
    for name, weight in state.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            heads = weight.view(dense.num_key_value_heads, -1, weight.shape[1])
            times = dense.num_attention_heads // dense.num_key_value_heads
            state[name] = heads.repeat_interleave(times, 0).flatten(0, 1)
    repeated.load_state_dict(state)
    return repeated


def torch_pruning_scores(model: PreTrainedModel, batches: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Per layer, its importances of the heads and of the MLP channels.

    Raises:
        ImportError: torch-pruning is not installed.
    """
    import torch_pruning

    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        for ids in batches:
            (model(input_ids=ids, labels=ids, use_cache=False).loss / len(batches)).backward()
        graph = torch_pruning.DependencyGraph().build_dependency(
            model,
            example_inputs={"input_ids": batches[0][:1, :16], "use_cache": False},
            output_transform=lambda output: output.logits,
            verbose=False,
        )
        importance = torch_pruning.importance.GroupTaylorImportance()
        heads, channels = [], []
        for layer in describe(model).layers:
            roots = (layer.self_attn.k_proj, layer.mlp.gate_proj)
            groups = [
                graph.get_pruning_group(root, torch_pruning.prune_linear_out_channels, list(range(root.out_features)))
                for root in roots
            ]
            by_row, by_channel = (importance(group) for group in groups)
            heads.append(by_row.view(-1, layer.self_attn.head_dim).sum(1))
            channels.append(by_channel)
        return heads, channels
    finally:
        model.zero_grad(set_to_none=True)
        model.set_attn_implementation(attention)


def uniform_masks(model: PreTrainedModel, heads: list[Tensor], channels: list[Tensor], budget: int) -> GroupMasks:
    """Keep what scores highest in each layer: the same number in all, removing at most `budget` parameters."""
    view = describe(model)
    attention, mlp = (_first(view.of_kind(kind)) for kind in ("attention", "mlp"))
    of_layer = budget // len(view.layers)
    share = of_layer / (attention.groups * attention.cost + mlp.groups * mlp.cost)
    lost_heads = min(int(share * attention.groups), attention.groups - 1)
    lost_channels = min((of_layer - lost_heads * attention.cost) // mlp.cost, mlp.groups - 1)
    return GroupMasks.of_layers(
        attention=tuple(_without_lowest(scores, lost_heads) for scores in heads),
        mlp=tuple(_without_lowest(scores, lost_channels) for scores in channels),
    )


def _first(blocks: Sequence[Block | None]) -> Block:
    """All layers of a dense model are alike."""
    return next(block for block in blocks if block is not None)


def _without_lowest(scores: Tensor, count: int) -> Tensor:
    kept = torch.ones(len(scores), dtype=torch.bool)
    kept[scores.argsort(stable=True)[:count]] = False
    return kept
