"""Fast kernels of attention: torch's fused one, and one that returns the weights."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from experiments.nn.attention_steps import attention_steps, weighted_sum
from experiments.nn.huge_pages import in_huge_pages
from experiments.nn.masks import open_rows

TOGETHER = 2**21  # scores that are worked on at a time on a CPU: 8 MB in float32, which its cache holds


def _without_overflow(x: Tensor) -> Tensor:
    """x in float32 where it is float16: a masked score past its 65,504 is ∞, and ∞ − ∞ is NaN in a whole row."""
    return x.float() if x.dtype == torch.float16 else x


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

    By `_Weigh`, or in the five steps where autograd or the compiler has to see each of them.
    """
    # the five steps, visible to autograd and the compiler
    learnt = mask is not None and mask.requires_grad
    if dropout or learnt or torch.compiler.is_compiling():
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        steps = attention_steps(q, k, v, mask)
        if not dropout:
            return steps.output, steps.weights
        return weighted_sum(F.dropout(steps.weights, dropout), v), steps.weights

    # the kernel
    bias = nowhere = None
    if mask is not None:
        shape = (*q.shape[:3], k.shape[2])
        mask, nowhere = open_rows(mask)
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=q.dtype, device=mask.device).masked_fill_(mask, -math.inf)
        bias = mask.expand(shape)
        nowhere = None if nowhere is None else nowhere.expand(*shape[:3], 1)
    output, weights = _Weigh.apply(q, k, v, bias, nowhere)
    return output, weights


class _Weigh(torch.autograd.Function):
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
            # the scores Q Kᵀ/√d_k + M, in the memory of the weights
            part_weights = weights[part]
            a = _without_overflow(part_weights)  # the same memory, but of float16
            keys, values = k[part].flatten(0, 1), v[part].flatten(0, 1)  # (b·G, S, Dh)
            z = _by_group(a, G)  # the same memory
            queries, keys = _without_overflow(_by_group(q[part], G)), _without_overflow(keys)
            torch.baddbmm(z, queries, keys.mT, beta=0, alpha=Dh**-0.5, out=z)
            if bias is not None:
                a.add_(bias[part])

            # softmax in place, zeros in rows that are masked wholly
            _softmax_(a)
            if nowhere is not None:
                a.masked_fill_(nowhere[part], 0)
            part_weights.copy_(a)  # no copy where they are one

            output[part] = torch.bmm(_by_group(part_weights, G), values).view_as(output[part])
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
            a, g = _by_group(weights[part], G), _by_group(grad[part], G)  # (b·G, H/G·T, …)
            keys, values = k[part].flatten(0, 1), v[part].flatten(0, 1)  # (b·G, S, Dh)

            # ∂V, then ∂Z = A ⊙ (Ȯ Vᵀ + Ȧ − r)
            dv[part] = torch.bmm(a.mT, g).view_as(dv[part])
            dz = torch.bmm(g, values.mT)
            dz.sub_(_by_group(r[part], G))
            if grad_weights is not None:
                outside = _by_group(grad_weights[part], G)
                dz.add_(outside).sub_((a * outside).sum(-1, keepdim=True))
            dz.mul_(a).mul_(Dh**-0.5)

            # ∂Q and ∂K
            dq[part] = torch.bmm(dz, keys).view_as(dq[part])
            dk[part] = torch.bmm(dz.mT, _by_group(q[part], G)).view_as(dk[part])
        return dq, dk, dv, None, None


def parts(weights: Tensor) -> list[slice]:
    """Slice the batch (B, H, T, S): on a CPU as many elements as its cache holds, elsewhere all at once."""
    B = len(weights)
    step = B
    if weights.device.type == "cpu":
        step = max(1, TOGETHER // max(1, weights[:1].numel()))
    return [slice(start, start + step) for start in range(0, B, max(1, step))]


def _by_group(x: Tensor, G: int) -> Tensor:
    """(b, H, T, N) → (b·G, H/G·T, N): the queries of all heads that share keys and values."""
    b, H, T, N = x.shape
    return x.reshape(b * G, H // G * T, N)


def _softmax_(scores: Tensor) -> None:
    """Softmax along the rows, in place; sums are float32 in half precision."""
    if scores.device.type == "cpu":  # whose kernel reads all of a row before it writes
        torch.softmax(scores, -1, out=scores)
    else:
        scores.copy_(torch.softmax(scores, -1))
