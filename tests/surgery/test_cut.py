import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaForSequenceClassification, StaticCache

from gradprune.errors import UnsupportedArchitectureError
from gradprune.models import describe
from gradprune.models.masks import GroupMasks
from gradprune.models.modeling_gradprune import DroppedAttention, PerLayerWidths
from gradprune.surgery.cut import cut
from helpers.architectures import tiny
from helpers.cut_models import TOLERANCE, assert_same, extreme_masks, full_masks, greedy, masked, random_masks
from helpers.tiny_models import ARCHITECTURE_NAMES, GQA_RATIOS, tiny_ids, tiny_model


@pytest.mark.parametrize("ratio", GQA_RATIOS)
@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_cutting_equals_masking(architecture: str, ratio: int) -> None:
    model = tiny_model(architecture, ratio=ratio)
    for seed, keep in enumerate((0.3, 0.5, 0.8)):
        masks = random_masks(model, keep, seed)
        assert_same(cut(model, masks), masked(model, masks))


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), keep=st.floats(0.0, 1.0), architecture=st.sampled_from(ARCHITECTURE_NAMES))
def test_cutting_by_any_masks_equals_masking(seed: int, keep: float, architecture: str) -> None:
    model = tiny_model(architecture, layers=2, channels=5)
    masks = random_masks(model, keep, seed)
    assert_same(cut(model, masks), masked(model, masks))


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_extreme_selections_equal_masking_and_generate_with_a_cache(architecture: str) -> None:
    model = tiny_model(architecture)
    ids = tiny_ids(samples=2)
    for name, masks in extreme_masks(model):
        found, expected = cut(model, masks), masked(model, masks)
        assert_same(found, expected)
        tokens = greedy(found, ids)
        assert torch.equal(tokens, greedy(found, ids, cached=False)), name
        assert torch.equal(tokens, greedy(expected, ids)), name


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
@pytest.mark.parametrize(("architecture", "options"), [("llama", {}), ("mistral", {"sliding_window": 4})])
def test_a_cache_filled_in_pieces_knows_its_length(architecture: str, options, cache_class) -> None:
    # Outside `generate` the model asks the cache for the position of the next token, and the cache asks its layers.
    model = tiny_model(architecture, **options)
    ids = tiny_ids()
    size = {"max_cache_len": 16} if cache_class is StaticCache else {}
    for name, masks in extreme_masks(model):
        found = cut(model, masks)
        cache = cache_class(config=found.config, **size)
        with torch.no_grad():
            pieces = [found(ids[:, i : i + 3], past_key_values=cache).logits for i in range(0, ids.shape[1], 3)]
            whole = found(ids, use_cache=False).logits
        assert cache.get_seq_length() == ids.shape[1], name
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **TOLERANCE)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
        ("phi3", {"sliding_window": 4}),
    ],
)
def test_sliding_windows_are_preserved(architecture: str, options) -> None:
    model = tiny_model(architecture, layers=4, **options)
    ids = tiny_ids(samples=2, tokens=11)
    for _, masks in [("random", random_masks(model, 0.5)), *extreme_masks(model)]:
        found, expected = cut(model, masks), masked(model, masks)
        assert_same(found, expected, ids)
        assert torch.equal(greedy(found, ids), greedy(expected, ids, cached=False))


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_stay_tied_or_untied(tied: bool) -> None:
    model = tiny_model(tied=tied)
    masks = random_masks(model, 0.5)
    found = cut(model, masks)
    assert_same(found, masked(model, masks))
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied


