"""Every option, grouped by the stage that reads it.

The command line, its help and the validation are derived from the fields here; `python -m gradprune.config.table >
docs/options.md` regenerates the documentation. The first line of a group's docstring is its title in both.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

from gradprune.config.domains import (
    DEVICE_MAPS,
    INT64_MAX,
    at_least,
    count,
    device_map,
    finite,
    folder_name,
    memory_size,
    names_among,
    numbers,
    path,
)
from gradprune.config.gradient_fix import FIX_OR_CHAIN, GRADIENT_FIXES
from gradprune.config.option import Options, option
from gradprune.errors import ConfigError

Method = Literal["magnitude", "wanda", "taylor", "taylor_2nd", "fisher", "group_fisher", "obs", "reap"]
# "auto" searches for the best scoring; see `gradprune.search`.
MethodOption = Literal["auto", Method]
ReductionName = Literal["sample", "batch"]
Prior = Literal["removal", "similarity", "taylor"]
Normalize = Literal["none", "log", "minmax", "zscore", "sqrt"]
NormalizePer = Literal["layer", "block"]
# The program that must be able to load the result; see `docs/serving.md`.
Serve = Literal["hf", "vllm", "gguf", "uniform"]
# Kinds of groups; `gradprune.models.kinds` defines the properties of each.
KindName = Literal["attention", "mlp", "expert_channels", "experts", "shared_experts"]
RepairName = Literal["none", "least_squares"]
EvidenceName = Literal["needed", "all"]
Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
# Whether decoder layers pass through the device one at a time; see `gradprune.models.residency`.
StreamLayers = Literal["auto", "on", "off"]
# Implementations of the importance ops and of the gradient ops; see `gradprune.ops.dispatch`.
ImportanceBackend = Literal["auto", "reference", "cpp", "triton"]
GradientBackend = Literal["auto", "reference", "cpp", "cuda"]

TARGETS = ("target_parameters", "target_bytes", "target_speedup")
METHODS: tuple[Method, ...] = get_args(Method)
GRADIENT_METHODS = ("taylor", "taylor_2nd", "fisher", "group_fisher", "obs")
DEFAULT_METHODS: tuple[Method, ...] = ("obs", "group_fisher")
"""The default method is the first of these that applies: "obs" assumes that the repair follows, and cannot score whole
experts."""
CURVATURE_SAMPLES = 32
"""Number of samples from whose gradients "obs" estimates the blocks' curvatures, one number a block, if nothing else
needs gradients: the curvatures of SmolLM2-135M's 60 blocks from 32 samples of 128 tokens vary by 10 % around those from
128 samples."""
DISTILL_JUDGED = 16
"""Largest number of held-out samples on which distillation is judged."""
DISTILL_TOKENS, DISTILL_PARAMETERS = 16_384, 2_000_000_000
"""By default, models of at most DISTILL_PARAMETERS parameters are distilled, on DISTILL_TOKENS calibration tokens.
Larger ones have not been measured; distilling them would hold the remaining weights twice in memory or, if streamed,
read all of them twice per step."""
DISTILL_TEXT = 0.1
"""See docs/methods.md for what other shares gain on text like the calibration text, and cost on other text."""

_DATASET = path("a .txt, .jsonl or .npy file, or wikitext2, ptb or c4, or several as a.txt:0.7,b.jsonl:0.3")
_UNIT_INTERVAL = numbers("between 0 and 1 (both excluded)", lambda x: 0.0 < x < 1.0)
_UNIT_OR_ONE = numbers("above 0 and at most 1", lambda x: 0.0 < x <= 1.0)


def distill_step(seq_len: int) -> int:
    """Return the number of samples per step of distillation: four, fewer if they exceed 512 tokens, at least one."""
    return max(1, min(4, 512 // seq_len))


def default_methods(repair: RepairName, kinds: Collection[str] = ()) -> tuple[Method, ...]:
    """Return the default methods for groups of these kinds, best first; "obs" needs a repair and no whole experts."""
    with_obs = repair != "none" and "experts" not in kinds
    return tuple(method for method in DEFAULT_METHODS if method != "obs" or with_obs)


@dataclass(frozen=True)
class Model(Options):
    """Model and target."""

    base_model: str | None = option(
        None, "Model folder or Hugging Face hub id; without it, the demo model.", path("a model folder or hub id")
    )
    pruning_ratio: float = option(0.2, "Fraction of all the model's parameters to remove.", _UNIT_INTERVAL)
    target_parameters: str | None = option(
        None, "Target instead of a ratio: keep at most this many parameters, e.g. 350M.", count()
    )
    target_bytes: str | None = option(
        None, "Target instead of a ratio: keep at most this many bytes of weights, e.g. 6GiB.", memory_size()
    )
    target_speedup: float | None = option(
        None,
        "Target instead of a ratio: forward passes at least this many times as fast, measured on this device.",
        finite("above 1", lambda x: x > 1.0),
    )
    prune_kinds: str | None = option(
        None,
        f"Kinds of groups to prune, separated by commas: {', '.join(get_args(KindName))}; default all but experts "
        "(which removes whole experts). Groups of other kinds are kept.",
        names_among(get_args(KindName)),
    )
    device: str = option(
        "auto", "Device to compute on: cpu, cuda, cuda:1, ...; auto takes CUDA if available.", path("a PyTorch device")
    )
    device_map: str | None = option(
        None,
        f"Divide the model's layers among several GPUs: {', '.join(DEVICE_MAPS)}, or JSON that maps module names to "
        "devices.",
        device_map(),
    )
    dtype: Dtype = option("auto", "Data type of the weights; auto keeps the checkpoint's.")
    trust_remote_code: bool = option(False, "Run Python code that comes with the checkpoint.")
    stream_layers: StreamLayers = option(
        "auto", "Keep one decoder layer in memory at a time; auto does so if the whole model would not fit."
    )
    stream_memory: str = option(
        "4GiB",
        "With streamed layers: memory for the samples' residual streams. The more there is, the less often the weights "
        "are read; streams that do not fit go to disk.",
        memory_size(),
    )

    @property
    def kinds(self) -> tuple[str, ...] | None:
        """The kinds of groups to prune; None for the default."""
        return None if self.prune_kinds is None else tuple(self.prune_kinds.split(","))

    @property
    def target(self) -> str | None:
        """The name of the option that sets a target instead of a ratio; None if none does."""
        return next((name for name in TARGETS if getattr(self, name) is not None), None)

    @property
    def target_value(self) -> str | float | None:
        """The value of the option that `target` names; None if there is none."""
        return None if self.target is None else getattr(self, self.target)

    def check_speed(self, *, streamed: bool) -> None:
        """Raise ConfigError if a speed is the target and the model is streamed, so that its disk limits the speed."""
        if streamed and self.target_speedup is not None:
            raise ConfigError(
                "target_speedup: the speed of a streamed model is that of its disk; choose another target"
            )

    def check_together(self) -> None:
        """Refuse options of the model that exclude each other.

        These are several targets; a target speed with streaming; whole experts together with their channels; and a
        device_map together with `device` or streaming.
        """
        super().check_together()
        targets = [name for name in TARGETS if getattr(self, name) is not None]
        if len(targets) > 1:
            raise ConfigError(f"{targets[1]}: {targets[0]} is given too, but a run has one target; leave one out")
        self.check_speed(streamed=self.stream_layers == "on")
        if {"experts", "expert_channels"} <= set(self.kinds or ()):
            raise ConfigError(
                f"prune_kinds: '{self.prune_kinds}' names whole experts and their channels; prune by one of them, and "
                "then the result by the other"
            )
        if self.device_map is None:
            return
        if self.device != "auto":
            raise ConfigError(f"device: '{self.device}' is one device, but device_map uses several; leave one out")
        if self.stream_layers == "on":
            raise ConfigError("device_map: keeps all layers on the devices; set stream_layers to 'auto' or 'off'")


@dataclass(frozen=True)
class Data(Options):
    """Data."""

    dataset: str | None = option(
        None,
        "Text: a .txt, .jsonl or .npy file, or wikitext2, ptb or c4, or several with their shares, such as "
        "a.txt:0.7,b.jsonl:0.3; default the embedded text.",
        _DATASET,
    )
    eval_dataset: str | None = option(
        None, "Held-out text on which perplexity is measured; default the end of dataset.", _DATASET
    )
    own_text: float = option(
        0.0,
        "Share of the calibration and held-out samples that the model writes itself, to preserve what dataset does not "
        "cover; 1 calibrates only on such samples.",
        numbers("between 0 and 1", lambda x: 0.0 <= x <= 1.0),
    )
    num_samples: int = option(256, "Calibration samples, drawn without replacement.", at_least(1))
    seq_len: int = option(128, "Tokens per sample.", at_least(2))
    batch_size: int = option(8, "Samples per forward pass.", at_least(1))
    held_out_samples: int = option(
        32, "Held-out samples on which repair and distillation choose their settings.", at_least(1)
    )
    eval_samples: int | None = option(
        None, "Largest number of windows of text on which perplexity is measured; default all.", at_least(1)
    )
    tasks: str | None = option(
        None,
        "Zero-shot tasks, separated by commas: .jsonl files of questions, or names of lm-eval's tasks.",
        path("files of questions or names of tasks"),
    )
    task_questions: int | None = option(None, "Largest number of questions per task; default all.", at_least(1))
    prompts: str | None = option(
        None,
        "Text file with one prompt per line, which both models continue in the report; default from eval_dataset.",
        path("a text file"),
    )
    generations: bool = option(True, "Show in the report what the dense and the pruned model write after the prompts.")
    seed: int = option(
        0, "Seed for drawing the samples, writing own_text, and rounding in distillation.", at_least(0, most=INT64_MAX)
    )

    def check_together(self) -> None:
        """Refuse a number of questions without tasks."""
        super().check_together()
        if self.task_questions is not None and self.tasks is None:
            raise ConfigError(
                f"task_questions: {self.task_questions} is given, but tasks is not; give both, or neither"
            )


@dataclass(frozen=True)
class Calibration(Options):
    """Calibration."""

    reduction: ReductionName = option(
        "sample", "Use each sample's own gradient (sample), or the cheaper mean gradient of each batch (batch)."
    )
    backend: ImportanceBackend = option(
        "auto", "Implementation that computes importances; auto takes the fastest available."
    )
    use_gradient_checkpointing: bool = option(False, "Recompute activations, for less memory and more time.")
    prior_samples: int = option(
        16, "Number of calibration samples on which the priors removal and similarity are measured.", at_least(1)
    )
    evidence: EvidenceName = option(
        "needed",
        "Collect what importance_method needs (needed), or what every method and gradient_fix needs (all); with "
        "importance_method auto, always all.",
    )
    collect_batches: int = option(
        2,
        "Number of batches, from the first, whose gradients are diagnosed and plotted; with obs, no more than the "
        f"first {CURVATURE_SAMPLES} samples; with --evidence all, every batch.",
        at_least(1),
    )
    evidence_file: str | None = option(
        None,
        "Reuse the calibration of an earlier run on this model, from its analysis/evidence.safetensors.",
        path("the analysis/evidence.safetensors of an earlier run"),
    )


@dataclass(frozen=True)
class Scoring(Options):
    """Scoring."""

    importance_method: MethodOption | None = option(
        None,
        "How groups are scored; auto searches for the best method and settings. Default obs; for whole experts or "
        "without repair, group_fisher.",
    )
    gradient_fix: str = option(
        "none",
        f"Rescaling of vanishing gradients: {', '.join(GRADIENT_FIXES)}, a chain such as adaptive+depth:sqrt, "
        "or auto, which follows the diagnosis.",
        FIX_OR_CHAIN,
    )
    normalize_scores: Normalize = option(
        "none",
        "How to normalize the scores within each layer (or block, see normalize_per), to make layers comparable.",
    )
    normalize_per: NormalizePer = option("layer", "Unit within which scores are normalized and clipped.")
    clip_percentile: float = option(
        100.0,
        "Clip scores, before they are normalized, at this percentile and at 100 minus it; 100 does not clip.",
        numbers("above 50 and at most 100", lambda x: 50.0 < x <= 100.0),
    )
    attention_factor: float = option(
        1.0,
        "Factor on the scores of KV groups, to balance them against channels.",
        finite("above 0", lambda x: x > 0.0),
    )
    temperature: float = option(
        0.0,
        "Temperature of H-GSP (hierarchical global structural pruning): how strongly the importance of its block or "
        "layer changes a group's score; 0 turns H-GSP off.",
        finite("of at least 0", lambda x: x >= 0.0),
    )
    tau: float | None = option(
        None,
        "H-GSP gate: layers less important than this are modulated as a whole, the others block by block; default the "
        "25th percentile of the layers' importances.",
        numbers("between 0 and inf (both included)", lambda x: x >= 0.0),
    )
    prior: Prior = option(
        "removal",
        "How H-GSP measures the importance of a block or layer: how much the loss rises without it (removal), how much "
        "it turns the residual stream (similarity), or the gradient of a gate on its output (taylor).",
    )

    @property
    def method(self) -> Method:
        """The importance method, which must not be "auto" any more."""
        assert self.importance_method is not None
        assert self.importance_method != "auto"
        return self.importance_method

    def decide(self) -> None:
        """Set the default method if none is named, so that there always is one."""
        super().decide()
        if self.importance_method is None:
            object.__setattr__(self, "importance_method", DEFAULT_METHODS[0])

    def check_together(self) -> None:
        """Refuse a gradient fix for a method that uses no gradients."""
        super().check_together()
        if self.gradient_fix != "none" and self.importance_method not in ("auto", *GRADIENT_METHODS):
            raise ConfigError(
                f"gradient_fix: '{self.gradient_fix}' changes nothing, because importance_method "
                f"'{self.importance_method}' uses no gradients; leave it out, or choose importance_method "
                f"{', '.join(GRADIENT_METHODS[:-1])} or {GRADIENT_METHODS[-1]}"
            )


@dataclass(frozen=True)
class Search(Options):
    """Search."""

    search_samples: int = option(
        64, "Samples on which search compares settings; none of them is used for calibration or repair.", at_least(2)
    )
    search_minutes: float = option(
        30.0,
        "Time limit of the search (importance_method auto), in minutes; when time runs out, the search decides by what "
        "it has measured.",
        numbers("above 0", lambda x: x > 0.0),
    )


@dataclass(frozen=True)
class Constraints(Options):
    """Constraints."""

    freeze_first_n_layers: int = option(0, "Number of leading decoder layers to leave unpruned.", at_least(0))
    freeze_last_n_layers: int = option(0, "Number of trailing decoder layers to leave unpruned.", at_least(0))
    max_layer_ratio: float = option(1.0, "Largest fraction of a layer's prunable parameters to remove.", _UNIT_OR_ONE)
    round_to: int = option(
        1, "Keep MLP and expert widths that are multiples of this, e.g. 64 for tensor cores.", at_least(1)
    )
    uniform: bool = option(
        False, "Keep the same widths in all layers: the result is a plain checkpoint of the original architecture."
    )
    epsilon: float = option(
        0.0,
        "Remove every layer whose blocks would keep, on average, less than this fraction of their groups; 0 removes no "
        "layer.",
        numbers("between 0 and 1", lambda x: 0.0 <= x <= 1.0),
    )
    serve: Serve | None = option(
        None,
        "Prune so that a program can load the result: hf (transformers), vllm, gguf (llama.cpp; also writes "
        "model.gguf), or uniform, for any program.",
    )
    tensor_parallel: int = option(1, "Keep widths that vLLM can split over this many devices.", at_least(1))

    @property
    def same_widths(self) -> bool:
        """Whether all layers must keep the same widths."""
        return self.uniform or self.serve == "uniform"

    @property
    def keeps_attention(self) -> bool:
        """Whether every layer must keep attention."""
        return self.serve == "vllm"

    def multiple(self, *, rounded: bool) -> int:
        """Return what a pruned block's number of groups must be a multiple of; rounded: `round_to` applies to it."""
        # llama.cpp's common types store 32 values at a time.
        own = math.lcm(self.round_to, 32 if self.serve == "gguf" else 1) if rounded else 1
        return math.lcm(own, self.tensor_parallel)

    def check_together(self) -> None:
        """Refuse frozen layers with uniform widths, epsilon with vLLM, tensor_parallel for all but vLLM and uniform."""
        super().check_together()
        if self.same_widths and (self.freeze_first_n_layers or self.freeze_last_n_layers):
            raise ConfigError(
                f"{'uniform' if self.uniform else 'serve'}: cannot be combined with freeze_first_n_layers or "
                "freeze_last_n_layers; frozen layers keep their full width, so all layers would have to"
            )
        if self.keeps_attention and self.epsilon > 0.0:
            raise ConfigError(
                "epsilon: removes whole layers, but serve 'vllm' needs attention in every layer; leave out epsilon, or "
                "choose another serve"
            )
        if self.tensor_parallel > 1 and self.serve not in ("vllm", "uniform"):
            raise ConfigError(
                f"tensor_parallel: {self.tensor_parallel} is only for results that vLLM loads; add --serve vllm or "
                "--serve uniform"
            )


