"""The table in docs/large-models.md: how models of 8 to 405 billion parameters fit on GPUs of three sizes."""

from dataclasses import replace
from functools import cache
from typing import Any

from accelerate import init_empty_weights
from transformers import LlamaConfig, LlamaForCausalLM

from gradprune import PruneConfig
from gradprune.models.footprint import footprint
from gradprune.models.sizes import ModelShape, model_shape, with_unit

# By name: (hidden size, MLP width, layers, query heads, vocabulary). All have eight KV heads.
_MODELS = {
    "Llama-3 8B": (4096, 14336, 32, 32, 128256),
    "Qwen2.5 32B": (5120, 27648, 64, 40, 152064),
    "Llama-3 70B": (8192, 28672, 80, 64, 128256),
    "Llama-3 405B": (16384, 53248, 126, 128, 128256),
}
_DEVICES = {"24 GB": 24 * 10**9, "80 GB": 80 * 10**9, "141 GB": 141 * 10**9}
_CONFIG = PruneConfig(num_samples=128, seq_len=2048, batch_size=1, measure_speed=False, in_place=True)
# What is given up, step by step, if nothing fits with the default options: text for the table, and options.
_FALLBACKS: dict[str, dict[str, Any]] = {
    "": {},
    ", no repair": {"repair": "none"},
    ", no repair, group_fisher": {"repair": "none", "importance_method": "group_fisher"},
}


def rows() -> tuple[list[str], list[list[str]]]:
    """The table's header, and a row per model."""
    header = ["bf16", "weights", *_DEVICES, "host, streamed", "read, streamed"]
    made = []
    for name in _MODELS:
        shape = _shape(name)
        streamed = footprint(shape, _CONFIG, streamed=True, accelerated=True)
        cells = [_fitting(shape, room) for room in _DEVICES.values()]
        moved = f"{streamed.moved / 2**40:.1f} TiB"
        made.append([name, with_unit(shape.bytes), *cells, with_unit(streamed.host), moved])
    return header, made


@cache
def _shape(name: str) -> ModelShape:
    hidden, intermediate, layers, heads, vocabulary = _MODELS[name]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=vocabulary,
    )
    with init_empty_weights():
        return model_shape(LlamaForCausalLM(config), itemsize=2)


def _fitting(shape: ModelShape, room: int) -> str:
    """The fastest way to run that fits in `room` bytes, with its peak on the device; "-" if none fits."""
    for given_up, changes in _FALLBACKS.items():
        for way, streamed, recomputing in (
            ("whole", False, False),
            ("recomputing", False, True),
            ("streamed", True, True),
        ):
            config = replace(_CONFIG, **changes, use_gradient_checkpointing=recomputing)
            found = footprint(shape, config, streamed=streamed, accelerated=True)
            if found.fits(room):
                return f"{way}{given_up}: {with_unit(found.device)}"
    return "-"
