"""Each sample's own loss, so that its gradient stands by itself in the sum."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

# Logits of 2^24 elements take 64 MiB in fp32; larger ones are made, and remade in the backward pass, by chunks.
MAX_LOGITS = 2**24


def sample_losses(model: PreTrainedModel, input_ids: Tensor, max_logits: int = MAX_LOGITS) -> Tensor:
    """l_n, the mean next-token negative log-likelihood of each sample; differentiable.

    The vocabulary projection runs over chunks of tokens, so that the logits never exist whole.

    Args:
        model: a causal LM whose logits are its output embedding of the decoder's last hidden state.
        input_ids: [N, T] int64 on the model's device, T >= 2.
        max_logits: most elements of logits that exist at once (one token's at least).

    Returns:
        [N] nats a token; fp32, fp64 for an fp64 model.
    """
    hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    hidden, targets = hidden[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()
    chunk = max(1, max_logits // head.weight.shape[0])
    if len(targets) <= chunk:
        nll = _token_nll(head, hidden, targets)
    else:
        parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
        # Nothing in it is random: no generator's state is kept for when it is made again.
        nll = torch.cat(
            [checkpoint(_token_nll, head, h, t, use_reentrant=False, preserve_rng_state=False) for h, t in parts]
        )
    samples, tokens = input_ids.shape
    return nll.view(samples, tokens - 1).mean(1)


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batches: Sequence[Tensor]) -> float:
    """Mean of l_n over the samples of all batches [N, T], in nats a token."""
    losses = [sample_losses(model, batch.to(model.device)) for batch in batches]
    return torch.cat(losses).double().mean().item()


def _token_nll(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """[K] negative log-likelihood of targets [K] given hidden states [K, H]."""
    logits = head(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, reduction="none")
