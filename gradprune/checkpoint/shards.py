"""Write weights into safetensors files tensor by tensor, so that no file is ever in memory as a whole.

The bytes are the same as those that `model.save_pretrained` writes.
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
    """Write the files that `model.save_pretrained` would write if the whole model were in memory.

    Args:
        model: a streamed model.
        residency: its residency, which reads the decoder layers' weights.
        folder: an existing folder to write into.
        max_shard_size: maximum bytes of a weights file, as in `save_pretrained`.

    Raises:
        OSError: a file cannot be written.
    """
    residency.release()
    # Tied weights are saved once, under their first name, as transformers does.
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    tensors = {name: own[name].detach() for name in model.state_dict() if name in own}
    # The files may hold other tensors in place of the model's, e.g. one per expert. Their order decides which file each
    # is written to.
    saved: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    alone = {name: revert_weight_conversion(model, {name: tensor}) for name, tensor in tensors.items()}
    source_of = {made: name for name, of_one in alone.items() for made in of_one}
    # This writes everything except for the weights.
    model.save_pretrained(folder, state_dict={})
    (folder / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)
    # As in transformers, except that its way to tell storages apart does not work for tensors on the meta device.
    shards = split_state_dict_into_shards_factory(
        saved,
        get_storage_size=get_torch_storage_size,
        get_storage_id=lambda tensor: tensor.untyped_storage()._cdata,
        filename_pattern=SAFE_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=max_shard_size,
    )

    # The experts' weights come alternately from the two parameters of their layer, so both stay in the cache.
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
        # The same content and format as transformers writes.
        metadata = {"total_parameters": model.num_parameters(), **shards.metadata}
        index = {"metadata": metadata, "weight_map": shards.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Write a safetensors file, byte for byte as `safetensors.torch.save_file` does with transformers' metadata.

    Args:
        path: path of the file; an existing file is replaced.
        tensors: the tensors by name; only their shapes and dtypes are used, so they may be on the meta device.
        read: returns the tensor of a given name on the CPU; called once per tensor, in the order of writing.

    Raises:
        OSError: the file cannot be written.
    """
    # The order of safetensors: by decreasing element size, which keeps all tensors aligned, then by name.
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