def test_left_padded_batches_generate_the_same_tokens() -> None:
    model = tiny_model()
    masks = random_masks(model, 0.5)
    masks.attention[0][:] = False
    ids = tiny_ids(samples=2)
    attention_mask = torch.ones_like(ids)
    attention_mask[0, :4] = 0
    options = {"attention_mask": attention_mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(cut(model, masks).generate(ids, **options), masked(model, masks).generate(ids, **options))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_the_attention_implementation_can_be_changed(architecture: str, implementation: str) -> None:
    model = tiny_model(architecture)
    masks = random_masks(model, 0.6)
    found = cut(model, masks)
    found.set_attn_implementation(implementation)
    for layer in found.model.layers:
        if not isinstance(layer.self_attn, DroppedAttention):
            assert layer.self_attn.config._attn_implementation == implementation
    expected = masked(model, masks)
    expected.set_attn_implementation(implementation)
    assert_same(found, expected)


def test_the_original_is_unchanged_and_untouched_memory_is_shared() -> None:
    model = tiny_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    config = model.config.to_dict()
    found = cut(model, random_masks(model, 0.5))
    assert model.config.to_dict() == config
    assert not isinstance(model, PerLayerWidths)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert found.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert found.model.layers[0].mlp is not model.model.layers[0].mlp


def test_converting_and_training_the_cut_model_leave_the_original_alone() -> None:
    model = tiny_model()
    found = cut(model, random_masks(model, 0.5))
    found(tiny_ids()).logits.sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    found.half()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_a_class_that_cutting_would_replace_is_refused() -> None:
    model = tiny_model()
    classifier = LlamaForSequenceClassification(model.config)
    with pytest.raises(UnsupportedArchitectureError, match="LlamaForSequenceClassification cannot be cut"):
        cut(classifier, random_masks(model, 0.5))


def test_in_place_cuts_the_model_itself() -> None:
    model = tiny_model()
    masks = random_masks(model, 0.5)
    expected = masked(model, masks)
    assert cut(model, masks, inplace=True) is model
    assert_same(model, expected)


def test_the_parameters_removed_are_the_groups_costs() -> None:
    for architecture in ARCHITECTURE_NAMES:
        model = tiny_model(architecture)
        masks = random_masks(model, 0.7)
        view = describe(model)
        cost = sum(block.cost * int((~masks[block]).sum()) for block in view.blocks)
        assert all(kept.any() for kept in (*masks.attention, *masks.mlp))
        removed = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in cut(model, masks).parameters())
        assert removed == cost


def test_dropping_a_block_removes_its_norm_too() -> None:
    model = tiny_model()
    view = describe(model)
    for kind in ("attention", "mlp"):
        masks = full_masks(model)
        getattr(masks, kind)[1][:] = False
        block = view.of_kind(kind)[1]
        removed = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in cut(model, masks).parameters())
        assert removed == block.cost * block.groups + model.config.hidden_size


def test_equal_widths_give_the_original_class() -> None:
    model = tiny_model("mistral")
    masks = full_masks(model)
    for attention, mlp in zip(masks.attention, masks.mlp, strict=True):
        attention[1] = False
        mlp[3:] = False
    found = cut(model, masks)
    assert type(found) is type(model)
    assert (found.config.num_key_value_heads, found.config.num_attention_heads) == (2, 4)
    assert found.config.intermediate_size == 3
    assert_same(found, masked(model, masks))


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_a_cut_model_can_be_cut_again(architecture: str) -> None:
    model = tiny_model(architecture, channels=12)
    first = random_masks(model, 0.7)
    first.attention[1][:] = False
    once = cut(model, first)
    second = random_masks(once, 0.6, seed=5)
    twice = cut(once, second)
    both = copy.deepcopy(first)
    for kept, again in zip((*both.attention, *both.mlp), (*second.attention, *second.mlp), strict=True):
        kept[kept.clone()] = again
    assert_same(twice, masked(model, both))


def test_a_model_that_was_saved_can_be_cut_again(tmp_path: Path) -> None:
    """Saving leaves the dtype's name in the configuration, where some layers read it to create their parameters."""
    model, ids = tiny("apertus"), tiny_ids()
    once = cut(model, random_masks(model, 0.7, seed=3))
    once.save_pretrained(tmp_path)
    masks = random_masks(once, 0.7, seed=4)
    assert_same(cut(once, masks), masked(once, masks), ids)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_finite_logits(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=torch.float32)
    masks = random_masks(model, 0.6)
    found = cut(model, masks).to(dtype)
    with torch.no_grad():
        logits = found(tiny_ids()).logits
    assert logits.dtype == dtype
    assert logits.isfinite().all()


def test_masks_of_the_wrong_length_are_refused() -> None:
    model = tiny_model()
    masks = full_masks(model)
    short = GroupMasks.of_layers(attention=masks.attention, mlp=(masks.mlp[0][:-1], *masks.mlp[1:]))
    with pytest.raises(ValueError, match=r"masks: layer 0 mlp has 9 entries, but .* has 10 groups"):
        cut(model, short)


def test_masks_of_another_models_blocks_are_refused() -> None:
    model = tiny_model()
    masks = full_masks(model)
    fewer = GroupMasks({key: masks[key] for key in masks if key != (1, "attention")}, 3)
    with pytest.raises(ValueError, match=r"masks: layer 1 attention has 0 entries, but .* has 3 groups"):
        cut(model, fewer)
    more = GroupMasks.of_layers(attention=(*masks.attention, masks.attention[0]), mlp=(*masks.mlp, masks.mlp[0]))
    with pytest.raises(ValueError, match=r"masks: layer 3 attention has 3 entries, but .* has 0 groups"):
        cut(model, more)
