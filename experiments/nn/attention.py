"""Attention in five steps, and with several heads (Vaswani et al. 2017, §3.2).

    Attention(Q, K, V) = softmax(Q Kᵀ / √d_k + M) V                                                          (1)
    MultiHead(X, Y, Z) = Concat(head_1, …, head_H) W^O,  head_h = Attention(X W^Q_h, Y W^K_h, Z W^V_h)       (2)

M is the mask: 0 where a query may attend, −∞ where it may not. A query that may attend to no key has weights and a
sum of values of zeros, where the formula would give 0/0.

Letters in shapes: B batch, H heads, G heads of keys and values, T queries, S source (keys and values), D model
size, Dh = D/H size of a head, the paper's d_k.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from experiments.nn.attention_kernels import attend_fused, attend_with_weights
from experiments.nn.checks import at_least, divisible, shaped, within
from experiments.nn.kv_cache import KVCache
from experiments.nn.masks import merge_masks, without_padding


class MultiHeadAttention(nn.Module):
    """Equation (2): project, split into heads, attend, join, project.

    Each weight matrix is Xavier uniform (Glorot & Bengio 2010, eq. 16), all biases are zero; `nn.MultiheadAttention`
    draws its three input matrices as one of 3·D rows, which makes them smaller by √2. With `num_kv_heads` below
    `num_heads` groups of heads share keys and values (Ainslie et al. 2023): head h those of h // (H/G).
    `dropout` falls on the weights, in training only. `rotary` is a module such as `RotaryPosEncoding`: called
    with (B, heads, length, Dh) and positions, on queries and keys.

    A key that `key_padding_mask` hides may hold anything, infinity and NaN too: neither output nor the gradients
    that come through keys and values see it. What `attn_mask` or `causal` hides has weight zero, whatever it is as
    long as its scores and values are finite (in bfloat16 and float32 up to some 10³⁷), but 0·∞ is NaN.

    Raises:
        ValueError: a size below 1, d_model not divisible by num_heads, num_heads not divisible by
            num_kv_heads, a dropout outside [0, 1).
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        num_kv_heads: int | None = None,
        dropout: float = 0.0,
        rotary: nn.Module | None = None,
    ):
        super().__init__()
        kdim = d_model if kdim is None else kdim
        vdim = d_model if vdim is None else vdim
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        at_least(1, d_model=d_model, num_heads=num_heads, kdim=kdim, vdim=vdim, num_kv_heads=num_kv_heads)
        within(0, 1, dropout=dropout)
        divisible(num_heads, "num_heads", d_model=d_model)
        divisible(num_kv_heads, "num_kv_heads", num_heads=num_heads)

        self.d_model, self.kdim, self.vdim = d_model, kdim, vdim
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, d_model // num_heads
        self.dropout = dropout

        # projections; keys and values have a head per group of query heads
        self.q_proj = nn.Linear(d_model, d_model, bias)
        self.k_proj = nn.Linear(kdim, num_kv_heads * self.head_dim, bias)
        self.v_proj = nn.Linear(vdim, num_kv_heads * self.head_dim, bias)
        self.out_proj = nn.Linear(d_model, d_model, bias)
        self.rotary = rotary
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weights: Xavier uniform, biases zero."""
        for layer in self.projections():
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
        """Return the four projections: of queries, keys, values, and output."""
        return self.q_proj, self.k_proj, self.v_proj, self.out_proj

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, dropout={self.dropout}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,  # (B, S) boolean, True is padding, which no query attends to
        attn_mask: Tensor | None = None,  # (T, S), (B, T, S) or (B, H, T, S): True is blocked; float: added
        causal: bool = False,  # no later key; the last query belongs to the last key, whatever T and S
        need_weights: bool = True,  # each head's weights before dropout; without, torch's fused kernel is used
        positions: Tensor | None = None,  # (T,) or (B, T), of queries and keys, for `rotary`; None: counted
        cache: KVCache | None = None,  # of earlier tokens, which these follow; S counts both, in masks too
    ) -> tuple[Tensor, Tensor | None]:
        """query (B, T, D), key (B, S, kdim), value (B, S, vdim) → output (B, T, D), weights (B, H, T, S) or None.

        Raises:
            ValueError: shapes or dtypes that do not fit, a cache without `causal`, positions without `rotary`.
        """
        if cache is not None and not causal:
            raise ValueError("cache needs causal=True, because it holds the past alone, got causal=False")
        self._require_shapes(query, key, value)
        B, T, D = query.shape
        past = 0 if cache is None else cache.length
        S = past + key.shape[1]

        # one mask of all three; the fused kernel has a causal triangle of its own
        triangle = causal and T == S and not need_weights and key_padding_mask is None and attn_mask is None
        mask = merge_masks(
            B, self.num_heads, T, S, key_padding_mask, attn_mask, causal and not triangle, query.device
        )
        if key_padding_mask is not None:
            key, value = without_padding(key, value, key_padding_mask[:, past:])

        # project, split into heads, rotate, append to the cache
        q = _split_heads(self.q_proj(query), self.num_heads)  # (B, H, T, Dh)
        k = _split_heads(self.k_proj(key), self.num_kv_heads)  # (B, G, S, Dh)
        v = _split_heads(self.v_proj(value), self.num_kv_heads)  # (B, G, S, Dh)
        q, k = self.rotate(q, k, positions, past, causal)
        if cache is not None:
            k, v = cache.append(k, v)

        # attend, join, project
        output, weights = self._attend(q, k, v, mask, triangle, need_weights)
        return self.out_proj(output.transpose(1, 2).reshape(B, T, D)), weights

    def _require_shapes(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        shaped("query", query, "B", "T", self.d_model)
        shaped("key", key, len(query), "S", self.kdim)
        shaped("value", value, *key.shape[:2], self.vdim)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, triangle: bool, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Equation (1) for q (B, H, T, Dh), k and v (B, G, S, Dh), with weights or by the fused kernel."""
        dropout = self.dropout if self.training else 0.0
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)  # autocast may have chosen another dtype for the queries
        if need_weights:
            return attend_with_weights(q, k, v, mask, dropout)
        return attend_fused(q, k, v, mask, triangle, dropout), None

    def rotate(
        self, q: Tensor, k: Tensor, positions: Tensor | None, past: int, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """Rotate queries (B, H, T, Dh) and keys (B, G, new, Dh) to their positions, where there is `rotary`.

        Counted, the last query stands where the last key does if `causal`, else both begin at 0. Of T > S causal
        queries the first have no key, and their positions, which would be negative, mean nothing.
        """
        if self.rotary is None and positions is not None:
            raise ValueError("positions need a layer with rotary, got rotary=None")
        if self.rotary is None:
            return q, k
        if positions is not None:
            return self.rotary(q, positions), self.rotary(k, positions)
        T, S = q.shape[2], past + k.shape[2]
        first_query = S - T if causal else 0
        return self.rotary(q, counted(first_query, q)), self.rotary(k, counted(past, k))

    @classmethod
    def from_torch(cls, source: nn.MultiheadAttention) -> MultiHeadAttention:
        """Build the same function with copies of the weights. It takes (B, length, D) whatever `batch_first` is.

        Raises:
            ValueError: `add_bias_kv` or `add_zero_attn`, which add a key that no token stands for.
        """
        if source.bias_k is not None or source.add_zero_attn:
            extras = f"add_bias_kv={source.bias_k is not None}, add_zero_attn={source.add_zero_attn}"
            raise ValueError(f"source must add no keys of its own, got {extras}")

        # the same layer, with copies of the weights
        ways: dict[str, Any] = {"kdim": source.kdim, "vdim": source.vdim, "dropout": source.dropout}
        ours = cls(source.embed_dim, source.num_heads, source.in_proj_bias is not None, **ways)
        ours.to(source.out_proj.weight)
        with torch.no_grad():
            for parameter, theirs in zip(ours.parameters(), _parameters_of(source), strict=True):
                parameter.copy_(theirs)
        return ours.train(source.training)

    def to_torch(self) -> nn.MultiheadAttention:
        """Build the same function as an `nn.MultiheadAttention(batch_first=True)`, with copies of the weights.

        Raises:
            ValueError: rotary positions or shared keys and values, which it does not have.
        """
        if self.rotary is not None or self.num_kv_heads != self.num_heads:
            extras = f"rotary={self.rotary}, num_kv_heads={self.num_kv_heads} of {self.num_heads}"
            raise ValueError(f"expected num_kv_heads = num_heads and no rotary, got {extras}")

        # the same layer, with copies of the weights
        sizes = (self.d_model, self.num_heads, self.dropout, self.out_proj.bias is not None)
        theirs = nn.MultiheadAttention(*sizes, kdim=self.kdim, vdim=self.vdim, batch_first=True)
        theirs.to(self.out_proj.weight)
        with torch.no_grad():
            for parameter, ours in zip(_parameters_of(theirs), self.parameters(), strict=True):
                parameter.copy_(ours)
        return theirs.train(self.training)


def _parameters_of(source: nn.MultiheadAttention) -> list[Tensor]:
    """Return views of its parameters, in the order of `MultiHeadAttention`'s."""
    weights: tuple[Tensor, ...] = (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)
    if source.in_proj_weight is not None:  # one matrix of 3·D rows, where all inputs have D columns
        weights = source.in_proj_weight.chunk(3)
    if source.in_proj_bias is None:
        return [*weights, source.out_proj.weight]
    pairs = zip(weights, source.in_proj_bias.chunk(3), strict=True)
    return [*itertools.chain(*pairs), source.out_proj.weight, source.out_proj.bias]


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, heads·Dh) → (B, heads, L, Dh), a view."""
    output: Tensor = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return output


def counted(first: int, x: Tensor) -> Tensor | None:
    """Positions first, first + 1, … for x (B, heads, L, Dh); None, which says the same, where they start at 0."""
    if first == 0:
        return None
    return torch.arange(first, first + x.shape[2], device=x.device).clamp(min=0)
