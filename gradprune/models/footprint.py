"""How much memory a run holds at most, stage by stage, and how many bytes of weights it reads.

Computed from the model's sizes and the options alone. `gradprune plan` shows it, and `--stream_layers auto` follows it.
The counts of tensors below are those of transformers' Llama: what autograd keeps of a layer, and what is alive beside
it where most is. `python -m benchmarks.jobs.memory` compares them with what runs take.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from gradprune.config import CURVATURE_SAMPLES, PruneConfig, bytes_of, distill_step
from gradprune.models.loss import tokens_at_once
from gradprune.models.sizes import ModelShape
from gradprune.ranks import PIECE

StageName = Literal["own_text", "calibration", "importance", "repair", "distillation", "evaluation", "saving"]
STAGES: tuple[StageName, ...] = get_args(StageName)

OBS_STREAMS = 1
"""Residual streams of all samples that `obs` keeps at once; with experts, also what their output projections read."""
FOLLOWED, FOLLOWED_SHARE = 2, 1 / 6
"""`obs` follows one residual stream a block: of as many samples as take FOLLOWED_SHARE of a forward and backward pass
over all calibration samples, and of at least FOLLOWED."""
REPAIR_STREAMS = 4
"""Residual streams of all samples that the repair keeps at once, on top of what one output projection reads in its kept
columns: the repaired model's stream before the layer, the dense model's after it, what the layer's first block now
writes, and what its second would have to write."""
EXPERTS_STREAMS = 2
"""Further streams that the repair of experts keeps: what they write, and what they lack."""

_EVERY_SHOT: tuple[StageName, ...] = ("calibration", "importance", "repair")

# On a CPU half-precision products are compiled for each shape that occurs, about 1 MiB for each of a model's dozen.
_COMPILED = 12 << 20

# Buffers that a CPU's libraries keep after large products: bytes per element of the largest output projection, and the
# most in all.
_BUFFERS, _MOST_BUFFERS = 6, 32 << 20

FOLDED = 1 << 24
"""How many weights are summed by group at a time, in fp64: 16 bytes each, with their absolute values."""

# A block's sums, in fp64: see `gradprune.calibration.accumulator`.
_SUMS_PER_GROUP, _FP64 = 8, 8
# Passes over held-out samples that judge distillation: one before it, and usually one for each of two factors.
_JUDGED = 3


def samples_followed(samples: int, blocks: int) -> int:
    """How many of the calibration samples `obs` follows; a block's stream passes half of the layers on average."""
    return min(samples, max(FOLLOWED, int(FOLLOWED_SHARE * 6 * samples / max(1, blocks))))


@dataclass(frozen=True)
class Stage:
    """Peak bytes of a stage on the device and in the host's memory, and the bytes of weights that it reads.

    On a CPU all of it is in the host's memory.
    """

    name: StageName
    device: int
    host: int
    moved: int


@dataclass(frozen=True)
class Footprint:
    """What a run holds and reads, by stage; waves: into how many the calibration of a streamed model is divided."""

    stages: tuple[Stage, ...]
    waves: int = 1

    @property
    def device(self) -> int:
        """Peak bytes on the device."""
        return max(stage.device for stage in self.stages)

    @property
    def host(self) -> int:
        """Peak bytes in the host's memory."""
        return max(stage.host for stage in self.stages)

    @property
    def moved(self) -> int:
        """Bytes of weights read by all stages."""
        return sum(stage.moved for stage in self.stages)

    @property
    def largest(self) -> Stage:
        """The stage that needs the most of the memory that computes."""
        return max(self.stages, key=lambda stage: stage.device or stage.host)

    @property
    def peak(self) -> int:
        """Peak bytes in the memory that computes: the device's, or the host's where a CPU does."""
        return self.device or self.host

    def fits(self, free: int) -> bool:
        """Whether the memory that computes has room, with so many bytes free."""
        return self.peak <= free


@dataclass(frozen=True)
class Job:
    """What a model is loaded for: a run's options, its stages, and how many ranks divide it."""

    config: PruneConfig
    stages: tuple[StageName, ...] = STAGES
    world: int = 1

    def footprint(self, shape: ModelShape, *, streamed: bool, device: torch.device) -> Footprint:
        """What one of the ranks holds, see `footprint`."""
        accelerated = device.type != "cpu"
        return footprint(
            shape, self.config, streamed=streamed, accelerated=accelerated, world=self.world, stages=self.stages
        )


