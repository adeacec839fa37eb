"""The memory that a run is predicted to need, from the model's sizes.

`benchmarks/jobs/memory.py` compares predictions with the memory that runs really need.
"""

from dataclasses import replace

import pytest
import torch
from accelerate import init_empty_weights
from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from gradprune import PruneConfig
from gradprune.models.footprint import Footprint, Stage, footprint, samples_followed
from gradprune.models.sizes import ExpertShape, ModelShape, model_shape
from gradprune.surgery.cut import cut
from helpers.architectures import OPTIONS, tiny
from helpers.cut_models import random_masks
from helpers.mixtures import MIXTURES, WITH_SHARED, tiny_mixture
from helpers.tiny_models import ARCHITECTURE_NAMES, tiny_model

CONFIG = PruneConfig(
    importance_method="group_fisher", num_samples=32, seq_len=512, batch_size=4, measure_speed=False, in_place=True
)

OBS = replace(CONFIG, importance_method="obs", batch_size=1)


def shape_of(layers: int = 8, **widths: int) -> ModelShape:
    given = {"hidden_size": 512, "intermediate_size": 1536, "vocab_size": 4096, "num_attention_heads": 8, **widths}
    with init_empty_weights():
        return model_shape(LlamaForCausalLM(LlamaConfig(**given, num_hidden_layers=layers)))


def held(shape: ModelShape, config: PruneConfig = CONFIG, *, streamed: bool, **how) -> Footprint:
    return footprint(shape, config, streamed=streamed, accelerated=True, **how)


def stage(found: Footprint, name: str) -> Stage:
    return next(each for each in found.stages if each.name == name)


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_sizes_match_the_modules(architecture: str) -> None:
    model = tiny_model(architecture, dtype=torch.bfloat16)
    shape = model_shape(model)
    assert shape.bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert len(shape.layer_parameters) == 3
    assert (shape.heads, shape.intermediate, shape.vocabulary) == (3 * 2 * 4, 10, 61)
    assert shape.outputs == ((shape.hidden, 24), (shape.hidden, 10)) * 3
    assert shape.output_bytes == 3 * shape.hidden * 34 * 2
    assert shape.groups == 3 * (3 + 10)


def test_a_streamed_models_memory_hardly_depends_on_layers_and_samples() -> None:
    few, many = (held(shape_of(layers), streamed=True) for layers in (4, 64))
    # Only the sums for each layer's groups grow: 8 KV groups and 1536 channels, of 64 bytes each.
    assert stage(few, "evaluation").device == stage(many, "evaluation").device
    assert stage(many, "calibration").device - stage(few, "calibration").device == 60 * (8 + 1536) * 64
    more = held(shape_of(4), replace(CONFIG, num_samples=512), streamed=True)
    assert stage(more, "calibration").device == stage(few, "calibration").device
    assert many.moved > 10 * few.moved


def test_a_smaller_stream_memory_holds_less_and_reads_more() -> None:
    shape = shape_of()
    much, little = (held(shape, replace(CONFIG, stream_memory=size), streamed=True) for size in ("1GiB", "40MiB"))
    assert much.waves == 1
    assert little.waves == 8  # a batch's streams at nine layer boundaries are 36 MiB, so one batch at a time
    assert stage(little, "calibration").host == 9 * 4 * 512 * 512 * 4 < stage(much, "calibration").host
    layers = sum(shape.layer_parameters) * 4
    # What the repair keeps for all samples, including the widest output projection's input, is in files.
    samples = CONFIG.num_samples + CONFIG.held_out_samples
    assert stage(little, "repair").host == 0
    assert stage(much, "repair").host == samples * 512 * (4 * 512 + 1536) * 4
    assert stage(much, "calibration").moved == 2 * layers
    assert stage(little, "calibration").moved == 2 * 8 * layers


def test_a_whole_model_is_read_once_and_recomputing_holds_less() -> None:
    shape = shape_of()
    whole = held(shape, streamed=False)
    recomputing = held(shape, replace(CONFIG, use_gradient_checkpointing=True), streamed=False)
    streamed = held(shape, streamed=True)
    assert whole.moved == recomputing.moved == shape.bytes
    calibration = [stage(each, "calibration").device for each in (whole, recomputing, streamed)]
    assert calibration == sorted(calibration, reverse=True)
    assert calibration[0] > 2 * calibration[1]
    assert all(stage.device >= shape.bytes for stage in whole.stages)


