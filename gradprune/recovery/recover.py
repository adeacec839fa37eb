"""Recovery: train a pruned model for some time, keep the best weights, and merge any low-rank updates."""

import logging
import math
import shutil
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from gradprune.config.recovery_config import RecoveryConfig
from gradprune.data.windows import batches, check_context
from gradprune.errors import CalibrationError, NonFiniteError, RecoveryError
from gradprune.models import describe
from gradprune.models.backward import deterministic_attention
from gradprune.models.loss import sample_losses
from gradprune.models.modes import evaluation_mode, seeded
from gradprune.models.passes import mean_loss
from gradprune.models.sizes import vocabulary_of
from gradprune.progress import QUIET, progress
from gradprune.recovery.losses import distillation_loss
from gradprune.recovery.state import Progress, Tensors, digest, load_state, save_state

logger = logging.getLogger(__name__)

# The largest number of held-out windows, at the end of the text, on which the best weights are chosen, and the number
# of steps of linear warm-up.
_CHOSEN_ON, _WARM_UP = 32, 10


@dataclass(frozen=True)
class Recovery:
    """The result of a recovery.

    model: the recovered model, with unchanged class, widths and dtype.
    steps: number of steps done. best_step: the step whose weights were kept, 0 if training did not help.
    tokens: number of tokens that all steps together trained on, repeated ones counted each time.
    history: (step, held-out loss in nats per token) of every check, the first before any step.
    """

    model: PreTrainedModel
    steps: int
    tokens: int
    best_step: int
    history: list[tuple[int, float]]


def recover(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tokens: Tensor,
    config: RecoveryConfig | None = None,
    *,
    state: Path | None = None,
    console: Console = QUIET,
) -> Recovery:
    """Train `model`, in place, with AdamW, a linear warm-up and a cosine decay to zero.

    The last windows of the text are held out from training, and the weights that predict them best are kept. The same
    options and the same number of steps give the same bytes, whether the run is interrupted and resumed or not. The
    exception is a mixture of experts on a GPU, whose layers add in no fixed order there.

    Args:
        model: a pruned model, or any supported causal LM.
        teacher: the dense model, needed for loss "kd"; it must have the model's vocabulary size.
        tokens: [tokens] int64, the text to train on.
        config: the options; None means the defaults.
        state: the folder from which an interrupted run is resumed. It is written at every check after the first, and
            deleted at the end or if the loss diverges. None keeps no state.
        console: where progress is shown.

    Raises:
        RecoveryError: there is no teacher, or its vocabulary has another size; PEFT is not installed, or the model has
            nothing that "lora" trains; `state` is another run's or damaged.
        CalibrationError: the text is too short, or the samples are longer than the model's context.
        NonFiniteError: the loss of a step is NaN or infinite.
    """
    config = config or RecoveryConfig()
    loss_of = _loss(model, teacher, config)
    train, chosen_on = _split(model, tokens, config)
    dtype = model.dtype
    run = digest(asdict(config), model, teacher if config.loss == "kd" else None, tokens)
    with seeded(config.seed, model.device):
        merge = _prepare(model, config)
    try:
        with deterministic_attention(), nullcontext() if teacher is None else evaluation_mode(teacher):
            trainer = _Trainer(model, loss_of, train, chosen_on, config, run, state, console)
            found = trainer.train()
    except NonFiniteError:
        # A resumed run would end in the same way.
        _remove(state)
        raise
    finally:
        merge()
        _cast(model, dtype)
        model.eval()
    _remove(state)
    trained_on = found.step * trainer.samples_per_step * config.seq_len
    return Recovery(model, found.step, trained_on, found.best_step, found.history)


def _loss(
    model: PreTrainedModel, teacher: PreTrainedModel | None, config: RecoveryConfig
) -> Callable[[Tensor], Tensor]:
    config.check_teacher(given=teacher is not None)
    if config.loss == "lm":
        return lambda ids: sample_losses(model, ids).mean()
    assert teacher is not None
    if vocabulary_of(teacher) != vocabulary_of(model):
        raise RecoveryError(
            f"teacher: its vocabulary has {vocabulary_of(teacher)} tokens, the model's {vocabulary_of(model)}; "
            "name the model that was pruned"
        )
    return partial(distillation_loss, model, teacher)


