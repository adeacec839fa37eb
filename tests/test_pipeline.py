import json
import re
from pathlib import Path

import pytest
import torch

from gradprune import PruneConfig, load_pruned, prune
from gradprune.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    GradPruneError,
    SelectionError,
    UnsupportedArchitectureError,
)
from gradprune.models import describe
from gradprune.pipeline import prune_ratios
from gradprune.scoring.table import empty_table
from helpers.pipeline_runs import TOKENS, run
from helpers.tiny_models import ARCHITECTURE_NAMES, tiny_ids, tiny_model


def parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_ratio_is_removed_to_within_one_group(architecture: str, tied: bool, device: str) -> None:
    model = tiny_model(architecture, channels=40, tied=tied).to(device)
    before = parameters(model)
    result = run(model)
    largest_group = empty_table(describe(model)).cost.max()
    removed = before - parameters(result.model)
    # The norms of dropped blocks are removed in addition to the budget, which counts only groups.
    assert 0.2 * before - largest_group < removed <= 0.2 * before + 6 * model.config.hidden_size
    assert removed >= result.table.cost[result.pruned].sum()
    assert result.after.parameters == parameters(result.model)


def test_the_given_model_is_unchanged_and_nothing_is_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    result = run(model)
    assert result.model is not model
    assert result.output is None
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert not list(tmp_path.iterdir())


def test_with_in_place_the_given_model_is_cut(device: str) -> None:
    model = tiny_model().to(device)
    before = parameters(model)
    result = run(model, measure_speed=False, in_place=True)
    assert result.model is model
    assert parameters(model) < before
    assert result.before.speed is None


def test_the_results_folder_holds_what_the_documentation_says(tmp_path: Path) -> None:
    result = run(tiny_model(), output_dir=str(tmp_path), output_name="out", temperature=1.0)
    folder = tmp_path / "out"
    assert result.output == folder
    groups = (folder / "analysis" / "groups.csv").read_text().splitlines()
    assert groups[0] == "layer,kind,index,importance,cost,prior,score,pruned"
    assert len(groups) == 1 + len(result.table)
    summary = json.loads((folder / "analysis" / "summary.json").read_text())
    assert summary["parameters"] == {"before": result.before.parameters, "after": result.after.parameters}
    assert summary["perplexity"]["after"] == result.after.perplexity.value
    assert len(summary["layers"]) == 3
    assert summary["bytes_on_disk"]["after"] == (folder / "model" / "model.safetensors").stat().st_size
    gradients = json.loads((folder / "analysis" / "gradients.json").read_text())
    assert [layer["layer"] for layer in gradients["before"]["layers"]] == [0, 1, 2]
    assert gradients["verdict"] == {"before": "normal", "after": "normal"}
    assert gradients["pruning"][2].keys() == {"layer", "attention_pruned", "mlp_pruned"}
    plots = ["grad_comparison.png", "grad_dist_batch0.png", "grad_heatmap_batch0.png", "gradient_report.txt"]
    assert sorted(path.name for path in (folder / "gradient_analysis").iterdir()) == [*plots, "layer_variance.png"]
    record = json.loads((folder / "run.json").read_text())
    assert record["config"]["temperature"] == 1.0
    assert set(record["versions"]) >= {"gradprune", "torch", "transformers", "python"}
    report = (folder / "report.html").read_text()
    assert "<svg" in report
    assert f"{result.after.parameters:,}" in report
    assert report.count("data:image/png;base64,") == 4
    assert not re.search(r"""(src|href)=["']?(http|/|\.)|@import|url\(http""", report), "the report needs no other file"
    reloaded = load_pruned(folder / "model")
    ids = tiny_ids()
    torch.testing.assert_close(reloaded(ids).logits, result.model(ids).logits)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, device: str) -> None:
    options = {"output_dir": str(tmp_path), "temperature": 1.0, "backend": "auto"}
    for name in ("a", "b"):
        run(tiny_model(dtype=torch.float32).to(device), output_name=name, **options)
    for file in (
        "model/model.safetensors",
        "model/config.json",
        "analysis/groups.csv",
        "analysis/gradients.json",
        "analysis/evidence.safetensors",
    ):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_another_seed_draws_other_samples() -> None:
    first, second = run(tiny_model(), seed=0), run(tiny_model(), seed=1)
    assert (first.table.importance != second.table.importance).any()


