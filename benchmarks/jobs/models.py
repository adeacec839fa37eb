"""Randomly initialised Llamas by size, and random samples for them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from benchmarks.kernels.op import DTYPES

# Sizes that run on the CPU have one KV head per query head: at some GQA ratios Torch-Pruning's tracing never ends.
SIZES = {
    "toy": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "3M": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8},
    "28M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
    "110M": {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12, "num_attention_heads": 12},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
_VOCABULARY = {"toy": 128, "3M": 2048, "28M": 4096, "110M": 24576}
_LLAMA_3_VOCABULARY = 128256


@dataclass(frozen=True)
class Load:
    """The size of a calibration: `samples` samples of `tokens` tokens each, in batches of `batch`."""

    samples: int
    tokens: int
    batch: int

    @property
    def text(self) -> str:
        """The name of the load in results."""
        return f"{self.samples}x{self.tokens} tokens by {self.batch}"


def llama_config(size: str) -> LlamaConfig:
    """The configuration of a model of the given size, a key of `SIZES`."""
    shape, of_llama_3 = SIZES[size], size not in _VOCABULARY
    return LlamaConfig(
        vocab_size=_LLAMA_3_VOCABULARY if of_llama_3 else _VOCABULARY[size],
        num_key_value_heads=8 if of_llama_3 else shape["num_attention_heads"],
        tie_word_embeddings=size == "1B" or not of_llama_3,
        max_position_embeddings=8192,
        **shape,
    )


def build(size: str, device: str = "cpu", dtype: str = "fp32", layers: int | None = None) -> LlamaForCausalLM:
    """Build a random model in evaluation mode on `device`, the same every time; layers: None for those of the size."""
    config = llama_config(size)
    config.num_hidden_layers = layers or config.num_hidden_layers
    # transformers' own initialisation would draw every weight twice.
    with torch.device(device), no_init_weights():
        model = LlamaForCausalLM._from_config(config, dtype=DTYPES[dtype]).eval()
    model.tie_weights()
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=config.initializer_range)
    return model


def samples(model: LlamaForCausalLM, load: Load) -> list[Tensor]:
    """Batches of random token ids on the model's device; the same every time."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (load.samples, load.tokens), generator=generator)
    return list(ids.to(model.device).split(load.batch))
