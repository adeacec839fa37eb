"""The commands and the code of docs/large-models.md, run as they are printed."""

import os
import re
import sys
from pathlib import Path

from helpers.programs import run_program

PAGE = Path(__file__).resolve().parents[1] / "docs" / "large-models.md"


def test_every_block_runs_in_order(tmp_path: Path) -> None:
    blocks = re.findall(r"```(sh|python)\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert [language for language, _ in blocks] == ["sh", "python", "sh"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for language, block in blocks:
        command = ["bash", "-euc", block] if language == "sh" else [sys.executable, "-c", block]
        environment = {"PATH": path}
        done = run_program(command, cwd=tmp_path, environment=environment)
        assert done.returncode == 0, f"{block}\n{done.stderr}"
    for name in ("streamed", "searched", "together"):
        assert (tmp_path / "results" / name / "model" / "model.safetensors").is_file()
