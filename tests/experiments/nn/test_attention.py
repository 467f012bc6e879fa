"""Attention against its formula, torch.nn.MultiheadAttention, the fused kernel, and itself in parts.

Letters in shapes: B batch, H heads, G heads of keys and values, T queries, S source, D model size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.nn import attention_kernels
from experiments.nn.attention import MultiHeadAttention
from experiments.nn.attention_kernels import attend_fused, attend_with_weights
from experiments.nn.attention_steps import AttentionSteps, attention_steps, scaled_dot_product_attention
from experiments.nn.kv_cache import KVCache
from experiments.nn.masks import causal_mask, merge_masks
from experiments.nn.positions import RotaryPosEncoding
from tests.experiments.nn.helpers import BOTH_WAYS, F64, all_near, drawn, near, randn, refusals, refused

B, H, T, S, D = 3, 4, 5, 7, 16


def draw_qkv(*sizes: int, grad: bool = True) -> list[Tensor]:
    """Queries of T, keys and values of S, batch first."""
    return [randn(B, n, size, grad=grad) for n, size in zip((T, S, S), sizes or (D, D, D), strict=True)]


def make(**kwargs: Any) -> Any:
    """Make a layer, the same one for the same arguments."""
    torch.manual_seed(0)
    return drawn(MultiHeadAttention(D, H, **kwargs))


def padding() -> Tensor:
    """(B, S): nothing, one in the middle, and all but two are padding."""
    mask = torch.zeros(B, S, dtype=torch.bool)
    mask[1, 3] = mask[2, 2:] = True
    return mask


def seldom(*shape: int) -> Tensor:
    """A boolean mask that leaves the first key to every query."""
    blocked = torch.rand(*shape) < 0.4
    blocked[..., 0] = False
    return blocked


def as_float(mask: Tensor) -> Tensor:
    if mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=F64).masked_fill(mask, -math.inf)


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of a scalar that weighs every number of the output differently."""
    weighed = output * torch.linspace(-1, 2, output.numel(), dtype=F64).sin().view_as(output)
    return list(torch.autograd.grad(weighed.sum(), inputs, retain_graph=True))


# the five steps


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The five steps with products, sums and exponentials alone."""
    scores = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1)  # (…, T, S)
    scaled = scores / q.shape[-1] ** 0.5
    masked = scaled if mask is None else scaled + as_float(mask)
    weights = (masked.exp() / masked.exp().sum(-1, keepdim=True)).nan_to_num()  # 0/0 is 0
    return [scores, scaled, masked, weights, (weights.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)]


MASKS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "boolean": lambda: seldom(T, S),
    "causal": lambda: causal_mask(T, S),
    "float": lambda: randn(T, S),
    "float and blocked": lambda: randn(T, S).masked_fill(seldom(T, S), -math.inf),
    "padding": lambda: padding()[:, None, None],
    "a row of nothing": lambda: seldom(T, S).index_fill(0, torch.tensor([2]), True),
}


@pytest.mark.parametrize("name", MASKS)
def test_the_five_steps_are_the_formula(name):
    q, k, v, mask = randn(B, H, T, 3), randn(B, H, S, 3), randn(B, H, S, 2), MASKS[name]()
    steps = attention_steps(q, k, v, mask)
    all_near(steps, formula(q, k, v, mask), 1e-12)
    output, weights = scaled_dot_product_attention(q, k, v, mask)
    assert torch.equal(output, steps.output) and torch.equal(weights, steps.weights)


@pytest.mark.parametrize("G", [1, 2, H])
@pytest.mark.parametrize("name", [name for name in MASKS if name != "a row of nothing"])
def test_all_ways_agree_with_torchs_function_and_their_gradients_too(name, G):
    mask, inputs = MASKS[name](), [randn(B, *shape, 6, grad=True) for shape in ((H, T), (G, S), (G, S))]
    repeated = [x.repeat_interleave(H // x.shape[1], 1) for x in inputs]
    theirs = F.scaled_dot_product_attention(*repeated, None if mask is None else as_float(mask))
    steps, (output, weights) = attention_steps(*repeated, mask), attend_with_weights(*inputs, mask)
    near(weights, steps.weights)
    for ours in (steps.output, output, attend_fused(*inputs, mask)):
        all_near([ours, *gradients(ours, inputs)], [theirs, *gradients(theirs, inputs)])


def test_causal_masks_end_in_the_lower_right_corner():
    assert causal_mask(2, 4).int().tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]
    assert causal_mask(3, 3).int().tolist() == [[0, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert causal_mask(3, 2).int().tolist() == [[1, 1], [0, 1], [0, 0]]
    assert merge_masks(B, H, 1, S) is merge_masks(B, H, 1, S, causal=True) is None  # the last query sees all


# against torch.nn.MultiheadAttention


def compare(theirs: nn.MultiheadAttention, inputs: list[Tensor], ours_masks: Any, masks: Any) -> None:
    """Output, each head's weights, and the gradients of every parameter and input, with and without weights."""
    expected, expected_weights = theirs(*inputs, **masks, average_attn_weights=False)

    # their parameters' gradients in our order: a copy of the layer holds them in place of its weights
    holder, parameters = copy.deepcopy(theirs), [*theirs.parameters()]
    for held, gradient in zip(holder.parameters(), gradients(expected, parameters), strict=True):
        held.data = gradient
    numbers = [expected, *gradients(expected, inputs), *MultiHeadAttention.from_torch(holder).parameters()]

    for need_weights in (True, False):
        ours = MultiHeadAttention.from_torch(theirs)
        output, weights = ours(*inputs, **ours_masks, need_weights=need_weights)
        all_near([output, *gradients(output, [*inputs, *ours.parameters()])], numbers)
        assert (weights is not None) == need_weights
        if need_weights:
            near(weights, expected_weights)


