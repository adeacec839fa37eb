"""`describe`: find the prunable blocks of a loaded model whose architecture is tested or passes the self-test."""

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

_LOGGED: set[str] = set()


def describe(model: PreTrainedModel, kinds: Collection[str] | None = None) -> PrunableModel:
    """Find the prunable blocks of `model`.

    Args:
        model: a causal LM.
        kinds: the kinds of blocks to find, all of which the model must have; None finds every kind that it has except
            whole experts.

    Raises:
        UnsupportedArchitectureError: the architecture is neither tested nor passes `self_test`, or a projection is not
            a plain floating-point linear layer (quantised weights, adapters).
        ConfigError: the model has no block of one of the `kinds`, or one of them can only be pruned with another.
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
    """Find the blocks of all accepted kinds; a layer's experts occur twice, by channel and whole.

    Raises:
        UnsupportedArchitectureError: see `describe`.
    """
    return view_of(model, accepted_kinds(model.config, type(model)))


def accepted_kinds(config: PreTrainedConfig, model_class: type | None = None) -> tuple[str, ...]:
    """Return the kinds of blocks that can be pruned in models of this configuration.

    Logs, once per process, which kinds are left whole and why, or the result of the self-test.

    Args:
        config: the model's configuration, whether the model was pruned before or not.
        model_class: the model's class; by default transformers' causal LM of this configuration.

    Raises:
        UnsupportedArchitectureError: no kind can be pruned; the message says what failed.
    """
    tested = tested_kinds(config)
    if tested:
        for kind, reason in LEFT_WHOLE.get(config.model_type, {}).items():
            _log_once(f"architecture '{config.model_type}': {kind} is left whole: {reason}")
        return tested
    found = self_test(config, None if model_class is None else stock_class(model_class))
    line = f"architecture '{config.model_type}' is not on the tested list; {found.sentence()}"
    if not found.accepted:
        raise UnsupportedArchitectureError(
            f"base_model: {line}; tested are {tested_architectures()} (gradprune info --architectures lists all)"
        )
    _log_once(line)
    return found.accepted


def _log_once(line: str) -> None:
    if line not in _LOGGED:
        _LOGGED.add(line)
        logger.warning(line)
