"""Load dense and pruned models from safetensors files or a GGUF file, without ever unpickling anything."""

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

# Alignment of PyTorch's own allocations on the CPU, in bytes.
_ALIGNMENT = 64

# A folder with one of these files has a tokenizer. If there is only a tokenizer_config.json, transformers would make up
# an empty tokenizer.
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

    A checkpoint whose layers differ is loaded by gradprune's own classes, without running the code in its folder.

    Args:
        base_model: a folder, an id on the Hugging Face hub, or a GGUF file, see `gguf_source.find_gguf`.
        dtype: dtype of the weights, e.g. "bfloat16"; "auto" keeps the checkpoint's, or is float32 for a GGUF file.
        device: the device that the model is put on; "auto" is CUDA if available.
        device_map: how to divide the layers among several devices, as in the option of that name; None puts the whole
            model on `device`. accelerate moves the activations from device to device.
        trust_remote_code: whether code that comes with the checkpoint may be run.
        stream_layers: "on" leaves the decoder layers' weights in their files until they are needed, see
            `gradprune.models.residency`; "auto" does so if `job` would need more memory than is free on the device.
        stream_memory: memory for the residual streams of the samples of a streamed model, e.g. "4GiB".
        job: what the model will be used for, which decides how much memory is needed; by default a run of `prune` with
            its default options.
        argument: the option that `base_model` came from, for messages.

    Returns:
        The model in evaluation mode, and its tokenizer or None if the checkpoint has none.

    Raises:
        CheckpointError: the checkpoint is missing, truncated or incomplete, or has no safetensors files; or its
            tokenizer cannot be read.
        ConfigError: an argument is not a value that the option of its name accepts; stream_layers is "on" or a
            device_map is given for a GGUF file; a device does not exist; the devices of the device_map do not hold the
            model, or it divides a layer.
        UnsupportedArchitectureError: the model cannot be pruned, or its weights are quantised; raised before any weight
            is read.
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
    """A run of `prune` with the default options, except for `stream_memory`."""
    return Job(PruneConfig(stream_memory=stream_memory))


