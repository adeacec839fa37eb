"""Calibration text that the model writes itself, to cover what it has learned if the dataset is of only one kind.

After the beginning-of-text token, each token is drawn from the model's own distribution at temperature 1. Such text is
used for quantization and pruning by Williams et al. 2024, arXiv:2410.17170, and Liu et al. 2023, arXiv:2305.17888.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from gradprune.data.windows import batches
from gradprune.errors import CalibrationError
from gradprune.models.modeling_gradprune import text_config
from gradprune.models.modes import evaluation_mode, plain_generation, seeded
from gradprune.models.residency import residency_of
from gradprune.ranks import ALONE, Ranks


def own_samples(
    model: PreTrainedModel,
    count: int,
    seq_len: int,
    *,
    batch_size: int,
    seed: int,
    ranks: Ranks = ALONE,
    advance: Callable[[int], None] = lambda _samples: None,
) -> Tensor:
    """Let the model write samples, starting each with its beginning-of-text token.

    A text that ends before `seq_len` tokens is followed by another one in the same sample, as in training.

    Args:
        model: a causal LM, not streamed.
        count, seq_len: number of samples, at least 1, and tokens per sample, including the beginning-of-text token.
        batch_size: number of samples that are written at the same time.
        seed: seed of the drawn tokens. Each batch gets a seed of its own derived from it, so that ranks can divide the
            batches.
        ranks: the processes that divide the batches.
        advance: called after each batch with its number of samples, and at the end with the number that other ranks
            wrote.

    Returns:
        [count, seq_len] int64 on the CPU, all ranks' samples.

    Raises:
        CalibrationError: the model is streamed, or its configuration names no token to begin a text with.
    """
    if residency_of(model) is not None:
        raise CalibrationError(
            "own_text: a streamed model would be read once for every token; load it whole (stream_layers off), or "
            "write the text with an inference engine and give it as dataset"
        )
    begun = torch.full((count, 1), _first_token(model))
    own = []
    with evaluation_mode(model), plain_generation(model):
        for number, batch in ranks.share(list(enumerate(batches(begun, batch_size)))):
            # Not seed + number, because a run with the next seed would then write mostly the same batches.
            of_batch = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
            own.append(_continued(model, batch, seq_len, of_batch))
            advance(len(batch))
    advance(count - sum(map(len, own)))
    return torch.cat(ranks.joined(own))


def _first_token(model: PreTrainedModel) -> int:
    """The token that begins a text: beginning-of-text or, for models trained without one, the end-of-text token."""
    config: PreTrainedConfig = text_config(model.config)
    for name in ("bos_token_id", "eos_token_id"):
        found = getattr(config, name, None)
        if found is not None:
            return int(found[0] if isinstance(found, list) else found)
    raise CalibrationError(
        "own_text: the model's config.json has neither a bos_token_id nor an eos_token_id to begin a text with; leave "
        "own_text out"
    )


def _continued(model: PreTrainedModel, begun: Tensor, length: int, seed: int) -> Tensor:
    """Continue the first tokens [N, 1] to texts [N, length] int64, on the CPU."""
    begun = begun.to(model.device)
    with seeded(seed, begun.device):
        found: Tensor = model.generate(  # type: ignore[operator]
            begun, attention_mask=torch.ones_like(begun), max_new_tokens=length - 1, do_sample=True, top_k=0,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return found.cpu()
