"""The commands and the program of docs/large-models.md run as they are printed, but on fewer samples."""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gradprune import ImportanceEngine
from gradprune.checkpoint.load import load_model
from gradprune.cli import main
from gradprune.demo import demo_model_path
from gradprune.models.residency import residency_of
from helpers.launched import run_ranks

PAGE = Path(__file__).resolve().parents[1] / "docs" / "large-models.md"
PRUNING = (
    "--num_samples",
    "8",
    "--eval_samples",
    "4",
    "--held_out_samples",
    "4",
    "--no_generations",
    "--no_measure_speed",
)
# The options that are added to each command to make it quick.
FEWER = {
    "prune": PRUNING,
    "search": (*PRUNING, "--search_samples", "4"),
    "diagnose": ("--num_samples", "4"),
    "eval": ("--eval_samples", "4"),
    "plan": (),
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model that `gradprune demo`, the page's first command, would write."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "results" / "demo").mkdir(parents=True)
    (folder / "results" / "demo" / "model").symlink_to(demo_model_path())
    return folder


def test_every_command_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    lines = "\n".join(blocks("sh")).replace("$MODEL", "results/demo/model").splitlines()
    assert lines[:2] == ["gradprune demo", "MODEL=results/demo/model"]
    commands = [shlex.split(line) for line in lines[2:] if line]
    assert {command[1] for command in commands if command[0] == "gradprune"} == set(FEWER)
    for command in commands:
        if command[0] == "gradprune":
            # The command runs in this process, and the ranks are forked from it, so that nothing is imported again.
            monkeypatch.setattr(sys, "argv", [*command, *FEWER[command[1]]])
            with pytest.raises(SystemExit) as end, contextlib.redirect_stdout(io.StringIO()):
                main()
            assert end.value.code == 0, command
            continue
        launcher, arguments = command[: command.index("gradprune")], command[command.index("gradprune") + 1 :]
        assert launcher == ["torchrun", "--standalone", "--nproc_per_node", "2", "-m"]
        ended = run_ranks(workplace, 2, *arguments, *FEWER[arguments[0]])
        assert [code for code, _ in ended] == [0, 0], ended
    for name in ("streamed", "searched", "together"):
        assert (workplace / "results" / name / "model" / "model.safetensors").is_file()


def test_the_program_streams_and_scores_as_the_whole_model(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    (program,) = blocks("python")
    names: dict[str, Any] = {}
    exec(compile(program, PAGE.name, "exec"), names)
    assert residency_of(names["engine"].model) is not None
    whole, _ = load_model("results/demo/model")
    with ImportanceEngine(whole, names["engine"].method, use_gradient_checkpointing=True) as engine:
        engine.steps(names["batches"])
    found, expected = names["engine"].scores(), engine.scores()
    for kind in ("attention", "mlp"):
        for one, other in zip(getattr(found, kind), getattr(expected, kind), strict=True):
            assert torch.equal(one, other)
