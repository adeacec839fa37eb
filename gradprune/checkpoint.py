"""Checkpoints: load dense and pruned models, save them whole or not at all. Only safetensors, never a pickle."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gradprune.errors import CheckpointError, UnsupportedArchitectureError
from gradprune.modeling_gradprune import PRUNED_CLASSES, per_layer_overrides
from gradprune.models import ARCHITECTURES, supported_architectures


def load_model(
    base_model: str | Path, *, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a dense or pruned causal LM and its tokenizer.

    A pruned checkpoint is loaded by gradprune's own classes; none of the code beside its weights runs.

    Args:
        base_model: a folder, or an id on the Hugging Face hub.
        dtype: of the weights, e.g. "bfloat16"; "auto" keeps the checkpoint's.
        device: where to put the model.
        trust_remote_code: run code that the checkpoint brings.

    Returns:
        The model in evaluation mode, and its tokenizer, None where the checkpoint has none.

    Raises:
        CheckpointError: missing, truncated or incomplete; has no safetensors.
        UnsupportedArchitectureError: before any weight is read.
    """
    _check_folder(base_model)
    config = _load_config(base_model, trust_remote_code)
    if config.model_type not in ARCHITECTURES:
        raise UnsupportedArchitectureError(
            f"base_model: architecture '{config.model_type}' of '{base_model}' is not supported; "
            f"supported are {supported_architectures()}"
        )
    # transformers' annotation of from_pretrained does not know output_loading_info's pair.
    model_class: Any = PRUNED_CLASSES[config.model_type] if per_layer_overrides(config) else AutoModelForCausalLM
    trust = {} if per_layer_overrides(config) else {"trust_remote_code": trust_remote_code}
    torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        model, found = model_class.from_pretrained(
            base_model, config=config, dtype=torch_dtype, use_safetensors=True, output_loading_info=True, **trust
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"base_model: the weights of '{base_model}' cannot be loaded: {_first_line(error)} "
            "(whole safetensors files that fit config.json are needed; pickled .bin weights are never read)"
        ) from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise CheckpointError(
            f"base_model: '{base_model}' lacks {len(missing)} weights that its config.json names, first {missing[0]}"
        )
    model.to(device).eval()
    return model, _load_tokenizer(base_model, trust_remote_code)


def load_pruned(directory: str | Path, *, dtype: str = "auto", device: str = "cpu") -> PreTrainedModel:
    """Load the model of a results folder's `model/`, of any width per layer.

    Args:
        directory: the folder with `config.json` and `model.safetensors`.
        dtype, device: as in `load_model`.

    Raises:
        CheckpointError: missing, truncated or incomplete.
    """
    return load_model(directory, dtype=dtype, device=device)[0]


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: str | Path,
    *,
    overwrite: bool = False,
) -> None:
    """Write a Hugging Face checkpoint: weights as safetensors, configuration, tokenizer, modelling file if needed.

    The folder appears whole or not at all, and has the same bytes every time.

    Raises:
        CheckpointError: it exists and `overwrite` is False.
    """
    with atomic_directory(Path(directory), overwrite=overwrite, argument="directory") as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def check_free(directory: Path, *, overwrite: bool, argument: str) -> None:
    """Raise if `directory` exists and may not be replaced, or is no folder.

    Raises:
        CheckpointError: naming `argument`, the option the path came from.
    """
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{argument}: '{directory}' is a file; name a folder")
    if directory.exists() and not overwrite:
        raise CheckpointError(f"{argument}: '{directory}' exists; choose another name or overwrite it (--overwrite)")


@contextmanager
def atomic_directory(directory: Path, *, overwrite: bool, argument: str) -> Iterator[Path]:
    """Yield a hidden folder beside `directory` that takes its name when the body ends; deleted if it fails.

    Raises:
        CheckpointError: `directory` exists and `overwrite` is False.
    """
    check_free(directory, overwrite=overwrite, argument=argument)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.partial-", dir=directory.parent))
    try:
        partial.chmod(0o755)
        yield partial
        if directory.exists():
            # A rename cannot replace a filled folder; the old one is set aside until the new one is in place.
            old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old-", dir=directory.parent))
            directory.rename(old / directory.name)
            partial.rename(directory)
            shutil.rmtree(old)
        else:
            partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_folder(base_model: str | Path) -> None:
    """Refuse a path that is no checkpoint folder, before anything asks the hub for it."""
    path = Path(base_model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"base_model: '{path}' has no config.json; name a Hugging Face checkpoint folder")
        return
    looks_like_id = isinstance(base_model, str) and base_model.count("/") <= 1 and not base_model.startswith((".", "/"))
    if path.exists() or not looks_like_id:
        raise CheckpointError(f"base_model: '{path}' is not a folder; name a Hugging Face checkpoint folder or hub id")


def _load_config(base_model: str | Path, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(base_model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"base_model: no configuration for '{base_model}': {_first_line(error)} "
            "(name an existing folder, or a hub id while the hub can be reached)"
        ) from error
    return config


def _load_tokenizer(base_model: str | Path, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            base_model, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError):
        return None
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