@pytest.mark.parametrize(
    "kwargs", [{}, {"bias": False}, {"kdim": 6, "vdim": 10}, {"vdim": 10, "bias": False}], ids=str
)
def test_every_layer_of_torch_is_the_same_function(kwargs):
    theirs = drawn(nn.MultiheadAttention(D, H, batch_first=True, dropout=0.25, **kwargs))
    inputs = draw_qkv(D, theirs.kdim, theirs.vdim)
    compare(theirs, inputs, {}, {})
    if theirs.in_proj_weight is not None:
        compare(theirs, inputs[:1] * 3, {}, {})

    # there and back, with copies of the weights; ours has the batch first in any case
    theirs.batch_first = False
    ours, state = MultiHeadAttention.from_torch(theirs), copy.deepcopy(theirs.state_dict())
    theirs.out_proj.weight.data.zero_()
    back = ours.to_torch()
    near(back(*inputs)[0], ours(*inputs)[0])
    ours.out_proj.weight.data.zero_()
    torch.testing.assert_close(back.state_dict(), state, rtol=0, atol=0)
    assert back.batch_first and ours.dropout == back.dropout == 0.25 and not (ours.training or back.training)
    kinds = ["weight", "bias"] if ours.out_proj.bias is not None else ["weight"]
    assert [*ours.state_dict()] == [f"{x}_proj.{kind}" for x in ("q", "k", "v", "out") for kind in kinds]


@pytest.mark.parametrize("shape", [(T, S), (B, T, S), (B, H, T, S)], ids=["TS", "BTS", "BHTS"])
@pytest.mark.parametrize("draw", [seldom, randn], ids=["boolean", "float"])
@pytest.mark.parametrize("pad", [None, padding()], ids=["", "padded"])
@pytest.mark.parametrize("causal", [False, True])
def test_every_mask_means_what_it_does_in_torch(shape, draw, pad, causal):
    mask = draw(*shape)
    full = as_float(mask[:, None] if mask.ndim == 3 else mask).expand(B, H, T, S)
    if causal:
        full = full + as_float(torch.tensor([[s > t + S - T for s in range(S)] for t in range(T)]))
    ours = {"key_padding_mask": pad, "attn_mask": mask, "causal": causal}
    theirs = {"key_padding_mask": None if pad is None else as_float(pad), "attn_mask": full.flatten(0, 1)}
    compare(drawn(nn.MultiheadAttention(D, H, batch_first=True)), draw_qkv(), ours, theirs)


