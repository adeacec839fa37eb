"""What a run is said to hold, from the model's sizes; `benchmarks/jobs/memory.py` compares it with what runs take."""

from dataclasses import replace

import pytest
import torch
from accelerate import init_empty_weights
from transformers import LlamaConfig, LlamaForCausalLM

from gradprune import PruneConfig
from gradprune.models import describe
from gradprune.models.footprint import Footprint, footprint
from gradprune.models.sizes import ModelShape, model_shape
from helpers.tiny_models import ARCHITECTURE_NAMES, tiny_model

CONFIG = PruneConfig(num_samples=32, seq_len=512, batch_size=4, measure_speed=False, in_place=True)


def shape_of(layers: int = 8, **widths: int) -> ModelShape:
    given = {"hidden_size": 512, "intermediate_size": 1536, "vocab_size": 4096, "num_attention_heads": 8, **widths}
    with init_empty_weights():
        return model_shape(LlamaForCausalLM(LlamaConfig(**given, num_hidden_layers=layers)))


def held(shape: ModelShape, config: PruneConfig = CONFIG, *, streamed: bool, **how) -> Footprint:
    return footprint(shape, config, streamed=streamed, accelerated=True, **how)


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_sizes_are_those_of_the_modules(architecture: str) -> None:
    model = tiny_model(architecture, dtype=torch.bfloat16)
    shape, view = model_shape(model), describe(model)
    assert shape.bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert len(shape.layer_parameters) == 3
    assert (shape.heads, shape.intermediate, shape.vocabulary) == (3 * 2 * 4, 10, 61)
    assert shape.outputs == ((shape.hidden, 24), (shape.hidden, 10)) * 3
    assert shape.output_bytes == 3 * shape.hidden * 34 * 2
    assert shape.prunable == sum(block.groups * block.cost for block in view.blocks)
    assert shape.groups == 3 * (3 + 10)


def test_a_streamed_model_holds_as_much_whatever_its_number_of_layers_and_samples() -> None:
    few, many = (held(shape_of(layers), streamed=True) for layers in (4, 64))
    # Only the sums over a layer's groups grow: 4 KV groups or 1536 channels of 64 bytes.
    assert few.stages[2].device == many.stages[2].device
    assert many.stages[0].device - few.stages[0].device == 60 * (8 + 1536) * 64
    more = held(shape_of(4), replace(CONFIG, num_samples=512), streamed=True)
    assert more.stages[0].device == few.stages[0].device
    assert many.moved > 10 * few.moved


def test_a_smaller_stream_memory_holds_less_and_reads_more() -> None:
    shape = shape_of()
    much, little = (held(shape, replace(CONFIG, stream_memory=size), streamed=True) for size in ("1GiB", "40MiB"))
    assert much.waves == 1
    assert little.waves == 8  # a batch's streams before nine layers are 36 MiB: one batch at a time
    assert little.stages[0].host == 9 * 4 * 512 * 512 * 4 < much.stages[0].host
    layers = sum(shape.layer_parameters) * 4
    # What the repair keeps of all samples, the widest output projection's input too, is in files.
    samples = CONFIG.num_samples + CONFIG.held_out_samples
    assert little.stages[1].host == 0
    assert much.stages[1].host == samples * 512 * (9 * 512 + 1536) * 4
    assert much.stages[0].moved == (2 + 1) * layers
    assert little.stages[0].moved == (2 * 8 + 1) * layers


def test_a_whole_model_is_read_once_and_recomputing_holds_less() -> None:
    shape = shape_of()
    whole = held(shape, streamed=False)
    recomputing = held(shape, replace(CONFIG, use_gradient_checkpointing=True), streamed=False)
    streamed = held(shape, streamed=True)
    assert whole.moved == recomputing.moved == shape.bytes
    calibration = [each.stages[0].device for each in (whole, recomputing, streamed)]
    assert calibration == sorted(calibration, reverse=True)
    assert calibration[0] > 2 * calibration[1]
    assert all(stage.device >= shape.bytes for stage in whole.stages)


def test_ranks_share_the_samples_of_the_repair() -> None:
    shape = shape_of()
    one, two = (held(shape, streamed=True, world=world) for world in (1, 2))
    host = {world: found.stages[1].host for world, found in ((1, one), (2, two))}
    assert host[1] == 2 * host[2]


def test_a_cpu_holds_everything_in_one_memory() -> None:
    shape = shape_of()
    there, here = (footprint(shape, CONFIG, streamed=True, accelerated=cuda) for cuda in (True, False))
    assert here.device == 0
    assert here.peak == here.host == max(stage.host for stage in here.stages)
    # Two layers, and a larger chunk of logits, are on the accelerator.
    assert here.host < there.device + there.host


def test_options_count() -> None:
    shape = shape_of()
    stages = {stage.name for stage in held(shape, replace(CONFIG, repair="none"), streamed=False).stages}
    assert stages == {"calibration", "evaluation", "saving"}
    timed = held(shape, replace(CONFIG, measure_speed=True, in_place=False), streamed=False).stages[2]
    assert timed.device - held(shape, streamed=False).stages[2].device == int(0.8 * shape.bytes)
    batch = held(shape, replace(CONFIG, reduction="batch"), streamed=False).stages[0]
    assert batch.device - held(shape, streamed=False).stages[0].device == 2 * 4 * sum(shape.layer_parameters)
    uniform = held(shape, replace(CONFIG, uniform=True), streamed=True).stages[1]
    assert uniform.device < held(shape, streamed=True).stages[1].device
