"""The architectures that the test suite prunes, saves and reloads, with the kinds of blocks that it prunes there."""

_BOTH = ("attention", "mlp")

TESTED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "phi3",
        ),
        _BOTH,
    ),
}
"""By `config.model_type`. A kind that is not named is left whole."""


def tested_architectures() -> str:
    """The tested `model_type`s, for messages."""
    return ", ".join(sorted(TESTED))
