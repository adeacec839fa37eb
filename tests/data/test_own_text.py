"""Samples that the model writes itself: their distribution, their reproducibility, and their use in a run."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from gradprune import PruneConfig
from gradprune.data.own_text import own_samples
from gradprune.data.samples import Samples, draw_samples
from gradprune.data.windows import spread
from gradprune.errors import CalibrationError
from gradprune.ranks import Ranks, in_order
from helpers.mixtures import tiny_mixture
from helpers.pipeline_runs import TOKENS, run
from helpers.streaming import both
from helpers.tiny_models import ARCHITECTURE_NAMES, tiny_model

BOS = 1


def written(model: PreTrainedModel, count: int = 6, seq_len: int = 9, **options: int) -> Tensor:
    return own_samples(model, count, seq_len, **{"batch_size": 4, "seed": 0, **options})


def test_samples_are_drawn_from_the_models_own_distribution(device: str) -> None:
    """The second and third tokens of many samples are as frequent as the model's probabilities say, in fp64."""
    model = tiny_model(vocab=5, layers=1)
    count = 4000
    found = written(model.to(device), count, 3, batch_size=1000)
    model.cpu()
    assert (found[:, 0] == BOS).all()
    with torch.no_grad():
        second = F.softmax(model(torch.tensor([[BOS]])).logits[0, -1], -1)
        pairs = torch.tensor([[BOS, token] for token in range(5)])
        third = second[:, None] * F.softmax(model(pairs).logits[:, -1], -1)
    counted = torch.bincount(found[:, 1] * 5 + found[:, 2], minlength=25).view(5, 5)
    # The end-of-text token is drawn too, and the sample continues after it.
    assert counted[2].sum() > 0
    error = ((third * (1 - third)) / count).sqrt()
    assert ((counted / count - third).abs() < 4.5 * error).all()


def test_the_same_seed_writes_the_same_and_no_sample_repeats(device: str) -> None:
    model = tiny_model().to(device)
    state = torch.get_rng_state()
    first = written(model, 8)
    assert first.shape == (8, 9)
    assert first.dtype == torch.int64
    assert torch.equal(first, written(model, 8))
    # No sample occurs twice, neither in different batches nor with different seeds.
    assert len(torch.cat([first, written(model, 8, seed=1)]).unique(dim=0)) == 16
    assert torch.equal(state, torch.get_rng_state())


class _OneOfTwo(Ranks):
    """One of two ranks, which receives nothing from the other."""

    world = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def joined(self, own: Sequence[Tensor]) -> list[Tensor]:
        return list(own)


def test_ranks_divide_the_batches() -> None:
    model = tiny_model()
    shares = [own_samples(model, 10, 9, batch_size=4, seed=0, ranks=_OneOfTwo(rank)).split(4) for rank in (0, 1)]
    assert [len(share) for share in shares] == [2, 1]
    assert torch.equal(torch.cat(in_order(shares)), written(model, 10))


def test_the_checkpoints_generation_settings_are_ignored() -> None:
    model = tiny_model()
    plain = written(model)
    model.generation_config.update(temperature=0.01, top_k=1, top_p=0.1, repetition_penalty=9.0, min_length=5)
    recommended = model.generation_config
    assert torch.equal(written(model), plain)
    assert model.generation_config is recommended
    assert not model.training


def test_without_a_bos_token_samples_begin_with_eos_or_are_refused() -> None:
    model = tiny_model()
    model.config.bos_token_id, model.config.eos_token_id = None, [2, 3]
    assert (written(model)[:, 0] == 2).all()
    model.config.eos_token_id = None
    with pytest.raises(CalibrationError, match=r"own_text: .* neither a bos_token_id nor an eos_token_id"):
        written(model)


@pytest.mark.parametrize("architecture", [*ARCHITECTURE_NAMES, "mixture", "pruned"])
def test_every_model_writes_what_it_predicts(architecture: str) -> None:
    """The likeliest next token is drawn as often, in 200 samples, as the model's probabilities of it say."""
    if architecture == "mixture":
        model: PreTrainedModel = tiny_mixture().float()
    elif architecture == "pruned":
        model = run(tiny_model(channels=24, dtype=torch.float32)).model
    else:
        model = tiny_model(architecture, dtype=torch.float32)
    found = written(model, 200, 9, batch_size=100)
    with torch.no_grad():
        likeliest, tokens = F.softmax(model(found[:, :-1]).logits.double(), -1).max(-1)
    hits = (tokens == found[:, 1:]).double() - likeliest
    assert hits.mean().abs() < 4.5 * (likeliest * (1 - likeliest)).sum().sqrt() / hits.numel()


def test_a_streamed_model_writes_nothing(tmp_path: Path) -> None:
    _, streamed = both(tiny_model(), tmp_path)
    with pytest.raises(CalibrationError, match=r"own_text: a streamed model .*stream_layers off"):
        written(streamed)


def drawn(**options: object) -> Samples:
    config = PruneConfig(seq_len=8, batch_size=4, **options)
    return draw_samples(tiny_model(), None, config, TOKENS[:1500], TOKENS[1500:])


