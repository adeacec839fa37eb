"""`Evidence`: what one calibration pass found about a model's groups; it can be saved, and scored repeatedly.

Its file is `analysis/evidence.safetensors`. For each component of importance it holds one fp64 vector over all groups,
block by block; its metadata holds the gradient statistics, the priors, and the model and data of the pass.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradprune.calibration.methods import components_of, importance
from gradprune.calibration.priors import Priors
from gradprune.calibration.reduction import REDUCTIONS
from gradprune.calibration.sealed import DamagedFileError, read_sealed, write_sealed
from gradprune.config import METHODS, Method, Prior, ReductionName, RepairName, default_methods
from gradprune.errors import CheckpointError, ConfigError, GradPruneError, NonFiniteError, one_line
from gradprune.models import BlockKey, whole_view
from gradprune.models.digest import model_digest
from gradprune.models.tensors import BlockTensors
from gradprune.vanishing.scaling import GradientScaling, resolve_fix, scales_of
from gradprune.vanishing.statistics import LayerGradients

_FORMAT = 4


@dataclass(frozen=True)
class Scores:
    """Group importances of a model.

    importance: each block's group importances, [groups] fp32.
    gradients: the gradient statistics, before any scaling, of each decoder layer that has a block; empty if no weight
        gradients were computed.
    scaling: the scaling that `gradient_fix` applied to the gradients; None for "none" and without weight gradients.
    """

    importance: BlockTensors
    gradients: list[LayerGradients]
    scaling: GradientScaling | None = None

    @property
    def attention(self) -> list[Tensor]:
        """Per decoder layer, the KV groups' importances, [n_kv_groups] fp32 on the CPU; empty without attention."""
        return self.importance.attention

    @property
    def mlp(self) -> list[Tensor]:
        """Per decoder layer, the MLP channels' importances, [n_channels] fp32 on the CPU; empty without an MLP."""
        return self.importance.mlp


