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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from experiments.nn.huge_pages import in_huge_pages
from experiments.nn.kv_cache import KVCache
from experiments.nn.masks import additive, check_mask, fitting, merge_masks, open_rows, without_padding

TOGETHER = 2**21  # scores that are worked on at a time on a CPU: 8 MB in float32, which its cache holds


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
        ValueError: shapes that do not fit, integers, a mask that is neither boolean nor float.
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


def without_overflow(x: Tensor) -> Tensor:
    """x in float32 where it is float16: a masked score past its 65,504 is ∞, and ∞ − ∞ is NaN in a whole row."""
    return x.float() if x.dtype == torch.float16 else x


def check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim < 2:
            raise ValueError(f"{name} must be (…, length, size), not {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be of a floating dtype, not {x.dtype}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must agree in their last size: q {tuple(q.shape)}, k {tuple(k.shape)}")
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"k and v must have one length: k {tuple(k.shape)}, v {tuple(v.shape)}")
    try:
        torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    except RuntimeError:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"all axes but the last two must agree: {shapes}") from None


def attend_fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """Equation (1) by torch's fused kernel, without weights: q (B, H, T, Dh), k and v (B, G, S, Dh).

    `causal` asks for the kernel's own triangle, which skips what lies above it, and stands for T = S alone.
    """
    nowhere = None
    if mask is not None:
        mask, nowhere = open_rows(mask)
        mask = ~mask if mask.dtype == torch.bool else mask  # the kernel's True is ours turned round
    grouped = q.shape[1] != k.shape[1]
    output = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=grouped)
    return output if nowhere is None else output.masked_fill(nowhere, 0)


