"""The providers of calibration, each of which scores every group from a model and batches as its project documents.

All work on the same model and batches, with the same threads and dtype, each in its fastest documented way. This
project and the plain pass run with the fused attention that transformers chooses; Torch-Pruning and `torch.func` run
with eager attention, because the former cannot trace any other and the latter has no batching rule for it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from gradprune import ImportanceEngine
from gradprune.calibration.engine import Scores
from gradprune.config import Method
from gradprune.models import Block, describe
from gradprune.models.modes import forward_replaced

# Suffix of the providers that recompute activations even if the job does not make every provider do so.
RECOMPUTING = " recomputing"
# Suffix of the providers that collect only what NEEDED_METHOD needs; its passes are the same as those of `obs`.
NEEDED = " needed evidence"
NEEDED_METHOD: Method = "group_fisher"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a calibration.

    scores: [groups of the model] by method; empty if none are computed. seconds: times of parts of the job, which are
        reported separately, by name.
    """

    scores: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibrator:
    """A provider. run: the job, called with (model, batches, whether to recompute activations).

    reduction: the engine's reduction that its scores are checked against; "mlp": only the proportions of the MLP
        channels within a layer are comparable; None: the scores are not checked.
    attention: the attention implementation that it runs with.
    """

    name: str
    run: Callable[[PreTrainedModel, Sequence[Tensor], bool], Outcome]
    reduction: Literal["sample", "batch", "mlp"] | None
    attention: str = "sdpa"


def calibrators(backends: Sequence[str]) -> list[Calibrator]:
    """Return all providers: this project with each backend, then what people would use instead."""
    kernels = [backend for backend in backends if backend != "reference"]
    return [
        *(Calibrator(f"gradprune {backend}", partial(_ours, backend), "sample") for backend in backends),
        *(Calibrator(f"gradprune {one}{RECOMPUTING}", partial(_ours_recomputing, one), "sample") for one in kernels),
        *(Calibrator(f"gradprune {one}{NEEDED}", partial(_ours_needed, one), None) for one in kernels),
        Calibrator("forward", _forward, None),
        Calibrator("plain", _plain, None),
        Calibrator("naive", _naive, "batch"),
        Calibrator("torch-pruning GroupTaylor", _group_taylor, "mlp", "eager"),
        Calibrator("torch-pruning GroupHessian", _group_hessian, None, "eager"),
        Calibrator("torch.func", _per_sample, "sample", "eager"),
    ]


def engine_scores(
    model: PreTrainedModel, batches: Sequence[Tensor], backend: str, reduction: str, recompute: bool
) -> dict[str, Tensor]:
    """This project's first-order (`taylor`) and second-order (`fisher`) importances, by method."""
    with ImportanceEngine(
        model, "taylor", reduction=reduction, backend=backend, use_gradient_checkpointing=recompute
    ) as engine:
        for ids in batches:
            engine.step(ids)
    return {method: _column(engine.scores(method)) for method in ("taylor", "fisher")}


def _ours(backend: str, model: PreTrainedModel, batches: Sequence[Tensor], recompute: bool) -> Outcome:
    return Outcome(engine_scores(model, batches, backend, "sample", recompute))


def _ours_recomputing(backend: str, model: PreTrainedModel, batches: Sequence[Tensor], _recompute: bool) -> Outcome:
    """With `use_gradient_checkpointing`: less memory, at the cost of a second forward pass."""
    return _ours(backend, model, batches, True)


def _ours_needed(backend: str, model: PreTrainedModel, batches: Sequence[Tensor], recompute: bool) -> Outcome:
    """Score without any weight gradients, which the method does not need; `prune` takes some only for its diagnosis."""
    with ImportanceEngine(
        model, NEEDED_METHOD, backend=backend, use_gradient_checkpointing=recompute, weight_gradient_steps=0
    ) as engine:
        for ids in batches:
            engine.step(ids)
    return Outcome({NEEDED_METHOD: _column(engine.scores())})


def _forward(model: PreTrainedModel, batches: Sequence[Tensor], _recompute: bool) -> Outcome:
    """Compute the loss with its graph, but no backward pass: this holds the activations of every gradient method."""
    for ids in batches:
        model(input_ids=ids, labels=ids, use_cache=False)
    return Outcome()


def _plain(model: PreTrainedModel, batches: Sequence[Tensor], recompute: bool) -> Outcome:
    """Run a forward pass and `loss.backward()`: the least that any gradient method costs. Nothing is scored."""
    with _recomputing(model, recompute):
        for ids in batches:
            model.zero_grad(set_to_none=True)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return Outcome()


def _naive(model: PreTrainedModel, batches: Sequence[Tensor], recompute: bool) -> Outcome:
    """Keep each batch's full gradients and a buffer of g^2; score in eager PyTorch, read statistics by `.item()`."""
    blocks = describe(model).blocks
    weights = [entry.linear.weight for block in blocks for entry in block.projections]
    squares = {weight: torch.zeros_like(weight, dtype=torch.float32) for weight in weights}
    first = _zeros(blocks)
    statistics = []
    for ids in batches:
        model.zero_grad(set_to_none=True)
        with _recomputing(model, recompute):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        with torch.no_grad():
            for weight in weights:
                gradient = weight.grad.float()
                squares[weight] += gradient * gradient
                magnitude = gradient.abs()
                statistics.append((magnitude.mean().item(), gradient.norm().item(), magnitude.max().item()))
            _add_folded(blocks, first, lambda weight: (weight * weight.grad).abs().float())
    second = _zeros(blocks)
    with torch.no_grad():
        _add_folded(blocks, second, lambda weight: 0.5 * weight.float() ** 2 * squares[weight])
    return Outcome(_means(first, second, len(batches)))