def load_pruned(
    directory: str | Path, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Load the model in the folder `model/` of a results folder; the widths of its layers may differ.

    Args:
        directory: the folder with `config.json` and the weights, in one or several safetensors files.
        dtype, device: see `load_model`.

    Raises:
        GradPruneError: see `load_model`.
    """
    return load_model(directory, dtype=dtype, device=device, argument="directory")[0]


def _load_gguf(
    file: Path, dtype: str, device: torch.device, argument: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model of a GGUF file, dequantised, and its tokenizer."""
    # Called only for its checks, so that an unsupported model is refused before any weight is read.
    _gguf_config(file, argument)
    source = {"gguf_file": file.name, "local_files_only": True}
    try:
        # The type annotation of from_pretrained ignores that output_loading_info makes it return a pair.
        model_class: Any = AutoModelForCausalLM
        with _hidden_reader_bar():
            model, found = model_class.from_pretrained(
                file.parent, **source, dtype=getattr(torch, dtype), output_loading_info=True
            )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
        split_as_the_file_says(tokenizer, file)
    except Exception as error:
        raise _gguf_error(file, error, argument) from error
    _check_complete(file, found, argument)
    plain: Any = plain_copy(model)
    return plain.to(device).eval(), tokenizer


def _gguf_config(file: Path, argument: str) -> PreTrainedConfig:
    """Read the configuration of a GGUF file's model and check that it can be pruned."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except Exception as error:
        raise _gguf_error(file, error, argument) from error
    _check_supported(file, config, argument)
    return config


def _gguf_error(file: Path, error: Exception, argument: str) -> CheckpointError:
    """The error for a damaged GGUF file, in place of almost any error that transformers' readers raise for one."""
    return CheckpointError(f"{argument}: '{file}' cannot be read as a GGUF model: {one_line(error)}")


@contextmanager
def _hidden_reader_bar() -> Iterator[None]:
    """Context manager that hides the progress bar of transformers' GGUF reader, which ignores the global switch."""
    # Imported here because it is needed only for GGUF files.
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
    """Refuse a path that is not a checkpoint folder before it is looked up on the hub as an id."""
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
    """Whether to skip the hub: the checkpoint is a folder, or the hub, whose client is slow to fail, is unreachable."""
    return Path(base_model).is_dir() or hub_fault() is not None


def _load_config(base_model: str | Path, source: dict[str, bool], argument: str) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = _config_class(base_model, source).from_pretrained(base_model, **source)
        per_layer_overrides(config)
    except Exception as error:  # transformers can raise almost anything for a damaged config.json
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
    """The class that reads the configuration: gradprune's own if layers differ, which some stock ones cannot read."""
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
    """Load the model onto the devices of a device map."""
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
    # Mismatched shapes are collected here and refused below, because transformers' own error does not name the weight.
    options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, found = model_class.from_pretrained(base_model, config=config, **options)
    except Exception as error:  # almost anything, as in `_load_config`: the configuration's values are first used here
        raise _unreadable(base_model, error, argument) from error
    _check_complete(base_model, found, argument)
    return model


def _aligned(model: PreTrainedModel) -> PreTrainedModel:
    """Copy CPU weights that are not aligned as PyTorch aligns its own, because rounding depends on alignment.

    On CPUs, the rounding of a matrix product depends on the alignment of the matrix in memory. transformers leaves
    weights in the mapped file at arbitrary offsets, so the same weights in a different file would give different
    results. They are copied one by one, so that pages of the file can be evicted as the copies are allocated.
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
    """Build the model without weights and find its weights in the files of `folder`."""
    try:
        return EmptyModel(folder, config, _maker(config, source), dtype, argument)
    except GradPruneError:
        raise
    except Exception as error:  # almost anything, as in `_load_weights`
        raise _unreadable(base_model, error, argument) from error


def _must_stream(model: PreTrainedModel, job: Job, device: torch.device) -> bool:
    """Whether the job with the whole model would exceed the device's free memory; logs a warning if so."""
    return not _fits(model_shape(model), job, device)


def _streamed(
    empty: EmptyModel, base_model: str | Path, argument: str, *, device: torch.device, budget: int
) -> PreTrainedModel:
    """Load the weights of an empty model except for the decoder layers', which stay in their files."""
    _check_complete(base_model, empty.found, argument)
    try:
        return empty.streamed(device, budget)
    except Exception as error:  # almost anything, as in `_load_weights`
        raise _unreadable(base_model, error, argument) from error


def load_shape(
    base_model: str | Path,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    seq_len: int = 1,
    kinds: Collection[str] | None = None,
) -> ModelShape:
    """Return the sizes of a checkpoint's model, reading only its configuration.

    Args:
        base_model: a folder with config.json, an id on the Hugging Face hub, or a GGUF file, see
            `gguf_source.find_gguf`.
        dtype: dtype of the weights; "auto" is the one that the configuration states, or float32 if it states none.
        trust_remote_code: whether code that comes with the checkpoint may be run.
        seq_len, kinds: the tokens per sample and the kinds of groups that a run requires of the model. By
            default, one token and whatever kinds the model has.

    Raises:
        CheckpointError: the configuration is missing or damaged.
        UnsupportedArchitectureError: the model cannot be pruned.
        CalibrationError: the model's context is shorter than `seq_len`.
        ConfigError: the model has no groups of one of the `kinds`.
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
    """The callable that builds a model from the configuration, of gradprune's own class if layers differ."""
    if per_layer_overrides(config):
        return partial(_model_class(config)._from_config)
    return partial(_model_class(config).from_config, trust_remote_code=source["trust_remote_code"])


def _model_class(config: PreTrainedConfig) -> Any:
    """The class that loads the model: gradprune's own if layers differ, else an auto class of transformers."""
    auto = str(auto_class_name(config.model_type))
    return auto_class(config.model_type, auto) if per_layer_overrides(config) else getattr(transformers, auto)


def _fits(shape: ModelShape, job: Job, device: torch.device) -> bool:
    """Whether the job with the whole model fits into the device's free memory; logs a warning if not."""
    whole, streamed = (job.footprint(shape, streamed=how, device=device) for how in (False, True))
    free = free_memory(device)
    if whole.fits(free):
        return True
    logger.warning(
        "with the whole model, %s would need %s of memory, but %s are free on %s: decoder layers are streamed "
        "(stream_layers auto), which needs %s",
        *(whole.largest.name, with_unit(whole.peak), with_unit(free), device, with_unit(streamed.peak)),
    )
    return False


def _checked_folder(base_model: str | Path, config: PreTrainedConfig, source: dict[str, bool], argument: str) -> Path:
    """Return the folder with a checkpoint's files, downloaded if necessary, after checking the weight files.

    Raises:
        CheckpointError: there are no intact safetensors files, or transformers would read other files.
        UnsupportedArchitectureError: weights are stored as integers or in 8 bits.
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
    """Refuse missing, mismatched or unused weights, which transformers makes up or ignores with only a warning."""
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
