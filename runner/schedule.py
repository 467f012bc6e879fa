"""Learning-rate schedules: pure functions of the step, so there is nothing to save and nothing to drift."""

from __future__ import annotations

import math
from dataclasses import dataclass

from runner.errors import at_least, within

__all__ = ["Constant", "Cosine", "Linear"]


@dataclass(frozen=True)
class Constant:
    """The optimiser's own learning rate, after a linear warm-up over the first `warmup` steps."""

    warmup: int = 0

    def __post_init__(self) -> None:
        at_least(0, warmup=self.warmup)

    def __call__(self, step: int, steps: int) -> float:
        """Return the factor on the learning rate at `step`, counted from 0, of a run of `steps`."""
        return min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0


@dataclass(frozen=True)
class _Decay(Constant):
    """A warm-up, then a decay to the factor `final`."""

    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        within(0, 1, closed=True, final=self.final)


class Cosine(_Decay):
    """Half a cosine from 1 to `final` over the run (Loshchilov & Hutter 2017, eq. 5), after a linear warm-up."""

    def __call__(self, step: int, steps: int) -> float:
        cosine = self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * step / steps))
        return cosine * super().__call__(step, steps)


class Linear(_Decay):
    """A straight line from 1 to `final` over the run, after a linear warm-up."""

    def __call__(self, step: int, steps: int) -> float:
        line = self.final + (1 - self.final) * (1 - step / steps)
        return line * super().__call__(step, steps)