# what is masked


@BOTH_WAYS
@pytest.mark.parametrize("by", ["padding", "boolean", "float", "causal"])
def test_a_row_with_everything_masked_is_zeros_behind_the_last_projection(need_weights, by):
    layer, length = make(), 3 if by == "causal" else S  # so that the first two queries precede all keys
    inputs = [randn(B, n, D, grad=True) for n in (T, length, length)]
    blocked = torch.zeros(B, T, length, dtype=torch.bool)
    blocked[{"padding": 1, "causal": (slice(None), slice(2))}.get(by, ([0, 2], [3, 0]))] = True
    pad = blocked[:, 0] if by == "padding" else None
    mask = {"boolean": blocked, "float": as_float(blocked)}.get(by)
    output, weights = layer(*inputs, pad, mask, by == "causal", need_weights)
    with torch.no_grad():
        near(layer(*inputs, pad, mask, by == "causal", need_weights)[0], output, 1e-12)

    # what looks nowhere, and what does
    dead = blocked.all(-1)  # (B, T)
    near(output[dead], layer.out_proj.bias.expand_as(output[dead]), 0)
    near(output[~dead], layer(*inputs, None, None, by == "causal", need_weights)[0][~dead], 1e-12)
    if need_weights:
        near(weights.sum(-1), (~dead).double()[:, None].expand(B, H, T), 1e-12)
        assert not weights.transpose(1, 2)[dead].any()
    found = gradients(output, [*inputs, *layer.parameters()])
    assert all(bool(g.isfinite().all()) for g in found) and all(bool(g.any()) for g in found[:3])
    assert not found[0][dead].any(), "such a query is never read"


@BOTH_WAYS
@pytest.mark.parametrize("content", [1e10, math.inf, math.nan], ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["key is value", "key and value"])
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16], ids=str)
def test_padding_may_hold_anything(need_weights, content, shared, dtype):
    layer, pad = make().to(dtype), padding()
    query, *sources = randn(B, T, D).to(dtype), *randn(1 if shared else 2, B, S, D).to(dtype)
    results = []
    for filler in (0.0, content):
        filled = (x.masked_fill(pad[..., None], filler) for x in sources)
        leaves = [x.detach().requires_grad_() for x in (query, *filled)]
        output, weights = layer(*leaves[:2], leaves[-1], pad, need_weights=need_weights)
        results.append([output, *gradients(output, [*leaves, *layer.parameters()])])
        assert not results[-1][2][pad].any(), "no gradient goes into padding"
        assert weights is None or not weights.transpose(1, 3)[pad].any(), "exactly"
    assert all(map(torch.equal, *results))


@BOTH_WAYS
@pytest.mark.parametrize("by", ["boolean", "float", "causal"])
def test_huge_content_behind_another_mask_is_not_seen(need_weights, by):
    layer, x, later = make().float(), randn(B, S, D).float(), causal_mask(S, S)
    mask = {"boolean": later, "float": as_float(later).float()}.get(by)
    outputs = []
    for content in (0.0, 1e10):
        x[:, -1] = content  # the last key, which only the last query may look at
        outputs.append(layer(x, x, x, None, mask, by == "causal", need_weights)[0][:, :-1])
    near(*outputs, 1e-6)


def test_scores_beyond_float16_do_not_overflow_and_are_not_seen_where_masked():
    q = torch.full((1, 1, 2, 64), 60.0, dtype=torch.float16)  # scores 230,400; scaled 28,800
    for output in (attention_steps(q, q, q).output, attend_with_weights(q, q, q, None)[0]):
        near(output, q, 0)
    (q, k, v), mask = (10 * randn(3, 1, H, S, 8)).half(), causal_mask(S, S)
    expected, _ = attend_with_weights(q, k, v, mask)
    k[:, :, -1] = 60_000 * q[:, :, 0].sign()  # times the first query, which may not look there: over 10⁶
    v[:, :, -1] = 60_000
    for output in (attend_with_weights(q, k, v, mask)[0], attend_fused(q, k, v, mask)):
        near(output[:, :, :-1], expected[:, :, :-1], 1e-2, rtol=1e-2)


