"""Attention in five steps, and with several heads (Vaswani et al. 2017, §3.2).

    Attention(Q, K, V) = softmax(Q Kᵀ / √d_k + M) V                                                          (1)
    MultiHead(X, Y, Z) = Concat(head_1, …, head_H) W^O,  head_h = Attention(X W^Q_h, Y W^K_h, Z W^V_h)       (2)

M is the mask: 0 where a query may look, −∞ where it may not. A query that may look nowhere looks nowhere: its
weights and its sum of values are zeros, where the formula would give 0/0.

Letters in shapes: B batch, H heads, G heads of keys and values, T queries, S source (keys and values), D model
size, Dh = D/H size of a head, the paper's d_k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AttentionSteps(NamedTuple):
    """What each of the five steps of equation (1) gives; in half precision the first three are float32."""

    scores: Tensor  # (…, T, S): Q Kᵀ
    scaled: Tensor  # (…, T, S): divided by √d_k
    masked: Tensor  # (…, T, S): −∞ where a query may not look
    weights: Tensor  # (…, T, S): rows that sum to one, or to zero where everything is masked
    output: Tensor  # (…, T, Dh): the sum of the values, weighted


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    """Step 1: how well each query (…, T, Dh) meets each key (…, S, Dh), Q Kᵀ (…, T, S)."""
    return wide(q) @ wide(k).transpose(-2, -1)


def scale(scores: Tensor, d_k: int) -> Tensor:
    """Step 2: scores (…, T, S) over √d_k, so that their variance is that of one component (note 4)."""
    return scores / math.sqrt(d_k)


def apply_mask(scaled: Tensor, mask: Tensor | None) -> Tensor:
    """Step 3: −∞ where a boolean mask is True or a float mask −∞; else a float mask is added.

    Filled rather than added, so that a masked score which is itself infinite leaves no NaN.
    """
    if mask is None:
        return scaled
    if mask.dtype == torch.bool:
        return scaled.masked_fill(mask, -math.inf)
    return (scaled + mask).masked_fill(mask == -math.inf, -math.inf)


def softmax(masked: Tensor) -> Tensor:
    """Step 4: exp over its sum along each row (…, T, S); zeros, and no gradient, for a row that is all −∞."""
    nowhere = (masked == -math.inf).all(-1, keepdim=True)  # (…, T, 1)
    return torch.softmax(masked.masked_fill(nowhere, 0), -1).masked_fill(nowhere, 0)


def weighted_sum(weights: Tensor, v: Tensor) -> Tensor:
    """Step 5: values (…, S, Dh) summed by the weights of each query (…, T, S) → (…, T, Dh)."""
    return weights @ v


def attention_steps(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> AttentionSteps:
    """Equation (1), and all that is found on the way.

    Args:
        q: queries (…, T, Dh)
        k: keys (…, S, Dh)
        v: values (…, S, any size)
        mask: broadcasts to (…, T, S); boolean: True may not be looked at; float: added to the scaled scores

    Raises:
        ValueError: shapes that do not fit, a mask that is neither boolean nor float.
    """
    check_operands(q, k, v)
    check_mask("mask", mask, (*torch.broadcast_shapes(q.shape[:-2], k.shape[:-2]), q.shape[-2], k.shape[-2]))
    scores = scores_of(q, k)
    scaled = scale(scores, q.shape[-1])
    masked = apply_mask(scaled, mask)
    weights = softmax(masked).to(v.dtype)
    return AttentionSteps(scores, scaled, masked, weights, weighted_sum(weights, v))


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Equation (1) → output (…, T, Dh) and weights (…, T, S); arguments as in `attention_steps`."""
    steps = attention_steps(q, k, v, mask)
    return steps.output, steps.weights


