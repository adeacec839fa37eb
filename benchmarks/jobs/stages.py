"""Hooks around the stages of a pruning run, to measure the stages from outside."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gradprune.progress import Clock


@contextmanager
def stages_watched(enter: Callable[[str], object], leave: Callable[[str], object]) -> Iterator[None]:
    """While active, `enter` is called before every stage of a run, and `leave` at its end, within the stage's time."""
    stage: Callable[..., Any] = Clock.stage

    @contextmanager
    def watched(self: Clock, name: str) -> Iterator[None]:
        enter(name)
        with stage(self, name):
            yield
            leave(name)

    Clock.stage = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        Clock.stage = stage  # type: ignore[method-assign]
