"""Residency: a model whose decoder layers' weights are in memory only while they are needed.

The embedding, the last norm and the head stay on the device. A decoder layer's parameters are placeholders on the meta
device until the layer runs: then its weights are read from their safetensors files, which are mapped and not read
whole, and they are freed when another layer is needed. While one layer computes on an accelerator, the next one is
read. A caller that runs the layers in order for many samples reads each weight once for all of them.

To all other code it is an ordinary model: it can be run, described, cut and saved. Cutting and re-solving change where
a weight comes from, see `Source`; the files are never written to.
"""

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradprune.errors import GradPruneError, one_line


class Source(Protocol):
    """Where a weight comes from."""

    def read(self) -> Tensor:
        """Return the weight on the CPU; it may share memory with a mapped file."""


class WeightFile:
    """A safetensors file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        """path: the file's path; from its first use on the file stays open."""
        self.path = path

    @cached_property
    def _file(self) -> Any:
        return safe_open(self.path, framework="pt")

    def shape(self, name: str) -> list[int]:
        """The shape of the tensor of that name, which is not read."""
        return list(self._file.get_slice(name).get_shape())

    def names(self) -> list[str]:
        """The names of all tensors in the file."""
        return list(self._file.keys())

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name on the CPU, a view of the mapped file."""
        found: Tensor = self._file.get_tensor(name)
        return found


@dataclass(frozen=True)
class Stored:
    """A weight as it is stored in a file."""

    file: WeightFile
    name: str

    @property
    def shape(self) -> list[int]:
        """The weight's shape; the weight is not read."""
        return self.file.shape(self.name)

    def read(self) -> Tensor:
        """Return the weight, a view of the mapped file."""
        return self.file.tensor(self.name)


@dataclass(frozen=True)
class Selected:
    """The part of a weight that is left after cutting along one dimension.

    whole: the weight before the cut.
    dim: the dimension that is cut.
    index: the indices kept, [k] int64; or [E, k] if each entry of the first dimension keeps different ones.
    """

    whole: Source
    dim: int
    index: Tensor

    def read(self) -> Tensor:
        """Return a copy of the part that is left."""
        return selected(self.whole.read(), self.dim, self.index)


