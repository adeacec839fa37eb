"""Progress on standard error, one line a step, so that a run can be followed; and the time that a run may take."""

import sys
import time

_START = time.monotonic()


def say(text: str) -> None:
    """Print a line with the seconds since the process began to measure."""
    print(f"[{time.monotonic() - _START:6.1f} s] {text}", file=sys.stderr, flush=True)


class Deadline:
    """When a benchmark must be done."""

    def __init__(self, seconds: float | None) -> None:
        """`seconds` from now; None is never."""
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left; infinite without a deadline."""
        return float("inf") if self._end is None else self._end - time.monotonic()

    def allows(self, seconds: float) -> bool:
        """Whether work that takes about so long can still begin."""
        return self.left >= seconds
