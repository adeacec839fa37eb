"""Perplexity by importance method and ratio, from one calibration pass a seed.

    python -m benchmarks.quality.methods --base_model MODEL --dataset TEXT --eval_dataset TEXT

Prints a table of means over the seeds with their spread, and appends one JSON line a measurement to --output.
"""

import json
import statistics
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from transformers.utils import logging

import gradprune
from gradprune.calibration import batches, load_tokens, sample_windows
from gradprune.checkpoint import load_model
from gradprune.config import METHODS
from gradprune.demo import demo_model_path
from gradprune.evaluate import model_size, perplexity
from gradprune.groups import group_costs, importance_column
from gradprune.hgsp import modulate, removal_priors
from gradprune.importance import ImportanceEngine
from gradprune.models import describe
from gradprune.selection import Constraints, select
from gradprune.surgery import cut


def main() -> None:
    """Measure, print, append."""
    options = parse()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    base_model = options.base_model or str(demo_model_path())
    model, tokenizer = load_model(base_model)
    calibration = load_tokens(options.dataset, tokenizer)
    evaluation = load_tokens(options.eval_dataset, tokenizer, split="evaluation")
    measured = defaultdict(list)
    dense = measure(model, evaluation, options)
    for seed in options.seeds:
        engine, priors = calibrate(model, calibration, seed, options)
        view, parameters = describe(model), model_size(model).parameters
        for method in METHODS:
            table = replace(group_costs(view), importance=importance_column(engine.scores(method)))
            for temperature in options.temperatures:
                scored = modulate(table, temperature, 0.0, priors)
                for ratio in options.ratios:
                    masks = scored.masks(select(scored, ratio, parameters, Constraints()))
                    value = measure(cut(model, masks), evaluation, options)
                    measured[method, temperature, ratio].append(value)
                    append(options.output, base_model, method, temperature, ratio, seed, dense, value)
    show(measured, dense, options)


def parse() -> Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base_model")
    parser.add_argument("--dataset")
    parser.add_argument("--eval_dataset")
    parser.add_argument(
        "--ratios", type=lambda text: [float(part) for part in text.split(",")], default=[0.1, 0.2, 0.3]
    )
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--temperatures", type=floats, default=[0.0])
    parser.add_argument("--num_samples", type=int, default=128)
    parser.add_argument("--seq_len", type=int, default=128)
    parser.add_argument("--eval_samples", type=int, default=None)
    parser.add_argument("--output", type=Path, default=None)
    return parser.parse_args()


def floats(text: str) -> list[float]:
    """Numbers separated by commas."""
    return [float(part) for part in text.split(",")]


def calibrate(model, tokens, seed, options):
    """One pass for every gradient method; the magnitude and Wanda scores come with it."""
    windows = sample_windows(tokens, num_samples=options.num_samples, seq_len=options.seq_len, seed=seed)
    with ImportanceEngine(model, "taylor") as engine:
        for batch in batches(windows, 8):
            engine.step(batch)
    if not any(options.temperatures):
        return engine, None
    return engine, removal_priors(model, describe(model), [windows[:16]], lambda: None)


def measure(model, tokens, options) -> float:
    """Held-out perplexity."""
    found = perplexity(model, tokens, seq_len=options.seq_len, batch_size=8, max_windows=options.eval_samples)
    return found.value


def append(output, base_model, method, temperature, ratio, seed, dense, value) -> None:
    """One JSON line."""
    if output is None:
        return
    record = {
        "job": "quality",
        "model": Path(base_model).name,
        "method": method,
        "temperature": temperature,
        "ratio": ratio,
        "seed": seed,
        "perplexity_dense": dense,
        "perplexity_pruned": value,
        "versions": {
            "gradprune": gradprune.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def show(measured, dense: float, options) -> None:
    """A Markdown table."""
    print(f"dense perplexity {dense:.2f}; mean of {len(options.seeds)} seeds (lowest to highest)\n")
    print("| method | T | " + " | ".join(f"{ratio:.0%}" for ratio in options.ratios) + " |")
    print("|---|---|" + "---|" * len(options.ratios))
    for method in METHODS:
        for temperature in options.temperatures:
            cells = [measured[method, temperature, ratio] for ratio in options.ratios]
            text = [f"{statistics.mean(cell):.2f} ({min(cell):.2f} to {max(cell):.2f})" for cell in cells]
            print(f"| {method} | {temperature:g} | " + " | ".join(text) + " |")


if __name__ == "__main__":
    main()
