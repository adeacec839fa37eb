import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

from gradprune import PruneConfig
from gradprune.checkpoint import atomic, lock, rename
from gradprune.checkpoint.atomic import atomic_directory, claimed, is_results
from gradprune.checkpoint.lock import FileLock, LockHeldError
from gradprune.checkpoint.results import claimed_results
from gradprune.checkpoint.save import save_checkpoint
from gradprune.errors import CheckpointError
from helpers.commands import Process
from helpers.tiny_models import tiny_model

# A script that writes half of a folder, reports it and waits to be killed.
KILLED = """
import sys, time
from pathlib import Path
from gradprune.checkpoint.atomic import atomic_directory
with atomic_directory(Path(sys.argv[1]), overwrite=True, argument='x') as folder:
    (folder / 'half').touch()
    print('writing', flush=True)
    time.sleep(60)
"""


def results(folder: Path, content: str = "old") -> Path:
    """Make a results folder: the record of a run, and a file with `content`."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    (folder / "content").write_text(content)
    return folder


def write(folder: Path, content: str = "new", **options) -> None:
    with atomic_directory(folder, **{"overwrite": True, "argument": "output_name", **options}) as partial:
        (partial / "run.json").write_text("{}")
        (partial / "content").write_text(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["exchange", "two renames"])
def file_system(request, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system that exchanges two folders atomically, and one that does not."""
    if request.param == "two renames":
        monkeypatch.setattr(rename, "_renameat2", lambda source, target, flag: False)
    return request.param


@contextmanager
def killed_run(folder: Path) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.wait()


def test_results_are_replaced_whole(tmp_path: Path, file_system: str) -> None:
    results(tmp_path / "x")
    (tmp_path / "x" / "gone").touch()
    write(tmp_path / "x")
    assert (tmp_path / "x" / "content").read_text() == "new"
    assert names(tmp_path) == ["x"]
    assert names(tmp_path / "x") == ["content", "run.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_interrupted_write_keeps_the_old_results(tmp_path: Path, error: type[BaseException]) -> None:
    results(tmp_path / "x")

    def fail() -> None:
        with atomic_directory(tmp_path / "x", overwrite=True, argument="x") as folder:
            (folder / "new").touch()
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x" / "content").read_text() == "old"


@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupt_between_two_renames_loses_no_results(tmp_path: Path, monkeypatch, after: int) -> None:
    results(tmp_path / "x")
    monkeypatch.setattr(rename, "_renameat2", lambda source, target, flag: False)
    original, calls = Path.rename, []

    def interrupted(self: Path, target: Path) -> Path:
        moved = original(self, target)
        calls.append(target)
        if len(calls) == after:
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "x")
    assert len(calls) >= after
    monkeypatch.undo()
    assert (tmp_path / "x" / "content").read_text() == ("old" if after == 1 else "new")
    write(tmp_path / "x", "newer")  # the next run removes what the interrupted one left
    assert names(tmp_path) == ["x"]


def test_a_run_killed_between_two_renames_is_undone_by_the_next(tmp_path: Path) -> None:
    results(tmp_path / ".x.old")
    (tmp_path / ".x.partial-1").mkdir()
    with pytest.raises(CheckpointError, match=r"'.*x' exists"):
        write(tmp_path / "x", overwrite=False)
    assert (tmp_path / "x" / "content").read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_a_folder_that_appears_during_the_run_is_left_alone(tmp_path: Path, file_system: str) -> None:
    def run(overwrite: bool) -> None:
        with claimed(tmp_path / "x", overwrite=overwrite, argument="output_name"):
            (tmp_path / "x").mkdir()
            (tmp_path / "x" / "precious").write_text("years")
            write(tmp_path / "x")

    for number, overwrite in enumerate([False, True], start=2):
        with pytest.raises(CheckpointError, match=rf"appeared during the run; the new results are in '.*x-{number}'"):
            run(overwrite)
        assert (tmp_path / "x" / "precious").read_text() == "years"
        assert (tmp_path / f"x-{number}" / "content").read_text() == "new"
        (tmp_path / "x" / "precious").unlink()
        (tmp_path / "x").rmdir()
    assert names(tmp_path) == ["x-2", "x-3"]


def test_an_empty_folder_that_appears_during_the_run_is_not_replaced(tmp_path: Path, file_system: str) -> None:
    def run() -> None:
        with claimed(tmp_path / "x", overwrite=False, argument="output_name"):
            (tmp_path / "x").mkdir()
            write(tmp_path / "x")

    with pytest.raises(CheckpointError, match="appeared during the run"):
        run()
    assert names(tmp_path / "x") == []


def test_a_second_run_of_the_same_name_is_refused(tmp_path: Path) -> None:
    with killed_run(tmp_path / "x") as first, pytest.raises(CheckpointError) as error:
        write(tmp_path / "x")
    assert "is being written by another run" in str(error.value)
    assert f"process {first.pid} on " in str(error.value)


