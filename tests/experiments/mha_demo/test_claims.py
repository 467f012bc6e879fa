"""Each claim gives the number that it names: near zero for what is right, far from it for what is broken."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from experiments.data.lookups import Lookups
from experiments.mha_demo import MHADemo, checks, claims, task
from experiments.nn.attention import MultiHeadAttention
from experiments.nn.attention_steps import AttentionSteps, attention_steps
from experiments.nn.lookup_net import LookupNet
from experiments.nn.masks import causal_mask, merge_masks
from tests.experiments.conftest import broken_claims, failed_checks

B, T, S, D, H = 1, 4, 6, 8, 2
AGREEMENT = {"output", "weights", "gradients"}
FUSED = "fused_output fused_weights fused_gradients"
BLOCKED = torch.zeros(T, S, dtype=torch.bool)
BLOCKED[:, 4:] = True  # two keys that nobody may look at, and one that the first query may not
BLOCKED[0, 2] = True


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, K, V = normal(B, H, T, 4, seed=1), normal(B, H, S, 4, seed=2), normal(B, H, S, 4, seed=3)


def seeded(kind: type[MultiHeadAttention]) -> MultiHeadAttention:
    torch.manual_seed(0)
    layer = kind(D, H).double()
    for projection in layer.projections():
        nn.init.normal_(projection.bias)
    return layer


@pytest.fixture
def layer() -> MultiHeadAttention:
    return seeded(MultiHeadAttention)


# what is broken


def masked_late(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> AttentionSteps:
    """The mask after the softmax: rows no longer sum to one."""
    right = attention_steps(q, k, v)
    weights = right.weights if mask is None else right.weights.masked_fill(mask, 0)
    return right._replace(weights=weights, output=weights @ v)


def unscaled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> AttentionSteps:
    """No division by √d_k."""
    return attention_steps(q * q.shape[-1] ** 0.5, k, v, mask)._replace(scores=q @ k.mT)


def leaking(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> AttentionSteps:
    """A large number for infinity."""
    return attention_steps(q, k, v, -20.0 * mask)


def spoilt(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> AttentionSteps:
    """NaN where a masked key is large, as 0·∞ is."""
    right = attention_steps(q, k, v, mask)
    return right._replace(output=right.output * (math.nan if k.max() > 1e9 else 1))


def without_gradient(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> AttentionSteps:
    right = attention_steps(q, k, v, mask)
    return right._replace(output=right.weights.detach() @ v)


class Untransposed(MultiHeadAttention):
    """Heads joined without the transpose that brings a token's parts together."""

    def forward(self, query, key, value, need_weights=True, **masks):
        mask = merge_masks(B, H, query.shape[1], key.shape[1], **masks)
        steps = attention_steps(*claims.projected(self, query, key), mask)
        return self.out_proj(steps.output.reshape(query.shape)), steps.weights if need_weights else None


class WithPositions(MultiHeadAttention):
    """Adds a number to each token by its place: order matters, and the way with weights differs."""

    def forward(self, query, key, value, need_weights=True, **masks):
        places = torch.arange(query.shape[1], dtype=query.dtype)[:, None] * need_weights
        return super().forward(query + places, key + places, value, need_weights=need_weights, **masks)


class Plain(MultiHeadAttention):
    """softmax as it stands: 0/0 where everything is masked."""

    fill = -math.inf

    def forward(self, query, key, value, attn_mask=None, need_weights=True):
        q, k, v = claims.projected(self, query, key)
        weights = (q @ k.mT / 2).masked_fill(attn_mask, self.fill).softmax(-1)
        return self.out_proj(claims.join(weights @ v)), weights if need_weights else None


class Uniform(Plain):
    """A large number for infinity, as some do: a query that may look nowhere looks everywhere."""

    fill = -1e9


class EndlessSlope(MultiHeadAttention):
    """Adds √0 to what is right: the gradient alone is no number."""

    def forward(self, query, key, value, **masks):
        output, weights = super().forward(query, key, value, **masks)
        return output + (0 * query).sqrt(), weights