@pytest.mark.parametrize("content", [1e10, math.inf, math.nan], ids=str)
def test_in_the_five_steps_a_masked_score_may_be_anything(content):
    q, k, v, hidden = randn(T, 3), randn(S, 3), randn(S, 2), (torch.arange(S) == 2).expand(T, S)
    expected = attention_steps(q, k, v, hidden)
    k[2] = content
    for mask in (hidden, as_float(hidden)):
        assert torch.equal(attention_steps(q, k, v, mask).weights, expected.weights)


# ways of computing it


def test_the_fused_kernel_is_used_without_weights_and_its_triangle_where_it_is_ours():
    layer, x, function = make(), randn(B, S, D), F.scaled_dot_product_attention

    def calls(query: Tensor, *pad: Tensor, causal: bool = True, weights: bool = False) -> Any:
        """Of each call of the kernel: is there a mask, and is the triangle its own."""
        with mock.patch.object(F, "scaled_dot_product_attention", side_effect=function) as kernel:
            layer(query, x, x, *pad, causal=causal, need_weights=weights)
        return [(call.args[3] is not None, call.args[5]) for call in kernel.call_args_list]

    assert calls(x, causal=False, weights=True) == []
    assert calls(x, causal=False) == [(False, False)]
    assert calls(x) == [(False, True)]
    assert calls(x[:, -1:]) == [(False, False)], "one query sees all"
    assert calls(x[:, -2:]) == [(True, False)], "torch's own would be aligned top left"
    assert calls(x, padding()) == [(True, False)]


@pytest.mark.parametrize("together", [1, H * T * S, 2 * H * T * S, 10**9])
def test_in_however_many_parts_it_is_the_same(together, monkeypatch):
    layer, pad, inputs = make(num_kv_heads=2), padding(), draw_qkv()
    pad[1] = True  # a batch element that is all padding, in a part of its own
    leaves = [*inputs, *layer.parameters()]
    expected, _ = layer(*inputs, pad, need_weights=False)
    monkeypatch.setattr(attention_kernels, "TOGETHER", together)
    output, weights = layer(*inputs, pad)
    all_near([output, *gradients(output, leaves)], [expected, *gradients(expected, leaves)])
    assert weights.shape == (B, H, T, S)


def test_a_float_mask_that_is_learnt_has_its_gradient():
    layer, x, bias = make(num_kv_heads=2), randn(B, T, D), randn(H, T, T, grad=True)
    given = (x, x, x, None, bias.expand(B, H, T, T), True)
    weighed, fused = (gradients(layer(*given, way)[0], [bias])[0] for way in (True, False))
    near(weighed, fused)
    assert bool(weighed.tril().any()) and not weighed.triu(1).any()


def test_gradients_are_those_of_finite_differences():
    inputs = [randn(1, n, 3, 2, grad=True) for n in (4, 2, 2)]
    mask = causal_mask(3, 3).index_fill(0, torch.tensor([1]), True)  # with a row of nothing
    for way in (attend_with_weights, lambda *x: attend_with_weights(*x)[1], attend_fused):
        assert torch.autograd.gradcheck(way, (*inputs, mask))


