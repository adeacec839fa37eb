"""Load a checkpoint without its decoder layers, which are read when they are needed; see `models/residency.py`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from gradprune.checkpoint.files import weight_files
from gradprune.models.residency import Residency, Source, Stored, WeightFile
from gradprune.models.view import layers_path

# Buffers that old checkpoints hold and transformers computes.
_COMPUTED = "rotary_emb.inv_freq"


def local_folder(base_model: str | Path, *, local_files_only: bool) -> Path:
    """The folder with a checkpoint's files, which are downloaded if need be.

    Raises:
        OSError: there are no safetensors files, or they cannot be downloaded.
    """
    if Path(base_model).is_dir():
        return Path(base_model)
    name, options = str(base_model), {"local_files_only": local_files_only}
    found = cached_file(name, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **options)
    if found is None:
        found = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **options)
        get_checkpoint_shard_files(name, found, **options)
    return Path(str(found)).parent


def empty_model(config: PreTrainedConfig, make: Callable[..., Any], dtype: torch.dtype) -> PreTrainedModel:
    """The model that `make` makes of its configuration and `dtype`, on the meta device but for its buffers."""
    with init_empty_weights():
        model: PreTrainedModel = make(config, dtype=dtype)
    model.eval().requires_grad_(requires_grad=False)
    return model


class EmptyModel:
    """A model without weights beside the files that hold them.

    model: on the meta device but for its buffers. found: as transformers' `output_loading_info`, what does not fit.
    """

    def __init__(
        self, folder: Path, config: PreTrainedConfig, make: Callable[..., Any], dtype: str, argument: str
    ) -> None:
        """Build the model and look for its weights.

        Args:
            folder: of the checkpoint.
            config: its configuration.
            make: makes the model from `config` and `dtype`.
            dtype: as an option.
            argument: the option that named the folder, for messages.

        Raises:
            SafetensorError, OSError: a file is damaged.
        """
        stored = stored_weights(folder, argument)
        self.dtype = resolved_dtype(config, dtype, stored)
        self.model = empty_model(config, make, self.dtype)
        self._sources = _by_names_of(self.model, stored)
        if (folder / GENERATION_CONFIG_NAME).is_file() and self.model.can_generate():
            self.model.generation_config = GenerationConfig.from_pretrained(folder)
        self.model.name_or_path = self.model.config._name_or_path = str(folder)
        self.found = self._compared()

    def streamed(self, device: torch.device, budget: int) -> PreTrainedModel:
        """The model, with the weights that are in no decoder layer on `device`; call it if `found` is in order."""
        model, layers = self.model, layers_path(self.model)
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            if name in self._sources and not name.startswith(f"{layers}."):
                parent, _, own = name.rpartition(".")
                weight = self._sources[name].read().to(device, self.dtype, copy=True)
                model.get_submodule(parent)._parameters[own] = nn.Parameter(weight, parameter.requires_grad)
        for name, stated in model.named_buffers():
            if name in self._sources:
                stated.copy_(self._sources[name].read())
        # What is missing is tied to what is there.
        model.tie_weights(missing_keys=self._missing(), recompute_mapping=False)
        for module in model.modules():
            for own, buffer in module._buffers.items():
                module._buffers[own] = buffer if buffer is None else buffer.to(device)
        wanted = {name for name, _ in model.named_parameters() if name.startswith(f"{layers}.")}
        sources: dict[str, Source] = {name: source for name, source in self._sources.items() if name in wanted}
        Residency(layers, sources, device=device, dtype=self.dtype, budget=budget).attach(model)
        return model

    def _missing(self) -> set[str]:
        return self.model.state_dict().keys() - self._sources.keys()

    def _compared(self) -> dict[str, Any]:
        expected = {name: list(tensor.shape) for name, tensor in self.model.state_dict().items()}
        mismatched = [
            (name, self._sources[name].shape, shape)
            for name, shape in expected.items()
            if name in self._sources and self._sources[name].shape != shape
        ]
        missing = self._missing()
        tied = self.model.all_tied_weights_keys
        for target, source in tied.items():
            if len({target, source} & missing) == 1:
                missing -= {target, source}
        unexpected = [name for name in self._sources if name not in expected and not name.endswith(_COMPUTED)]
        return {"mismatched_keys": mismatched, "missing_keys": missing, "unexpected_keys": unexpected}


def stored_weights(folder: Path, argument: str) -> dict[str, Stored]:
    """By name, where a checkpoint folder has its weights; only the files' headers are read."""
    files = [WeightFile(path) for path in weight_files(folder, argument)]
    return {name: Stored(file, name) for file in files for name in file.names()}


def _by_names_of(model: PreTrainedModel, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The weights by the names that the model has them by, which are not always the files'.

    The model is told which of transformers' renamings were needed, and is saved with the files' names again.
    """
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    own = model.state_dict()
    model._weight_conversions = [  # type: ignore[assignment]
        each for each in renamings if any(rename_source_key(name, [each], [])[0] != name for name in stored)
    ]
    names = {name: rename_source_key(name, renamings, [], model.base_model_prefix, own)[0] for name in stored}
    return {names[name]: source for name, source in stored.items()}


def resolved_dtype(config: PreTrainedConfig, dtype: str, sources: Mapping[str, Stored]) -> torch.dtype:
    """As transformers does: what is asked for, what the configuration says, or the first weight's; else float32."""
    asked = config.dtype if dtype == "auto" else dtype
    if asked is None:
        stored = (source.read().dtype for source in sources.values())
        asked = next((each for each in stored if each.is_floating_point), torch.float32)
    found: torch.dtype = getattr(torch, asked) if isinstance(asked, str) else asked
    return found