def attend_with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Equation (1) and its weights before dropout: q (B, H, T, Dh), k and v (B, G, S, Dh).

    By `Weigh`, or in the five steps where autograd or the compiler has to see each of them.
    """
    learnt = mask is not None and mask.requires_grad
    if dropout or learnt or torch.compiler.is_compiling():
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        steps = attention_steps(q, k, v, mask)
        if not dropout:
            return steps.output, steps.weights
        return weighted_sum(F.dropout(steps.weights, dropout), v), steps.weights
    bias = nowhere = None
    if mask is not None:
        shape = (*q.shape[:3], k.shape[2])
        mask, nowhere = open_rows(mask)
        bias = additive(mask, q.dtype).expand(shape)
        nowhere = None if nowhere is None else nowhere.expand(*shape[:3], 1)
    output, weights = Weigh.apply(q, k, v, bias, nowhere)
    return output, weights


class Weigh(torch.autograd.Function):
    """Equation (1) with its weights, in the memory that the weights take anyway, and its gradient by hand.

    With Z = Q Kᵀ/√d_k + M, A = softmax(Z), O = A V, and the gradients Ȯ and Ȧ from outside,

        ∂V = Aᵀ Ȯ        ∂Z = A ⊙ (Ȯ Vᵀ + Ȧ − r)        ∂Q = ∂Z K/√d_k        ∂K = ∂Zᵀ Q/√d_k                (3)

    where r, the sum of A ⊙ (Ȯ Vᵀ + Ȧ) along each row, is that of Ȯ ⊙ O + A ⊙ Ȧ (Dao et al. 2022, eq. 4).
    The batch is gone through in parts, so that Z is still in the cache at the next step. The queries of a
    group of heads are one longer list for their keys and values, which are never repeated.
    """

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, nowhere: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """q (B, H, T, Dh), k and v (B, G, S, Dh), bias (B, H, T, S) or None → output, weights (B, H, T, S).

        `nowhere` (B, H, T, 1) marks rows that get zeros; there `bias` is finite.
        """
        (B, H, T, Dh), (G, S) = q.shape, k.shape[1:3]
        output = q.new_empty(B, T, H, Dh).transpose(1, 2)  # in memory as it is joined afterwards
        weights = in_huge_pages(q.new_empty(B, H, T, S))
        for part in parts(weights):
            kept = weights[part]
            a = without_overflow(kept)  # the same memory, but of float16
            keys, values = k[part].flatten(0, 1), v[part].flatten(0, 1)  # (b·G, S, Dh)
            z = by_group(a, G)  # the same memory
            queries, keys = without_overflow(by_group(q[part], G)), without_overflow(keys)
            torch.baddbmm(z, queries, keys.mT, beta=0, alpha=Dh**-0.5, out=z)
            if bias is not None:
                a.add_(bias[part])
            softmax_(a)
            if nowhere is not None:
                a.masked_fill_(nowhere[part], 0)
            kept.copy_(a)  # no copy where they are one
            output[part] = torch.bmm(by_group(kept, G), values).view_as(output[part])
        return output, weights

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:3], *output)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_weights: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """Gradients of the output (B, H, T, Dh) and of the weights (B, H, T, S) → of q, k and v, equation (3)."""
        q, k, v, output, weights = ctx.saved_tensors
        if grad is None:
            if grad_weights is None:  # autograd asks so where a loss does not depend on either
                return None, None, None, None, None
            grad = torch.zeros_like(output)
        G, Dh = k.shape[1], k.shape[3]
        r = (grad * output).sum(-1, keepdim=True)  # (B, H, T, 1)
        dq, dk, dv = (torch.empty_like(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v))
        for part in parts(weights):
            a, g = by_group(weights[part], G), by_group(grad[part], G)  # (b·G, H/G·T, …)
            keys, values = k[part].flatten(0, 1), v[part].flatten(0, 1)  # (b·G, S, Dh)
            dv[part] = torch.bmm(a.mT, g).view_as(dv[part])
            dz = torch.bmm(g, values.mT)
            dz.sub_(by_group(r[part], G))
            if grad_weights is not None:
                outside = by_group(grad_weights[part], G)
                dz.add_(outside).sub_((a * outside).sum(-1, keepdim=True))
            dz.mul_(a).mul_(Dh**-0.5)
            dq[part] = torch.bmm(dz, keys).view_as(dq[part])
            dk[part] = torch.bmm(dz.mT, by_group(q[part], G)).view_as(dk[part])
        return dq, dk, dv, None, None


def parts(weights: Tensor) -> list[slice]:
    """The batch (B, H, T, S) in slices: on a CPU as many elements as its cache holds, elsewhere all at once."""
    B = len(weights)
    step = B
    if weights.device.type == "cpu":
        step = max(1, TOGETHER // max(1, weights[:1].numel()))
    return [slice(start, start + step) for start in range(0, B, max(1, step))]


def by_group(x: Tensor, G: int) -> Tensor:
    """(b, H, T, N) → (b·G, H/G·T, N): the queries of all heads that share keys and values."""
    b, H, T, N = x.shape
    return x.reshape(b * G, H // G * T, N)


def softmax_(scores: Tensor) -> None:
    """Softmax along the rows, in place; sums are float32 in half precision."""
    if scores.device.type == "cpu":  # whose kernel reads all of a row before it writes
        torch.softmax(scores, -1, out=scores)
    else:
        scores.copy_(torch.softmax(scores, -1))


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
        sizes = {"d_model": d_model, "num_heads": num_heads, "kdim": kdim, "vdim": vdim}
        for name, size in (sizes | {"num_kv_heads": num_kv_heads}).items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}")
        if d_model % num_heads:
            raise ValueError(f"d_model must be divisible by num_heads, not {d_model} by {num_heads}")
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must be divisible by num_kv_heads, not {num_heads} by {num_kv_heads}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {dropout}")
        self.d_model, self.kdim, self.vdim = d_model, kdim, vdim
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, d_model // num_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(d_model, d_model, bias)
        self.k_proj = nn.Linear(kdim, num_kv_heads * self.head_dim, bias)
        self.v_proj = nn.Linear(vdim, num_kv_heads * self.head_dim, bias)
        self.out_proj = nn.Linear(d_model, d_model, bias)
        self.rotary = rotary
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        for layer in self.projections():
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
        """The four layers: of queries, keys, values, and of what is joined."""
        return self.q_proj, self.k_proj, self.v_proj, self.out_proj

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, dropout={self.dropout}"

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
            key_padding_mask: (B, S) boolean, True is padding, at which no query looks
            attn_mask: (T, S), (B, T, S) or (B, H, T, S); boolean: True is blocked; float: added to the scores
            causal: no query looks at a later key; the last query belongs to the last key, whatever T and S
            need_weights: give each head's weights as well, before dropout, so that rows sum to one; without
                them torch's fused kernel is used
            positions: (T,) or (B, T), for `rotary`, of queries and keys alike; without it they are counted
                from 0, or on from the cache
            cache: keys and values of earlier tokens, which these follow; S then counts both, here and in masks

        Raises:
            ValueError: shapes or dtypes that do not fit, a cache without `causal`, positions without `rotary`.
        """
        self.check_inputs(query, key, value, positions, causal, cache)
        B, T, D = query.shape
        past = 0 if cache is None else cache.length
        S = past + key.shape[1]
        alone = key_padding_mask is None and attn_mask is None
        triangle = causal and alone and T == S and not need_weights  # the fused kernel has its own
        mask = merge_masks(
            B, self.num_heads, T, S, key_padding_mask, attn_mask, causal and not triangle, query.device
        )
        if key_padding_mask is not None:
            key, value = without_padding(key, value, key_padding_mask[:, past:])
        q = split_heads(self.q_proj(query), self.num_heads)  # (B, H, T, Dh)
        k = split_heads(self.k_proj(key), self.num_kv_heads)  # (B, G, S, Dh)
        v = split_heads(self.v_proj(value), self.num_kv_heads)  # (B, G, S, Dh)
        q, k = self.rotate(q, k, positions, past, causal)
        if cache is not None:
            k, v = cache.append(k, v)
        mask, dropout = fitting(mask, q), self.dropout if self.training else 0.0
        if need_weights:
            output, weights = attend_with_weights(q, k, v, mask, dropout)
        else:
            output, weights = attend_fused(q, k, v, mask, triangle, dropout), None
        joined = output.transpose(1, 2).reshape(B, T, D)
        return self.out_proj(joined), weights

    def rotate(
        self, q: Tensor, k: Tensor, positions: Tensor | None, past: int, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """Queries (B, H, T, Dh) and keys (B, G, new, Dh) at their positions, where there is `rotary`.

        Counted, the last query stands where the last key does if `causal`, else both begin at 0. Of T > S causal
        queries the first may look nowhere, and their positions, which would be negative, mean nothing.
        """
        if self.rotary is None:
            return q, k
        if positions is not None:
            return self.rotary(q, positions), self.rotary(k, positions)
        T, S = q.shape[2], past + k.shape[2]
        first_query = S - T if causal else 0
        return self.rotary(q, counted(first_query, q)), self.rotary(k, counted(past, k))

    def check_inputs(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor | None,
        causal: bool,
        cache: KVCache | None,
    ) -> None:
        """A ValueError for what does not fit."""
        wanted = {"query": (query, self.d_model), "key": (key, self.kdim), "value": (value, self.vdim)}
        for name, (x, size) in wanted.items():
            if x.ndim != 3 or x.shape[2] != size:
                raise ValueError(f"{name} must be (batch, length, {size}), not {tuple(x.shape)}")
        shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        if not len(query) == len(key) == len(value):
            raise ValueError(f"query, key and value must have one batch size: {shapes}")
        if key.shape[1] != value.shape[1]:
            raise ValueError(f"key and value must have one length: {shapes}")
        if cache is not None and not causal:
            raise ValueError("cache holds the past alone, so nothing may look ahead: call with causal=True")
        if positions is not None and self.rotary is None:
            raise ValueError("positions are for rotary, and this layer was made without")
        if positions is not None and query.shape[1] != key.shape[1]:
            raise ValueError(f"positions are of queries and keys alike, which must have one length: {shapes}")

    @classmethod
    def from_torch(cls, source: nn.MultiheadAttention) -> MultiHeadAttention:
        """The same function, with copies of the weights. Ours takes (B, length, D) whatever its `batch_first`.

        Raises:
            ValueError: `add_bias_kv` or `add_zero_attn`, which add a key that no token stands for.
        """
        for name, used in (
            ("add_bias_kv", source.bias_k is not None),
            ("add_zero_attn", source.add_zero_attn),
        ):
            if used:
                raise ValueError(f"source has {name}=True, which MultiHeadAttention cannot represent")
        weight = source.out_proj.weight
        made = cls(
            source.embed_dim,
            source.num_heads,
            bias=source.in_proj_bias is not None,
            kdim=source.kdim,
            vdim=source.vdim,
            dropout=source.dropout,
        ).to(weight.device, weight.dtype)
        with torch.no_grad():
            for layer, (weight, bias) in zip(made.projections(), parameters_of(source), strict=True):
                layer.weight.copy_(weight)
                if bias is not None:
                    layer.bias.copy_(bias)
        return made.train(source.training)

    def to_torch(self) -> nn.MultiheadAttention:
        """The same function as an `nn.MultiheadAttention(batch_first=True)`, with copies of the weights.

        Raises:
            ValueError: rotary positions or shared keys and values, which it does not have.
        """
        if self.rotary is not None:
            raise ValueError("rotary positions have no place in nn.MultiheadAttention")
        if self.num_kv_heads != self.num_heads:
            raise ValueError(
                f"nn.MultiheadAttention has num_kv_heads = num_heads, not {self.num_kv_heads} and {self.num_heads}"
            )
        weight, bias = self.out_proj.weight, self.out_proj.bias is not None
        made = nn.MultiheadAttention(
            self.d_model,
            self.num_heads,
            self.dropout,
            bias,
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=True,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            for layer, (weight, to) in zip(self.projections(), parameters_of(made), strict=True):
                weight.copy_(layer.weight)
                if to is not None:
                    to.copy_(layer.bias)
        return made.train(self.training)


def parameters_of(source: nn.MultiheadAttention) -> list[tuple[Tensor, Tensor | None]]:
    """Views of weight and bias of its four projections: of queries, keys, values, and of what is joined."""
    if source.in_proj_weight is not None:  # one matrix of 3·D rows, where all inputs have D columns
        weights = source.in_proj_weight.chunk(3)
    else:
        weights = (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)
    biases = (None,) * 3 if source.in_proj_bias is None else source.in_proj_bias.chunk(3)
    return [*zip(weights, biases, strict=True), (source.out_proj.weight, source.out_proj.bias)]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, heads·Dh) → (B, heads, L, Dh), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def counted(first: int, x: Tensor) -> Tensor | None:
    """Positions first, first + 1, … for x (B, heads, L, Dh); None, which says the same, where they start at 0."""
    if first == 0:
        return None
    return torch.arange(first, first + x.shape[2], device=x.device).clamp(min=0)
