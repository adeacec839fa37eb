"""Tiny random models of the architectures that are described from their modules."""

from contextlib import ExitStack, contextmanager

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gradprune.models import describe
from gradprune.models.shrink import with_random_weights

# By model_type: what a tiny configuration states beside the common values.
OPTIONS: dict[str, dict[str, object]] = {
    "apertus": {},
    "arcee": {},
    "cohere": {},
    "cohere2": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "ernie4_5": {"use_bias": True},
    "exaone4": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma": {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 4},
    "gemma3_text": {
        "sliding_window": 4,
        "query_pre_attn_scalar": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "glm": {"attention_bias": True},
    "glm4": {},
    "gpt_neox": {"attention_bias": True},
    "granite": {"residual_multiplier": 0.5, "logits_scaling": 3.0, "attention_multiplier": 0.5},
    "helium": {},
    "hunyuan_v1_dense": {},
    "ministral": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "phi": {"partial_rotary_factor": 0.5},
    "seed_oss": {},
    "smollm3": {},
    "starcoder2": {"use_bias": True},
}


def tiny(architecture: str, *, ratio: int = 2, kv_heads: int = 3, head_dim: int = 4, seed: int = 0, **options: object):
    """A random fp64 model of two layers in evaluation mode, norms' weights and biases random too."""
    heads = kv_heads * ratio
    config_class = getattr(transformers, CONFIG_MAPPING_NAMES[architecture])
    values = {
        "vocab_size": 61,
        "hidden_size": heads * head_dim,
        "intermediate_size": 10,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        **OPTIONS[architecture],
        **options,
    }
    if architecture == "gpt_neox":
        del values["num_key_value_heads"], values["head_dim"]
    torch.manual_seed(seed)
    model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[architecture])(config_class(**values))
    return with_random_weights(model)


def random_masks_of(model, keep: float, seed: int = 0):
    """What each block keeps, each group with that probability."""
    from gradprune.models.masks import GroupMasks

    generator = torch.Generator().manual_seed(seed)
    view = describe(model)
    drawn = {block.key: torch.rand(block.groups, generator=generator) < keep for block in view.blocks}
    return GroupMasks(drawn, len(view.layers))


@contextmanager
def silenced(model, masks):
    """Inside the context removed groups write nothing: what their output projection reads from them is zeroed."""

    def zeroed(kept, width):
        return lambda _module, args: (args[0] * kept.repeat_interleave(width).to(args[0]),)

    def nothing(_module, _args, output):
        return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

    with ExitStack() as stack:
        for block in describe(model).blocks:
            kept, linear = masks[block], block.output.linear
            width = linear.in_features // len(kept)
            stack.callback(linear.register_forward_pre_hook(zeroed(kept, width)).remove)
            if not kept.any():
                stack.callback(block.writer.register_forward_hook(nothing).remove)
        yield