@pytest.mark.parametrize(
    ("broken", "caught"),
    [
        ({}, ""),
        (
            {"attention_steps": masked_late},
            f"rows_sum_to_one masked_never_leaks steps_make_the_layer {FUSED}",
        ),
        ({"attention_steps": unscaled}, f"scaled_std scaled_gradient steps_make_the_layer {FUSED}"),
        (
            {"MultiHeadAttention": Untransposed},
            "torch_output torch_gradients permutation steps_make_the_layer"
            " masked_never_leaks masked_row split_block_diagonal",
        ),
    ],
)
def test_a_broken_attention_fails_the_checks_that_it_breaks_and_no_others(broken, caught, monkeypatch):
    monkeypatch.setattr(task, "figures", Mock())
    for name, value in broken.items():
        monkeypatch.setattr(task, name, value)
        monkeypatch.setattr(checks, name, value)
    demo = MHADemo(LookupNet, Lookups(), [1, 2], queries=500)
    monkeypatch.setattr(demo, "_attention_maps", Mock())
    monkeypatch.setattr(demo, "_mean_weights", Mock())
    assert failed_checks(demo.before) == set(caught.split())


# claims


def test_rows_and_blocked_weights():
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.4, 0.2]], dtype=torch.float64)
    blocked = torch.tensor([[False, False, True], [False, True, False]])
    assert claims.row_sum_error(weights) == pytest.approx(0.1)
    assert claims.largest_blocked(weights, blocked) == 0.4
    assert claims.largest_blocked(weights, torch.zeros_like(blocked)) == 0


def test_difference_is_relative_and_shows_what_is_not_a_number():
    expected = torch.tensor([4.0, -2.0])
    assert claims.difference(torch.tensor([4.0, -1.0]), expected) == 0.25
    assert claims.difference(torch.zeros(2), torch.zeros(2)) == 0
    assert claims.difference(torch.ones(2), torch.zeros(2)) == 1
    assert math.isnan(claims.difference(torch.tensor([4.0, math.nan]), expected))
    leaves = [torch.tensor([number], requires_grad=True) for number in (2.0, 3.0)]
    assert claims._gradients(leaves[0] * leaves[1], leaves).tolist() == [3, 2]


@pytest.mark.parametrize(
    ("steps", "mask", "shown"),
    [
        (attention_steps, None, set()),
        (attention_steps, BLOCKED, set()),
        (masked_late, BLOCKED, AGREEMENT),
        (unscaled, BLOCKED, AGREEMENT),
        (without_gradient, BLOCKED, {"gradients"}),
    ],
)
def test_the_five_steps_agree_with_the_fused_kernel_and_broken_ones_do_not(steps, mask, shown):
    errors = claims.fused_agreement(steps, Q, K, V, mask)
    assert set(errors) == AGREEMENT and broken_claims(errors, 1e-13) == shown


def test_a_leak_is_found_in_the_steps_and_only_where_there_is_one():
    def leak(steps: Callable[..., AttentionSteps], mask: Tensor = BLOCKED) -> float:
        return claims.leak(lambda k, v: steps(Q, k, v, mask).output, K, V, mask)

    assert leak(attention_steps) == leak(attention_steps, torch.zeros_like(BLOCKED)) == 0
    assert leak(leaking) > 1 and math.isnan(leak(spoilt))


def test_the_layer_is_its_parts(layer):
    x = torch.arange(12.0).view(1, 2, 6)
    assert claims.split(x, 2).tolist() == [[[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]]]]
    assert torch.equal(claims.join(claims.split(x, 3)), x)
    query, source = normal(B, T, D), normal(B, S, D, seed=1)
    assert claims.layer_error(attention_steps, layer, query, source, BLOCKED, attn_mask=BLOCKED) < 1e-13
    assert claims.layer_error(unscaled, layer, query, source, BLOCKED, attn_mask=BLOCKED) > 1e-3


def test_the_layer_agrees_with_torch_and_a_changed_one_does_not(layer):
    x = normal(B, S, D)
    for causal, shown in ((True, set()), (False, AGREEMENT)):
        errors = claims.torch_agreement(layer, x, x, causal_mask(S, S), causal=causal)
        assert set(errors) == AGREEMENT and broken_claims(errors, 1e-13) == shown


