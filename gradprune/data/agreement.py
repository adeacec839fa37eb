"""Check that all ranks of a job have the same options and inputs, or their sums would mix different runs."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from gradprune.config import Output, PruneConfig, options_of
from gradprune.models.digest import model_digest, tensors_digest
from gradprune.ranks import Ranks
from gradprune.version import __version__

# The options that may differ between ranks: where a rank finds its files, and how it computes the same numbers. The
# content of the files is compared by `check_same_inputs`.
_OWN = {
    *options_of(Output),
    *("base_model", "dataset", "eval_dataset", "tasks", "prompts", "evidence_file"),
    *("device", "device_map", "trust_remote_code", "stream_layers", "stream_memory"),
}


def check_same_options(ranks: Ranks, configs: Sequence[PruneConfig]) -> None:
    """Check that all ranks have the same release and options, except for those that may differ, or raise.

    Args:
        ranks: the processes of the job.
        configs: this rank's options, of one or several runs.

    Raises:
        ConfigError: something differs; the message names the first option.
    """
    names = [name for name in options_of(PruneConfig) if name not in _OWN]
    options = {name: [getattr(config, name) for config in configs] for name in names}
    ranks.check_same({"gradprune": __version__, **{name: _one_or_all(values) for name, values in options.items()}})


def _one_or_all(values: list[object]) -> object:
    """Return the common value if all values are equal, else the list."""
    return values[0] if values.count(values[0]) == len(values) else values


def check_same_inputs(
    ranks: Ranks, model: PreTrainedModel, read: Mapping[str, Iterable[Tensor]], *, argument: str = "base_model"
) -> None:
    """Check that all ranks have the same model and have read the same inputs, or raise.

    With several ranks, this reads all of the model's weights once; with a single rank, it does nothing.

    Args:
        ranks: the processes of the job.
        model: this rank's model.
        read: the tensors that this rank has read, by the option that names their file.
        argument: the option that names the model.

    Raises:
        ConfigError: something differs; the message names the first option.
    """
    if ranks.world == 1:
        return
    digests = {argument: model_digest(model), **{name: tensors_digest(found) for name, found in read.items()}}
    ranks.check_same({name: f"content {digest[:12]}" for name, digest in digests.items()})
