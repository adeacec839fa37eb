"""The self-test of an architecture: does masking groups of a model give the same result as cutting them?

A tiny random model is built from the architecture's own configuration. For each kind of block, half of the groups and
one whole block are masked (the output projection's columns are zeroed; no token is sent to a removed expert) in one
copy and cut in another. The logits must be equal, generation with a cache must agree, and a model built anew from the
configuration that cutting wrote must load the weights and compute the same. An architecture fails if it scales
something by a width, or has a norm over all heads.
"""

import copy
import functools
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from gradprune.errors import one_line
from gradprune.models.blocks import PrunableModel
from gradprune.models.experts import ExpertsBlock, plain_product
from gradprune.models.kinds import KIND_NAMES
from gradprune.models.loss import sample_losses
from gradprune.models.masks import GroupMasks
from gradprune.models.modeling_gradprune import causal_lm, text_config
from gradprune.models.narrow import narrow
from gradprune.models.shrink import shrunk, tiny_model, vision_left_empty
from gradprune.models.sizes import vocabulary_of
from gradprune.models.view import missing_kinds, view_of

# The largest accepted difference, relative to the largest logit. Some architectures compute parts in fp32; a wrong cut
# differs by a tenth or more.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class SelfTest:
    """The result of the self-test of an architecture.

    accepted: the kinds of blocks for which masking equals cutting.
    refused: by kind of block, why it cannot be pruned; under "model", why nothing can.
    """

    accepted: tuple[str, ...]
    refused: dict[str, str]

    def sentence(self) -> str:
        """Return the result as one line of text."""
        whole = "; ".join(f"{kind}: {reason}" for kind, reason in self.refused.items())
        if not self.accepted:
            return f"the self-test refused it: {whole}"
        passed = f"its self-test passed for {' and '.join(self.accepted)} (masked = cut on a tiny random model)"
        return f"{passed}; left whole: {whole}" if whole else passed


def self_test(config: PreTrainedConfig, model_class: type | None = None) -> SelfTest:
    """Test the architecture of a configuration; results are cached for the rest of the process.

    Args:
        config: a configuration of any size, of a model that was pruned before or not.
        model_class: the causal LM's class; by default transformers' own for this configuration.
    """
    try:
        small = shrunk(config)
        key = json.dumps({"": type(small).__name__, **small.to_dict()}, sort_keys=True, default=str)
    except Exception as error:  # configurations raise almost anything for values that they do not expect
        return SelfTest((), {"model": f"its configuration cannot be made small: {one_line(error)}"})
    return _tested(_CacheKey(key, config, model_class))


@dataclass(frozen=True, eq=False)
class _CacheKey:
    """A cache key: a configuration that equals another if both shrink to the same one, `key`, and the classes agree."""

    key: str
    config: PreTrainedConfig
    model_class: type | None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _CacheKey) and (self.key, self.model_class) == (other.key, other.model_class)

    def __hash__(self) -> int:
        return hash(self.key)


@functools.cache
def _tested(given: _CacheKey) -> SelfTest:
    if given.model_class is None and causal_lm(given.config.model_type) is None:
        return SelfTest((), {"model": "transformers has no causal LM of this model_type"})
    with quiet():
        try:
            model = tiny_model(given.config, given.model_class)
            view = view_of(model, KIND_NAMES)
            refused = missing_kinds(model)
            _check_loss(model)
        except Exception as error:  # whatever an unknown architecture raises refuses it
            return SelfTest((), {"model": one_line(error)})
        accepted: list[str] = []
        for kinds in _units(view):
            fault = _fault(model, kinds)
            if fault is None:
                accepted += kinds
            else:
                refused |= dict.fromkeys(kinds, fault)
    return SelfTest(tuple(accepted), refused)


def _units(view: PrunableModel) -> list[list[str]]:
    """Return the kinds of blocks, in lists of kinds that are tested together because one width is stated for them."""
    kinds = list(dict.fromkeys(block.kind.name for block in view.blocks))
    if not any(block.follows for block in view.linear_blocks):
        return [[kind] for kind in kinds]
    together = ["expert_channels", "shared_experts"]
    return [*([kind] for kind in kinds if kind not in together), together]


@contextmanager
def quiet() -> Iterator[None]:
    """Context manager that hides all warnings, and the messages of transformers except errors."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _ids(model: PreTrainedModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocabulary_of(model), (2, 9), generator=generator)


def _logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found.detach()


def _by_experts(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Compute the logits with experts run as they are in calibration, see `ExpertsBlock.run`."""
    with ExitStack() as stack:
        for block in view_of(model, KIND_NAMES).blocks:
            if isinstance(block, ExpertsBlock):
                stack.enter_context(block.run_by(plain_product))
        return _logits(model, ids)


