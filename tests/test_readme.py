"""The commands and programs in the README and the guide run as printed; the figures are those of the records."""

import contextlib
import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from benchmarks.results import FOLDER, latest, read
from benchmarks.summary import SECTIONS
from gradprune.cli import main
from gradprune.data.embedded import embedded_text
from gradprune.demo import demo_model_path

ROOT = Path(__file__).resolve().parents[1]
README, GUIDE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/gradient-vanishing.md"))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(text: str) -> list[list[str]]:
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("gradprune ")]


def quick_options(command: str) -> list[str]:
    """The options that make a printed command quick, such as fewer samples."""
    few = {"eval": ["--eval_samples", "8"], "diagnose": ["--num_samples", "8"], "info": []}
    pruning = ["--num_samples", "16", "--eval_samples", "8", "--held_out_samples", "4"]
    return few.get(command, pruning + (["--search_minutes", "0.05"] if command == "search" else []))


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as exit_info, contextlib.redirect_stdout(io.StringIO()):
        main()
    assert exit_info.value.code == 0, arguments


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the README's commands name."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "path" / "or").mkdir(parents=True)
    (folder / "path" / "or" / "hub-id").symlink_to(demo_model_path())
    (folder / "calibration.txt").write_text(embedded_text().train[:200_000], encoding="utf-8")
    (folder / "held_out.txt").write_text(embedded_text().held_out[:20_000], encoding="utf-8")
    return folder


def test_every_command_runs_as_printed(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    assert len(commands(README)) == 6
    for arguments in commands(README):
        run(arguments + quick_options(arguments[1]), monkeypatch)
    assert (workplace / "results" / "test" / "model" / "model.safetensors").is_file()
    assert (workplace / "results" / "mine" / "report.html").is_file()


def test_every_program_runs_as_printed(workplace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    if not (workplace / "results" / "test").exists():
        pytest.skip("needs the model that the README's commands make")
    assert len(blocks(README, "python")) == 2
    for program in blocks(README, "python"):
        exec(compile(program, "README.md", "exec"), {})


def test_the_guide_runs_as_printed(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = workplace / "guide"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert len(commands(GUIDE)) == 8
    for arguments in commands(GUIDE):
        run(arguments + quick_options(arguments[1]), monkeypatch)
    found = [
        json.loads((folder / "results" / name / "analysis" / "gradients.json").read_text())["ratio"]
        for name in ("test", "test_fixed")
    ]
    assert found[0]["before"] == found[0]["after"] == found[1]["before"]
    assert found[1]["after"] < found[1]["before"]
    for program in blocks(GUIDE, "python"):
        exec(compile(program, "gradient-vanishing.md", "exec"), {})
    assert (folder / "gradient_analysis" / "layer_variance.png").is_file()


def test_the_readme_is_short_and_shows_nothing_that_cannot_be_rebuilt() -> None:
    assert len(README.splitlines()) <= 150
    assert "stories" not in README


@pytest.mark.parametrize("name", SECTIONS)
def test_the_figures_equal_the_recorded_results(name: str) -> None:
    """If they are not, `python -m benchmarks.report` renews them."""
    text, records = (ROOT / name).read_text(encoding="utf-8"), latest(read(FOLDER))
    for section, made in SECTIONS[name].items():
        assert f"<!-- results: {section} -->\n{made(records)}\n<!-- end -->" in text, section


def test_the_map_of_the_package_shows_every_folder() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for folder in (ROOT / "gradprune").iterdir():
        if (folder / "__init__.py").exists():
            assert f"`{folder.name}/`" in text, folder.name


def test_every_file_the_readme_names_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
