"""Properties of attention, each as a function that returns the number to compare with a tolerance.

The attention under test is an argument, so that the tests can try a wrong one. Numbers are largest deviations
unless they say otherwise, relative to the largest entry of what they are compared with.

    q, k ~ N(0, 1)^d_k  ⇒  E q·k = 0,  Var q·k = d_k,  Var q·k/√d_k = 1       Vaswani et al. 2017, note 4     (1)
    ∂p_i/∂s_j = p_i (δ_ij − p_j)  of  p = softmax(s),  ‖∂p/∂s‖_F² = Σp² − 2 Σp³ + (Σp²)²                      (2)

Letters in shapes: B batch, H heads, T queries, S source (keys), D model size, Dh = D/H, N samples.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.nn.attention import MultiHeadAttention
from experiments.nn.attention_steps import AttentionSteps
from experiments.nn.exactness import largest

Steps = Callable[[Tensor, Tensor, Tensor, Tensor | None], AttentionSteps]
Agreement = dict[str, float]  # output, weights, gradients: the largest relative difference of each

_HUGE = 1e10  # entries of masked tokens, to see whether they leak
_CHUNK = 250  # queries whose scores are drawn at a time: 250 × 8 keys × 1,024 numbers are 16 MB


def difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest deviation over the largest entry of `expected`; NaN where either holds one."""
    actual, expected = actual.detach(), expected.detach()
    size = expected.abs().max()
    return float((actual - expected).abs().max() / torch.where(size == 0, 1.0, size))


# the five steps


def row_sum_error(weights: Tensor) -> float:
    """Return how far the sums of the rows (…, T, S) are from one."""
    return float((weights.detach().sum(-1) - 1).abs().max())


def largest_blocked(weights: Tensor, blocked: Tensor) -> float:
    """Return the largest weight (…, T, S) where `blocked` (T, S) is True; 0 where nothing is."""
    return float(weights.detach().masked_fill(~blocked, 0).abs().max())


def leak(attend: Callable[[Tensor, Tensor], Tensor], k: Tensor, v: Tensor, blocked: Tensor) -> float:
    """Return how far keys and values of 1e10 change the outputs of those queries that may not attend to them.

    `attend` takes keys and values (…, S, any) and returns outputs (…, T, any), with the mask `blocked` (T, S);
    each source in turn is made so large.
    """
    expected, leaks = attend(k, v), [0.0]
    for source in range(k.shape[-2]):
        large = torch.zeros(k.shape[-2], 1, dtype=torch.bool)
        large[source] = True
        output = attend(k.masked_fill(large, _HUGE), v.masked_fill(large, _HUGE))
        unaware = blocked[:, source]  # (T,)
        if unaware.any():
            leaks.append(difference(output[..., unaware, :], expected[..., unaware, :]))
    return largest(leaks)


def fused_agreement(steps: Steps, q: Tensor, k: Tensor, v: Tensor, blocked: Tensor | None) -> Agreement:
    """Compare the five steps with torch's fused kernel, with the gradients of q, k and v.

    The kernel does not return its weights; values that are the rows of the identity make them its output.
    """
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    allowed = None if blocked is None else ~blocked
    ours = steps(q, k, v, blocked)
    theirs = F.scaled_dot_product_attention(q, k, v, allowed)
    S = k.shape[-2]
    identity = torch.eye(S, dtype=q.dtype).expand(*k.shape[:-1], S)
    return {
        "output": difference(ours.output, theirs),
        "weights": difference(ours.weights, F.scaled_dot_product_attention(q, k, identity, allowed)),
        "gradients": difference(_gradients(ours.output, (q, k, v)), _gradients(theirs, (q, k, v))),
    }