def test_order_and_ways_through_the_layer(layer):
    x, order = normal(B, S, D), torch.tensor([3, 1, 5, 0, 2, 4])
    for attention, shown in ((layer, set()), (seeded(WithPositions), {"order", "ways", "ways, causal"})):
        errors = {
            "order": claims.equivariance_error(attention, x, order),
            "ways": claims.paths_difference(attention, x, causal=False),
            "ways, causal": claims.paths_difference(attention, x, causal=True),
        }
        assert broken_claims(errors, 1e-12) == shown


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_query_that_may_look_nowhere(layer, need_weights):
    x = normal(B, S, D)
    assert claims.masked_row(layer, x, need_weights) == (0, 0, 0)
    assert claims.masked_row(seeded(Plain), x, need_weights)[2] > 0
    assert claims.masked_row(seeded(EndlessSlope), x, need_weights)[2] > 0
    weight, output, not_finite = claims.masked_row(seeded(Uniform), x, need_weights)
    assert not_finite == 0 and output > 1e-3
    assert weight == (pytest.approx(1 / S) if need_weights else 0)


@torch.no_grad()
def test_split_then_project_sees_a_head_s_own_components_alone(layer):
    """Head by head, with the diagonal blocks cut out by hand."""
    x, heads = normal(B, T, D), []
    for own in (slice(0, 4), slice(4, 8)):
        q, k, v = (x[0, :, own] @ p.weight[own, own].T + p.bias[own] for p in layer.projections()[:3])
        weights = (q @ k.T / 2).exp()
        heads.append(weights / weights.sum(1, keepdim=True) @ v)
    expected = layer.out_proj(torch.cat(heads, dim=1))
    torch.testing.assert_close(claims.split_then_project(layer, x)[0], expected, rtol=0, atol=1e-12)


def test_the_two_orders_are_one_function_for_block_diagonal_weights_alone(layer):
    x, block = normal(B, T, D), claims.block_diagonal(layer)
    assert claims.split_difference(block, x) < 1e-13 < 0.1 < claims.split_difference(layer, x)
    assert torch.equal(block.k_proj.weight[:4, :4], layer.k_proj.weight[:4, :4])
    assert not block.k_proj.weight[:4, 4:].any() and not block.k_proj.weight[4:, :4].any()
    assert layer.k_proj.weight[:4, 4:].all()  # the layer itself is as it was


def test_statistics_of_equal_scores_and_of_decided_ones_by_closed_form():
    equal = astuple(claims.statistics(torch.full((50, 8), 3.0, dtype=torch.float64)))
    assert equal == pytest.approx((3, 0, math.log(8), 1 / 8, math.sqrt(1 / 8 - 2 / 64 + 1 / 64)))
    assert astuple(claims.statistics(torch.eye(8, dtype=torch.float64) * 1e4))[2:] == (0, 1, 0)


def test_the_gradient_is_the_norm_of_softmax_s_jacobian():
    scores, jacobian = normal(20, 8, seed=5) * 3, torch.autograd.functional.jacobian
    norms = [float(jacobian(lambda s: s.softmax(-1), row).norm()) for row in scores]
    assert claims.statistics(scores).gradient == pytest.approx(sum(norms) / 20, rel=1e-12)


def test_the_standard_error_is_that_of_repeated_draws():
    """The spread of 200 standard deviations, each of 100 queries, against the error that each claims."""
    streams = [torch.Generator().manual_seed(i) for i in range(200)]
    draws = (claims.random_scores(attention_steps, 16, 100, 8, stream)[0] for stream in streams)
    stds, claimed, *_ = torch.tensor([astuple(claims.statistics(scores)) for scores in draws]).T
    assert float(stds.std() / claimed.mean()) == pytest.approx(1, abs=0.15)


def test_random_scores_spread_by_the_root_of_d_k_and_scaled_ones_by_one():
    raw, scaled = claims.random_scores(attention_steps, 64, 2000, 8, torch.Generator().manual_seed(0))
    assert raw.shape == scaled.shape == (2000, 8)
    assert float(raw.std()) == pytest.approx(8, rel=0.02) and float(raw.mean()) == pytest.approx(0, abs=0.3)
    torch.testing.assert_close(scaled, raw / 8, rtol=1e-6, atol=1e-6)
