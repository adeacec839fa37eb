"""Progress lines on standard error, and the time limit of a run."""

import sys
import time

_START = time.monotonic()


def say(text: str) -> None:
    """Print a line, prefixed with the seconds since this module was imported."""
    print(f"[{time.monotonic() - _START:6.1f} s] {text}", file=sys.stderr, flush=True)


class Deadline:
    """The time by which a benchmark has to finish."""

    def __init__(self, seconds: float | None) -> None:
        """Set the deadline to `seconds` from now; None means no limit."""
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left; infinite without a deadline."""
        return float("inf") if self._end is None else self._end - time.monotonic()

    def allows(self, seconds: float) -> bool:
        """Whether work that takes about `seconds` can still finish in time."""
        return self.left >= seconds
