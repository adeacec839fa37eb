"""Hooks of mkdocs: pages that are files of the repository elsewhere, links between them, and the order of the pages."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]

# By the page in the site: the file, and where its links lead, in the order in which they are replaced.
BENCHMARKS = (r"\((\.\./)?benchmarks/README\.md", "(benchmarks.md")
GUIDES = (r"\(\.\./docs/", "(")
RECORDS = (r"\[([^\]]*)\]\((results|introduction\.md)\)", r"`\1`")
README = [BENCHMARKS, (r"\(docs/", "("), (r"\(benchmarks/", "("), (r"\(CONTRIBUTING", "(contributing")]
PAGES = {
    "index.md": ("README.md", README),
    "benchmarks.md": ("benchmarks/README.md", [RECORDS, GUIDES]),
    "contributing.md": ("CONTRIBUTING.md", [BENCHMARKS]),
}
ORDER = [
    ("Start", "index.md"),
    ("Methods", "methods.md"),
    ("Large models", "large-models.md"),
    ("Serving", "serving.md"),
    ("Vanishing gradients", "gradient-vanishing.md"),
    ("Architectures", "architectures.md"),
    ("Options", "options.md"),
    ("API", "api.md"),
    ("Benchmarks", "benchmarks.md"),
    ("Contributing", "contributing.md"),
]


def on_config(config: Any) -> Any:
    """Set the order of the pages that there are."""
    there = {path.name for path in (ROOT / "docs").glob("*.md")} | set(PAGES)
    config.nav = [{title: page} for title, page in ORDER if page in there]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and plots from elsewhere in the repository."""
    for page, (source, links) in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        for pattern, replacement in links:
            text = re.sub(pattern, replacement, text)
        files.append(File.generated(config, page, content=text))
    for plot in sorted((ROOT / "benchmarks" / "plots").glob("*.svg")):
        files.append(File.generated(config, f"plots/{plot.name}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead the guides' links to the benchmarks into the site."""
    return re.sub(*BENCHMARKS, markdown)
