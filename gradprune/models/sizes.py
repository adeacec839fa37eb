"""How much memory a run holds, from a model's shape alone: whole in memory, or streamed layer by layer."""

from dataclasses import dataclass

import psutil
import torch
from transformers import PreTrainedModel

from gradprune.models.view import layers_of

# The head runs in chunks, see `gradprune.models.loss`.
_LOGITS, _MIN_TOKENS = 2**20, 256


@dataclass(frozen=True)
class ModelShape:
    """What memory depends on.

    layer_parameters: of each decoder layer. outside: parameters that are in no decoder layer, tied ones once.
    hidden, intermediate, vocabulary: widths; `intermediate` is the widest MLP's. itemsize: bytes of a weight.
    """

    layer_parameters: tuple[int, ...]
    outside: int
    hidden: int
    intermediate: int
    vocabulary: int
    itemsize: int

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.outside + sum(self.layer_parameters)

    @property
    def bytes(self) -> int:
        """Of all weights."""
        return self.parameters * self.itemsize


@dataclass(frozen=True)
class StreamedMemory:
    """Bytes that calibration holds where a model is streamed, and bytes that it reads.

    weights: embedding, last norm and head, and one decoder layer (two where the next one is read ahead), on the device.
    activations: of one layer for one batch, and a chunk of logits, on the device.
    streams: of one wave, in the host's memory.
    waves: how often the samples are divided; moved: bytes of weights read in all of them.
    """

    weights: int
    activations: int
    streams: int
    waves: int
    moved: int


def model_shape(model: PreTrainedModel, itemsize: int | None = None) -> ModelShape:
    """The shape of a model, which may be on the meta device or streamed.

    Args:
        model: a supported causal LM.
        itemsize: bytes of a weight; by default those of the model's dtype.
    """
    layers = layers_of(model)
    own = tuple(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers.children())
    hidden: int = model.config.hidden_size
    widths = [p.shape[1] for name, p in layers.named_parameters() if name.endswith("down_proj.weight")]
    vocabulary: int = model.config.vocab_size
    outside = sum(parameter.numel() for parameter in model.parameters()) - sum(own)
    return ModelShape(own, outside, hidden, max(widths, default=0), vocabulary, itemsize or model.dtype.itemsize)


def streamed_memory(
    shape: ModelShape, *, num_samples: int, seq_len: int, batch_size: int, budget: int, prefetch: bool
) -> StreamedMemory:
    """What the calibration of a streamed model takes.

    Args:
        shape: of the model.
        num_samples, seq_len, batch_size: the samples, and how they are divided into batches.
        budget: `stream_memory`; a single batch is never divided further.
        prefetch: whether the next layer is read while one computes, as on accelerators.

    Activations are estimated: per token 12 residual-wide and 6 MLP-wide tensors are alive while a layer is recomputed.
    """
    layers = len(shape.layer_parameters)
    batch = min(batch_size, num_samples) * seq_len
    stream = batch * shape.hidden * shape.itemsize
    batches = -(-num_samples // batch_size)
    together = max(1, min(batches, budget // (stream * (layers + 1))))
    chunk = min(batch, max(_MIN_TOKENS, _LOGITS // shape.vocabulary))
    waves = -(-batches // together)
    return StreamedMemory(
        weights=(shape.outside + (1 + prefetch) * max(shape.layer_parameters)) * shape.itemsize,
        activations=batch * (12 * shape.hidden + 6 * shape.intermediate) * shape.itemsize
        + 12 * chunk * shape.vocabulary,
        # The gradients take the place of the uppermost streams.
        streams=together * stream * (layers + 2),
        waves=waves,
        moved=2 * waves * sum(shape.layer_parameters) * shape.itemsize,
    )


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; on the CPU, that can be had without swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def in_gib(size: int) -> str:
    """As "14.9 GiB"."""
    return f"{size / 2**30:,.1f} GiB"
