"""How mixtures of experts choose a token's experts among those that are kept, written out."""

import copy
from contextlib import contextmanager

import torch

from gradprune.models.modes import hooks_removed


@contextmanager
def routed(model, chosen):
    """Context manager in which tokens are routed to the experts `chosen`: [tokens of a batch, K], int64."""

    def reroute(_module, args, output):
        length = args[0].reshape(-1, args[0].shape[-1]).shape[0]
        return output[0], output[1], chosen[:length]

    with hooks_removed([router_of(layer).register_forward_hook(reroute) for layer in model.model.layers]):
        yield


def router_of(layer):
    """The router module of a decoder layer."""
    return layer.mlp.router if hasattr(layer.mlp, "router") else layer.mlp.gate


def route(config, router, x: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Route tokens x [S, H] among the experts `kept` ([E], bool); return their factors [S, K] and experts [S, K]."""
    numbers = kept.nonzero().flatten()
    x = x.reshape(-1, x.shape[-1])
    logits, count, name = x @ router.weight[numbers].T, config.num_experts_per_tok, config.model_type
    if name == "gpt_oss":
        top, chosen = (logits + router.bias[numbers]).topk(count)
        return top.softmax(-1), numbers[chosen]
    if name in ("deepseek_v3", "glm4_moe"):
        scores = logits.sigmoid()
        preferred = within_sets(config, scores + router.e_score_correction_bias[numbers], best=2)
    else:
        scores = logits.softmax(-1)
        preferred = within_sets(config, scores, best=1) if name == "deepseek_v2" else scores
    chosen = preferred.topk(count).indices
    factors = scores.gather(1, chosen)
    if name == "mixtral" or (name != "deepseek_v2" and config.norm_topk_prob):
        factors = factors / factors.sum(-1, keepdim=True)
    return factors * getattr(config, "routed_scaling_factor", 1.0), numbers[chosen]


def within_sets(config, scores: torch.Tensor, best: int) -> torch.Tensor:
    """The scores, set to -inf outside the chosen sets: those whose `best` highest scores have the largest sums."""
    if config.n_group == 1:
        return scores
    sets = scores.view(len(scores), config.n_group, -1)
    chosen = sets.topk(best).values.sum(-1).topk(config.topk_group).indices
    allowed = torch.zeros(sets.shape[:2], dtype=torch.bool).scatter(1, chosen, value=True)
    return sets.masked_fill(~allowed[:, :, None], -torch.inf).flatten(1)


def without_experts(model, masks):
    """A copy of the model whose tokens are routed only to experts that the masks keep."""

    def routed(router, kept):
        return lambda x: (None, *route(model.config, router, x, kept))

    model = copy.deepcopy(model)
    for key in masks:
        if key.kind == "experts":
            router = router_of(model.model.layers[key.layer])
            router.forward = routed(router, masks[key])
    return model
