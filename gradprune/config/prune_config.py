"""`PruneConfig`: the options of a pruning run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from gradprune.config.option import Option, Options, options_of
from gradprune.config.parts import (
    DISTILL_PARAMETERS,
    DISTILL_TOKENS,
    Calibration,
    Constraints,
    Data,
    Model,
    Output,
    Repair,
    Scoring,
    Search,
    default_methods,
)
from gradprune.errors import ConfigError

_Part = TypeVar("_Part", bound=Options)

# What importance_method "auto" decides.
_SEARCHED = ("temperature", "tau", "gradient_fix", "normalize_scores", "normalize_per", "attention_factor")


# The bases stand in reverse, because a dataclass takes the fields of its last base first.
@dataclass(frozen=True)
class PruneConfig(Output, Repair, Constraints, Search, Scoring, Calibration, Data, Model):
    """The options of a pruning run, all of them optional; `docs/options.md` lists them.

    `gradprune.config.parts` defines them, in groups; a group can be taken out (`scoring`, `constraints`, `part`) and is
    a hashable value of its own.

    Raises:
        ConfigError: a value is outside its option's domain, or options contradict each other.
    """

    @property
    def scoring(self) -> Scoring:
        """Everything that decides scores."""
        return self.part(Scoring)

    @property
    def constraints(self) -> Constraints:
        """What limits the selection."""
        return self.part(Constraints)

    @property
    def curvatures_alone(self) -> bool:
        """Whether gradients are needed for the curvatures of "obs" alone, so that those of few samples do."""
        taylor_prior = self.prior == "taylor" and self.temperature > 0.0
        more = self.evidence == "all" or taylor_prior or self.gradient_fix != "none"
        return self.importance_method == "obs" and not more

    @property
    def uses_priors(self) -> bool:
        """Whether scores need the priors of `prior`, or may turn out to."""
        return self.temperature > 0.0 or self.importance_method == "auto"

    @property
    def samples_drawn(self) -> tuple[int, int]:
        """Calibration samples and, at most, held-out ones: none of those that nothing would be run on."""
        repairs = self.repair != "none"
        calibrates = repairs or self.evidence_file is None or self.uses_priors
        return self.num_samples if calibrates else 0, self.held_out_samples if repairs else 0

    @property
    def samples_written(self) -> tuple[int, int]:
        """How many of `samples_drawn` the model writes itself."""
        calibration, held_out = self.samples_drawn
        return round(self.own_text * calibration), round(self.own_text * held_out)

    def samples_distilled(self, parameters: int) -> int:
        """Calibration samples that distil a model of so many parameters."""
        if self.distill_samples is not None:
            return self.distill_samples
        if self.repair == "none" or parameters > DISTILL_PARAMETERS:
            return 0
        return min(self.num_samples, max(1, DISTILL_TOKENS // self.seq_len))

    def part(self, group: type[_Part]) -> _Part:
        """The options of one group."""
        return group(**{name: getattr(self, name) for name in options_of(group)})

    def with_part(self, part: Options) -> "PruneConfig":
        """The same with the options of `part`."""
        return replace(self, **vars(part))

    def decide(self) -> None:
        """The default method depends on the kinds that are pruned, and on the repair."""
        if self.importance_method is None:
            object.__setattr__(self, "importance_method", default_methods(self.repair, self.kinds or ())[0])
        super().decide()

    def check_together(self) -> None:
        """Refuse "reap" for all but whole experts, shots with whole experts, and options that "auto" chooses."""
        super().check_together()
        if self.importance_method == "reap" and self.kinds != ("experts",):
            raise ConfigError(
                "importance_method: 'reap' scores whole experts and nothing else; add --prune_kinds experts, or choose "
                "another method"
            )
        if self.shots > 1 and "experts" in (self.kinds or ()):
            raise ConfigError(
                f"shots: {self.shots} need a model whose router knows which experts are gone; give shots 1 for whole "
                "experts"
            )
        if self.importance_method != "auto":
            return
        for name in _SEARCHED:
            # The gradients of batches are fixed as they come, before anything can be decided.
            if self.reduction == "batch" and name == "gradient_fix":
                continue
            if getattr(self, name) != OPTIONS[name].default:
                raise ConfigError(f"{name}: importance_method 'auto' chooses it; leave it out, or name a method")

    def to_dict(self) -> dict[str, Any]:
        """The options as a JSON-serialisable mapping, for `run.json`."""
        return {name: getattr(self, name) for name in OPTIONS}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "PruneConfig":
        """The options that `to_dict` gave, also as read from `run.json`; what is missing is default.

        Raises:
            ConfigError: an option is unknown, or its value is.
        """
        given = dict(options)
        for name, value in given.items():
            if name not in OPTIONS:
                raise ConfigError(f"{name}: is no option; the options are {', '.join(OPTIONS)}")
            # JSON has no infinity: `run.json` has it as text.
            if value == "inf" and OPTIONS[name].kind is float:
                given[name] = float(value)
        return cls(**given)


OPTIONS: Mapping[str, Option] = options_of(PruneConfig)
