"""A file appears whole or not at all, with the permissions that the umask allows."""

import os
from pathlib import Path

import pytest

from gradprune.checkpoint.atomic_file import atomic_file


def test_a_body_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("before")
    with pytest.raises(FileNotFoundError), atomic_file(path, ".x.new") as new:
        new.with_name("other").rename(new)
    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["x"]


def test_the_leftover_of_a_killed_process_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".x.new").write_text("left behind")
    with atomic_file(tmp_path / "x", ".x.new") as new:
        assert new.read_text() == ""
        new.write_text("whole")
    assert [each.name for each in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "whole"


@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_permissions_follow_the_umask_whatever_the_body_sets(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with atomic_file(tmp_path / "x", ".x.new") as new:
            new.chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~umask


def test_an_error_names_the_file_rather_than_the_temporary_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error, atomic_file(tmp_path / "gone" / "x", ".x.new"):
        pass
    assert error.value.filename == str(tmp_path / "gone" / "x")