def footprint(
    shape: ModelShape,
    config: PruneConfig,
    *,
    streamed: bool,
    accelerated: bool = False,
    world: int = 1,
    stages: tuple[StageName, ...] = STAGES,
) -> Footprint:
    """What one process of a run holds and reads.

    Args:
        shape: of the model.
        config: the options; of all evaluation windows, those of `eval_samples`, or as many as samples.
        streamed: whether decoder layers pass through the device one at a time.
        accelerated: whether the device has memory of its own; else the CPU computes.
        world: how many ranks divide the samples.
        stages: those that the run has.
    """
    run = _Run(shape, config, streamed, accelerated, world)
    compute = {
        "own_text": run.own_text,
        "calibration": run.calibration,
        "importance": run.importance,
        "repair": run.repair,
        "distillation": run.distillation,
        "evaluation": run.evaluation,
        "saving": run.saving,
    }
    left_out = {"repair"} if config.repair == "none" else set()
    # A streamed model writes nothing.
    if streamed or not sum(config.samples_written):
        left_out.add("own_text")
    if not config.samples_distilled(shape.parameters):
        left_out.add("distillation")
    return Footprint(tuple(compute[name]() for name in stages if name not in left_out), run.waves if streamed else 1)


@dataclass(frozen=True)
class _Run:
    """The arguments of `footprint`."""

    shape: ModelShape
    config: PruneConfig
    streamed: bool
    accelerated: bool
    world: int

    @property
    def waves(self) -> int:
        """How often calibration passes through the layers of a streamed model."""
        budget = bytes_of(self.config.stream_memory)
        layers = len(self.shape.layer_parameters)
        together = max(1, budget // (self._stream(self._batch) * (layers + 1)))
        return -(-self._batches // together)

    def own_text(self) -> Stage:
        """The keys and values of a batch that is written, a layer's once more for every query head, and predictions of
        one token: in the model's dtype, and in fp32 with their probabilities and what a token is drawn by.

        Layers that see a window keep no more than that; they count as if they kept all.
        """
        samples = min(self.config.batch_size, sum(self.config.samples_written))
        kept = (self.shape.cached + 2 * self.shape.heads) * self.shape.itemsize
        predictions = (self.shape.itemsize + 16) * self.shape.vocabulary
        return self._stage("own_text", samples * (self.config.seq_len * kept + predictions), 0, 0)

    def calibration(self) -> Stage:
        """Forward and backward of one batch; where the model is streamed, of a wave layer by layer."""
        layers, tokens = len(self.shape.layer_parameters), self._batch
        # Each rank's are gathered and added.
        copies = 1 + self.world if self.world > 1 else 1
        sums = self._sums * copies + self._solved_before
        kept, backward = self._kept(tokens), self._backward(tokens)
        if self.config.reduction == "batch":
            # Every weight's gradient, summed and of the current batch.
            sums += 2 * sum(self.shape.layer_parameters) * max(4, self.shape.itemsize)
        if self.streamed:
            together = -(-self._batches // self.waves)
            # The gradients take the place of the uppermost streams.
            streams = self._in_memory(together * self._stream(tokens) * (layers + 1))
            own = max(kept + backward, self._logits(tokens)) + sums
            return self._stage("calibration", own, streams, 2 * self.waves)
        if self.config.use_gradient_checkpointing:
            entered = layers * self._stream(tokens)
            return self._stage("calibration", entered + max(kept + backward, self._logits(tokens)) + sums, 0, 1)
        return self._stage("calibration", layers * kept + max(backward, self._logits(tokens)) + sums, 0, 1)

    def importance(self) -> Stage:
        """Weights in fp64; with `obs`, the streams of all samples too, and one block's Gram matrix and its inverse."""
        own = 16 * min(FOLDED, self._largest_output)
        if not self._second_pass:
            return self._stage("importance", own + self._sums + self._solved_before, 0, 1)
        tokens = self._share(self.config.num_samples)
        inverses = max((self._inverse(*each) for each in self._outputs), default=0)
        # A layer's blocks have different shapes.
        grams = sum(4 * columns**2 for _, columns in set(self.shape.outputs))
        streams = OBS_STREAMS * self._stream(tokens)
        blocks = len(self.shape.outputs)
        if self.shape.expert is not None:
            streams, blocks = streams + self._read(tokens), blocks + len(self.shape.layer_parameters)
        few = samples_followed(self.config.num_samples, blocks) * self.config.seq_len
        forward = max(grams + self._forward(self._batch), self._forward(few), self._logits(few))
        own = self._sums + self._solved_before + max(own, inverses, self._exchanged, forward)
        return self._with_streams("importance", own, streams, 2, (-(-blocks // self.world) + 1) * self._stream(few))

    def repair(self) -> Stage:
        """The streams of all samples, what one block that keeps all reads, and its moments."""
        tokens = self._share(self.config.num_samples + self.config.held_out_samples)
        moments = max((self._moments(*each) for each in self.shape.outputs), default=0)
        streams = REPAIR_STREAMS
        if self.shape.expert is not None:
            rows, columns = self.shape.expert.output
            # An expert reads and lacks its tokens in fp32, while routing is even.
            solved_on = -(-tokens * self.shape.expert.seen // self.shape.expert.number)
            moments = max(moments, self._moments(rows, columns) + 4 * solved_on * (rows + columns))
            streams += EXPERTS_STREAMS
        # Re-solved weights have memory of their own.
        solved = 0 if self.config.in_place else self._solved
        own = solved + max(moments, self._forward(self._batch))
        return self._with_streams("repair", own, streams * self._stream(tokens) + self._read(tokens), 1)

    def distillation(self) -> Stage:
        """A step's activations, one weight's gradient, the streams of the samples that teach; the kept weights as they
        were and as they become, which of a streamed model are on disk."""
        layers, step = len(self.shape.layer_parameters), distill_step(self.config.seq_len)
        tokens = step * self.config.seq_len
        samples = self.config.samples_distilled(self.shape.parameters)
        taught = self._stream(samples * self.config.seq_len)
        backward = self._backward(tokens) + 12 * self._largest_output
        if self.streamed:
            streams = self._in_memory((layers + 1) * self._stream(tokens))
            own = max(self._kept(tokens) + backward, self._logits(tokens))
            reads = 2 * -(-samples // step) + _JUDGED
            return self._stage("distillation", own, streams + taught, reads)
        weights = int((1.0 - self.config.pruning_ratio) * sum(self.shape.layer_parameters)) * self.shape.itemsize
        kept = self._stream(tokens) if self.config.use_gradient_checkpointing else self._kept(tokens)
        own = 2 * weights + taught + layers * kept + max(backward, self._logits(tokens))
        return self._stage("distillation", own, 0, 1)

    def evaluation(self) -> Stage:
        """The forward pass of a batch, before and after; a model that is timed stands beside the pruned one."""
        tokens = self._batch
        windows = -(-(self.config.eval_samples or self.config.num_samples) // self.world)
        live = max(self._forward(tokens), self._logits(tokens))
        if not self.streamed:
            second = 0 if self.config.in_place else int((1.0 - self.config.pruning_ratio) * self.shape.bytes)
            return self._stage("evaluation", live + second, 0, 1)
        together = min(bytes_of(self.config.stream_memory), 2 * self._stream(windows * self.config.seq_len))
        waves = -(-2 * self._stream(windows * self.config.seq_len) // max(together, 1))
        return self._stage("evaluation", live, together, 2 * waves)

    def saving(self) -> Stage:
        """The weights as they are, or one after the other."""
        copies = 2 if self.shape.has_experts else 1
        largest_layer = copies * self.shape.layer_bytes
        largest = max(largest_layer, self.shape.vocabulary * self.shape.hidden * self.shape.itemsize)
        return self._stage("saving", 0, largest if self.streamed or self.accelerated else 0, 1)

    def _stage(self, name: StageName, device: int, host: int, reads: int) -> Stage:
        """With the weights that are there throughout; reads: how often all weights are read."""
        if self.streamed:
            layers = sum(self.shape.layer_parameters) * self.shape.itemsize
            # Experts' weights are there twice while they are put together.
            copies = 1 + self.accelerated + self.shape.has_experts
            weights = self.shape.bytes - layers + copies * self.shape.layer_bytes
            shots = self.config.shots if name in _EVERY_SHOT else 1
            moved = shots * reads * layers
        else:
            # Loading reads them.
            weights, moved = self.shape.bytes, self.shape.bytes if name == "calibration" else 0
        device += weights
        if not self.accelerated:
            device += _COMPILED if self.shape.itemsize < 4 else 0
            device += min(_BUFFERS * self._largest_output, _MOST_BUFFERS) if name != "calibration" else 0
        return Stage(name, device, host, moved) if self.accelerated else Stage(name, 0, device + host, moved)

    def _with_streams(self, name: StageName, own: int, streams: int, reads: int, few: int = 0) -> Stage:
        """Of a stage that passes streams of all samples and of few through the layers; own: what else it holds."""
        if self.streamed:
            return self._stage(name, own, self._in_memory(streams) + self._in_memory(few), reads)
        return self._stage(name, own + streams + few, 0, reads)

    @property
    def _solved(self) -> int:
        """Weights that a repair re-solves, for which it takes memory of their own; a streamed model's are on disk."""
        return 0 if self.streamed else self.shape.output_bytes

    @property
    def _solved_before(self) -> int:
        """Of the shot before, whose model is calibrated again beside the dense one."""
        return self._solved if self.config.shots > 1 else 0

    @property
    def _second_pass(self) -> bool:
        """Whether the samples are run once more, for `obs`, which there is not for whole experts."""
        asked = self.config.evidence == "all" or self.config.importance_method in ("obs", "auto")
        return asked and "experts" not in (self.config.kinds or ())

    @property
    def _outputs(self) -> list[tuple[int, int]]:
        """Rows and columns of every output projection; of experts, of one."""
        return [*self.shape.outputs, *([] if self.shape.expert is None else [self.shape.expert.output])]

    @property
    def _largest_output(self) -> int:
        """Elements of the largest output projection."""
        return max((rows * columns for rows, columns in self._outputs), default=0)

    @property
    def _sums(self) -> int:
        """Bytes of what is summed for all groups."""
        return self.shape.groups * _SUMS_PER_GROUP * _FP64

    @property
    def _exchanged(self) -> int:
        """A Gram matrix in fp32 and its sum over ranks, and a piece of all of theirs, which arrive in one."""
        if self.world == 1:
            return 0
        gram = max((4 * columns**2 for _, columns in self._outputs), default=0)
        return 2 * gram + 2 * self.world * min(gram, PIECE)

    def _share(self, samples: int) -> int:
        """Tokens of this rank's part of so many samples."""
        return -(-samples // self.world) * self.config.seq_len

    def _read(self, tokens: int) -> int:
        """Bytes of what the widest output projection reads for so many tokens."""
        return tokens * self.shape.read_width * self.shape.itemsize

    @property
    def _batches(self) -> int:
        """Batches of this rank that calibration takes gradients of."""
        samples = self.config.num_samples
        if self.config.curvatures_alone and self.shape.expert is None:
            samples = min(samples, CURVATURE_SAMPLES)
        return -(-samples // (self.config.batch_size * self.world))

    @property
    def _batch(self) -> int:
        """Tokens of a batch."""
        return min(self.config.batch_size, self.config.num_samples) * self.config.seq_len

    def _stream(self, tokens: int) -> int:
        """Bytes of the residual stream of so many tokens."""
        return tokens * self.shape.hidden * self.shape.itemsize

    def _in_memory(self, streams: int) -> int:
        """Of the streams that are kept: all or, where they are more than the budget, none, for they are in files."""
        return streams if streams <= bytes_of(self.config.stream_memory) else 0

    def _kept(self, tokens: int) -> int:
        """What autograd keeps of one layer: the norms' inputs (in fp32 at least) and outputs, queries, keys and values
        repeated for every query head, attention's output, and the MLP's gate, its activation, up and product."""
        shape = self.shape
        norms = 2 * shape.hidden * (shape.itemsize + max(shape.itemsize, 4))
        return tokens * (norms + shape.itemsize * (4 * shape.heads + 4 * shape.intermediate))

    def _backward(self, tokens: int) -> int:
        """What is alive beside that where most is: gradients of the MLP's product and of its factors."""
        return tokens * self.shape.itemsize * (2 * self.shape.hidden + 2 * self.shape.intermediate)

    def _forward(self, tokens: int) -> int:
        """What a layer holds without gradients."""
        return tokens * self.shape.itemsize * (3 * self.shape.hidden + 3 * self.shape.intermediate)

    def _logits(self, tokens: int) -> int:
        """A chunk of logits, their probabilities, and the gradients of these in the model's dtype."""
        chunk = min(tokens, tokens_at_once(self.shape.vocabulary, cuda=self.accelerated))
        return 2 * self._stream(tokens) + (8 + self.shape.itemsize) * chunk * self.shape.vocabulary

    def _moments(self, rows: int, columns: int) -> int:
        """Of one output projection [rows, columns], all of which stay, in fp64 but for Gram matrices in fp32: two
        problems, a factor, what is solved for, the best so far, and what is half solved; the sums take less."""
        return columns * (16 * columns + 48 * rows)

    def _inverse(self, rows: int, columns: int) -> int:
        """For `obs`, of one output projection [rows, columns], in fp64: the weights and the inverse of the Gram matrix,
        and either of them a second time, while groups go."""
        return 8 * columns * (columns + rows + max(columns, rows))
