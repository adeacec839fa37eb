"""Load dense and pruned models, from safetensors or a GGUF file; nothing is unpickled."""

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gradprune.checkpoint.files import check_floating, check_index
from gradprune.checkpoint.gguf_source import find_gguf, plain_copy
from gradprune.checkpoint.gguf_splitters import split_as_the_file_says
from gradprune.checkpoint.streamed import EmptyModel, empty_model, local_folder, resolved_dtype
from gradprune.config import OPTIONS, PruneConfig, StreamLayers, bytes_of, device_map_of
from gradprune.data.windows import check_context
from gradprune.errors import (
    CheckpointError,
    ConfigError,
    GradPruneError,
    UnsupportedArchitectureError,
    counted,
    one_line,
)
from gradprune.hub import hub_fault
from gradprune.models import accepted_kinds, describe
from gradprune.models.footprint import Job
from gradprune.models.modeling_gradprune import auto_class, auto_class_name, per_layer_overrides, text_config
from gradprune.models.placement import check_placement, device_of_name
from gradprune.models.sizes import ModelShape, free_memory, model_shape, with_unit

logger = logging.getLogger(__name__)

# Bytes; PyTorch allocates at multiples of it.
_ALIGNMENT = 64

# A folder with one of these has a tokenizer. From a tokenizer_config.json alone, transformers makes up an empty one.
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")


