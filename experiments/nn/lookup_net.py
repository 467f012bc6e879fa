"""One attention layer that looks up two values at once, and two linear read-outs that name them.

    x_query = pos(p) + sym(s)        x_key,i = pos(i) + sym(symbol_i)        x_value,i = val(v_i)           (1)
    o = MultiHead(x_query, x_key, x_value)                                                                  (2)
    logits(u, v) = r₁,u · o + r₂,v · o + b₁,u + b₂,v                                                        (3)

Attention is a soft dictionary here, in the words of Vaswani et al. 2017, §3.2: a query is held against the keys,
and what comes out is a mixture of the values. Weights depend on query and keys alone, and the read-outs are
linear, so a head hands over nothing but its mixture.

With one head, o = w_p val(v_p) + w_s val(v_s) + what the other slots add, put through one matrix. Take four
samples that differ in v_p, v_s ∈ {0, 1} alone. The read-out of v_s compares 1 with 0 by c + w_p D(v_p) + w_s D(v_s)
with some D and c. To be right for 00 and 11 it needs D(1) > D(0). To be right for 01 and 10 as well it then needs
w_s > w_p; and the read-out of v_p likewise needs w_p > w_s. So at least one of the four is answered wrongly:
one head answers at most 3/4 of all questions, whatever its width. Two heads need one look-up each.

Letters in shapes: B batch, S slots, D model width, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from experiments.nn.attention import MultiHeadAttention
from experiments.nn.checks import within

VALUES = 2  # 0 and 1
QUESTIONS = 2  # the value at a position, the value that a symbol marks


class LookupNet(nn.Module):
    """Equations (1) to (3) for `slots` slots; `num_heads` share `d_model`, so every number costs the same."""

    def __init__(self, num_heads: int = 2, d_model: int = 32, slots: int = 8):
        super().__init__()
        self.slots = slots
        self.position = nn.Embedding(slots, d_model)
        self.symbol = nn.Embedding(slots, d_model)
        self.value = nn.Embedding(VALUES, d_model)
        self.attention = MultiHeadAttention(d_model, num_heads)
        self.read_out = nn.Linear(d_model, QUESTIONS * VALUES)

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute logits (B, 4) of the answers 00, 01, 10, 11 from samples (B, 2 + 2S) int64.

        A sample holds p, s, the symbols of the S slots and their values.
        """
        mixed, _ = self.attend(inputs, need_weights=False)
        return self.answer(mixed)

    def weights(self, inputs: Tensor) -> Tensor:
        """Return each head's weights, (B, H, S)."""
        _, weights = self.attend(inputs, need_weights=True)
        assert weights is not None
        return weights.squeeze(2)

    def attend(self, inputs: Tensor, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Equations (1) and (2): (B, D), and weights (B, H, 1, S) if `need_weights`."""
        asked, symbols, values = inputs.split((QUESTIONS, self.slots, self.slots), dim=1)
        query = self.position(asked[:, :1]) + self.symbol(asked[:, 1:])  # (B, 1, D)
        places = torch.arange(self.slots, device=inputs.device)
        key = self.position(places) + self.symbol(symbols)  # (B, S, D)
        mixed, weights = self.attention(query, key, self.value(values), need_weights=need_weights)
        return mixed.squeeze(1), weights

    def answer(self, mixed: Tensor) -> Tensor:
        """Equation (3): mixtures (B, D) → logits (B, 4), one read-out per question."""
        first, second = self.read_out(mixed).split(VALUES, dim=1)  # (B, 2) each
        output: Tensor = (first[:, :, None] + second[:, None, :]).flatten(1)
        return output


@torch.no_grad()
def silence(network: LookupNet, head: int) -> None:
    """Zero what a head puts out, by its columns of the output projection; changes the network."""
    H = network.attention.num_heads
    within(0, H, term="num_heads", head=head)
    columns = network.attention.out_proj.weight  # (D, D): a head's output meets D/H of its columns
    width = columns.shape[1] // H
    columns[:, head * width : (head + 1) * width] = 0
