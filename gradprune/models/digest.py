"""A digest of a model: 64 characters that identify what it computes."""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradprune.models.residency import residency_of

# Entries of the configuration that may differ between copies of the same model: they say where it was read from, by
# which release, and what generation does.
_INCIDENTAL = ("_name_or_path", "transformers_version", "architectures", "auto_map", "use_cache", "output_attentions")
_CHUNK = 1 << 24  # elements that are copied to the host at a time


def model_digest(model: PreTrainedModel) -> str:
    """SHA-256 in hexadecimal of all weights and buffers, with names, shapes and dtypes, and of the configuration.

    The weights are read once, each thread hashing one tensor at a time, because hashing runs outside Python's lock.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in _INCIDENTAL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    tensors, residency = dict(model.state_dict()), residency_of(model)

    def of(name: str) -> bytes:
        if residency is not None and name in residency.sources:
            return _tensor_digest(residency.read(name))
        return _tensor_digest(tensors[name])

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name, found in zip(tensors, pool.map(of, tensors), strict=True):
            digest.update(name.encode() + found)
    return digest.hexdigest()


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256, in hexadecimal, of tensors with their shapes and dtypes."""
    return hashlib.sha256(b"".join(_tensor_digest(tensor) for tensor in tensors)).hexdigest()


def _tensor_digest(tensor: Tensor) -> bytes:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    for chunk in tensor.detach().reshape(-1).split(_CHUNK):
        digest.update(memoryview(chunk.cpu().contiguous().view(torch.uint8).numpy()))
    return digest.digest()
