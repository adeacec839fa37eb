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

# The options that importance_method "auto" chooses.
_SEARCHED = ("temperature", "tau", "gradient_fix", "normalize_scores", "normalize_per", "attention_factor")


# The bases are in reverse order, because the fields of a dataclass begin with those of its last base.
@dataclass(frozen=True)
class PruneConfig(Output, Repair, Constraints, Search, Scoring, Calibration, Data, Model):
    """The options of a pruning run, all of them optional; `docs/options.md` lists them.

    `gradprune.config.parts` defines them in groups. A group can be extracted (`scoring`, `constraints`, `part`) as a
    hashable value.

    Raises:
        ConfigError: a value is outside its option's domain, or options contradict each other.
    """

    @property
    def scoring(self) -> Scoring:
        """The options that determine the scores."""
        return self.part(Scoring)

    @property
    def constraints(self) -> Constraints:
        """The options that limit the selection."""
        return self.part(Constraints)

    @property
    def curvatures_alone(self) -> bool:
        """Whether gradients are needed only for the curvatures of "obs", so that a few samples suffice for them."""
        taylor_prior = self.prior == "taylor" and self.temperature > 0.0
        more = self.evidence == "all" or taylor_prior or self.gradient_fix != "none"
        return self.importance_method == "obs" and not more

    @property
    def uses_priors(self) -> bool:
        """Whether scores need the priors of `prior`, or may need them after a search."""
        return self.temperature > 0.0 or self.importance_method == "auto"

    @property
    def samples_drawn(self) -> tuple[int, int]:
        """The numbers of calibration and, at most, held-out samples to draw; 0 of those that no stage uses."""
        repairs = self.repair != "none"
        calibrates = repairs or self.evidence_file is None or self.uses_priors
        return self.num_samples if calibrates else 0, self.held_out_samples if repairs else 0

    @property
    def samples_written(self) -> tuple[int, int]:
        """The numbers of calibration and held-out samples, among `samples_drawn`, that the model writes itself."""
        calibration, held_out = self.samples_drawn
        return round(self.own_text * calibration), round(self.own_text * held_out)

    def samples_distilled(self, parameters: int) -> int:
        """Return the number of calibration samples on which a model with this many parameters is distilled."""
        if self.distill_samples is not None:
            return self.distill_samples
        if self.repair == "none" or parameters > DISTILL_PARAMETERS:
            return 0
        return min(self.num_samples, max(1, DISTILL_TOKENS // self.seq_len))

    def part(self, group: type[_Part]) -> _Part:
        """Return the options of one group."""
        return group(**{name: getattr(self, name) for name in options_of(group)})

    def with_part(self, part: Options) -> "PruneConfig":
        """Return a copy with the options of one group replaced by those of `part`."""
        return replace(self, **vars(part))

    def decide(self) -> None:
        """Set the default method, which depends on the kinds that are pruned and on the repair, if none is named."""
        if self.importance_method is None:
            object.__setattr__(self, "importance_method", default_methods(self.repair, self.kinds or ())[0])
        super().decide()

    def check_together(self) -> None:
        """Refuse "reap" except for whole experts, several shots with them, and options that "auto" chooses."""
        super().check_together()
        if self.importance_method == "reap" and self.kinds != ("experts",):
            raise ConfigError(
                "importance_method: 'reap' scores whole experts and nothing else; add --prune_kinds experts, or choose "
                "another method"
            )
        if self.shots > 1 and "experts" in (self.kinds or ()):
            raise ConfigError(
                f"shots: {self.shots} is not possible with whole experts, because between shots the router would still "
                "choose those that were removed; give shots 1, or another prune_kinds"
            )
        if self.importance_method != "auto":
            return
        for name in _SEARCHED:
            # The gradients of batches are fixed as they are computed, before the search could choose.
            if self.reduction == "batch" and name == "gradient_fix":
                continue
            if getattr(self, name) != OPTIONS[name].default:
                raise ConfigError(f"{name}: importance_method 'auto' chooses it; leave it out, or name a method")

    def to_dict(self) -> dict[str, Any]:
        """Return the options as a JSON-serialisable dict, for `run.json`."""
        return {name: getattr(self, name) for name in OPTIONS}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "PruneConfig":
        """Return the options of a mapping from `to_dict`, also as read from `run.json`; missing ones are defaults.

        Raises:
            ConfigError: an option is unknown or has an invalid value.
        """
        given = dict(options)
        for name, value in given.items():
            if name not in OPTIONS:
                raise ConfigError(f"{name}: is not an option; the options are {', '.join(OPTIONS)}")
            # JSON has no infinity, so `run.json` has it as text.
            if value == "inf" and OPTIONS[name].kind is float:
                given[name] = float(value)
        return cls(**given)


OPTIONS: Mapping[str, Option] = options_of(PruneConfig)