def test_ranks_share_the_samples_of_obs_and_of_the_repair() -> None:
    shape = shape_of()
    one, two = (held(shape, OBS, streamed=True, world=world) for world in (1, 2))
    assert stage(one, "repair").host == 2 * stage(two, "repair").host > 0
    # Both ranks follow the dense model's stream for two samples, beside the streams of their own blocks.
    followed = 2 * 512 * 512 * 4
    assert stage(one, "importance").host - followed == 2 * (stage(two, "importance").host - followed) > 0
    assert stage(one, "repair").device == stage(two, "repair").device
    # With two ranks, adding up whole Gram matrices needs more memory here than the predictions for two samples.
    gram, predictions = 4 * 1536**2, 2 * 512 * (2 * 512 * 4 + 12 * 4096)
    assert stage(two, "importance").device - stage(one, "importance").device == (2 + 2 * 2) * gram - predictions


def test_obs_holds_the_stream_of_all_samples_and_a_matrix_of_the_widest_block() -> None:
    shape, width = shape_of(), 1536
    sums = shape.groups * 64
    streams = 32 * 512 * 512 * 4
    # Two samples are followed, with each of 16 blocks changed and with none; their predictions exceed the matrices.
    assert samples_followed(32, 16) == 2
    streams += 17 * 2 * 512 * 512 * 4
    matrices, predictions = 8 * width * (2 * width + 512), 2 * 512 * (2 * 512 * 4 + 12 * 4096)
    assert predictions > matrices
    whole, streamed = (stage(held(shape, OBS, streamed=way), "importance") for way in (False, True))
    assert whole.device == shape.bytes + sums + predictions + streams
    assert streamed.device == whole.device - shape.bytes - streams + stage(held(shape, streamed=True), "saving").device
    assert streamed.host == streams
    # Streams beyond the budget are in files.
    assert stage(held(shape, replace(OBS, stream_memory="1MiB"), streamed=True), "importance").host == 0
    # The weights are read once for the sums over weights, and once by the pass.
    assert streamed.moved == 2 * sum(shape.layer_parameters) * 4
    without = stage(held(shape, streamed=True), "importance")
    assert (without.host, without.moved) == (0, streamed.moved // 2)
    assert without.device == streamed.device - predictions + 16 * 512 * width


def test_a_later_shot_calibrates_a_repaired_copy() -> None:
    """The copy of a streamed model is on disk, so each further shot only reads as much again."""
    shape, shots = shape_of(), (OBS, replace(OBS, shots=2))
    once, again = (held(shape, config, streamed=False) for config in shots)
    for name in ("calibration", "importance"):
        assert stage(again, name).device == stage(once, name).device + shape.output_bytes
    once, again = (held(shape, config, streamed=True) for config in shots)
    assert again.device == once.device
    of_shots = sum(stage(once, name).moved for name in ("calibration", "importance", "repair"))
    assert again.moved == once.moved + of_shots > once.moved


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({"importance_method": "obs"}, True),
        ({"importance_method": "auto"}, True),
        ({"importance_method": "wanda", "evidence": "all"}, True),
        ({"importance_method": "wanda"}, False),
        ({"importance_method": "auto", "prune_kinds": "experts"}, False),
    ],
)
def test_a_second_pass_is_predicted_if_obs_is_collected(options: dict[str, str], passes: bool) -> None:
    found = held(shape_of(), replace(CONFIG, **options), streamed=True)
    assert (stage(found, "importance").host > 0) == passes


def test_obs_needs_the_gradients_of_32_samples_only() -> None:
    shape, little = shape_of(), replace(OBS, num_samples=128, stream_memory="40MiB")
    assert held(shape, little, streamed=True).waves == 8  # of four samples each
    assert held(shape, replace(little, evidence="all"), streamed=True).waves == 32


