"""Prune a model that is larger than the memory allowed: an 8B-shaped Llama-3 of random weights, layer by layer.

    python -m benchmarks.jobs.streamed --folder /tmp/llama8b            # 16 GB on disk
    python -m benchmarks.jobs.streamed --folder /tmp/small --layers 2   # the same widths

The checkpoint is written shard by shard and pruned by the command line in a process of its own, whose resident memory
without the file cache (RssAnon in /proc/self/status, Linux only) is sampled ten times a second.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig

from gradprune.checkpoint.shards import write_safetensors

WIDTHS = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
VOCABULARY = 128256
SCALE = 0.02


def write_checkpoint(folder: Path, layers: int) -> int:
    """Write random bf16 weights of Llama-3-8B's shape, one decoder layer a file; returns their number."""
    folder.mkdir(parents=True)
    config = LlamaConfig(
        **WIDTHS,
        num_hidden_layers=layers,
        vocab_size=VOCABULARY,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    shapes = _shapes(layers)
    places: dict[str, str] = {}
    for number, shard in enumerate(shapes, start=1):
        file = f"model-{number:05d}-of-{len(shapes):05d}.safetensors"
        generator = torch.Generator().manual_seed(number)
        empty = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shard.items()}

        def read(name: str, shard=shard, generator=generator) -> torch.Tensor:
            if name.endswith("norm.weight"):
                return torch.ones(shard[name], dtype=torch.bfloat16)
            return torch.empty(shard[name], dtype=torch.bfloat16).normal_(0.0, SCALE, generator=generator)

        write_safetensors(folder / file, empty, read)
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return sum(int(np.prod(shape)) for shard in shapes for shape in shard.values())


def _shapes(layers: int) -> list[dict[str, tuple[int, ...]]]:
    """The weights of each file: the embedding and the head, then a layer each."""
    hidden, channels = WIDTHS["hidden_size"], WIDTHS["intermediate_size"]
    kv = hidden // WIDTHS["num_attention_heads"] * WIDTHS["num_key_value_heads"]
    first: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, hidden),
        "lm_head.weight": (VOCABULARY, hidden),
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


def measured(command: list[str]) -> dict[str, float]:
    """Run a command; its seconds, its exit code and the peak of its RssAnon in bytes."""
    start, peak = time.monotonic(), 0
    process = subprocess.Popen(command)
    while process.poll() is None:
        peak = max(peak, _resident(process.pid))
        time.sleep(0.1)
    return {"seconds": time.monotonic() - start, "exit_code": process.returncode, "peak_bytes": peak}


def _resident(process: int) -> int:
    """RssAnon of a process in bytes; 0 when it is over."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def main(arguments: list[str] | None = None) -> None:
    """Write, prune, and print what was measured as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for the checkpoint and the results")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--num_samples", type=int, default=2)
    parser.add_argument("--seq_len", type=int, default=64)
    parser.add_argument("--repair", default="none")
    given = parser.parse_args(arguments)
    model = given.folder / "model"
    if not model.is_dir():
        write_checkpoint(model, given.layers)
    tokens = given.folder / "tokens.npy"
    np.save(tokens, np.random.default_rng(0).integers(0, VOCABULARY, 16 * given.seq_len))
    options = {
        "base_model": model, "stream_layers": "on", "pruning_ratio": 0.2, "num_samples": given.num_samples,
        "seq_len": given.seq_len, "batch_size": 1, "held_out_samples": 1, "dataset": tokens, "eval_dataset": tokens,
        "eval_samples": 1, "repair": given.repair, "output_dir": given.folder, "output_name": "pruned",
    }  # fmt: skip
    command = [str(Path(sys.executable).with_name("gradprune")), "prune", "--no-measure-speed", "--overwrite"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    figures = measured(command)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    print(json.dumps({"command": " ".join(command), "weights_bytes": size, "layers": given.layers, **figures}))


if __name__ == "__main__":
    main()