def wide(x: Tensor) -> Tensor:
    """x in float32 where it is bfloat16 or float16: eight or eleven bits are too few for a score."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def causal_mask(T: int, S: int, device: torch.device | None = None) -> Tensor:
    """(T, S) boolean, True above the diagonal that ends in the lower right corner.

    The last query belongs to the last key: query t may look at keys 0 … t + S − T. That is what a chunk of
    queries behind a cache needs; of T > S queries the first T − S may look nowhere.
    """
    return torch.ones(T, S, dtype=torch.bool, device=device).triu(S - T + 1)


def merge_masks(
    B: int,
    H: int,
    T: int,
    S: int,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    causal: bool = False,
    device: torch.device | None = None,
) -> Tensor | None:
    """One mask that broadcasts to (B, H, T, S), boolean unless `attn_mask` is float, or None.

    Args:
        key_padding_mask: (B, S) boolean, True is padding
        attn_mask: (T, S), (B, T, S) or (B, H, T, S); boolean: True is blocked; float: added to the scores
        causal: a query looks at no later key, see `causal_mask`
        device: where the causal mask is to be

    Raises:
        ValueError: a mask of another shape or dtype.
    """
    blocked: Tensor | None = None
    if key_padding_mask is not None:
        check_padding(key_padding_mask, B, S)
        blocked = key_padding_mask[:, None, None, :]  # (B, 1, 1, S)
    if causal and T > 1:  # a single query is the last one, and looks at everything
        later = causal_mask(T, S, device)
        blocked = later if blocked is None else blocked | later
    if attn_mask is None:
        return blocked
    attn_mask = with_heads(attn_mask, B, H, T, S)
    if attn_mask.dtype == torch.bool:
        return attn_mask if blocked is None else attn_mask | blocked
    return attn_mask if blocked is None else attn_mask.masked_fill(blocked, -math.inf)


def with_heads(attn_mask: Tensor, B: int, H: int, T: int, S: int) -> Tensor:
    """`attn_mask` with the axes (B or 1, H or 1, T, S)."""
    check_mask("attn_mask", attn_mask)
    shape = tuple(attn_mask.shape)
    if shape == (B, H, T, S):
        return attn_mask
    if shape == (T, S):
        return attn_mask[None, None]
    if shape == (B, T, S):
        return attn_mask[:, None]
    hint = ""
    if shape == (B * H, T, S):
        hint = f"; for nn.MultiheadAttention's (B·H, T, S) call attn_mask.view({B}, {H}, {T}, {S})"
    raise ValueError(
        f"attn_mask must be (T, S) = {(T, S)}, (B, T, S) = {(B, T, S)} or "
        f"(B, H, T, S) = {(B, H, T, S)}, not {shape}{hint}"
    )


def check_padding(key_padding_mask: Tensor, B: int, S: int) -> None:
    if key_padding_mask.dtype != torch.bool:
        raise ValueError(
            f"key_padding_mask must be boolean, True for padding, not {key_padding_mask.dtype}: "
            "call .bool() on it"
        )
    if tuple(key_padding_mask.shape) != (B, S):
        raise ValueError(
            f"key_padding_mask must be (B, S) = {(B, S)}, one flag per key, not {tuple(key_padding_mask.shape)}"
        )


def check_mask(name: str, mask: Tensor | None, shape: tuple[int, ...] | None = None) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"{name} must be boolean (True is blocked) or float (added to the scores), not {mask.dtype}: "
            "call .bool() on a mask of zeros and ones"
        )
    if shape is not None and not broadcasts(tuple(mask.shape), shape):
        raise ValueError(f"{name} must broadcast to the scores' {shape}, not {tuple(mask.shape)}")


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether a tensor of `shape` can be expanded to `to`."""
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(n in (1, m) for n, m in pairs)


def check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim < 2:
            raise ValueError(f"{name} must be (…, length, size), not {tuple(x.shape)}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must agree in their last size: q {tuple(q.shape)}, k {tuple(k.shape)}")
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"k and v must have one length: k {tuple(k.shape)}, v {tuple(v.shape)}")


@dataclass
class KVCache:
    """Keys and values of all tokens so far, each (B, G, length, Dh), rotated where there are rotary positions.

    One cache per layer. Without a graph it writes into buffers that double when they are full; with one it
    concatenates, as autograd wants.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    length: int = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Takes k and v (B, G, new, Dh), gives all so far (B, G, length, Dh)."""
        self.keys = self.put(self.keys, k)
        self.values = self.put(self.values, v)
        self.length += k.shape[2]
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def put(self, buffer: Tensor | None, new: Tensor) -> Tensor:
        """The buffer with what is new behind what was there."""
        if buffer is None:
            return new
        if buffer[:, :, 0].shape != new[:, :, 0].shape:
            raise ValueError(f"cache holds {tuple(buffer.shape)}, which {tuple(new.shape)} does not go on")
        end = self.length + new.shape[2]
        if torch.is_grad_enabled() and (new.requires_grad or buffer.requires_grad):
            return torch.cat((buffer[:, :, : self.length], new), dim=2)
        if end > buffer.shape[2]:
            B, G, _, Dh = new.shape
            grown = new.new_empty(B, G, 2 * end, Dh)
            grown[:, :, : self.length] = buffer[:, :, : self.length]
            buffer = grown
        buffer[:, :, self.length : end] = new
        return buffer


