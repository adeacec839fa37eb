"""Weights into safetensors files, one tensor after the other: no file is ever whole in memory.

The bytes are those that `model.save_pretrained` writes.
"""

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub import get_torch_storage_size, split_state_dict_into_shards_factory
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from gradprune.models.residency import Residency

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def save_streamed(model: PreTrainedModel, residency: Residency, folder: Path, *, max_shard_size: int) -> None:
    """Write what `model.save_pretrained` would if the model were whole in memory.

    Args:
        model: a streamed model, and its residency.
        residency: see above.
        folder: to write into.
        max_shard_size: bytes of a file; as in `save_pretrained`.

    Raises:
        OSError: a file cannot be written.
    """
    residency.release()
    # Tied weights once, under their first name, as transformers saves them.
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    tensors = {name: own[name].detach() for name in model.state_dict() if name in own}
    # The files may have others in their place, whose order decides what goes into which file.
    saved: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    alone = {name: revert_weight_conversion(model, {name: tensor}) for name, tensor in tensors.items()}
    source_of = {made: name for name, of_one in alone.items() for made in of_one}
    # Everything but the weights.
    model.save_pretrained(folder, state_dict={})
    (folder / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)
    # As transformers does, but for its way to tell storages apart, which does not work without memory.
    shards = split_state_dict_into_shards_factory(
        saved,
        get_storage_size=get_torch_storage_size,
        get_storage_id=lambda tensor: tensor.untyped_storage()._cdata,
        filename_pattern=SAFE_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=max_shard_size,
    )

    # The experts' weights come by turns from the two parameters of their layer.
    @lru_cache(maxsize=2)
    def read_source(name: str) -> dict[str, Tensor]:
        tensor = residency.read(name) if name in residency.sources else tensors[name].cpu()
        made: dict[str, Tensor] = revert_weight_conversion(model, {name: tensor})
        return made

    def read(name: str) -> Tensor:
        return read_source(source_of[name])[name]

    for name, members in shards.filename_to_tensors.items():
        write_safetensors(folder / name, {member: saved[member] for member in members}, read)
    if shards.is_sharded:
        # As transformers writes it.
        metadata = {"total_parameters": model.num_parameters(), **shards.metadata}
        index = {"metadata": metadata, "weight_map": shards.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Write a safetensors file, byte for byte as `safetensors.torch.save_file` does with transformers' metadata.

    Args:
        path: of the file, which is replaced.
        tensors: by name; only their shapes and dtypes are read, so that they may be on the meta device.
        read: gives the tensor of that name on the CPU; called once for each, in the order in which they are written.

    Raises:
        OSError: it cannot be written.
    """
    # The library's order: wider types first, which keeps all aligned; then by name.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(read(name).contiguous().reshape(-1).view(torch.uint8).numpy().data)
