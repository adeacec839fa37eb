"""Signals that end a command: it unwinds as after an error, so that nothing half-written remains."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Ctrl-C, `kill` and batch systems, and a terminal that is closed.
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """One of these signals came. Not a KeyboardInterrupt, which libraries catch and convert to other errors."""

    def __init__(self, number: int) -> None:
        """number: the signal's."""
        super().__init__(number)
        self.name = signal.Signals(number).name
        self.exit_code = 128 + number
        # What can be done next, to follow the message.
        self.advice = ""


@contextmanager
def interruptible() -> Iterator[None]:
    """The first of SIGINT, SIGTERM and SIGHUP raises `Interrupted`; those after it cannot disturb the unwinding.

    Where a library converts it to another error, it is raised again at the end.
    A signal that is ignored when this begins, as SIGHUP is under `nohup`, stays so.
    """
    handlers = {number: signal.getsignal(number) for number in _ENDING}
    raised: list[Interrupted] = []
    heard = [number for number, handler in handlers.items() if handler != signal.SIG_IGN]

    def interrupt(number: int, _frame: FrameType | None) -> None:
        for other in heard:
            signal.signal(other, signal.SIG_IGN)
        raised.append(Interrupted(number))
        raise raised[0]

    for number in heard:
        signal.signal(number, interrupt)
    try:
        yield
    except Exception as error:
        if raised:
            raise raised[0] from error
        raise
    finally:
        for number in heard:
            signal.signal(number, handlers[number])