@pytest.mark.parametrize("prior", ["removal", "similarity", "taylor"])
def test_every_prior_changes_the_scores(prior: str, device: str) -> None:
    model = tiny_model().to(device)
    plain, modulated = run(model), run(model, temperature=1.0, prior=prior)
    assert (plain.table.importance == modulated.table.importance).all()
    assert (plain.table.score != modulated.table.score).any()


def test_a_gpu_chooses_and_repairs_as_a_cpu_does(device: str) -> None:
    """They are compared in fp64, in which the order of sums does not change the selection."""
    ids = tiny_ids()
    there, here = (run(tiny_model(channels=40).to(name), temperature=1.0) for name in (device, "cpu"))
    assert (there.pruned == here.pruned).all()
    torch.testing.assert_close(there.model(ids.to(device)).logits.cpu(), here.model(ids).logits, rtol=1e-7, atol=1e-8)
    assert there.after.perplexity.value == pytest.approx(here.after.perplexity.value)


def test_uniform_gives_a_plain_checkpoint(tmp_path: Path) -> None:
    model = tiny_model("llama", kv_heads=4, ratio=2, channels=32, layers=2)
    result = run(model, uniform=True, round_to=8, pruning_ratio=0.3, output_dir=str(tmp_path), output_name="u")
    assert type(result.model) is type(model)
    config = json.loads((tmp_path / "u" / "model" / "config.json").read_text())
    assert "auto_map" not in config
    assert "per_layer_config" not in config
    assert config["intermediate_size"] % 8 == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pruning_ratio": 0.99}, SelectionError, "pruning_ratio: 0.99 cannot be reached"),
        ({"pruning_ratio": 0.5, "freeze_first_n_layers": 3}, SelectionError, "cannot be reached"),
        ({"seq_len": 65}, CalibrationError, "seq_len: 65 is longer than the model's context of 64"),
        ({"num_samples": 1000}, CalibrationError, "num_samples: 1000 samples of 16 tokens need 16,000"),
        ({"num_samples": 2, "seq_len": 60, "evaluation": TOKENS[:59]}, CalibrationError, "evaluation: 59 held-out"),
        ({"calibration": TOKENS.bool()}, CalibrationError, "calibration: has shape .* int64 is needed"),
        ({"calibration": TOKENS.tolist()}, CalibrationError, "calibration: is a list; a torch tensor, .tokens. int64"),
        ({"evaluation": TOKENS.numpy()}, CalibrationError, "evaluation: is a ndarray; a torch tensor, .tokens. int64"),
    ],
)
def test_impossible_runs_are_refused_before_anything_is_written(options, error, message, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        run(tiny_model(), output_dir=str(tmp_path / "r"), output_name="x", **options)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruning_ratio": 0.0}, "pruning_ratio: 0.0 is not between 0 and 1"),
        ({"pruning_ratio": 1.0}, "pruning_ratio: 1.0"),
        ({"pruning_ratio": float("nan")}, "pruning_ratio: nan"),
        ({"importance_method": "best"}, "importance_method: 'best' is unknown; choose one of auto, magnitude"),
        ({"temperature": -1.0}, "temperature: -1.0"),
        ({"tau": -0.1}, "tau: -0.1"),
        ({"epsilon": 2.0}, "epsilon: 2.0"),
        ({"max_layer_ratio": 0.0}, "max_layer_ratio: 0.0"),
        ({"num_samples": 0}, "num_samples: 0"),
        ({"seq_len": 1}, "seq_len: 1"),
        ({"output_name": "../x"}, "output_name: '../x'"),
        ({"gradient_fix": "adaptve"}, "gradient_fix: 'adaptve' in 'adaptve' is unknown; choose none, auto"),
        ({"gradient_fix": "adaptive+none"}, r"gradient_fix: 'none' in 'adaptive\+none'"),
        ({"gradient_fix": "adaptive", "importance_method": "wanda"}, "uses no gradients"),
        ({"clip_percentile": 50.0}, "clip_percentile: 50.0"),
        ({"attention_factor": 0.0}, "attention_factor: 0.0"),
        ({"normalize_scores": "log2"}, "normalize_scores: 'log2'"),
        ({"uniform": True, "freeze_last_n_layers": 1}, "uniform: cannot be combined"),
    ],
)
def test_a_bad_option_is_named(options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PruneConfig(**options)


def test_an_existing_folder_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    run(tiny_model(), output_dir=str(tmp_path), output_name="x")
    with pytest.raises(CheckpointError, match=r"output_name: .* exists"):
        run(tiny_model(), output_dir=str(tmp_path), output_name="x")
    run(tiny_model(), output_dir=str(tmp_path), output_name="x", overwrite=True, pruning_ratio=0.1)
    assert json.loads((tmp_path / "x" / "run.json").read_text())["config"]["pruning_ratio"] == 0.1
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("gradprune.report.folder.write_report", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model(), output_dir=str(tmp_path), output_name="x")
    assert not list(tmp_path.iterdir())


def test_priors_on_another_number_of_samples_are_measured_again(tmp_path: Path) -> None:
    model, options = tiny_model(), {"temperature": 1.0, "prior": "removal"}
    run(model, **options, prior_samples=2, output_dir=str(tmp_path), output_name="few")
    file = str(tmp_path / "few" / "analysis" / "evidence.safetensors")
    few, many = (run(model, **options, prior_samples=count, evidence_file=file).table for count in (2, 8))
    fresh = run(model, **options, prior_samples=8).table
    assert (many.prior == fresh.prior).all()
    assert (few.prior != many.prior).any()


def test_priors_on_all_samples_are_reused_if_more_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, options = tiny_model(), {"temperature": 1.0, "prior": "similarity", "prior_samples": 100}
    run(model, **options, output_dir=str(tmp_path), output_name="all")
    monkeypatch.setattr("gradprune.calibration.gather._priors", None)
    run(model, **options, evidence_file=str(tmp_path / "all" / "analysis" / "evidence.safetensors"))


def interrupted_after_its_calibration(monkeypatch: pytest.MonkeyPatch, **options) -> None:
    def interrupt(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gradprune.calibration.gather._evidence", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_model(), **options)


def test_a_calibration_with_gradients_of_more_samples_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"num_samples": 40, "output_dir": str(tmp_path), "output_name": "x", "checkpoint_every": 4}
    interrupted_after_its_calibration(monkeypatch, **options, temperature=1.0, prior="taylor")
    with pytest.raises(CheckpointError, match=r"another number of samples with gradients \(40, now 32\)"):
        run(tiny_model(), **options, resume=True)


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        ({"prune_kinds": "mlp"}, "prune_kinds"),
        ({"gradient_fix": "adaptive"}, "gradient_fix"),
        ({"seq_len": 8}, "seq_len"),
        ({"num_samples": 4}, "num_samples"),
        ({"use_gradient_checkpointing": True}, "use_gradient_checkpointing"),
        ({"backend": "cpp"}, "backend"),
        ({"importance_method": "wanda"}, "evidence"),
        ({"calibration": TOKENS[1:1500]}, "data"),
        ({"model": tiny_model(seed=1)}, "model"),
    ],
)
def test_a_calibration_with_anything_different_is_not_resumed(
    options: dict[str, object], differs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"output_dir": str(tmp_path), "output_name": "x", "checkpoint_every": 4}
    interrupted_after_its_calibration(monkeypatch, **given)
    with pytest.raises(CheckpointError, match=f"belongs to a run with .*another {differs} "):
        run(**{"model": tiny_model(), **given, **options}, resume=True)


