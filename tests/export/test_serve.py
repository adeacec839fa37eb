"""`--serve`: limits on the selection, the file written for the runtime, and refusals before calibration."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from gradprune import PruneConfig, prune
from gradprune.config import Constraints
from gradprune.errors import ConfigError, ExportError
from gradprune.export.serve import check_serve, write_served
from gradprune.models import describe
from gradprune.surgery.cut import cut
from helpers.cut_models import full_masks
from helpers.llama_cpp import ascii_tokenizer
from helpers.pipeline_runs import TOKENS, run
from helpers.tiny_models import tiny_model

# Attention is removed first, and all of it.
NO_ATTENTION = {"pruning_ratio": 0.5, "attention_factor": 1e-6}
TOKENIZER = ascii_tokenizer(51)


def kept(result, kind: str) -> list[int]:
    return [int(mask.sum()) for mask in getattr(result.masks, kind)]


def test_vllm_keeps_attention_in_every_layer() -> None:
    assert min(kept(run(tiny_model(), **NO_ATTENTION), "attention")) == 0
    assert kept(run(tiny_model(), **NO_ATTENTION, serve="vllm"), "attention") == [1, 1, 1]


@pytest.mark.parametrize("serve", ["vllm", "uniform"])
def test_kept_groups_and_channels_can_be_split_over_devices(serve: str) -> None:
    model = tiny_model(kv_heads=6, ratio=1, channels=24)
    result = run(model, pruning_ratio=0.4, serve=serve, tensor_parallel=2)
    groups, channels = kept(result, "attention"), kept(result, "mlp")
    assert all(count % 2 == 0 for count in groups + channels)
    assert min(groups) > 0
    assert sum(groups) < 18
    assert sum(channels) < 72


def test_widths_are_multiples_of_all_that_the_options_ask_for() -> None:
    constraints = Constraints(serve="vllm", tensor_parallel=4, round_to=6)
    assert constraints.multiple(rounded=True) == 12
    assert constraints.multiple(rounded=False) == 4
    assert Constraints(serve="gguf", round_to=48).multiple(rounded=True) == 96
    assert Constraints(serve="gguf").multiple(rounded=False) == 1
    assert Constraints(serve="hf").multiple(rounded=True) == 1


def test_uniform_is_a_plain_checkpoint(tmp_path: Path) -> None:
    run(tiny_model(), serve="uniform", output_dir=str(tmp_path), output_name="x")
    assert type(AutoConfig.from_pretrained(tmp_path / "x" / "model")) is LlamaConfig
    assert not (tmp_path / "x" / "model" / "modeling_gradprune.py").exists()


def test_gguf_is_written_beside_the_checkpoint(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf library is not installed (pip install gguf)")
    options = {"num_samples": 8, "seq_len": 16, "batch_size": 4, "backend": "reference"}
    config = PruneConfig(**options, serve="gguf", pruning_ratio=0.4, output_dir=str(tmp_path), output_name="x")
    model = tiny_model(channels=160, dtype=torch.float32)
    result = prune(model, TOKENIZER, config, calibration=TOKENS[:1500], evaluation=TOKENS[1500:])
    assert all(count % 32 == 0 for count in kept(result, "mlp"))
    fields = gguf.GGUFReader(tmp_path / "x" / "model.gguf").fields
    assert fields["general.architecture"].contents() == "deci"
    assert fields["deci.feed_forward_length"].contents() == [count or 32 for count in kept(result, "mlp")]
    assert json.loads((tmp_path / "x" / "run.json").read_text())["config"]["serve"] == "gguf"


def test_weights_beyond_the_range_of_f16_are_written_as_bf16(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf library is not installed (pip install gguf)")
    model = tiny_model(dtype=torch.float32)
    for value, expected in ((1.0, "F16"), (1e6, "BF16")):
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] = value
        folder = tmp_path / expected
        write_served(model, TOKENIZER, Constraints(serve="gguf"), folder)
        types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}
        assert types == {"F32", expected}
    write_served(model, TOKENIZER, Constraints(serve="vllm"), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def refused(model, tokenizer=TOKENIZER, **options) -> str:
    with pytest.raises(ExportError) as error:
        check_serve(describe(model), tokenizer, Constraints(**options))
    return str(error.value)


def test_models_that_cannot_be_served_are_refused_with_the_reason() -> None:
    untied = tiny_model("qwen3")
    assert "tied embeddings" in refused(untied, serve="gguf")
    check_serve(describe(untied), TOKENIZER, Constraints(serve="gguf", uniform=True))
    assert refused(tiny_model(), None, serve="gguf").startswith(
        "serve: no gguf file can be written: it has no tokenizer"
    )
    assert "2 does not divide the 3 KV groups of layer 0" in refused(tiny_model(), serve="vllm", tensor_parallel=2)
    model = tiny_model()
    masks = full_masks(model)
    masks.attention[1][:] = False
    assert "layer 1" in refused(cut(model, masks), serve="vllm")


def test_a_refusal_comes_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradprune.pipeline.gather_evidence", lambda run: pytest.fail("calibrated"))
    with pytest.raises(ExportError, match="serve: "):
        run(tiny_model(), serve="gguf", output_dir=str(tmp_path), output_name="x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"serve": "vllm", "epsilon": 0.1}, "epsilon"),
        ({"serve": "uniform", "freeze_first_n_layers": 1}, "serve"),
        ({"tensor_parallel": 2}, "tensor_parallel"),
        ({"serve": "gguf", "tensor_parallel": 2}, "tensor_parallel"),
        ({"serve": "ollama"}, "serve"),
    ],
)
def test_contradictory_or_unknown_options_are_refused(options: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}: "):
        PruneConfig(**options)
