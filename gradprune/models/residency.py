"""Residency: a model whose decoder layers' weights are in memory only while they are needed.

The embedding, the last norm and the head stay on the device. A decoder layer's parameters are placeholders on the meta
device until the layer runs: then its weights are read from their safetensors files, which are mapped and not read
whole, and they are let go when another layer is needed. While one layer computes on an accelerator, the next one is
read. Whoever runs the layers in order for many samples reads each weight once for all of them.

Everything else sees an ordinary model: it can be run, described, cut and saved. Cutting and re-solved weights change
where a weight comes from, see `Source`; no weight of the files is ever written to.
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
        """The weight on the CPU; it may share memory with a mapped file."""


class WeightFile:
    """A safetensors file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        """path: of the file, which stays open."""
        self.path = path

    @cached_property
    def _file(self) -> Any:
        return safe_open(self.path, framework="pt")

    def shape(self, name: str) -> list[int]:
        """Of a tensor in it."""
        return list(self._file.get_slice(name).get_shape())

    def names(self) -> list[str]:
        """Of all tensors in it."""
        return list(self._file.keys())

    def tensor(self, name: str) -> Tensor:
        """[...] on the CPU, a view of the file."""
        found: Tensor = self._file.get_tensor(name)
        return found


@dataclass(frozen=True)
class Stored:
    """A weight as it is in a file."""

    file: WeightFile
    name: str

    @property
    def shape(self) -> list[int]:
        """Of the weight, which is not read."""
        return self.file.shape(self.name)

    def read(self) -> Tensor:
        """As the file has it."""
        return self.file.tensor(self.name)


@dataclass(frozen=True)
class Selected:
    """A weight of which only some is left along a dimension: of all its entries alike, or of each its own.

    index: [k] int64, or [E, k] where each entry of the first dimension keeps its own.
    """

    whole: Source
    dim: int
    index: Tensor

    def read(self) -> Tensor:
        """A copy of what is left."""
        return selected(self.whole.read(), self.dim, self.index)