def load_model(
    base_model: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    device_map: str | None = None,
    trust_remote_code: bool = False,
    stream_layers: StreamLayers = "off",
    stream_memory: str = "4GiB",
    job: Job | None = None,
    argument: str = "base_model",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a dense or pruned causal LM and its tokenizer.

    A pruned checkpoint is loaded by gradprune's own classes; none of the code beside its weights runs.

    Args:
        base_model: a folder, an id on the Hugging Face hub, or a GGUF file, see `gguf_source.find_gguf`.
        dtype: of the weights, e.g. "bfloat16"; "auto" keeps the checkpoint's, and is float32 for a GGUF file.
        device: where to put the model; "auto" is CUDA if available.
        device_map: divide the layers over several devices instead: as in the options. accelerate moves what passes
            between them.
        trust_remote_code: run code that the checkpoint brings.
        stream_layers: "on" leaves the decoder layers' weights in their files until they are needed, see
            `gradprune.models.residency`; "auto" does where `job` would hold more than what is free on the device.
        stream_memory: for the residual streams of a streamed model's samples, e.g. "4GiB".
        job: what the model is for; by default a run of `prune` with its default options.
        argument: the option that `base_model` came from, for messages.

    Returns:
        The model in evaluation mode, and its tokenizer, None where the checkpoint has none.

    Raises:
        CheckpointError: missing, truncated or incomplete; has no safetensors; its tokenizer cannot be read.
        ConfigError: an argument is none that the option of its name takes; stream_layers is "on" for a GGUF file; a
            GGUF file or stream_layers "on" with a device_map; the devices do not hold the model, or are not there; a
            device_map divides a layer.
        UnsupportedArchitectureError: before any weight is read.
    """
    named: str = OPTIONS["dtype"].accepted(str(dtype).removeprefix("torch."))
    for option, value in (
        ("device_map", device_map),
        ("stream_layers", stream_layers),
        ("stream_memory", stream_memory),
    ):
        OPTIONS[option].accepted(value)
    place = device_of_name(str(device))
    file = find_gguf(base_model)
    if file is not None:
        if device_map is not None:
            raise ConfigError(f"device_map: a GGUF file ('{file}') is loaded on one device; leave it out")
        if stream_layers == "on":
            raise ConfigError(
                f"stream_layers: a GGUF file ('{file}') is dequantised as a whole; choose 'off', or name a folder with "
                "safetensors"
            )
        return _load_gguf(file, "float32" if named == "auto" else named, place, argument)
    _check_folder(base_model, argument)
    source = {"trust_remote_code": trust_remote_code, "local_files_only": _only_cached(base_model)}
    config = _load_config(base_model, source, argument)
    _check_supported(base_model, config, argument)
    folder = _checked_folder(base_model, config, source, argument)
    empty = None
    if stream_layers != "off" and device_map is None:
        empty = _empty(folder, base_model, config, named, source, argument)
        if stream_layers == "auto" and not _must_stream(empty.model, job or _pruning(stream_memory), place):
            empty = None
    if empty is not None:
        model = _streamed(empty, base_model, argument, device=place, budget=bytes_of(stream_memory))
    elif device_map is not None:
        model = _mapped(base_model, config, named, source, argument, device_map)
    else:
        model = _aligned(_load_weights(base_model, config, named, source, argument).to(place).eval())
    return model, _load_tokenizer(base_model, source, argument)


def _pruning(stream_memory: str) -> Job:
    """A run of `prune` with its default options."""
    return Job(PruneConfig(stream_memory=stream_memory))


def load_pruned(
    directory: str | Path, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Load the model of a results folder's `model/`, of any width per layer.

    Args:
        directory: the folder with `config.json` and the weights, in one or several safetensors files.
        dtype, device: as in `load_model`.

    Raises:
        GradPruneError: as `load_model`.
    """
    return load_model(directory, dtype=dtype, device=device, argument="directory")[0]


def _load_gguf(
    file: Path, dtype: str, device: torch.device, argument: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The dequantised model of a GGUF file and its tokenizer."""
    # Raises before any weight is read.
    _gguf_config(file, argument)
    source = {"gguf_file": file.name, "local_files_only": True}
    try:
        # transformers' annotation of from_pretrained does not know output_loading_info's pair.
        model_class: Any = AutoModelForCausalLM
        with _no_bar_of_the_reader():
            model, found = model_class.from_pretrained(
                file.parent, **source, dtype=getattr(torch, dtype), output_loading_info=True
            )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
        split_as_the_file_says(tokenizer, file)
    except Exception as error:
        raise _no_gguf(file, error, argument) from error
    _check_complete(file, found, argument)
    plain: Any = plain_copy(model)
    return plain.to(device).eval(), tokenizer


def _gguf_config(file: Path, argument: str) -> PreTrainedConfig:
    """The configuration of a GGUF file's model, which can be pruned."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except Exception as error:
        raise _no_gguf(file, error, argument) from error
    _check_supported(file, config, argument)
    return config


def _no_gguf(file: Path, error: Exception, argument: str) -> CheckpointError:
    """For what transformers' readers raise for a damaged file, which is almost anything."""
    return CheckpointError(f"{argument}: '{file}' cannot be read as a GGUF model: {one_line(error)}")


@contextmanager
def _no_bar_of_the_reader() -> Iterator[None]:
    """transformers' reader shows a bar of its own, whatever its switch for bars says."""
    # Imported here, because nothing else needs it.
    from transformers import modeling_gguf_pytorch_utils

    reader: Any = modeling_gguf_pytorch_utils
    shown = reader.tqdm
    reader.tqdm = partial(shown, disable=True)
    try:
        yield
    finally:
        reader.tqdm = shown


def _check_supported(base_model: str | Path, config: PreTrainedConfig, argument: str) -> None:
    try:
        accepted_kinds(config)
    except UnsupportedArchitectureError as error:
        raise UnsupportedArchitectureError(
            f"{argument}: '{base_model}': {str(error).removeprefix('base_model: ')}"
        ) from None
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedArchitectureError(
            f"{argument}: the weights of '{base_model}' are quantised; name the unquantised checkpoint"
        )
    sizes = text_config(config)
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        if (size := getattr(sizes, name, None)) is not None and size < 1:
            raise CheckpointError(
                f"{argument}: the configuration of '{base_model}' describes no model: {name} is {size}"
            )


def _check_folder(base_model: str | Path, argument: str) -> None:
    """Refuse a path that is no checkpoint folder, before anything asks the hub for it."""
    path = Path(base_model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{argument}: '{path}' has no config.json; name a Hugging Face checkpoint folder")
        return
    looks_like_id = isinstance(base_model, str) and base_model.count("/") <= 1 and not base_model.startswith((".", "/"))
    if path.exists() or not looks_like_id:
        raise CheckpointError(
            f"{argument}: '{path}' is not a folder; name a Hugging Face checkpoint folder, a hub id or a GGUF file"
        )


def _only_cached(base_model: str | Path) -> bool:
    """Whether to skip the hub: it is not needed, or it is unreachable, which its client is slow to notice."""
    return Path(base_model).is_dir() or hub_fault() is not None


def _load_config(base_model: str | Path, source: dict[str, bool], argument: str) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = _config_class(base_model, source).from_pretrained(base_model, **source)
        per_layer_overrides(config)
    except Exception as error:  # a damaged config.json makes transformers raise almost anything
        if not Path(base_model).is_dir() and source["local_files_only"]:
            raise CheckpointError(
                f"{argument}: there is no folder '{base_model}', nor a model of that id in the hub's cache, and the "
                "hub cannot be reached (or HF_HUB_OFFLINE is set)"
            ) from error
        raise CheckpointError(
            f"{argument}: no configuration for '{base_model}': {one_line(error)} "
            "(name an existing folder, or an id on the Hugging Face hub)"
        ) from error
    return config


def _config_class(base_model: str | Path, source: dict[str, bool]) -> Any:
    """What reads the configuration: gradprune's own class where layers differ, because not every stock one can."""
    stated, _ = PreTrainedConfig.get_config_dict(base_model, local_files_only=source["local_files_only"])
    differ = any(part.get("per_layer_config") for part in (stated, stated.get("text_config") or {}))
    pruned = auto_class(str(stated.get("model_type")), "AutoConfig") if differ else None
    return pruned or AutoConfig


def _mapped(
    base_model: str | Path,
    config: PreTrainedConfig,
    dtype: str,
    source: dict[str, bool],
    argument: str,
    device_map: str,
) -> PreTrainedModel:
    """The model on the devices of a map."""
    try:
        places = device_map_of(device_map)
        for place in places.values() if isinstance(places, dict) else ():
            torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device_map: '{place}' does not work here: {one_line(error)}") from error
    model: PreTrainedModel = _load_weights(base_model, config, dtype, source, argument, device_map=places).eval()
    check_placement(model)
    return _aligned(model)


def _load_weights(
    base_model: str | Path,
    config: PreTrainedConfig,
    dtype: str,
    source: dict[str, bool],
    argument: str,
    **placed: Any,
) -> Any:
    model_class, pruned = _model_class(config), bool(per_layer_overrides(config))
    options: dict[str, Any] = {"local_files_only": source["local_files_only"]} if pruned else dict(source)
    options |= placed
    options["dtype"] = dtype if dtype == "auto" else getattr(torch, dtype)
    # Mismatches are collected and refused below: transformers' own error does not say which weight.
    options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, found = model_class.from_pretrained(base_model, config=config, **options)
    except Exception as error:  # as for the configuration, whose values are first used here
        raise _unreadable(base_model, error, argument) from error
    _check_complete(base_model, found, argument)
    return model


def _aligned(model: PreTrainedModel) -> PreTrainedModel:
    """The model with weights where PyTorch puts its own: matrix products on CPUs round by a matrix's address.

    Weights that transformers leaves in the mapped file lie wherever the file has them: the same weights in other files
    would give other results. They are copied one by one, and the pages of the file go as others come.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()
    return model


def _empty(
    folder: Path,
    base_model: str | Path,
    config: PreTrainedConfig,
    dtype: str,
    source: dict[str, bool],
    argument: str,
) -> EmptyModel:
    """The model without weights, beside the files that hold them."""
    try:
        return EmptyModel(folder, config, _maker(config, source), dtype, argument)
    except GradPruneError:
        raise
    except Exception as error:  # as in `_load_weights`
        raise _unreadable(base_model, error, argument) from error


def _must_stream(model: PreTrainedModel, job: Job, device: torch.device) -> bool:
    """Whether a job is too large for the device with the whole model, which is empty; says so if it is."""
    return not _fits(model_shape(model), job, device)


def _streamed(
    empty: EmptyModel, base_model: str | Path, argument: str, *, device: torch.device, budget: int
) -> PreTrainedModel:
    """The model without its decoder layers' weights."""
    _check_complete(base_model, empty.found, argument)
    try:
        return empty.streamed(device, budget)
    except Exception as error:  # as in `_load_weights`
        raise _unreadable(base_model, error, argument) from error


def load_shape(
    base_model: str | Path,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    seq_len: int = 1,
    kinds: Collection[str] | None = None,
) -> ModelShape:
    """The sizes of a checkpoint's model, from its configuration alone.

    Args:
        base_model: a folder with config.json, an id on the Hugging Face hub, or a GGUF file, see
            `gguf_source.find_gguf`.
        dtype: of the weights; "auto" is what the configuration says, or float32.
        trust_remote_code: run code that the checkpoint brings.
        seq_len, kinds: tokens of a sample and kinds of groups that a run asks of the model; by default the least.

    Raises:
        CheckpointError: the configuration is missing or damaged.
        UnsupportedArchitectureError: it is none that can be pruned.
        CalibrationError, ConfigError: it has a shorter context, or has no such kind.
    """
    file = find_gguf(base_model)
    source = {"trust_remote_code": trust_remote_code}
    if file is not None:
        config = _gguf_config(file, "base_model")
    else:
        _check_folder(base_model, "base_model")
        source["local_files_only"] = _only_cached(base_model)
        config = _load_config(base_model, source, "base_model")
        _check_supported(base_model, config, "base_model")
    make = _maker(config, source)
    try:
        model = empty_model(config, make, resolved_dtype(config, dtype, {}))
        check_context(model.config, seq_len)
        describe(model, kinds)
        return model_shape(model)
    except GradPruneError:
        raise
    except Exception as error:  # a configuration whose values contradict each other
        raise CheckpointError(
            f"base_model: the configuration of '{base_model}' describes no model: {one_line(error)}"
        ) from error


def _maker(config: PreTrainedConfig, source: dict[str, bool]) -> Callable[..., Any]:
    """What makes a model of the configuration: gradprune's own class where layers differ."""
    if per_layer_overrides(config):
        return partial(_model_class(config)._from_config)
    return partial(_model_class(config).from_config, trust_remote_code=source["trust_remote_code"])


def _model_class(config: PreTrainedConfig) -> Any:
    """What loads a model of the configuration: gradprune's own class where layers differ, else one of transformers'."""
    auto = str(auto_class_name(config.model_type))
    return auto_class(config.model_type, auto) if per_layer_overrides(config) else getattr(transformers, auto)


def _fits(shape: ModelShape, job: Job, device: torch.device) -> bool:
    """Whether a job fits what is free on the device with the whole model; says so if it does not."""
    whole, streamed = (job.footprint(shape, streamed=how, device=device) for how in (False, True))
    free = free_memory(device)
    if whole.fits(free):
        return True
    logger.warning(
        "with the whole model, %s would hold %s, and %s are free on %s: decoder layers are streamed "
        "(stream_layers auto), which holds %s",
        *(whole.largest.name, with_unit(whole.peak), with_unit(free), device, with_unit(streamed.peak)),
    )
    return False


def _checked_folder(base_model: str | Path, config: PreTrainedConfig, source: dict[str, bool], argument: str) -> Path:
    """The folder with a checkpoint's files, downloaded if need be.

    Raises:
        CheckpointError, UnsupportedArchitectureError: transformers would read other files than safetensors, or there
            are none; they hold whole numbers.
    """
    if getattr(config, "transformers_weights", None) is not None:
        raise CheckpointError(
            f"{argument}: config.json of '{base_model}' names its weights' file (transformers_weights); only "
            "model.safetensors and its shards are read"
        )
    check_index(base_model, argument=argument, local_files_only=source["local_files_only"])
    try:
        folder = local_folder(base_model, local_files_only=source["local_files_only"])
    except OSError as error:
        raise _unreadable(base_model, error, argument) from error
    check_floating(folder, argument=argument)
    return folder


def _unreadable(base_model: str | Path, error: Exception, argument: str) -> CheckpointError:
    return CheckpointError(
        f"{argument}: the weights of '{base_model}' cannot be loaded: {one_line(error)} "
        "(whole safetensors files that fit config.json are needed; pickled .bin weights are never read)"
    )


def _check_complete(base_model: str | Path, found: dict[str, Any], argument: str) -> None:
    """Refuse weights that transformers would have made up or left out with no more than a warning."""
    if mismatched := sorted(found["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise CheckpointError(
            f"{argument}: {len(mismatched)} weights of '{base_model}' do not have the shape that its config.json "
            f"gives them, first {name}: {list(stored)} instead of {list(expected)}"
        )
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(
            f"{argument}: '{base_model}' lacks {counted(len(missing), 'weight')} that its config.json names, "
            f"first {missing[0]}"
        )
    if unused := sorted(key for key in found["unexpected_keys"] if ".layers." in key):
        raise CheckpointError(
            f"{argument}: '{base_model}' has {counted(len(unused), 'weight')} in layers that its config.json does not "
            f"name, first {unused[0]}; the config.json is another model's"
        )


def _load_tokenizer(base_model: str | Path, source: dict[str, bool], argument: str) -> PreTrainedTokenizerBase | None:
    folder = Path(base_model)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _VOCABULARIES):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base_model, **source)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CheckpointError(
            f"{argument}: the tokenizer of '{base_model}' cannot be loaded: {one_line(error)} "
            "(repair its files; a folder without any is loaded without a tokenizer)"
        ) from error
    return tokenizer
