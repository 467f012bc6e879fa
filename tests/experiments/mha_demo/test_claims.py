"""Each claim gives the number that it names: near zero for what is right, far from it for what is broken."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from experiments.mha_demo import claims
from experiments.nn.attention import MultiHeadAttention
from experiments.nn.attention_steps import AttentionSteps, attention_steps
from experiments.nn.masks import causal_mask

B, T, S, D, H = 1, 4, 6, 8, 2
TOLERANCE = 1e-13
BLOCKED = torch.zeros(T, S, dtype=torch.bool)
BLOCKED[:, 4:] = True  # two keys that nobody may look at, and one that the first query may not
BLOCKED[0, 2] = True


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def layer() -> MultiHeadAttention:
    torch.manual_seed(0)
    layer = MultiHeadAttention(D, H).double()
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj):
        nn.init.normal_(projection.bias)
    return layer


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return normal(B, H, T, 4, seed=1), normal(B, H, S, 4, seed=2), normal(B, H, S, 4, seed=3)


def broken(change: Callable[[AttentionSteps, Tensor, Tensor | None], tuple[Tensor, Tensor]]) -> claims.Steps:
    """The five steps with other weights and output, from the right steps, the values and the mask."""

    def steps(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> AttentionSteps:
        right = attention_steps(q, k, v, mask)
        weights, output = change(right, v, mask)
        return right._replace(weights=weights, output=output)

    return steps


def masked_late(right: AttentionSteps, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    weights = right.scaled.softmax(-1).masked_fill(torch.zeros(()).bool() if mask is None else mask, 0)
    return weights, weights @ v


def leaking(right: AttentionSteps, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    weights = right.scaled.masked_fill(torch.zeros(()).bool() if mask is None else mask, -20).softmax(-1)
    return weights, weights @ v


def without_gradient(right: AttentionSteps, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return right.weights, right.weights.detach() @ v


def unscaled(right: AttentionSteps, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    weights = (right.masked * math.sqrt(v.shape[-1])).softmax(-1)
    return weights, weights @ v


def test_rows_and_blocked_weights() -> None:
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.4, 0.2]], dtype=torch.float64)
    assert claims.row_sum_error(weights) == pytest.approx(0.1)
    blocked = torch.tensor([[False, False, True], [False, True, False]])
    assert claims.largest_blocked(weights, blocked) == 0.4
    assert claims.largest_blocked(weights, torch.zeros_like(blocked)) == 0


def test_difference_is_relative_and_shows_what_is_not_a_number() -> None:
    expected = torch.tensor([4.0, -2.0])
    assert claims.difference(torch.tensor([4.0, -1.0]), expected) == 0.25
    assert claims.difference(torch.zeros(2), torch.zeros(2)) == 0
    assert claims.difference(torch.ones(2), torch.zeros(2)) == 1
    assert math.isnan(claims.difference(torch.tensor([4.0, math.nan]), expected))
    leaves = [torch.tensor([number], requires_grad=True) for number in (2.0, 3.0)]
    assert claims._gradients(leaves[0] * leaves[1], leaves).tolist() == [3, 2]


@pytest.mark.parametrize("mask", [None, BLOCKED], ids=["open", "masked"])
def test_the_five_steps_agree_with_the_fused_kernel(
    qkv: tuple[Tensor, Tensor, Tensor], mask: Tensor | None
) -> None:
    found = claims.fused_agreement(attention_steps, *qkv, mask)
    assert set(found) == {"output", "weights", "gradients"} and max(found.values()) < TOLERANCE


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (masked_late, {"output", "weights", "gradients"}),
        (unscaled, {"output", "weights", "gradients"}),
        (without_gradient, {"gradients"}),
    ],
)
def test_broken_steps_disagree_with_the_fused_kernel(
    qkv: tuple[Tensor, Tensor, Tensor], change: Callable, shown: set[str]
) -> None:
    found = claims.fused_agreement(broken(change), *qkv, BLOCKED)
    assert {name for name, error in found.items() if error > 1e-3} == shown


def test_a_leak_is_found_in_the_steps_and_only_where_there_is_one(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    assert claims.leak(lambda k, v: attention_steps(q, k, v, BLOCKED).output, k, v, BLOCKED) == 0
    assert claims.leak(lambda k, v: broken(leaking)(q, k, v, BLOCKED).output, k, v, BLOCKED) > 1
    open_mask = torch.zeros_like(BLOCKED)
    assert claims.leak(lambda k, v: attention_steps(q, k, v, None).output, k, v, open_mask) == 0

    def spoilt(k: Tensor, v: Tensor) -> Tensor:  # as 0·∞ is
        return attention_steps(q, k, v, BLOCKED).output * (math.nan if k.max() > 1e9 else 1)

    assert math.isnan(claims.leak(spoilt, k, v, BLOCKED))


def test_the_layer_is_its_parts(layer: MultiHeadAttention) -> None:
    query, source = normal(B, T, D), normal(B, S, D, seed=1)
    assert claims.layer_error(attention_steps, layer, query, source, BLOCKED, attn_mask=BLOCKED) < TOLERANCE
    assert claims.layer_error(broken(unscaled), layer, query, source, BLOCKED, attn_mask=BLOCKED) > 1e-3


def test_split_and_join_are_each_other_s_inverse() -> None:
    x = torch.arange(12.0).view(1, 2, 6)
    assert claims.split(x, 2).tolist() == [[[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]]]]
    assert torch.equal(claims.join(claims.split(x, 3)), x)


def test_the_layer_agrees_with_torch_and_a_changed_one_does_not(layer: MultiHeadAttention) -> None:
    x = normal(B, S, D)
    causal = causal_mask(S, S)
    found = claims.torch_agreement(layer, x, x, causal, causal=True)
    assert set(found) == {"output", "weights", "gradients"} and max(found.values()) < TOLERANCE
    assert min(claims.torch_agreement(layer, x, x, causal, causal=False).values()) > 1e-3


class WithPositions(MultiHeadAttention):
    """Adds a number to each token by its place: order matters, and the way with weights differs."""

    def forward(self, query, key, value, need_weights=True, **masks):  # type: ignore[no-untyped-def, override]
        places = torch.arange(query.shape[1], dtype=query.dtype)[:, None] * need_weights
        return super().forward(query + places, key + places, value, need_weights=need_weights, **masks)


def test_order_and_ways_through_the_layer(layer: MultiHeadAttention) -> None:
    x, order = normal(B, S, D), torch.tensor([3, 1, 5, 0, 2, 4])
    assert claims.equivariance_error(layer, x, order) < TOLERANCE
    assert max(claims.paths_difference(layer, x, causal) for causal in (False, True)) < 1e-12
    torch.manual_seed(0)
    other = WithPositions(D, H).double()
    assert claims.equivariance_error(other, x, order) > 1e-3
    assert claims.paths_difference(other, x, causal=False) > 1e-3


class Plain(MultiHeadAttention):
    """softmax as it stands: 0/0 where everything is masked."""

    fill = -math.inf

    def forward(self, query, key, value, attn_mask=None, need_weights=True):  # type: ignore[no-untyped-def, override]
        q, k, v = claims.projected(self, query, key)
        scores = (q @ k.mT / 2).masked_fill(attn_mask, self.fill)
        weights = scores.softmax(-1)
        return self.out_proj(claims.join(weights @ v)), weights if need_weights else None


class Uniform(Plain):
    """A large number for infinity, as some do: a query that may look nowhere looks everywhere."""

    fill = -1e9


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_query_that_may_look_nowhere(layer: MultiHeadAttention, need_weights: bool) -> None:
    x = normal(B, S, D)
    assert claims.masked_row(layer, x, need_weights) == (0, 0, 0)
    assert claims.masked_row(Plain(D, H).double(), x, need_weights)[2] > 0
    weight, output, not_finite = claims.masked_row(Uniform(D, H).double(), x, need_weights)
    assert not_finite == 0 and output > 1e-3
    assert weight == (pytest.approx(1 / S) if need_weights else 0)


@torch.no_grad()
def test_split_then_project_sees_a_head_s_own_components_alone(layer: MultiHeadAttention) -> None:
    """By loops over heads and tokens, with the diagonal blocks cut out by hand."""
    x = normal(B, T, D)
    heads, projections = [], (layer.q_proj, layer.k_proj, layer.v_proj)
    for h in range(H):
        own = slice(h * 4, h * 4 + 4)
        q, k, v = (x[0, :, own] @ p.weight[own, own].T + p.bias[own] for p in projections)
        rows = []
        for t in range(T):
            scores = [float(q[t] @ k[s]) / 2 for s in range(T)]
            total = sum(math.exp(score) for score in scores)
            rows.append(sum((math.exp(scores[s]) / total * v[s] for s in range(T)), torch.zeros(4)))
        heads.append(torch.stack(rows))
    expected = layer.out_proj(torch.cat(heads, dim=1))
    torch.testing.assert_close(claims.split_then_project(layer, x)[0], expected, rtol=0, atol=1e-12)


def test_the_two_orders_are_one_function_for_block_diagonal_weights_alone(layer: MultiHeadAttention) -> None:
    x, block = normal(B, T, D), claims.block_diagonal(layer)
    assert claims.split_difference(block, x) < TOLERANCE
    assert claims.split_difference(layer, x) > 0.1
    assert torch.equal(block.k_proj.weight[:4, :4], layer.k_proj.weight[:4, :4])
    assert not block.k_proj.weight[:4, 4:].any() and not block.k_proj.weight[4:, :4].any()
    assert layer.k_proj.weight[:4, 4:].all()  # the layer itself is as it was


def test_statistics_of_equal_scores_and_of_decided_ones_by_closed_form() -> None:
    found = claims.statistics(torch.full((50, 8), 3.0, dtype=torch.float64))
    assert found.std == pytest.approx(3) and found.std_error == pytest.approx(0)
    assert found.entropy == pytest.approx(math.log(8)) and found.largest == pytest.approx(1 / 8)
    assert found.gradient == pytest.approx(math.sqrt(1 / 8 - 2 / 64 + 1 / 64))
    found = claims.statistics(torch.eye(8, dtype=torch.float64) * 1e4)
    assert (found.entropy, found.largest, found.gradient) == (0, 1, 0)


def test_the_gradient_is_the_norm_of_softmax_s_jacobian() -> None:
    scores = normal(20, 8, seed=5) * 3
    jacobians = [torch.autograd.functional.jacobian(lambda s: s.softmax(-1), row) for row in scores]
    norms = torch.stack([jacobian.norm() for jacobian in jacobians])
    assert claims.statistics(scores).gradient == pytest.approx(float(norms.mean()), rel=1e-12)


def test_the_standard_error_is_that_of_repeated_draws() -> None:
    """The spread of 200 standard deviations, each of 100 queries, against the error that each claims."""
    streams = [torch.Generator().manual_seed(i) for i in range(200)]
    draws = [claims.random_scores(attention_steps, 16, 100, 8, stream)[0] for stream in streams]
    found = [claims.statistics(scores) for scores in draws]
    spread = torch.tensor([one.std for one in found]).std()
    claimed = torch.tensor([one.std_error for one in found]).mean()
    assert float(spread / claimed) == pytest.approx(1, abs=0.15)


def test_random_scores_spread_by_the_root_of_d_k_and_scaled_ones_by_one() -> None:
    raw, scaled = claims.random_scores(attention_steps, 64, 2000, 8, torch.Generator().manual_seed(0))
    assert raw.shape == scaled.shape == (2000, 8)
    assert float(raw.std()) == pytest.approx(8, rel=0.02) and float(raw.mean()) == pytest.approx(0, abs=0.3)
    torch.testing.assert_close(scaled, raw / 8, rtol=1e-6, atol=1e-6)
