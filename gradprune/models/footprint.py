"""Predict the peak memory of a run, stage by stage, and how many bytes of weights it reads.

The prediction needs only the model's sizes and the options. `gradprune plan` shows it, and `--stream_layers auto`
decides by it. The numbers of tensors below are those of transformers' Llama: the tensors that autograd keeps of a
layer, and those that exist beside them at the peak. `python -m benchmarks.jobs.memory` compares predictions with real
runs.
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
"""Residual streams of all samples that `obs` keeps at a time; with experts, it also keeps their projections' inputs."""
FOLLOWED, FOLLOWED_SHARE = 2, 1 / 6
"""`obs` follows one residual stream per block, of at least FOLLOWED samples, and otherwise of as many as take
FOLLOWED_SHARE of the time of a forward and backward pass over all calibration samples."""
REPAIR_STREAMS = 4
"""Residual streams of all samples that the repair keeps at a time, beside the inputs of one output projection's kept
columns: the repaired model's stream before the layer, the dense model's stream after it, the output of the layer's
first block as repaired, and the output that its second block would have to write."""
EXPERTS_STREAMS = 2
"""Further streams that the repair of experts keeps: the experts' output, and what it lacks."""

_EVERY_SHOT: tuple[StageName, ...] = ("calibration", "importance", "repair")

# On a CPU, half-precision products are compiled for each shape; a model has about a dozen shapes, at 1 MiB each.
_COMPILED = 12 << 20

# Buffers that a CPU's libraries keep after large products: bytes per element of the largest output projection, and the
# upper limit of all buffers together.
_BUFFERS, _MOST_BUFFERS = 6, 32 << 20

FOLDED = 1 << 24
"""How many weights are summed by group at a time; in fp64, a weight and its absolute value take 16 bytes."""

# The number of sums kept for each group, see `gradprune.calibration.accumulator`, and the bytes of each, in fp64.
_SUMS_PER_GROUP, _FP64 = 8, 8
# Passes over held-out samples that judge distillation: one before it, and usually one for each of two factors after it.
_JUDGING_PASSES = 3


def samples_followed(samples: int, blocks: int) -> int:
    """The number of samples that `obs` follows, given that a block's stream passes half of the layers on average."""
    return min(samples, max(FOLLOWED, int(FOLLOWED_SHARE * 6 * samples / max(1, blocks))))


@dataclass(frozen=True)
class Stage:
    """The memory that a stage of a run needs.

    device, host: peak bytes on the device and in the host's memory; without an accelerator, `device` is 0. moved: the
    bytes of weights that the stage reads from disk.
    """

    name: StageName
    device: int
    host: int
    moved: int


@dataclass(frozen=True)
class Footprint:
    """The memory of a run, by stage; waves: the number of waves in which a streamed model is calibrated."""

    stages: tuple[Stage, ...]
    waves: int = 1

    @property
    def device(self) -> int:
        """Peak bytes on the device over all stages."""
        return max(stage.device for stage in self.stages)

    @property
    def host(self) -> int:
        """Peak bytes in the host's memory over all stages."""
        return max(stage.host for stage in self.stages)

    @property
    def moved(self) -> int:
        """Bytes of weights that all stages together read from disk."""
        return sum(stage.moved for stage in self.stages)

    @property
    def largest(self) -> Stage:
        """The stage that needs most memory where the computation runs: on the device, or else on the host."""
        return max(self.stages, key=lambda stage: stage.device or stage.host)

    @property
    def peak(self) -> int:
        """Peak bytes where the computation runs: on the device, or on the host if a CPU computes."""
        return self.device or self.host

    def fits(self, free: int) -> bool:
        """Whether `peak` fits in `free` bytes."""
        return self.peak <= free


