"""The commands and the program of docs/serving.md run as they are printed."""

import os
import re
import sys
from pathlib import Path

import pytest

from helpers.programs import run_program

PAGE = Path(__file__).resolve().parents[1] / "docs" / "serving.md"


def test_every_block_runs_in_order(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the gguf library is not installed (pip install gguf)")
    blocks = re.findall(r"```(sh|python)\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert [language for language, _ in blocks] == ["sh", "python", "sh", "sh", "sh"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {"PATH": path, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    for language, block in blocks:
        command = ["bash", "-euc", block] if language == "sh" else [sys.executable, "-c", block]
        done = run_program(command, cwd=tmp_path, environment=environment)
        assert done.returncode == 0, f"{block}\n{done.stderr}"
    assert (tmp_path / "small.gguf").read_bytes()[:4] == b"GGUF"
    assert (tmp_path / "results" / "better" / "model" / "config.json").is_file()
