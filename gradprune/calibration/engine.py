"""`ImportanceEngine`: group importances from one forward and backward pass per calibration batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradprune.calibration.accumulator import StepRecord
from gradprune.calibration.capture import capture
from gradprune.calibration.evidence import Evidence, Scores
from gradprune.calibration.experts import check_experts, scores_experts_alone
from gradprune.calibration.findings import Findings
from gradprune.calibration.host import on_host
from gradprune.calibration.inputs import check_ids, check_model, on_device
from gradprune.calibration.joined import joined_state
from gradprune.calibration.methods import Depth, components_at, components_of, needed_depth
from gradprune.calibration.obs import removal_costs
from gradprune.calibration.reduction import REDUCTIONS
from gradprune.checkpoint.load import load_model
from gradprune.config import (
    GRADIENT_METHODS,
    METHODS,
    ImportanceBackend,
    Method,
    PruneConfig,
    ReductionName,
    StreamLayers,
    check_gradient_fix,
)
from gradprune.errors import ConfigError, GradPruneError
from gradprune.models import BlockKey, PrunableModel, describe
from gradprune.models.backward import backpropagated, deterministic_attention, loss_scale, without_autocast
from gradprune.models.footprint import Job
from gradprune.models.loss import sample_losses
from gradprune.models.modes import evaluation_mode
from gradprune.models.passes import backward_by_layers, waves
from gradprune.models.placement import check_placement
from gradprune.models.recomputed import Recomputation, recomputed
from gradprune.ops.dispatch import select_ops
from gradprune.ranks import ALONE, Ranks
from gradprune.vanishing.scaling import scales_of
from gradprune.vanishing.statistics import LayerGradients

_OBSERVED: WeakSet[PreTrainedModel] = WeakSet()
"""The models that an open engine observes."""


class ImportanceEngine:
    """The importances of a causal LM's KV groups and MLP channels, computed without keeping any gradient.

        with ImportanceEngine(model, method="taylor_2nd") as engine:
            for ids in batches:
                engine.step(ids)
        scores = engine.scores()

    While the engine is open, the model is in evaluation mode, its parameters are frozen and its prunable linear layers
    are observed; on exit, even after an exception, the model is as it was. One pass serves every gradient method,
    `scores(method=...)`, unless `weight_gradient_steps` restricts it to what `method` needs.

    Formulas, with w a weight and g_n the gradient of sample n's mean next-token loss with respect to it, summed over a
    group's weights:

    - `taylor`: mean_n |w g_n| (Molchanov et al. 2019); `fisher`: mean_n 1/2 w^2 g_n^2 (Theis et al. 2018);
      `taylor_2nd`: their sum.
    - `group_fisher`: mean_n (sum of w g_n over the group's output columns)^2 (Liu et al. 2021).
    - `obs`: the loss that least squares cannot restore, see `gradprune.calibration.obs`; the samples are run once more,
      layer by layer, when scores are requested. Other methods' scores remain available.
    - `wanda`: |w| * rms(x) over the group's output columns (Sun et al. 2023); `magnitude`: |w|.
    - `reap`: for whole experts only, mean of gate * ||output|| over the tokens that an expert sees (arXiv:2510.13999).

    `reduction="batch"` uses the gradient g_b of each batch's mean loss instead: |w mean_b g_b| and w^2 mean_b g_b^2;
    it keeps one accumulated gradient per weight. Deterministic; vectors are accumulated in fp64.

    `gradient_fix` scales vanishing gradients, see `gradprune.vanishing.scaling`. With `reduction="sample"` the
    layers' scales are applied to the finished vectors, which is the same as scaling the gradients; with "batch" each
    batch's gradients are scaled before they are accumulated (its norms are read on the host at the end of the step).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method = "group_fisher",
        reduction: ReductionName = "sample",
        backend: ImportanceBackend = "auto",
        *,
        use_gradient_checkpointing: bool = False,
        gradient_fix: str = "none",
        weight_gradient_steps: int | None = None,
        ranks: Ranks = ALONE,
        kinds: Sequence[str] | None = None,
    ) -> None:
        """Prepare to observe `model`, which is changed only between `__enter__` and `__exit__`.

        Args:
            model, method, reduction, backend, gradient_fix: as described above, and as the options of these names.
            use_gradient_checkpointing: whether to recompute each layer in the backward pass.
            weight_gradient_steps: compute every weight's gradient only in this many first steps, for the layers'
                statistics, and in later steps only what `method` needs: `group_fisher` and `obs` need no weight
                gradient. A `gradient_fix` needs the weight gradients of all steps. None: all steps serve every method.
            ranks: the processes that divide the steps among themselves, see `join`.
            kinds: the kinds of groups to score; None: all kinds except whole experts.

        Raises:
            UnsupportedArchitectureError: the architecture cannot be pruned, or the model is not a causal LM.
            ConfigError: the method, reduction or fix is unknown; some of the model's weights are on no device, or one
                layer's are on several; "batch" with a streamed model, with several ranks or with experts; `kinds` that
                the model does not have, or that the method does not score.
            BackendUnavailableError: the backend requested by name cannot run on the model's device.
        """
        self._model = model
        self._view = _observable(model, method, reduction, gradient_fix, ranks, kinds)
        self.ranks = ranks
        self.method = method
        self.gradient_fix = gradient_fix
        self._reduction = REDUCTIONS[reduction]
        self._first_steps = weight_gradient_steps or 0
        self._depth = _depth_of_all_steps(method, gradient_fix, weight_gradient_steps)
        self._vocabulary: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[assignment, index]
        self._checkpointing = use_gradient_checkpointing
        self._ops = select_ops(backend, model.device.type, model.dtype)
        self.backend = self._ops.backend
        self._ledgers = self._reduction.ledgers(self._view, self._ops, curvature=method == "obs")
        accumulators = {entry.block.key: entry for ledger in self._ledgers for entry in ledger.accumulators}
        self._accumulators = {block.key: accumulators[block.key] for block in self._view.blocks}
        self._samples: list[Tensor] = []
        self._losses: list[Tensor] = []
        # Batches given to `read`: no step was run on them, and only "obs" uses them.
        self._read: list[Tensor] = []
        self._costs: Tensor | None = None
        self._stack = ExitStack()
        self._hooks = ExitStack()
        self._observed: Depth | None = None
        self._recomputation = Recomputation()
        self._open = False

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | Path,
        method: Method = "group_fisher",
        *,
        device: str = "cpu",
        dtype: str = "auto",
        stream_layers: StreamLayers = "auto",
        stream_memory: str = "4GiB",
        backend: ImportanceBackend = "auto",
        gradient_fix: str = "none",
    ) -> "ImportanceEngine":
        """Return an engine for a checkpoint that need not fit in memory; its attribute `model` is the loaded model.

        Layers are recomputed in the backward pass, whether they are streamed or not. If the model is streamed, give
        `steps` many batches in one call, divided by `waves`.

        Args:
            checkpoint, device, dtype, stream_memory: see `gradprune.checkpoint.load.load_model`.
            stream_layers: see `load_model`; "auto" streams if calibration by `method`, on `prune`'s default number of
                samples, would not fit in memory.
            method, backend, gradient_fix: see `ImportanceEngine`.

        Raises:
            GradPruneError: see `load_model` and `ImportanceEngine`.
        """
        config = PruneConfig(importance_method=method, use_gradient_checkpointing=True, stream_memory=stream_memory)
        model, _ = load_model(
            checkpoint,
            dtype=dtype,
            device=device,
            stream_layers=stream_layers,
            stream_memory=stream_memory,
            job=Job(config, ("calibration", "importance")),
        )
        return cls(model, method, backend=backend, use_gradient_checkpointing=True, gradient_fix=gradient_fix)

    @property
    def model(self) -> PreTrainedModel:
        """The model that the engine observes."""
        return self._model

    @property
    def reduction(self) -> ReductionName:
        """The name of the engine's reduction: "sample" or "batch"."""
        return self._reduction.name

    @property
    def collects(self) -> str:
        """A description of what the steps collect; engines whose states are interchangeable have the same one."""
        curvatures = ", curvatures" if self.method == "obs" else ""
        return f"{self._depth.name.lower()} in all steps, weights in the first {self._first_steps}{curvatures}"

    def __enter__(self) -> "ImportanceEngine":
        """Start observing.

        Raises:
            GradPruneError: this engine or another one already observes the model.
        """
        if self._model in _OBSERVED:
            which = "this engine is open already" if self._open else "another engine observes this model"
            raise GradPruneError(f"engine: {which}; leave its `with` block first")
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(self._model))
            _OBSERVED.add(self._model)
            stack.callback(_OBSERVED.discard, self._model)
            stack.callback(self._observe, None)
            self._observe(self._depth_of_step(len(self._samples)))
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
        """Run one batch forward and, if gradients are needed, backward. A step that raises has no effect.

        Args:
            input_ids: [N, T] int64 or int32, N >= 1 samples of T >= 2 tokens.

        On an accelerator nothing is copied to the host. On the CPU a non-finite loss or gradient raises immediately;
        elsewhere, only when results are requested.

        Raises:
            GradPruneError: the engine is not open, or `input_ids` are not as described above; the message says why.
            NonFiniteError: a loss or gradient was NaN or infinite; names the sample and the layer.
        """
        self.steps([input_ids])

    def steps(self, batches: Sequence[Tensor]) -> None:
        """Run several batches, each as `step` does. If a batch raises, the batches before it keep their effect.

        A streamed model reads each layer's weights twice for all batches together; if one batch raises, none of these
        has any effect. The residual streams of all batches at every layer are kept in the host's memory; `waves`
        divides batches accordingly.

        Args:
            batches: [N, T] each, as in `step`.
        """
        if not self._open:
            raise GradPruneError("step() works inside the engine's context: with engine: engine.step(input_ids)")
        for batch in batches:
            check_ids(batch, self._vocabulary)
        left = [on_device(batch, self._model.device) for batch in batches]
        while left:
            done = len(self._samples)
            depth = self._depth_of_step(done)
            if depth is Depth.NOTHING:
                return
            self._observe(depth)
            if self._view.residency is None or depth < Depth.MASKS:
                self._step(left.pop(0))
                continue
            first = self._first_steps - done
            alike = first if first > 0 and self._depth is not Depth.WEIGHTS else len(left)
            self._wave(left[:alike])
            left = left[alike:]

    def waves(self, batches: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Divide batches [N, T] into the lists to give to `steps`: each as long as fits in `stream_memory`."""
        return waves(self._view, batches, kept=len(self._view.layers) + 1)

    def read(self, batches: Sequence[Tensor]) -> None:
        """Give `obs` further batches, without computing gradients on them.

        They enter the Gram matrices of `obs`, whose curvatures come from the steps only. Importances by other methods
        that need samples are then no longer available.

        Args:
            batches: [N, T] each, as in `step`; every rank is given all of them.

        Raises:
            GradPruneError: the method is not `obs`, or `batches` are not as described above.
        """
        if self.method != "obs":
            raise GradPruneError(f"read: '{self.method}' takes every sample by a step; only 'obs' reads without one")
        for batch in batches:
            check_ids(batch, self._vocabulary)
        self._read += [on_device(batch, self._model.device) for batch in batches]
        self._costs = None

    def _step(self, input_ids: Tensor) -> None:
        try:
            losses = self._run(input_ids)
            self._check_step(input_ids, losses)
            scales = self._step_scales(input_ids)
        except BaseException:
            for ledger in self._ledgers:
                ledger.discard()
            raise
        for ledger in self._ledgers:
            ledger.commit(scales)
        self._costs = None
        self._samples.append(input_ids)
        self._losses.append(losses)

    def _check_step(self, input_ids: Tensor, losses: Tensor) -> None:
        """On the CPU, raise if the current step had a non-finite loss or gradient; a GPU would have to be awaited."""
        if input_ids.device.type == "cpu":
            self._pending([input_ids], [losses]).check_finite(len(self._samples))

    def _run(self, input_ids: Tensor) -> Tensor:
        """Run the passes that the observed depth needs, which feed the accumulators; return each sample's loss [N]."""
        # Enable gradients explicitly: under the caller's no_grad there would be none to observe.
        backward = self._observed is not None and self._observed >= Depth.MASKS
        with torch.inference_mode(False), torch.set_grad_enabled(backward):
            losses = sample_losses(self._model, input_ids)
            if backward:
                with without_autocast(input_ids.device):
                    backpropagated(losses, self._model.dtype).backward()
            for ledger in self._ledgers:
                ledger.finish(loss_scale(self._model.dtype))
        return losses.detach()

    def _step_scales(self, input_ids: Tensor) -> list[float]:
        """The factor by which each layer's pending gradients are to be multiplied before they are added."""
        layers = len(self._view.layers)
        if self.gradient_fix == "none" or self._reduction.scales_afterwards or self._depth < Depth.WEIGHTS:
            return [1.0] * layers
        gradients = self._pending([input_ids], []).gradients(slice(None))
        return scales_of(self.gradient_fix, gradients, layers)

    def _wave(self, batches: list[Tensor]) -> None:
        """Run batches through a streamed model's layers together, forward and backward."""
        marks = [ledger.mark() for ledger in self._ledgers]
        try:
            # Enable gradients explicitly, as in `_run`: the caller may be under no_grad.
            with torch.inference_mode(False), torch.enable_grad():
                losses = backward_by_layers(self._view, batches, self._recomputation, self._commit_layer)
            if self._model.device.type == "cpu":
                self._check_wave(batches, losses)
        except BaseException:
            for ledger, mark in zip(self._ledgers, marks, strict=True):
                ledger.back_to(mark)
            raise
        self._costs = None
        self._samples += batches
        self._losses += losses

    def _commit_layer(self, layer: int) -> None:
        """Commit a layer's sums after one batch's backward pass through it; scales are applied to the finished sums."""
        for ledger in self._ledgers:
            if ledger.accumulators[0].block.layer == layer:
                ledger.finish(loss_scale(self._model.dtype))
                ledger.commit()

    def _check_wave(self, batches: list[Tensor], losses: list[Tensor]) -> None:
        """Raise if a batch of the current wave had a non-finite loss or gradient."""
        first = sum(len(ids) for ids in self._samples)
        for number, (batch, of_batch) in enumerate(zip(batches, losses, strict=True), start=len(self._losses)):
            records = {key: [entry.records[number]] for key, entry in self._accumulators.items()}
            self._findings(records, [batch], [of_batch], first).check_finite()
            first += len(batch)

    def _depth_of_step(self, step: int) -> Depth:
        """The depth of this rank's step number `step`, which depends on the step's number among all ranks' steps."""
        of_all = self.ranks.rank + step * self.ranks.world
        return Depth.WEIGHTS if of_all < self._first_steps else self._depth

    def _observe(self, depth: Depth | None) -> None:
        """Observe what steps of `depth` need, instead of what was observed before; None: observe nothing."""
        if depth is self._observed:
            return
        self._hooks.close()
        self._observed = None
        with ExitStack() as stack:
            accumulators = self._accumulators.values()
            if depth is not None:
                for entry in accumulators:
                    stack.enter_context(entry.attached(depth))
            if depth is not None and depth >= Depth.MASKS:
                observers = dict(pair for entry in accumulators for pair in entry.observers(depth))
                stack.enter_context(deterministic_attention())
                self._recomputation = Recomputation()
                stack.enter_context(capture(self._model, observers, self._recomputation))
                # A streamed model's layers are recomputed anyway, see `backward_by_layers`.
                if self._checkpointing and self._view.residency is None:
                    stack.enter_context(recomputed(self._view.layers, self._recomputation))
            self._hooks = stack.pop_all()
        self._observed = depth

    def state(self) -> dict[str, Tensor]:
        """Everything accumulated so far, by name and on the CPU, from which another process can `restore`."""
        if not self._losses:
            return {}
        state = {"losses": torch.cat(self._losses)}
        for key, accumulator in self._accumulators.items():
            state |= {f"{_prefix(key)}{name}": value for name, value in accumulator.state().items()}
        return {name: value.detach().cpu().contiguous() for name, value in state.items()}

    def restore(self, state: dict[str, Tensor], batches: list[Tensor]) -> None:
        """Resume from another engine's `state`, as if this engine had run that engine's steps.

        Args:
            state: the state of an engine with the same model and options.
            batches: [N, T] int64 each, the inputs of that engine's steps.
        """
        device = self._model.device
        self._samples = [batch.to(device) for batch in batches]
        self._losses = list(state["losses"].to(device).split([len(batch) for batch in batches]))
        gradients = [self._reduction.gradients_in(batch) for batch in batches]
        for key, accumulator in self._accumulators.items():
            prefix = _prefix(key)
            of_block = {name.removeprefix(prefix): found for name, found in state.items() if name.startswith(prefix)}
            accumulator.restore(of_block, gradients)

    def join(self, batches: Sequence[Tensor]) -> None:
        """Combine what all ranks' engines accumulated, as if this engine had run all batches.

        Every rank then has the same bits; the sums equal those of a single process to fp64 rounding.

        Args:
            batches: [N, T] each, the batches of all ranks; this engine has run its rank's share of them.
        """
        if self.ranks.world > 1:
            self.restore(joined_state(self.ranks.gather(self.state()), batches), list(batches))

    def evidence(
        self, steps: int = 0, method: Method | None = None, advance: Callable[[], None] = lambda: None
    ) -> Evidence:
        """The evidence that the steps so far give about the model's groups.

        Args:
            steps: how many first steps to include the layers' gradient statistics of, step by step; steps that did not
                compute every weight's gradient are left out.
            method: compute only the components that this method needs; None: all that the engine collected.
            advance: called after each block for which `obs` is computed.

        Raises:
            NonFiniteError: a loss, a gradient or an importance was NaN or infinite; names the layer, and the sample or
                the group.
        """
        found = self._committed()
        found.check_finite()
        gradients = found.gradients(slice(self._diagnosed_steps))
        with torch.no_grad():
            wanted = self._components if method is None else components_of(method)
            components = self._collected([name for name in wanted if name in self._components], advance)
        return Evidence(
            blocks={key: accumulator.block.groups for key, accumulator in self._accumulators.items()},
            layers=len(self._view.layers),
            components=components,
            gradients=gradients,
            steps=[found.gradients(slice(step, step + 1)) for step in range(min(steps, self._diagnosed_steps))],
            applied=found.applied_scaling(self.gradient_fix) if gradients else None,
            reduction=self.reduction,
            num_samples=sum(len(ids) for ids in (*self._samples, *self._read)),
            seq_len=max((ids.shape[1] for ids in (*self._samples, *self._read)), default=0),
            diagnosed_samples=sum(len(ids) for ids in self._samples[: self._diagnosed_steps]),
        )

    def scores(self, method: Method | None = None) -> Scores:
        """The importance of every group by `method`; None: by the engine's own method.

        Raises:
            GradPruneError: no batch has been run, or the engine did not collect what `method` needs.
            NonFiniteError: see `evidence`.
        """
        method = method or self.method
        if method in GRADIENT_METHODS and self._depth < Depth.MASKS:
            raise GradPruneError(f"scores: '{method}' needs gradients, but the engine ran '{self.method}'")
        if method != "magnitude" and not self._losses:
            raise GradPruneError(f"scores: '{method}' needs calibration; call step(input_ids) first")
        return self.evidence(method=method).scores(method, self.gradient_fix)

    def gradients(self) -> list[LayerGradients]:
        """Gradient statistics of every decoder layer that has a block, before any scaling.

        They cover the steps that computed every weight's gradient; the list is empty if no step did.
        """
        return self._committed().gradients(slice(self._diagnosed_steps))

    def gate_gradients(self) -> dict[BlockKey, float]:
        """The mean loss's gradient with respect to a gate (of value 1) on each block's output.

        Empty before the first step, and if some samples had no backward pass.
        """
        if self._depth < Depth.MASKS or not self._losses or self._read:
            return {}
        return self._committed().gate_gradients()

    @property
    def _diagnosed_steps(self) -> int:
        """The number of steps so far that computed every weight's gradient; they are the first ones."""
        return len(self._samples) if self._depth is Depth.WEIGHTS else min(self._first_steps, len(self._samples))

    @property
    def _components(self) -> tuple[str, ...]:
        """The names of the components that have been collected."""
        if not self._losses:
            return components_at(Depth.NOTHING)
        found = components_at(Depth.NOTHING if self._read else self._depth)
        if not scores_experts_alone(self._view):
            found = tuple(name for name in found if name != "reap")
        return (*found, *(("obs",) if self.method == "obs" else ()))

    def _collected(self, names: Sequence[str], advance: Callable[[], None]) -> dict[str, Tensor]:
        """Each named component, [groups of all blocks] fp64 on the CPU; layers' weights are read once for all names."""
        count = sum(self._reduction.gradients_in(ids) for ids in self._samples)
        found: list[Tensor] = []
        of_sums = [name for name in names if name != "obs"]
        for key, accumulator in self._accumulators.items():
            with self._view.resident(key.layer, key.layer + 1):
                found += [accumulator.component(name, count) for name in of_sums]
        found = on_host(found)
        by_name = {name: torch.cat(found[index :: len(of_sums)]) for index, name in enumerate(of_sums)}
        return {name: self._removal_costs(advance) if name == "obs" else by_name[name] for name in names}

    def _removal_costs(self, advance: Callable[[], None]) -> Tensor:
        """The component "obs" for the samples so far; it is computed once and then kept."""
        if self._costs is None:
            samples = sum(len(ids) for ids in self._samples)
            found = on_host([accumulator.curvatures(samples) for accumulator in self._accumulators.values()])
            curvatures = {key: of_block.tolist() for key, of_block in zip(self._accumulators, found, strict=True)}
            costs = removal_costs(self._view, [*self._samples, *self._read], curvatures, self._ops, self.ranks, advance)
            self._costs = torch.cat([costs[key] for key in self._accumulators])
        return self._costs

    def _committed(self) -> Findings:
        """The findings of all steps so far."""
        records = {key: accumulator.records for key, accumulator in self._accumulators.items()}
        return self._findings(records, self._samples, self._losses)

    def _pending(self, samples: list[Tensor], losses: list[Tensor]) -> Findings:
        """The findings of the current step, which is not yet committed."""
        records = {key: [accumulator.pending] for key, accumulator in self._accumulators.items()}
        return self._findings(records, samples, losses, sum(len(ids) for ids in self._samples))

    def _findings(
        self, records: dict[BlockKey, list[StepRecord]], samples: list[Tensor], losses: list[Tensor], first: int = 0
    ) -> Findings:
        return Findings.of(self._view, self._reduction, self._accumulators, records, samples, losses, first)


def _observable(
    model: PreTrainedModel,
    method: Method,
    reduction: ReductionName,
    gradient_fix: str,
    ranks: Ranks,
    kinds: Sequence[str] | None,
) -> PrunableModel:
    """Return the model's blocks of these kinds, or raise if an engine with these options cannot observe the model.

    Raises:
        GradPruneError: see `ImportanceEngine`.
    """
    if method not in METHODS:
        raise ConfigError(f"importance_method: '{method}' is unknown; choose one of {', '.join(METHODS)}")
    if reduction not in REDUCTIONS:
        raise ConfigError(f"reduction: '{reduction}' is unknown; choose one of {', '.join(REDUCTIONS)}")
    check_gradient_fix(gradient_fix)
    check_placement(model)
    check_model(model)
    view = describe(model, kinds).with_groups()
    check_experts(view, method, reduction)
    if reduction == "batch" and ranks.world > 1:
        raise ConfigError(
            f"reduction: 'batch' keeps a gradient of every weight, too much to exchange between {ranks.world} "
            "ranks; choose 'sample', or one process"
        )
    if reduction == "batch" and view.residency is not None:
        raise ConfigError(
            "reduction: 'batch' keeps a gradient of every weight, more than the model that streaming keeps out of "
            "memory; choose 'sample', or stream_layers 'off'"
        )
    return view


def _depth_of_all_steps(method: Method, gradient_fix: str, weight_gradient_steps: int | None) -> Depth:
    """The depth that every step of an engine has at least; the first `weight_gradient_steps` may be deeper."""
    if weight_gradient_steps is not None and gradient_fix == "none":
        return needed_depth(method)
    # One pass with gradients serves every method.
    return Depth.WEIGHTS if method in GRADIENT_METHODS else needed_depth(method)


def _prefix(key: BlockKey) -> str:
    """The prefix that marks a block's entries in an engine's state."""
    return f"{key.layer}.{key.kind}."
