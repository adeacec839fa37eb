"""Checkpoints: load dense and pruned models, save them whole or not at all. Only safetensors, never a pickle."""

import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants as hub
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gradprune.checkpoint.gguf_source import find_gguf, plain_copy
from gradprune.errors import CheckpointError, UnsupportedArchitectureError
from gradprune.models import ARCHITECTURES, supported_architectures
from gradprune.models.modeling_gradprune import PRUNED_CLASSES, PRUNED_CONFIGS, per_layer_overrides

# A folder with one of these has a tokenizer. From a tokenizer_config.json alone, transformers makes up an empty one.
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")


def load_model(
    base_model: str | Path, *, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a dense or pruned causal LM and its tokenizer.

    A pruned checkpoint is loaded by gradprune's own classes; none of the code beside its weights runs.

    Args:
        base_model: a folder, an id on the Hugging Face hub, or a GGUF file, see `gguf_source.find_gguf`.
        dtype: of the weights, e.g. "bfloat16"; "auto" keeps the checkpoint's, and is float32 for a GGUF file.
        device: where to put the model.
        trust_remote_code: run code that the checkpoint brings.

    Returns:
        The model in evaluation mode, and its tokenizer, None where the checkpoint has none.

    Raises:
        CheckpointError: missing, truncated or incomplete; has no safetensors; its tokenizer cannot be read.
        UnsupportedArchitectureError: before any weight is read.
    """
    file = find_gguf(base_model)
    if file is not None:
        return _load_gguf(file, "float32" if dtype == "auto" else dtype, device)
    _check_folder(base_model)
    source = {"trust_remote_code": trust_remote_code, "local_files_only": _only_cached(base_model)}
    config = _load_config(base_model, source)
    _check_supported(base_model, config)
    model = _load_weights(base_model, config, dtype, source)
    return model.to(device).eval(), _load_tokenizer(base_model, source)


def load_pruned(directory: str | Path, *, dtype: str = "auto", device: str = "cpu") -> PreTrainedModel:
    """Load the model of a results folder's `model/`, of any width per layer.

    Args:
        directory: the folder with `config.json` and `model.safetensors`.
        dtype, device: as in `load_model`.

    Raises:
        CheckpointError: missing, truncated or incomplete.
    """
    return load_model(directory, dtype=dtype, device=device)[0]


def _load_gguf(file: Path, dtype: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The dequantised model of a GGUF file and its tokenizer."""
    source = {"gguf_file": file.name, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(file.parent, **source)
        _check_supported(file, config)
        # transformers' annotation of from_pretrained does not know output_loading_info's pair.
        model_class: Any = AutoModelForCausalLM
        model, found = model_class.from_pretrained(
            file.parent, **source, dtype=getattr(torch, dtype), output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
    except UnsupportedArchitectureError:
        raise
    except Exception as error:  # its readers raise almost anything for a damaged file
        raise CheckpointError(f"base_model: '{file}' cannot be read as a GGUF model: {_one_line(error)}") from error
    _check_complete(file, found)
    plain: Any = plain_copy(model)
    return plain.to(device).eval(), tokenizer


def _check_supported(base_model: str | Path, config: PreTrainedConfig) -> None:
    if config.model_type not in ARCHITECTURES:
        raise UnsupportedArchitectureError(
            f"base_model: architecture '{config.model_type}' of '{base_model}' is not supported; "
            f"supported are {supported_architectures()}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedArchitectureError(
            f"base_model: the weights of '{base_model}' are quantised; name the unquantised checkpoint"
        )


def _check_folder(base_model: str | Path) -> None:
    """Refuse a path that is no checkpoint folder, before anything asks the hub for it."""
    path = Path(base_model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"base_model: '{path}' has no config.json; name a Hugging Face checkpoint folder")
        return
    looks_like_id = isinstance(base_model, str) and base_model.count("/") <= 1 and not base_model.startswith((".", "/"))
    if path.exists() or not looks_like_id:
        raise CheckpointError(
            f"base_model: '{path}' is not a folder; name a Hugging Face checkpoint folder, a hub id or a GGUF file"
        )


def _only_cached(base_model: str | Path) -> bool:
    """Whether the hub cannot be reached: its client would try for half a minute before a mistyped path is told."""
    if Path(base_model).is_dir() or hub.HF_HUB_OFFLINE or getproxies():
        return False
    url = urlsplit(hub.ENDPOINT)
    try:
        socket.create_connection((url.hostname or "", url.port or (80 if url.scheme == "http" else 443)), 5.0).close()
    except OSError:
        return True
    return False


def _load_config(base_model: str | Path, source: dict[str, bool]) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = _config_class(base_model, source).from_pretrained(base_model, **source)
        per_layer_overrides(config)
    except Exception as error:  # a damaged config.json makes transformers raise almost anything
        raise CheckpointError(
            f"base_model: no configuration for '{base_model}': {_one_line(error)} "
            "(name an existing folder, or a hub id while the hub can be reached)"
        ) from error
    return config


def _config_class(base_model: str | Path, source: dict[str, bool]) -> Any:
    """What reads the configuration: gradprune's own class where layers differ, because not every stock one can."""
    stated, _ = PreTrainedConfig.get_config_dict(base_model, local_files_only=source["local_files_only"])
    pruned = PRUNED_CONFIGS.get(str(stated.get("model_type")))
    return pruned if pruned is not None and stated.get("per_layer_config") else AutoConfig


def _load_weights(base_model: str | Path, config: PreTrainedConfig, dtype: str, source: dict[str, bool]) -> Any:
    pruned = bool(per_layer_overrides(config))
    # transformers' annotation of from_pretrained does not know output_loading_info's pair.
    model_class: Any = PRUNED_CLASSES[config.model_type] if pruned else AutoModelForCausalLM
    options: dict[str, Any] = {"local_files_only": source["local_files_only"]} if pruned else dict(source)
    options["dtype"] = dtype if dtype == "auto" else getattr(torch, dtype)
    # Mismatches are collected and refused below: transformers' own error does not say which weight.
    options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, found = model_class.from_pretrained(base_model, config=config, **options)
    except Exception as error:  # as for the configuration, whose values are first used here
        raise CheckpointError(
            f"base_model: the weights of '{base_model}' cannot be loaded: {_one_line(error)} "
            "(whole safetensors files that fit config.json are needed; pickled .bin weights are never read)"
        ) from error
    _check_complete(base_model, found)
    return model


def _check_complete(base_model: str | Path, found: dict[str, Any]) -> None:
    """Refuse weights that transformers would have made up or left out with no more than a warning."""
    if mismatched := sorted(found["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise CheckpointError(
            f"base_model: {len(mismatched)} weights of '{base_model}' do not have the shape that its config.json "
            f"gives them, first {name}: {list(stored)} instead of {list(expected)}"
        )
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(
            f"base_model: '{base_model}' lacks {len(missing)} weights that its config.json names, first {missing[0]}"
        )
    if unused := sorted(key for key in found["unexpected_keys"] if ".layers." in key):
        raise CheckpointError(
            f"base_model: '{base_model}' has {len(unused)} weights in layers that its config.json does not name, "
            f"first {unused[0]}; the config.json is another model's"
        )


def _load_tokenizer(base_model: str | Path, source: dict[str, bool]) -> PreTrainedTokenizerBase | None:
    folder = Path(base_model)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _VOCABULARIES):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base_model, **source)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CheckpointError(
            f"base_model: the tokenizer of '{base_model}' cannot be loaded: {_one_line(error)} "
            "(repair its files; a folder without any is loaded without a tokenizer)"
        ) from error
    return tokenizer


def _one_line(error: Exception) -> str:
    """The start of an error's message; transformers' go on for paragraphs."""
    words = " ".join(str(error).split())
    if not words or isinstance(error, KeyError):  # whose message is the bare key
        words = f"{type(error).__name__} {words}".strip()
    message = words if len(words) <= 200 else words[:200].rsplit(" ", 1)[0] + " ..."
    return message.rstrip(".")
