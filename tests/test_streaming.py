"""Complete runs with `--stream_layers`: they write the same files as without it, byte for byte."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gradprune import PruneConfig, prune
from gradprune.checkpoint.load import load_model, load_shape
from gradprune.checkpoint.save import save_checkpoint
from gradprune.errors import CheckpointError, ConfigError
from gradprune.models import sizes
from gradprune.models.footprint import Job
from gradprune.models.residency import residency_of
from gradprune.pipeline import prune_ratios
from helpers.architectures import OPTIONS, tiny
from helpers.commands import run as command
from helpers.mixtures import MIXTURES, WITH_SHARED, tiny_mixture
from helpers.streaming import both, saved
from helpers.tiny_models import ARCHITECTURE_NAMES, tiny_ids, tiny_model

SHORT = {"num_samples": 4, "batch_size": 2, "held_out_samples": 2, "eval_samples": 2, "seq_len": 8}
TOKENS = tiny_ids(samples=1, tokens=1500).flatten()


def run(model, folder: Path, **options):
    config = PruneConfig(
        **{
            "pruning_ratio": 0.2, "num_samples": 8, "held_out_samples": 4, "seq_len": 12, "batch_size": 4,
            "backend": "reference", "use_gradient_checkpointing": True, "measure_speed": False,
            "output_dir": str(folder), "output_name": "run", **options,
        }
    )  # fmt: skip
    return prune(model, None, config, calibration=TOKENS[:1000], evaluation=TOKENS[1000:])


def files(folder: Path) -> dict[str, bytes]:
    """Contents by relative path, except of files that record times; the folder's name is removed from the contents."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("run.json", "report.html")]
    return {str(path.relative_to(folder)): path.read_bytes().replace(str(folder).encode(), b"") for path in paths}


def assert_same_run(whole, streamed, folder: Path, **options) -> None:
    results = [run(model, folder / name, **options) for name, model in (("whole", whole), ("streamed", streamed))]
    assert results[0].after.perplexity == results[1].after.perplexity
    expected, found = files(folder / "whole"), files(folder / "streamed")
    assert expected.keys() == found.keys()
    assert "run/analysis/groups.csv" in found
    assert "run/model/config.json" in found
    for name, content in expected.items():
        assert found[name] == content, name


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_results_have_the_same_bytes_as_the_whole_model(architecture: str, tmp_path) -> None:
    model = tiny_model(architecture, tied=architecture == "mistral", dtype=torch.float32)
    whole, streamed = both(model, tmp_path / "model", stream_memory="40KB")
    assert_same_run(whole, streamed, tmp_path, temperature=1.0, importance_method="obs")


@pytest.mark.parametrize("architecture", OPTIONS)
def test_architectures_found_by_inspection_are_streamed_bit_for_bit(architecture: str, tmp_path) -> None:
    """Prune the model, then prune the result, whose layers differ in width; each checkpoint has several files."""
    tied = list(OPTIONS).index(architecture) % 2 == 0
    saved(tiny(architecture, tie_word_embeddings=tied).float(), tmp_path / "dense")
    first = {"pruning_ratio": 0.15, "epsilon": 0.3, "importance_method": "group_fisher"}
    for name, options in (("dense", first), ("dense-on", {"pruning_ratio": 0.04})):
        results = {}
        for how in ("off", "on"):
            model, _ = load_model(tmp_path / name, stream_layers=how)
            results[how] = run(model, tmp_path, output_name=None, in_place=True, **SHORT, **options)
            save_checkpoint(results[how].model, None, tmp_path / f"{name}-{how}", max_shard_size="6KB")
        assert files(tmp_path / f"{name}-on") == files(tmp_path / f"{name}-off")
        assert len(list((tmp_path / f"{name}-on").glob("*.safetensors"))) > 1
        assert results["on"].after == results["off"].after
        for component, values in results["off"].evidence.components.items():
            assert torch.equal(results["on"].evidence.components[component], values), component


