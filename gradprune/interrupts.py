"""Signals that end a command: they raise an exception, so that it cleans up as after an error."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Sent by Ctrl-C, by `kill` and batch systems, and by a terminal that is closed.
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal is ending the command. Not a KeyboardInterrupt, which libraries catch and convert to other errors."""

    def __init__(self, number: int) -> None:
        """number: the signal's number."""
        super().__init__(number)
        self.name = signal.Signals(number).name
        self.exit_code = 128 + number
        # What the user can do next; appended to the message.
        self.advice = ""


@contextmanager
def interruptible() -> Iterator[None]:
    """While active, SIGINT, SIGTERM and SIGHUP raise `Interrupted`; while it is being handled, they are ignored.

    If a library swallows the exception or converts it to another error, it is raised again when the body ends, or when
    the next signal arrives. A signal that is already ignored on entry, as SIGHUP is under `nohup`, stays ignored.
    """
    handlers = {number: signal.getsignal(number) for number in _ENDING}
    raised: list[Interrupted] = []
    handled = [number for number, handler in handlers.items() if handler != signal.SIG_IGN]

    def interrupt(number: int, _frame: FrameType | None) -> None:
        if not (raised and _is_handled(raised[-1])):
            raised.append(Interrupted(number))
            raise raised[-1]

    for number in handled:
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
        for number in handled:
            signal.signal(number, handlers[number])


def _is_handled(error: BaseException) -> bool:
    """Whether `error`, or an error that it was converted to, is being handled where this function is called."""
    handled = sys.exc_info()[1]
    while handled is not None and handled is not error:
        handled = handled.__context__
    return handled is error
