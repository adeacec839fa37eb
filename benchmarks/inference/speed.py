"""Tokens per second and memory of dense and pruned models, for several roundings of the MLP widths.

    python -m benchmarks.inference.speed [--device cuda] [--quick]

Weights are random, 30 % of them are removed by magnitude, and the models are timed by turns. Prefill is one forward
pass over a prompt; decoding is greedy generation with a KV cache, including its prompt.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from benchmarks.jobs.models import build
from benchmarks.options import parse, parser
from benchmarks.progress import Deadline, say
from benchmarks.results import append, record
from gradprune.calibration.engine import ImportanceEngine
from gradprune.config import Constraints, Scoring
from gradprune.evaluation.size import model_size
from gradprune.evaluation.speed import Throughput, alternate, random_ids, throughput
from gradprune.models import describe
from gradprune.scoring.choose import choose
from gradprune.surgery.cut import cut

RATIO = 0.3
ROUNDED_TO = (1, 8, 64, 128)
BATCHES = (1, 8)


@dataclass(frozen=True)
class Setting:
    """The model (layers: None for all of its size), the lengths of prompt and generation, and the number of turns."""

    size: str
    dtype: str
    layers: int | None
    prompt: int
    new_tokens: int
    repeats: int
    rounded_to: tuple[int, ...] = ROUNDED_TO


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure prefill and decoding at each batch size."""
    options = parse(parser(__doc__), arguments)
    logging.set_verbosity_error()
    setting = _setting(options)
    deadline = Deadline(options.seconds)
    dense = build(setting.size, options.device, setting.dtype, setting.layers)
    models = {"dense": dense, **{f"round_to {width}": pruned(dense, width) for width in setting.rounded_to}}
    for batch in BATCHES:
        for phase in ("prefill", "decode"):
            if deadline.allows(1.0) and deadline.allows(_about(phase, batch, models, setting)):
                _benchmark(phase, batch, models, setting, options)
            else:
                say(f"inference, {phase}, batch {batch}: the time for this run is used up")


def pruned(model: PreTrainedModel, round_to: int) -> PreTrainedModel:
    """Remove the fraction `RATIO` of a model's parameters, by magnitude; MLP widths are multiples of `round_to`."""
    evidence = ImportanceEngine(model, "magnitude").evidence()
    scoring, constraints = Scoring(importance_method="magnitude"), Constraints(round_to=round_to)
    return cut(model, choose(describe(model), evidence, scoring, constraints, RATIO).masks)


@torch.inference_mode()
def decode_throughput(
    models: Mapping[str, PreTrainedModel],
    *,
    prompt_len: int,
    new_tokens: int,
    seed: int,
    batch_size: int,
    repeats: int,
) -> dict[str, Throughput]:
    """Measure new tokens per second of greedy generation with a KV cache, prefill included; the models alternate.

    Args:
        models: models by name, at least one.
        prompt_len, batch_size: shape of the random prompts.
        new_tokens: tokens to generate per prompt, ignoring end-of-text; prompt and new tokens must fit the context.
        seed: seed of the random prompts.
        repeats: timed generations of each model, after two untimed ones.

    Raises:
        ConfigError: `repeats` is less than 1.
    """
    ids = random_ids(models, batch_size, prompt_len, seed)
    options = GenerationConfig(do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0)

    def generate(model: PreTrainedModel) -> None:
        prompt = ids.to(model.device)
        model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=options, use_cache=True)

    return alternate(models, generate, batch_size * new_tokens, repeats)


def _setting(options: Namespace) -> Setting:
    if options.toy:
        return Setting("toy", "fp32", None, prompt=4, new_tokens=2, repeats=1, rounded_to=(1, 8))
    if options.device == "cuda":
        # Eight layers with the 8B model's matrices, at a quarter of its memory and time.
        return Setting("8B", "bf16", 8, prompt=512, new_tokens=16 if options.quick else 64, repeats=5)
    if options.quick:
        return Setting("28M", "fp32", None, prompt=64, new_tokens=4, repeats=2)
    return Setting("110M", "fp32", None, prompt=64, new_tokens=8, repeats=3)


def _about(phase: str, batch: int, models: dict[str, PreTrainedModel], setting: Setting) -> float:
    """Estimate the seconds that a phase takes for all models, from a turn of the dense one."""
    rate = _rates(phase, batch, {"dense": models["dense"]}, replace(setting, repeats=1))["dense"].p50
    # Besides the timed turns, each model has two untimed ones, and one more pass that measures its memory.
    return len(models) * (setting.repeats + 3) * batch * _tokens(phase, setting) / rate


def _rates(phase: str, batch: int, models: dict[str, PreTrainedModel], setting: Setting) -> dict[str, Throughput]:
    """Tokens per second of each model."""
    if phase == "prefill":
        return throughput(models, seq_len=setting.prompt, seed=0, batch_size=batch, repeats=setting.repeats)
    return decode_throughput(
        models,
        prompt_len=setting.prompt,
        new_tokens=setting.new_tokens,
        seed=0,
        batch_size=batch,
        repeats=setting.repeats,
    )


def _tokens(phase: str, setting: Setting) -> int:
    """The number of tokens per prompt that throughput is computed from."""
    return setting.prompt if phase == "prefill" else setting.new_tokens


def _benchmark(
    phase: str, batch: int, models: dict[str, PreTrainedModel], setting: Setting, options: Namespace
) -> None:
    found, tokens = _rates(phase, batch, models, setting), batch * _tokens(phase, setting)
    text = f"{setting.prompt} tokens" if phase == "prefill" else f"{setting.prompt} + {setting.new_tokens} tokens"
    for name, rate in found.items():
        made = record(
            "inference",
            phase,
            name,
            f"Llama {setting.size}, {setting.layers or 'all'} layers, batch {batch}, {text}",
            setting.dtype,
            options.device,
            **_milliseconds(rate, tokens),
            repeats=setting.repeats,
            peak_memory=_peak_memory(models[name], options.device, batch, setting.prompt),
            extra={
                "tokens_per_s": rate.p50,
                "batch": batch,
                "parameters": model_size(models[name]).parameters,
                "weight_bytes": model_size(models[name]).bytes,
                "ratio": 0.0 if name == "dense" else RATIO,
            },
        )
        append(made, options.output)
        say(f"inference, {phase}, batch {batch}, {name:13s} {rate.p50:10.1f} tokens/s")


def _milliseconds(rate: Throughput, tokens: int) -> dict[str, float]:
    """Convert rates to times: the 80th percentile of the rate gives the 20th of the time."""
    return {"ms_p20": 1e3 * tokens / rate.p80, "ms_p50": 1e3 * tokens / rate.p50, "ms_p80": 1e3 * tokens / rate.p20}


@torch.inference_mode()
def _peak_memory(model: PreTrainedModel, device: str, batch: int, tokens: int) -> int | None:
    """Peak bytes that a forward pass with its KV cache needs in addition to the weights; None on a CPU."""
    if device != "cuda":
        return None
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(input_ids=torch.zeros(batch, tokens, dtype=torch.int64, device=device), use_cache=True)
    return torch.cuda.max_memory_allocated() - held


if __name__ == "__main__":
    main()
