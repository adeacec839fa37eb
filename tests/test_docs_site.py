"""The documentation's site builds, and none of its links is broken."""

import sys
from pathlib import Path

import pytest

from helpers.programs import run_program

ROOT = Path(__file__).resolve().parents[1]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason="the docs extra is not installed (pip install 'gradprune[docs]')")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = run_program(command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    pages = {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
    assert pages >= {"api", "benchmarks", "gradient-vanishing", "methods", "options", "serving"}
    assert "ImportanceEngine" in (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert (tmp_path / "site" / "plots" / "perplexity-against-size.svg").is_file()
    assert "gradprune prune" in (tmp_path / "site" / "index.html").read_text(encoding="utf-8")


def test_the_order_of_pages_lists_every_page() -> None:
    hooks = (ROOT / "docs" / "hooks.py").read_text(encoding="utf-8")
    missing = [path.name for path in (ROOT / "docs").glob("*.md") if f'"{path.name}"' not in hooks]
    assert not missing
