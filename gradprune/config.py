"""`PruneConfig`: every option of a pruning run, validated once, here."""

import math
import shlex
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from gradprune.errors import ConfigError

Method = Literal["magnitude", "wanda", "taylor", "taylor_2nd", "fisher", "group_fisher"]
# "auto" searches, see `gradprune.search`.
MethodOption = Literal["auto", "magnitude", "wanda", "taylor", "taylor_2nd", "fisher", "group_fisher"]
Reduction = Literal["sample", "batch"]
Prior = Literal["removal", "similarity", "taylor"]
Backend = Literal["auto", "reference", "cpp", "triton", "cuda"]
Normalize = Literal["none", "log", "minmax", "zscore", "sqrt"]
NormalizePer = Literal["layer", "block"]
Repair = Literal["none", "least_squares"]
Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]

# Repairs of vanishing gradients; several joined by "+" make one too.
GRADIENT_FIXES = ("adaptive", "normalize", "depth:linear", "depth:sqrt", "depth:log")

METHODS: tuple[Method, ...] = get_args(Method)
GRADIENT_METHODS = ("taylor", "taylor_2nd", "fisher", "group_fisher")


@dataclass(frozen=True)
class PruneConfig:
    """Options of a pruning run; the command line's options have the same names and defaults.

    base_model: path or hub id; None uses the embedded demo model (command line only).
    pruning_ratio: fraction of all the model's parameters to remove, in (0, 1).
    importance_method, reduction: element score and how samples are reduced, see `gradprune.calibration.methods`.
    temperature, tau, epsilon, prior, prior_samples: H-GSP, see `gradprune.scoring.hgsp`. `tau=None` is the 25th
        percentile of the layer importances; `prior_samples` calibration samples measure the priors.
    gradient_fix: repair of vanishing gradients, see `gradprune.vanishing.scaling`; "auto" follows the diagnosis.
    normalize_scores, normalize_per, clip_percentile, attention_factor: see `gradprune.scoring.normalization`.
    repair, held_out_samples: what is done about the weights that stay, see `gradprune.surgery.least_squares`, and how
        many calibration samples beyond `num_samples` its choices are made on.
    collect_batches: how many calibration batches the gradient plots compare.
    search_minutes: what importance_method "auto" may take; it then decides with what it has seen.
    scores: `analysis/scores.safetensors` of an earlier run on the same model, instead of calibrating again.
    freeze_first_n_layers, freeze_last_n_layers: decoder layers left whole at either end.
    max_layer_ratio: largest fraction of one layer's prunable parameters that may go, in (0, 1].
    round_to: kept MLP width of each layer is a multiple of this.
    uniform: all layers keep the same widths, so that the result is a plain checkpoint.
    dataset, eval_dataset: text for calibration and for perplexity, see `gradprune.data.sources`; without
        `eval_dataset` the end of `dataset` is held out.
    num_samples, seq_len, batch_size, seed: calibration samples of `seq_len` tokens, drawn without replacement.
    eval_samples: perplexity is measured on at most this many windows of `seq_len` tokens; None means all.
    device: "auto" takes CUDA where there is one. dtype: "auto" keeps the checkpoint's.
    measure_speed: time dense and pruned side by side; needs both in memory. Without it the model is cut in place.
    """

    base_model: str | None = None
    output_name: str | None = None
    output_dir: str = "results"
    overwrite: bool = False
    pruning_ratio: float = 0.2
    importance_method: MethodOption = "group_fisher"
    reduction: Reduction = "sample"
    backend: Backend = "auto"
    temperature: float = 0.0
    tau: float | None = None
    epsilon: float = 0.0
    prior: Prior = "removal"
    prior_samples: int = 16
    gradient_fix: str = "none"
    normalize_scores: Normalize = "none"
    normalize_per: NormalizePer = "layer"
    clip_percentile: float = 100.0
    attention_factor: float = 1.0
    repair: Repair = "least_squares"
    held_out_samples: int = 32
    collect_batches: int = 5
    scores: str | None = None
    search_minutes: float = 30.0
    freeze_first_n_layers: int = 0
    freeze_last_n_layers: int = 0
    max_layer_ratio: float = 1.0
    round_to: int = 1
    uniform: bool = False
    dataset: str | None = None
    eval_dataset: str | None = None
    num_samples: int = 128
    seq_len: int = 128
    batch_size: int = 8
    eval_samples: int | None = None
    seed: int = 0
    use_gradient_checkpointing: bool = False
    device: str = "auto"
    dtype: Dtype = "auto"
    trust_remote_code: bool = False
    measure_speed: bool = True

    def __post_init__(self) -> None:
        """Reject every value outside its domain.

        Raises:
            ConfigError: naming the option, its value and what would be right.
        """
        if not 0.0 < self.pruning_ratio < 1.0:
            raise ConfigError(f"pruning_ratio: {self.pruning_ratio} is not between 0 and 1 (both excluded)")
        if not 0.0 < self.max_layer_ratio <= 1.0:
            raise ConfigError(f"max_layer_ratio: {self.max_layer_ratio} is not above 0 and at most 1")
        if not 0.0 <= self.epsilon <= 1.0:
            raise ConfigError(f"epsilon: {self.epsilon} is not between 0 and 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise ConfigError(f"temperature: {self.temperature} is not a finite number of at least 0")
        if self.tau is not None and not self.tau >= 0.0:
            raise ConfigError(f"tau: {self.tau} is not at least 0 (inf is allowed)")
        if not 50.0 < self.clip_percentile <= 100.0:
            raise ConfigError(f"clip_percentile: {self.clip_percentile} is not above 50 and at most 100")
        if not (math.isfinite(self.attention_factor) and self.attention_factor > 0.0):
            raise ConfigError(f"attention_factor: {self.attention_factor} is not a finite number above 0")
        for option in ("num_samples", "batch_size", "prior_samples", "round_to", "collect_batches", "held_out_samples"):
            _at_least(option, getattr(self, option), 1)
        _at_least("seq_len", self.seq_len, 2)
        for option in ("freeze_first_n_layers", "freeze_last_n_layers", "seed"):
            _at_least(option, getattr(self, option), 0)
        if self.eval_samples is not None:
            _at_least("eval_samples", self.eval_samples, 1)
        if not self.search_minutes > 0.0:
            raise ConfigError(f"search_minutes: {self.search_minutes} is not above 0")
        _one_of("importance_method", self.importance_method, get_args(MethodOption))
        _one_of("reduction", self.reduction, get_args(Reduction))
        _one_of("backend", self.backend, get_args(Backend))
        _one_of("prior", self.prior, get_args(Prior))
        _one_of("dtype", self.dtype, get_args(Dtype))
        _one_of("normalize_scores", self.normalize_scores, get_args(Normalize))
        _one_of("normalize_per", self.normalize_per, get_args(NormalizePer))
        _one_of("repair", self.repair, get_args(Repair))
        check_gradient_fix(self.gradient_fix)
        if self.importance_method == "auto":
            self._check_left_to_search()
        elif self.gradient_fix != "none" and self.importance_method not in GRADIENT_METHODS:
            raise ConfigError(
                f"gradient_fix: '{self.gradient_fix}' changes nothing, because importance_method "
                f"'{self.importance_method}' uses no gradients; choose one of {', '.join(GRADIENT_METHODS)}"
            )
        if self.uniform and (self.freeze_first_n_layers or self.freeze_last_n_layers):
            raise ConfigError(
                "uniform: cannot be combined with freeze_first_n_layers or freeze_last_n_layers; "
                "frozen layers keep their width, so all layers would"
            )
        name = self.output_name
        if name is not None and (name in ("", ".", "..") or Path(name).name != name):
            raise ConfigError(f"output_name: '{name}' is not a plain folder name; put its parent in output_dir")

    def _check_left_to_search(self) -> None:
        """What "auto" decides cannot be given too."""
        default = {field.name: field.default for field in fields(self)}
        decided = ("temperature", "tau", "gradient_fix", "normalize_scores", "normalize_per", "attention_factor")
        for option in decided:
            if self.reduction == "batch" and option == "gradient_fix":
                continue
            if getattr(self, option) != default[option]:
                raise ConfigError(f"{option}: importance_method 'auto' chooses it; leave it out, or name a method")

    def to_dict(self) -> dict[str, Any]:
        """The options as a JSON-serialisable mapping, for `run.json`."""
        return asdict(self)


def check_gradient_fix(fix: str) -> None:
    """Accept "none", "auto", one of `GRADIENT_FIXES`, or several of these joined by "+".

    Raises:
        ConfigError: naming the part that is unknown.
    """
    if fix in ("none", "auto"):
        return
    for part in fix.split("+"):
        if part not in GRADIENT_FIXES:
            raise ConfigError(
                f"gradient_fix: '{part}' in '{fix}' is unknown; choose none, auto, one of {', '.join(GRADIENT_FIXES)}, "
                "or several of them joined by +"
            )


def _at_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}: {value} is not a whole number of at least {least}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}: '{value}' is unknown; choose one of {', '.join(allowed)}")


def command_line(config: PruneConfig) -> str:
    """The exact `gradprune prune` command of a configuration: every option that is not at its default."""
    default = PruneConfig()
    words = ["gradprune", "prune"]
    for name, value in config.to_dict().items():
        if value == getattr(default, name) or value is None:
            continue
        words += [f"--{name}"] if value is True else [f"--no_{name}"] if value is False else [f"--{name}", str(value)]
    return shlex.join(words)
