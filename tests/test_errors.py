"""Other libraries' error messages are shortened to one line."""

import pytest

from gradprune.errors import one_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines."), "two lines"),
        (KeyError("name"), "KeyError 'name'"),
        (ValueError(), "ValueError"),
        (ValueError("word " * 100), " ".join(["word"] * 40) + " ..."),
        (FileNotFoundError(2, "No such file", "x"), "No such file"),
        (OSError("a library's own words"), "a library's own words"),
        (ValueError("x" * 300), "x" * 200 + " ..."),
    ],
)
def test_one_line(error: Exception, line: str) -> None:
    assert one_line(error) == line