@dataclass(frozen=True)
class Evidence:
    """What a calibration pass found.

    blocks: the number of groups of each block, in the order of the components' values. layers: the number of decoder
        layers.
    components: the collected components by name (see `gradprune.calibration.methods`), [groups of all blocks] fp64
        each, block after block.
    gradients: the layers' gradient statistics over the first `diagnosed_samples` samples. steps: the same statistics
        for each of the first batches.
    applied: how gradients were scaled before they were added to the sums; None if they were not scaled.
    reduction, num_samples, seq_len: the settings of the pass.
    seed, dataset: the options with which its samples were drawn; dataset is None if the run named none, and both are
        None if the evidence comes straight from an engine.
    own_text: the share of the samples that the model wrote itself.
    priors: the measured priors, by kind of prior.
    model: `model_digest` of the model; empty until the evidence is bound to a model.
    """

    blocks: dict[BlockKey, int]
    layers: int
    components: dict[str, Tensor]
    gradients: list[LayerGradients]
    steps: list[list[LayerGradients]]
    applied: GradientScaling | None
    reduction: ReductionName
    num_samples: int
    seq_len: int
    diagnosed_samples: int
    seed: int | None = None
    dataset: str | None = None
    own_text: float = 0.0
    priors: dict[str, Priors] = field(default_factory=dict)
    model: str = ""

    def __post_init__(self) -> None:
        """Refuse importances that cannot be sorted.

        Raises:
            NonFiniteError: an importance is NaN or infinite; names the first such group.
        """
        for name, values in self.components.items():
            for key, of_block in self._by_block(values).items():
                bad = (~of_block.isfinite()).nonzero()
                if len(bad):
                    raise NonFiniteError(
                        f"importance ({name}) of {key.kind} group {int(bad[0])} of layer {key.layer} is not finite"
                    )

    def with_priors(self, prior: Prior, priors: Priors) -> "Evidence":
        """Return a copy that also holds these priors, of the kind `prior`."""
        return replace(self, priors={**self.priors, prior: priors})

    def scaling(self, fix: str) -> GradientScaling | None:
        """The scaling by which `fix` changes the layers' gradients; None without a fix or without gradient statistics.

        Raises:
            ConfigError: the gradients were scaled by a different fix before they were added, or a fix is requested and
                weight gradients were computed for some of the samples only.
        """
        if not self.gradients or (fix == "none" and REDUCTIONS[self.reduction].scales_afterwards):
            return None
        if self.diagnosed_samples < self.num_samples and fix != "none":
            raise ConfigError(
                f"gradient_fix: '{fix}' needs the weight gradients of all {self.num_samples} samples, and this "
                f"calibration took those of {self.diagnosed_samples}; calibrate again with this gradient_fix, or with "
                "evidence 'all'"
            )
        if not REDUCTIONS[self.reduction].scales_afterwards:
            done = "none" if self.applied is None else self.applied.fix
            if fix not in ("auto", done):
                raise ConfigError(f"gradient_fix: '{fix}' needs another calibration; these batches had '{done}'")
            return self.applied
        resolved = resolve_fix(fix, self.gradients)
        scales = scales_of(resolved, self.gradients, self.layers)
        return GradientScaling(resolved, scales, [layer.scaled(scales[layer.layer]) for layer in self.gradients])

    def fixes(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        """Return the `wanted` gradient fixes if they can still be applied; otherwise only the fix that was applied."""
        if self.diagnosed_samples < self.num_samples:
            return ("none",)
        if REDUCTIONS[self.reduction].scales_afterwards:
            return wanted
        return ("none" if self.applied is None else self.applied.fix,)

    def windows_taken(self, dataset: str | None, seq_len: int, seed: int) -> int:
        """How many of the first windows that a run with these options draws the pass used; 0 if its options differ."""
        if (self.dataset, self.seq_len, self.seed) != (dataset, seq_len, seed):
            return 0
        return self.num_samples - round(self.own_text * self.num_samples)

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods whose components were collected."""
        return tuple(method for method in METHODS if set(components_of(method)) <= self.components.keys())

    def default_method(self, repair: RepairName) -> Method:
        """The method that others are compared with: the first default method that was collected, or any that was."""
        return next((method for method in default_methods(repair) if method in self.methods), self.methods[0])

    def check_method(self, method: Method) -> None:
        """Refuse a method whose components were not collected.

        Raises:
            GradPruneError: the message names the methods whose components were collected.
        """
        if method not in self.methods:
            raise GradPruneError(
                f"importance_method: '{method}' was not collected in this calibration; name one of those that were, "
                f"{', '.join(self.methods)}, or calibrate again for it, or with evidence 'all'"
            )

    def importance(self, method: Method, fix: str = "none") -> Tensor:
        """[groups of all blocks] fp32: each group's importance by `method`, with gradients scaled by `fix`.

        Raises:
            ConfigError: see `scaling`.
            GradPruneError: the pass did not collect what `method` needs.
        """
        self.check_method(method)
        values: Tensor = importance(method, self.components.__getitem__, self._group_scales(self.scaling(fix)))
        return values.float()

    def scores(self, method: Method, fix: str = "none") -> Scores:
        """The importance of every group by `method`, with gradients scaled by `fix`, as `Scores`."""
        importance = BlockTensors(self._by_block(self.importance(method, fix)), self.layers)
        return Scores(importance, self.gradients, self.scaling(fix))

    def save(self, path: Path) -> None:
        """Write the evidence to a file; the same evidence gives the same bytes."""
        record = {name: value for name, value in vars(self).items() if name != "components"}
        record["blocks"] = [[*key, groups] for key, groups in self.blocks.items()]
        record["priors"] = {name: _priors_to_json(priors) for name, priors in self.priors.items()}
        record["gradients"] = [asdict(layer) for layer in self.gradients]
        record["steps"] = [[asdict(layer) for layer in step] for step in self.steps]
        record["applied"] = None if self.applied is None else asdict(self.applied)
        write_sealed(path, self.components, {"format": _FORMAT, **record})

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> "Evidence":
        """Read a file that `save` wrote.

        Raises:
            CheckpointError: the file is missing or damaged, or belongs to another model.
        """
        if not Path(path).is_file():
            raise CheckpointError(
                f"evidence_file: there is no file '{path}'; a prune run writes analysis/evidence.safetensors"
            )
        try:
            components, record = read_sealed(path)
            evidence = _from_json(record, components)
            for values in components.values():
                evidence._by_block(values)  # checks the length
        except (DamagedFileError, KeyError, TypeError, ValueError, RuntimeError, NonFiniteError) as error:
            raise CheckpointError(
                f"evidence_file: '{path}' is not a whole evidence file of this version of gradprune "
                f"({type(error).__name__}: {one_line(error)})"
            ) from error
        if evidence.model != model_digest(model):
            raise CheckpointError(
                f"evidence_file: '{path}' was measured on another model than this one, or in another dtype; "
                "calibrate again"
            )
        if not evidence.blocks.items() <= {block.key: block.groups for block in whole_view(model).blocks}.items():
            raise CheckpointError(f"evidence_file: '{path}' does not have the blocks of this model; calibrate again")
        return evidence

    def _group_scales(self, scaling: GradientScaling | None) -> Tensor:
        """[groups of all blocks] fp64: the scale that is still to be applied to each group's gradients."""
        if scaling is None or not REDUCTIONS[self.reduction].scales_afterwards:
            return torch.ones(sum(self.blocks.values()), dtype=torch.float64)
        layers = torch.tensor([key.layer for key in self.blocks])
        scales = torch.tensor(scaling.scales, dtype=torch.float64)[layers]
        return scales.repeat_interleave(torch.tensor(list(self.blocks.values())))

    def _by_block(self, values: Tensor) -> dict[BlockKey, Tensor]:
        return dict(zip(self.blocks, values.split(list(self.blocks.values())), strict=True))


def _priors_to_json(priors: Priors) -> dict[str, Any]:
    return {
        "block": [[*key, value] for key, value in priors.block.items()],
        "layer": [[layer, value] for layer, value in priors.layer.items()],
        "samples": priors.samples,
    }


def _from_json(record: dict[str, Any], components: dict[str, Tensor]) -> Evidence:
    if (found := record.pop("format")) != _FORMAT:
        raise ValueError(f"format {found}, not {_FORMAT}")
    blocks = {BlockKey(layer, kind): groups for layer, kind, groups in record.pop("blocks")}
    applied = record.pop("applied")
    priors = {
        name: Priors(
            block={BlockKey(layer, kind): value for layer, kind, value in found["block"]},
            layer=dict(found["layer"]),
            samples=found.get("samples"),
        )
        for name, found in record.pop("priors").items()
    }
    return Evidence(
        blocks=blocks,
        components=components,
        gradients=_layers(record.pop("gradients")),
        steps=[_layers(step) for step in record.pop("steps")],
        priors=priors,
        applied=None
        if applied is None
        else GradientScaling(applied["fix"], applied["scales"], _layers(applied["after"])),
        **record,
    )


def _layers(found: list[dict[str, Any]]) -> list[LayerGradients]:
    return [LayerGradients(**layer) for layer in found]
