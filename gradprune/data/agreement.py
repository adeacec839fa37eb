"""What the ranks of a job must have in common, or their sums would mix different runs."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from gradprune.config import Output, PruneConfig, options_of
from gradprune.models.digest import model_digest, tensors_digest
from gradprune.ranks import Ranks
from gradprune.version import __version__

# A rank's own: where it finds its files, and how it computes the same numbers. What files hold is compared apart.
_OWN = {
    *options_of(Output),
    *("base_model", "dataset", "eval_dataset", "tasks", "prompts", "evidence_file"),
    *("device", "device_map", "trust_remote_code", "stream_layers", "stream_memory"),
}


def check_same_options(ranks: Ranks, configs: Sequence[PruneConfig]) -> None:
    """Raise unless all ranks have the same release and options, but for those that are each rank's own.

    Raises:
        ConfigError: naming the first that differs.
    """
    names = [name for name in options_of(PruneConfig) if name not in _OWN]
    options = {name: [getattr(config, name) for config in configs] for name in names}
    ranks.check_same({"gradprune": __version__, **{name: _joint(values) for name, values in options.items()}})


def _joint(values: list[object]) -> object:
    """One value where all are the same, or all of them."""
    return values[0] if values.count(values[0]) == len(values) else values


def check_same_inputs(
    ranks: Ranks, model: PreTrainedModel, read: Mapping[str, Iterable[Tensor]], *, argument: str = "base_model"
) -> None:
    """Raise unless all ranks have the same model and, by the option that names its file, the same of what was read.

    One pass over the model's weights where there are several ranks. argument: the option that names the model.

    Raises:
        ConfigError: naming the first that differs.
    """
    if ranks.world == 1:
        return
    digests = {argument: model_digest(model), **{name: tensors_digest(found) for name, found in read.items()}}
    ranks.check_same({name: f"content {digest[:12]}" for name, digest in digests.items()})
