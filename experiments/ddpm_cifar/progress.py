"""What takes long is announced with its time, has a bar with what is left of it, and ends where the user asks."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

from runner.task import Interrupted, Run

log = logging.getLogger("runner")

PATIENCE = 10.0  # seconds; what takes longer is announced


class Waiting:
    """Bars and announcements of one run; nothing is said twice."""

    def __init__(self, run: Run):
        self.run = run
        self.said: set[str] = set()

    def say_once(self, text: str) -> None:
        """A line for the user, the first time that it is true."""
        if text not in self.said:
            self.said.add(text)
            log.info(text)

    def announce(self, what: str, seconds: float) -> None:
        """How long something will take, where that is long and was not said before."""
        if seconds >= PATIENCE and what not in self.said:
            self.said.add(what)
            log.info(f"{what}: about {duration(seconds)}")

    @contextlib.contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar with the time that is left, where there is a terminal, and what moves it.

        The second part to be done tells how long all will take, and that is announced: the first also chooses
        kernels and fills caches.

        Raises:
            Interrupted: the user asked to stop meanwhile.
        """
        ends: list[float] = []  # of the first two parts
        with tqdm(total=total, desc=what, disable=None, leave=False, dynamic_ncols=True) as bar:

            def count(more: int) -> None:
                if self.run.stop_requested:
                    raise Interrupted
                if len(ends) < 2:
                    self.run.compute.synchronize()
                    ends.append(time.perf_counter())
                    if len(ends) == 2:
                        self.announce(what, (ends[1] - ends[0]) / more * total)
                bar.update(more)

            yield count


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
