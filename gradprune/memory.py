"""Reporting in one line that memory ran out: what was running, what it needed, and which options need less."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gradprune.config import PruneConfig
from gradprune.errors import OutOfMemoryError
from gradprune.progress import Clock

_CPU = re.compile(
    # The last message is oneDNN's if there is no memory for the code that it generates, which it does not mention.
    r"can't allocate memory|not enough memory|bad_alloc|cannot allocate memory|could not create a primitive$",
    re.IGNORECASE,
)
_AMOUNT = re.compile(r"allocate ([\d.]+ ?(?:[KMGT]i?B|bytes))")


@contextmanager
def memory_advice(clock: Clock, config: PruneConfig) -> Iterator[None]:
    """If the body runs out of memory, raise a `GradPruneError` that says what to do.

    Raises:
        OutOfMemoryError: the body ran out of memory, on the CPU or an accelerator.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and not _CPU.search(str(error)):
            raise
        amount = _AMOUNT.search(str(error))
        stage = (clock.running or "the run").replace("_", " ")
        raise OutOfMemoryError(
            f"memory: {stage} ran out of memory{f' when it needed another {amount[1]}' if amount else ''}; what would "
            f"help, cheapest first: {'; '.join(_cheaper(clock.running or '', config))}"
        ) from error


def _cheaper(stage: str, config: PruneConfig) -> list[str]:
    """List the options that would need less memory than those of `config`, the cheapest change first."""
    advice = []
    if config.batch_size > 1 and stage != "speed":
        # Each batch of own text has its own seed, so another batch size writes other text.
        same = config.reduction == "sample" and not config.own_text
        cost = "the same result" if same else "a different result"
        advice.append(f"--batch_size {max(1, config.batch_size // 4)} ({cost})")
    if stage == "calibration" and not config.use_gradient_checkpointing:
        advice.append("--use_gradient_checkpointing (takes about a third longer)")
    if config.measure_speed:
        advice.append("--no_measure_speed (keeps no second model in memory)")
    if stage == "calibration" and config.reduction == "batch":
        advice.append("--reduction sample (stores no gradients; a different result)")
    if stage == "importance" and config.importance_method == "obs":
        advice.append("--importance_method group_fisher (stores no Gram matrices; a different selection)")
    if stage == "repair":
        advice.append("--repair none (higher perplexity)")
    if stage == "distillation":
        advice.append("--distill_samples 0 (higher perplexity)")
    if config.stream_layers != "on" and config.reduction == "sample" and not config.own_text:
        advice.append("--stream_layers on (the same result, with one decoder layer in memory at a time)")
    if config.dtype in ("auto", "float32", "float64"):
        advice.append("--dtype bfloat16 (less precise weights)")
    if config.seq_len > 128:
        advice.append(f"--seq_len {config.seq_len // 2} (shorter samples; a different result)")
    if config.device != "cpu":
        advice.append("--device cpu (slow)")
    return advice or ["a machine with more memory"]
