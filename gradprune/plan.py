"""The plan of a run: what it would hold in memory, whole, streamed or divided among ranks, and what of that fits."""

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
    """Where a run is to compute: a name for it, its bytes, and whether it has memory of its own beside the host's."""

    name: str
    bytes: int
    accelerated: bool


@dataclass(frozen=True)
class PlannedRun:
    """One way to run.

    recomputed: as with `use_gradient_checkpointing`. ranks: how many processes; the figures are of one of them.
    largest_batch: the largest batch_size that fits; 0 where none does.
    """

    name: str
    streamed: bool
    recomputed: bool
    ranks: int
    footprint: Footprint
    fits: bool
    largest_batch: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values."""
        totals = {name: getattr(self.footprint, name) for name in ("device", "host", "moved")}
        return {**asdict(self), "footprint": {**asdict(self.footprint), **totals}}


@dataclass(frozen=True)
class Plan:
    """All ways to run on one device.

    one_wave: the stream_memory with which a streamed model's samples pass through the layers together.
    """

    shape: ModelShape
    room: Room
    runs: tuple[PlannedRun, ...]
    one_wave: int

    @property
    def streams(self) -> bool:
        """What `stream_layers` "auto" does without `use_gradient_checkpointing`."""
        return self.streamable and not self.runs[0].fits

    @property
    def streamable(self) -> bool:
        """Whether the checkpoint can be streamed."""
        return any(run.streamed for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values; sizes in bytes."""
        return {
            "model": {"parameters": self.shape.parameters, "bytes": self.shape.bytes},
            "device": asdict(self.room),
            "stream_layers": "on" if self.streams else "off",
            "one_wave": self.one_wave,
            "runs": [run.to_dict() for run in self.runs],
        }


def room_on(device: str) -> Room:
    """The room that a size such as "80GB" stands for, on an accelerator, or what is free on a device of this machine.

    Raises:
        ConfigError: it is neither.
    """
    try:
        size = bytes_of(device)
    except ValueError:
        pass
    else:
        if size < 1:
            raise ConfigError(f"device: '{device}' is no memory at all; give a size such as 80GB")
        return Room(device, size, accelerated=True)
    name = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(name)
        if place.type not in ("cpu", "cuda"):
            raise ConfigError(f"device: '{name}' says nothing of its memory; give a size such as 80GB, cpu or cuda")
        return Room(name, free_memory(place), place.type != "cpu")
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device: '{name}' is no size such as 80GB, and does not work here: {one_line(error)}"
        ) from error


def planned(shape: ModelShape, config: PruneConfig, room: Room, ranks: int, *, streamable: bool = True) -> Plan:
    """Every way to run: whole, whole with recomputed activations, streamed; the first and the last in ranks, too.

    With `reduction` "batch", which keeps a gradient of every weight, a run is neither streamed nor divided; with
    `own_text`, which a streamed model cannot write, it is not streamed.

    Args:
        shape: of the model.
        config: the options of the run; whether layers are streamed or recomputed, and the batch size of
            `largest_batch`, are varied.
        room: where it computes.
        ranks: how many processes share the work, each with a device of its own.
        streamable: whether the checkpoint can be streamed: a GGUF file cannot.
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
    # Larger batches hold more.
    sizes = range(1, config.num_samples + 1)
    largest = bisect.bisect_right(sizes, room.bytes, key=lambda size: held(size).peak)
    return PlannedRun(name, streamed, recomputed, ranks, found, found.fits(room.bytes), largest)
