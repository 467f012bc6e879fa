"""Learning-rate schedules: pure functions of the step, so there is nothing to save and nothing to drift."""

from __future__ import annotations

import math
from dataclasses import dataclass

from runner.errors import at_least

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
class Cosine:
    """Half a cosine from 1 to `final` over the run (Loshchilov & Hutter 2017, eq. 5), after a linear warm-up."""

    warmup: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        at_least(0, warmup=self.warmup)
        if not 0 <= self.final <= 1:
            raise ValueError(f"final must lie in [0, 1], got {self.final}")

    def __call__(self, step: int, steps: int) -> float:
        """Return the factor on the learning rate at `step`, counted from 0, of a run of `steps`."""
        cosine = self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * step / steps))
        return cosine * Constant(self.warmup)(step, steps)


@dataclass(frozen=True)
class Linear:
    """A straight line from 1 to `final` over the run, after a linear warm-up."""

    warmup: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        Cosine(self.warmup, self.final)  # the same arguments, the same limits

    def __call__(self, step: int, steps: int) -> float:
        """Return the factor on the learning rate at `step`, counted from 0, of a run of `steps`."""
        line = self.final + (1 - self.final) * (1 - step / steps)
        return line * Constant(self.warmup)(step, steps)
