"""The blocks of a model, and the masks of what each block keeps."""

import pytest
import torch

from gradprune.models import KINDS, BlockKey, describe
from gradprune.models.masks import GroupMasks
from gradprune.models.widths import plain_widths
from gradprune.surgery.cut import cut
from helpers.cut_models import full_masks
from helpers.tiny_models import ARCHITECTURE_NAMES, tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_blocks_come_in_the_order_of_the_residual_stream(architecture: str) -> None:
    view = describe(tiny_model(architecture))
    assert [block.key for block in view.blocks] == [
        (layer, kind.name) for layer in range(3) for kind in KINDS if not kind.optional
    ]
    assert view.of_layer(1) == view.blocks[2:4]
    assert view.of_kind("mlp") == list(view.blocks[1::2])
    for block in view.blocks:
        assert block.module is getattr(view.layers[block.layer], block.path)


def test_removed_blocks_are_absent_from_the_description() -> None:
    model = tiny_model()
    masks = full_masks(model)
    masks[BlockKey(2, "attention")][:] = False
    view = describe(cut(model, masks))
    assert [block.key for block in view.of_layer(2)] == [(2, "mlp")]
    assert view.of_kind("attention")[2] is None
    left = full_masks(view.model)
    assert BlockKey(2, "attention") not in left
    assert [len(mask) for mask in left.attention] == [3, 3, 0]
    assert left.attention[2].dtype == torch.bool


@pytest.mark.parametrize("tied", [False, True])
def test_tied_parameters_count_once(tied: bool) -> None:
    model = tiny_model(tied=tied)
    unique = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
    assert describe(model).parameters == sum(unique.values())


def test_masks_are_read_by_block_and_by_layer() -> None:
    heads, channels = [torch.tensor([True, False])], [torch.tensor([False] * 4 + [True])]
    masks = GroupMasks.of_layers(attention=heads, mlp=channels)
    assert masks[BlockKey(0, "mlp")] is masks.mlp[0] is channels[0]
    assert list(masks) == [(0, "attention"), (0, "mlp")]
    with pytest.raises(ValueError, match=r"one mask per decoder layer, .* {'attention': 1, 'mlp': 2}"):
        GroupMasks.of_layers(attention=heads, mlp=channels * 2)


def test_plain_checkpoints_of_llama_need_heads_that_divide_the_hidden_size() -> None:
    model = tiny_model("llama", kv_heads=6, ratio=2, hidden=48)
    assert plain_widths(describe(model)) == {"attention": frozenset({1, 2, 3, 4, 6})}
    assert plain_widths(describe(tiny_model("mistral"))) == {}
