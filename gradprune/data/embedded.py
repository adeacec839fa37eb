"""The embedded text: Python's language reference and the docstrings of its standard library."""

import ast
import hashlib
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gradprune.errors import CalibrationError

_MIN_TRAIN, _MIN_HELD_OUT = 200_000, 8_000
_HELD_OUT_EVERY = 20
# Any remainder works; this one gives a good mix of held-out documents, none of which dominates.
_HELD_OUT_REMAINDER = 11
# Minimum number of characters of a telling line: lines this long rarely repeat by chance, so a shared one means copied
# text.
_TELLING_LINE = 40
# Vendored code, and modules that are mostly large tables with almost no text.
_SKIPPED_MODULES = frozenset({"encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "turtledemo"})
_SKIPPED_FOLDERS = frozenset({"test", "tests"})


@dataclass(frozen=True)
class EmbeddedText:
    """The training and held-out texts, which share no document, no passage and no line of 40 characters or more.

    train: about 19 of every 20 documents; 1.8 million characters with Python 3.11.
    held_out: the other documents, without the passages that repeat text from `train`.
    """

    train: str
    held_out: str


@dataclass(frozen=True)
class Document:
    """A named text, split into passages: paragraphs of the language reference, or docstrings."""

    name: str
    passages: tuple[str, ...]


@cache
def embedded_text() -> EmbeddedText:
    """Collect the embedded text; the result is always the same for one Python installation.

    Raises:
        CalibrationError: this installation carries too little documentation (it may have been stripped).
    """
    documents = (*_language_reference(), *_docstrings(Path(sysconfig.get_path("stdlib"))))
    text = split_documents(documents)
    if len(text.train) < _MIN_TRAIN or len(text.held_out) < _MIN_HELD_OUT:
        raise CalibrationError(
            f"dataset: this Python installation carries only {len(text.train) + len(text.held_out):,} characters of "
            f"documentation, {_MIN_TRAIN + _MIN_HELD_OUT:,} are needed; give a text with --dataset "
            "and a model with --base_model"
        )
    return text


def split_documents(documents: Iterable[Document]) -> EmbeddedText:
    """Drop repeated passages and split the documents into training and held-out text.

    Args:
        documents: the documents, in a fixed order. A document is assigned only by its name, so adding or removing
            other documents does not move it.
    """
    seen: set[str] = set()
    train: list[list[str]] = []
    held_out: list[list[str]] = []
    for document in documents:
        fresh = [passage for passage in dict.fromkeys(document.passages) if passage not in seen]
        seen.update(fresh)
        digest = int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:8], "big")
        (held_out if digest % _HELD_OUT_EVERY == _HELD_OUT_REMAINDER else train).append(fresh)
    known = {line for passages in train for passage in passages for line in _telling_lines(passage)}
    unknown = [[passage for passage in passages if known.isdisjoint(_telling_lines(passage))] for passages in held_out]
    return EmbeddedText(_join(train), _join(unknown))


def _join(documents: Iterable[list[str]]) -> str:
    return "\n\n\n".join("\n\n".join(passages) for passages in documents if passages)


def _telling_lines(passage: str) -> Iterator[str]:
    return (line for line in map(str.strip, passage.splitlines()) if len(line) >= _TELLING_LINE)


def _language_reference() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name in sorted(topics):
        paragraphs = topics[name].replace("\r\n", "\n").split("\n\n")
        yield Document(f"topic:{name}", tuple(text for text in map(_clean, paragraphs) if text))


def _docstrings(library: Path) -> Iterator[Document]:
    """Yield one document per source file of the standard library, sorted by path, without importing anything."""
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        module = relative.parts[0].removesuffix(".py")
        if module not in sys.stdlib_module_names or module in _SKIPPED_MODULES or _SKIPPED_FOLDERS & {*relative.parts}:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            # Some distributions ship sources that do not parse (templates); skip them.
            continue
        texts = (_clean(text) for node in _documented(tree) if (text := ast.get_docstring(node, clean=False)))
        yield Document(f"module:{relative.as_posix()}", tuple(text for text in texts if text))


def _documented(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the module, classes and functions in source order; skip expressions, which are most of the tree."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        for block in ("finalbody", "orelse", "handlers", "body"):
            statements = getattr(node, block, None)
            if isinstance(statements, list):
                pending.extend(reversed(statements))


def _clean(text: str) -> str:
    """Remove docstring indentation and trailing blanks, and collapse runs of empty lines into one."""
    lines = (line.rstrip() for line in inspect.cleandoc(text).splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
