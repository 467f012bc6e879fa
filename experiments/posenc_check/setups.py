"""Constants and set-ups that the checks, figures and sheets share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.nn.attention import MultiHeadAttention
from experiments.nn.exactness import unit_roundoff
from experiments.nn.positions import AbsPosEncoding, RotaryPosEncoding
from experiments.posenc_check import claims
from runner.task import Run

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
BASE = 10000.0
# the sizes of the checks
TABLE_LENGTH, CLAIM_DIM = 5000, 64
STARTS, WINDOW = (0, 1000, 32_768, 131_072), 64
# 我爱你 through one layer
SENTENCE = ("我", "爱", "你")
ORDER = (2, 1, 0)  # 你爱我: the word of 我爱你 at each place
_WORD_DIM, _WORD_HEADS = 16, 2
TELL_APART = 0.01  # the least difference of pooled outputs, relative to an output, that counts as one
EXACT = 1000 * unit_roundoff(torch.float64)  # sums of 16 numbers and a softmax: a few hundred roundings


@dataclass(frozen=True)
class Reordered:
    """Outputs of one layer for three words, in both orders."""

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
    """Yield the two orders without positions, with either encoding, and with a causal mask alone."""
    # one layer, without positions and with either encoding
    words = torch.randn(len(SENTENCE), _WORD_DIM, dtype=torch.float64, generator=run.generator("words"))
    plain = _seeded_attention(run)
    rotating = _seeded_attention(run, RotaryPosEncoding(_WORD_DIM // _WORD_HEADS, BASE))
    adding, nothing = AbsPosEncoding(_WORD_DIM).eval(), nn.Identity()

    # the set-ups
    for title, attention, encode, causal in (
        ("no positions", plain, nothing, False),
        ("absolute positions", plain, adding, False),
        ("rotary positions", rotating, nothing, False),
        ("causal mask alone", plain, nothing, True),
    ):
        orders = (encode(tokens[None]) for tokens in (words, words[list(ORDER)]))
        yield Reordered(title, *(attention(x, x, x, causal=causal, need_weights=False)[0][0] for x in orders))


def _seeded_attention(run: Run, rotary: nn.Module | None = None) -> MultiHeadAttention:
    """Return a float64 layer with random weights, the same at every call."""
    attention = MultiHeadAttention(_WORD_DIM, _WORD_HEADS, rotary=rotary).double().eval()
    random = run.generator("attention")
    for parameter in attention.parameters():
        parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=random))
        parameter.div_(math.sqrt(_WORD_DIM))
    return attention


def name_of(dtype: torch.dtype) -> str:
    """Return float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")
