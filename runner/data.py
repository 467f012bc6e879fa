"""Data sets as tensors on the device, and batches that are a function of (seed, step).

Small image sets live on the device as one uint8 tensor; batches are normalised and augmented there. There are no
worker processes and no per-sample Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from runner.errors import UserError, at_least
from runner.streams import BatchRandom, seed_of

__all__ = ["Batch", "Data", "Split", "batch_indices", "eval_batches", "train_batch"]


@dataclass(frozen=True)
class Split:
    """The samples of one split: `inputs` (N, ...) of any dtype, `targets` (N, ...) or None: int64 for classes."""

    inputs: Tensor
    targets: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def to(self, device: torch.device) -> Split:
        """Return the same samples on `device`."""
        targets = None if self.targets is None else self.targets.to(device)
        return Split(self.inputs.to(device), targets)


@dataclass(frozen=True)
class Batch:
    """What a task is given at each step: transformed inputs, and the batch's own random numbers.

    `inputs` is (B, ...), `targets` (B, ...) or None.
    """

    inputs: Tensor
    targets: Tensor | None
    draws: BatchRandom


class Data:
    """A data set with its splits. The constructor checks arguments and touches nothing; `load` reads.

    `batch_size` is the global batch of training, `eval_batch_size` that of evaluation, both in samples.
    """

    class_names: tuple[str, ...] = ()

    def __init__(self, batch_size: int, eval_batch_size: int = 1000):
        at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size

    def load(self, seed: int) -> dict[str, Split]:
        """Read the splits ("train", and "val" and "test" where there are any); `seed` decides a split by chance.

        Raises:
            UserError: the data could not be obtained; the message says what was tried.
        """
        # no ABC, which would say "can't instantiate" and not what to write
        raise UserError(
            f'{type(self).__name__}: expected a method load(seed) that returns {{"train": Split(...)}}, got none'
        )

    def digest(self) -> str | None:
        """Return what identifies the samples, such as a sha256, for the summary; None if nothing does."""
        return None

    def transform(self, inputs: Tensor, draws: BatchRandom | None) -> Tensor:
        """Normalise stored inputs (B, ...) on the device; augment too where `draws` is given (training)."""
        return inputs


@lru_cache(maxsize=4)
def _permutation(length: int, seed: int, epoch: int) -> Tensor:
    """Return the order of the samples in one epoch: (length,) int64 on the CPU."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed_of(seed, "order", epoch)))


def batch_indices(length: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Return which samples form training batch `step`: (batch_size,) int64 on the CPU.

    The epochs' permutations are laid end to end and cut into equal batches, so every sample is seen once
    per epoch, every batch has the same shape, and nothing but (seed, step) decides.
    """
    start, stop = step * batch_size, (step + 1) * batch_size
    parts = []
    while start < stop:
        epoch, offset = divmod(start, length)
        parts.append(_permutation(length, seed, epoch)[offset : offset + stop - start])
        start += len(parts[-1])
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def train_batch(data: Data, split: Split, seed: int, step: int, rank: int = 0, world_size: int = 1) -> Batch:
    """Return the rows of `rank` in training batch `step`, on the split's device."""
    share, rest = divmod(data.batch_size, world_size)
    assert not rest, f"batch_size={data.batch_size} does not divide by {world_size} processes"
    rows = slice(rank * share, (rank + 1) * share)
    device = split.inputs.device
    index = batch_indices(len(split), data.batch_size, seed, step)[rows].to(device, non_blocking=True)
    draws = BatchRandom(seed_of(seed, "batch", step), device, data.batch_size, rows)
    inputs = data.transform(split.inputs[index], draws)
    return Batch(inputs, None if split.targets is None else split.targets[index], draws)


def eval_batches(data: Data, split: Split, seed: int, name: str, limit: int | None = None) -> Iterator[Batch]:
    """Yield the samples of a split in their order, at most `limit` batches; the last may be smaller."""
    size = data.eval_batch_size
    starts = range(0, len(split), size)[:limit]
    for number, start in enumerate(starts):
        inputs = split.inputs[start : start + size]
        draws = BatchRandom(seed_of(seed, "eval", name, number), inputs.device, len(inputs))
        targets = None if split.targets is None else split.targets[start : start + size]
        yield Batch(data.transform(inputs, None), targets, draws)
