"""MLX computes the same from pruned checkpoints as transformers."""

import ast
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gradprune.checkpoint import save
from gradprune.checkpoint.save import MLX_FILE, save_checkpoint
from gradprune.surgery.cut import cut
from helpers.cut_models import full_masks, random_masks
from helpers.tiny_models import ARCHITECTURE_NAMES, tiny_ids, tiny_model


def uneven(architecture: str, **options):
    """A model whose first layer has no attention, and whose second has no MLP."""
    # mlx-lm supports Qwen2 and Phi-3 only if the sizes of the heads add up to the hidden size.
    model = tiny_model(
        architecture, **{"hidden": 24 if architecture != "llama" else 4, "dtype": torch.float32, **options}
    )
    masks = random_masks(model, 0.6)
    for mask in (*masks.attention, *masks.mlp):
        mask[0] = True
    masks.attention[0][:] = masks.mlp[1][:] = False
    return cut(model, masks)


def load_in_mlx(folder: Path):
    """Load the model as mlx-lm's `load` does, but without a tokenizer."""
    pytest.importorskip("mlx.core", reason="MLX is not installed (pip install 'mlx[cpu]')")
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed (pip install mlx-lm)")
    return utils.load_model(folder, trust_remote_code=True)[0]


def assert_same_logits(model, folder: Path) -> None:
    loaded = load_in_mlx(folder)
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    ids = tiny_ids()
    with torch.no_grad():
        expected = model(ids).logits
    found = torch.tensor(loaded(mx.array(ids.numpy())).tolist())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # With a cache: the prompt, six tokens, in two parts, and the rest token by token.
    cache = make_prompt_cache(loaded)
    parts = [loaded(mx.array(part.numpy()), cache=cache) for part in (ids[:, :3], ids[:, 3:6], *ids[:, 6:].split(1, 1))]
    found = torch.cat([torch.tensor(part.tolist()) for part in parts], 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_layers_of_different_widths(architecture: str, tmp_path: Path) -> None:
    model = uneven(architecture, tied=architecture == "qwen3")
    save_checkpoint(model, None, tmp_path / "x")
    assert_same_logits(model, tmp_path / "x")


@pytest.mark.parametrize("rope_type", ["linear", "llama3"])
def test_biases_and_rotary_embeddings(rope_type: str, tmp_path: Path) -> None:
    rope = {"rope_theta": 100.0, "rope_type": rope_type, "factor": 4.0}
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    model = uneven("llama", attention_bias=True, mlp_bias=True, rope_parameters=rope)
    save_checkpoint(model, None, tmp_path / "x")
    assert_same_logits(model, tmp_path / "x")


def test_a_model_that_lacks_only_one_block(tmp_path: Path) -> None:
    model = tiny_model("qwen2", hidden=24, dtype=torch.float32)
    masks = full_masks(model)
    masks.attention[0][:] = False
    model = cut(model, masks)
    save_checkpoint(model, None, tmp_path / "x")
    assert json.loads((tmp_path / "x" / "config.json").read_text())["intermediate_size"] == 0
    assert_same_logits(model, tmp_path / "x")


def test_heads_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    save_checkpoint(uneven("qwen2", hidden=12), None, tmp_path / "x")
    with pytest.raises(ValueError, match="hidden_size"):
        load_in_mlx(tmp_path / "x")


def test_the_mlx_file_is_saved_only_for_pruned_models(tmp_path: Path) -> None:
    save_checkpoint(uneven("llama"), None, tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert config["model_file"] == MLX_FILE
    assert (tmp_path / "x" / MLX_FILE).is_file()
    assert load_file(tmp_path / "x" / "model.safetensors")
    model = tiny_model()
    model.config.model_file = MLX_FILE  # as loaded from a checkpoint that had it
    save_checkpoint(model, None, tmp_path / "plain")
    assert "model_file" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not (tmp_path / "plain" / MLX_FILE).exists()


def test_the_promised_architectures_are_those_of_the_mlx_file() -> None:
    tree = ast.parse(save.MLX_SOURCE.read_text(encoding="utf-8"))
    (modules,) = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "MODULES"]
    assert tuple(ast.literal_eval(modules)) == save.MLX_TYPES
