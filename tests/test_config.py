import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradprune import PruneConfig
from gradprune.cli import app
from gradprune.config import (
    METHODS,
    OPTIONS,
    PARTS,
    Constraints,
    Data,
    Options,
    Scoring,
    command_line,
    options_of,
)
from gradprune.config.domains import at_least
from gradprune.config.option import option
from gradprune.config.recovery_config import RecoveryConfig
from gradprune.config.table import options_page
from gradprune.errors import ConfigError
from gradprune.report.strict_json import json_text

ROOT = Path(__file__).resolve().parents[1]

# For every option, a value that is not its default.
OTHER = {
    "base_model": "a folder/model", "pruning_ratio": 0.35, "prune_kinds": "attention,mlp", "device": "cpu",
    "dtype": "bfloat16",
    "trust_remote_code": True, "dataset": "it's.txt", "eval_dataset": "held-out.jsonl", "num_samples": 5, "seq_len": 7,
    "batch_size": 3, "held_out_samples": 9, "eval_samples": 11, "seed": 2**63 - 1, "reduction": "batch",
    "backend": "cpp", "use_gradient_checkpointing": True, "prior_samples": 2, "collect_batches": 4, "evidence": "all",
    "evidence_file": "evidence.safetensors", "importance_method": "taylor", "gradient_fix": "adaptive+depth:sqrt",
    "normalize_scores": "log", "normalize_per": "block", "clip_percentile": 99.5, "attention_factor": 2.0,
    "temperature": 0.5, "tau": float("inf"), "prior": "similarity", "search_samples": 12, "search_minutes": 1.5,
    "freeze_first_n_layers": 1, "freeze_last_n_layers": 2, "max_layer_ratio": 0.5, "round_to": 8, "uniform": True,
    "epsilon": 0.1, "repair": "none", "output_dir": "elsewhere", "output_name": "$name", "overwrite": True,
    "max_shard_size": "5GB",
    "measure_speed": False, "in_place": True, "tasks": "piqa", "task_questions": 5, "checkpoint_every": 64,
    "resume": True, "serve": "hf", "tensor_parallel": 2, "prompts": "prompts.txt", "generations": False,
    "device_map": "auto", "stream_layers": "off", "stream_memory": "2GiB", "target_parameters": "1.5B",
    "target_bytes": "3GiB", "target_speedup": 1.5,
    "shots": 2, "distill_samples": 4, "distill_text": 0.5, "own_text": 0.25,
}  # fmt: skip


# Values for those options whose values in `OTHER` contradict other options; these contradict none.
_COMPATIBLE = {
    "device_map": None, "uniform": False, "tensor_parallel": 1, "target_bytes": None, "target_speedup": None,
    "shots": 1, "distill_samples": 0, "distill_text": 0.1,
}  # fmt: skip


def full_config(**changes) -> PruneConfig:
    return PruneConfig(**{**OTHER, **_COMPATIBLE, **changes})


def test_the_parts_hold_every_option_once() -> None:
    names = [name for part in PARTS for name in options_of(part)]
    assert names == list(OPTIONS)
    assert len(names) == len(set(names))
    assert set(OTHER) == set(OPTIONS)
    assert all(OTHER[name] != known.default for name, known in OPTIONS.items())


def test_every_option_has_help() -> None:
    for known in OPTIONS.values():
        assert known.help.endswith(".")
        assert known.accepted(known.default) == known.default


def test_a_part_is_a_hashable_value_of_its_own() -> None:
    config = full_config()
    scoring = config.scoring
    assert scoring == Scoring(**{name: OTHER[name] for name in options_of(Scoring)})
    assert {scoring: 1}[full_config(seed=1).scoring] == 1
    assert scoring != PruneConfig().scoring
    assert config.constraints == Constraints(1, 2, 0.5, 8, epsilon=0.1, serve="hf")
    assert config.part(Data).seq_len == 7
    assert PruneConfig().with_part(scoring).scoring == scoring
    assert PruneConfig().with_part(scoring).constraints == Constraints()


