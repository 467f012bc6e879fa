"""Constants and set-ups that checks and figures share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.nn.attention import MultiHeadAttention
from experiments.nn.encoder import ENCODINGS
from experiments.nn.exactness import unit_roundoff
from experiments.nn.positions import AbsPosEncoding, RotaryPosEncoding
from experiments.posenc_check import claims
from runner import figures
from runner.task import Run

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
BASE = 10000.0
# what the claims are held at
TABLE_LENGTH, CLAIM_DIM = 5000, 64
SHIFTS = (1, 7, 100, 4000)
STARTS, WINDOW = (0, 1000, 32_768, 131_072), 64
LAST = STARTS[-1] + WINDOW
FAR = (0, 1, 2, 63, 1000, 4095, 4096, 32_768, 131_072)  # positions of single vectors
# 我爱你 through one layer
SENTENCE = ("我", "爱", "你")
ORDER = (2, 1, 0)  # 你爱我: which word of 我爱你 stands at each place
WORD_DIM, WORD_HEADS = 16, 2
TELL_APART = 0.01  # the least difference of pooled outputs, relative to an output, that counts as one
EXACT = 1000 * unit_roundoff(torch.float64)  # sums of 16 numbers and a softmax: a few hundred roundings
LEARNT = 0.99  # accuracy
STANDARD_ERRORS = 4.0
MOVES, MOVED_SENTENCES = (0, 4, 8, 16, 32, 48), 1000  # places that test sentences are moved back
DISTANCES = (2, 16, 24, 32, 40, 64)  # of 我 and 你: the first group is what training has seen
COLOURS = dict(zip(ENCODINGS, figures.PALETTE, strict=False))  # those of the curves
Accuracies = dict[str, dict[str, float]]  # by setting, by encoding


@dataclass(frozen=True)
class Reordered:
    """What one layer makes of three words, in both orders."""

    title: str
    outputs: Tensor  # (L, D) of 我爱你
    reordered: Tensor  # (L, D) of 你爱我

    @property
    def pooled(self) -> float:
        return claims.pooled_difference(self.outputs, self.reordered)

    @property
    def tokens(self) -> Tensor:
        return claims.token_differences(self.outputs, self.reordered, ORDER)


@torch.no_grad()
def reordered_setups(run: Run) -> Iterator[Reordered]:
    """The two orders without positions, with either encoding, and with a causal mask alone."""
    words = torch.randn(len(SENTENCE), WORD_DIM, dtype=torch.float64, generator=run.generator("words"))
    plain = seeded_attention(run)
    turning = seeded_attention(run, RotaryPosEncoding(WORD_DIM // WORD_HEADS, BASE))
    adding = AbsPosEncoding(WORD_DIM).eval()

    def both(title: str, layer: Callable[[Tensor], Tensor]) -> Reordered:
        return Reordered(title, layer(words[None])[0], layer(words[list(ORDER)][None])[0])

    def attend(attention: MultiHeadAttention, x: Tensor, causal: bool = False) -> Tensor:
        output, _ = attention(x, x, x, causal=causal, need_weights=False)
        return output

    yield both("no positions", lambda x: attend(plain, x))
    yield both("absolute positions", lambda x: attend(plain, adding(x)))
    yield both("rotary positions", lambda x: attend(turning, x))
    yield both("causal mask alone", lambda x: attend(plain, x, causal=True))


def seeded_attention(run: Run, rotary: nn.Module | None = None) -> MultiHeadAttention:
    """A float64 layer with random weights, the same at every call."""
    attention = MultiHeadAttention(WORD_DIM, WORD_HEADS, rotary=rotary).double().eval()
    random = run.generator("attention")
    for parameter in attention.parameters():
        parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=random))
        parameter.div_(math.sqrt(WORD_DIM))
    return attention


def short(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def device_of(run: Run, dtype: torch.dtype) -> torch.device:
    """Where a claim in `dtype` is measured: float64, which not every device has, on the CPU."""
    return torch.device("cpu") if dtype == torch.float64 else run.device