def test_resuming_a_finished_calibration_does_not_mention_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"output_dir": str(tmp_path), "output_name": "x", "checkpoint_every": 4}
    interrupted_after_its_calibration(monkeypatch, **options)
    run(tiny_model(), **options, resume=True)
    assert "calibration goes on after 8 of 8 samples" in caplog.text
    assert "ranks" not in caplog.text


def test_ids_of_any_integer_type_are_accepted() -> None:
    plain = run(tiny_model())
    for dtype in (torch.int32, torch.uint8):
        again = run(tiny_model(), calibration=TOKENS[:1500].to(dtype), evaluation=TOKENS[1500:].to(dtype))
        assert (again.pruned == plain.pruned).all()
        assert again.after.perplexity == plain.after.perplexity


def test_several_ratios_and_a_target_are_refused_together() -> None:
    with pytest.raises(ConfigError, match="target_parameters: 9K is given, and ratios too"):
        prune_ratios(tiny_model(), None, PruneConfig(target_parameters="9K"), [0.1, 0.2])


@pytest.mark.parametrize("ratios", [[], [0.3, 0.1], [0.1, 0.1]])
def test_ratios_must_be_ascending_without_duplicates(ratios: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"ratios: \[.*\] is empty, or not in ascending order without duplicates"):
        prune_ratios(tiny_model(), None, PruneConfig(), ratios)