def test_a_claim_is_shared_within_its_body_but_not_with_another_thread(tmp_path: Path) -> None:
    refused = []

    def other() -> None:
        try:
            write(tmp_path / "x")
        except CheckpointError as error:
            refused.append(error)

    with claimed(tmp_path / "x", overwrite=True, argument="output_name"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        write(tmp_path / "x")
    assert len(refused) == 1
    assert names(tmp_path) == ["x"]


def test_the_next_run_takes_over_from_a_killed_one_and_says_so(tmp_path: Path, caplog) -> None:
    results(tmp_path / "x")
    with killed_run(tmp_path / "x") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(names(tmp_path)) == 3  # the results, the lock and the half-written folder
    assert (tmp_path / "x" / "content").read_text() == "old"
    with caplog.at_level(logging.WARNING):
        write(tmp_path / "x")
    assert f"process {process.pid} on " in caplog.text
    assert "was killed; its unfinished files have been removed" in caplog.text
    assert names(tmp_path) == ["x"]
    caplog.clear()
    write(tmp_path / "x")
    assert not caplog.text


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `flock` fail as it does on a file system without locks."""

    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)


def test_on_a_file_system_without_locks_the_recorded_owner_decides(tmp_path: Path, monkeypatch) -> None:
    without_locks(monkeypatch)
    held = FileLock(tmp_path / "lock")
    with pytest.raises(LockHeldError, match=f"process {os.getpid()} on "):
        FileLock(tmp_path / "lock")
    record = json.loads((tmp_path / "lock").read_text())
    held.release()
    (tmp_path / "lock").write_text(json.dumps({**record, "host": "elsewhere", "pid": 1}))
    with pytest.raises(LockHeldError, match="process 1 on elsewhere"):
        FileLock(tmp_path / "lock")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / "lock").write_text(json.dumps({**record, "pid": ended.pid}))
    taken = FileLock(tmp_path / "lock")
    assert taken.abandoned is not None
    assert taken.abandoned.pid == ended.pid
    taken.release()
    assert names(tmp_path) == []


def test_a_lock_that_was_released_and_taken_meanwhile_is_left_alone(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "lock"
    path.write_text("the next owner's")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", Mock(side_effect=FileNotFoundError))
        assert lock._remove_abandoned(path) is None
    assert path.read_text() == "the next owner's"


@pytest.mark.parametrize("locks", [True, False])
def test_only_one_of_many_processes_holds_the_lock(tmp_path: Path, monkeypatch, locks: bool) -> None:
    if not locks:
        without_locks(monkeypatch)

    def take_turns() -> None:
        turns = 0
        while turns < 20:
            try:
                held = FileLock(tmp_path / "lock")
            except LockHeldError:
                time.sleep(0.0005)
                continue
            os.close(os.open(tmp_path / "inside", os.O_CREAT | os.O_EXCL))
            (tmp_path / "inside").unlink()
            held.release()
            turns += 1

    def started() -> Process:
        child = os.fork()
        if child:
            return Process(child, os.open(os.devnull, os.O_RDONLY))
        try:
            take_turns()
            os._exit(0)
        finally:
            os._exit(1)

    children = [started() for _ in range(4)]
    codes = [child.wait()[0] for child in children]
    assert codes == [0] * 4
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"pid": 1}', b"\xff"])
def test_a_damaged_lock_file_is_taken_over(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".x.lock").write_bytes(content)
    write(tmp_path / "x")
    assert names(tmp_path) == ["x"]


def test_only_a_results_folder_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "precious").write_text("years")
    with pytest.raises(CheckpointError, match="was not written by a run of gradprune, and is never overwritten"):
        write(tmp_path / "x")
    assert names(tmp_path / "x") == ["precious"]
    results(tmp_path / "several" / "0.1")
    write(tmp_path / "several")
    assert names(tmp_path / "several") == ["content", "run.json"]


@pytest.mark.parametrize("how", ["the folder", "in it", "a link to it", "a file linked from it"])
def test_what_the_run_reads_is_never_overwritten(tmp_path: Path, how: str) -> None:
    results(tmp_path / "x")
    (tmp_path / "x" / "model").mkdir()
    (tmp_path / "x" / "model" / "weights").touch()
    (tmp_path / "link").symlink_to(tmp_path / "x" / "model")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "weights").symlink_to(tmp_path / "x" / "model" / "weights")
    read = {
        "the folder": tmp_path / "x",
        "in it": tmp_path / "x" / "model",
        "a link to it": tmp_path / "link",
        "a file linked from it": tmp_path / "linked",
    }[how]
    with (
        pytest.raises(CheckpointError, match=r"'.*x' holds the base_model '.*' that this run reads"),
        claimed(tmp_path / "x", overwrite=True, argument="output_name", reads={"base_model": str(read)}),
    ):
        pass
    with claimed(tmp_path / "y", overwrite=True, argument="output_name", reads={"base_model": str(read)}):
        pass
    assert names(tmp_path / "x") == ["content", "model", "run.json"]


@pytest.mark.parametrize("value", ["{x}/quiz.jsonl", "sciq,{x}/quiz.jsonl", "a.txt:0.7,{x}/quiz.jsonl:0.3"])
def test_none_of_several_files_that_the_run_reads_is_overwritten(tmp_path: Path, value: str) -> None:
    results(tmp_path / "x")
    (tmp_path / "x" / "quiz.jsonl").touch()
    reads = {"tasks": value.format(x=tmp_path / "x")}
    with (
        pytest.raises(CheckpointError, match=r"holds the tasks '[^,:]*/x/quiz.jsonl' that this run reads"),
        claimed(tmp_path / "x", overwrite=True, argument="output_name", reads=reads),
    ):
        pass


def claim_error(tmp_path: Path, folder: Path) -> str:
    """Return the one-line error with which claiming `folder` fails."""
    with (
        pytest.raises(CheckpointError, match=r"^output_name: ") as error,
        claimed(folder, overwrite=True, argument="output_name"),
    ):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_place_that_cannot_be_written_is_reported_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert "'" + str(tmp_path / "file") + "'" in claim_error(tmp_path, tmp_path / "file" / "x")
    assert "Not a directory" in claim_error(tmp_path, tmp_path / "file" / "below" / "x")
    assert "is a file" in claim_error(tmp_path, tmp_path / "file")
    assert "is a symbolic link" in claim_error(tmp_path, tmp_path / "dangling")
    assert "File name too long" in claim_error(tmp_path, tmp_path / ("n" * 240))
    assert "File name too long" in claim_error(tmp_path, tmp_path / ("n" * 300))
    assert "cannot be made" in claim_error(tmp_path, Path("/proc/x/y"))
    assert "cannot be written" in claim_error(tmp_path, Path("/proc/y"))
    assert names(tmp_path) == ["dangling", "file"]


def test_a_failed_copy_names_the_file_that_is_written(tmp_path: Path) -> None:
    """The operating system's error names two files, and first the one that is read."""
    with (
        pytest.raises(CheckpointError, match=r"^output_name: 'written' cannot be written: File too large$"),
        atomic_directory(tmp_path / "x", overwrite=False, argument="output_name"),
    ):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), "read", None, "written")


