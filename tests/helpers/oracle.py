"""Group importances straight from their definitions: dense fp64 gradients by autograd, Python loops over groups."""

import copy
import math
import statistics
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

# Element scores by method, from the weights w, the first-order scores a, and the means h of the squared gradients.
ELEMENT_SCORES = {
    "taylor": lambda w, a, h: a,
    "taylor_2nd": lambda w, a, h: a + 0.5 * w**2 * h,
    "fisher": lambda w, a, h: 0.5 * w**2 * h,
}


def oracle_scores(
    model: PreTrainedModel, ids: Tensor, method: str, reduction: str, batch_size: int
) -> tuple[list[Tensor], list[Tensor]]:
    """The importances of the attention groups and of the MLP groups, each as a list of one fp64 tensor per layer."""
    model = copy.deepcopy(model).double()
    split = 1 if reduction == "sample" else batch_size
    gradients = [_gradients(model, part) for part in ids.split(split)]
    inputs = _output_inputs(model, ids)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    attention, mlp = [], []
    reaches: tuple[list[float], list[float]] = ([], [])
    for layer in range(model.config.num_hidden_layers):
        for kind, result in enumerate((attention, mlp)):
            groups = list(_groups(model, layer, ("attention", "mlp")[kind]))
            if method == "obs":
                costs, reach = _removal_costs(model, ids, groups, weights, inputs)
                result.append(costs)
                reaches[kind].append(reach)
                continue
            result.append(torch.stack([_importance(g, weights, gradients, inputs, method, reduction) for g in groups]))
    for of_kind, found in zip(reaches, (attention, mlp), strict=True):
        for costs, reach in zip(found, of_kind, strict=method == "obs"):
            costs *= reach / statistics.median(of_kind)
    return attention, mlp


def _importance(group, weights, gradients, inputs, method, reduction) -> Tensor:
    *_, (output, _, columns) = group
    if method == "group_fisher":
        masks = [(weights[output][:, columns] * g[output][:, columns]).sum() for g in gradients]
        return torch.stack([m**2 for m in masks]).mean()
    if method == "wanda":
        rms = inputs[output][:, columns].square().mean(0).sqrt()
        return (weights[output][:, columns].abs() * rms).sum()
    total = torch.zeros((), dtype=torch.float64)
    for name, rows, cols in group:
        w = weights[name][rows][:, cols]
        if method == "magnitude":
            total += w.abs().sum()
            continue
        parts = [g[name][rows][:, cols] for g in gradients]
        if reduction == "sample":
            a = torch.stack([(w * g).abs() for g in parts]).mean(0)
        else:
            a = (w * torch.stack(parts).mean(0)).abs()
        h = torch.stack([g**2 for g in parts]).mean(0)
        total += ELEMENT_SCORES[method](w, a, h).sum()
    return total


