"""Training of the demo model, a byte-level Llama of 400 thousand parameters, in a minute or two on a CPU.

The model is so small for its text that no channel is idle. So pruning raises the loss, and methods differ.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gradprune.errors import CalibrationError, NonFiniteError
from gradprune.models.loss import sample_losses
from gradprune.models.modes import one_thread, seeded

# Five iterations suffice for singular values of at least 1 % of the Frobenius norm.
_NEWTON_SCHULZ_ITERATIONS = 5


@dataclass(frozen=True)
class DemoTraining:
    """The recipe of the demo model; the defaults are what `gradprune demo` uses.

    steps: number of optimiser steps. batch_size: windows per step. seq_len: tokens per window.
    learning_rate: peak rate of AdamW, for the embedding and the norms. matrix_learning_rate: peak rate of Muon, for
        the matrices of the decoder layers.
    warmup: steps of linear warm-up; a cosine decay to zero follows.
    weight_decay: decoupled weight decay of the matrices only.
    seed: seed of the initial weights and of the windows drawn.
    evaluation_windows: the most windows of `seq_len` tokens on which the held-out perplexity is measured.
    """

    steps: int = 480
    batch_size: int = 8
    seq_len: int = 128
    learning_rate: float = 1e-2
    matrix_learning_rate: float = 0.05
    warmup: int = 30
    weight_decay: float = 0.05
    seed: int = 0
    hidden_size: int = 128
    intermediate_size: int = 128
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    context: int = 1024
    evaluation_windows: int = 256


def train_model(
    recipe: DemoTraining, tokens: Tensor, *, vocab_size: int, eos_token_id: int, console: Console
) -> LlamaForCausalLM:
    """Train a Llama with tied embeddings from scratch.

    The same recipe and tokens give bit-identical weights on the same kind of machine, because training uses one thread.

    Args:
        recipe: sizes and schedule.
        tokens: [tokens] int64, the training text.
        vocab_size, eos_token_id: properties of the tokenizer.
        console: where progress is shown.

    Returns:
        The model on the CPU, in fp32 and evaluation mode.

    Raises:
        CalibrationError: the text is not longer than one window.
        NonFiniteError: the loss diverged.
    """
    model = random_model(recipe, vocab_size, eos_token_id)
    fit(model, recipe, tokens, console)
    return model


def fit(model: PreTrainedModel, recipe: DemoTraining, tokens: Tensor, console: Console) -> None:
    """Train the parameters of `model` that require gradients; see `train_model` for arguments and errors."""
    if len(tokens) <= recipe.seq_len:
        raise CalibrationError(f"seq_len: {recipe.seq_len} is not below the {len(tokens)} tokens of training text")
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    of_layers = {id(parameter) for parameter in model.get_decoder().layers.parameters()}
    matrices = [parameter for parameter in trained if parameter.ndim == 2 and id(parameter) in of_layers]
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in trained if id(parameter) not in chosen]
    muon = Muon(matrices, weight_decay=recipe.weight_decay)
    adam = torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    # At this size a second thread gains little, and training takes ten times as long if the second core is busy.
    with one_thread(), _bar(console, recipe.steps) as show:
        for step, windows in enumerate(_windows(recipe, tokens)):
            loss = sample_losses(model, windows).mean()
            if not loss.isfinite():
                raise NonFiniteError(f"loss of the demo model's training step {step} is {loss.item()}")
            loss.backward()
            scale = warmup_cosine(step, recipe.warmup, recipe.steps)
            muon.step(recipe.matrix_learning_rate * scale)
            adam.param_groups[0]["lr"] = recipe.learning_rate * scale
            adam.step()
            model.zero_grad(set_to_none=True)
            show(loss.item())
    model.eval()


class Muon:
    """Muon, momentum with orthogonalised updates for matrices: W -= lr * sqrt(max(1, O/I)) * orthogonal(momentum).

    At this size it needs about a third of the steps that AdamW needs. Jordan et al., "Muon: An optimizer for hidden
    layers in neural networks", 2024.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], *, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        """Start with zero momentum for each of `matrices`.

        Args:
            matrices: parameters `[O, I]`, whose gradients are in `.grad` at each step.
            momentum: coefficient of Nesterov momentum.
            weight_decay: decoupled weight decay, as in AdamW.
        """
        self._state = [(matrix, torch.zeros_like(matrix)) for matrix in matrices]
        self._momentum = momentum
        self._weight_decay = weight_decay

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the matrices in place."""
        for matrix, average in self._state:
            assert matrix.grad is not None
            average.lerp_(matrix.grad, 1.0 - self._momentum)
            update = orthogonal(matrix.grad.lerp(average, self._momentum))
            rows, columns = matrix.shape
            matrix.mul_(1.0 - learning_rate * self._weight_decay)
            matrix.add_(update, alpha=-learning_rate * math.sqrt(max(1.0, rows / columns)))


def orthogonal(matrix: Tensor) -> Tensor:
    """Approximate U V^T of the singular value decomposition U S V^T, by a quintic Newton-Schulz iteration.

    The iteration is X <- (a + b X X^T + c (X X^T)^2) X. Its factors are accumulated on the small Gram matrix, which
    is cheaper for matrices at least twice as long as wide. The coefficients raise small singular values fast, into
    about [0.7, 1.2] rather than to 1.

    Args:
        matrix: [O, I], the matrix U S V^T.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    wide = wide.div(wide.norm() + 1e-7)
    gram = wide @ wide.T
    identity = torch.eye(len(gram), dtype=gram.dtype)
    product = identity
    for _ in range(_NEWTON_SCHULZ_ITERATIONS):
        factor = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) + 3.4445 * identity
        product = factor @ product
        gram = factor @ gram @ factor
    wide = product @ wide
    return wide.T if tall else wide


def warmup_cosine(step: int, warmup: int, steps: int) -> float:
    """Return the learning-rate factor at a 0-based step: linear warm-up over `warmup` steps, then cosine decay to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def random_model(recipe: DemoTraining, vocab_size: int, eos_token_id: int) -> LlamaForCausalLM:
    """Create a randomly initialised Llama of the recipe's sizes."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_token_id,
    )
    with seeded(recipe.seed):
        return LlamaForCausalLM(config)


def _windows(recipe: DemoTraining, tokens: Tensor) -> Iterator[Tensor]:
    """Yield the windows [batch_size, seq_len] of each step, drawn with replacement."""
    generator = torch.Generator().manual_seed(recipe.seed)
    within = torch.arange(recipe.seq_len)
    for _ in range(recipe.steps):
        starts = torch.randint(len(tokens) - recipe.seq_len, (recipe.batch_size, 1), generator=generator)
        yield tokens[starts + within]


@contextmanager
def _bar(console: Console, steps: int) -> Iterator[Callable[[float], None]]:
    """Context manager that shows a progress bar and yields `show(loss)`, to be called after each step."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    bar = Progress(*columns, console=console, disable=not console.is_terminal or console.quiet, expand=True)
    with bar:
        task = bar.add_task("Training", total=steps, state="")
        start, done, smooth = time.perf_counter(), 0, 0.0

        def show(loss: float) -> None:
            nonlocal done, smooth
            smooth = loss if done == 0 else 0.9 * smooth + 0.1 * loss
            done += 1
            rate = done / (time.perf_counter() - start)
            bar.update(task, advance=1, state=f"{rate:.1f} steps/s  loss {smooth:.3f}")

        yield show
