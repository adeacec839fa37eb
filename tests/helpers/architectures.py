"""Tiny random models of the architectures that are described from their modules."""

from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from gradprune.models import describe
from gradprune.models.modeling_gradprune import causal_lm
from gradprune.models.shrink import with_random_weights

_GEMMA3 = {
    "sliding_window": 4,
    "query_pre_attn_scalar": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
# By model_type: what a tiny configuration sets beyond the common values (in text_config, for vision-language models).
OPTIONS: dict[str, dict[str, object]] = {
    "apertus": {},
    "arcee": {},
    "bloom": {},
    "cohere": {},
    "cohere2": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "ernie4_5": {"use_bias": True},
    "exaone4": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "falcon": {"new_decoder_architecture": True, "bias": True},
    "gemma": {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 4},
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "glm": {"attention_bias": True},
    "glm4": {},
    "gpt2": {},
    "gpt_neox": {"attention_bias": True},
    "granite": {"residual_multiplier": 0.5, "logits_scaling": 3.0, "attention_multiplier": 0.5},
    "helium": {},
    "hunyuan_v1_dense": {},
    "llava": {},
    "ministral": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral3": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "phi": {"partial_rotary_factor": 0.5},
    "qwen2_5_vl": {},
    "qwen2_vl": {},
    "qwen3_vl": {},
    "seed_oss": {},
    "smollm3": {},
    "starcoder2": {"use_bias": True},
}

_TOWER = {"intermediate_size": 12, "hidden_act": "gelu"}
_TRANSFORMER = {
    **_TOWER,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_QWEN = {**_TOWER, "depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 1, "temporal_patch_size": 1}
# For vision-language models: what their configuration sets beside text_config. None: the decoder's hidden size.
VISION: dict[str, dict[str, Any]] = {
    "gemma3": {"vision_config": _TRANSFORMER, "mm_tokens_per_image": 4, "image_token_index": 60},
    "llava": {"vision_config": {**_TRANSFORMER, "model_type": "clip_vision_model"}, "image_token_index": 60},
    "mistral3": {"vision_config": {**_TRANSFORMER, "model_type": "pixtral", "head_dim": 4}, "image_token_index": 60},
    "qwen2_vl": {"vision_config": {**_QWEN, "embed_dim": 8, "hidden_size": None}},
    "qwen2_5_vl": {"vision_config": {**_QWEN, "hidden_size": 8, "out_hidden_size": None}},
    "qwen3_vl": {
        "vision_config": {**_QWEN, "hidden_size": 8, "out_hidden_size": None, "deepstack_visual_indexes": [0]}
    },
}


def tiny(architecture: str, *, ratio: int = 2, kv_heads: int = 3, head_dim: int = 4, seed: int = 0, **options: object):
    """A random fp64 model of two layers in evaluation mode; the norms' weights and the biases are random too."""
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
    if architecture in ("bloom", "falcon", "gpt2", "gpt_neox"):
        del values["num_key_value_heads"], values["head_dim"]
    if architecture == "falcon":
        values |= {"num_kv_heads": kv_heads, "ffn_hidden_size": values.pop("intermediate_size")}
    if architecture in ("bloom", "gpt2"):
        # BLOOM's configuration files leave n_inner open too, which has no effect.
        channels = values.pop("intermediate_size")
        values["n_inner"] = channels if architecture == "gpt2" else None
    if architecture in VISION:
        values = _with_vision(architecture, values)
    torch.manual_seed(seed)
    model = getattr(transformers, causal_lm(architecture))(config_class(**values))
    return with_random_weights(model)


def _with_vision(architecture: str, text: dict[str, Any]) -> dict[str, Any]:
    """The values of a vision-language model's configuration, given those of its decoder."""
    vision = dict(VISION[architecture])
    tower = vision["vision_config"]
    vision["vision_config"] = {k: text["hidden_size"] if value is None else value for k, value in tower.items()}
    if architecture.startswith("qwen"):
        half = text["head_dim"] // 2
        sections = [half - half // 2, half // 2 - half // 4, half // 4]
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}
    return {**vision, "text_config": text, "tie_word_embeddings": text["tie_word_embeddings"]}


def random_masks_of(model, keep: float, seed: int = 0):
    """Masks that keep each group with probability `keep`."""
    from gradprune.models.masks import GroupMasks

    generator = torch.Generator().manual_seed(seed)
    view = describe(model)
    drawn = {block.key: torch.rand(block.groups, generator=generator) < keep for block in view.blocks}
    return GroupMasks(drawn, len(view.layers))


@contextmanager
def silenced(model, masks):
    """Context manager in which removed groups write nothing, because the output projection's input from them is zeroed.

    A block that keeps no group writes nothing at all, not even a bias.
    """

    def zeroed(kept, width):
        return lambda _module, args: (args[0] * kept.repeat_interleave(width).to(args[0]),)

    def nothing(_module, _args, output):
        return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

    with ExitStack() as stack:
        for block in describe(model).blocks:
            kept, linear = masks[block], block.output.linear
            width = block.width // len(kept)
            stack.callback(linear.register_forward_pre_hook(zeroed(kept, width)).remove)
            if not kept.any():
                stack.callback(block.writer.register_forward_hook(nothing).remove)
        yield