@dataclass(frozen=True)
class Job:
    """The run that a model is loaded for: its options, its stages, and the number of ranks that divide it."""

    config: PruneConfig
    stages: tuple[StageName, ...] = STAGES
    world: int = 1

    def footprint(self, shape: ModelShape, *, streamed: bool, device: torch.device) -> Footprint:
        """Predict the memory of one of the ranks; see the function `footprint`."""
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
    """Predict the memory of one process of a run, and the bytes of weights that it reads.

    Args:
        shape: the model's sizes.
        config: the options. Without `eval_samples`, as many evaluation windows are assumed as calibration samples.
        streamed: whether decoder layers pass through the device one at a time.
        accelerated: whether the device has memory of its own; otherwise the CPU computes.
        world: the number of ranks that divide the samples.
        stages: the stages of the run; those that the options switch off are left out.
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
    # A streamed model cannot write own text.
    if streamed or not sum(config.samples_written):
        left_out.add("own_text")
    if not config.samples_distilled(shape.parameters):
        left_out.add("distillation")
    return Footprint(tuple(compute[name]() for name in stages if name not in left_out), run.waves if streamed else 1)


@dataclass(frozen=True)
class _Run:
    """The arguments of `footprint`, with a method for the prediction of each stage."""

    shape: ModelShape
    config: PruneConfig
    streamed: bool
    accelerated: bool
    world: int

    @property
    def waves(self) -> int:
        """The number of waves of calibration: how often it passes through the layers of a streamed model."""
        budget = bytes_of(self.config.stream_memory)
        layers = len(self.shape.layer_parameters)
        together = max(1, budget // (self._stream(self._batch) * (layers + 1)))
        return -(-self._batches // together)

    def own_text(self) -> Stage:
        """Predict the memory of writing a batch of own text.

        It consists of all cached keys and values, one layer's keys and values repeated for every query head, and the
        logits of one token of each sample: in the model's dtype, and in fp32 with their probabilities and the numbers
        by which a token is drawn. Layers that see a sliding window cache only that; they count as if they cached all.
        """
        samples = min(self.config.batch_size, sum(self.config.samples_written))
        kept = (self.shape.cached + 2 * self.shape.heads) * self.shape.itemsize
        predictions = (self.shape.itemsize + 16) * self.shape.vocabulary
        return self._stage("own_text", samples * (self.config.seq_len * kept + predictions), 0, 0)

    def calibration(self) -> Stage:
        """Predict the memory of a forward and backward pass of one batch, or, if streamed, of a wave layer by layer."""
        layers, tokens = len(self.shape.layer_parameters), self._batch
        # The sums of all ranks are gathered and added.
        copies = 1 + self.world if self.world > 1 else 1
        sums = self._sums * copies + self._solved_before
        kept, backward = self._activations(tokens), self._backward(tokens)
        if self.config.reduction == "batch":
            # The gradients of all weights, both the sum over batches and those of the current batch.
            sums += 2 * sum(self.shape.layer_parameters) * max(4, self.shape.itemsize)
        if self.streamed:
            together = -(-self._batches // self.waves)
            # Gradients of the streams replace the streams themselves, from the top down, and need no further memory.
            streams = self._in_memory(together * self._stream(tokens) * (layers + 1))
            own = max(kept + backward, self._logits(tokens)) + sums
            return self._stage("calibration", own, streams, 2 * self.waves)
        if self.config.use_gradient_checkpointing:
            entered = layers * self._stream(tokens)
            return self._stage("calibration", entered + max(kept + backward, self._logits(tokens)) + sums, 0, 1)
        return self._stage("calibration", layers * kept + max(backward, self._logits(tokens)) + sums, 0, 1)

    def importance(self) -> Stage:
        """Predict the memory of fp64 sums over weights and, for `obs`, of streams, Gram matrices and one inverse."""
        own = 16 * min(FOLDED, self._largest_output)
        if not self._second_pass:
            return self._stage("importance", own + self._sums + self._solved_before, 0, 1)
        tokens = self._share(self.config.num_samples)
        inverses = max((self._inverse(*each) for each in self._outputs), default=0)
        # The Gram matrices of one layer are in memory: one of each shape, because its blocks have different shapes.
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
        """Predict the memory of all samples' streams, and of one block's inputs and moments if it keeps all groups."""
        tokens = self._share(self.config.num_samples + self.config.held_out_samples)
        moments = max((self._moments(*each) for each in self.shape.outputs), default=0)
        streams = REPAIR_STREAMS
        if self.shape.expert is not None:
            rows, columns = self.shape.expert.output
            # For its own tokens, an expert holds its inputs and what it lacks in fp32. Routing is assumed to be even.
            solved_on = -(-tokens * self.shape.expert.seen // self.shape.expert.number)
            moments = max(moments, self._moments(rows, columns) + 4 * solved_on * (rows + columns))
            streams += EXPERTS_STREAMS
        # Unless the model is changed in place, re-solved weights get memory of their own.
        solved = 0 if self.config.in_place else self._solved
        own = solved + max(moments, self._forward(self._batch))
        return self._with_streams("repair", own, streams * self._stream(tokens) + self._read(tokens), 1)

    def distillation(self) -> Stage:
        """Predict the memory of distillation.

        It consists of a step's activations, one weight's gradient, the dense model's streams of the samples, and the
        remaining weights as they were before and as they become, which are on disk if the model is streamed.
        """
        layers, step = len(self.shape.layer_parameters), distill_step(self.config.seq_len)
        tokens = step * self.config.seq_len
        samples = self.config.samples_distilled(self.shape.parameters)
        taught = self._stream(samples * self.config.seq_len)
        backward = self._backward(tokens) + 12 * self._largest_output
        if self.streamed:
            streams = self._in_memory((layers + 1) * self._stream(tokens))
            own = max(self._activations(tokens) + backward, self._logits(tokens))
            reads = 2 * -(-samples // step) + _JUDGING_PASSES
            return self._stage("distillation", own, streams + taught, reads)
        weights = int((1.0 - self.config.pruning_ratio) * sum(self.shape.layer_parameters)) * self.shape.itemsize
        kept = self._stream(tokens) if self.config.use_gradient_checkpointing else self._activations(tokens)
        own = 2 * weights + taught + layers * kept + max(backward, self._logits(tokens))
        return self._stage("distillation", own, 0, 1)

    def evaluation(self) -> Stage:
        """Predict the memory of a batch's forward pass and, unless the model is cut in place, of the pruned copy."""
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
        """Predict the memory of saving weights from the host's memory, or else by copying them there one at a time."""
        copies = 2 if self.shape.has_experts else 1
        largest_layer = copies * self.shape.layer_bytes
        largest = max(largest_layer, self.shape.vocabulary * self.shape.hidden * self.shape.itemsize)
        return self._stage("saving", 0, largest if self.streamed or self.accelerated else 0, 1)

    def _stage(self, name: StageName, device: int, host: int, reads: int) -> Stage:
        """Add the weights that are in memory throughout a stage; reads: how often a streamed stage reads all layers."""
        if self.streamed:
            layers = sum(self.shape.layer_parameters) * self.shape.itemsize
            # Experts' weights are in memory twice while they are assembled.
            copies = 1 + self.accelerated + self.shape.has_experts
            weights = self.shape.bytes - layers + copies * self.shape.layer_bytes
            shots = self.config.shots if name in _EVERY_SHOT else 1
            moved = shots * reads * layers
        else:
            # Loading the model reads the weights once, which is counted in calibration.
            weights, moved = self.shape.bytes, self.shape.bytes if name == "calibration" else 0
        device += weights
        if not self.accelerated:
            device += _COMPILED if self.shape.itemsize < 4 else 0
            device += min(_BUFFERS * self._largest_output, _MOST_BUFFERS) if name != "calibration" else 0
        return Stage(name, device, host, moved) if self.accelerated else Stage(name, 0, device + host, moved)

    def _with_streams(self, name: StageName, own: int, streams: int, reads: int, few: int = 0) -> Stage:
        """Predict a stage that passes residual streams through the layers, and holds `own` bytes besides.

        streams, few: bytes of the streams of all samples, and of the few that `obs` follows. reads: see `_stage`.
        """
        if self.streamed:
            return self._stage(name, own, self._in_memory(streams) + self._in_memory(few), reads)
        return self._stage(name, own + streams + few, 0, reads)

    @property
    def _solved(self) -> int:
        """Bytes of the re-solved weights, which get memory of their own; 0 if streamed, because they are on disk."""
        return 0 if self.streamed else self.shape.output_bytes

    @property
    def _solved_before(self) -> int:
        """Bytes of the previous shot's re-solved weights: its model is calibrated again beside the dense model."""
        return self._solved if self.config.shots > 1 else 0

    @property
    def _second_pass(self) -> bool:
        """Whether all samples are run once more, for `obs`, which is not possible with whole experts."""
        asked = self.config.evidence == "all" or self.config.importance_method in ("obs", "auto")
        return asked and "experts" not in (self.config.kinds or ())

    @property
    def _outputs(self) -> list[tuple[int, int]]:
        """Rows and columns of every output projection; one stands for those of all experts."""
        return [*self.shape.outputs, *([] if self.shape.expert is None else [self.shape.expert.output])]

    @property
    def _largest_output(self) -> int:
        """Number of elements of the largest output projection."""
        return max((rows * columns for rows, columns in self._outputs), default=0)

    @property
    def _sums(self) -> int:
        """Bytes of the sums over samples for all groups."""
        return self.shape.groups * _SUMS_PER_GROUP * _FP64

    @property
    def _exchanged(self) -> int:
        """Bytes of a Gram matrix in fp32, its sum over ranks, and a piece of each rank's, received in one buffer."""
        if self.world == 1:
            return 0
        gram = max((4 * columns**2 for _, columns in self._outputs), default=0)
        return 2 * gram + 2 * self.world * min(gram, PIECE)

    def _share(self, samples: int) -> int:
        """Number of tokens in this rank's share of `samples` samples."""
        return -(-samples // self.world) * self.config.seq_len

    def _read(self, tokens: int) -> int:
        """Bytes of the inputs of the block that reads most at its output projections, for `tokens` tokens."""
        return tokens * self.shape.read_width * self.shape.itemsize

    @property
    def _batches(self) -> int:
        """The number of this rank's batches of which calibration takes gradients."""
        samples = self.config.num_samples
        if self.config.curvatures_alone and self.shape.expert is None:
            samples = min(samples, CURVATURE_SAMPLES)
        return -(-samples // (self.config.batch_size * self.world))

    @property
    def _batch(self) -> int:
        """Number of tokens in a batch."""
        return min(self.config.batch_size, self.config.num_samples) * self.config.seq_len

    def _stream(self, tokens: int) -> int:
        """Bytes of the residual stream of `tokens` tokens."""
        return tokens * self.shape.hidden * self.shape.itemsize

    def _in_memory(self, streams: int) -> int:
        """How many of `streams` bytes are in memory: all, or 0 if they exceed the budget and are in files instead."""
        return streams if streams <= bytes_of(self.config.stream_memory) else 0

    def _activations(self, tokens: int) -> int:
        """Bytes that autograd keeps of one layer for the backward pass.

        They are the norms' inputs (in fp32 at least) and outputs, queries, keys and values repeated for every query
        head, attention's output, and the MLP's gate, its activation, up and their product.
        """
        shape = self.shape
        norms = 2 * shape.hidden * (shape.itemsize + max(shape.itemsize, 4))
        return tokens * (norms + shape.itemsize * (4 * shape.heads + 4 * shape.intermediate))

    def _backward(self, tokens: int) -> int:
        """Bytes beside `_activations` at a backward pass's peak: the gradients of the MLP's product and its factors."""
        return tokens * self.shape.itemsize * (2 * self.shape.hidden + 2 * self.shape.intermediate)

    def _forward(self, tokens: int) -> int:
        """Bytes that a layer holds in a forward pass without gradients."""
        return tokens * self.shape.itemsize * (3 * self.shape.hidden + 3 * self.shape.intermediate)

    def _logits(self, tokens: int) -> int:
        """Bytes of the last hidden states, their gradient, and a chunk of logits, probabilities and their gradients.

        Logits and probabilities are in fp32, and their gradients in the model's dtype.
        """
        chunk = min(tokens, tokens_at_once(self.shape.vocabulary, cuda=self.accelerated))
        return 2 * self._stream(tokens) + (8 + self.shape.itemsize) * chunk * self.shape.vocabulary

    def _moments(self, rows: int, columns: int) -> int:
        """Bytes of the repair's problem for one output projection [rows, columns] that keeps all columns.

        All of it is in fp64, except for Gram matrices in fp32: two problems, a Cholesky factor, the current solution,
        the best one so far, and a half-finished one. The sums that come before take less.
        """
        return columns * (16 * columns + 48 * rows)

    def _inverse(self, rows: int, columns: int) -> int:
        """Bytes that `obs` holds in fp64 while it removes groups of one output projection [rows, columns].

        They are the weights, the inverse of the Gram matrix, and a copy of the larger of the two.
        """
        return 8 * columns * (columns + rows + max(columns, rows))
