"""`Evidence`: all that one calibration pass says about a model's groups. It can be saved, and scored again and again.

The file is `analysis/scores.safetensors`: one fp64 vector over all groups (layer, kind, index) for each part that
methods are made of, and as metadata the gradient statistics, the priors and what the pass was run on.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedModel

from gradprune.calibration.engine import ImportanceEngine
from gradprune.calibration.methods import PARTS, importance
from gradprune.calibration.priors import Priors
from gradprune.config import Method, Prior, PruneConfig, Reduction
from gradprune.errors import CheckpointError, ConfigError, NonFiniteError
from gradprune.models import BlockKey, describe
from gradprune.vanishing.scaling import GradientRepair, resolve_fix, scales_of
from gradprune.vanishing.statistics import LayerGradients

_FORMAT = 1


@dataclass(frozen=True)
class Evidence:
    """What a calibration pass found.

    parts: by name of `gradprune.calibration.methods.PARTS`, [groups] fp64 in the order of `GroupTable`.
    gradients: the layers' statistics over all samples; steps: those of the first batches, one by one.
    priors: by kind of prior, those that were measured.
    repair: with `reduction="batch"`, how the batches were repaired as they came; else None, and any repair can be
        applied afterwards.
    reduction, num_samples, seq_len, seed, dataset: what the pass was run with.
    model: a fingerprint of the model's prunable shapes and weights.
    """

    parts: dict[str, NDArray[np.float64]]
    gradients: list[LayerGradients]
    steps: list[list[LayerGradients]]
    priors: dict[str, Priors]
    repair: GradientRepair | None
    reduction: Reduction
    num_samples: int
    seq_len: int
    seed: int
    dataset: str | None
    model: str

    @classmethod
    def of(cls, engine: ImportanceEngine, model: PreTrainedModel, config: PruneConfig) -> "Evidence":
        """What `engine`, which has run the calibration of `config` on `model`, found."""
        scores = engine.scores("taylor")
        steps = min(config.collect_batches, -(-config.num_samples // config.batch_size))
        return cls(
            parts={name: _column(engine, name) for name in PARTS},
            gradients=scores.gradients,
            steps=[engine.gradients_of_step(step) for step in range(steps)],
            priors={},
            repair=scores.repair if config.reduction == "batch" else None,
            reduction=config.reduction,
            num_samples=config.num_samples,
            seq_len=config.seq_len,
            seed=config.seed,
            dataset=config.dataset,
            model=fingerprint(model),
        )

    def with_priors(self, prior: Prior, priors: Priors) -> "Evidence":
        """The same with the priors of one more kind."""
        return replace(self, priors={**self.priors, prior: priors})

    def repaired(self, fix: str, layers: int) -> GradientRepair | None:
        """What `fix` does to the gradients of the model's `layers` decoder layers; None if nothing is asked for.

        Raises:
            ConfigError: the batches of this pass were repaired otherwise.
        """
        if self.reduction == "batch":
            done = "none" if self.repair is None else self.repair.fix
            if fix not in ("auto", done):
                raise ConfigError(f"gradient_fix: '{fix}' needs another calibration; these batches had '{done}'")
            return self.repair
        if fix == "none":
            return None
        resolved = resolve_fix(fix, self.gradients)
        scales = scales_of(resolved, self.gradients, layers)
        return GradientRepair(resolved, scales, [layer.scaled(scales[layer.layer]) for layer in self.gradients])

    def importance(self, method: Method, scales: NDArray[np.float64]) -> NDArray[np.float64]:
        """[groups] fp64 with the precision of fp32, by `method`, gradients multiplied by `scales` [groups]."""
        values: NDArray[np.float64] = importance(method, self.parts.__getitem__, scales)
        return values.astype(np.float32).astype(np.float64)

    def save(self, path: Path) -> None:
        """Write the file; the same evidence gives the same bytes."""
        record = {name: value for name, value in asdict(self).items() if name != "parts"}
        record["priors"] = {name: _priors_to_json(priors) for name, priors in self.priors.items()}
        metadata = {"gradprune": json.dumps({"format": _FORMAT, **record}, sort_keys=True)}
        save_file({name: np.ascontiguousarray(part) for name, part in self.parts.items()}, path, metadata)

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> "Evidence":
        """Read a file that `save` wrote.

        Raises:
            CheckpointError: it is missing or damaged, or belongs to another model.
        """
        if not Path(path).is_file():
            raise CheckpointError(f"scores: there is no file '{path}'; a prune run writes analysis/scores.safetensors")
        try:
            with safe_open(path, framework="numpy") as file:
                record = json.loads((file.metadata() or {})["gradprune"])
                parts = {name: file.get_tensor(name) for name in PARTS}
            evidence = _from_json(record, parts)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"scores: '{path}' is not a whole scores.safetensors of this version of gradprune "
                f"({type(error).__name__}: {error})"
            ) from error
        if evidence.model != fingerprint(model):
            raise CheckpointError(f"scores: '{path}' was measured on another model than this one; calibrate again")
        return evidence


def fingerprint(model: PreTrainedModel) -> str:
    """A digest of the prunable layers' shapes and of some of each one's weights."""
    digest = hashlib.sha256(str(model.config.model_type).encode())
    for block in describe(model).blocks:
        for entry in block.projections:
            weight = entry.linear.weight.detach()
            digest.update(f"{block.kind.name} {block.layer} {entry.path} {tuple(weight.shape)}".encode())
            digest.update(weight[:: max(1, len(weight) // 8), :64].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _column(engine: ImportanceEngine, part: str) -> NDArray[np.float64]:
    blocks = engine.part(part)
    for (layer, kind), values in blocks.items():
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            raise NonFiniteError(f"importance ({part}) of {kind} group {int(bad[0])} of layer {layer} is not finite")
    return np.concatenate([values.numpy() for values in blocks.values()])


def _priors_to_json(priors: Priors) -> dict[str, Any]:
    return {
        "block": [[kind, layer, value] for (layer, kind), value in priors.block.items()],
        "layer": [[layer, value] for layer, value in priors.layer.items()],
    }


def _from_json(record: dict[str, Any], parts: dict[str, NDArray[np.float64]]) -> Evidence:
    if record.pop("format") != _FORMAT:
        raise ValueError("another format")
    repair = record.pop("repair")
    priors = {
        name: Priors(
            block={BlockKey(layer, kind): value for kind, layer, value in found["block"]},
            layer=dict(found["layer"]),
        )
        for name, found in record.pop("priors").items()
    }
    return Evidence(
        parts=parts,
        gradients=_layers(record.pop("gradients")),
        steps=[_layers(step) for step in record.pop("steps")],
        priors=priors,
        repair=None if repair is None else GradientRepair(repair["fix"], repair["scales"], _layers(repair["after"])),
        **record,
    )


def _layers(found: list[dict[str, Any]]) -> list[LayerGradients]:
    return [LayerGradients(**layer) for layer in found]