def test_too_little_disk_space_is_reported_before_the_run(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"needs about 1,000,000,000,000,000 bytes, but its file system has"),
        claimed(tmp_path / "a" / "x", overwrite=False, argument="output_name", free_bytes=10**15),
    ):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize(("dtype", "bytes_"), [("auto", 4_000), ("bfloat16", 2_000), ("float64", 8_000)])
def test_the_disk_space_needed_follows_the_dtype(tmp_path: Path, monkeypatch, dtype: str, bytes_: int) -> None:
    (tmp_path / "model").mkdir()
    save_file({"w": torch.zeros(1000)}, tmp_path / "model" / "model.safetensors")
    config = PruneConfig(
        base_model=str(tmp_path / "model"), output_dir=str(tmp_path), output_name="x", dtype=dtype, pruning_ratio=0.5
    )
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _folder: SimpleNamespace(free=0))
    with pytest.raises(CheckpointError, match=r"needs about .* bytes") as error, claimed_results(config):
        pass
    stated = int(re.search(r"about ([0-9,]+)", str(error.value))[1].replace(",", ""))
    assert bytes_ / 2 <= stated <= bytes_ / 2 + 100  # with "auto" the size of the file counts, with its header


def test_a_failed_run_leaves_no_empty_folders(tmp_path: Path) -> None:
    def fail() -> None:
        with claimed(tmp_path / "a" / "b" / "x", overwrite=False, argument="output_name"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names(tmp_path) == []
    write(tmp_path / "a" / "b" / "x")
    assert names(tmp_path / "a" / "b") == ["x"]


def test_a_system_error_becomes_one_line_that_names_the_path(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"^output_name: '.*/content' cannot be written: No such file"),
        atomic_directory(tmp_path / "x", overwrite=False, argument="output_name") as folder,
    ):
        (folder / "gone" / "content").write_text("")
    assert names(tmp_path) == []


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save_checkpoint(tiny_model(dtype=torch.float32), None, tmp_path / "x")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o777 & ~umask
    for path in (tmp_path / "x").iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path.name


def test_a_results_folder_is_recognised_by_its_record(tmp_path: Path) -> None:
    assert is_results(results(tmp_path / "x"))
    assert is_results(tmp_path)
    assert not is_results(tmp_path.parent / "nowhere")
