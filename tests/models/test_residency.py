"""A streamed model computes what the whole one does, and holds no more than one layer, or two while reading ahead."""

import errno
import gc
import os
import warnings
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

from gradprune import ImportanceEngine
from gradprune.checkpoint.load import load_model
from gradprune.checkpoint.save import save_checkpoint
from gradprune.errors import CheckpointError, GradPruneError
from gradprune.models import describe
from gradprune.models.digest import model_digest
from gradprune.models.passes import losses, mean_loss, waves
from gradprune.models.residency import Residency, Spilled, residency_of
from gradprune.models.streams import stream_bytes
from gradprune.surgery.least_squares import least_squares
from helpers.cut_models import full_masks
from helpers.streaming import both, saved
from helpers.tiny_models import ARCHITECTURE_NAMES, tiny_ids, tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_losses_have_the_same_bits_as_the_whole_model(architecture: str, tmp_path) -> None:
    whole, streamed = both(tiny_model(architecture), tmp_path, stream_memory="3KiB")
    batches = tiny_ids(samples=7).split(2)
    assert len(list(waves(describe(streamed), batches, kept=2))) > 1
    with torch.no_grad():
        for found, expected in zip(losses(streamed, batches), losses(whole, batches), strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(streamed(tiny_ids()).logits, whole(tiny_ids()).logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_converted_as_they_are_read(dtype: str, tmp_path) -> None:
    saved(tiny_model(), tmp_path)
    whole, _ = load_model(tmp_path, dtype=dtype)
    streamed, _ = load_model(tmp_path, dtype=dtype, stream_layers="on")
    assert streamed.dtype == getattr(torch, dtype)
    assert mean_loss(streamed, [tiny_ids()]) == mean_loss(whole, [tiny_ids()])
    assert model_digest(streamed) == model_digest(whole)


def test_tied_embeddings_stay_tied(tmp_path) -> None:
    whole, streamed = both(tiny_model("qwen2", tied=True), tmp_path)
    assert streamed.lm_head.weight is streamed.model.embed_tokens.weight
    assert mean_loss(streamed, [tiny_ids()]) == mean_loss(whole, [tiny_ids()])


def loss(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    mean_loss(model, batches)


def calibration(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    with ImportanceEngine(model, backend="reference") as engine:
        engine.steps(batches)


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize(("work", "reads"), [(loss, 1), (calibration, 2)])
def test_layers_that_are_not_needed_are_released(
    work: Callable[..., None], reads: int, prefetch: bool, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time a layer has been read, count the layers whose weights are still referenced."""
    alive: list[StorageWeakRef] = []
    most = 0
    read = Residency._fetch

    def counted(self: Residency, layer: int) -> dict[str, torch.Tensor]:
        nonlocal most
        weights = read(self, layer)
        alive.append(StorageWeakRef(weights["mlp.down_proj.weight"].untyped_storage()))
        gc.collect()
        most = max(most, sum(not each.expired() for each in alive))
        return weights

    saved(tiny_model(layers=6), tmp_path)
    model, _ = load_model(tmp_path, stream_layers="on")
    residency = residency_of(model)
    assert residency is not None
    residency._prefetch = prefetch
    monkeypatch.setattr(Residency, "_fetch", counted)
    work(model, list(tiny_ids(samples=6).split(2)))
    # The backward pass begins with the layer on which the forward pass ended, which is not read again. Prefetching also
    # reads the layer that a next wave would need second.
    assert len(alive) == 6 * reads - (reads - 1) + (reads - 1) * prefetch
    assert most == (2 if prefetch else 1)
    residency.release()
    gc.collect()
    assert all(each.expired() for each in alive)
    assert all(parameter.is_meta for parameter in model.model.layers.parameters())


@pytest.mark.parametrize("shape", [(), (0, 4), (2, 3)])
def test_a_spilled_tensor_has_a_file_without_a_name(shape: tuple[int, ...], tmp_path) -> None:
    """This way a killed process leaves no file behind."""
    given = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    spilled = Spilled(given, tmp_path)
    assert torch.equal(spilled.read(), given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_mapped_tensor_has_a_file_without_a_name(dtype: torch.dtype, tmp_path) -> None:
    saved(tiny_model(), tmp_path)
    residency = residency_of(load_model(tmp_path, stream_layers="on")[0])
    assert residency is not None
    given = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype).T
    found = residency.mapped(given)
    assert torch.equal(found, given)
    assert found.data_ptr() != given.data_ptr()
    assert not list(residency.scratch.iterdir())


@pytest.mark.parametrize(("budget", "in_files"), [("100GiB", False), ("1KiB", True)])
def test_the_repair_keeps_streams_beyond_the_budget_in_files(
    budget: str, in_files: bool, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tiny_model(), tmp_path)
    model, _ = load_model(tmp_path, stream_layers="on", stream_memory=budget)
    view = describe(model)
    masks = full_masks(model)
    masks[view.blocks[1]][::2] = False
    written: list[int] = []
    mapped = Residency.mapped

    def counted(self: Residency, tensor: torch.Tensor) -> torch.Tensor:
        written.append(tensor.nbytes)
        return mapped(self, tensor)

    monkeypatch.setattr(Residency, "mapped", counted)
    batches = list(tiny_ids(samples=6).split(2))
    least_squares(view, masks, batches[:2], batches[2:])
    # At least the streams of each of the three batches after every layer.
    one = stream_bytes(view, batches[:1])
    assert sum(size >= one for size in written) >= 3 * len(view.layers) if in_files else not written


def test_the_scratch_folder_is_removed_with_the_last_model_without_a_warning(tmp_path) -> None:
    saved(tiny_model(), tmp_path)
    residency = residency_of(load_model(tmp_path, stream_layers="on")[0])
    assert residency is not None
    folder = residency.scratch
    other = residency.copy_for(load_model(tmp_path, stream_layers="on")[0])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        del residency
        gc.collect()
        assert other.scratch == folder
        assert folder.is_dir()
        del other
        gc.collect()
    assert not folder.exists()
    assert not [str(each.message) for each in seen if "gradprune" in str(each.message)]


def test_a_full_disk_is_reported_with_the_folder(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tiny_model(), tmp_path)
    residency = residency_of(load_model(tmp_path, stream_layers="on", stream_memory="3MiB")[0])
    assert residency is not None

    def full(**_options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = residency.scratch
    monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    with pytest.raises(GradPruneError, match=rf"3 MiB cannot be written to '{folder}': No space .*TMPDIR"):
        residency.mapped(torch.ones(2))
    with pytest.raises(GradPruneError, match=rf"changed weights cannot be written to '{folder}': No space .*TMPDIR"):
        residency.spill(torch.ones(2))


def test_a_missing_scratch_folder_is_reported(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tiny_model(), tmp_path)
    residency = residency_of(load_model(tmp_path, stream_layers="on")[0])
    assert residency is not None
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    for keep in (residency.mapped, residency.spill):
        with pytest.raises(GradPruneError, match=rf"cannot be written to '{tmp_path}/gone': No such file .*TMPDIR"):
            keep(torch.ones(2))


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_a_saved_streamed_model_has_the_same_bytes(architecture: str, tmp_path) -> None:
    whole, streamed = both(tiny_model(architecture), tmp_path / "model")
    save_checkpoint(whole, None, tmp_path / "whole")
    save_checkpoint(streamed, None, tmp_path / "streamed")
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {path.name for path in (tmp_path / "streamed").iterdir()}
    for name in names:
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_missing_and_misshapen_weights_are_refused(tmp_path) -> None:
    model = tiny_model()
    saved(model, tmp_path)
    for shard in tmp_path.glob("model*"):
        shard.unlink()
    name = "model.layers.1.mlp.up_proj.weight"
    weights = dict(model.state_dict())
    for change, words in ((None, f"lacks 1 weight .*{name}"), (torch.zeros(3, 2), f"do not have the shape .*{name}")):
        changed = {**weights, name: change} if change is not None else {k: v for k, v in weights.items() if k != name}
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=words):
            load_model(tmp_path, stream_layers="on")
