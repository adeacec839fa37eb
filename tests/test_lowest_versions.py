"""The constraints for testing with the lowest versions are exactly the lowest versions that the package declares."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_tested_lowest_versions_equal_the_declared_ones() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    runtime = project.partition("\ndependencies = [")[2].partition("\ndocs = ")[0]
    declared = dict(re.findall(r'"([\w-]+)>=([\d.]+)', runtime))
    constraints = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8")
    assert "torch" in declared
    assert dict(re.findall(r"^([\w-]+)==(.+)$", constraints, re.MULTILINE)) == declared
