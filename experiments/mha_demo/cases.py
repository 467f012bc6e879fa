"""The cases that the demo walks through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.mha_demo import claims
from experiments.nn.masks import causal_mask
from runner import figures

SENTENCE = ("I", "love", "you", "very", "much")
PADDED = (*SENTENCE, "‹pad›", "‹pad›")
TARGET = ("我", "非常", "爱", "你")  # asks SENTENCE, as a translation does
STEPS = ("1 scores  q·k", "2 scaled  ÷ √$d_k$", "3 masked", "4 weights  softmax", "5 output  Σ weight · v")
KEYS = 8  # per query, where scores are drawn by chance
SIZES = (16, 32, 64, 128, 256, 512, 1024)  # d_k
ERRORS = 5  # standard errors that a mean over random scores may be off: one in two million would be
CEILING = 0.75  # of one head, see experiments/nn/lookup_net.py
QUESTIONS = ("the value at a position", "the value that a symbol marks")
SLOTS = ("the slot at the position asked for", "the slot that bears the symbol asked for")
COLOURS = (figures.ORANGE, figures.PURPLE)  # of the two questions; to be seen on white and on blue
Found = dict[int, claims.ScoreStatistics]  # by d_k


@dataclass(frozen=True)
class Case:
    """Who asks whom, and what is masked."""

    name: str
    title: str
    queries: tuple[str, ...]
    source: tuple[str, ...]
    padding: bool = False
    causal: bool = False

    @property
    def keys_from(self) -> str:
        """What the sheets of its keys and values are named by: the cases of self-attention share them."""
        return "cross" if self.queries == TARGET else "self"

    @property
    def masks(self) -> dict[str, Any]:
        """What the layer is told."""
        padding = torch.tensor([[token == PADDED[-1] for token in self.source]])  # (1, S)
        return {"key_padding_mask": padding if self.padding else None, "causal": self.causal}

    @property
    def blocked(self) -> Tensor:
        """(T, S), True where a query may not look."""
        T, S = len(self.queries), len(self.source)
        later = causal_mask(T, S) if self.causal else torch.zeros(T, S, dtype=torch.bool)
        return later | self.masks["key_padding_mask"] if self.padding else later


CASES = (
    Case("none", "no mask: every token looks at all tokens, at padding too", PADDED, PADDED),
    Case("padding", "padding mask: nobody looks at padding", PADDED, PADDED, padding=True),
    Case("causal", "causal mask: nobody looks ahead", PADDED, PADDED, causal=True),
    Case("both", "padding and causal mask: neither at padding nor ahead", PADDED, PADDED, True, True),
    Case(
        "cross",
        "cross-attention: a target sentence asks a source sentence of another length",
        TARGET,
        SENTENCE,
    ),
)
