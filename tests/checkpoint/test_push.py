"""`gradprune push`, with a stand-in for the hub's client."""

import sys
from pathlib import Path

import huggingface_hub
import pytest

from gradprune.checkpoint.push import PLACE, push_checkpoint
from gradprune.checkpoint.save import save_checkpoint
from gradprune.cli import main
from gradprune.errors import CheckpointError
from helpers.pipeline_runs import run
from helpers.tiny_models import tiny_model


class Hub:
    """A stand-in for `HfApi` that keeps the files it is asked to upload."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.fault = fault
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> object:
        if self.fault is not None:
            raise self.fault
        assert exist_ok
        self.private = private
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo if '/' in repo else f'me/{repo}'}")

    def create_commit(self, repo_id: str, operations: list, commit_message: str) -> None:
        self.repo = repo_id
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    run(tiny_model(), output_dir=str(folder), output_name="x")
    (folder / "x" / "model" / ".hidden").write_text("not for others")
    return folder / "x" / "model"


def test_every_file_is_uploaded_and_the_card_names_the_repository(checkpoint: Path) -> None:
    hub = Hub()
    assert push_checkpoint(checkpoint, "small", private=True, api=hub) == "https://huggingface.co/me/small"
    assert hub.repo == "me/small"
    assert hub.private
    own = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != ".hidden"}
    card, local = hub.files.pop("README.md").decode(), own.pop("README.md").decode()
    assert hub.files == own
    assert PLACE in local
    assert card == local.replace(PLACE, "me/small")


def test_a_folder_that_gradprune_did_not_write_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    save_checkpoint(tiny_model(), None, tmp_path / "dense")
    (tmp_path / "dense" / "README.md").write_text("---\ntags: [mine]\n---\n")
    for folder in (tmp_path / "dense", tmp_path / "nowhere", checkpoint.parent):
        hub = Hub()
        with pytest.raises(CheckpointError, match=r"model: .* is not a checkpoint that gradprune wrote"):
            push_checkpoint(folder, "me/small", api=hub)
        assert not hub.files


def test_an_error_of_the_hub_client_becomes_one_line(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = huggingface_hub.errors.HFValidationError("Repo id must use\nalphanumeric chars.")
    monkeypatch.setattr("gradprune.checkpoint.push.hub_fault", lambda: None)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(fault))
    monkeypatch.setattr(sys, "argv", ["gradprune", "push", "--model", str(checkpoint), "--repo", "a b"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: repo: 'a b' cannot be written: Repo id must use alphanumeric chars\n"


def test_pushing_in_offline_mode_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        push_checkpoint(checkpoint, "me/small")


def test_the_command_prints_the_address(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub()
    monkeypatch.setattr("gradprune.checkpoint.push.hub_fault", lambda: None)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(
        sys, "argv", ["gradprune", "push", "--model", str(checkpoint), "--repo", "me/small", "--private"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == "https://huggingface.co/me/small\n"
    assert hub.private
