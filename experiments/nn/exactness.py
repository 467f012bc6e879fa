"""How exact a number can be in its dtype, how far the worst of some numbers is off, and float32 that is float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch


def unit_roundoff(dtype: torch.dtype) -> float:
    """u: how far, relatively, the nearest number of the dtype can be."""
    return torch.finfo(dtype).eps / 2


def rounding(*terms: int, dtype: torch.dtype = torch.float64) -> float:
    """Bound the rounding of sums of so many terms, one after the other: n ε each (Higham 2002, eq. 3.5)."""
    return sum(terms) * torch.finfo(dtype).eps


def largest(values: Iterable[float]) -> float:
    """Return the largest of some numbers, NaN where one is: Python's `max` may pass over it."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())


@contextlib.contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Neither bfloat16 nor, on CUDA, TF32, which torch allows convolutions by default (10 bits of mantissa)."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