def test_a_new_option_needs_only_one_line() -> None:
    @dataclass(frozen=True)
    class Added(Options):
        """Stage."""

        widgets: int = option(3, "How many.", at_least(2))

    with pytest.raises(ConfigError, match="widgets: 1 is not a whole number of at least 2"):
        Added(widgets=1)
    known = options_of(Added)["widgets"]
    assert (known.stage, known.default, known.kind, known.values) == ("Stage", 3, int, "a whole number of at least 2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruning_ratio": "0.2"}, r"pruning_ratio: '0.2' is not a number between 0 and 1 \(both excluded\)"),
        ({"pruning_ratio": None}, "pruning_ratio: None is not a number"),
        ({"pruning_ratio": 10**400}, "pruning_ratio: 10+ is not a number"),
        ({"temperature": True}, "temperature: True is not a finite number of at least 0"),
        ({"temperature": float("inf")}, "temperature: inf is not a finite number"),
        ({"tau": "x"}, "tau: 'x' is not a number between 0 and inf"),
        ({"tau": float("nan")}, "tau: nan is not between 0 and inf"),
        ({"gradient_fix": None}, "gradient_fix: None is not none, auto, one of adaptive"),
        ({"gradient_fix": ""}, "gradient_fix: '' in '' is unknown"),
        ({"normalize_scores": None}, "normalize_scores: None is unknown; choose one of none, log"),
        ({"reduction": ["sample"]}, r"reduction: \['sample'\] is unknown; choose one of sample, batch"),
        ({"backend": "cuda"}, "backend: 'cuda' is unknown; choose one of auto, reference, cpp, triton"),
        ({"output_name": 5}, "output_name: 5 is not a plain folder name"),
        ({"output_name": ""}, "output_name: '' is not a plain folder name"),
        ({"output_name": "a\nb"}, r"output_name: 'a\\nb' contains control characters; use letters"),
        ({"output_name": "a\x1b[0m"}, "output_name: .* contains control characters"),
        ({"output_name": "a\udc80"}, "output_name: .* contains control characters"),
        ({"output_dir": ""}, "output_dir: '' is empty; give a folder, or leave the option out"),
        ({"base_model": ""}, "base_model: '' is empty; give a model folder or hub id"),
        ({"base_model": "a\0b"}, "base_model: .* contains a NUL character"),
        ({"dataset": ""}, "dataset: '' is empty; give a .txt"),
        ({"evidence_file": ""}, "evidence_file: '' is empty"),
        ({"device": ""}, "device: '' is empty"),
        ({"uniform": "no"}, "uniform: 'no' is not True or False"),
        ({"uniform": 1}, "uniform: 1 is not True or False"),
        ({"num_samples": True}, "num_samples: True is not a whole number of at least 1"),
        ({"num_samples": 4.0}, "num_samples: 4.0 is not a whole number"),
        ({"seed": 2**63}, f"seed: {2**63} is too large; at most {2**63 - 1} is possible"),
        ({"batch_size": 2**31}, f"batch_size: {2**31} is too large; at most {2**31 - 1}"),
        ({"round_to": 2**31}, f"round_to: {2**31} is too large"),
        ({"in_place": True}, "in_place: leaves no dense model to time; give measure_speed=False too"),
        ({"uniform": True, "freeze_first_n_layers": 1}, "uniform: cannot be combined"),
        ({"task_questions": 3}, "task_questions: 3 is given, but tasks is not; give both"),
        ({"importance_method": "auto", "tau": 0.0}, "tau: importance_method 'auto' chooses it"),
    ],
)
def test_a_bad_value_gives_a_one_line_error_that_says_what_is_allowed(options, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        PruneConfig(**options)
    assert "\n" not in str(error.value)


def test_a_part_checks_its_values_as_the_whole_configuration_does() -> None:
    with pytest.raises(ConfigError, match="tau: 'x'"):
        Scoring(tau="x")
    with pytest.raises(ConfigError, match="'wanda' uses no gradients"):
        Scoring("wanda", "adaptive")


def test_the_default_method_depends_on_kinds_and_repair_and_is_recorded() -> None:
    for options, method in (
        ({}, "obs"),
        ({"prune_kinds": "attention,expert_channels"}, "obs"),
        ({"prune_kinds": "attention,experts"}, "group_fisher"),
        ({"repair": "none"}, "group_fisher"),
    ):
        config = PruneConfig(**options)
        assert config.importance_method == config.scoring.importance_method == method
        assert config.to_dict()["importance_method"] == method
        assert f"--importance_method {method}" in command_line(config)
    assert Scoring().importance_method == "obs"
    assert PruneConfig(importance_method="obs", prune_kinds="experts").importance_method == "obs"


def test_values_are_converted_to_plain_types_that_can_be_written() -> None:
    config = PruneConfig(
        base_model=Path("a/b"), output_dir=Path("c"), output_name=Path("d"), num_samples=np.int64(4), seed=np.uint8(3),
        pruning_ratio=np.float32(0.25), temperature=1, dataset=np.str_("text.txt"),
    )  # fmt: skip
    kinds = {name: type(getattr(config, name)) for name in ("base_model", "output_dir", "output_name", "dataset")}
    assert set(kinds.values()) == {str}
    assert (config.base_model, config.output_name) == (str(Path("a/b")), "d")
    assert (type(config.num_samples), type(config.seed)) == (int, int)
    assert (type(config.pruning_ratio), config.pruning_ratio) == (float, 0.25)
    assert type(config.temperature) is float
    assert config == PruneConfig.from_dict(json.loads(json_text(config.to_dict())))


def test_what_is_written_reads_back_equal() -> None:
    for config in (PruneConfig(), full_config(), PruneConfig(importance_method="auto", reduction="batch")):
        assert PruneConfig.from_dict(json.loads(json_text(config.to_dict()))) == config


def test_missing_options_are_defaults_and_unknown_ones_are_refused() -> None:
    assert PruneConfig.from_dict({"pruning_ratio": 0.3}) == PruneConfig(pruning_ratio=0.3)
    assert PruneConfig.from_dict({}) == PruneConfig()
    with pytest.raises(ConfigError, match=r"widgets: is not an option; the options are base_model, pruning_ratio"):
        PruneConfig.from_dict({"widgets": 1})


def _parsed(words: list[str]) -> dict[str, object]:
    """The options that typer reads from the words after `gradprune prune`, by name."""
    from typer.main import get_command

    command = get_command(app).commands["prune"]
    arguments = [word.replace("_", "-") if word.startswith("--") else word for word in words]
    return command.make_context("prune", arguments).params


def test_the_printed_command_gives_the_configuration_back() -> None:
    for config in (
        PruneConfig(),
        full_config(),
        full_config(uniform=True, freeze_first_n_layers=0, freeze_last_n_layers=0),
    ):
        words = shlex.split(command_line(config))
        assert words[:2] == ["gradprune", "prune"]
        read = _parsed(words[2:])
        for name, known in OPTIONS.items():
            if known.library_only:
                assert name not in read
                assert f"--{name}" not in words
            else:
                value = getattr(config, name)
                assert read[name] == (str(value) if name == "pruning_ratio" else value), name


@given(st.sampled_from(METHODS), st.floats(0.0, 10.0), st.none() | st.floats(0.0), st.floats(0.01, 0.99))
def test_numbers_survive_the_printed_command(method, temperature: float, tau: float | None, ratio: float) -> None:
    config = PruneConfig(
        importance_method=method,
        temperature=temperature,
        tau=tau,
        pruning_ratio=ratio,
        prune_kinds="experts" if method == "reap" else None,
    )
    read = _parsed(shlex.split(command_line(config))[2:])
    read["pruning_ratio"] = float(read["pruning_ratio"])
    assert PruneConfig(**{name: read[name] for name in OPTIONS if name in read}) == config


def test_the_page_of_options_is_up_to_date() -> None:
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert page == options_page(), "renew it: python -m gradprune.config.table > docs/options.md"
    assert all(f"| `{name}` |" in page for name in [*OPTIONS, *options_of(RecoveryConfig)])
