"""The loss of each sample by itself; the gradient of the losses' sum is the sum of the samples' gradients."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from gradprune.accumulation import accumulation_dtype
from gradprune.models.modeling_gradprune import text_config
from gradprune.models.modes import forward_replaced

# The head runs in chunks of tokens, so that no more than LOGITS (on a GPU CUDA_LOGITS) logits are in memory at the same
# time; but a chunk has at least MIN_TOKENS tokens, so that each read of the head's weight is amortised. On a CPU a
# chunk's logits stay in its cache (4 MiB in fp32); a GPU has memory for more (512 MiB), and fewer chunks are fewer
# launches.
LOGITS, CUDA_LOGITS, MIN_TOKENS = 2**20, 2**27, 256

Head = Callable[[Tensor], Tensor]
"""A function from the decoder's last hidden states [K, H] to logits [K, vocabulary]."""

# If a configuration sets one of these, the model's head is more than a linear layer.
_CHANGES_LOGITS = ("logit_scale", "logits_scaling", "final_logit_softcapping")

# Input for a model whose decoder is replaced: only the decoder would read it.
_NO_IDS = torch.zeros(1, 1, dtype=torch.int64)


def sample_losses(model: PreTrainedModel, input_ids: Tensor, chunk: int | None = None) -> Tensor:
    """The loss l_n of each sample, its mean next-token negative log-likelihood; differentiable.

    The head runs over chunks of tokens, so that all logits never exist at the same time. If it is frozen, the gradient
    with respect to its input is computed in the forward pass; otherwise the backward pass recomputes each chunk's
    logits.

    Args:
        model: a causal LM; for its head see `logits_of`.
        input_ids: [N, T] int64 on the model's device, T >= 2.
        chunk: tokens per chunk; by default as many as have 2^20 logits (on a GPU 2^27), but at least 256.

    Returns:
        [N] nats per token; fp32, or fp64 for an fp64 model.
    """
    hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    head = logits_of(model)
    weight = model.get_output_embeddings().weight
    hidden, targets = (x.to(weight.device) for x in (hidden[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()))
    chunk = chunk or tokens_at_once(weight.shape[0], cuda=hidden.is_cuda)
    frozen = type(head) is nn.Linear and not any(weight.requires_grad for weight in head.parameters())
    if hidden.requires_grad and frozen:
        nll: Tensor = _FrozenHeadNll.apply(hidden, targets, head, chunk)  # type: ignore[no-untyped-call]
    elif len(targets) <= chunk:
        nll = token_nll(head, hidden, targets)
    else:
        parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
        # Nothing is random here, so the random generator's state need not be saved for the recomputation.
        nll = torch.cat(
            [checkpoint(token_nll, head, h, t, use_reentrant=False, preserve_rng_state=False) for h, t in parts]
        )
    samples, tokens = input_ids.shape
    return nll.view(samples, tokens - 1).mean(1)


def tokens_at_once(vocabulary: int, *, cuda: bool) -> int:
    """Tokens per chunk for a head with this vocabulary, see `LOGITS`."""
    return max(MIN_TOKENS, (CUDA_LOGITS if cuda else LOGITS) // vocabulary)


def logits_of(model: PreTrainedModel) -> Head:
    """The model's head: its last linear layer, if the head is nothing more.

    If the architecture changes its logits further (by a scale or a soft cap), it is a function that runs the model's
    own forward pass with the given hidden states as the decoder's output.
    """
    configs = (model.config, text_config(model.config))
    if all(getattr(config, name, None) is None for config in configs for name in _CHANGES_LOGITS):
        head: nn.Linear = model.get_output_embeddings()
        return head
    decoder: Any = model.get_decoder()

    def logits(hidden: Tensor) -> Tensor:
        answer = MoeModelOutputWithPast(last_hidden_state=hidden[None])
        with forward_replaced(decoder, lambda *_args, **_kwargs: answer):
            found: Tensor = model(input_ids=_NO_IDS.to(hidden.device), use_cache=False).logits[0]
        return found

    return logits


def token_nll(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood, [K], of targets [K] given hidden states [K, H]."""
    logits = head(hidden)
    logits = logits.to(accumulation_dtype(logits))
    return F.cross_entropy(logits, targets.to(logits.device), reduction="none")


def times(dy: Tensor, weight: Tensor) -> Tensor:
    """Return dy W, [..., I], for dy [..., O] and W [O, I] of the same dtype."""
    if dy.device.type != "cpu" or dy.dtype not in (torch.bfloat16, torch.float16):
        return dy @ weight
    # On CPUs without half-precision units, W^T times a matrix is 80 times faster than a matrix times W.
    return (weight.T @ dy.flatten(0, -2).T.contiguous()).T.reshape(*dy.shape[:-1], weight.shape[1])


class _FrozenHeadNll(torch.autograd.Function):
    """`token_nll` of a frozen linear head, with its input's gradient computed in the forward pass.

    A token's loss depends on its own hidden state only, so the backward pass needs only d nll / d hidden, [K, H],
    instead of the logits [K, vocabulary]. With p = softmax(logits), d nll / d logits = p, minus 1 at the target.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Linear, chunk: int) -> Tensor:
        gradient = torch.empty_like(hidden)
        nll = []
        for h, t, into in zip(hidden.split(chunk), targets[:, None].split(chunk), gradient.split(chunk), strict=True):
            logits = head(h)
            exact = accumulation_dtype(logits)
            log_p = F.log_softmax(logits, dim=1, dtype=exact)
            nll.append(-log_p.gather(1, t))
            # The largest tensors are overwritten, so that no further tensor of their size is allocated.
            d_logits = torch.exp(log_p, out=log_p if log_p.dtype == logits.dtype else logits)
            d_logits.scatter_(1, t, torch.expm1(-nll[-1]).to(logits.dtype))
            into.copy_(times(d_logits, head.weight.to(logits.dtype)))
            del logits, log_p, d_logits
        ctx.save_for_backward(gradient)
        return torch.cat(nll)[:, 0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[:, None]).to(gradient.dtype), None, None, None
