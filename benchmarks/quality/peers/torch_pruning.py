"""Torch-Pruning's choice of groups on a model that its graph can trace, as masks that this project cuts.

Scores are those of its `GroupTaylorImportance` with its defaults. The lowest-scoring groups of each layer are removed,
the same share in all layers, as `choice.uniform_masks` selects; this is also its default (`global_pruning=False`).
"""

from collections.abc import Sequence

from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.quality.peers.choice import take_gradients
from gradprune.models import BlockKey, describe


def without_grouped_queries(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Make a model of the same function with one KV head per query head, by repeating KV heads.

    Torch-Pruning's tracing of a model with two query heads per KV head does not end.
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


def torch_pruning_scores(model: PreTrainedModel, batches: Sequence[Tensor]) -> dict[BlockKey, Tensor]:
    """Return Torch-Pruning's importances of the KV heads and of the MLP channels, [groups] by block.

    Raises:
        ImportError: torch-pruning is not installed.
    """
    import torch_pruning

    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        take_gradients(model, batches)
        graph = torch_pruning.DependencyGraph().build_dependency(
            model,
            example_inputs={"input_ids": batches[0][:1, :16].to(model.device), "use_cache": False},
            output_transform=lambda output: output.logits,
            verbose=False,
        )
        importance = torch_pruning.importance.GroupTaylorImportance()
        scores = {}
        for index, layer in enumerate(describe(model).layers):
            roots = (layer.self_attn.k_proj, layer.mlp.gate_proj)
            groups = [
                graph.get_pruning_group(root, torch_pruning.prune_linear_out_channels, list(range(root.out_features)))
                for root in roots
            ]
            by_row, by_channel = (importance(group) for group in groups)
            scores[BlockKey(index, "attention")] = by_row.view(-1, layer.self_attn.head_dim).sum(1)
            scores[BlockKey(index, "mlp")] = by_channel
        return scores
    finally:
        model.zero_grad(set_to_none=True)
        model.set_attn_implementation(attention)
