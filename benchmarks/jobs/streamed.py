"""Prune a model that is larger than the memory allowed, layer by layer: a Llama-3 with random weights.

    python -m benchmarks.jobs.streamed --folder /tmp/llama8b            # 16 GB on disk
    python -m benchmarks.jobs.streamed --folder /tmp/small --layers 2   # the same widths
    python -m benchmarks.jobs.streamed --folder /tmp/llama8b --peers --budget 6   # other tools, with 6 GiB
    python -m benchmarks.jobs.streamed --device cuda --size 70B         # within 24 GiB of the GPU's memory, enforced

The checkpoint is written shard by shard and pruned by the command line in a process of its own, whose resident memory
without the file cache (RssAnon in /proc/self/status, Linux only) is sampled ten times a second. On a GPU the process
may not allocate more than `--budget`. If the disk cannot hold the model and its pruned copy, the model gets fewer
layers.

With `--peers`, other tools calibrate on the same model instead, loaded by transformers with its weights mapped from the
files, with each layer recomputed in the backward pass. A tool is stopped when it holds more than `--budget`, not
counting what is mapped.
"""

import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from benchmarks.jobs.models import llama_config
from benchmarks.options import parse, parser
from benchmarks.processes import end_with_parent, memory_of
from benchmarks.progress import Deadline, say
from benchmarks.results import append, record
from benchmarks.timing import Timing
from gradprune.checkpoint.shards import write_safetensors

NAME, OURS = "streamed", "gradprune streamed"
# The load of a run on a GPU: samples, and tokens per sample.
LOAD = (8, 2048)
SCALE = 0.02
# Fraction of the free disk space that the model and its pruned copy may take.
_DISK_FRACTION = 0.8
# By size, the least number of seconds left with which a run is started.
_MIN_SECONDS = {"toy": 0.0, "8B": 60.0, "70B": 120.0}
# A program that runs gradprune's command line with a limited share of the GPU's memory.
_BOUNDED = """
import torch
torch.cuda.set_per_process_memory_fraction({fraction})
from gradprune.cli import main
main()
"""

PEERS = ("plain", "naive", "torch-pruning GroupTaylor", "torch.func")
_PEER = """
import torch
from benchmarks.jobs.calibrators import calibrators
from transformers import AutoModelForCausalLM
peer = next(one for one in calibrators(("reference",)) if one.name == {name!r})
model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.bfloat16, attn_implementation=peer.attention)
ids = torch.randint(model.config.vocab_size, ({samples}, {tokens}), generator=torch.Generator().manual_seed(1))
peer.run(model.eval(), list(ids.split(1)), True)
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the model, prune it or calibrate peers on it, and record what was measured."""
    made = parser(__doc__)
    made.add_argument(
        "--size", choices=list(_MIN_SECONDS), default=None, help="size of the Llama; default 8B, on a GPU 70B"
    )
    made.add_argument(
        "--folder", type=Path, default=None, help="where to keep the model and the results; default a temporary one"
    )
    made.add_argument("--layers", type=int, default=None, help="number of layers; default as many as the disk can hold")
    made.add_argument("--num_samples", type=int, default=2)
    made.add_argument("--seq_len", type=int, default=64)
    made.add_argument("--repair", default="none")
    made.add_argument("--budget", type=float, default=24.0, help="GiB of the GPU's memory; with --peers, of the host's")
    made.add_argument("--peers", action="store_true", help="calibrate with other tools instead of pruning")
    options = parse(made, arguments)
    options.size = "toy" if options.toy else options.size or ("70B" if options.device == "cuda" else "8B")
    deadline = Deadline(options.seconds)
    if not deadline.allows(_MIN_SECONDS[options.size]):
        _append(options, 0, Timing.failed("skipped: the time for this run was used up"))
        return
    with tempfile.TemporaryDirectory() as passing:
        _prune(options, options.folder or Path(passing))


def _prune(options: Namespace, folder: Path) -> None:
    """Prune the model in `folder`, or calibrate peers on it; the model is first written if it is missing."""
    config = llama_config(options.size)
    config.tie_word_embeddings = False
    config.num_hidden_layers = options.layers or _layers_on(folder, config)
    model = folder / "model"
    if not model.is_dir():
        say(f"writing {config.num_hidden_layers} layers of the {options.size} Llama")
        write_checkpoint(model, config, options.device)
    if options.peers:
        _try_peers(options, model, config.num_hidden_layers)
        return
    tokens = folder / "tokens.npy"
    np.save(tokens, np.random.default_rng(0).integers(0, config.vocab_size, 16 * options.seq_len))
    values = {
        "base_model": model, "device": options.device, "stream_layers": "on", "pruning_ratio": 0.2,
        "num_samples": options.num_samples, "seq_len": options.seq_len, "batch_size": 1, "held_out_samples": 1,
        "dataset": tokens, "eval_dataset": tokens, "eval_samples": 1, "repair": options.repair, "output_dir": folder,
        "output_name": "pruned",
    }  # fmt: skip
    command = [*_program(options), "prune", "--no-measure-speed", "--overwrite"]
    found = measured([*command, *(part for name, value in values.items() for part in (f"--{name}", str(value)))])
    failed = f"failed with exit code {found['exit_code']}: {found['last_words']}"
    timing = Timing.failed(failed) if found["exit_code"] else Timing.of([found["seconds"]])
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    budget = options.budget if options.device == "cuda" else None
    host = int(found["peak_bytes"])
    _append(options, config.num_hidden_layers, timing, weight_bytes=size, peak_host=host, budget_gib=budget)
    done = timing.error or f"done in {found['seconds']:.0f} s"
    say(f"    {done}, {host / 2**30:.2f} GiB of the host's memory for weights of {size / 2**30:.2f} GiB")
    if found["exit_code"]:
        sys.exit(1)


