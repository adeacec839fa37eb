"""Signals that end a command: it unwinds as after an error, so that nothing half-written remains."""

import signal
import sys
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
    """Each of SIGINT, SIGTERM and SIGHUP raises `Interrupted`; while one unwinds, others cannot disturb it.

    Where a library swallows it or converts it to another error, it is raised again at the end, or by the next signal.
    A signal that is ignored when this begins, as SIGHUP is under `nohup`, stays so.
    """
    handlers = {number: signal.getsignal(number) for number in _ENDING}
    raised: list[Interrupted] = []
    heard = [number for number, handler in handlers.items() if handler != signal.SIG_IGN]

    def interrupt(number: int, _frame: FrameType | None) -> None:
        if not (raised and _unwinds(raised[-1])):
            raised.append(Interrupted(number))
            raise raised[-1]

    for number in heard:
        signal.signal(number, interrupt)
    try:
        yield
        if raised:
            raise raised[-1]
    except Exception as error:
        if raised:
            raise raised[-1] from error
        raise
    finally:
        for number in heard:
            signal.signal(number, handlers[number])


def _unwinds(error: BaseException) -> bool:
    """Whether it, or an error that it was converted to, is being handled where this is called."""
    handled = sys.exc_info()[1]
    while handled is not None and handled is not error:
        handled = handled.__context__
    return handled is error
