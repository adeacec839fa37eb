"""`describe`: the prunable blocks of a loaded model, of an architecture that is tested or passes the self-test."""

import logging
from collections.abc import Collection
from dataclasses import replace

from transformers import PreTrainedConfig, PreTrainedModel

from gradprune.errors import ConfigError, UnsupportedArchitectureError
from gradprune.models.blocks import LinearBlock, PrunableModel
from gradprune.models.kinds import DEFAULT_KINDS
from gradprune.models.modeling_gradprune import stock_class
from gradprune.models.self_test import self_test
from gradprune.models.tested import LEFT_WHOLE, tested_architectures, tested_kinds
from gradprune.models.view import view_of

logger = logging.getLogger(__name__)

_SAID: set[str] = set()


def describe(model: PreTrainedModel, kinds: Collection[str] | None = None) -> PrunableModel:
    """Find the prunable blocks of `model`.

    Args:
        model: a causal LM.
        kinds: of blocks to find; by default all but whole experts, as far as the model has them.

    Raises:
        UnsupportedArchitectureError: the architecture is neither tested nor passes `self_test`, or a projection is not
            a plain floating-point linear layer (quantised weights, adapters).
        ConfigError: the model has no block of one of the `kinds`, or one goes only with another.
    """
    if kinds is None:
        return view_of(model, set(accepted_kinds(model.config, type(model))) & set(DEFAULT_KINDS))
    whole = whole_view(model)
    there = {block.kind.name: None for block in whole.blocks}
    if missing := [kind for kind in kinds if kind not in there]:
        raise ConfigError(
            f"prune_kinds: this model, a {model.config.model_type}, has no {missing[0]} that could be pruned; it has "
            f"{', '.join(there) or 'nothing'}"
        )
    blocks = tuple(block for block in whole.blocks if block.kind.name in kinds)
    follow = any(isinstance(block, LinearBlock) and block.follows for block in whole.blocks)
    if follow and ("expert_channels" in kinds) != ("shared_experts" in kinds):
        raise ConfigError(
            "prune_kinds: the configuration of this model states one width for its routed and its shared experts; name "
            "expert_channels and shared_experts, or neither"
        )
    return replace(whole, blocks=blocks)


def whole_view(model: PreTrainedModel) -> PrunableModel:
    """The blocks of all kinds; a layer's experts are there twice, by their channels and whole.

    Raises:
        UnsupportedArchitectureError: as `describe`.
    """
    return view_of(model, accepted_kinds(model.config, type(model)))


def accepted_kinds(config: PreTrainedConfig, model_class: type | None = None) -> tuple[str, ...]:
    """The kinds of blocks that are pruned in models of this configuration; says once what is left whole or was tested.

    Args:
        config: of the model, pruned before or not.
        model_class: of the model; by default transformers' causal LM of that configuration.

    Raises:
        UnsupportedArchitectureError: there is none; says what failed.
    """
    tested = tested_kinds(config)
    if tested:
        for kind, reason in LEFT_WHOLE.get(config.model_type, {}).items():
            _say_once(f"architecture '{config.model_type}': {kind} is left whole: {reason}")
        return tested
    found = self_test(config, None if model_class is None else stock_class(model_class))
    line = f"architecture '{config.model_type}' is not on the tested list; {found.sentence()}"
    if not found.accepted:
        raise UnsupportedArchitectureError(
            f"base_model: {line}; tested are {tested_architectures()} (gradprune info --architectures lists all)"
        )
    _say_once(line)
    return found.accepted


def _say_once(line: str) -> None:
    if line not in _SAID:
        _SAID.add(line)
        logger.warning(line)
