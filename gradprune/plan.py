"""The plan of a run: the memory that it would take whole, streamed or divided among ranks, and which of these fit."""

import bisect
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from gradprune.config import PruneConfig, bytes_of
from gradprune.errors import ConfigError, one_line
from gradprune.models.footprint import Footprint, footprint
from gradprune.models.sizes import ModelShape, free_memory


@dataclass(frozen=True)
class Room:
    """The memory that a run computes in.

    name: of the device, or the size as it was given. bytes: how many are free. accelerated: whether it is the memory of
    an accelerator, separate from the host's.
    """

    name: str
    bytes: int
    accelerated: bool


@dataclass(frozen=True)
class PlannedRun:
    """One way to execute a run, and the memory that it takes.

    recomputed: whether activations are recomputed, as with `use_gradient_checkpointing`. ranks: the number of
    processes; footprint and fits are those of one process. largest_batch: the largest batch_size that fits, at most
    num_samples; 0 if none does.
    """

    name: str
    streamed: bool
    recomputed: bool
    ranks: int
    footprint: Footprint
    fits: bool
    largest_batch: int

    def to_dict(self) -> dict[str, Any]:
        """Return the planned run as a JSON-serialisable dict."""
        totals = {name: getattr(self.footprint, name) for name in ("device", "host", "moved")}
        return {**asdict(self), "footprint": {**asdict(self.footprint), **totals}}


@dataclass(frozen=True)
class Plan:
    """All ways to execute a run on one device.

    one_wave: the stream_memory, in bytes, at which all samples pass through a streamed model's layers in one wave.
    """

    shape: ModelShape
    room: Room
    runs: tuple[PlannedRun, ...]
    one_wave: int

    @property
    def streams(self) -> bool:
        """Whether `stream_layers` "auto" would stream, without `use_gradient_checkpointing`."""
        return self.streamable and not self.runs[0].fits

    @property
    def streamable(self) -> bool:
        """Whether the checkpoint can be streamed."""
        return any(run.streamed for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as a JSON-serialisable dict, with sizes in bytes."""
        return {
            "model": {"parameters": self.shape.parameters, "bytes": self.shape.bytes},
            "device": asdict(self.room),
            "stream_layers": "on" if self.streams else "off",
            "one_wave": self.one_wave,
            "runs": [run.to_dict() for run in self.runs],
        }


def room_on(device: str) -> Room:
    """Return the room of an accelerator with a memory of, e.g., "80GB", or what is free on a device of this machine.

    Raises:
        ConfigError: `device` is neither a size nor a device that works here.
    """
    try:
        size = bytes_of(device)
    except ValueError:
        pass
    else:
        if size < 1:
            raise ConfigError(f"device: '{device}' is less than one byte; give a size such as 80GB")
        return Room(device, size, accelerated=True)
    name = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(name)
        if place.type not in ("cpu", "cuda"):
            raise ConfigError(f"device: '{name}' does not report its memory; give a size such as 80GB, cpu or cuda")
        return Room(name, free_memory(place), place.type != "cpu")
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device: '{name}' is neither a size such as 80GB nor a device that works here: {one_line(error)}"
        ) from error


def planned(shape: ModelShape, config: PruneConfig, room: Room, ranks: int, *, streamable: bool = True) -> Plan:
    """Plan every way to run: whole, whole with recomputed activations, streamed, and whole and streamed with ranks.

    With `reduction` "batch", which keeps a gradient of every weight, a run is neither streamed nor divided among ranks;
    with `own_text`, which a streamed model cannot write, it is not streamed.

    Args:
        shape: the model's sizes.
        config: the options of the run, except that streaming, recomputation and, to find `largest_batch`, the batch
            size are varied.
        room: the memory that the run computes in; with ranks, each has as much.
        ranks: the number of processes that share the work, each with its own device.
        streamable: whether the checkpoint can be streamed, which a GGUF file cannot.
    """
    ways = [
        ("whole", False, False, 1),
        ("whole, recomputing", False, True, 1),
        ("streamed", True, True, 1),
        (f"whole, {ranks} ranks", False, False, ranks),
        (f"streamed, {ranks} ranks", True, True, ranks),
    ]
    batch = config.reduction == "batch"
    streamable = streamable and not batch and not sum(config.samples_written)
    runs = tuple(
        _planned(shape, config, room, name, streamed, recomputed, of)
        for name, streamed, recomputed, of in ways
        if (streamable or not streamed) and not (batch and of > 1)
    )
    tokens = config.num_samples * config.seq_len
    one_wave = tokens * shape.hidden * shape.itemsize * (len(shape.layer_parameters) + 1)
    return Plan(shape, room, runs, one_wave)


def _planned(
    shape: ModelShape, config: PruneConfig, room: Room, name: str, streamed: bool, recomputed: bool, ranks: int
) -> PlannedRun:
    def held(batch_size: int) -> Footprint:
        options = replace(config, use_gradient_checkpointing=recomputed, batch_size=batch_size)
        return footprint(shape, options, streamed=streamed, accelerated=room.accelerated, world=ranks)

    found = held(config.batch_size)
    # A larger batch takes more memory, so the largest that fits is found by bisection.
    sizes = range(1, config.num_samples + 1)
    largest = bisect.bisect_right(sizes, room.bytes, key=lambda size: held(size).peak)
    return PlannedRun(name, streamed, recomputed, ranks, found, found.fits(room.bytes), largest)
