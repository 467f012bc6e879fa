"""The cases that the demo walks through, and what its checks, figures and sheets have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.mha_demo import claims
from experiments.nn.masks import causal_mask

SENTENCE = ("I", "love", "you", "very", "much")
PADDED = (*SENTENCE, "‹pad›", "‹pad›")
TARGET = ("我", "非常", "爱", "你")  # queries SENTENCE, as in translation
KEYS = 8  # per query, in the experiment on √d_k
SIZES = (16, 32, 64, 128, 256, 512, 1024)  # d_k
CEILING = 0.75  # accuracy of one head at most, see experiments/nn/lookup_net.py
Inputs = dict[str, tuple[Tensor, Tensor]]  # queries (1, T, D) and source (1, S, D) by case
StatisticsBySize = dict[int, claims.ScoreStatistics]  # by d_k


@dataclass(frozen=True)
class Case:
    """Queries, the tokens they attend to, and the mask."""

    name: str
    title: str
    queries: tuple[str, ...]
    source: tuple[str, ...]
    padding: bool = False
    causal: bool = False

    @property
    def keys_from(self) -> str:
        """Prefix of the sheets of its keys and values, which the cases of self-attention share."""
        return "cross" if self.queries == TARGET else "self"

    @property
    def masks(self) -> dict[str, Any]:
        """Arguments of the layer."""
        padding = torch.tensor([[token == PADDED[-1] for token in self.source]])  # (1, S)
        return {"key_padding_mask": padding if self.padding else None, "causal": self.causal}

    @property
    def blocked(self) -> Tensor:
        """(T, S), True where a query may not attend."""
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