def test_a_model_without_tokenizer_needs_tokens() -> None:
    with pytest.raises(GradPruneError, match="the model has no tokenizer"):
        prune(tiny_model(), None, PruneConfig(seq_len=16))


def test_a_pruned_model_can_be_pruned_again() -> None:
    once = run(tiny_model(channels=40), pruning_ratio=0.2).model
    twice = run(once, pruning_ratio=0.2)
    assert parameters(twice.model) < parameters(once)
    assert twice.after.perplexity.value > 0


@pytest.mark.parametrize("method", ["taylor", "fisher", "group_fisher"])
def test_a_real_model_keeps_most_of_its_ability(method: str, stories_model: Path, stories_text) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(stories_model)
    tokenizer = AutoTokenizer.from_pretrained(stories_model)
    calibration, evaluation = map(str, stories_text)
    options = {"dataset": calibration, "eval_dataset": evaluation, "num_samples": 32, "eval_samples": 40}
    config = PruneConfig(importance_method=method, pruning_ratio=0.1, measure_speed=False, **options)
    result = prune(model, tokenizer, config)
    assert result.before.perplexity.value < 4.6
    assert result.after.perplexity.value < 9.0
    assert 0 <= 0.1 * result.before.parameters - (result.before.parameters - result.after.parameters) < 3072


@pytest.mark.parametrize("given", [None, "gpt2", torch.nn.Linear(2, 2)])
def test_the_type_of_what_is_no_model_is_named(given) -> None:
    for call in (lambda: run(given), lambda: prune_ratios(given, None, PruneConfig(), [0.1])):
        with pytest.raises(UnsupportedArchitectureError, match=f"^model: is a {type(given).__name__}; a causal LM of"):
            call()


def test_a_forward_that_a_copy_would_run_on_the_dense_model_is_refused() -> None:
    model = tiny_model()
    mlp = model.model.layers[1].mlp
    own = mlp.forward
    expected = run(model).after.perplexity
    mlp.forward = lambda x: own(x)
    with pytest.raises(UnsupportedArchitectureError, match=r"the forward of model\.layers\.1\.mlp is replaced"):
        run(model)
    mlp.forward = own
    assert run(model).after.perplexity == expected


def test_a_custom_model_class_is_refused_before_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    model.__class__ = type("MyLlama", (type(model),), {})
    monkeypatch.setattr("gradprune.pipeline.gather_evidence", lambda _run: pytest.fail("it calibrates"))
    with pytest.raises(UnsupportedArchitectureError, match="a MyLlama cannot be cut; load it as LlamaForCausalLM"):
        run(model)
