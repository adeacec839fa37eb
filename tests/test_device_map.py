"""Models with layers on several devices: the run follows them, and gives the same bits as on one device."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gradprune import ImportanceEngine, PruneConfig, prune
from gradprune.checkpoint.load import load_model
from gradprune.errors import ConfigError
from gradprune.models import describe
from gradprune.models.streams import Streams
from helpers.commands import QUICK
from helpers.commands import run as command
from helpers.fake_devices import FIRST, SECOND, divided, numbers_of, second_device
from helpers.launched import run_ranks
from helpers.tiny_models import tiny_ids, tiny_model

TOKENS = tiny_ids(samples=1, tokens=1500).flatten()


def run(model, **options):
    config = PruneConfig(
        pruning_ratio=0.3, num_samples=8, held_out_samples=4, seq_len=12, batch_size=4, backend="reference",
        measure_speed=False, **options,
    )  # fmt: skip
    return prune(model, None, config, calibration=TOKENS[:1000], evaluation=TOKENS[1000:])


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"importance_method": "obs", "temperature": 1.0, "use_gradient_checkpointing": True}),
        ("phi3", {"importance_method": "taylor_2nd", "temperature": 1.0, "prior": "similarity", "epsilon": 0.5}),
        ("llama", {"importance_method": "auto", "in_place": True, "search_samples": 4}),
    ],
)
def test_a_run_on_two_devices_gives_the_same_bits_as_on_one(architecture: str, options: dict[str, object]) -> None:
    # Eager attention, because fused attention rounds differently on different devices.
    models = [tiny_model(architecture, attn_implementation="eager") for _ in range(2)]
    one = run(models[0], **options)
    with second_device():
        model = divided(models[1], 1)
        assert {parameter.device for parameter in model.parameters()} == {FIRST, SECOND}
        two = run(model, **options)
        assert {parameter.device for parameter in two.model.parameters()} == {FIRST, SECOND}
    assert two.after.perplexity == one.after.perplexity
    assert two.before.perplexity == one.before.perplexity
    assert two.evidence.components.keys() == one.evidence.components.keys()
    for name, values in one.evidence.components.items():
        assert torch.equal(two.evidence.components[name], values), name
    assert two.evidence.priors == one.evidence.priors
    for (name, found), expected in zip(two.model.named_parameters(), one.model.parameters(), strict=True):
        assert torch.equal(numbers_of(found), expected), name


def test_what_is_kept_between_layers_is_on_the_cpu() -> None:
    with second_device():
        view = describe(divided(tiny_model(attn_implementation="eager"), 1))
        streams = Streams(view, [tiny_ids()])
        (first,) = streams.take_first()
        stream, written = streams.layer_and_written(2, 0, first)
        waiting = [first, stream, *written.values()]
        block = view.of_layer(2)[-1]
        waiting += [streams.block_output(block, 0, stream, {})]
        assert view.device_of(2) == SECOND
        assert streams.output_input(block, 0, stream, {}).device == SECOND
        assert {tensor.device for tensor in waiting} == {FIRST}


def test_the_stand_in_refuses_tensors_of_both_devices() -> None:
    with second_device():
        there = torch.ones(2).to(SECOND)
        with pytest.raises(RuntimeError, match="tensors on"):
            there + torch.ones(2)
        assert torch.equal((there + there).cpu(), torch.full((2,), 2.0))


@pytest.mark.parametrize(("device_map", "device"), [("auto", "auto"), ('{"": "cpu"}', "cpu")])
def test_the_command_loads_with_a_map(device_map: str, device: str, tmp_path: Path) -> None:
    """A map on one device gives the bytes of that device."""
    tiny_model().save_pretrained(tmp_path / "model")
    np.save(tmp_path / "text.npy", TOKENS.numpy())
    options = ("--base_model", "model", "--dataset", "text.npy", *QUICK, "--output_name")
    for name, more in (("mapped", ("--device_map", device_map)), ("plain", ("--device", device))):
        code, said = command(tmp_path, "prune", *options, name, *more)
        assert code == 0, said
    files = [tmp_path / "results" / name / "model/model.safetensors" for name in ("mapped", "plain")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device_map", "everywhere"), "error: device_map: 'everywhere' is not one of auto"),
        (("--device_map", '{"": "disk"}'), 'error: device_map: \'{"": "disk"}\' is not one of auto'),
        (("--device_map", '{"": "cuda:7"}'), "error: device_map: 'cuda:7' does not work here"),
        (("--device_map", "auto", "--device", "cpu"), "error: device: 'cpu' is one device, but device_map"),
        (("--device_map", "auto", "--stream_layers", "on"), "error: device_map: keeps all layers on the devices"),
    ],
)
def test_impossible_maps_and_combinations_are_refused(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    code, said = command(tmp_path, "--quiet", "prune", "--base_model", "model", *options)
    assert code == 2
    assert said.startswith(message), said


def test_a_map_with_several_processes_is_refused(tmp_path: Path) -> None:
    ended = run_ranks(tmp_path, 2, "eval", "--device_map", "auto")
    assert ended[0] == (2, "error: device_map: a single process uses all the devices; start it without torchrun\n")


def test_a_layer_on_two_devices_is_refused() -> None:
    model = tiny_model()
    with second_device():
        model.model.layers[1].mlp = model.model.layers[1].mlp.to(SECOND)
        with pytest.raises(ConfigError, match="device_map: divides decoder layer 1 between cpu and meta"):
            ImportanceEngine(model)


def test_a_map_that_leaves_weights_on_no_device_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"on no device, first model\.embed_tokens"):
        load_model(tmp_path, device_map='{"": "meta"}')
