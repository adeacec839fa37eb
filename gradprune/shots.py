"""Pruning in several shots: the model is repaired after each shot, and the remaining groups are scored again.

A group's importance is measured on the model that was calibrated, so it is out of date once many other groups have been
removed. With `shots` K, groups are selected at 1/K of the ratio, a copy without them is repaired and calibrated, the
next are selected at 2/K, and so on. The evidence of the last calibration selects the groups at the whole ratio; these
are removed from the dense model, which is repaired once.
"""

from dataclasses import replace

import torch

from gradprune.calibration.evidence import Evidence
from gradprune.calibration.gather import gather_evidence
from gradprune.models import describe
from gradprune.models.masks import GroupMasks
from gradprune.progress import Clock
from gradprune.run import Run
from gradprune.scoring.choose import choose
from gradprune.surgery.cut import sharing_copy
from gradprune.surgery.repair import REPAIRS


def after_shots(run: Run, evidence: Evidence) -> Evidence:
    """Return the evidence of the last shot's calibration; with one shot, `evidence` itself.

    Args:
        run: the dense model, which is left unchanged, and the final ratio.
        evidence: the evidence of the dense model.

    Groups that an earlier shot removed have importance 0, so they are selected first again, unless a normalisation
    shifts scores. The time of shot K is recorded as stage `shot_K`.
    """
    config = run.config
    for shot in range(1, config.shots):
        with run.clock.stage(f"shot_{shot}"):
            ratio = config.pruning_ratio * shot / config.shots
            masks = choose(run.view, evidence, config.scoring, config.constraints, ratio).masks
            evidence = _without(_calibrated_again(run, masks), masks)
    return evidence


def _calibrated_again(run: Run, masks: GroupMasks) -> Evidence:
    """Repair a copy of the model without the groups that `masks` remove, and return the evidence of its calibration."""
    view = describe(sharing_copy(run.view.model), run.config.kinds)
    REPAIRS[run.config.repair](replace(run, view=view), masks)
    # An earlier run's evidence and a calibration's saved state are those of the dense model.
    config = replace(run.config, evidence_file=None, output_name=None, checkpoint_every=None, resume=False)
    of_copy = replace(run, view=view.with_groups(), config=config, clock=Clock())
    # The copy does not outlive the shot, so its evidence, never read from a file, needs no digest of the weights.
    return gather_evidence(of_copy, bound=False)


def _without(evidence: Evidence, masks: GroupMasks) -> Evidence:
    """Return the evidence with importance 0 for the groups that `masks` remove."""
    removed = torch.cat([~masks[block] for block in evidence.blocks])
    return replace(
        evidence, components={name: values.masked_fill(removed, 0.0) for name, values in evidence.components.items()}
    )