@pytest.mark.parametrize("architecture", [*MIXTURES, *WITH_SHARED])
@pytest.mark.parametrize(
    "options",
    [
        {"importance_method": "taylor_2nd", "collect_batches": 1, "pruning_ratio": 0.3},
        {"prune_kinds": "experts", "importance_method": "reap", "max_shard_size": "6KB"},
    ],
)
def test_mixtures_of_experts_are_streamed_bit_for_bit(architecture: str, options: dict, tmp_path: Path) -> None:
    """Files hold each expert's weights separately; the model holds those of all experts of a layer in one tensor."""
    model = tiny_mixture(architecture).to(torch.bfloat16 if "reap" in options.values() else torch.float32)
    whole, streamed = both(model, tmp_path / "model", stream_memory="20KB")
    assert_same_run(whole, streamed, tmp_path, **options)
    assert {file.name for file in (tmp_path / "streamed" / "run" / "model").glob("*.py")} == set()


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_several_shots_are_streamed_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, dtype=torch.float32)
    whole, streamed = both(model, tmp_path / "model", stream_memory="40KB")
    assert_same_run(whole, streamed, tmp_path, importance_method="obs", shots=3, pruning_ratio=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_distillation_is_streamed_bit_for_bit(
    architecture: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first run, half of the change to the weights is the best to keep; in the second, all of it."""
    whole, streamed = both(tiny_model(architecture, dtype=dtype), tmp_path / "model", stream_memory="1KB")
    for factor, found in ((0.5, [1.0, 0.9, 0.8, 0.85]), (1.0, [1.0, 0.9, 0.95])):
        losses = [*found, *found]
        monkeypatch.setattr("gradprune.surgery.distillation.mean_loss", lambda *_, losses=losses: losses.pop(0))
        assert_same_run(whole, streamed, tmp_path / str(factor), importance_method="obs", distill_samples=7)
        assert not losses
        summary = json.loads((tmp_path / str(factor) / "streamed/run/analysis/summary.json").read_text())
        assert summary["distillation"]["factor"] == factor


def test_weights_that_transformers_keeps_in_fp32_stay_so_when_streamed(tmp_path: Path) -> None:
    """In a gpt_oss that is loaded in fp16, these weights are the norms."""
    saved(tiny_mixture("gpt_oss").float(), tmp_path)
    whole, streamed = (load_model(tmp_path, dtype="float16", stream_layers=how)[0] for how in ("off", "on"))
    residency = residency_of(streamed)
    assert residency is not None
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float16, torch.float32}
    for name, parameter in whole.named_parameters():
        found = residency.read(name) if name in residency.sources else streamed.get_parameter(name)
        assert found.dtype == parameter.dtype, name
        assert torch.equal(found, parameter), name


@pytest.mark.parametrize(
    "options", [{"in_place": True}, {"repair": "none", "epsilon": 0.5}, {"uniform": True, "max_shard_size": "6KB"}]
)
def test_other_ways_to_cut_give_the_same_bytes(options: dict[str, object], tmp_path) -> None:
    whole, streamed = both(tiny_model(dtype=torch.bfloat16), tmp_path / "model")
    assert_same_run(whole, streamed, tmp_path, prior="similarity", temperature=0.5, **options)


def test_a_pruned_checkpoint_is_streamed_and_pruned_again(tmp_path) -> None:
    saved(run(tiny_model(channels=20, dtype=torch.float32), tmp_path / "first", epsilon=0.4).model, tmp_path / "model")
    whole, streamed = (load_model(tmp_path / "model", stream_layers=how)[0] for how in ("off", "on"))
    assert_same_run(whole, streamed, tmp_path)


def test_pruning_leaves_the_streamed_dense_model_unchanged(tmp_path) -> None:
    whole, streamed = both(tiny_model(), tmp_path / "model")
    pruned = run(streamed, tmp_path, pruning_ratio=0.3).model
    with torch.no_grad():
        assert torch.equal(streamed(tiny_ids()).logits, whole(tiny_ids()).logits)
        expected = run(whole, tmp_path, pruning_ratio=0.3, overwrite=True).model(tiny_ids()).logits
        assert torch.equal(pruned(tiny_ids()).logits, expected)


def test_several_ratios_from_one_calibration_are_streamed_bit_for_bit(tmp_path) -> None:
    numbers = tmp_path / "tokens.npy"
    np.save(numbers, TOKENS.numpy())
    whole, streamed = both(tiny_model(dtype=torch.float32), tmp_path / "model")
    for name, model in (("whole", whole), ("streamed", streamed)):
        config = PruneConfig(
            num_samples=8, held_out_samples=4, seq_len=12, batch_size=4, use_gradient_checkpointing=True,
            measure_speed=False, dataset=str(numbers), output_dir=str(tmp_path), output_name=name,
        )  # fmt: skip
        prune_ratios(model, None, config, [0.1, 0.3])
    expected, found = files(tmp_path / "whole"), files(tmp_path / "streamed")
    assert expected.keys() == found.keys()
    assert all(found[name] == content for name, content in expected.items())


def test_a_streamed_search_chooses_the_same(tmp_path) -> None:
    whole, streamed = both(tiny_model(dtype=torch.float32), tmp_path / "model", stream_memory="60KB")
    assert_same_run(whole, streamed, tmp_path, importance_method="auto")


def test_auto_streams_if_the_plan_says_that_the_run_does_not_fit(tmp_path, monkeypatch, caplog) -> None:
    saved(tiny_model(dtype=torch.float32), tmp_path)
    assert residency_of(load_model(tmp_path, stream_layers="auto")[0]) is None
    assert not caplog.records
    shape = load_shape(tmp_path)
    assert shape == sizes.model_shape(load_model(tmp_path)[0])

    def streams(job: Job | None, free: int, dtype: str = "auto") -> bool:
        monkeypatch.setattr("gradprune.checkpoint.load.free_memory", lambda _device: free)
        return residency_of(load_model(tmp_path, stream_layers="auto", job=job, dtype=dtype)[0]) is not None

    small = PruneConfig(num_samples=4, seq_len=8, batch_size=2, eval_samples=2)
    jobs = [Job(small), Job(replace(small, seq_len=16)), Job(small, ("evaluation",)), Job(PruneConfig())]
    needed = [job.footprint(shape, streamed=False, device=torch.device("cpu")).peak for job in jobs]
    assert needed[2] < needed[0] < needed[1] < needed[3]
    for job, size in zip(jobs, needed, strict=True):
        assert not streams(job, size)
        assert streams(job, size - 1)
    assert not streams(None, needed[3])
    assert streams(None, needed[3] - 1)
    assert "are free on cpu: decoder layers are streamed" in caplog.text
    # In fp64 the weights need twice as much memory.
    assert streams(jobs[0], needed[0], "float64")


def test_auto_says_what_is_wrong_with_a_checkpoint(tmp_path) -> None:
    saved(tiny_model(dtype=torch.float32), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "none of them"}))
    with pytest.raises(CheckpointError, match=r"base_model: the weights of .* cannot be loaded: .*none of them"):
        load_model(tmp_path, stream_layers="auto")


def test_eval_and_diagnose_accept_the_option(tmp_path) -> None:
    saved(tiny_model(vocab=300, dtype=torch.float32), tmp_path / "model")
    np.save(tmp_path / "tokens.npy", TOKENS.numpy())
    data = ("--dataset", tmp_path / "tokens.npy", "--seq_len", 16, "--json")
    for arguments in (
        ("eval", "--model", tmp_path / "model", "--eval_samples", 4, *data),
        ("diagnose", "--base_model", tmp_path / "model", "--num_samples", 4, "--use_gradient_checkpointing", *data),
    ):
        found, expected = (command(tmp_path, *arguments, "--stream_layers", how) for how in ("on", "off"))
        assert found == expected
        assert found[0] == 0
        assert "{" in found[1]


def test_invalid_sizes_are_refused() -> None:
    for value in ("4", "0.5MiB", "2 GB"):
        assert PruneConfig(stream_memory=value).stream_memory == value
    for value in ("", "much", "-1GiB", "0GiB"):
        with pytest.raises(ConfigError, match="stream_memory: "):
            PruneConfig(stream_memory=value)
