"""Vision-language models: the decoder is pruned on text, and images still pass through the whole model."""

import logging
from pathlib import Path

import pytest
import torch
from transformers import LlavaConfig, PaliGemmaConfig, StableLmConfig

from gradprune import load_pruned
from gradprune.checkpoint.save import save_checkpoint
from gradprune.models import accepted_kinds, describe
from gradprune.models.self_test import self_test
from gradprune.surgery.cut import cut
from helpers.architectures import random_masks_of, silenced, tiny
from helpers.cut_models import TOLERANCE
from helpers.tiny_models import tiny_ids

IMAGE = torch.randn(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
IDS = tiny_ids(1)
PICTURE = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0]])


def inputs_of(architecture: str) -> dict[str, torch.Tensor]:
    """The inputs for a text that contains an image of four tokens."""
    if not architecture.startswith("qwen"):
        return {"input_ids": IDS.where(PICTURE == 0, 60), "pixel_values": IMAGE, "token_type_ids": PICTURE}
    patches = IMAGE.unfold(2, 4, 4).unfold(3, 4, 4).permute(2, 3, 0, 1, 4, 5).reshape(4, -1)
    grid = torch.tensor([[1, 2, 2]])
    ids = IDS.where(PICTURE == 0, 60)
    return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": PICTURE}


@pytest.mark.parametrize("architecture", ["gemma3", "qwen2_5_vl", "qwen3_vl"])
def test_images_pass_through_the_pruned_model_as_through_the_masked_one(architecture: str, tmp_path: Path) -> None:
    model, inputs = tiny(architecture), inputs_of(architecture)
    if architecture.startswith("qwen"):
        model.config.image_token_id = 60
    masks = random_masks_of(model, 0.5)
    masks[describe(model).blocks[0].key][:] = False
    with torch.no_grad():
        dense = model(**inputs).logits
        assert not torch.allclose(dense, model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits)
        with silenced(model, masks):
            expected = model(**inputs).logits
        assert not torch.allclose(dense, expected)
        save_checkpoint(cut(model, masks), None, tmp_path / "x")
        loaded = load_pruned(tmp_path / "x")
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if architecture == "gemma3" else TOLERANCE
        torch.testing.assert_close(loaded(**inputs).logits, expected, **tolerance)
    decoder = {id(parameter) for parameter in loaded.get_decoder().layers.parameters()}
    rest = {name: parameter for name, parameter in loaded.named_parameters() if id(parameter) not in decoder}
    assert any("vis" in name for name in rest)
    for name, parameter in rest.items():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_the_image_preprocessors_configuration_is_saved_too(tmp_path: Path) -> None:
    model = tiny("llava")
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "preprocessor_config.json").write_text('{"size": 8}')
    model.name_or_path = str(tmp_path / "dense")
    save_checkpoint(model, None, tmp_path / "x")
    assert (tmp_path / "x" / "preprocessor_config.json").read_text() == '{"size": 8}'
    assert not (tmp_path / "x" / "processor_config.json").exists()


def test_an_untested_decoder_has_to_pass_the_self_test(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="gradprune"):
        assert accepted_kinds(LlavaConfig()) == ("attention", "mlp")
        assert not caplog.messages
        assert accepted_kinds(LlavaConfig(text_config=StableLmConfig(qk_layernorm=True))) == ("mlp",)
    assert "architecture 'llava' is not on the tested list" in caplog.text


def test_a_decoder_that_attends_to_later_tokens_is_refused() -> None:
    assert self_test(PaliGemmaConfig()).refused == {"model": "its logits depend on tokens that follow"}