def _try_peers(options: Namespace, model: Path, layers: int) -> None:
    """Calibrate with each of `PEERS` within the budget, and record the outcome."""
    for name in PEERS:
        program = _PEER.format(name=name, folder=str(model), samples=options.num_samples, tokens=options.seq_len)
        found = measured([sys.executable, "-c", program], most=options.budget * 2**30)
        error = None
        if found["peak_bytes"] > options.budget * 2**30:
            error = f"out of memory: holds more than {options.budget:g} GiB"
        elif found["exit_code"]:
            error = f"failed: {found['last_words']}"
        timing = Timing.of([found["seconds"]]) if error is None else Timing.failed(error)
        _append(options, layers, timing, provider=name, peak_host=int(found["peak_bytes"]), budget_gib=options.budget)
        say(f"    {name}: {error or 'done'}, {found['peak_bytes'] / 2**30:.2f} GiB")


def _program(options: Namespace) -> list[str]:
    """The command that starts gradprune; on a GPU, such that it cannot allocate more than the budget."""
    if options.device != "cuda":
        return [sys.executable, "-m", "gradprune"]
    total = torch.cuda.get_device_properties(0).total_memory
    return [sys.executable, "-c", _BOUNDED.format(fraction=min(1.0, options.budget * 2**30 / total))]


def _layers_on(folder: Path, config: LlamaConfig) -> int:
    """The number of the model's layers, at least 1, that the disk can hold together with the pruned copy."""
    folder.mkdir(parents=True, exist_ok=True)
    first, layer = (2 * sum(int(np.prod(shape)) for shape in shard.values()) for shard in _shapes(config, 1))
    room = _DISK_FRACTION * shutil.disk_usage(folder).free / 2 - first
    return max(1, min(config.num_hidden_layers, int(room / layer)))


def write_checkpoint(folder: Path, config: LlamaConfig, device: str) -> None:
    """Write a checkpoint of random bf16 weights, drawn on `device`, with one decoder layer per file."""
    folder.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    shapes = _shapes(config, config.num_hidden_layers)
    places: dict[str, str] = {}
    for number, shard in enumerate(shapes, start=1):
        file = f"model-{number:05d}-of-{len(shapes):05d}.safetensors"
        generator = torch.Generator(device).manual_seed(number)
        empty = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shard.items()}

        def read(name: str, shard=shard, generator=generator) -> torch.Tensor:
            if name.endswith("norm.weight"):
                return torch.ones(shard[name], dtype=torch.bfloat16)
            drawn = torch.empty(shard[name], dtype=torch.bfloat16, device=device)
            return drawn.normal_(0.0, SCALE, generator=generator).cpu()

        write_safetensors(folder / file, empty, read)
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _shapes(config: LlamaConfig, layers: int) -> list[dict[str, tuple[int, ...]]]:
    """Shapes of the weights in each file: first the embedding, last norm and head, then one layer per file."""
    hidden, channels = config.hidden_size, config.intermediate_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    first: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "lm_head.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (channels, hidden),
        "mlp.up_proj.weight": (channels, hidden),
        "mlp.down_proj.weight": (hidden, channels),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    return [first, *({f"model.layers.{n}.{name}": shape for name, shape in layer.items()} for n in range(layers))]


def measured(command: list[str], most: float = math.inf) -> dict[str, Any]:
    """Run a command, and return its seconds, exit code, last line on standard error, and peak RssAnon in bytes.

    most: limit in bytes; the command is killed when it holds more.
    """
    start, peak = time.monotonic(), 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stderr=errors, preexec_fn=end_with_parent)
        while process.poll() is None:
            peak = max(peak, memory_of("RssAnon", process.pid) or 0)
            if peak > most:
                process.kill()
            time.sleep(0.1)
        seconds = time.monotonic() - start
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines() or [""]
    return {"seconds": seconds, "exit_code": process.returncode, "peak_bytes": peak, "last_words": lines[-1][:200]}


def _append(options: Namespace, layers: int, timing: Timing, provider: str = OURS, **extra: object) -> None:
    shape = f"Llama {options.size} of {layers} layers, {options.num_samples}x{options.seq_len} tokens"
    append(
        record("job", NAME, provider, shape, "bf16", options.device, extra=extra, **timing.values()),
        options.output,
    )


if __name__ == "__main__":
    main()
