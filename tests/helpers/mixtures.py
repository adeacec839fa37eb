"""Tiny random mixtures of experts, and what pruning them means, written out without the package's own blocks."""

import copy

import torch
import torch.nn.functional as F
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gradprune.checkpoint.save import save_checkpoint
from gradprune.models.shrink import with_random_weights

EXPERTS, CHANNELS, HIDDEN = 4, 24, 16

# By model_type: what a tiny configuration sets beyond the common values.
MIXTURES: dict[str, dict[str, object]] = {
    "gpt_oss": {"num_local_experts": EXPERTS, "sliding_window": 4, "rope_parameters": {"rope_type": "default"}},
    "mixtral": {"num_local_experts": EXPERTS, "sliding_window": None},
    "olmoe": {"num_experts": EXPERTS},
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": CHANNELS, "mlp_only_layers": []},
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
}
_SHARED = {"n_routed_experts": EXPERTS, "moe_intermediate_size": CHANNELS, "n_shared_experts": 1, "n_group": 1}
# The same for mixtures that have shared experts beside the routed ones.
WITH_SHARED: dict[str, dict[str, object]] = {
    "deepseek_v2": {
        **(_LATENT | _SHARED),
        "first_k_dense_replace": 0,
        "topk_group": 1,
        "topk_method": "greedy",
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v3": {**(_LATENT | _SHARED), "first_k_dense_replace": 0, "topk_group": 1},
    "glm4_moe": {**_SHARED, "first_k_dense_replace": 0, "topk_group": 1},
    "qwen2_moe": {
        "num_experts": EXPERTS,
        "moe_intermediate_size": CHANNELS,
        "shared_expert_intermediate_size": 10,
        "mlp_only_layers": [],
    },
}


def tiny_mixture(architecture: str = "qwen3_moe", *, top_k: int = 2, **options: object):
    """A random fp64 model of two layers with experts, in evaluation mode."""
    values = {
        "vocab_size": 61,
        "hidden_size": HIDDEN,
        "intermediate_size": CHANNELS,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "num_experts_per_tok": top_k,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        **(MIXTURES | WITH_SHARED)[architecture],
        **options,
    }
    if architecture == "gpt_oss":
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    config = getattr(transformers, CONFIG_MAPPING_NAMES[architecture])(**values)
    # Grouped matrix products do not support fp64.
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = with_random_weights(getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[architecture])(config))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.1)
    return model


def experts_of(model):
    """The experts' module of every layer that has one."""
    found = (getattr(layer.mlp, "experts", None) for layer in model.model.layers)
    return [module for module in found if module is not None]


def down_columns(module) -> torch.Tensor:
    """A view [E, I, H] of a module's output weights, with one row per channel."""
    return module.down_proj if module.is_transposed else module.down_proj.transpose(1, 2)


def input_rows(module, weights: torch.Tensor) -> torch.Tensor:
    """Each channel's rows of the gate and of the up projection, [E, I, 2, H].

    weights: the module's gate_up_proj, or a tensor of its shape.
    """
    rows = weights.transpose(1, 2) if module.is_transposed else weights
    experts, _, hidden = rows.shape
    if module.is_concatenated:
        return rows.view(experts, 2, -1, hidden).transpose(1, 2)
    return rows.reshape(experts, -1, 2, hidden)


def without_channels(model, masks):
    """A copy of the model in which removed channels and removed KV heads write nothing."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for key in masks:
            layer, gone = model.model.layers[key.layer], ~masks[key]
            if key.kind == "expert_channels":
                down_columns(layer.mlp.experts)[gone.view(EXPERTS, -1)] = 0.0
            else:
                output = layer.self_attn.o_proj.weight
                output[:, gone.repeat_interleave(output.shape[1] // len(gone))] = 0.0
    return model


def assert_cut_as(expected, model, pruned, ids, folder, tolerance):
    """Check that `pruned` and its saved plain checkpoint compute and generate what `expected` does, unlike `model`.

    Return the model loaded from the plain checkpoint.
    """
    generation = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        logits, tokens = expected(ids).logits, expected.generate(ids, **generation)
        assert not torch.allclose(model(ids).logits, logits)
        save_checkpoint(pruned, None, folder)
        assert not list(folder.glob("*.py"))
        stock = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
        assert type(stock) is type(model)
        for found in (pruned, stock):
            torch.testing.assert_close(found(ids).logits, logits, **tolerance)
            assert torch.equal(found.generate(ids, **generation), tokens)
    return stock


def channel_importances(model, ids) -> dict[str, list[torch.Tensor]]:
    """By method, each layer's channel importances [E * I], from autograd's gradients of every sample's loss."""
    modules = experts_of(model)
    found = {method: [torch.zeros(EXPERTS, CHANNELS).double() for _ in modules] for method in ("taylor", "fisher")}
    found |= {"group_fisher": [torch.zeros(EXPERTS, CHANNELS).double() for _ in modules]}
    for sample in ids.split(1):
        logits = model(input_ids=sample, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), sample[:, 1:].flatten())
        weights = [weight for module in modules for weight in (module.gate_up_proj, module.down_proj)]
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        for layer, module in enumerate(modules):
            inputs, outputs = (
                (weight * gradient).detach()
                for weight, gradient in zip(weights[2 * layer :][:2], gradients[2 * layer :][:2], strict=True)
            )
            rows = input_rows(module, inputs)
            columns = outputs if module.is_transposed else outputs.transpose(1, 2)
            found["taylor"][layer] += (rows.abs().sum((2, 3)) + columns.abs().sum(2)) / len(ids)
            found["fisher"][layer] += 0.5 * (rows.square().sum((2, 3)) + columns.square().sum(2)) / len(ids)
            found["group_fisher"][layer] += columns.sum(2).square() / len(ids)
    return {method: [of_layer.flatten() for of_layer in layers] for method, layers in found.items()}
