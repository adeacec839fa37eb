import html
import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import gradprune.search as search_module
from gradprune import PruneConfig
from gradprune.cli import app
from gradprune.config import Constraints, Scoring, command_line, default_methods, options_of
from gradprune.data.samples import draw_samples
from gradprune.errors import CalibrationError, ConfigError
from gradprune.models import describe
from gradprune.models.masks import GroupMasks
from gradprune.models.passes import mean_loss
from gradprune.ranks import Ranks
from gradprune.report.tables import describe_scoring, search_verdict
from gradprune.scoring.choose import score_groups
from gradprune.scoring.selection import select
from gradprune.search import SearchResult, Trial
from gradprune.surgery.masking import masked
from gradprune.surgery.repair import REPAIRS
from helpers.pipeline_runs import TOKENS, run
from helpers.tiny_models import tiny_model

# The default method of searches without repair.
DEFAULT = default_methods("none")[0]


def run_search(model=None, **options):
    defaults = {"importance_method": "auto", "search_samples": 8, "repair": "none"}
    return run(model or tiny_model(channels=24, dtype=torch.float32), **{**defaults, **options})


def test_every_difference_is_measured_sample_by_sample() -> None:
    """The losses of each method, without and with H-GSP, are measured here again, on the search's samples."""
    model = tiny_model(channels=24, dtype=torch.float32)
    result = run_search(model)
    view = describe(model)
    config = PruneConfig(
        importance_method="auto", num_samples=8, seq_len=16, batch_size=4, search_samples=8, repair="none"
    )
    searched = draw_samples(model, None, config, TOKENS[:1500], TOKENS[1500:]).searched
    assert len(searched) == 8
    losses = {}
    for method in ("group_fisher", "magnitude", "wanda", "taylor", "taylor_2nd", "fisher", "obs"):
        for temperature, tau in ((0.0, None), (1.0, 0.0)):
            scoring = Scoring(method, temperature=temperature, tau=tau)
            table = score_groups(view, result.evidence, scoring)
            masks = table.masks(select(table, 0.2, result.before.parameters, Constraints()))
            with masked(view, masks):
                losses[scoring] = np.array([mean_loss(model, [sample[None]]) for sample in searched])
    default = losses[Scoring(DEFAULT)]
    trials = {trial.scoring: trial for trial in result.search.trials if trial.samples == 8}
    compared = [scoring for scoring in losses if scoring in trials]
    assert len(compared) >= 6  # the others select the same groups as an earlier one, and are left out
    for scoring in compared:
        difference = losses[scoring] - default
        assert trials[scoring].loss == pytest.approx(losses[scoring].mean(), rel=1e-5)
        assert trials[scoring].difference == pytest.approx(difference.mean(), abs=1e-6)
        assert trials[scoring].error == pytest.approx(difference.std(ddof=1) / 8**0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("advantage", "noise", "method"),
    # Method None means that the default wins. With n selections, sqrt(2 ln n) standard errors are needed, about 3 here;
    # in the first case the advantage of 0.05 is 1.3 standard errors.
    [(0.05, 0.15, None), (0.05, 0.01, "wanda"), (-0.05, 0.01, None), (0.0, 0.0, None)],
)
def test_the_default_wins_unless_another_is_better_by_more_than_its_error(
    advantage: float, noise: float, method: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted losses: samples differ a lot; `wanda` beats the default by `advantage`, plus or minus `noise`."""
    of_samples = torch.linspace(1.0, 5.0, 16, dtype=torch.float64)
    spread = noise * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(8)

    def planted(_view, searched, candidates):
        return (losses(candidate, sum(map(len, searched))) for candidate in candidates)

    def losses(candidate, count):
        if candidate.scoring.importance_method == DEFAULT:
            return of_samples[:count]
        better = advantage if candidate.scoring.importance_method == "wanda" else -0.2
        return (of_samples - better + spread)[:count]

    monkeypatch.setattr(search_module, "_masked_losses", planted)
    result = run_search(search_samples=16)
    assert result.search.winner.scoring.importance_method == (method or DEFAULT)
    assert result.search.threshold == pytest.approx(math.sqrt(2 * math.log(result.search.candidates)))
    verdict = search_verdict(result.search)
    assert verdict.startswith(method or f"The default ({DEFAULT}")
    if noise and advantage > 0.0:
        errors = advantage / (noise * (16 / 15) ** 0.5 / 4)
        assert f"{advantage:.4f} nats per token, {errors:.1f} standard errors over 16 samples" in verdict


@pytest.mark.parametrize(("difference", "taken"), [(-0.19, False), (-0.2, False), (-0.21, True)])
def test_with_few_candidates_two_standard_errors_are_needed(difference: float, taken: bool) -> None:
    default = Trial(Scoring("taylor"), 1.0, 0.0, 0.0, 8, repaired=False, fixed=True)
    other = Trial(Scoring("wanda"), 1.0 + difference, difference, 0.1, 8, repaired=False, fixed=True)
    result = SearchResult([other, default], candidates=2, cut_short=False, default=default, decides=True)
    assert result.winner == (other if taken else default)


def test_search_and_repair_choose_on_different_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(channels=24, dtype=torch.float32)
    config = PruneConfig(importance_method="auto", num_samples=8, seq_len=16, held_out_samples=6, search_samples=10)
    samples = draw_samples(model, None, config, TOKENS[:1500], TOKENS[1500:])
    parts = [samples.calibration, samples.held_out, samples.searched]
    assert [len(part) for part in parts] == [8, 6, 10]
    windows = {tuple(window.tolist()) for part in parts for window in part}
    assert len(windows) == 24
    seen = []
    repair = REPAIRS["least_squares"]

    def watched(run, masks):
        seen.append([torch.cat(run.calibration), torch.cat(run.held_out)])
        return repair(run, masks)

    monkeypatch.setitem(REPAIRS, "least_squares", watched)
    run_search(model, repair="least_squares", held_out_samples=6, search_samples=10)
    assert seen
    assert all(torch.equal(one, samples.calibration) and torch.equal(other, samples.held_out) for one, other in seen)


def test_the_model_and_the_pruned_result_follow_the_winner() -> None:
    model = tiny_model(channels=24, dtype=torch.float32)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    result = run_search(model, repair="least_squares", held_out_samples=8)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert result.search.default.repaired
    again = run(
        tiny_model(channels=24, dtype=torch.float32),
        **{
            name: getattr(result.config, name)
            for name in (
                "importance_method",
                "temperature",
                "tau",
                "gradient_fix",
                "normalize_scores",
                "attention_factor",
            )
        },
        held_out_samples=8,
    )
    for a, b in zip(again.model.parameters(), result.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_search_is_deterministic() -> None:
    assert run_search().search == run_search().search


def test_the_first_round_is_completed_even_if_time_runs_out() -> None:
    result = run_search(search_minutes=1e-9)
    assert result.search.cut_short
    assert result.search.default.samples == 2
    assert result.search.candidates == len(result.search.trials)


@pytest.mark.parametrize(
    ("in_time", "method", "verdict"),
    [
        (0, None, "no other setting was repaired"),
        (1, None, "no other setting was repaired"),
        (2, None, "no other setting is better"),
        (3, "wanda", ""),
    ],
)
def test_if_time_runs_out_only_repaired_candidates_can_beat_the_default(
    in_time: int, method: str | None, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted losses: magnitude is best without repair, wanda with it; `in_time` candidates are repaired in time."""
    default = default_methods("least_squares")[0]
    planted = {Scoring("magnitude"): (0.0, 3.0), Scoring("wanda"): (1.0, 1.0), Scoring(default): (2.0, 2.0)}
    late = False

    def losses(candidates, repaired):
        nonlocal late
        for number, candidate in enumerate(candidates, start=1):
            late = late or in_time == number * repaired
            yield torch.full((16,), planted.get(candidate.scoring, (4.0, 4.0))[repaired], dtype=torch.float64)

    monkeypatch.setattr(search_module, "_round_sizes", lambda samples: [samples])
    monkeypatch.setattr(search_module, "_masked_losses", lambda _view, _parts, those: losses(those, False))
    monkeypatch.setattr(search_module, "_repaired_losses", lambda _run, _parts, those: losses(those, True))
    monkeypatch.setattr(search_module.time, "monotonic", lambda: 1e9 * late)
    result = run_search(repair="least_squares", search_samples=16).search
    assert result.cut_short
    assert result.winner.scoring == Scoring(method or default)
    assert verdict in search_verdict(result)
    assert "Time ran out" in search_verdict(result)
    assert all(trial.repaired == (in_time > 0) for trial in result.deciding)


def test_if_time_runs_out_before_any_repair_the_default_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted losses without repair: wanda has the lowest, and the loss of magnitude is not a number."""
    planted = {Scoring("wanda"): 1.0, Scoring("magnitude"): math.nan}

    def losses(_view, parts, candidates):
        for candidate in candidates:
            loss = planted.get(candidate.scoring, 2.0)
            yield torch.full((sum(map(len, parts)),), loss, dtype=torch.float64)

    monkeypatch.setattr(search_module, "_masked_losses", losses)
    result = run_search(repair="least_squares", search_samples=16, search_minutes=1e-9).search
    assert result.cut_short
    assert result.best_other.scoring == Scoring("wanda")
    assert math.isnan(result.deciding[-1].loss)
    assert result.winner == result.default


def test_results_and_command_line(tmp_path: Path) -> None:
    result = run_search(output_dir=str(tmp_path), output_name="s")
    assert (tmp_path / "s" / "analysis" / "search.json").is_file()
    report = (tmp_path / "s" / "report.html").read_text()
    assert "<h2>Search</h2>" in report
    assert search_verdict(result.search) in html.unescape(report)
    written = json.loads((tmp_path / "s" / "analysis" / "search.json").read_text())
    assert written["verdict"] == search_verdict(result.search)
    assert written["trials"][0].keys() >= {"loss", "difference", "error", "samples"}
    words = shlex.split(command_line(result.config))
    assert words[:2] == ["gradprune", "prune"]
    from typer.main import get_command

    options = {name for p in get_command(app).commands["prune"].params for name in (*p.opts, *p.secondary_opts)}
    given = [word.replace("_", "-") for word in words if word.startswith("--")]
    assert set(given) <= options
    assert "auto" not in words


def test_a_scoring_is_described_in_words() -> None:
    scoring = Scoring("fisher", "adaptive", temperature=1.0, tau=None)
    assert describe_scoring(scoring) == "fisher, T=1 tau=25th percentile, adaptive"
    assert PruneConfig().with_part(scoring).scoring == scoring
    other = Scoring("fisher", temperature=1.0, tau=0.0, prior="similarity", clip_percentile=99.0, normalize_per="block")
    assert describe_scoring(other) == "fisher, T=1 tau=0 prior=similarity, clipped at 99 % per block"


def test_scorings_that_differ_in_any_option_are_described_differently() -> None:
    options = {"importance_method": "fisher", "temperature": 1.0, "normalize_scores": "log"}
    others = {
        "importance_method": "taylor", "temperature": 2.0, "normalize_scores": "sqrt", "gradient_fix": "adaptive",
        "normalize_per": "block", "clip_percentile": 95.0, "attention_factor": 2.0, "tau": 0.5, "prior": "taylor",
    }  # fmt: skip
    assert others.keys() == options_of(Scoring).keys()
    descriptions = [describe_scoring(Scoring(**{**options, name: value})) for name, value in others.items()]
    assert len({describe_scoring(Scoring(**options)), *descriptions}) == 1 + len(others)


@pytest.mark.parametrize("option", [{"temperature": 1.0}, {"gradient_fix": "adaptive"}, {"attention_factor": 2.0}])
def test_what_auto_chooses_cannot_be_given_too(option) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(option))}: importance_method 'auto' chooses it"):
        PruneConfig(importance_method="auto", **option)


def test_a_text_that_leaves_nothing_to_search_on_is_refused() -> None:
    with pytest.raises(CalibrationError, match="leave no text to search on"):
        run_search(num_samples=93)


class _FirstOfTwo(Ranks):
    """The first of two ranks; the second has measured only one of its candidates, whose loss is 1."""

    world = 2

    def gather_json(self, value: int) -> list[int]:
        return [value, 1]

    def gather(self, tensors: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return [dict(tensors), {"0": torch.ones(4)}]


def test_if_time_runs_out_in_one_rank_all_end_with_the_same_candidates() -> None:
    """This rank has measured candidates 0, 2 and 4 of five; the other rank has measured 1, but not 3."""
    pool = [search_module._Candidate(Scoring("wanda"), GroupMasks({}, 0), fixed=False) for _ in range(5)]
    run_of_rank = SimpleNamespace(ranks=_FirstOfTwo(), config=SimpleNamespace(search_minutes=1.0))
    shown: list[int] = []
    tournament = search_module._Tournament(run_of_rank, pool, lambda: shown.append(1))
    losses = (torch.full((4,), loss) for loss in (0.0, 2.0, 4.0))
    trials = tournament._round(pool, lambda _own: losses, repaired=False, may_end=True)
    assert [trial.loss for trial in trials] == [0.0, 1.0, 2.0]
    assert [trial.difference for trial in trials] == [0.0, 1.0, 2.0]