def _check_loss(model: PreTrainedModel) -> None:
    """Check that `sample_losses`, whose gradients give importances, is the loss of the model's own, causal logits."""
    ids = _ids(model)
    logits = _logits(model, ids)[:, :-1]
    other = torch.cat([ids[:, :-1], ids[:, -1:] - 1], 1)
    if _differ(_logits(model, other)[:, :-1], logits):
        raise ValueError("its logits depend on tokens that follow")
    expected = (
        F.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten(), reduction="none").view(2, -1).mean(1)
    )
    try:
        with torch.no_grad():
            found = sample_losses(model, ids)
    except Exception as error:  # whatever an unknown architecture raises refuses it
        raise ValueError(
            f"its logits cannot be computed from the decoder's last hidden state: {one_line(error)}"
        ) from error
    if not torch.allclose(found.double(), expected, rtol=1e-4):
        raise ValueError("its loss differs from that of its head applied to the decoder's last hidden state")


def _fault(model: PreTrainedModel, kinds: Sequence[str]) -> str | None:
    """Say what is wrong with cutting blocks of these kinds; None if nothing is wrong."""
    try:
        cut = copy.deepcopy(model)
        view = view_of(cut, kinds)
        masks = _masks(view)
        narrow(view, masks)
        ids = _ids(model)
        expected = copy.deepcopy(model)
        with _masked(view_of(expected, kinds), masks):
            wanted, by_experts = _logits(expected, ids), _by_experts(expected, ids)
        if _differ(by_experts, wanted):
            return "its experts give another result than the same experts computed one by one"
        if not _differ(wanted, _logits(model, ids)):
            return "masking its groups changes nothing"
        if _differ(_logits(cut, ids), wanted):
            return "masking a group differs from cutting it: something depends on the block's width"
        if _differ(_by_steps(cut, ids), wanted[:, -1]):
            return "after cutting, generation with a cache gives another result"
        if _differ(_logits(_rebuilt(cut), ids), wanted):
            return "a model built from the configuration of the cut model gives another result"
    except Exception as error:  # whatever an unknown architecture raises refuses it
        return f"cutting it fails: {one_line(error)}"
    return None


def _masks(view: PrunableModel) -> GroupMasks:
    """Return masks that keep every second group of each block, or its only group; the first block keeps none if it may.

    If channels of experts are pruned, one of two neighbouring experts keeps the even channels, the other the odd ones.
    """
    masks = {}
    for block in view.blocks:
        group = torch.arange(block.groups)
        masks[block.key] = (group + group // (block.groups // block.sets)) % 2 == 0
    if not view.blocks[0].kind.optional:
        masks[view.blocks[0].key][:] = False
    return GroupMasks(masks, len(view.layers))


@contextmanager
def _masked(view: PrunableModel, masks: GroupMasks) -> Iterator[None]:
    """Context manager in which the model computes what it would compute without the groups that are not kept."""
    with ExitStack() as stack:
        for block in view.blocks:
            stack.enter_context(block.masked(masks[block]))
            if block.norm is not None and not masks[block].any():
                # A norm with a bias would still add it to the residual stream.
                with torch.no_grad():
                    for parameter in block.norm.parameters():
                        parameter.zero_()
        yield


def _differ(found: Tensor, expected: Tensor) -> bool:
    found, expected = found.double(), expected.double()
    return not bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max())


@torch.no_grad()
def _by_steps(model: Any, ids: Tensor) -> Tensor:
    """Compute the last token's logits with a cache: all tokens but two in one step, the last two one at a time."""
    out = model(input_ids=ids[:, :-2], use_cache=True)
    for step in (-2, -1):
        tokens = ids[:, step : ids.shape[1] + step + 1]
        # Before transformers 5.24 the cache was called `past_key_values`.
        cache = {name: out[name] for name in ("cache", "past_key_values") if name in out}
        out = model(input_ids=tokens, use_cache=True, **cache)
    found: Tensor = out.logits[:, -1]
    return found


def _rebuilt(model: PreTrainedModel) -> nn.Module:
    """Build a model anew from the configuration of `model`, with the same weights."""
    config = type(model.config).from_dict(json.loads(model.config.to_json_string()))
    for name in ("_attn_implementation", "_experts_implementation"):
        chosen = {"": getattr(model.config, name), "text_config": getattr(text_config(model.config), name)}
        setattr(config, name, chosen)
    with torch.random.fork_rng(devices=[]), vision_left_empty(config):
        rebuilt: Any = type(model)._from_config(config, dtype=model.dtype)
    rebuilt.load_state_dict(model.state_dict(), assign=True)
    return rebuilt.double().eval()  # type: ignore[no-any-return]