def _split(model: PreTrainedModel, tokens: Tensor, config: RecoveryConfig) -> tuple[Tensor, Tensor]:
    """Return the windows to train on, and the last tenth, but at most 32, which are held out to choose weights on."""
    check_context(model.config, config.seq_len)
    count = len(tokens) // config.seq_len
    if count < 2:
        raise CalibrationError(
            f"dataset: {len(tokens)} tokens are fewer than two windows of {config.seq_len}, one to train on and one "
            "to choose weights on; give more text, or a smaller seq_len"
        )
    windows = tokens[: count * config.seq_len].view(count, config.seq_len)
    kept = min(_CHOSEN_ON, max(1, count // 10))
    return windows[:-kept], windows[-kept:]


def _prepare(model: PreTrainedModel, config: RecoveryConfig) -> Callable[[], None]:
    """Make exactly the parameters to be trained require gradients; return the function that merges low-rank updates."""
    for parameter in model.parameters():
        # A pruned model may share memory with the dense model, which must not change.
        parameter.data = parameter.detach().clone()
    if config.method == "full":
        # Updates are often smaller than the resolution of 16-bit weights.
        _cast(model, torch.promote_types(model.dtype, torch.float32))
        model.requires_grad_(True)
        return lambda: None
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RecoveryError(
            "method: 'lora' needs the recover extra (pip install 'gradprune[recover]'); or choose method 'full'"
        ) from error
    names = sorted({entry.path for block in describe(model).linear_blocks for entry in block.projections})
    if not names:
        raise RecoveryError(
            "method: 'lora' trains attention and MLPs, but only experts can be pruned in this model; choose 'full'"
        )
    lora = LoraConfig(r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules=names)
    with warnings.catch_warnings():
        # PEFT uses a name that newer releases of transformers deprecate.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        wrapped: Any = get_peft_model(model, lora)
    return lambda: wrapped.merge_and_unload()


def _cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    model.to(dtype)


class _Trainer:
    """The training loop. A step's samples and learning rate depend only on its number, for given options."""

    def __init__(
        self,
        model: PreTrainedModel,
        loss_of: Callable[[Tensor], Tensor],
        train: Tensor,
        chosen_on: Tensor,
        config: RecoveryConfig,
        run: str,
        state: Path | None,
        console: Console,
    ) -> None:
        self.model, self.loss_of, self.windows, self.chosen_on = model, loss_of, train, chosen_on
        self.config, self.state, self.console = config, state, console
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=config.peak_rate, weight_decay=0.0, fused=True)
        resumed = load_state(state, run) if state is not None else None
        if resumed is None:
            self.progress = Progress(run, 0)
            self._check()
            self.progress.total = config.steps or self._planned_steps()
        else:
            self.progress, weights, self.best, moments = resumed
            self._set(weights)
            self._set_moments(moments)

    def train(self) -> Progress:
        """Train to the last step, give the model the best weights, and return the progress."""
        now = self.progress
        interval = -(-now.total // self.config.checks)
        with progress(self.console, "Recovering", now.total, "steps", done=now.step) as advance:
            while now.step < now.total:
                self._step()
                advance()
                if now.step % interval == 0 or now.step == now.total:
                    self._check()
        self._set(self.best)
        return now

    @property
    def samples_per_step(self) -> int:
        """The batch size, or the number of training windows if there are fewer."""
        return min(self.config.batch_size, len(self.windows))

    def _step(self) -> None:
        step = self.progress.step
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.peak_rate * _schedule(step, self.progress.total)
        self.model.train()
        # Seeded by step, so that dropout draws the same numbers in a resumed run.
        with seeded(self.config.seed + step, self.model.device):
            loss = self.loss_of(self._batch(step))
        if not torch.isfinite(loss):
            raise NonFiniteError(f"loss of step {step} is {loss.item()}; choose a smaller learning_rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1

    def _batch(self, step: int) -> Tensor:
        """Return the step's samples, [N, seq_len] on the model's device; every epoch has a random order of its own."""
        size = self.samples_per_step
        per_epoch = len(self.windows) // size
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step // per_epoch)
        order = torch.randperm(len(self.windows), generator=generator)
        start = step % per_epoch * size
        return self.windows[order[start : start + size]].to(self.model.device)

    def _check(self) -> None:
        """Measure the held-out loss, keep a copy of the weights if they are the best so far, and save the state."""
        self.model.eval()
        loss = mean_loss(self.model, list(batches(self.chosen_on, self.config.batch_size)))
        now = self.progress
        now.history.append((now.step, loss))
        if loss < now.best:
            now.best, now.best_step = loss, now.step
            self.best = {name: p.detach().clone() for name, p in self.trained.items()}
        if self.state is not None and now.step:
            save_state(self.state, now, dict(self.trained), self.best, self._moments())

    def _planned_steps(self) -> int:
        """Number of steps, at least 1, that fit into the time limit with checks; the second of two passes is timed."""
        for _ in range(2):
            start = time.perf_counter()
            self.model.train()
            self.loss_of(self._batch(0)).backward()
            self.optimizer.zero_grad(set_to_none=True)
            step = time.perf_counter() - start
        start = time.perf_counter()
        self.model.eval()
        mean_loss(self.model, list(batches(self.chosen_on, self.config.batch_size)))
        check = time.perf_counter() - start
        if (steps := _steps_within(60.0 * self.config.minutes, step, check, self.config.checks)) < 1:
            logger.warning(
                "minutes: %g is less than the %.2g that one step and its check take; one step is trained",
                self.config.minutes, (step + check) / 60.0,
            )  # fmt: skip
        return max(1, steps)

    @torch.no_grad()
    def _set(self, weights: Tensors) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(weights[name])

    def _moments(self) -> Tensors:
        return {
            f"{name}.{key}": value
            for name, parameter in self.trained.items()
            for key, value in self.optimizer.state[parameter].items()
        }

    def _set_moments(self, moments: Tensors) -> None:
        state = {
            number: {key: moments[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            for number, name in enumerate(self.trained)
        }
        # `load_state_dict` puts each tensor on the device that the optimizer needs; a fused one needs the step on the
        # parameter's device, too.
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


def _steps_within(seconds: float, step: float, check: float, checks: int) -> int:
    """Number of steps of `step` seconds that fit into `seconds` with at most `checks` checks of `check` seconds."""
    # If there are fewer steps than checks, each step is followed by a check.
    return int(max((seconds - checks * check) / step, seconds / (step + check)))


def _schedule(step: int, total: int) -> float:
    """Fraction of the peak learning rate: linear warm-up, then cosine decay to zero."""
    return min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1.0 + math.cos(math.pi * step / total))


def _remove(state: Path | None) -> None:
    if state is not None and state.is_dir():
        shutil.rmtree(state)