def selected(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """A new tensor with what is kept of `tensor`; arguments as of `Selected`."""
    index = index.to(tensor.device)
    if index.ndim == 1:
        return tensor.index_select(dim, index)
    return torch.stack([own.index_select(dim - 1, kept) for own, kept in zip(tensor, index, strict=True)])


@dataclass(frozen=True)
class Between:
    """A weight on the line through two others: `factor` times the way from the first to the second.

    dtype: that of the weight in the model.
    """

    start: Source
    end: Source
    factor: float
    dtype: torch.dtype

    def read(self) -> Tensor:
        """A new tensor."""
        return on_the_way(self.start.read().to(self.dtype), self.end.read().to(self.dtype), self.factor)


def on_the_way(start: Tensor, end: Tensor, factor: float) -> Tensor:
    """`factor` times the way from one tensor to the other of its shape and type.

    Where the factor is a power of two, its product is exact, and the result the same bits on any device.
    """
    return torch.add(start, end - start, alpha=factor)


class Spilled:
    """A tensor in a file without a name, mapped into memory: it goes with this object, or with the process."""

    def __init__(self, tensor: Tensor, folder: Path) -> None:
        """Write `tensor` into a new file in `folder`.

        Raises:
            OSError: it cannot be written.
        """
        numbers = tensor.detach().cpu().contiguous()
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(numbers.flatten().view(torch.uint8).numpy().data)
            file.flush()
            found = torch.from_file(file.name, shared=False, size=numbers.numel(), dtype=numbers.dtype)
        self._tensor = found.view(numbers.shape)

    def read(self) -> Tensor:
        """The tensor, on the CPU."""
        return self._tensor


class _Scratch:
    """A folder of this process alone among the system's temporary files, which is deleted with this object."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gradprune-"))
        # `TemporaryDirectory` warns where nobody closed it. Models are not closed: they go when nothing refers to them.
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


_RESIDENCIES: "weakref.WeakKeyDictionary[PreTrainedModel, Residency]" = weakref.WeakKeyDictionary()


def residency_of(model: PreTrainedModel) -> "Residency | None":
    """How the layers of a streamed model come and go; None for a model that is whole in memory."""
    return _RESIDENCIES.get(model)


class Residency:
    """The decoder layers of one model, of which at most one is in memory, and the next one while it is read.

    sources: by the parameter's name in the model, where the weights of the decoder layers come from.
    budget: bytes that the residual streams of the samples under way may take.
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
        """layers_path: of the decoder layers in the model.

        Args:
            layers_path, sources, budget: as above.
            device: of the weights in memory.
            prefetch: read the next layer while one computes; by default on accelerators, where it costs no time.
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
        """A copied model gets its own by `copy_for`."""
        return self

    def attach(self, model: PreTrainedModel) -> None:
        """Make each decoder layer of `model`, whose parameters are on the meta device, load itself when it runs."""
        layers = model.get_submodule(self._path)
        assert isinstance(layers, nn.ModuleList)
        self._layers = weakref.ref(layers)
        for index, layer in enumerate(layers):
            layer.forward = partial(self._run, index, type(layer).forward.__get__(layer))
        _RESIDENCIES[model] = self

    def copy_for(self, model: PreTrainedModel) -> "Residency":
        """The same weights for a copy of the model."""
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
        """Inside the context the weights of `layer` are in memory; `then` is the layer that will be needed next.

        Afterwards they stay until another layer is needed, or `release`.
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
        """Let go of all layers."""
        self._drop_ahead()
        if self._held is not None:
            for name, parameter in list(self._modules[self._held].named_parameters()):
                self._set(self._held, name, torch.empty_like(parameter, device="meta"))
        self._held = None

    def read(self, name: str) -> Tensor:
        """One weight by its name in the model, on the CPU and in the model's dtype."""
        return self.sources[name].read().to(self._dtype(name))

    def replace(self, layer: int, name: str) -> None:
        """The parameter of that name in `layer`, which is in memory, takes the place of the one in the files."""
        self.sources[self._name(layer, name)] = self.spill(self._modules[layer].get_parameter(name))

    def weights(self, names: Sequence[tuple[int, str]]) -> dict[str, Source]:
        """Where weights, each of a layer and by its name in it, come from now, by their names in the model."""
        return {full: self.sources[full] for full in (self._name(*each) for each in names)}

    def go_between(self, start: Mapping[str, Source], end: Mapping[str, Source], factor: float) -> None:
        """From now on weights come from `factor` times the way from one source to the other."""
        self.release()
        for name, source in start.items():
            if factor in (0.0, 1.0):
                self.sources[name] = end[name] if factor else source
            else:
                self.sources[name] = Between(source, end[name], factor, self._dtype(name))

    def cut(self, layer: int, name: str, dim: int, index: Tensor) -> None:
        """From now on only `index` is there of a parameter along `dim`, see `Selected`."""
        full = self._name(layer, name)
        self.sources[full] = Selected(self.sources[full], dim, index)

    def spill(self, tensor: Tensor) -> Spilled:
        """A copy of a weight in a scratch file, which goes away with what is returned.

        Raises:
            GradPruneError: the disk is full, or there is no folder for temporary files.
        """
        return self._spilled(tensor, "stream_layers: changed weights cannot")

    def mapped(self, tensor: Tensor) -> Tensor:
        """A copy on the CPU in a scratch file, mapped into memory, which the system writes out if it must.

        Raises:
            GradPruneError: as `spill`.
        """
        return self._spilled(tensor, f"stream_memory: what does not fit in {self.budget / 2**20:.0f} MiB cannot").read()

    def _spilled(self, tensor: Tensor, what: str) -> Spilled:
        """Raises `what` followed by where and why, where it cannot be written."""
        try:
            return Spilled(tensor, self.scratch)
        except OSError as error:
            folder = self._scratch.folder if self._scratch is not None else tempfile.tempdir or "TMPDIR"
            raise GradPruneError(
                f"{what} be written to '{folder}': {one_line(error)}; set TMPDIR to a folder on a larger disk"
            ) from error

    @property
    def scratch(self) -> Path:
        """A folder for this process alone, in the system's folder for temporary files."""
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
        """The layer's forward pass, with its weights in memory."""
        with self.resident(layer, then=layer + 1):
            return forward(*args, **kwargs)

    def _load(self, layer: int) -> None:
        """Make `layer` the one that is in memory."""
        if self._ahead is not None and self._ahead[0] == layer:
            ahead, self._ahead = self._ahead[1], None
            self._replace_held(layer, ahead.result())
        else:
            self.release()  # before anything is read, so that there are never two
            self._replace_held(layer, self._fetch(layer))

    def _replace_held(self, layer: int, weights: dict[str, Tensor]) -> None:
        self.release()
        for name, weight in weights.items():
            if weight.is_cuda:
                # It was allocated on the reader's stream: its memory is free again only after the work queued here.
                weight.record_stream(torch.cuda.current_stream(self.device))
            self._set(layer, name, weight)
        self._held = layer

    def _fetch(self, layer: int) -> dict[str, Tensor]:
        """The weights of a layer on the device, by name within the layer."""
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
        """The stream that layers come by: one, because PyTorch keeps freed memory for the stream it was taken on."""
        return torch.cuda.Stream(self.device)

    def _copied(self, layer: int, name: str) -> Tensor:
        """A copy in memory of its own: a mapped file's may lie where matrix products round differently."""
        full = self._name(layer, name)
        return self.sources[full].read().to(self.device, self._dtype(full), copy=True)

    def _dtype(self, name: str) -> torch.dtype:
        """Of a parameter in memory, by its name in the model; its placeholder has it, too."""
        layer, _, own = name.removeprefix(f"{self._path}.").partition(".")
        return self._modules[int(layer)].get_parameter(own).dtype

    def _set(self, layer: int, name: str, weight: Tensor) -> None:
        module, _, own = name.rpartition(".")
        self._modules[layer].get_submodule(module)._parameters[own] = nn.Parameter(weight, requires_grad=False)

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead[1].result()
            self._ahead = None
