"""Random streams: every draw is a function of the run's seed and of what it is for.

No stream carries state from one use to the next: evaluation and figures never change the run, and a resume has
no random state to restore.
"""

from __future__ import annotations

import hashlib
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["BatchRandom", "generator", "reseed", "seed_of"]


def seed_of(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose, such as `seed_of(0, "batch", 17)`; unequal purposes are independent."""
    text = repr((seed, *purpose)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new generator for one purpose."""
    return torch.Generator(device).manual_seed(seed_of(seed, *purpose))


def reseed(seed: int, device: torch.device) -> None:
    """Seed the global random streams of the CPU and of `device`, which dropout and initial weights use.

    `torch.manual_seed` would also queue the seed for every kind of device that is absent, 100 µs each time.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


class BatchRandom:
    """Random numbers that belong to one batch, drawn for the global batch and then sliced.

    Each call returns one row per sample of this process, so N processes see what one would. `seed` decides every
    number, `batch_size` is the global batch, `rows` this process's part of it.
    """

    def __init__(self, seed: int, device: torch.device, batch_size: int, rows: slice = slice(None)):
        self.seed, self.device, self.batch_size, self.rows = seed, device, batch_size, rows

    @cached_property  # most batches draw nothing, and a generator costs microseconds
    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed)

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal numbers, (rows, *shape)."""
        return torch.randn(self.batch_size, *shape, generator=self.generator, device=self.device)[self.rows]

    def uniform(self, *shape: int) -> Tensor:
        """Draw numbers in [0, 1), (rows, *shape)."""
        return torch.rand(self.batch_size, *shape, generator=self.generator, device=self.device)[self.rows]

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Draw integers in [low, high), (rows, *shape) int64."""
        size = (self.batch_size, *shape)
        return torch.randint(low, high, size, generator=self.generator, device=self.device)[self.rows]
