"""Load a checkpoint except for its decoder layers, which are read when they are needed; see `models/residency.py`."""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from gradprune.checkpoint.files import weight_files
from gradprune.models.residency import Residency, Source, Stored, WeightFile
from gradprune.models.view import layers_path

# The end of the names of buffers that old checkpoints contain although transformers computes them.
_COMPUTED = "rotary_emb.inv_freq"


def local_folder(base_model: str | Path, *, local_files_only: bool) -> Path:
    """Return the folder with a checkpoint's files, which are downloaded if necessary.

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
    """Build a model by `make` from `config` and `dtype`, with parameters on the meta device and buffers in memory."""
    with init_empty_weights():
        model: PreTrainedModel = make(config, dtype=dtype)
    # Moving each parameter to the meta device separately has untied the tied weights.
    model.tie_weights()
    model.eval().requires_grad_(requires_grad=False)
    return model


@dataclass(frozen=True)
class Converted:
    """A weight that is combined from several weights in the files, such as a layer's experts from the single experts.

    converter: transformers' converter, which is copied for each use and never changed.
    config: the model's configuration. name: name of the weight in the model.
    parts: the weights in the files, in transformers' order, each with the source pattern that its name matches.
    """

    converter: WeightConverter
    config: PreTrainedConfig
    name: str
    parts: tuple[tuple[str, Stored], ...]

    @property
    def shape(self) -> list[int]:
        """Shape of the combined weight; no weight is read."""
        return list(self._made(lambda stored: torch.empty(stored.shape, device="meta")).shape)

    def read(self) -> Tensor:
        """Read the parts and combine them; the weight is on the CPU."""
        return self._made(Stored.read)

    def _made(self, read: Callable[[Stored], Tensor]) -> Tensor:
        # A copy, because a converter collects the tensors in itself.
        converter = copy.deepcopy(self.converter)
        for pattern, stored in self.parts:
            # A function that returns the tensor is accepted too, although the annotation does not say so.
            converter.add_tensor(self.name, stored.name, pattern, partial(read, stored))  # type: ignore[arg-type]
        found = converter.convert(self.name, config=self.config)[self.name]
        tensor: Tensor = found[0] if isinstance(found, list) else found
        return tensor


class EmptyModel:
    """A model without weights, together with the places of its weights in the checkpoint's files.

    model: the model, with parameters on the meta device and buffers in memory. dtype: resolved dtype of its weights.
    found: the weights that are missing, unexpected or of another shape, as in transformers' `output_loading_info`.
    """

    def __init__(
        self, folder: Path, config: PreTrainedConfig, make: Callable[..., Any], dtype: str, argument: str
    ) -> None:
        """Build the model and look for its weights.

        Args:
            folder: the checkpoint's folder.
            config: its configuration.
            make: builds the model from `config` and the resolved `dtype`.
            dtype: the option's value: the name of a dtype, or "auto".
            argument: the option that named the folder, for messages.

        Raises:
            CheckpointError: the index of weights cannot be read or names other files than safetensors.
            SafetensorError, OSError: a file is damaged.
        """
        stored = stored_weights(folder, argument)
        self.dtype = resolved_dtype(config, dtype, stored)
        self.model = _with_planned_dtypes(empty_model(config, make, self.dtype), self.dtype)
        self._sources = _by_names_of(self.model, stored)
        if (folder / GENERATION_CONFIG_NAME).is_file() and self.model.can_generate():
            self.model.generation_config = GenerationConfig.from_pretrained(folder)
        self.model.name_or_path = self.model.config._name_or_path = str(folder)
        self.found = self._compared()

    def streamed(self, device: torch.device, budget: int) -> PreTrainedModel:
        """Load all weights outside the decoder layers onto `device` and make the layers load themselves.

        Call this only if `found` reports nothing missing or mismatched.

        Args:
            device: the device on which the model runs.
            budget: bytes for the residual streams, see `Residency`.
        """
        model, layers = self.model, layers_path(self.model)
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            if name in self._sources and not name.startswith(f"{layers}."):
                parent, _, own = name.rpartition(".")
                weight = self._sources[name].read().to(device, parameter.dtype, copy=True)
                model.get_submodule(parent)._parameters[own] = nn.Parameter(weight, parameter.requires_grad)
        for name, stated in model.named_buffers():
            if name in self._sources:
                stated.copy_(self._sources[name].read())
        # A weight that the files lack is tied to one that they have.
        model.tie_weights(missing_keys=self._missing(), recompute_mapping=False)
        for module in model.modules():
            for own, buffer in module._buffers.items():
                module._buffers[own] = buffer if buffer is None else buffer.to(device)
        wanted = {name for name, _ in model.named_parameters() if name.startswith(f"{layers}.")}
        sources: dict[str, Source] = {name: source for name, source in self._sources.items() if name in wanted}
        Residency(layers, sources, device=device, budget=budget).attach(model)
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
    """Return where each weight of a checkpoint folder is stored, by name; only the files' headers are read."""
    files = [WeightFile(path) for path in weight_files(folder, argument)]
    return {name: Stored(file, name) for file in files for name in file.names()}


def _by_names_of(model: PreTrainedModel, stored: Mapping[str, Stored]) -> dict[str, Stored | Converted]:
    """Return the stored weights by their names in the model, which may differ from those in the files.

    Records in the model which of transformers' conversions were used, so that saving restores the files' names.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    own = model.state_dict()
    found: dict[str, Stored | Converted] = {}
    parts: dict[str, list[tuple[str, Stored]]] = defaultdict(list)
    for name in sorted(stored, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if pattern is None:
            found[renamed] = stored[name]
        else:
            parts[renamed].append((pattern, stored[name]))
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    for name, of_weight in parts.items():
        found[name] = Converted(by_pattern[of_weight[0][0]], model.config, name, tuple(of_weight))
    model._weight_conversions = [each for each in conversions if each.was_used()]  # type: ignore[assignment]
    return found


def _with_planned_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast to fp32 the meta-device weights and the buffers that transformers keeps in fp32, and return the model."""
    plan = model._get_dtype_plan(dtype)
    if plan:
        pattern, _, by_group = build_glob_alternation(list(plan))
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if matched := pattern.search(name):
                tensor.data = tensor.data.to(plan[by_group[str(matched.lastgroup)]])
    return model


def resolved_dtype(config: PreTrainedConfig, dtype: str, sources: Mapping[str, Stored]) -> torch.dtype:
    """Resolve the `dtype` option as transformers does.

    Returns:
        The dtype asked for. For "auto", the one that the configuration states, else that of the first floating-point
        weight in `sources`, else float32.
    """
    asked = config.dtype if dtype == "auto" else dtype
    if asked is None:
        stored = (source.read().dtype for source in sources.values())
        asked = next((each for each in stored if each.is_floating_point), torch.float32)
    found: torch.dtype = getattr(torch, asked) if isinstance(asked, str) else asked
    return found