def _group_taylor(model: PreTrainedModel, batches: Sequence[Tensor], recompute: bool) -> Outcome:
    """Torch-Pruning: `loss.backward()` per batch, gradients accumulating in `.grad`, then each group's importance."""
    import torch_pruning

    with _recomputing(model, recompute):
        for ids in batches:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return _torch_pruning(model, batches[0], torch_pruning.importance.GroupTaylorImportance())


def _group_hessian(model: PreTrainedModel, batches: Sequence[Tensor], recompute: bool) -> Outcome:
    """Torch-Pruning's per-sample second order, as it documents it: one backward pass per sample.

    The scores are not checked: the accumulator keeps only the last sample, so they are not those of the whole batch.
    """
    import torch_pruning

    importance = torch_pruning.importance.GroupHessianImportance()
    with _recomputing(model, recompute):
        for ids in batches:
            losses = _sample_losses(model(input_ids=ids, use_cache=False).logits, ids)
            for loss in losses:
                model.zero_grad()
                loss.backward(retain_graph=True)
                importance.accumulate_grad(model)
            del losses
    return _torch_pruning(model, batches[0], importance)


def _torch_pruning(model: PreTrainedModel, ids: Tensor, importance: Callable[..., Tensor]) -> Outcome:
    """Build the dependency graph, then score every KV head and MLP channel; return the channels' scores.

    The time that the graph takes is also reported separately.
    """
    import torch_pruning

    start = time.perf_counter()
    graph = torch_pruning.DependencyGraph().build_dependency(
        model,
        example_inputs={"input_ids": ids[:1, :16], "use_cache": False},
        output_transform=lambda output: output.logits,
        verbose=False,
    )
    built = time.perf_counter() - start
    channels = []
    for layer in describe(model).layers:
        for root in (layer.self_attn.k_proj, layer.mlp.gate_proj):
            group = graph.get_pruning_group(
                root, torch_pruning.prune_linear_out_channels, list(range(root.out_features))
            )
            scores = importance(group)
        channels.append(scores)
    return Outcome({"taylor": torch.cat(channels).cpu()}, {"graph": built})


def _per_sample(model: PreTrainedModel, batches: Sequence[Tensor], _recompute: bool) -> Outcome:
    """`torch.func.vmap(grad)`: the prunable weights' gradients of all of a batch's samples, then the exact sums."""
    blocks = describe(model).blocks
    prunable = {entry.linear.weight for block in blocks for entry in block.projections}
    weights = {name: value for name, value in model.named_parameters() if value in prunable}
    names = {value: name for name, value in weights.items()}

    def loss(values: dict[str, Tensor], ids: Tensor) -> Tensor:
        inputs = {"input_ids": ids[None], "use_cache": False}
        return _sample_losses(torch.func.functional_call(model, values, (), inputs).logits, ids[None])[0]

    gradients_of = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    first, second = _zeros(blocks), _zeros(blocks)
    with _frozen(model):
        for ids in batches:
            values = {name: value.detach() for name, value in weights.items()}
            _add_samples(blocks, first, second, names, gradients_of(values, ids))
    return Outcome(_means(first, second, sum(len(ids) for ids in batches)))


def _add_samples(
    blocks: Sequence[Block],
    first: list[Tensor],
    second: list[Tensor],
    names: dict[Tensor, str],
    found: dict[str, Tensor],
) -> None:
    """Add the samples' scores to `first` and `second`; found: the samples' gradients by weight name, [N, O, I]."""
    _add_folded(blocks, first, lambda weight: (weight * found[names[weight]]).abs().sum(0).float())
    _add_folded(blocks, second, lambda weight: 0.5 * (weight * found[names[weight]]).float().square().sum(0))


def _sample_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """[N], each sample's mean next-token loss."""
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    return losses.mean(1)


def _recomputing(model: PreTrainedModel, recompute: bool) -> AbstractContextManager[None]:
    return checkpointed(describe(model).layers) if recompute else nullcontext()


@contextmanager
def checkpointed(layers: nn.ModuleList) -> Iterator[None]:
    """While active, PyTorch's checkpointing recomputes each layer in the backward pass, also in evaluation mode."""
    with ExitStack() as stack:
        for layer in layers:
            # Dropout is off, so the random generator's state need not be saved for the recomputation.
            again = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
            stack.enter_context(forward_replaced(layer, again))
        yield


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    model.requires_grad_(False)
    try:
        yield
    finally:
        model.requires_grad_(True)


def _zeros(blocks: Sequence[Block]) -> list[Tensor]:
    return [torch.zeros(block.groups, device=block.output.linear.weight.device) for block in blocks]


@torch.no_grad()
def _add_folded(blocks: Sequence[Block], into: list[Tensor], elements: Callable[[Tensor], Tensor]) -> None:
    """Add each group's sum of element scores to `into`; elements: maps a weight [O, I] to its scores [O, I]."""
    for block, total in zip(blocks, into, strict=True):
        for entry in block.inputs:
            total += entry.fold_rows(elements(entry.linear.weight).sum(1), block.groups)
        total += block.output.fold_columns(elements(block.output.linear.weight).sum(0))


def _means(first: list[Tensor], second: list[Tensor], count: int) -> dict[str, Tensor]:
    return {"taylor": torch.cat(first).cpu() / count, "fisher": torch.cat(second).cpu() / count}


def _column(scores: Scores) -> Tensor:
    """Concatenate all scores to one vector [groups], in the order of the model's blocks."""
    return torch.cat([scores.importance[key] for key in scores.importance])
