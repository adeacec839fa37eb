"""Imports go one way: a part of the package imports only from the parts before it in `ORDER`."""

import ast
from pathlib import Path

import gradprune

PACKAGE = Path(gradprune.__file__).parent

# The parts, from those that everything uses to the command line: the folders and files directly under `gradprune/`.
ORDER = (
    "version",
    "errors",
    "accumulation",
    "hub",
    "interrupts",
    "progress",
    "ranks",
    "config",
    "memory",
    "models",
    "data",
    "evaluation",
    "checkpoint",
    "plan",
    "run",
    "ops",
    "vanishing",
    "calibration",
    "scoring",
    "surgery",
    "search",
    "target",
    "shots",
    "demo",
    "result",
    "environment",
    "export",
    "report",
    "recovery",
    "pipeline",
    "cli",
    "__main__",
)
# The built extension and the Triton kernels, which import nothing from the package.
LEAVES = ("_C", "kernels")


def imports_of(file: Path) -> set[str]:
    """The parts that a file imports from, at the top or in its functions."""
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gradprune":
            names += [node.module] if "." in node.module else [f"gradprune.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name.startswith("gradprune.")]
    return {name.split(".")[1] for name in names}


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def test_every_part_imports_from_parts_before_it() -> None:
    files = [file for file in PACKAGE.rglob("*.py") if part_of(file) not in ("__init__", *LEAVES)]
    assert {part_of(file) for file in files} == set(ORDER)
    against = [
        f"{file.relative_to(PACKAGE)} imports {part}"
        for file in files
        for part in imports_of(file) - set(LEAVES)
        if part != part_of(file) and ORDER.index(part) > ORDER.index(part_of(file))
    ]
    assert not against


def test_kernels_import_nothing_from_the_package() -> None:
    kernels = list((PACKAGE.parent / "kernels").rglob("*.py"))
    assert kernels
    assert all(imports_of(file) <= {"kernels"} for file in kernels)