def selected(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """Return a new tensor with the part of `tensor` that is kept; for `dim` and `index` see `Selected`."""
    index = index.to(tensor.device)
    if index.ndim == 1:
        return tensor.index_select(dim, index)
    return torch.stack([own.index_select(dim - 1, kept) for own, kept in zip(tensor, index, strict=True)])


@dataclass(frozen=True)
class Between:
    """A weight between two others: the point at `factor` of the way from `start` (0) to `end` (1).

    dtype: the weight's dtype in the model.
    """

    start: Source
    end: Source
    factor: float
    dtype: torch.dtype

    def read(self) -> Tensor:
        """Return the weight as a new tensor."""
        return on_the_way(self.start.read().to(self.dtype), self.end.read().to(self.dtype), self.factor)


def on_the_way(start: Tensor, end: Tensor, factor: float) -> Tensor:
    """Return the tensor at `factor` of the way from `start` to `end`, which have the same shape and dtype.

    If the factor is a power of two, the product with it is exact, so that the result has the same bits on any device.
    """
    return torch.add(start, end - start, alpha=factor)


class Spilled:
    """A tensor in an unnamed file, mapped into memory; the file is freed with this object or at the process's end."""

    def __init__(self, tensor: Tensor, folder: Path) -> None:
        """Write `tensor` into a new file in `folder`.

        Raises:
            OSError: the file cannot be written.
        """
        numbers = tensor.detach().cpu().contiguous()
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(numbers.flatten().view(torch.uint8).numpy().data)
            file.flush()
            found = torch.from_file(file.name, shared=False, size=numbers.numel(), dtype=numbers.dtype)
        self._tensor = found.view(numbers.shape)

    def read(self) -> Tensor:
        """Return the tensor, on the CPU."""
        return self._tensor


class _Scratch:
    """A folder for this process only, in the system's folder for temporary files; it is deleted with this object."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gradprune-"))
        # `TemporaryDirectory` would warn that nobody has closed it, because models are not closed: they are freed when
        # nothing refers to them any more.
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


_RESIDENCIES: "weakref.WeakKeyDictionary[PreTrainedModel, Residency]" = weakref.WeakKeyDictionary()


def residency_of(model: PreTrainedModel) -> "Residency | None":
    """The object that loads and frees a streamed model's layers; None for a model that is whole in memory."""
    return _RESIDENCIES.get(model)


class Residency:
    """Loads and frees the decoder layers of one model: at most one is in memory, besides the one being read ahead.

    sources: where the decoder layers' weights come from, by the parameters' names in the model.
    budget: the bytes that the residual streams of the samples being processed may take.
    """

    def __init__(
        self,
        layers_path: str,
        sources: dict[str, Source],
        *,
        device: torch.device,
        budget: int,
        prefetch: bool | None = None,
    ) -> None:
        """Set up a residency, which controls no model before `attach`.

        Args:
            layers_path: path of the decoder layers in the model.
            sources, budget: see the class.
            device: where weights are loaded to.
            prefetch: whether to read the next layer while one computes; None: only on accelerators, where this costs no
                time.
        """
        self.sources, self.budget, self.device = sources, budget, device
        self._path = layers_path
        self._prefetch = device.type != "cpu" if prefetch is None else prefetch
        self._layers: weakref.ref[nn.ModuleList]
        self._held: int | None = None
        self._users = 0
        self._ahead: tuple[int, Future[dict[str, Tensor]]] | None = None
        self._reader = ThreadPoolExecutor(1)
        self._scratch: _Scratch | None = None

    def __deepcopy__(self, _memo: dict[int, Any]) -> "Residency":
        """Return this object itself, because a copied model gets a residency of its own by `copy_for`."""
        return self

    def attach(self, model: PreTrainedModel) -> None:
        """Make `model`'s decoder layers, whose parameters are on the meta device, load their weights when they run."""
        layers = model.get_submodule(self._path)
        assert isinstance(layers, nn.ModuleList)
        self._layers = weakref.ref(layers)
        for index, layer in enumerate(layers):
            layer.forward = partial(self._run, index, type(layer).forward.__get__(layer))
        _RESIDENCIES[model] = self

    def copy_for(self, model: PreTrainedModel) -> "Residency":
        """Return a residency for a copy of the model, with the same sources of weights."""
        copied = Residency(
            self._path,
            dict(self.sources),
            device=self.device,
            budget=self.budget,
            prefetch=self._prefetch,
        )
        copied._scratch = self._scratch
        copied.attach(model)
        return copied

    @contextmanager
    def resident(self, layer: int, then: int | None = None) -> Iterator[None]:
        """Context manager in which the weights of `layer` are in memory; `then` is the layer needed next, if any.

        Afterwards they stay in memory until another layer is needed or `release` is called.
        """
        if self._held != layer:
            assert not self._users, f"layer {self._held} is in use"
            self._load(layer)
        if self._prefetch and then is not None and 0 <= then < len(self._modules) and self._ahead is None:
            self._ahead = then, self._reader.submit(self._fetch, then)
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1

    def release(self) -> None:
        """Free the weights of all layers."""
        self._drop_ahead()
        if self._held is not None:
            for name, parameter in list(self._modules[self._held].named_parameters()):
                self._set(self._held, name, torch.empty_like(parameter, device="meta"))
        self._held = None

    def read(self, name: str) -> Tensor:
        """Return the weight of that name in the model, on the CPU and in the model's dtype."""
        return self.sources[name].read().to(self._dtype(name))

    def replace(self, layer: int, name: str) -> None:
        """Write a parameter of `layer`, which is in memory, to disk, and from now on read it from there.

        name: the parameter's name in the layer.
        """
        self.sources[self._name(layer, name)] = self.spill(self._modules[layer].get_parameter(name))

    def weights(self, names: Sequence[tuple[int, str]]) -> dict[str, Source]:
        """The current sources of weights, by their names in the model; each is given as (layer, name in the layer)."""
        return {full: self.sources[full] for full in (self._name(*each) for each in names)}

    def go_between(self, start: Mapping[str, Source], end: Mapping[str, Source], factor: float) -> None:
        """From now on, read weights at `factor` of the way from their sources in `start` to those in `end`."""
        self.release()
        for name, source in start.items():
            if factor in (0.0, 1.0):
                self.sources[name] = end[name] if factor else source
            else:
                self.sources[name] = Between(source, end[name], factor, self._dtype(name))

    def cut(self, layer: int, name: str, dim: int, index: Tensor) -> None:
        """From now on, read only the part of a layer's parameter that is kept, see `Selected`."""
        full = self._name(layer, name)
        self.sources[full] = Selected(self.sources[full], dim, index)

    def spill(self, tensor: Tensor) -> Spilled:
        """Copy a weight to a scratch file, which is freed with the returned object.

        Raises:
            GradPruneError: the disk is full, or there is no folder for temporary files.
        """
        return self._spilled(tensor, "stream_layers: changed weights cannot")

    def mapped(self, tensor: Tensor) -> Tensor:
        """Return a copy on the CPU, in a mapped scratch file, which the system can write out if memory is short.

        Raises:
            GradPruneError: see `spill`.
        """
        return self._spilled(tensor, f"stream_memory: what does not fit in {self.budget / 2**20:.0f} MiB cannot").read()

    def _spilled(self, tensor: Tensor, what: str) -> Spilled:
        """Copy a tensor to a scratch file, or raise GradPruneError: `what`, followed by where and why it failed."""
        try:
            return Spilled(tensor, self.scratch)
        except OSError as error:
            folder = self._scratch.folder if self._scratch is not None else tempfile.tempdir or "TMPDIR"
            raise GradPruneError(
                f"{what} be written to '{folder}': {one_line(error)}; set TMPDIR to a folder on a larger disk"
            ) from error

    @property
    def scratch(self) -> Path:
        """A folder for this process only, in the system's folder for temporary files; created on first use."""
        if self._scratch is None:
            self._scratch = _Scratch()
        return self._scratch.folder

    @property
    def _modules(self) -> nn.ModuleList:
        layers = self._layers()
        assert layers is not None
        return layers

    def _name(self, layer: int, name: str) -> str:
        return f"{self._path}.{layer}.{name}"

    def _run(self, layer: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the layer's forward pass with its weights in memory, reading the next layer ahead."""
        with self.resident(layer, then=layer + 1):
            return forward(*args, **kwargs)

    def _load(self, layer: int) -> None:
        """Load the weights of `layer`, and free those of the layer in memory."""
        if self._ahead is not None and self._ahead[0] == layer:
            ahead, self._ahead = self._ahead[1], None
            self._replace_held(layer, ahead.result())
        else:
            self.release()  # before anything is read, so that two layers are never in memory
            self._replace_held(layer, self._fetch(layer))

    def _replace_held(self, layer: int, weights: dict[str, Tensor]) -> None:
        self.release()
        for name, weight in weights.items():
            if weight.is_cuda:
                # The weight was allocated on the CUDA stream that copies: its memory must not be reused before the work
                # queued on the current stream is done.
                weight.record_stream(torch.cuda.current_stream(self.device))
            self._set(layer, name, weight)
        self._held = layer

    def _fetch(self, layer: int) -> dict[str, Tensor]:
        """Read the weights of a layer, by name within the layer, to the device."""
        names = [name for name, _ in self._modules[layer].named_parameters()]
        with torch.inference_mode(False), torch.no_grad():
            if self.device.type != "cuda":
                return {name: self._copied(layer, name) for name in names}
            with torch.cuda.stream(self._copying):
                pinned = {name: self.read(self._name(layer, name)).pin_memory() for name in names}
                weights = {name: weight.to(self.device, non_blocking=True) for name, weight in pinned.items()}
            self._copying.synchronize()
            return weights

    @cached_property
    def _copying(self) -> torch.cuda.Stream:
        """The one CUDA stream that copies layers: PyTorch reuses freed memory only for the stream that allocated it."""
        return torch.cuda.Stream(self.device)

    def _copied(self, layer: int, name: str) -> Tensor:
        """Copy a weight to memory of its own: at a mapped file's addresses, matrix products may round differently."""
        full = self._name(layer, name)
        return self.sources[full].read().to(self.device, self._dtype(full), copy=True)

    def _dtype(self, name: str) -> torch.dtype:
        """The dtype of a parameter, by its name in the model; a placeholder on the meta device has it, too."""
        layer, _, own = name.removeprefix(f"{self._path}.").partition(".")
        return self._modules[int(layer)].get_parameter(own).dtype

    def _set(self, layer: int, name: str, weight: Tensor) -> None:
        module, _, own = name.rpartition(".")
        self._modules[layer].get_submodule(module)._parameters[own] = nn.Parameter(weight, requires_grad=False)

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead[1].result()
            self._ahead = None
