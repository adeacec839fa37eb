"""`ImportanceEngine`: one forward and backward pass per calibration batch, group importances at the end."""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradprune.calibration.accumulator import BlockAccumulator
from gradprune.calibration.capture import capture, checkpointed
from gradprune.calibration.finite import raise_non_finite_gradient, raise_non_finite_loss
from gradprune.calibration.methods import importance
from gradprune.config import GRADIENT_METHODS, METHODS, Backend, Method, Reduction, check_gradient_fix
from gradprune.errors import ConfigError, GradPruneError, NonFiniteError
from gradprune.models import Kind, describe
from gradprune.models.loss import sample_losses
from gradprune.ops.dispatch import select_ops
from gradprune.ops.vectors import GradientStatistics
from gradprune.vanishing.scaling import GradientRepair, resolve_fix, scales_of
from gradprune.vanishing.statistics import LayerGradients, layer_gradients


@dataclass(frozen=True)
class Scores:
    """Group importances of a model.

    attention: per decoder layer, [n_kv_groups] fp32 on the CPU; of length 0 where the block does not exist.
    mlp: per decoder layer, [n_channels] fp32 on the CPU, likewise.
    gradients: per decoder layer that has a block, its gradient statistics before any repair; empty for methods
        without gradients.
    repair: what `gradient_fix` did to them; None for "none" and for methods without gradients.
    """

    attention: list[Tensor]
    mlp: list[Tensor]
    gradients: list[LayerGradients]
    repair: GradientRepair | None = None


