"""Progress of what takes long: its duration in the log, a bar with the time left, an end where the user asks.

Letters in shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from tqdm import tqdm

from runner.errors import memory_for
from runner.task import Interrupted, Run

_log = logging.getLogger("runner")

_ANNOUNCE_AFTER = 10.0  # seconds
_TIMED_IMAGES = 16  # images that a CPU's pace is measured on; an accelerator's is not that of a part


class Timing:
    """Bars and announcements of one run, and how long its `network` takes; no line is logged twice.

    `shape` is the (C, H, W) of the network's images.
    """

    def __init__(self, run: Run, network: nn.Module, shape: tuple[int, int, int]):
        self._run, self._network, self._shape = run, network, shape
        self._logged: set[str] = set()
        self._paces: dict[tuple[int, bool], float] = {}  # seconds by batch and precision

    def log_once(self, text: str) -> None:
        """Log a line the first time that it is given."""
        if text not in self._logged:
            self._logged.add(text)
            _log.info(text)

    def announce(self, label: str, seconds: float) -> None:
        """Log how long something will take, where that is long and was not logged before."""
        if seconds >= _ANNOUNCE_AFTER and label not in self._logged:
            self._logged.add(label)
            _log.info(f"{label}: about {_duration(seconds)}")

    @contextlib.contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a bar with the time left, where there is a terminal; yield what advances it.

        The second part tells how long the whole will take: the first also chooses kernels and fills caches.

        Raises:
            Interrupted: the user asked to stop meanwhile.
        """
        ends: list[float] = []  # of the first two parts

        # announced after the second part
        with tqdm(total=total, desc=label, disable=None, leave=False, dynamic_ncols=True) as bar:

            def advance(count: int) -> None:
                if self._run.stop_requested:
                    raise Interrupted
                if len(ends) < 2:
                    self._run.compute.synchronize()
                    ends.append(time.perf_counter())
                    if len(ends) == 2:
                        self.announce(label, (ends[1] - ends[0]) / count * total)
                bar.update(count)

            yield advance

    @contextlib.contextmanager
    def network_calls(
        self, label: str, calls: int, batch: int, argument: str = "task.sample_batch"
    ) -> Iterator[Callable[..., None]]:
        """Show a bar of calls of the network on batches whose size `argument` sets; yield the tick of one.

        Raises:
            Interrupted: the user asked to stop meanwhile.
            UserError: a batch of that size does not fit into memory.
        """
        with memory_for(argument, batch):
            self.announce(label, calls * self.pace(batch))
            with self.bar(label, calls) as advance:
                yield lambda *_: advance(1)

    def pace(self, batch: int) -> float:
        """Return the seconds of one call of the network, on `batch` images and in the present precision."""
        device = self._run.device
        B = min(batch, _TIMED_IMAGES) if device.type == "cpu" else batch
        key = (B, torch.is_autocast_enabled(device.type))

        # measured once
        if key not in self._paces:
            x = torch.zeros(B, *self._shape, device=device)
            t = torch.zeros(B, dtype=torch.int64, device=device)
            with torch.no_grad():
                self._network(x, t)  # a first call also chooses kernels
                self._run.compute.synchronize()
                start = time.perf_counter()
                self._network(x, t)
                self._run.compute.synchronize()
            self._paces[key] = time.perf_counter() - start

        return self._paces[key] * batch / B


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
