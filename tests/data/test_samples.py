"""How the windows of a text are divided among the uses of a run."""

import pytest
import torch

from gradprune import PruneConfig
from gradprune.data.samples import Samples, draw_samples
from gradprune.data.windows import sample_windows
from gradprune.errors import CalibrationError
from gradprune.ranks import Ranks
from helpers.fake_devices import SECOND, second_device
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


def test_the_seed_chooses_the_windows_and_what_the_model_writes() -> None:
    first, second = (drawn(25, own_text=0.5, seed=seed) for seed in (0, 1))
    assert not torch.equal(first.calibration[::2], second.calibration[::2])
    assert not torch.equal(first.calibration[1::2], second.calibration[1::2])


def test_overlap_is_the_share_of_the_evaluation_text_that_calibration_has() -> None:
    """All of the eight evaluation tokens are in the calibration text, but hardly any of that is in them."""
    assert drawn(20).overlap == 1.0


def test_ranks_divide_the_samples_that_a_run_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four samples in batches of one: the second of two ranks, which hears nothing of the first, writes two."""
    ranks = Ranks()
    ranks.rank, ranks.world = 1, 2
    monkeypatch.setattr(ranks, "joined", lambda own: own * 2)
    config = PruneConfig(seq_len=8, num_samples=4, own_text=1.0, batch_size=1, repair="none")
    found = draw_samples(tiny_model(), None, config, TOKENS[:0], TOKENS[:8], ranks=ranks).calibration
    assert torch.equal(found[:2], found[2:])


def test_the_first_id_outside_the_vocabulary_is_refused() -> None:
    model = tiny_model()
    ids = TOKENS.clone()
    ids[-1] = model.config.vocab_size
    with pytest.raises(CalibrationError, match=f"calibration: has ids from .* to {model.config.vocab_size}; "):
        draw_samples(model, None, PruneConfig(seq_len=8, num_samples=4), ids, TOKENS[:8])


def test_the_end_of_tokens_given_alone_is_held_out_for_evaluation() -> None:
    found = draw_samples(tiny_model(), None, PruneConfig(seq_len=8, num_samples=4), TOKENS)
    assert torch.equal(found.evaluation, TOKENS[180:])
    assert found.calibration.shape == (4, 8)


def test_tokens_may_be_on_another_device() -> None:
    config, model = PruneConfig(seq_len=8, num_samples=4), tiny_model()
    with second_device():
        found = draw_samples(model, None, config, TOKENS.to(SECOND), TOKENS[:8].to(SECOND))
    expected = draw_samples(model, None, config, TOKENS, TOKENS[:8])
    assert torch.equal(found.calibration, expected.calibration)
    assert torch.equal(found.evaluation, expected.evaluation)
    assert found.overlap == 1.0
