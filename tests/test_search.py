import shlex
from pathlib import Path

import pytest
import torch

from gradprune import PruneConfig
from gradprune.cli import app
from gradprune.config import Constraints, Scoring, command_line
from gradprune.data.windows import batches
from gradprune.errors import CalibrationError, ConfigError
from gradprune.models import describe
from gradprune.models.loss import mean_loss
from gradprune.report.tables import describe_scoring
from gradprune.scoring.scoring import score_groups
from gradprune.scoring.selection import select
from gradprune.surgery.masking import masked
from helpers.pipeline_runs import TOKENS, run
from helpers.tiny_models import tiny_model


def found(model=None, **options):
    defaults = {"importance_method": "auto", "held_out_samples": 8, "repair": "none"}
    return run(model or tiny_model(channels=24, dtype=torch.float32), **{**defaults, **options})


def test_the_winner_is_no_worse_than_any_fixed_setting() -> None:
    """Each method without and with H-GSP, its loss measured here once more, on the samples the search had."""
    model = tiny_model(channels=24, dtype=torch.float32)
    result = found(model)
    view = describe(model)

    from gradprune.data.samples import draw_samples

    samples = draw_samples(model, None, result.config, TOKENS[:1500], TOKENS[1500:])
    assert samples.held_out.shape == (0, 16)  # repair is off, and nothing is searched any more
    config = PruneConfig(importance_method="auto", num_samples=8, seq_len=16, batch_size=4, held_out_samples=8)
    held_out = draw_samples(model, None, config, TOKENS[:1500], TOKENS[1500:]).held_out
    assert len(held_out) == 8
    losses = []
    for method in ("magnitude", "wanda", "taylor", "taylor_2nd", "fisher", "group_fisher", "obs"):
        for temperature in (0.0, 1.0):
            table = score_groups(view, result.evidence, Scoring(method, temperature=temperature, tau=0.0))
            masks = table.masks(select(table, 0.2, result.before.parameters, Constraints()))
            with masked(view, masks):
                losses.append(mean_loss(model, list(batches(held_out, 4))))
    assert result.search.winner.loss <= min(losses)
    assert result.search.winner.samples == 8
    assert result.search.candidates > 12


def test_the_model_and_the_pruned_result_follow_the_winner() -> None:
    model = tiny_model(channels=24, dtype=torch.float32)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    result = found(model, repair="least_squares")
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert result.search.winner.repaired
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


def test_it_is_deterministic() -> None:
    assert found().search == found().search


def test_time_that_runs_out_leaves_the_first_round() -> None:
    result = found(search_minutes=1e-9)
    assert result.search.cut_short
    assert result.search.winner.samples == 2
    assert result.search.candidates == len(result.search.trials)


def test_results_and_command_line(tmp_path: Path) -> None:
    result = found(output_dir=str(tmp_path), output_name="s")
    assert (tmp_path / "s" / "analysis" / "search.json").is_file()
    assert "<h2>Search</h2>" in (tmp_path / "s" / "report.html").read_text()
    words = shlex.split(command_line(result.config))
    assert words[:2] == ["gradprune", "prune"]
    from typer.main import get_command

    options = {name for p in get_command(app).commands["prune"].params for name in (*p.opts, *p.secondary_opts)}
    given = [word.replace("_", "-") for word in words if word.startswith("--")]
    assert set(given) <= options
    assert "auto" not in words


def test_a_scoring_is_told_in_words() -> None:
    scoring = Scoring("fisher", "adaptive", temperature=1.0, tau=None)
    assert describe_scoring(scoring) == "fisher, T=1 tau=25th percentile, adaptive"
    assert PruneConfig().with_part(scoring).scoring == scoring


@pytest.mark.parametrize("option", [{"temperature": 1.0}, {"gradient_fix": "adaptive"}, {"attention_factor": 2.0}])
def test_what_auto_chooses_cannot_be_given_too(option) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(option))}: importance_method 'auto' chooses it"):
        PruneConfig(importance_method="auto", **option)


def test_no_text_to_search_on_is_told() -> None:
    with pytest.raises(CalibrationError, match="leave no text to search on"):
        found(num_samples=93)
