"""The order in which windows are drawn, the shortest evaluation text, and the estimated overlap of two texts."""

import pytest
import torch

from gradprune.data.windows import check_evaluation, overlap_of, sample_windows
from gradprune.errors import CalibrationError


def test_windows_are_drawn_in_random_order() -> None:
    """Calibration and held-out samples are the first and the last of them, so each come from the whole text."""
    found = sample_windows(torch.arange(400), num_samples=100, seq_len=4, seed=0)[:, 0]
    for half in found.split(50):
        assert 15 < int((half < 200).sum()) < 35


def test_evaluation_text_needs_one_whole_window() -> None:
    check_evaluation(torch.arange(8), 8, "eval_dataset")
    with pytest.raises(CalibrationError, match="eval_dataset: 7 held-out tokens are less than one window of 8"):
        check_evaluation(torch.arange(7), 8, "eval_dataset")


@pytest.mark.parametrize("known", [slice(0, 5000), slice(5000, 10_000)])
def test_overlap_is_the_share_of_the_evaluation_text_that_is_known(known: slice) -> None:
    """Both if its beginning and if its end occurs in the calibration text, wherever that is."""
    evaluation = torch.arange(10_000)
    calibration = torch.cat([torch.arange(20_000, 23_001), evaluation[known]])
    assert overlap_of(evaluation, calibration) == pytest.approx(0.5, abs=0.07)
    # The other way round, less than half of the text is unknown.
    assert overlap_of(calibration, evaluation) == pytest.approx(5 / 8, abs=0.07)


def test_overlap_is_found_after_matches_between_tokens() -> None:
    """The bytes of 65 ids 256 hold those of 64 ids 1 one byte after a token begins, again and again."""
    near = torch.full((80,), 256)
    assert overlap_of(torch.full((64,), 1), torch.cat([near, torch.full((64,), 1)])) == 1.0
