"""Residual streams: run a model layer by layer and block by block, with replaced block outputs.

A decoder layer adds its blocks' outputs to the stream. Here a block is run up to its output projection, so that the
projection's input is known for all batches; the caller computes the block's output from this input with weights of its
own, and the rest of the layer runs with that output. So every module runs once per layer, and no weight of the model is
changed.

If the model is streamed (see `gradprune.models.residency`) or spread over devices, the streams between its layers are
kept in the host's memory, and only one batch at a time is on the layer's device. If they would exceed a streamed
model's budget, they are kept in mapped files.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gradprune.models import Block, LinearBlock, PrunableModel
from gradprune.models.experts import ExpertProduct, ExpertProjection, ExpertsBlock, Routed
from gradprune.models.loss import sample_losses
from gradprune.models.modeling_gradprune import text_config
from gradprune.models.modes import forward_replaced, hooks_removed

_Item = TypeVar("_Item")


class _StoppedError(Exception):
    """Ends a forward pass early, because nothing after this point is needed."""


def stream_bytes(view: PrunableModel, batches: Sequence[Tensor]) -> int:
    """Total bytes of one residual stream [N, T, H] per batch [N, T]."""
    hidden: int = text_config(view.model.config).hidden_size
    return sum(batch.numel() for batch in batches) * hidden * view.model.dtype.itemsize


def read_bytes(view: PrunableModel, batches: Sequence[Tensor]) -> int:
    """Total bytes of the widest output projection's input, [N, T, I] per batch [N, T]."""
    widest = max((block.read_width for block in view.blocks), default=0)
    return sum(batch.numel() for batch in batches) * widest * view.model.dtype.itemsize