def _removal_costs(model, ids: Tensor, groups, weights, inputs) -> tuple[Tensor, float]:
    """Repeatedly remove the group with the cheapest least-squares optimum; return the added costs and the reach.

    The costs are made to ascend in the order of removal. The reach is the divergence of the predictions without half of
    the groups, divided by the cost of these groups; it is not yet relative to a median.
    """
    output = groups[0][-1][0]
    w, x = weights[output], inputs[output]
    gram = x.T @ x / len(x)
    gram += 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    squares = [
        _output_gradient(model, sample, output.removesuffix(".weight")).square().sum() for sample in ids.split(1)
    ]
    curvature = torch.stack(squares).mean() / len(w)

    def optimum(gone: list[int]) -> Tensor:
        """1/2 g min tr((W' - W) A (W' - W)^T) over W' without the columns of `gone` groups, by a Schur complement."""
        out = [column for group in gone for column in groups[group][-1][2]]
        rest = [column for column in range(w.shape[1]) if column not in out]
        across = gram[rest][:, out]
        left = gram[out][:, out] - across.T @ torch.linalg.solve(gram[rest][:, rest], across)
        return 0.5 * curvature * ((w[:, out] @ left) * w[:, out]).sum()

    gone: list[int] = []
    costs, last = torch.zeros(len(groups), dtype=torch.float64), 0.0
    while len(gone) < len(groups):
        totals = {group: optimum([*gone, group]) for group in range(len(groups)) if group not in gone}
        cheapest = min(totals, key=totals.__getitem__)
        # Equal costs are 2^-20 apart, so that sorting keeps their order.
        last = max(last * (1.0 + 2.0**-20), float(totals[cheapest] - (optimum(gone) if gone else 0.0)))
        costs[cheapest] = last
        gone.append(cheapest)
    part = gone[: max(1, len(groups) // 2)]
    rest = [column for group in range(len(groups)) if group not in part for column in groups[group][-1][2]]
    solved = torch.zeros_like(w)
    solved[:, rest] = torch.linalg.solve(gram[rest][:, rest], gram[rest] @ w.T).T
    return costs, divergence(model, ids[: samples_followed(len(ids), model)], output, solved) / float(optimum(part))


def samples_followed(samples: int, model: PreTrainedModel) -> int:
    """How many samples to follow, so that this takes a sixth of a forward and backward pass over all samples.

    On average a block's stream passes half of the layers; a forward and backward pass counts as three forward passes.
    """
    blocks = 2 * model.config.num_hidden_layers
    return min(samples, max(2, math.floor(3 * samples / 6 / (blocks / 2))))


def divergence(model: PreTrainedModel, ids: Tensor, name: str, weight: Tensor) -> float:
    """Mean, over every second token, of the KL divergence of the predictions if parameter `name` is `weight`."""
    changed = copy.deepcopy(model)
    changed.get_parameter(name).data = weight
    with torch.no_grad():
        p, q = (each(input_ids=ids, use_cache=False).logits.softmax(-1) for each in (model, changed))
    return float((p * (p / q).log()).sum(-1)[:, 1::2].mean())


def _output_gradient(model: PreTrainedModel, ids: Tensor, name: str) -> Tensor:
    """The gradient [T, O] of one sample's loss with respect to a module's output."""
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, _args, output: found.append(output))
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    handle.remove()
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    return torch.autograd.grad(loss, found[0])[0][0]


def _gradients(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _output_inputs(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    inputs, handles = {}, []
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _m, args, name=name: inputs.__setitem__(f"{name}.weight", args[0].detach().flatten(0, 1))
                )
            )
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return inputs


def _groups(model: PreTrainedModel, layer: int, kind: str) -> Iterator[list[tuple[str, list[int], list[int]]]]:
    """Each group's weights as (name, rows, columns); the output projection comes last."""
    config = model.config
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    everything = list(range(config.hidden_size))
    ratio = heads // kv_heads
    prefix = f"model.layers.{layer}."
    fused = config.model_type == "phi3"
    if kind == "mlp":
        for channel in range(width):
            if fused:
                yield [
                    (prefix + "mlp.gate_up_proj.weight", [channel, width + channel], everything),
                    (prefix + "mlp.down_proj.weight", everything, [channel]),
                ]
            else:
                yield [
                    (prefix + "mlp.gate_proj.weight", [channel], everything),
                    (prefix + "mlp.up_proj.weight", [channel], everything),
                    (prefix + "mlp.down_proj.weight", everything, [channel]),
                ]
        return
    for kv in range(kv_heads):
        q = [r for head in range(kv * ratio, (kv + 1) * ratio) for r in range(head * head_dim, (head + 1) * head_dim)]
        k = list(range(kv * head_dim, (kv + 1) * head_dim))
        if fused:
            k_start, v_start = heads * head_dim, (heads + kv_heads) * head_dim
            rows = q + [k_start + r for r in k] + [v_start + r for r in k]
            yield [
                (prefix + "self_attn.qkv_proj.weight", rows, everything),
                (prefix + "self_attn.o_proj.weight", everything, q),
            ]
        else:
            yield [
                (prefix + "self_attn.q_proj.weight", q, everything),
                (prefix + "self_attn.k_proj.weight", k, everything),
                (prefix + "self_attn.v_proj.weight", k, everything),
                (prefix + "self_attn.o_proj.weight", everything, q),
            ]


def oracle_layer_statistics(model: PreTrainedModel, ids: Tensor, layer: int) -> dict[str, float]:
    """Mean, std, L2 norm, maximum and minimum of |g| over a layer's prunable weights and all samples.

    The squared norm is the mean over samples.
    """
    model = copy.deepcopy(model).double()
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj")
    parts, norms = [], []
    for sample in ids.split(1):
        gradients = _gradients(model, sample)
        own = [
            g.flatten()
            for name, g in gradients.items()
            if name.startswith(f"model.layers.{layer}.") and name.removesuffix(".weight").endswith(names)
        ]
        parts.append(torch.cat(own).abs())
        norms.append(torch.cat(own).square().sum().item())
    absolute = torch.cat(parts)
    return {
        "mean": absolute.mean().item(),
        "std": absolute.std(correction=0).item(),
        "norm": math.sqrt(sum(norms) / len(norms)),
        "maximum": absolute.max().item(),
        "minimum": absolute.min().item(),
    }
