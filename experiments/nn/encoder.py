"""A small Transformer encoder that classifies sequences of tokens, with or without a notion of their order.

    x⁰ = E[tokens] (+ PE, where the encoding is absolute)                                                   (1)
    x ← x + MultiHead(LN(x), LN(x), LN(x))        queries and keys turned, where it is rotary               (2)
    x ← x + W₂ gelu(W₁ LN(x) + b₁) + b₂                                                                     (3)
    logits = W_o · mean over the tokens of LN(x) + b_o                                                      (4)

The layers of Vaswani et al. 2017, §3.1, with the normalisation in front (Xiong et al. 2020), which needs no warm-up.
Everything but the encoding treats all places alike, so without one the logits do not depend on the order: (2) and
(3) permute with the tokens, and the mean (4) forgets the permutation.

Letters in shapes: B batch, L length, D model size, H heads, C classes.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from experiments.nn.attention import MultiHeadAttention
from experiments.nn.checks import at_least, divisible, one_of
from experiments.nn.positions import AbsPosEncoding, RotaryPosEncoding

Encoding = Literal["none", "absolute", "rotary"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)


class Layer(nn.Module):
    """Equations (2) and (3)."""

    def __init__(self, d_model: int, num_heads: int, d_ff: int, rotary: nn.Module | None):
        super().__init__()
        self.norm_attention = nn.LayerNorm(d_model)
        self.attention = MultiHeadAttention(d_model, num_heads, rotary=rotary)
        self.norm_mlp = nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, d_ff), nn.GELU(), nn.Linear(d_ff, d_model))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """x (B, L, D), padding (B, L) True where there is no token → (B, L, D)."""
        normed = self.norm_attention(x)
        mixed, _ = self.attention(normed, normed, normed, key_padding_mask=padding, need_weights=False)
        x = x + mixed
        output: Tensor = x + self.mlp(self.norm_mlp(x))
        return output


class Encoder(nn.Module):
    """Equations (1) to (4). Networks that differ in `encoding` alone have the same parameters.

    In training, absolute positions start anywhere in 0 … `random_start` per batch, so that those of longer
    sequences have been seen; the others have no use for it. Token 0 is padding.

    Raises:
        ValueError: a size below 1, an unknown encoding, a random_start below 0; `d_model` no multiple of
            `num_heads`, or heads of an odd size where the encoding is rotary.
    """

    def __init__(
        self,
        num_tokens: int,
        num_classes: int,
        encoding: Encoding = "rotary",
        d_model: int = 32,
        num_heads: int = 4,
        num_layers: int = 2,
        d_ff: int = 64,
        base: float = 10000.0,
        random_start: int = 0,
    ):
        super().__init__()
        # arguments
        at_least(1, num_tokens=num_tokens, num_classes=num_classes, d_model=d_model, num_heads=num_heads)
        at_least(1, num_layers=num_layers, d_ff=d_ff)
        at_least(0, random_start=random_start)
        one_of(ENCODINGS, encoding=encoding)
        divisible(num_heads, "num_heads", d_model=d_model)
        if encoding == "rotary":
            divisible(2 * num_heads, "2 num_heads", d_model=d_model)  # whose numbers are turned in pairs

        # layers
        self.random_start = random_start
        self.embedding = nn.Embedding(num_tokens, d_model)  # standard normal: as large as the encoding
        self.absolute = AbsPosEncoding(d_model) if encoding == "absolute" else None
        rotary = RotaryPosEncoding(d_model // num_heads, base) if encoding == "rotary" else None
        self.layers = nn.ModuleList(Layer(d_model, num_heads, d_ff, rotary) for _ in range(num_layers))
        self.norm = nn.LayerNorm(d_model)
        self.read_out = nn.Linear(d_model, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, L) int64, 0 where there is none → logits (B, C)."""
        padding = tokens == 0  # (B, L)

        # layers
        x = self.embedding(tokens)  # (B, L, D)
        if self.absolute is not None:
            x = self.absolute(x, self.start())
        for layer in self.layers:
            x = layer(x, padding)

        # mean over the tokens, then logits
        x = self.norm(x).masked_fill(padding[:, :, None], 0.0)
        count = (~padding).sum(1, keepdim=True).clamp(min=1)  # (B, 1)
        output: Tensor = self.read_out(x.sum(1) / count)
        return output

    def start(self) -> int:
        """Return the position of the first token."""
        if not (self.training and self.random_start):
            return 0
        return int(torch.randint(self.random_start + 1, (), device="cpu"))
