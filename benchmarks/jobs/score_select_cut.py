"""Seconds from the end of the backward pass to a cut model: scoring, selecting, cutting; by number of layers.

    python -m benchmarks.jobs.score_select_cut

The model is a randomly initialised Llama: hidden 512, 8 heads, intermediate 2048, vocabulary 16384; 50M parameters
at 8 layers. Each number is the median of --repeats.
"""

import statistics
import time
from argparse import ArgumentParser
from dataclasses import replace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gradprune.evaluate import model_size
from gradprune.groups import group_costs, importance_column
from gradprune.hgsp import modulate
from gradprune.importance import ImportanceEngine
from gradprune.models import describe
from gradprune.selection import Constraints, select
from gradprune.surgery import cut


def main() -> None:
    """Measure each depth and print a table."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=lambda text: [int(part) for part in text.split(",")], default=[4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pruning_ratio", type=float, default=0.2)
    options = parser.parse_args()
    print("layers  parameters  score ms  select ms  cut ms  total ms")
    for layers in options.layers:
        model = llama(layers)
        engine = calibrated(model)
        runs = [job(model, engine, options.pruning_ratio) for _ in range(options.repeats)]
        score, chosen, surgery = (1e3 * statistics.median(column) for column in zip(*runs, strict=True))
        total = score + chosen + surgery
        size = model_size(model).parameters
        print(f"{layers:6d}  {size / 1e6:9.1f}M  {score:8.1f}  {chosen:9.1f}  {surgery:6.1f}  {total:8.1f}", flush=True)


def llama(layers: int) -> LlamaForCausalLM:
    """The model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    return LlamaForCausalLM(config).eval()


def calibrated(model: LlamaForCausalLM) -> ImportanceEngine:
    """An engine after one batch of 4 samples of 128 tokens."""
    with ImportanceEngine(model, "taylor_2nd") as engine:
        engine.step(torch.randint(16384, (4, 128), generator=torch.Generator().manual_seed(0)))
    return engine


def job(model: LlamaForCausalLM, engine: ImportanceEngine, ratio: float) -> tuple[float, float, float]:
    """Seconds of scoring, selecting and cutting (into a new model that shares what is not cut)."""
    start = time.perf_counter()
    table = replace(group_costs(describe(model)), importance=importance_column(engine.scores()))
    table = modulate(table, 0.0, None, None)
    scored = time.perf_counter()
    masks = table.masks(select(table, ratio, model_size(model).parameters, Constraints()))
    selected = time.perf_counter()
    cut(model, masks)
    return scored - start, selected - scored, time.perf_counter() - selected


if __name__ == "__main__":
    main()
