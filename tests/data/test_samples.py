"""How the windows of a text are divided among the uses of a run."""

import pytest
import torch

from gradprune import PruneConfig
from gradprune.data.samples import Samples, draw_samples
from gradprune.data.windows import sample_windows
from gradprune.errors import CalibrationError
from helpers.tiny_models import tiny_ids, tiny_model

TOKENS = tiny_ids(samples=1, tokens=200).flatten()


def drawn(windows: int, calibrated: int = 0, **options: object) -> Samples:
    """Draw from a text of `windows` windows of 8 tokens; an earlier run calibrated on the first `calibrated`."""
    config = PruneConfig(**{"seq_len": 8, "num_samples": 4, "held_out_samples": 4, **options})
    return draw_samples(tiny_model(), None, config, TOKENS[: 8 * windows], TOKENS[:8], calibrated=calibrated)


def test_samples_of_an_earlier_calibration_are_not_held_out() -> None:
    found, order = drawn(20, calibrated=10), sample_windows(TOKENS[:160], num_samples=20, seq_len=8, seed=0)
    assert torch.equal(found.calibration, order[:4])
    assert torch.equal(found.held_out, order[10:14])


def test_nothing_is_held_out_if_an_earlier_run_used_all_windows() -> None:
    found = drawn(12, calibrated=30)
    assert (len(found.calibration), len(found.held_out)) == (4, 0)
    with pytest.raises(CalibrationError, match="num_samples: 4 samples leave no text to search on"):
        drawn(12, calibrated=11, importance_method="auto")


def test_the_search_gets_two_thirds_of_too_little_text() -> None:
    found = drawn(13, held_out_samples=8, importance_method="auto", search_samples=64)
    assert [len(part) for part in (found.calibration, found.held_out, found.searched)] == [4, 3, 6]
