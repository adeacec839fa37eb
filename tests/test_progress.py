import io
import logging

import pytest
from rich.console import Console

from gradprune import progress as progress_module
from gradprune.progress import Clock, progress, say


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A list whose only element is the current time; the test sets it."""
    time = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: time[0])
    return time


def test_without_a_terminal_there_is_a_line_every_half_minute(now: list[float]) -> None:
    console = Console(file=io.StringIO())
    with progress(console, "Calibrating", 4000, "samples") as advance:
        for second in range(1, 100):
            now[0] = float(second)
            advance(10)
    assert written(console).splitlines() == [
        "Calibrating: 300 of 4,000 samples, 10.0 samples/s, 6:10 left",
        "Calibrating: 600 of 4,000 samples, 10.0 samples/s, 5:40 left",
        "Calibrating: 900 of 4,000 samples, 10.0 samples/s, 5:10 left",
    ]


def test_more_than_an_hour_is_shown_in_hours(now: list[float]) -> None:
    console = Console(file=io.StringIO())
    with progress(console, "Searching", 101, "trials") as advance:
        now[0] = 100.0
        advance()
    assert written(console) == "Searching: 1 of 101 trials, 0.01 trials/s, 2:46:40 left\n"


def test_steps_of_an_earlier_process_are_counted_but_not_in_the_rate(now: list[float]) -> None:
    console, terminal = Console(file=io.StringIO()), Console(file=io.StringIO(), force_terminal=True, width=100)
    for each in (console, terminal):
        now[0] = 0.0
        with progress(each, "Recovering", 500, "steps", done=400) as advance:
            for second in range(1, 41):
                now[0] = float(second)
                advance()
    assert written(console) == "Recovering: 430 of 500 steps, 1.0 steps/s, 1:10 left\n"
    assert "440/500" in written(terminal)


@pytest.mark.parametrize("console", [Console(file=io.StringIO(), quiet=True), progress_module.QUIET])
def test_a_quiet_console_shows_nothing(console: Console, now: list[float], capsys) -> None:
    with Clock(console).stage("calibration"), progress(console, "Calibrating", 2, "samples") as advance:
        now[0] = 100.0
        advance()
    assert capsys.readouterr() == ("", "")


def test_stages_are_named_if_there_is_no_terminal() -> None:
    file, terminal = Console(file=io.StringIO()), Console(file=io.StringIO(), force_terminal=True)
    for console in (file, terminal):
        clock = Clock(console)
        with clock.stage("perplexity_before"):
            pass
        assert list(clock.seconds) == ["perplexity_before"]
    assert written(file) == "Perplexity before ...\n"
    assert written(terminal) == ""


def test_how_long_a_stage_took_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="gradprune"), Clock().stage("surgery"):
        pass
    assert caplog.messages[0].startswith("Surgery took 0.0")


@pytest.mark.parametrize("text", ["a[/b]", "[bold red]x", "a:bomb:b", "da[ta]/c.txt 1.5 'x'", "x" * 300])
def test_lines_are_printed_as_they_are(text: str) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    say(console, text)
    assert written(console) == text + "\n"
