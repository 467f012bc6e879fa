"""Dropout (Srivastava et al. 2014): in training each entry is zero with probability p, the others grow by 1/(1 − p).

y = x ⊙ m / (1 − p),   m ~ Bernoulli(1 − p)                                                              (1)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.nn.checks import within

LEVELS = 2**16  # a random integer of 16 bits decides over an entry: p is met to 1/131,072


class Dropout(nn.Module):
    """Equation (1); in evaluation x stays as it is.

    On a CPU m is read from random words of 64 bits, four entries a word: torch draws entry by entry, which took 8 % of
    a training step of the paper's U-Net. Elsewhere, and compiled, it is torch's own.

    Args:
        p: the probability of zero, in [0, 1)

    Raises:
        ValueError: p outside its range.
    """

    def __init__(self, p: float):
        super().__init__()
        within(0, 1, p=p)
        self.p = p

    def extra_repr(self) -> str:
        return f"p={self.p:g}"

    def forward(self, x: Tensor) -> Tensor:
        """x (…) → the same shape."""
        if not self.training or not self.p:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.p)
        zeros = min(round(self.p * LEVELS), LEVELS - 1)  # of all levels
        m = _random_levels(x.shape).ge_(zeros - LEVELS // 2).to(x.dtype)
        return x * m * (LEVELS / (LEVELS - zeros))


def _random_levels(shape: torch.Size) -> Tensor:
    """Integers in [−32,768, 32,767], all as likely, int16, from torch's generator for the CPU."""
    count = math.prod(shape)
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(torch.iinfo(torch.int64).min, None)
    return words.view(torch.int16)[:count].view(shape)
