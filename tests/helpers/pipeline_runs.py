"""Whole pruning runs on tiny models."""

from gradprune import PruneConfig, prune
from helpers.tiny_models import tiny_ids

TOKENS = tiny_ids(samples=1, tokens=2000).flatten()


def run(model, *, calibration=TOKENS[:1500], evaluation=TOKENS[1500:], **options):
    defaults = {"pruning_ratio": 0.2, "num_samples": 8, "seq_len": 16, "batch_size": 4, "backend": "reference"}
    config = PruneConfig(**{**defaults, **options})
    return prune(model, None, config, calibration=calibration, evaluation=evaluation)