class ImportanceEngine:
    """Group importance of a causal LM's KV groups and MLP channels, without keeping any gradient.

        with ImportanceEngine(model, method="taylor_2nd") as engine:
            for ids in batches:
                engine.step(ids)
        scores = engine.scores()

    While it is open the model's parameters are frozen and its prunable linear layers are observed; on exit the
    model is as it was, whatever happened. One pass serves every gradient method: `scores(method=...)`.

    Formulas, with w a weight, g_n its gradient of sample n's mean next-token loss, summed over a group's weights:

    - `taylor`: mean_n |w g_n| (Molchanov et al. 2019); `fisher`: mean_n 1/2 w^2 g_n^2 (Theis et al. 2018);
      `taylor_2nd`: their sum.
    - `group_fisher`: mean_n (sum of w g_n over the group's output columns)^2 (Liu et al. 2021).
    - `wanda`: |w| * rms(x) over the group's output columns (Sun et al. 2023); `magnitude`: |w|.

    `reduction="batch"` takes the gradient of each batch's mean loss instead: |w mean_b g_b| and w^2 mean_b g_b^2;
    it keeps one accumulated gradient per weight. Deterministic; vectors are accumulated in fp64.

    `gradient_fix` repairs vanishing gradients, see `gradprune.vanishing.scaling`. With `reduction="sample"` the
    layers' scales are applied to the finished vectors, which is the same as scaling the gradients; with "batch" each
    batch's gradients are scaled before they are accumulated (its norms are read on the host at the end of the step).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method = "group_fisher",
        reduction: Reduction = "sample",
        backend: Backend = "auto",
        use_gradient_checkpointing: bool = False,
        gradient_fix: str = "none",
    ) -> None:
        """Prepare to observe `model`, which is changed only between `__enter__` and `__exit__`.

        Raises:
            UnsupportedArchitectureError: the model has no description.
            ConfigError: unknown method, reduction or repair.
            BackendUnavailableError: the backend asked for by name cannot run on the model's device.
        """
        if method not in METHODS:
            raise ConfigError(f"importance_method: '{method}' is unknown; choose one of {', '.join(METHODS)}")
        if reduction not in ("sample", "batch"):
            raise ConfigError(f"reduction: '{reduction}' is unknown; choose sample or batch")
        check_gradient_fix(gradient_fix)
        self._model = model
        self._view = describe(model)
        self.method = method
        self.reduction = reduction
        self.gradient_fix = gradient_fix
        self._checkpointing = use_gradient_checkpointing
        ops = select_ops(backend, model.device.type)
        self.backend = ops.backend
        repaired = gradient_fix != "none"
        self._accumulators = {
            (block.kind, block.layer): BlockAccumulator(block, reduction, ops, repaired=repaired)
            for block in self._view.blocks()
        }
        self._samples: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._stack = ExitStack()
        self._open = False

    def __enter__(self) -> "ImportanceEngine":
        """Start observing."""
        with ExitStack() as stack:
            for accumulator in self._accumulators.values():
                handle = accumulator.block.output.linear.register_forward_pre_hook(accumulator.observe_input)
                stack.callback(handle.remove)
            if self.method in GRADIENT_METHODS:
                observers = dict(pair for entry in self._accumulators.values() for pair in entry.observers())
                stack.enter_context(capture(self._model, observers))
                if self._checkpointing:
                    stack.enter_context(checkpointed(self._view.layers))
            self._stack = stack.pop_all()
        self._open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the model back as it was."""
        self._open = False
        self._stack.close()

    def step(self, input_ids: Tensor) -> None:
        """Run one batch forward and, for gradient methods, backward.

        Args:
            input_ids: [N, T] int64, N samples of T >= 2 tokens.

        Nothing is copied to the host on an accelerator; on the CPU a non-finite loss or gradient raises at once.

        Raises:
            NonFiniteError: naming the sample and the layer.
        """
        if not self._open:
            raise GradPruneError("step() works inside the engine's context: with engine: engine.step(input_ids)")
        if self.method == "magnitude":
            return
        input_ids = input_ids.to(self._model.device)
        self._samples.append(input_ids)
        with torch.set_grad_enabled(self.method in GRADIENT_METHODS):
            losses = sample_losses(self._model, input_ids)
        self._losses.append(losses.detach())
        if self.method in GRADIENT_METHODS:
            losses.sum().backward()
        if input_ids.device.type == "cpu":
            self._check_finite(since=len(self._losses) - 1)
        if self.method in GRADIENT_METHODS:
            self._commit()

    def scores(self, method: Method | None = None) -> Scores:
        """The importance of every group by `method`, or by the engine's own.

        Raises:
            GradPruneError: no batch has been run, or the engine did not collect what `method` needs.
            NonFiniteError: a loss or gradient was NaN or infinite; naming the sample and the layer.
        """
        method = method or self.method
        if method in GRADIENT_METHODS and self.method not in GRADIENT_METHODS:
            raise GradPruneError(f"scores: '{method}' needs gradients, but the engine ran '{self.method}'")
        if method != "magnitude" and not self._losses:
            raise GradPruneError(f"scores: '{method}' needs calibration; call step(input_ids) first")
        self._check_finite(since=0)
        layers = range(len(self._view.layers))
        gradients = self.gradients()
        repair = self._repair(gradients) if gradients and self.gradient_fix != "none" else None
        # Batches were repaired as they came.
        scales = repair.scales if repair and self.reduction == "sample" else [1.0] * len(layers)
        with torch.no_grad():
            return Scores(
                attention=[self._importance("attention", layer, method, scales[layer]) for layer in layers],
                mlp=[self._importance("mlp", layer, method, scales[layer]) for layer in layers],
                gradients=gradients,
                repair=repair,
            )

    def part(self, name: str) -> dict[tuple[Kind, int], Tensor]:
        """[groups] fp64 on the CPU by (kind, layer): one of `gradprune.calibration.methods.PARTS`, before any repair.

        With `reduction="batch"` the batches have been repaired as they came.
        """
        count = self._count
        with torch.no_grad():
            return {key: accumulator.part(name, count).cpu() for key, accumulator in self._accumulators.items()}

    def gradients(self) -> list[LayerGradients]:
        """Statistics of every decoder layer that has a block, before any repair; empty without gradients."""
        return self._gradients(slice(None), self._count)

    def gradients_of_step(self, step: int) -> list[LayerGradients]:
        """The same of one step's samples (its batch) alone; steps are counted from 0."""
        return self._gradients(slice(step, step + 1), self._gradient_counts[step])

    def gate_gradients(self) -> dict[tuple[Kind, int], float]:
        """Gradient of the mean loss to a gate (of value 1) on each block's output, by (kind, layer)."""
        return {key: torch.cat(entry.gates).mean().item() for key, entry in self._accumulators.items()}

    @property
    def _gradient_counts(self) -> list[int]:
        """Number of gradients summed in each step: its samples, or 1 batch."""
        return [len(ids) if self.reduction == "sample" else 1 for ids in self._samples]

    @property
    def _count(self) -> int:
        return sum(self._gradient_counts)

    def _commit(self) -> None:
        """Add what the step brought; with `reduction="batch"`, repaired."""
        scales = [1.0] * len(self._view.layers)
        if self.reduction == "batch" and self.gradient_fix != "none":
            scales = scales_of(self.gradient_fix, self.gradients_of_step(len(self._samples) - 1), len(scales))
        with torch.no_grad():
            for (_, layer), accumulator in self._accumulators.items():
                accumulator.commit(scales[layer])

    def _repair(self, gradients: list[LayerGradients]) -> GradientRepair:
        fix, layers = resolve_fix(self.gradient_fix, gradients), len(self._view.layers)
        if self.reduction == "sample":
            scales = scales_of(fix, gradients, layers)
            return GradientRepair(fix, scales, [layer.scaled(scales[layer.layer]) for layer in gradients])
        by_layer = {layer: accumulator.scales for (_, layer), accumulator in self._accumulators.items()}
        scales = [
            math.fsum(by_layer[layer]) / len(by_layer[layer]) if layer in by_layer else 1.0 for layer in range(layers)
        ]
        return GradientRepair(fix, scales, self._gradients(slice(None), self._count, by_layer))

    def _importance(self, kind: Kind, layer: int, method: Method, scale: float) -> Tensor:
        accumulator = self._accumulators.get((kind, layer))
        if accumulator is None:
            return torch.empty(0)
        count = self._count
        return importance(method, lambda name: accumulator.part(name, count), scale).float().cpu()  # type: ignore[no-any-return]

    def _gradients(
        self, steps: slice, count: int, scales: dict[int, list[float]] | None = None
    ) -> list[LayerGradients]:
        """Statistics over the `count` gradients of some steps, times the scales of each layer's steps."""
        if self.method not in GRADIENT_METHODS or not self._losses:
            return []
        layers = sorted({layer for _, layer in self._accumulators})
        return [
            layer_gradients(layer, *self._statistics(layer, steps, scales[layer] if scales else None), count)
            for layer in layers
        ]

    def _statistics(
        self, layer: int, steps: slice, scales: list[float] | None
    ) -> tuple[dict[str, GradientStatistics[float]], dict[str, int]]:
        """The layer's statistics and number of elements by weight name."""
        statistics, elements = {}, {}
        for kind, module in (("attention", self._view.architecture.attention), ("mlp", self._view.architecture.mlp)):
            accumulator = self._accumulators.get((kind, layer))  # type: ignore[arg-type]
            if accumulator is None:
                continue
            for entry in accumulator.block.projections:
                of_steps = GradientStatistics.stack(accumulator.statistics[entry.path][steps])
                if scales is not None:
                    of_steps = of_steps.scale(scales)
                statistics[f"{module}.{entry.path}"] = of_steps.merge().to_float()
                elements[f"{module}.{entry.path}"] = entry.linear.weight.numel()
        return statistics, elements

    def _check_finite(self, since: int) -> None:
        """Raise if any step from `since` on had a non-finite loss or gradient."""
        if not self._losses:
            return
        losses = torch.cat(self._losses[since:])
        gates = {key: torch.cat(entry.gates[since:]) for key, entry in self._accumulators.items() if entry.gates}
        first = sum(len(ids) for ids in self._samples[:since])
        raise_non_finite_loss(self._model, self._view, self._samples[since:], losses, first)
        unit = "sample" if self.reduction == "sample" else "batch"
        raise_non_finite_gradient(gates, unit, first if unit == "sample" else since)
        for (_, layer), entry in self._accumulators.items():
            for path, statistics in entry.statistics.items():
                overflowing = sum(int(of_step.non_finite) for of_step in statistics[since:])
                if overflowing:
                    raise NonFiniteError(f"gradient: {overflowing} elements of layer {layer}'s {path} overflow")
