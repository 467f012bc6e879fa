"""Random samples of which no two are equal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def distinct_rows(count: int, draw: Callable[[], Tensor], exclude: Tensor | None = None) -> Tensor:
    """Return `count` rows of what `draw` gives (·, D), no two equal and none among the distinct rows `exclude`."""
    rows: dict[tuple[int, ...], None] = {}  # keeps the order in which each comes first
    if exclude is not None:
        rows = dict.fromkeys(map(tuple, exclude.tolist()))
    start = len(rows)
    while len(rows) < start + count:
        rows |= dict.fromkeys(map(tuple, draw().tolist()))
    return torch.tensor(list(rows)[start : start + count])


def check_sizes(family: int, **sizes: int) -> None:
    """Raise ValueError unless each size is a positive multiple of `family`, samples that belong together."""
    for name, size in sizes.items():
        if size < family or size % family:
            raise ValueError(f"{name} must be a positive multiple of {family}, got {size}")


def check_enough(argument: str, needed: int, possible: int) -> None:
    """Raise ValueError if more than half of all samples are needed: drawing until all differ would take long."""
    if 2 * needed > possible:
        raise ValueError(f"{argument} allows {possible:,} samples, and {needed:,} are more than half of them")
