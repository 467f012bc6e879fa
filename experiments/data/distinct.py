"""Random samples of which no two are equal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def distinct_rows(count: int, draw: Callable[[], Tensor], exclude: Tensor | None = None) -> Tensor:
    """Return `count` rows of what `draw` gives (·, D), no two equal and none among the distinct rows `exclude`."""
    rows = _first_of_each(draw()) if exclude is None else exclude
    start = 0 if exclude is None else len(exclude)
    while len(rows) < start + count:
        rows = _first_of_each(torch.cat((rows, draw())))
    return rows[start : start + count]


def check_sizes(family: int, **sizes: int) -> None:
    """Raise ValueError unless each size is a positive multiple of `family`, samples that belong together."""
    for name, size in sizes.items():
        if size < family or size % family:
            raise ValueError(f"{name} must be a positive multiple of {family}, got {size}")


def check_enough(argument: str, needed: int, possible: int) -> None:
    """Raise ValueError if more than half of all samples are needed: drawing until all differ would take long."""
    if 2 * needed > possible:
        raise ValueError(f"{argument} allows {possible:,} samples, and {needed:,} are more than half of them")


def _first_of_each(rows: Tensor) -> Tensor:
    """Return the rows (N, D) without repetitions, in the order in which each comes first."""
    _, kinds = torch.unique(rows, dim=0, return_inverse=True)  # (N,)
    first = torch.full((int(kinds.max()) + 1,), len(rows))
    first.scatter_reduce_(0, kinds, torch.arange(len(rows)), "amin")
    return rows[first.sort().values]