@dataclass(frozen=True)
class Repair(Options):
    """Repair of the remaining weights."""

    repair: RepairName = option(
        "least_squares", "Re-solve the output projections of pruned blocks by least squares, or leave them (none)."
    )
    distill_samples: int | None = option(
        None,
        "Number of calibration samples on which the repaired weights are distilled, towards the dense model's "
        "predictions; 4 samples a step, fewer if they exceed 512 tokens. Default as many as have "
        f"{DISTILL_TOKENS:,} tokens; 0 for models above {DISTILL_PARAMETERS // 10**9} billion parameters.",
        at_least(0),
    )
    distill_text: float = option(
        DISTILL_TEXT,
        "Weight of the next-token loss in distillation; the rest goes to matching the dense model's predictions.",
        numbers("between 0 and 1", lambda x: 0.0 <= x <= 1.0),
    )
    shots: int = option(1, "Prune in this many steps, with repair and another calibration between them.", at_least(1))

    def check_together(self) -> None:
        """Refuse distillation or several shots without a repair, and distill_text without distillation."""
        super().check_together()
        if self.distill_text != DISTILL_TEXT and (self.repair == "none" or self.distill_samples == 0):
            raise ConfigError(
                f"distill_text: {self.distill_text:g} changes nothing without distillation; leave out "
                f"{'--repair none' if self.repair == 'none' else '--distill_samples 0'}, or distill_text"
            )
        if self.repair != "none":
            return
        if self.distill_samples:
            raise ConfigError(
                f"distill_samples: {self.distill_samples} is given, but only a repaired model is distilled; leave out "
                "--repair none, or give distill_samples 0"
            )
        if self.shots > 1:
            raise ConfigError(
                f"shots: {self.shots} is given, but each further shot calibrates a repaired model; leave out --repair "
                "none, or give shots 1"
            )


