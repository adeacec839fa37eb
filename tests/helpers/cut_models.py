"""Masks to cut models by, models masked by hand, and the check that both compute the same."""

import copy
from collections.abc import Iterator

import torch

from gradprune.models import describe
from gradprune.models.masks import GroupMasks
from helpers.tiny_models import tiny_ids

# For fp64: the cut model adds the same numbers, but matrix products that are blocked differently add them in another
# order.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


def random_masks(model, keep: float, seed: int = 0) -> GroupMasks:
    generator = torch.Generator().manual_seed(seed)
    view = describe(model)

    def draw(blocks):
        return tuple(
            torch.rand(block.groups, generator=generator) < keep if block else torch.ones(0, dtype=torch.bool)
            for block in blocks
        )

    return GroupMasks.of_layers(attention=draw(view.of_kind("attention")), mlp=draw(view.of_kind("mlp")))


def full_masks(model) -> GroupMasks:
    return random_masks(model, keep=2.0)


def extreme_masks(model) -> Iterator[tuple[str, GroupMasks]]:
    layers = len(model.model.layers)
    for layer in (0, layers - 1):
        for name, kinds in (
            ("attention", ["attention"]),
            ("mlp", ["mlp"]),
            ("whole layer", ["attention", "mlp"]),
        ):
            masks = full_masks(model)
            for kind in kinds:
                getattr(masks, kind)[layer][:] = False
            yield f"{name} of layer {layer}", masks
    for kind in ("attention", "mlp"):
        masks = full_masks(model)
        for mask in (*masks.attention, *masks.mlp):
            mask[:] = False
        getattr(masks, kind)[1][0] = True
        yield f"all but one {kind} group", masks
    masks = full_masks(model)
    for mask in masks.attention:
        mask[:] = False
    yield "no attention at all", masks


def masked(model, masks: GroupMasks):
    """A copy of the model with the removed groups' output columns zeroed, by index arithmetic written out here."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer, attention, mlp in zip(model.model.layers, masks.attention, masks.mlp, strict=True):
            o_proj, down_proj = layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight
            o_proj[:, ~attention.repeat_interleave(o_proj.shape[1] // len(attention))] = 0.0
            down_proj[:, ~mlp] = 0.0
    return model


def assert_same(found, expected, ids=None) -> None:
    ids = tiny_ids() if ids is None else ids
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, expected(ids).logits, **TOLERANCE)


def greedy(model, ids, steps: int = 8, cached: bool = True):
    """Greedy tokens by the model's own `generate`, or if not `cached`, by running the whole sequence for each token."""
    if cached:
        return model.generate(ids, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        for _ in range(steps):
            logits = model(ids, use_cache=False).logits[:, -1]
            logits[:, model.config.eos_token_id] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids
