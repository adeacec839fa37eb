"""Text that the model writes itself: samples of all that it has learned, where the dataset is of one kind.

Tokens are drawn from the model's own distribution, one after the other at temperature 1, from its beginning-of-text
token on (for quantization and pruning: Williams et al. 2024, arXiv:2410.17170; Liu et al. 2023, arXiv:2305.17888).
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
    """[count, seq_len] int64 on the CPU: what the model writes.

    Args:
        model: a causal LM, whole in memory.
        count, seq_len: number of samples, at least 1, and tokens of each, its beginning-of-text token included.
        batch_size: samples that are written at once.
        seed: of the drawn tokens; each batch has its own, so that ranks can divide them.
        ranks: the processes that divide the batches.
        advance: called with the number of samples after each batch.

    A text that ends before `seq_len` tokens is followed by the next one, as where a model is trained.

    Raises:
        CalibrationError: the model is streamed, or names no token to begin with.
    """
    if residency_of(model) is not None:
        raise CalibrationError(
            "own_text: a streamed model would be read once for every token; load it whole (stream_layers off), or "
            "write the text by an inference engine and give it as dataset"
        )
    begun = torch.full((count, 1), _first_token(model))
    own = []
    with evaluation_mode(model), plain_generation(model):
        for number, batch in ranks.share(list(enumerate(batches(begun, batch_size)))):
            # Not seed + number: other seeds would write most of the same batches.
            of_batch = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
            own.append(_written(model, batch, seq_len, of_batch))
            advance(len(batch))
    advance(count - sum(map(len, own)))
    return torch.cat(ranks.joined(own))


def _first_token(model: PreTrainedModel) -> int:
    """Where texts begin; models that were trained without such a token separate texts by one that ends them."""
    config: PreTrainedConfig = text_config(model.config)
    for name in ("bos_token_id", "eos_token_id"):
        found = getattr(config, name, None)
        if found is not None:
            return int(found[0] if isinstance(found, list) else found)
    raise CalibrationError(
        "own_text: the model's config.json has neither a bos_token_id nor an eos_token_id to begin a text with; leave "
        "own_text out"
    )


def _written(model: PreTrainedModel, begun: Tensor, length: int, seed: int) -> Tensor:
    """[N, length] on the CPU, of the ids [N, 1] that begin."""
    begun = begun.to(model.device)
    with seeded(seed, begun.device):
        found: Tensor = model.generate(  # type: ignore[operator]
            begun, attention_mask=torch.ones_like(begun), max_new_tokens=length - 1, do_sample=True, top_k=0,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return found.cpu()