@dataclass(frozen=True)
class Output(Options):
    """Output."""

    output_dir: str = option("results", "Folder in which results folders are created.", path("a folder"))
    output_name: str | None = option(
        None, "Name of the results folder; default made from the model's name and what is done to it.", folder_name()
    )
    overwrite: bool = option(False, "Replace an existing results folder.")
    max_shard_size: str = option(
        "50GB", "Largest size of a file of weights; a larger model is split into several files.", memory_size()
    )
    checkpoint_every: int | None = option(
        None,
        "Save the state of calibration every this many samples, so that --resume can continue; default never.",
        at_least(1),
    )
    resume: bool = option(False, "Continue the calibration of an interrupted run with the same output_name.")
    measure_speed: bool = option(True, "Time the dense and the pruned model, which keeps both in memory.")
    in_place: bool = option(
        False, "Cut the given model itself, which saves the memory of a second model.", library_only=True
    )

    def check_together(self) -> None:
        """Refuse in_place with measure_speed: after cutting in place there is no dense model left to time."""
        super().check_together()
        if self.in_place and self.measure_speed:
            raise ConfigError("in_place: leaves no dense model to time; give measure_speed=False too")


PARTS: tuple[type[Options], ...] = (Model, Data, Calibration, Scoring, Search, Constraints, Repair, Output)