def test_a_second_derivative_is_refused_rather_than_wrong():
    layer, x = make(), randn(B, T, D, grad=True)
    (gradient,) = torch.autograd.grad(layer(x, x, x)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    assert torch.autograd.gradgradcheck(scaled_dot_product_attention, [*randn(3, 2, 3, 2, grad=True)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", [None, causal_mask(300, 300)], ids=["whole", "causal"])
def test_weights_in_half_precision_are_distributions_and_outputs_between_the_values(dtype, mask):
    """In the five steps scores are float32, and weights as near as the dtype allows."""
    q, k, v = (4 * randn(3, 2, H, 300, 64)).to(dtype)  # scaled scores up to 60
    (output, weights), steps = attend_with_weights(q, k, v, mask), attention_steps(q, k, v, mask)
    assert [x.dtype for x in steps] == [torch.float32] * 3 + [dtype] * 2
    assert (output.dtype, weights.dtype) == (dtype, dtype) and bool((weights >= 0).all())
    rounding = torch.finfo(dtype).eps / 2  # each weight is off by that share of itself, so their sum is too
    near(weights.double().sum(-1), torch.ones(2, H, 300), 1.01 * rounding)
    top = v.double().amax(2, keepdim=True)
    assert bool((output <= top + 3 * rounding * top.abs()).all())
    exact = attention_steps(q.double(), k.double(), v.double(), mask)
    largest = float(exact.scaled.abs().max())  # scores are rounded once, each weight by exp of that at most
    near(weights, exact.weights, math.expm1(2 * largest * rounding))
    near(steps.scaled, exact.scaled, 1e-4)
    near(steps.weights, exact.weights, 3e-5, rtol=rounding)


@BOTH_WAYS
def test_autocast_and_its_masks(need_weights):
    layer, x = make().float(), randn(B, S, D).float()
    given = (x, x, x, padding(), randn(S, S))  # a mask of another dtype
    expected, _ = layer(*given, need_weights=need_weights)
    with torch.autocast("cpu", torch.bfloat16):
        output, weights = layer(*given, need_weights=need_weights)
    assert {output.dtype, torch.bfloat16 if weights is None else weights.dtype} == {torch.bfloat16}
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    near(output, expected, 0.1)


@pytest.mark.slow
@BOTH_WAYS
def test_it_compiles_in_one_graph(need_weights):
    layer, x = make(num_kv_heads=2), randn(B, S, D)
    given = (x, x, x, padding(), None, True, need_weights)
    torch.compiler.reset()
    near(torch.compile(layer, backend="aot_eager", fullgraph=True)(*given)[0], layer(*given)[0])


@BOTH_WAYS
def test_lengths_of_zero(need_weights):
    layer, x = make(), randn(B, S, D)
    output, _ = layer(x, x[:, :0], x[:, :0], need_weights=need_weights)
    near(output, layer.out_proj.bias.expand(B, S, D), 0)  # a source of nothing is a row of nothing
    assert layer(x[:, :0], x, x, need_weights=need_weights)[0].shape == (B, 0, D)
    assert layer(x[:0], x[:0], x[:0], need_weights=need_weights)[0].shape == (0, S, D)


# dropout, and weights at the start


def test_weights_are_given_before_dropout_and_output_is_right_on_average():
    layer, x = make(dropout=0.5), randn(1, S, D)
    expected, expected_weights = make()(x, x, x)
    for need_weights in (True, False):
        without, _ = make()(x, x, x, need_weights=need_weights)
        assert torch.equal(layer.eval()(x, x, x, need_weights=need_weights)[0], without)
        draws, weights = layer.train()(*[x.expand(1000, -1, -1)] * 3, need_weights=need_weights)
        off = (draws.mean(0) - expected).abs() * math.sqrt(1000) / draws.std(0)  # standard errors
        assert bool((off < 5).all()) and bool((draws.std(0) > 0).all())
        if need_weights:
            near(weights[:1], expected_weights, 1e-12)


def test_weights_start_xavier_uniform_each_by_itself_and_biases_zero():
    for linear in MultiHeadAttention(128, 8, kdim=64, vdim=32, num_kv_heads=2).projections():
        weight, bound = linear.weight.detach(), math.sqrt(6 / sum(linear.weight.shape))
        assert 0.98 * bound < float(weight.abs().max()) <= bound
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert not linear.bias.any()


# rotary positions and the cache


@BOTH_WAYS
@pytest.mark.parametrize("chunks", [[1] * 7, [3, 1, 3], [2, 5], [7]], ids=str)
@pytest.mark.parametrize("rotary", [None, RotaryPosEncoding(D // H)], ids=["no positions", "rotary"])
@pytest.mark.parametrize("frozen", [False, True])
def test_decoding_with_a_cache_is_the_full_pass(need_weights, chunks, rotary, frozen):
    """Also where no token, the first four alone, or all of them have a graph."""
    layer, x = make(num_kv_heads=2, rotary=rotary), randn(B, S, D)
    for projection in (layer.k_proj, layer.v_proj):
        projection.requires_grad_(not frozen)
    learnt = [p for p in layer.parameters() if p.requires_grad]
    full, full_weights = layer(x, x, x, causal=True)
    for end_of_graph in (0, 4, S):
        cache, outputs = KVCache(), []
        for new in x.split(chunks, 1):
            begin, end = cache.length, cache.length + new.shape[1]
            with torch.set_grad_enabled(end <= end_of_graph):
                output, weights = layer(new, new, new, causal=True, need_weights=need_weights, cache=cache)
            if need_weights:
                near(weights, full_weights[:, :, begin:end, :end])
            outputs.append(output)
            assert cache.length == end
        near(torch.cat(outputs, 1), full)
        if with_graph := [output for output in outputs if output.requires_grad]:
            start = torch.cat(with_graph, 1)
            all_near(gradients(start, learnt), gradients(full[:, : start.shape[1]], learnt))


@BOTH_WAYS
def test_decoding_behind_padding_on_the_left(need_weights):
    layer, x = make(rotary=RotaryPosEncoding(D // H)), randn(B, S, D)
    pad = torch.arange(S) < torch.tensor([[0], [2], [3]])
    x = x.masked_fill(pad[..., None], math.nan)
    positions = (torch.arange(S) - pad.sum(1, keepdim=True)).clamp(min=0)
    cache, outputs = KVCache(), []
    for part in (slice(0, 4), slice(4, 5), slice(5, 7)):
        new, seen = x[:, part], pad[:, : part.stop]
        outputs.append(layer(new, new, new, seen, None, True, need_weights, positions[:, part], cache)[0])
    for b, first in enumerate(pad.sum(1).tolist()):
        own = x[b : b + 1, first:]  # the sentence by itself, without padding
        near(torch.cat(outputs, 1)[b : b + 1, first:], layer(own, own, own, causal=True)[0])


@torch.no_grad()
def test_tokens_in_a_cache_are_not_copied_for_each_new_one():
    cache, k = KVCache(), torch.zeros(1, 1, 1, 2)
    assert len({cache.append(k, k)[0].data_ptr() for _ in range(300)}) < 10


@BOTH_WAYS
def test_rotary_positions_are_relative_and_those_of_a_chunk_are_the_last(need_weights):
    layer, x = make(rotary=RotaryPosEncoding(D // H)), randn(B, S, D)
    counted, _ = layer(x, x, x, need_weights=need_weights)
    for start in (0, 1000):
        moved, _ = layer(x, x, x, need_weights=need_weights, positions=torch.arange(S) + start)
        near(moved, counted)
    assert float((counted - make()(x, x, x)[0]).detach().abs().max()) > 0.01
    near(layer(x[:, :3], x, x, need_weights=need_weights)[0], counted[:, :3])  # both begin at 0
    causal, _ = layer(x, x, x, causal=True)
    for n in range(1, S + 1):
        start = x[:, :n]
        near(layer(start, start, start, causal=True, need_weights=need_weights)[0], causal[:, :n])
        near(layer(x[:, -n:], x, x, causal=True, need_weights=need_weights)[0], causal[:, -n:])
    longer, _ = layer(x, x[:, -3:], x[:, -3:], causal=True, need_weights=need_weights)
    near(longer[:, -1], layer(x[:, -1:], x[:, -3:], x[:, -3:], causal=True)[0][:, 0])


# what is refused: refusals.txt speaks of these

X, Y = torch.zeros(B, T, D), torch.zeros(B, S, D)
LAYER, TURNED = MultiHeadAttention(D, H), MultiHeadAttention(D, H, rotary=RotaryPosEncoding(D // H))
FILLED = KVCache()
FILLED.append(torch.zeros(B, H, T, D // H), torch.zeros(B, H, T, D // H))


def step(*shapes: tuple[int, ...], mask: Tensor | None = None) -> AttentionSteps:
    return attention_steps(*map(torch.zeros, shapes), mask)


@refusals("attention")
def test_what_does_not_fit_is_refused(call, message):
    with refused(message):
        eval(call)