def _gradients(output: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """Return the gradients of a loss that weights every entry of the output differently, one after the other.

    They are compared as one: a key's bias shifts all scores of a query alike, its gradient is but rounding.
    """
    direction = torch.cos(torch.arange(output.numel(), dtype=output.dtype)).view_as(output)
    # zeros where no gradient arrives, so that a detached graph shows as a number
    gradients = torch.autograd.grad((output * direction).sum(), leaves, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


# several heads


def join(heads: Tensor) -> Tensor:
    """Join heads (B, H, T, Dh) into (B, T, D)."""
    return heads.transpose(1, 2).flatten(2)


def split(x: Tensor, num_heads: int) -> Tensor:
    """Split (B, T, D) into heads, (B, H, T, Dh)."""
    B, T, D = x.shape
    return x.reshape(B, T, num_heads, D // num_heads).transpose(1, 2)


def projected(attention: MultiHeadAttention, query: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q (B, H, T, Dh), k and v (B, H, S, Dh) of a layer whose keys and values come from `source`."""
    H = attention.num_heads
    q, k, v = attention.q_proj(query), attention.k_proj(source), attention.v_proj(source)
    return split(q, H), split(k, H), split(v, H)


def layer_error(
    steps: Steps, attention: MultiHeadAttention, query: Tensor, source: Tensor, blocked: Tensor, **masks: Any
) -> float:
    """Compare the layer, with its arguments `masks`, with its parts: project, split, five steps, join, project."""
    heads = steps(*projected(attention, query, source), blocked).output
    output, _ = attention(query, source, source, **masks)
    return difference(output, attention.out_proj(join(heads)))


def torch_agreement(
    attention: MultiHeadAttention, query: Tensor, source: Tensor, blocked: Tensor, **masks: Any
) -> Agreement:
    """Compare the layer with torch's of the same weights, and the gradients of these weights and of the inputs.

    Ours takes its mask as its arguments `masks`, torch's as `blocked` (T, S).
    """
    # torch's layer, which packs q, k and v into one weight and one bias, in this order
    layers = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
    weights: list[Tensor] = [layer.weight for layer in layers]
    biases: list[Tensor] = [layer.bias for layer in layers]
    D, H = attention.d_model, attention.num_heads
    theirs = nn.MultiheadAttention(D, H, batch_first=True, dtype=query.dtype)
    packed = [theirs.in_proj_weight, theirs.out_proj.weight, theirs.in_proj_bias, theirs.out_proj.bias]
    with torch.no_grad():
        for parameter, own in zip(packed, (weights[:3], weights[3:], biases[:3], biases[3:]), strict=True):
            parameter.copy_(torch.cat(own))

    # outputs
    query, source = (x.detach().clone().requires_grad_() for x in (query, source))
    output, attended = attention(query, source, source, **masks)
    their_output, their_weights = theirs(query, source, source, attn_mask=blocked, average_attn_weights=False)

    # gradients
    gradients = _gradients(output, [query, source, *weights, *biases])
    return {
        "output": difference(output, their_output),
        "weights": difference(attended, their_weights),
        "gradients": difference(gradients, _gradients(their_output, [query, source, *packed])),
    }


def paths_difference(attention: MultiHeadAttention, x: Tensor, causal: bool) -> float:
    """Compare the output with weights with the one without, which another kernel computes."""
    with_weights, _ = attention(x, x, x, causal=causal, need_weights=True)
    without, _ = attention(x, x, x, causal=causal, need_weights=False)
    return difference(without, with_weights)


def equivariance_error(attention: MultiHeadAttention, x: Tensor, order: Tensor) -> float:
    """Compare self-attention of the reordered tokens with its reordered outputs: f(Px) = P f(x)."""
    return difference(attention(x[:, order], x[:, order], x[:, order])[0], attention(x, x, x)[0][:, order])


def masked_row(attention: MultiHeadAttention, x: Tensor, need_weights: bool) -> tuple[float, float, int]:
    """Mask all keys of the last of the queries x (B, T, D), and none of the others'.

    Returns:
        Its largest weight, its output's largest deviation from the output projection of zeros, and how many
        numbers of the output and of all gradients are not finite.
    """
    blocked = torch.zeros(x.shape[1], x.shape[1], dtype=torch.bool)
    blocked[-1] = True
    leaf = x.detach().clone().requires_grad_()
    output, weights = attention(leaf, leaf, leaf, attn_mask=blocked, need_weights=need_weights)
    gradients = torch.autograd.grad(output.square().sum(), [leaf, *attention.parameters()])
    of_zeros = attention.out_proj(torch.zeros_like(output[:, -1]))
    return (
        0.0 if weights is None else float(weights[:, :, -1].detach().abs().max()),
        float((output[:, -1] - of_zeros).detach().abs().max()),
        sum(int((~torch.isfinite(tensor)).sum()) for tensor in (output, *gradients)),
    )


# split, then project each head


def split_then_project(attention: MultiHeadAttention, x: Tensor) -> Tensor:
    """Cut the tokens x (B, T, D) into heads first, then give each head its own (Dh, Dh) projections.

    These are the blocks on the diagonals of the layer's matrices: head h sees the Dh numbers h·Dh … of a token
    and no others. The output projection is the layer's.
    """
    parts = split(x, attention.num_heads)  # (B, H, T, Dh)
    q, k, v = (
        torch.einsum("bhtc,hec->bhte", parts, _diagonal_blocks(layer.weight, attention.num_heads))
        + layer.bias.view(attention.num_heads, 1, -1)
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    output: Tensor = attention.out_proj(join(F.scaled_dot_product_attention(q, k, v)))
    return output


def _diagonal_blocks(weight: Tensor, num_heads: int) -> Tensor:
    """Return the blocks (H, Dh, Dh) on the diagonal of a matrix (D, D)."""
    Dh = len(weight) // num_heads
    blocks = weight.view(num_heads, Dh, num_heads, Dh)
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)


def block_diagonal(attention: MultiHeadAttention) -> MultiHeadAttention:
    """Return a copy of the layer whose q, k and v projections have their diagonal blocks alone."""
    changed = copy.deepcopy(attention)
    blocks = torch.kron(torch.eye(attention.num_heads), torch.ones(attention.head_dim, attention.head_dim))
    with torch.no_grad():
        for layer in (changed.q_proj, changed.k_proj, changed.v_proj):
            layer.weight.mul_(blocks)
    return changed


def split_difference(attention: MultiHeadAttention, x: Tensor) -> float:
    """Compare project-then-split with split-then-project with the diagonal blocks of the same weights."""
    return difference(attention(x, x, x)[0], split_then_project(attention, x))


# why √d_k


@dataclass(frozen=True)
class ScoreStatistics:
    """Means over queries, of scores and of their softmax over the keys."""

    std: float  # of the scores
    std_error: float  # the standard error of `std`
    entropy: float  # of the weights, in nats; log S where all are equal
    largest: float  # weight
    gradient: float  # ‖∂p/∂s‖_F, equation (2)


def statistics(scores: Tensor) -> ScoreStatistics:
    """Return the statistics of scores (N, S) of N queries with S keys each."""
    p = scores.softmax(-1)
    squares, cubes = p.square().sum(-1), p.pow(3).sum(-1)
    variances = scores.square().mean(-1)  # (N,), the mean of q·k being 0; one query's scores share its length
    std = variances.mean().sqrt()
    return ScoreStatistics(
        std=float(std),
        std_error=float(variances.std() / math.sqrt(len(scores)) / (2 * std)),
        entropy=float(-torch.special.xlogy(p, p).sum(-1).mean()),
        largest=float(p.amax(-1).mean()),
        gradient=float((squares - 2 * cubes + squares.square()).clamp(min=0).sqrt().mean()),
    )


def random_scores(
    steps: Steps, d_k: int, queries: int, keys: int, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return q·k of standard normal q and k after the first and the second step: (N, S) float64 each."""
    raw, scaled = [], []
    for start in range(0, queries, _CHUNK):
        n = min(_CHUNK, queries - start)
        q = torch.randn(n, 1, d_k, generator=random)
        k = torch.randn(n, keys, d_k, generator=random)
        result = steps(q, k, k[..., :1], None)
        raw.append(result.scores.squeeze(1).double())  # (n, S)
        scaled.append(result.scaled.squeeze(1).double())
    return torch.cat(raw), torch.cat(scaled)