def begin_with_bos(samples: Tensor) -> list[bool]:
    """Whether each sample begins with the beginning-of-text token, which only written samples contain here."""
    assert not (TOKENS == BOS).any()
    return (samples[:, 0] == BOS).tolist()


def test_written_samples_are_spread_over_calibration_and_held_out_samples() -> None:
    given, some = drawn(num_samples=16, held_out_samples=8), drawn(own_text=0.25, num_samples=16, held_out_samples=8)
    assert not any(begin_with_bos(given.calibration))
    for samples in (some.calibration, some.held_out):
        assert begin_with_bos(samples) == [False, False, True, False] * (len(samples) // 4)
    # The samples from the text are the same windows in the same order.
    assert torch.equal(some.calibration[[0, 1, 3]], given.calibration[:3])
    assert torch.equal(some.evaluation, given.evaluation)


def test_a_search_compares_on_samples_of_the_text_only() -> None:
    found = drawn(own_text=0.5, num_samples=16, importance_method="auto", search_samples=8)
    assert sum(begin_with_bos(found.calibration)) == 8
    assert len(found.searched) == 8
    assert not any(begin_with_bos(found.searched))


def test_with_a_share_of_one_no_text_is_read() -> None:
    found = draw_samples(
        tiny_model(), None, PruneConfig(own_text=1.0, num_samples=4, held_out_samples=3, seq_len=8),
        TOKENS[:0], TOKENS[1500:],
    )  # fmt: skip
    assert all(begin_with_bos(found.calibration))
    assert (len(found.calibration), len(found.held_out)) == (4, 3)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (3, 0), (0, 2), (1, 1), (6, 2), (2, 6)])
def test_spread_keeps_both_in_order(first: int, second: int) -> None:
    found = spread(torch.arange(first)[:, None], 10 + torch.arange(second)[:, None]).flatten().tolist()
    assert [value for value in found if value < 10] == list(range(first))
    assert [value for value in found if value >= 10] == [10 + value for value in range(second)]
    if (first, second) == (6, 2):
        assert found == [0, 1, 10, 2, 3, 4, 11, 5]


def test_a_run_reports_the_share_that_the_model_wrote(tmp_path: Path) -> None:
    options = {"own_text": 0.5, "output_dir": str(tmp_path), "repair": "least_squares"}
    for name in ("one", "two"):
        result = run(tiny_model(channels=24, dtype=torch.float32), output_name=name, **options)
    assert result.evidence.own_text == 0.5
    assert "own_text" in result.seconds
    assert ", 50% of them written by the model itself" in (tmp_path / "one/report.html").read_text(encoding="utf-8")
    assert ", 50% of them written by the model itself" in (tmp_path / "one/model/README.md").read_text(encoding="utf-8")
    for file in ("model/model.safetensors", "analysis/evidence.safetensors", "analysis/groups.csv"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    # The share that was actually written: 2 of 8 samples, not 2.4.
    assert run(tiny_model(channels=24, dtype=torch.float32), own_text=0.3).evidence.own_text == 0.25
    other = run(tiny_model(channels=24, dtype=torch.float32), repair="least_squares")
    assert (result.table.importance != other.table.importance).any()
    assert "own_text" not in other.seconds


def test_samples_that_nothing_uses_are_neither_written_nor_drawn(tmp_path: Path) -> None:
    """With evidence of an earlier run and without repair, only priors that still have to be measured need samples."""
    model = tiny_model(channels=24, dtype=torch.float32)
    options = {"repair": "none", "own_text": 0.5, "importance_method": "group_fisher"}
    first = run(model, output_dir=str(tmp_path), output_name="x", **options)
    again = {**options, "evidence_file": str(tmp_path / "x" / "analysis" / "evidence.safetensors")}
    # Far too little text to draw samples from.
    found = run(model, calibration=TOKENS[:20], **again)
    assert "own_text" not in found.seconds
    assert (found.pruned == first.pruned).all()
    assert found.evidence.own_text == 0.5
    for needed in ({"temperature": 1.0}, {"repair": "least_squares"}):
        assert "own_text" in run(model, **{**again, **needed}).seconds


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        ({}, (8, 4)),
        ({"repair": "none"}, (8, 0)),
        ({"evidence_file": "x"}, (8, 4)),
        ({"evidence_file": "x", "repair": "none"}, (0, 0)),
        ({"evidence_file": "x", "repair": "none", "importance_method": "auto"}, (8, 0)),
    ],
)
def test_the_numbers_of_samples_drawn_and_written(options: dict[str, str], samples: tuple[int, int]) -> None:
    config = PruneConfig(num_samples=8, held_out_samples=4, own_text=0.25, **options)
    assert config.samples_drawn == samples
    assert config.samples_written == (samples[0] // 4, samples[1] // 4)


def test_progress_counts_the_samples_that_other_ranks_write() -> None:
    counted: list[int] = []
    own_samples(tiny_model(), 10, 3, batch_size=4, seed=0, ranks=_OneOfTwo(1), advance=counted.append)
    assert counted == [4, 6]


def test_unlikely_tokens_are_drawn_too() -> None:
    """By default, transformers would draw one of the 50 likeliest tokens."""
    found = written(tiny_model(vocab=200, layers=1), 800, 2, batch_size=800)
    assert len(found[:, 1].unique()) > 80
