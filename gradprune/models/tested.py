"""The architectures that the test suite prunes, saves and reloads, and the kinds of blocks that it prunes in each."""

from transformers import PreTrainedConfig

from gradprune.models.modeling_gradprune import causal_lm, text_config

_BOTH = ("attention", "mlp")
_EXPERTS = ("expert_channels", "experts")

TESTED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "apertus",
            "arcee",
            "cohere",
            "cohere2",
            "ernie4_5",
            "exaone4",
            "gemma",
            "gemma2",
            "gemma3",
            "gemma3_text",
            "glm",
            "glm4",
            "falcon",
            "gpt2",
            "gpt_neox",
            "granite",
            "helium",
            "hunyuan_v1_dense",
            "llama",
            "llava",
            "ministral",
            "mistral",
            "mistral3",
            "nemotron",
            "olmo",
            "phi",
            "phi3",
            "qwen2",
            "qwen2_5_vl",
            "qwen2_vl",
            "qwen3",
            "qwen3_vl",
            "seed_oss",
            "smollm3",
            "starcoder2",
        ),
        _BOTH,
    ),
    **dict.fromkeys(("bloom", "olmo2", "olmo3"), ("mlp",)),
    **dict.fromkeys(("gpt_oss", "mixtral"), ("attention", *_EXPERTS)),
    "qwen3_moe": (*_BOTH, *_EXPERTS),
    "olmoe": _EXPERTS,
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), ("mlp", *_EXPERTS, "shared_experts")),
    "glm4_moe": (*_BOTH, *_EXPERTS, "shared_experts"),
    "qwen2_moe": (*_BOTH, *_EXPERTS, "shared_experts"),
}
"""The kinds of blocks that are pruned, by `config.model_type`; a kind that is not listed is left whole."""


_NORM = {"attention": "its norms of queries and keys span all heads, so removing a head would change them"}
_LATENT = {"attention": "its heads share compressed keys and values"}
LEFT_WHOLE: dict[str, dict[str, str]] = {
    **dict.fromkeys(("olmo2", "olmo3", "olmoe"), _NORM),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _LATENT),
    "bloom": {"attention": "its heads differ by a bias on distances (alibi), which depends on their number"},
}
"""By `config.model_type` and kind of block, why a kind that these architectures have is left whole."""


def tested_kinds(config: PreTrainedConfig) -> tuple[str, ...]:
    """Return the kinds of blocks that are pruned in models of this configuration; empty if it is not a tested one.

    Some vision-language models accept decoders of different architectures, so the decoder's must be tested as well.
    """
    decoder = text_config(config).model_type
    named = decoder != config.model_type and causal_lm(decoder) is not None
    return () if named and decoder not in TESTED else TESTED.get(config.model_type, ())


def tested_architectures() -> str:
    """Return the tested `model_type`s as a list for messages."""
    return ", ".join(sorted(TESTED))
