"""Scaled dot-product attention, step by step (Vaswani et al. 2017, eq. 1)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.nn.checks import floating
from experiments.nn.masks import check_mask


class AttentionSteps(NamedTuple):
    """What each of the five steps of equation (1) gives; in half precision the first three are float32."""

    scores: Tensor  # (…, T, S): Q Kᵀ
    scaled: Tensor  # (…, T, S): divided by √d_k
    masked: Tensor  # (…, T, S): −∞ where a query may not attend
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
    """Return what each step of equation (1) gives.

    Args:
        q: queries (…, T, Dh)
        k: keys (…, S, Dh)
        v: values (…, S, any size)
        mask: broadcasts to (…, T, S); boolean: True is blocked; float: added to the scaled scores

    Raises:
        ValueError: shapes that do not fit, integers, a mask that is neither boolean nor float.
    """
    _check_operands(q, k, v)
    scores = scores_of(q, k)
    if mask is not None:
        check_mask("mask", mask)
        shape, sizes = tuple(scores.shape), zip(reversed(mask.shape), reversed(scores.shape), strict=False)
        if mask.ndim > len(shape) or not all(n in (1, m) for n, m in sizes):
            raise ValueError(f"mask must broadcast to the scores' {shape}, got {tuple(mask.shape)}")

    # steps 2 to 5
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


def _check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    floating(q=q, k=k, v=v)
    try:
        torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
        fits = min(q.ndim, k.ndim, v.ndim) > 1 and q.shape[-1] == k.shape[-1] and k.shape[-2] == v.shape[-2]
    except RuntimeError:
        fits = False
    if not fits:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"expected q (…, T, d_k), k (…, S, d_k) and v (…, S, any size), got {shapes}")