class MultiHeadAttention(nn.Module):
    """Equation (2): project, split into heads, attend, join, project.

    Each weight matrix is Xavier uniform (Glorot & Bengio 2010, eq. 16), all biases are zero. With
    `num_kv_heads` below `num_heads`, groups of heads share keys and values (Ainslie et al. 2023); head h uses
    those of h // (num_heads / num_kv_heads). `dropout` falls on the weights, in training only. `rotary` is a
    module such as `RotaryPosEncoding`, called on queries and keys (B, heads, length, Dh) with their positions.

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
        kdim, vdim = kdim or d_model, vdim or d_model
        num_kv_heads = num_kv_heads or num_heads
        if d_model % num_heads:
            raise ValueError(f"d_model must be divisible by num_heads, not {d_model} by {num_heads}")
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must be divisible by num_kv_heads, not {num_heads} by {num_kv_heads}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {dropout}")
        self.d_model, self.num_heads, self.num_kv_heads = d_model, num_heads, num_kv_heads
        self.head_dim = d_model // num_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(d_model, d_model, bias)
        self.k_proj = nn.Linear(kdim, num_kv_heads * self.head_dim, bias)
        self.v_proj = nn.Linear(vdim, num_kv_heads * self.head_dim, bias)
        self.out_proj = nn.Linear(d_model, d_model, bias)
        self.rotary = rotary
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        causal: bool = False,
        need_weights: bool = True,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """query (B, T, D), key (B, S, kdim), value (B, S, vdim) → output (B, T, D), weights (B, H, T, S) or None.

        Args:
            key_padding_mask: (B, S) boolean, True is padding, which nobody looks at
            attn_mask: (T, S), (B, T, S) or (B, H, T, S); boolean: True is blocked; float: added to the scores
            causal: a query looks at no later key; the last query belongs to the last key
            need_weights: give the weights of each head, before dropout, so that rows sum to one; without them
                torch's fused kernel is used
            positions: (T,) or (B, T), for `rotary`; by default those after the cache's
            cache: keys and values of earlier tokens, to which these are added; S then counts both
        """
        B, T, _ = query.shape
        if key_padding_mask is not None:  # so that nothing in there, infinite or NaN, meets a weight of zero
            padding = key_padding_mask[:, -key.shape[1] :, None]
            same = value is key
            key = key.masked_fill(padding, 0)
            value = key if same else value.masked_fill(padding, 0)
        q = self.split(self.q_proj(query))  # (B, H, T, Dh)
        k, v = self.split(self.k_proj(key)), self.split(self.v_proj(value))  # (B, G, S, Dh)
        past = 0 if cache is None else cache.length
        if self.rotary is not None:
            S = k.shape[2]
            if positions is None:
                at = torch.arange(past, past + S, device=q.device)
                q = self.rotary(q, at[S - T :] if causal and S >= T else torch.arange(T, device=q.device))
                k = self.rotary(k, at)
            else:
                q, k = self.rotary(q, positions), self.rotary(k, positions)
        if cache is not None:
            k, v = cache.append(k, v)
        S = k.shape[2]
        mask = merge_masks(B, self.num_heads, T, S, key_padding_mask, attn_mask, causal, q.device)
        k, v = self.repeat(k), self.repeat(v)
        output, weights = scaled_dot_product_attention(q, k, v, mask)
        if self.training and self.dropout:
            output = F.dropout(weights, self.dropout) @ v
        joined = output.transpose(1, 2).reshape(B, T, self.d_model)
        return self.out_proj(joined), weights if need_weights else None

    def split(self, x: Tensor) -> Tensor:
        """(B, L, heads·Dh) → (B, heads, L, Dh)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def repeat(self, x: Tensor) -> Tensor:
        """Keys or values of G heads (B, G, S, Dh), each for all heads of its group → (B, H, S, Dh)."""
        if self.num_kv_heads == self.num_heads:
            return x
        return x.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
