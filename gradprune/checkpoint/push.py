"""Upload a pruned checkpoint to the Hugging Face hub."""

from pathlib import Path
from typing import Any

from gradprune.checkpoint.card_head import CARD, TAG, card_head
from gradprune.checkpoint.files import check_floating
from gradprune.errors import CheckpointError, one_line
from gradprune.hub import hub_fault

PLACE = "path/to/this/folder"
"""The placeholder for the checkpoint's folder in a model card; the upload replaces it with the repository's name."""


def push_checkpoint(folder: str | Path, repo: str, *, private: bool = False, api: Any = None) -> str:
    """Upload a checkpoint with its model card in one commit; the repository is created if it does not exist.

    Args:
        folder: a checkpoint that gradprune wrote, such as `results/NAME/model`.
        repo: "user/name", or "name" for a repository of the logged-in user.
        private: whether a new repository is private; an existing repository keeps its visibility.
        api: a `huggingface_hub.HfApi` for another token or hub than the default; None uses the default.

    Returns:
        The repository's URL.

    Raises:
        CheckpointError: gradprune did not write the folder, or it has no model card; or the hub cannot be reached or
            refuses the upload.
        UnsupportedArchitectureError: weights are stored as integers or in 8 bits.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files = _files(Path(folder))
    if api is None:
        if (fault := hub_fault()) is not None:
            raise CheckpointError(f"repo: '{repo}' cannot be written: {fault}")
        api = HfApi()
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        content = {file.name: file for file in files if file.name != CARD}
        card = (Path(folder) / CARD).read_text(encoding="utf-8").replace(PLACE, made.repo_id)
        operations = [CommitOperationAdd(name, path) for name, path in content.items()]
        operations.append(CommitOperationAdd(CARD, card.encode()))
        api.create_commit(made.repo_id, operations, commit_message="A checkpoint pruned by gradprune")
    # The client raises errors of its own, errors of its HTTP library, and ValueErrors for invalid names.
    except Exception as error:
        raise CheckpointError(f"repo: '{repo}' cannot be written: {one_line(error)}") from error
    return str(made)


def _files(folder: Path) -> list[Path]:
    """List the checkpoint's files, sorted by path; raise if gradprune did not write the folder."""
    if TAG not in card_head(folder).get("tags", ()) or not (folder / "config.json").is_file():
        raise CheckpointError(
            f"model: '{folder}' is not a checkpoint that gradprune wrote with a model card ({CARD}); name the folder "
            "model/ of a results folder"
        )
    check_floating(folder, argument="model")
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
