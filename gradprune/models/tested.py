"""The architectures that the test suite prunes, saves and reloads, with the kinds of blocks that it prunes there."""

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
            "gemma3_text",
            "glm",
            "glm4",
            "gpt_neox",
            "granite",
            "helium",
            "hunyuan_v1_dense",
            "llama",
            "ministral",
            "mistral",
            "nemotron",
            "olmo",
            "phi",
            "phi3",
            "qwen2",
            "qwen3",
            "seed_oss",
            "smollm3",
            "starcoder2",
        ),
        _BOTH,
    ),
    # Their norms of queries and keys span all heads.
    **dict.fromkeys(("olmo2", "olmo3"), ("mlp",)),
    **dict.fromkeys(("gpt_oss", "mixtral"), ("attention", *_EXPERTS)),
    "qwen3_moe": (*_BOTH, *_EXPERTS),
    "olmoe": _EXPERTS,
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), ("mlp", *_EXPERTS, "shared_experts")),
    "glm4_moe": (*_BOTH, *_EXPERTS, "shared_experts"),
    "qwen2_moe": (*_BOTH, *_EXPERTS, "shared_experts"),
}
"""By `config.model_type`. A kind that is not named is left whole."""


def tested_architectures() -> str:
    """The tested `model_type`s, for messages."""
    return ", ".join(sorted(TESTED))
