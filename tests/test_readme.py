"""Every command and program that the README shows is run, as it is printed."""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest

from gradprune.cli import main
from gradprune.demo import demo_model_path, embedded_text

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("gradprune ")]


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
    assert len(commands()) == 5
    for arguments in commands():
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as exit_info, contextlib.redirect_stdout(io.StringIO()):
            main()
        assert exit_info.value.code == 0, arguments
    assert (workplace / "results" / "test" / "model" / "model.safetensors").is_file()
    assert (workplace / "results" / "mine" / "report.html").is_file()


def test_every_program_runs_as_printed(workplace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    if not (workplace / "results" / "test").exists():
        pytest.skip("needs the model that the README's commands make")
    assert len(blocks("python")) == 3
    for program in blocks("python"):
        exec(compile(program, "README.md", "exec"), {})


def test_every_file_the_readme_names_exists() -> None:
    root = Path(__file__).resolve().parents[1]
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (root / target).exists(), target
