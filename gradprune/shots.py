"""Pruning in several shots: what goes first is repaired before the rest is scored again.

Importances are those of the model that was calibrated, so a group's is out of date once many others are gone. With
`shots` K, the selection at 1/K of the ratio is made and repaired, the repaired model is calibrated, and so on; what the
last calibration says chooses at the whole ratio, and that is removed from the dense model and repaired once.
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
    """What the last shot's calibration says; `evidence` itself with one shot.

    Args:
        run: the dense model, which stays as it is, and the ratio at the end.
        evidence: of the dense model.

    Groups that an earlier shot removed have importance 0, so they go first, unless a normalisation shifts scores. The
    time of shot K is stage `shot_K`.
    """
    config = run.config
    for shot in range(1, config.shots):
        with run.clock.stage(f"shot_{shot}"):
            ratio = config.pruning_ratio * shot / config.shots
            masks = choose(run.view, evidence, config.scoring, config.constraints, ratio).masks
            evidence = _without(_calibrated_again(run, masks), masks)
    return evidence


def _calibrated_again(run: Run, masks: GroupMasks) -> Evidence:
    """The evidence of the model without what `masks` remove, repaired."""
    view = describe(sharing_copy(run.view.model), run.config.kinds)
    REPAIRS[run.config.repair](replace(run, view=view), masks)
    # The state of an unfinished calibration is that of the dense model's.
    config = replace(run.config, evidence_file=None, output_name=None, checkpoint_every=None, resume=False)
    of_copy = replace(run, view=view.with_groups(), config=config, clock=Clock())
    # The copy is gone when the shot ends: no evidence of it is ever read from a file.
    return gather_evidence(of_copy, bound=False)


def _without(evidence: Evidence, masks: GroupMasks) -> Evidence:
    """The evidence with importance 0 for groups that are gone."""
    gone = torch.cat([~masks[block] for block in evidence.blocks])
    return replace(
        evidence, components={name: values.masked_fill(gone, 0.0) for name, values in evidence.components.items()}
    )