def test_experts_count_by_what_one_of_them_reads_and_writes() -> None:
    """The repair holds an expert's own moments, what it reads and lacks at its tokens, and two more streams."""
    sizes = {"hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 128, "num_local_experts": 8, "num_experts_per_tok": 2}
    with init_empty_weights():
        mixture = MixtralForCausalLM(MixtralConfig(**sizes))
    shape = model_shape(mixture)
    assert shape.expert == ExpertShape((64, 512), number=8, seen=2)
    assert (shape.read_width, shape.outputs) == (2 * 512, ((64, 64), (64, 64)))
    more, short = replace(shape, expert=replace(shape.expert, number=16)), replace(OBS, seq_len=128)
    repair = {number: stage(held(of, short, streamed=True), "repair") for number, of in ((8, shape), (16, more))}
    tokens = (32 + 32) * 128
    assert repair[8].host == tokens * (6 * 64 + 1024) * 4
    assert repair[8].device - repair[16].device == tokens * 2 * (64 + 512) * 4 // 16
    obs = stage(held(shape, short, streamed=False), "importance").device
    # Beside what the experts read: the streams of eight samples, for each of four blocks and unchanged.
    assert samples_followed(32, 4) == 8
    streams = 32 * 128 * (64 + 1024) * 4 + 5 * 8 * 128 * 64 * 4
    assert obs == shape.bytes + shape.groups * 64 + 8 * 128 * (3 * 64 + 3 * 1024) * 4 + streams


def test_a_cpu_holds_everything_in_one_memory() -> None:
    shape = shape_of()
    there, here = (footprint(shape, CONFIG, streamed=True, accelerated=cuda) for cuda in (True, False))
    assert here.device == 0
    assert here.peak == here.host == max(stage.host for stage in here.stages)
    # Only an accelerator holds two layers, and a larger chunk of logits.
    assert here.host < there.device + there.host


def test_options_change_the_prediction() -> None:
    shape = shape_of()
    stages = {stage.name for stage in held(shape, replace(CONFIG, repair="none"), streamed=False).stages}
    assert stages == {"calibration", "importance", "evaluation", "saving"}
    timed = stage(held(shape, replace(CONFIG, measure_speed=True, in_place=False), streamed=False), "evaluation")
    assert timed.device - stage(held(shape, streamed=False), "evaluation").device == int(0.8 * shape.bytes)
    batch = stage(held(shape, replace(CONFIG, reduction="batch"), streamed=False), "calibration")
    assert batch.device - stage(held(shape, streamed=False), "calibration").device == 2 * 4 * sum(
        shape.layer_parameters
    )


def made(architecture: str) -> PreTrainedModel:
    if architecture in ARCHITECTURE_NAMES:
        return tiny_model(architecture)
    if architecture in OPTIONS:
        return tiny(architecture)
    if architecture != "lfm2":
        return tiny_mixture(architecture)
    kinds = ["conv", "full_attention"]
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Lfm2ForCausalLM(Lfm2Config(vocab_size=61, num_hidden_layers=2, layer_types=kinds, **sizes))


@pytest.mark.parametrize("architecture", [*ARCHITECTURE_NAMES, *OPTIONS, *MIXTURES, *WITH_SHARED, "lfm2"])
def test_predicted_keys_and_values_are_those_cached_during_generation(architecture: str) -> None:
    model = made(architecture).eval()
    # The sequence fits the sliding windows of these models.
    begun, tokens = torch.full((2, 1), 5), 3
    cache = model.generate(
        begun, attention_mask=torch.ones_like(begun), max_new_tokens=tokens, do_sample=False, eos_token_id=None,
        pad_token_id=0, return_dict_in_generate=True,
    ).past_key_values  # fmt: skip
    kept = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    assert model_shape(model).cached * 2 * tokens == sum(tensor.numel() for tensor in kept if tensor is not None)


def test_keys_and_values_of_pruned_layers_count_by_their_own_widths() -> None:
    model, masks = tiny_model(), random_masks(tiny_model(), 2.0)
    masks.attention[0][:2] = False
    masks.attention[1][:] = False
    head = 2 * 4
    assert model_shape(model).cached == 3 * 3 * head
    # Of the model's nine KV heads, two are removed and three more with their block.
    assert model_shape(cut(model, masks)).cached == 4 * head


def test_own_text_holds_the_keys_and_values_of_a_batch() -> None:
    shape = shape_of(num_key_value_heads=2)
    found = stage(held(shape, replace(CONFIG, own_text=0.5), streamed=False), "own_text").device
    # Two KV heads of 64 in each of eight layers; one layer's repeated for all eight heads; one token's predictions.
    kept, repeated, predictions = 8 * 2 * 2 * 64, 2 * 512, (4 + 16) * 4096
    assert found == shape.bytes + 4 * (512 * (kept + repeated) * 4 + predictions)
    # Two samples do not fill a batch of four.
    few = replace(CONFIG, own_text=0.05, repair="none")
    assert stage(held(shape, few, streamed=False), "own_text").device == (found + shape.bytes) // 2
    stages = {each.name for each in held(shape, replace(CONFIG, own_text=0.5), streamed=True).stages}
    assert "own_text" not in stages | {each.name for each in held(shape, streamed=False).stages}
