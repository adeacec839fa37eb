"""Tiny random models of every supported architecture."""

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gradprune import config

METHODS = tuple(method for method in config.METHODS if method != "reap")
"""The importance methods that score attention and MLPs."""
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
}
ARCHITECTURE_NAMES = tuple(CLASSES)
GQA_RATIOS = (1, 2, 3, 6, 7, 8)


def tiny_model(
    architecture: str = "llama",
    *,
    kv_heads: int = 3,
    ratio: int = 2,
    head_dim: int = 4,
    layers: int = 3,
    channels: int = 10,
    hidden: int = 12,
    vocab: int = 61,
    tied: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **overrides: object,
) -> PreTrainedModel:
    """A random model in evaluation mode; head_dim * heads need not be the hidden size.

    For "llama", `hidden` is multiplied by the number of heads.
    """
    config_class, model_class = CLASSES[architecture]
    hidden = hidden if architecture != "llama" else hidden * kv_heads * ratio
    made = config_class(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=channels,
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * ratio,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        **overrides,
    )
    torch.manual_seed(seed)
    model = model_class(made).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
    return model


def tiny_ids(samples: int = 4, tokens: int = 9, vocab: int = 61, seed: int = 1) -> torch.Tensor:
    """[samples, tokens] random token ids."""
    return torch.randint(3, vocab, (samples, tokens), generator=torch.Generator().manual_seed(seed))
