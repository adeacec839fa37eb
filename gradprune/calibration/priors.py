"""Priors: how much each block and each layer matters to the model, for scoring by H-GSP (`gradprune.scoring.hgsp`).

- `removal`: how much the loss rises when the block's (layer's) output is zeroed;
- `similarity`: how much the block (layer) turns the residual stream, 1 - cosine;
- `taylor`: the first-order estimate of the change in loss, from calibration's gradients.

`removal` and `similarity` are measured on a few calibration samples.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradprune.models import Block, BlockKey, PrunableModel
from gradprune.models.modes import hooks_removed
from gradprune.models.passes import Variant, losses, mean_loss, variant_losses
from gradprune.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Priors:
    """How much each block and each layer matters.

    block: the prior of every existing block.
    layer: the prior of every layer that has a block, by layer index.
    samples: the number of samples they were measured on; None for priors from all calibration samples' gradients.
    """

    block: dict[BlockKey, float]
    layer: dict[int, float]
    samples: int | None = None


def removal_priors(
    view: PrunableModel, batches: list[Tensor], advance: Callable[[], None], ranks: Ranks = ALONE
) -> Priors:
    """Measure the priors "removal": the loss without the block (layer) minus the dense loss, in nats per token.

    The block's output is zeroed; nothing is cut.

    Args:
        view: the model.
        batches: [N, T] int64 each, the samples on which the loss is measured.
        advance: called for each of the `removal_steps(view)` measurements.
        ranks: the processes that divide the blocks and layers among themselves; the result has the same bits.
    """
    removed: dict[BlockKey | int, list[nn.Module]] = {block.key: [block.writer] for block in view.blocks}
    for block in view.blocks:
        removed.setdefault(block.layer, []).append(block.writer)

    def without(of: BlockKey | int) -> Variant:
        def at(_layer: int) -> AbstractContextManager[None]:
            return _silenced(removed[of])

        return Variant(at, [of if isinstance(of, int) else of.layer])

    dense = mean_loss(view.model, batches)
    own = []
    for loss in variant_losses(view, batches, [without(of) for of in ranks.share(list(removed))]):
        own.append(loss.mean().item() - dense)
        advance()
    for _ in range(len(removed) - len(own)):
        advance()
    changes = dict(zip(removed, ranks.joined_json(own), strict=True))
    return Priors(
        block={of: change for of, change in changes.items() if isinstance(of, BlockKey)},
        layer={of: change for of, change in changes.items() if isinstance(of, int)},
        samples=sum(map(len, batches)),
    )


def removal_steps(view: PrunableModel) -> int:
    """The number of losses that `removal_priors` measures in addition to the dense model's."""
    return len(view.blocks) + len({block.layer for block in view.blocks})


def similarity_priors(view: PrunableModel, batches: list[Tensor], advance: Callable[[], None]) -> Priors:
    """Measure the priors "similarity": 1 - mean cosine of the residual stream before and after the block (layer).

    The mean is over tokens.

    Args:
        view: the model.
        batches: [N, T] int64 each, the samples on which the residual stream is measured.
        advance: called after each batch.
    """
    probe = _ResidualProbe(view)
    with torch.no_grad():
        for _ in losses(view.model, batches, probe.attached):
            advance()
    return Priors(
        block={block.key: probe.distance(block.key) for block in view.blocks},
        layer={block.layer: probe.distance(block.layer) for block in view.blocks},
        samples=sum(map(len, batches)),
    )


def taylor_priors(gates: dict[BlockKey, float]) -> Priors:
    """Return the priors "taylor": |gradient of the mean loss with respect to a gate (of value 1) on the output|.

    The gradient of a gate shared by a layer's blocks is the sum of the gradients of the blocks' own gates.

    Args:
        gates: the gradients of the blocks' gates, from `ImportanceEngine.gate_gradients`, which costs no extra pass.
    """
    layers: dict[int, float] = {}
    for key, gradient in gates.items():
        layers[key.layer] = layers.get(key.layer, 0.0) + gradient
    return Priors(
        block={key: abs(gradient) for key, gradient in gates.items()},
        layer={layer: abs(gradient) for layer, gradient in layers.items()},
    )


@contextmanager
def _silenced(modules: list[nn.Module]) -> Iterator[None]:
    """Context manager that makes the modules' outputs zero."""

    def zero(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    with hooks_removed([module.register_forward_hook(zero) for module in modules]):
        yield


class _ResidualProbe:
    """Observer that sums over tokens the cosine of the residual stream before and after each block and layer."""

    def __init__(self, view: PrunableModel) -> None:
        self._view = view
        self._cosines: dict[BlockKey | int, Tensor] = {}
        self._tokens: dict[BlockKey | int, int] = {}
        self._input: Tensor | None = None
        self._stream: Tensor | None = None

    def distance(self, of: BlockKey | int) -> float:
        """1 - mean cosine across a block, or across the layer with this index."""
        return 1.0 - self._cosines[of].item() / self._tokens[of]

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles = []
        for index, layer in enumerate(self._view.layers):
            handles.append(layer.register_forward_pre_hook(self._before, with_kwargs=True))
            handles.append(layer.register_forward_hook(self._after_layer(index)))
        handles += [block.writer.register_forward_hook(self._after_block(block)) for block in self._view.blocks]
        with hooks_removed(handles):
            yield

    def _before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._input = args[0] if args else kwargs["hidden_states"]
        self._stream = self._input

    def _after_block(self, block: Block) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            assert self._stream is not None
            written = output[0] if isinstance(output, tuple) else output
            # Experts write the tokens of all samples in one row, so their output is viewed in the stream's shape.
            self._stream = self._stream.to(written.device)
            after = self._stream + (1.0 if block.adds is None else block.adds) * written.view_as(self._stream)
            self._add(block.key, self._stream, after)
            self._stream = after

        return hook

    def _after_layer(self, layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            assert self._input is not None
            self._add(layer, self._input, output[0] if isinstance(output, tuple) else output)

        return hook

    def _add(self, of: BlockKey | int, before: Tensor, after: Tensor) -> None:
        # A layer on another device than the previous layer receives its input on that layer's device, and moves it.
        cosine = F.cosine_similarity(before.to(after.device).double(), after.double(), dim=-1)
        self._cosines[of] = self._cosines.get(of, torch.zeros((), device=cosine.device)) + cosine.sum()
        self._tokens[of] = self._tokens.get(of, 0) + cosine.numel()
