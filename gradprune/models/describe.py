"""`describe`: the prunable blocks of a loaded model, of an architecture that is tested or passes the self-test."""

import logging

from transformers import PreTrainedConfig, PreTrainedModel

from gradprune.errors import UnsupportedArchitectureError
from gradprune.models.blocks import PrunableModel
from gradprune.models.modeling_gradprune import stock_class
from gradprune.models.self_test import self_test
from gradprune.models.tested import TESTED, tested_architectures
from gradprune.models.view import view_of

logger = logging.getLogger(__name__)

_SAID: set[str] = set()


def describe(model: PreTrainedModel) -> PrunableModel:
    """Find the prunable blocks of `model`.

    Raises:
        UnsupportedArchitectureError: the architecture is neither tested nor passes `self_test`, or a projection is not
            a plain floating-point linear layer (quantised weights, adapters).
    """
    return view_of(model, accepted_kinds(model.config, type(model)))


def accepted_kinds(config: PreTrainedConfig, model_class: type | None = None) -> tuple[str, ...]:
    """The kinds of blocks that are pruned in models of this configuration; says once what a self-test found.

    Args:
        config: of the model, pruned before or not.
        model_class: of the model; by default transformers' causal LM of that configuration.

    Raises:
        UnsupportedArchitectureError: there is none; says what failed.
    """
    if config.model_type in TESTED:
        return TESTED[config.model_type]
    found = self_test(config, None if model_class is None else stock_class(model_class))
    line = f"architecture '{config.model_type}' is not on the tested list; {found.sentence()}"
    if not found.accepted:
        raise UnsupportedArchitectureError(
            f"base_model: {line}; tested are {tested_architectures()} (gradprune info --architectures lists all)"
        )
    if line not in _SAID:
        _SAID.add(line)
        logger.warning(line)
    return found.accepted