class Streams:
    """Runs single layers on some batches: holds the arguments that the layers receive; the caller keeps the streams."""

    def __init__(self, view: PrunableModel, batches: Sequence[Tensor], kept: int = 0) -> None:
        """Record the arguments that the layers receive for batches of ids, without running them.

        Args:
            view: the model.
            batches: token ids, [N, T] int64 each.
            kept: at most how many bytes of the tensors that it gets from here the caller keeps at the same time.
        """
        self._view = view
        self._home = torch.device("cpu") if view.spread or view.residency is not None else view.device
        residency = view.residency
        self._files = residency if residency is not None and kept > residency.budget else None
        self._batches = [batch.to(view.device) for batch in batches]
        self._returned = self._count_returned(self._batches[0][:1]) if self._batches else {}
        recorded = [self._record(batch) for batch in self._batches]
        self._first = [self.keep(stream) for stream, _ in recorded]
        # What transformers passes to each layer in addition to the stream, such as masks and positions.
        self._arguments = [arguments for _, arguments in recorded]

    def take_first(self) -> list[Tensor]:
        """Return the first layer's input [N, T, H] per batch; only once, because this object then lets go of it."""
        first, self._first = self._first, []
        return first

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a tensor of one batch, moved to where such tensors of all batches have room."""
        return tensor.to(self._home) if self._files is None else self._files.mapped(tensor)

    def run_layer(
        self, layer: int, batch: int, stream: Tensor, written: Mapping[nn.Module, Tensor] | None = None
    ) -> Tensor:
        """Return the stream [N, T, H] after a layer; modules in `written` are not run, but return the given tensors."""
        return self.keep(self.run_layer_on_device(layer, batch, stream.to(self._view.device_of(layer)), written))

    def run_layer_on_device(
        self, layer: int, batch: int, stream: Tensor, written: Mapping[nn.Module, Tensor] | None = None
    ) -> Tensor:
        """See `run_layer`; the stream is on the layer's device already, and the result is there and differentiable."""
        # Copies, because some layers add in place to the tensor that one of their blocks has returned.
        answers = {module: value.clone() for module, value in (written or {}).items()}
        with self._answering(answers, self._view.device_of(layer)):
            output = self._view.layers[layer](stream, **self._arguments[batch][layer])
        after: Tensor = output[0] if isinstance(output, tuple) else output
        return after

    def layer_and_written(self, layer: int, batch: int, stream: Tensor) -> tuple[Tensor, dict[nn.Module, Tensor]]:
        """Run a whole layer; return the stream after it, and what each of its blocks wrote, by the block's module."""
        written: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, _args: Any, output: Any) -> None:
            written[module] = self.keep((output[0] if isinstance(output, tuple) else output).clone())

        with hooks_removed([block.module.register_forward_hook(keep) for block in self._view.of_layer(layer)]):
            return self.run_layer(layer, batch, stream), written

    def layer_and_reads(
        self,
        layer: int,
        batch: int,
        stream: Tensor,
        linear: Mapping[LinearBlock, Callable[[Tensor], object]],
        experts: Mapping[ExpertsBlock, Callable[[tuple[Routed, Tensor]], object]],
    ) -> Tensor:
        """Run a whole layer, show what its blocks' output projections read, and return the stream after it.

        Args:
            layer, batch, stream: see `run_layer`.
            linear: for each block, a function called with its output projection's input [N, T, I], on the layer's
                device.
            experts: for each block of experts, a function called with the routing of the tokens and the output
                projections' inputs [R, C]; both are where `keep` puts them.
        """
        with ExitStack() as stack:
            for block, seen in linear.items():
                hook = partial(_show_first, seen)
                stack.enter_context(hooks_removed([block.output.linear.register_forward_pre_hook(hook)]))
            for routed, shown in experts.items():
                stack.enter_context(routed.run_by(self._showing(routed, shown)))
            return self.run_layer(layer, batch, stream)

    def output_input(self, block: LinearBlock, batch: int, stream: Tensor, written: dict[nn.Module, Tensor]) -> Tensor:
        """Return a block's output projection's input [N, T, I], on the layer's device.

        The modules in `written` are not run, but return the given tensors.
        """
        reached: list[Tensor] = []

        def stop(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            reached.append(args[0])
            raise _StoppedError

        with hooks_removed([block.output.linear.register_forward_pre_hook(stop)]):
            try:
                self.run_layer(block.layer, batch, stream, written)
            except _StoppedError:
                return reached[0]
        raise AssertionError(f"layer {block.layer} does not run its {block.output.path}")

    def block_output(self, block: Block, batch: int, stream: Tensor, written: dict[nn.Module, Tensor]) -> Tensor:
        """Return the output of a block's module; modules in `written` are not run, but return the given tensors."""
        reached: list[Tensor] = []

        def stop(_module: nn.Module, _args: Any, output: Any) -> None:
            reached.append(output[0] if isinstance(output, tuple) else output)
            raise _StoppedError

        with hooks_removed([block.module.register_forward_hook(stop)]), suppress(_StoppedError):
            self.run_layer(block.layer, batch, stream, written)
        return self.keep(reached[0])

    def expert_inputs(
        self, block: ExpertsBlock, batch: int, stream: Tensor, written: dict[nn.Module, Tensor]
    ) -> tuple[Routed, Tensor, Tensor]:
        """Return which tokens a layer's experts see, their output projections' inputs [R, C] and their module's output.

        For the arguments see `output_input`.
        """
        seen: list[tuple[Routed, Tensor]] = []
        with block.run_by(self._showing(block, seen.append)):
            wrote = self.block_output(block, batch, stream, written)
        return *seen[0], wrote

    def _showing(self, block: ExpertsBlock, seen: Callable[[tuple[Routed, Tensor]], object]) -> ExpertProduct:
        """Return a function that computes experts' projections and calls `seen` with the output projections' inputs."""

        def product(routed: Routed, projection: ExpertProjection, x: Tensor) -> Tensor:
            if projection is block.down:
                inputs = self.keep(x)
                seen((routed.to(inputs.device), inputs))
            return projection.product(routed, x)

        return product

    def losses_of(self, streams: Sequence[Tensor]) -> Tensor:
        """Each sample's loss in nats per token, [samples] fp64 on the CPU, given the streams after the last layer."""
        found = [self.losses(batch, stream.to(self._view.device)) for batch, stream in enumerate(streams)]
        return torch.cat(found).double().cpu()

    def losses(self, batch: int, stream: Tensor) -> Tensor:
        """Each sample's loss, [N], given the stream after the last layer, on the device; differentiable."""
        with self._answering(dict.fromkeys(self._view.layers, stream), self._view.device):
            return sample_losses(self._view.model, self._batches[batch])

    def last_hidden(self, batch: int, stream: Tensor) -> Tensor:
        """The decoder's last hidden states [N, T, H], which the head reads, given the stream after the last layer.

        They are on the device and differentiable.
        """
        with self._answering(dict.fromkeys(self._view.layers, stream), self._view.device):
            decoder = self._view.model.get_decoder()
            found: Tensor = decoder(input_ids=self._batches[batch], use_cache=False).last_hidden_state
        return found

    def _count_returned(self, ids: Tensor) -> dict[type[nn.Module], int]:
        """For each class of layers and of blocks' modules, the length of the tuple it returns; 0 for a bare tensor."""
        modules = [*(block.module for block in self._view.blocks), *self._view.layers]
        wanted = {type(module) for module in modules}
        counts: dict[type[nn.Module], int] = {}

        def count(module: nn.Module, _args: Any, output: Any) -> None:
            counts[type(module)] = len(output) if isinstance(output, tuple) else 0
            if wanted <= counts.keys():
                raise _StoppedError

        with hooks_removed([module.register_forward_hook(count) for module in modules]), suppress(_StoppedError):
            self._view.model.get_decoder()(input_ids=ids, use_cache=False)
        return counts

    def _record(self, ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the first layer's input and each layer's keyword arguments, without running any layer."""
        entered: list[Tensor] = []
        arguments: list[dict[str, Any]] = []

        def skip(layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            entered.append(hidden_states)
            names = list(inspect.signature(type(layer).forward).parameters)[2:]
            arguments.append(dict(zip(names, args, strict=False)) | kwargs)
            return self._answer(layer, hidden_states)

        with ExitStack() as stack:
            for layer in self._view.layers:
                stack.enter_context(forward_replaced(layer, partial(skip, layer)))
            self._view.model.get_decoder()(input_ids=ids, use_cache=False)
        return entered[0], arguments

    @contextmanager
    def _answering(self, given: dict[nn.Module, Tensor], device: torch.device) -> Iterator[None]:
        """Context manager in which modules return the given tensors, on `device`, without running."""
        with ExitStack() as stack:
            for module, value in given.items():
                answer = self._answer(module, value.to(device))
                stack.enter_context(forward_replaced(module, lambda *_args, _answer=answer, **_kwargs: _answer))
            yield

    def _answer(self, module: nn.Module, value: Tensor) -> Any:
        count = self._returned[type(module)]
        return (value, *[None] * (count - 1)) if count else value


def drained(items: list[_Item]) -> Iterator[_Item]:
    """Yield each item after taking it out of the list, so that it is freed after its last use."""
    items.reverse()
    while items:
        yield items.pop()


def _show_first(seen: Callable[[Tensor], object], _module: nn.Module, args: tuple[Tensor, ...]) -> None:
    seen(args[0])
