"""Attention against its formula in plain Python, torch.nn.MultiheadAttention, the fused kernel, and algebra.

Letters in shapes: B batch, H heads, T queries, S source, D model size, Dh size of a head.
"""

from __future__ import annotations

import copy
import itertools
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
from tests.experiments.nn.helpers import BOTH_WAYS, F64, all_near, near, randn, refused

B, H, T, S, D = 3, 4, 5, 7, 16
HALVES = [torch.bfloat16, torch.float16]


def draw_qkv(*lead: int, sizes: tuple[int, int, int] = (D, D, D), grad: bool = True) -> list[Tensor]:
    """Queries of T, keys and values of S."""
    return [randn(*lead, n, size, grad=grad) for n, size in zip((T, S, S), sizes, strict=True)]


def make(*args: Any, seed: int = 0, **kwargs: Any) -> MultiHeadAttention:
    """Make a layer in float64, with biases that are not zero."""
    torch.manual_seed(seed)
    layer = MultiHeadAttention(*args, **kwargs).double()
    for projection in layer.projections():
        if projection.bias is not None:
            nn.init.normal_(projection.bias)
    return layer


def padding() -> Tensor:
    """(B, S): nothing, the first, and all but two are padding."""
    mask = torch.zeros(B, S, dtype=torch.bool)
    mask[1, 0] = mask[2, 2] = True
    mask[2, 2:] = True
    return mask


def seldom(*shape: int) -> Tensor:
    """A boolean mask that leaves the last key to every query."""
    blocked = torch.rand(*shape) < 0.4
    blocked[..., -1] = False
    return blocked


def as_float(blocked: Tensor) -> Tensor:
    return torch.zeros(blocked.shape, dtype=F64).masked_fill(blocked, -math.inf)


def weighed(output: Tensor) -> Tensor:
    """Return a scalar that weighs every number of the output differently."""
    return (output * torch.linspace(-1, 2, output.numel(), dtype=F64).sin().view_as(output)).sum()


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(weighed(output), inputs, retain_graph=True))


# the five steps


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> AttentionSteps:
    """Take the five steps of one head in plain Python; mask (T, S) is True or −∞ where blocked."""
    (t, d), s = q.shape, len(k)
    scores = [[sum(float(q[i, c]) * float(k[j, c]) for c in range(d)) for j in range(s)] for i in range(t)]
    scaled = [[x / d**0.5 for x in row] for row in scores]
    added = torch.zeros(t, s) if mask is None else as_float(mask) if mask.dtype == torch.bool else mask
    masked = [[scaled[i][j] + float(added[i, j]) for j in range(s)] for i in range(t)]
    weights = []
    for row in masked:
        exps = [math.exp(x) for x in row]
        weights.append([e / sum(exps) if sum(exps) else 0.0 for e in exps])
    columns = range(v.shape[1])
    output = [[sum(w * float(v[j, c]) for j, w in enumerate(row)) for c in columns] for row in weights]
    return AttentionSteps(*(torch.tensor(x, dtype=F64) for x in (scores, scaled, masked, weights, output)))


MASKS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "boolean": lambda: seldom(T, S),
    "causal": lambda: causal_mask(T, S),
    "float": lambda: randn(T, S),
    "float and blocked": lambda: randn(T, S).masked_fill(seldom(T, S), -math.inf),
    "a row of nothing": lambda: seldom(T, S).index_fill(0, torch.tensor([2]), True),
}


@pytest.mark.parametrize("name", MASKS)
def test_the_five_steps_are_the_formula(name: str) -> None:
    q, k, v, mask = randn(T, 3), randn(S, 3), randn(S, 2), MASKS[name]()
    all_near(attention_steps(q, k, v, mask), by_hand(q, k, v, mask), 1e-12)


def test_the_five_steps_take_leading_axes_and_a_mask_that_broadcasts() -> None:
    q, k, v = draw_qkv(B, H, sizes=(3, 3, 2), grad=False)
    mask = padding()[:, None, None]
    steps = attention_steps(q, k, v, mask)
    for b, h in itertools.product(range(B), range(H)):
        one = attention_steps(q[b, h], k[b, h], v[b, h], mask[b, 0])
        all_near((step[b, h] for step in steps), one, 1e-12)
    output, weights = scaled_dot_product_attention(q, k, v, mask)
    assert torch.equal(output, steps.output) and torch.equal(weights, steps.weights)


@pytest.mark.parametrize("name", ["none", "boolean", "float", "float and blocked"])
def test_all_ways_agree_with_torchs_function_and_their_gradients_too(name: str) -> None:
    mask = MASKS[name]()
    theirs_mask = ~mask if mask is not None and mask.dtype == torch.bool else mask
    inputs = draw_qkv(B, H, sizes=(6, 6, 6))
    theirs = F.scaled_dot_product_attention(*inputs, theirs_mask)
    for ours in (
        attention_steps(*inputs, mask).output,
        attend_with_weights(*inputs, mask)[0],
        attend_fused(*inputs, mask),
    ):
        all_near([ours, *gradients(ours, inputs)], [theirs, *gradients(theirs, inputs)])


def test_scores_in_half_precision_are_float32_and_weights_as_near_as_the_dtype_allows() -> None:
    q, k, v = (x.bfloat16() for x in (4 * randn(T, 64), randn(S, 64), randn(S, 64)))
    steps, exact = attention_steps(q, k, v), attention_steps(q.double(), k.double(), v.double())
    assert steps.scores.dtype == steps.masked.dtype == torch.float32
    assert steps.weights.dtype == steps.output.dtype == torch.bfloat16
    near(steps.scaled, exact.scaled, 1e-5)
    near(steps.weights, exact.weights, 1e-5, rtol=torch.finfo(torch.bfloat16).eps / 2)


def test_raw_scores_beyond_float16_do_not_overflow() -> None:
    q = torch.full((1, 1, 2, 64), 60.0, dtype=torch.float16)  # scores 230,400; scaled 28,800
    for output in (attention_steps(q, q, q).output, attend_with_weights(q, q, q, None)[0]):
        near(output, q, 0)


# masks


@pytest.mark.parametrize(
    ("size", "blocked"),
    [
        ((2, 4), [[0, 0, 0, 1], [0, 0, 0, 0]]),
        ((3, 3), [[0, 1, 1], [0, 0, 1], [0, 0, 0]]),
        ((3, 2), [[1, 1], [0, 1], [0, 0]]),
        ((1, 4), [[0, 0, 0, 0]]),
    ],
)
def test_causal_masks_end_in_the_lower_right_corner(size: tuple[int, int], blocked: list[list[int]]) -> None:
    assert causal_mask(*size).int().tolist() == blocked
    assert merge_masks(B, H, 1, S) is merge_masks(B, H, 1, S, causal=True) is None  # the last query sees all


# against torch.nn.MultiheadAttention

LAYERS: dict[str, dict[str, Any]] = {
    "self": {},
    "no bias": {"bias": False},
    "kdim": {"kdim": 6, "vdim": 10},
    "vdim, no bias": {"vdim": 10, "bias": False},
    "batch second": {"batch_first": False},
}


def make_theirs(batch_first: bool = True, **kwargs: Any) -> nn.MultiheadAttention:
    torch.manual_seed(1)
    theirs = nn.MultiheadAttention(D, H, batch_first=batch_first, dtype=F64, **kwargs)
    for bias in (theirs.in_proj_bias, theirs.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    return theirs


def call_theirs(theirs: nn.MultiheadAttention, inputs: list[Tensor], **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Call it batch first whatever the layer says, with the weights of each head."""
    if not theirs.batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    output, weights = theirs(*inputs, average_attn_weights=False, **kwargs)
    return output if theirs.batch_first else output.transpose(0, 1), weights


def their_gradients(theirs: nn.MultiheadAttention) -> list[Tensor]:
    """In the order of our parameters: a copy of the layer holds them in place of its weights."""
    holder = copy.deepcopy(theirs)
    for to, parameter in zip(holder.parameters(), theirs.parameters(), strict=True):
        to.data = parameter.grad
    return [*MultiHeadAttention.from_torch(holder).parameters()]


def compare(theirs: nn.MultiheadAttention, inputs: list[Tensor], ours_masks: dict, masks: dict) -> None:
    """Output, each head's weights, and the gradients of every parameter and input, with and without weights."""
    expected, expected_weights = call_theirs(theirs, inputs, **masks)
    expected_inputs = gradients(expected, inputs)
    weighed(expected).backward()
    for need_weights in (True, False):
        ours = MultiHeadAttention.from_torch(theirs)
        output, weights = ours(*inputs, **ours_masks, need_weights=need_weights)
        all_near([output, *gradients(output, inputs)], [expected, *expected_inputs])
        assert (weights is None) != need_weights
        if need_weights:
            near(weights, expected_weights)
        all_near(gradients(output, [*ours.parameters()]), their_gradients(theirs))


@pytest.mark.parametrize("kwargs", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("source", ["self", "cross"])
def test_every_layer_of_torch_is_the_same_function(kwargs: dict[str, Any], source: str) -> None:
    theirs = make_theirs(**kwargs)
    inputs = draw_qkv(B, sizes=(D, theirs.kdim, theirs.vdim))
    self_attention = source == "self" and theirs.in_proj_weight is not None
    compare(theirs, inputs[:1] * 3 if self_attention else inputs, {}, {})


@pytest.mark.parametrize("shape", [(T, S), (B, T, S), (B, H, T, S)], ids=["TS", "BTS", "BHTS"])
@pytest.mark.parametrize("kind", ["boolean", "float"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_every_mask_means_what_it_does_in_torch(
    shape: tuple[int, ...], kind: str, padded: bool, causal: bool
) -> None:
    mask = seldom(*shape) if kind == "boolean" else randn(*shape)
    mask[..., 0] = False if kind == "boolean" else 0.0  # under a causal mask the first key stays open
    pad = padding() if padded else None
    if pad is not None:
        pad[:, 0] = False
    full = {2: mask, 3: mask.unsqueeze(-3), 4: mask}[mask.ndim].expand(B, H, T, S)
    if causal:
        later = torch.tensor([[s > t + S - T for s in range(S)] for t in range(T)])
        full = full | later if kind == "boolean" else full.masked_fill(later, -math.inf)
    theirs_pad = as_float(pad) if pad is not None and kind == "float" else pad  # torch wants both of one kind
    ours = {"key_padding_mask": pad, "attn_mask": mask, "causal": causal}
    theirs = {"key_padding_mask": theirs_pad, "attn_mask": full.flatten(0, 1)}
    compare(make_theirs(), draw_qkv(B), ours, theirs)


@pytest.mark.parametrize("name", ["self", "no bias", "kdim", "vdim, no bias"])
def test_a_layer_survives_the_way_to_torch_and_back(name: str) -> None:
    ours = make(D, H, dropout=0.25, **LAYERS[name]).eval()
    theirs = ours.to_torch()
    back = MultiHeadAttention.from_torch(theirs)
    assert theirs.batch_first
    assert (theirs.dropout, back.dropout, theirs.training, back.training) == (0.25, 0.25, False, False)
    for (key, a), (other, b) in zip(ours.state_dict().items(), back.state_dict().items(), strict=True):
        assert key == other and torch.equal(a, b)
    kinds = ["weight", "bias"] if ours.out_proj.bias is not None else ["weight"]
    assert [*ours.state_dict()] == [f"{x}_proj.{kind}" for x in ("q", "k", "v", "out") for kind in kinds]
    inputs = draw_qkv(B, grad=False, sizes=(D, ours.kdim, ours.vdim))
    near(call_theirs(theirs, inputs)[0], ours(*inputs)[0])
    with torch.no_grad():
        theirs.out_proj.weight.zero_()
    assert bool((back.out_proj.weight != 0).any()), "copies, not the same memory"


# rows in which everything is masked


@BOTH_WAYS
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("by", ["padding", "boolean", "float", "causal"])
def test_a_row_with_everything_masked_is_zeros_behind_the_last_projection(
    need_weights: bool, grad: bool, by: str
) -> None:
    layer = make(D, H)
    length = 3 if by == "causal" else S  # of 5 queries the first two then come before all keys
    inputs = [randn(B, n, D, grad=True) for n in (T, length, length)]
    blocked = torch.zeros(B, T, length, dtype=torch.bool)
    blocked[{"padding": 1, "causal": (slice(None), slice(2))}.get(by, ([0, 2], [3, 0]))] = True
    pad = blocked[:, 0] if by == "padding" else None
    mask = {"boolean": blocked, "float": as_float(blocked)}.get(by)
    with torch.set_grad_enabled(grad):
        output, weights = layer(*inputs, pad, mask, by == "causal", need_weights)

    # what looks nowhere, and what does
    dead = blocked.all(-1)  # (B, T)
    near(output[dead], layer.out_proj.bias.expand(int(dead.sum()), D), 0)
    alive, _ = layer(*inputs, causal=by == "causal", need_weights=need_weights)
    near(output[~dead], alive[~dead], 1e-12)
    if need_weights:
        sums = weights.transpose(1, 2).sum(-1)  # (B, T, H)
        near(sums, (~dead).double()[..., None].expand(B, T, H), 1e-12)
        assert bool((weights.transpose(1, 2)[dead] == 0).all())
    if grad:
        found = gradients(output, [*inputs, *layer.parameters()])
        assert all(bool(g.isfinite().all()) for g in found)
        assert bool((found[0][dead] == 0).all()), "such a query is never read"
        assert all(bool((g != 0).any()) for g in found[:3])


# what is masked cannot be seen


@BOTH_WAYS
@pytest.mark.parametrize("content", [1e10, math.inf, math.nan], ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["key is value", "key and value"])
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16], ids=str)
def test_padding_may_hold_anything(
    need_weights: bool, content: float, shared: bool, dtype: torch.dtype
) -> None:
    layer, pad = make(D, H).to(dtype), padding()
    query, *sources = randn(B, T, D).to(dtype), *randn(1 if shared else 2, B, S, D).to(dtype)
    results = []
    for filler in (0.0, content):
        filled = (x.masked_fill(pad[..., None], filler) for x in sources)
        leaves = [x.detach().requires_grad_() for x in (query, *filled)]
        output, weights = layer(*leaves[:2], leaves[-1], pad, need_weights=need_weights)
        results.append([output, *gradients(output, [*leaves, *layer.parameters()])])
        assert bool((results[-1][2][pad] == 0).all()), "no gradient goes into padding"
        if need_weights:
            assert bool((weights.transpose(1, 3)[pad] == 0).all()), "exactly"
    assert all(torch.equal(clean, filled) for clean, filled in zip(*results, strict=True))


@BOTH_WAYS
@pytest.mark.parametrize("by", ["boolean", "float", "causal"])
def test_huge_content_behind_another_mask_is_not_seen(need_weights: bool, by: str) -> None:
    layer, x, later = make(D, H).float(), randn(B, S, D).float(), causal_mask(S, S)
    mask = {"boolean": later, "float": as_float(later).float()}.get(by)
    outputs = []
    for content in (0.0, 1e10):
        x[:, -1] = content  # the last key, which only the last query may look at
        output, _ = layer(x, x, x, attn_mask=mask, causal=by == "causal", need_weights=need_weights)
        outputs.append(output[:, :-1])
    near(*outputs, 1e-6)


def test_masked_scores_beyond_float16_are_not_seen() -> None:
    q, k, v = (10 * randn(3, 1, H, S, 8)).half()
    mask = causal_mask(S, S)
    expected, _ = attend_with_weights(q, k, v, mask)
    k[:, :, -1] = 60_000 * q[:, :, 0].sign()  # times the first query, which may not look there: over 10⁶
    v[:, :, -1] = 60_000
    for output in (attend_with_weights(q, k, v, mask)[0], attend_fused(q, k, v, mask)):
        near(output[:, :, :-1], expected[:, :, :-1], 1e-2, rtol=1e-2)


@pytest.mark.parametrize("content", [1e10, math.inf, math.nan], ids=str)
def test_in_the_five_steps_a_masked_score_may_be_anything(content: float) -> None:
    q, k, v, hidden = randn(T, 3), randn(S, 3), randn(S, 2), (torch.arange(S) == 2).expand(T, S)
    expected = attention_steps(q, k, v, hidden)
    k[2] = content
    for mask in (hidden, as_float(hidden)):
        assert torch.equal(attention_steps(q, k, v, mask).weights, expected.weights)


# ways of computing it


def test_the_fused_kernel_is_used_without_weights_and_its_triangle_where_it_is_ours() -> None:
    layer, x = make(D, H), randn(B, S, D)

    def call(query: Tensor, pad: Tensor | None = None, causal: bool = True, weights: bool = False) -> Any:
        function = F.scaled_dot_product_attention
        with mock.patch.object(F, "scaled_dot_product_attention", side_effect=function) as kernel:
            layer(query, x, x, pad, causal=causal, need_weights=weights)
        if not kernel.call_count:
            return None
        _, _, _, mask, _, triangle = kernel.call_args.args
        return mask is not None, triangle

    assert call(x, causal=False, weights=True) is None
    assert call(x, causal=False) == (False, False)
    assert call(x) == (False, True)
    assert call(x[:, -1:]) == (False, False), "one query sees all"
    assert call(x[:, -2:]) == (True, False), "torch's own would be aligned top left"
    assert call(x, padding()) == (True, False)


@pytest.mark.parametrize("together", [1, H * T * S, 2 * H * T * S, 10**9])
def test_in_however_many_parts_it_is_the_same(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, pad, inputs = make(D, H, num_kv_heads=2), padding(), draw_qkv(B)
    pad[1] = True  # a batch element that is all padding, in a part of its own
    leaves = [*inputs, *layer.parameters()]
    expected, _ = layer(*inputs, pad, need_weights=False)
    monkeypatch.setattr(attention_kernels, "TOGETHER", together)
    output, weights = layer(*inputs, pad)
    all_near([output, *gradients(output, leaves)], [expected, *gradients(expected, leaves)])
    assert weights.shape == (B, H, T, S)


def test_a_float_mask_that_is_learnt_has_its_gradient() -> None:
    layer, x, bias = make(D, H, num_kv_heads=2), randn(B, T, D), randn(H, T, T, grad=True)
    found = []
    for need_weights in (True, False):
        output, _ = layer(x, x, x, attn_mask=bias.expand(B, H, T, T), need_weights=need_weights, causal=True)
        found += gradients(output, [bias])
    near(*found)
    assert bool((found[0].tril() != 0).any()) and bool((found[0].triu(1) == 0).all())


def test_gradients_are_those_of_finite_differences() -> None:
    q, k, v = (randn(1, n, 3, 2, grad=True) for n in (4, 2, 2))
    mask = causal_mask(3, 3).index_fill(0, torch.tensor([1]), True)  # with a row of nothing
    for way in (
        lambda *x: attend_with_weights(*x, mask),
        lambda *x: attend_with_weights(*x, mask)[1],
        lambda *x: attend_fused(*x, mask),
    ):
        assert torch.autograd.gradcheck(way, (q, k, v))
    layer = make(4, 2, kdim=3, vdim=5)
    inputs = [randn(2, *shape, grad=True) for shape in ((3, 4), (4, 3), (4, 5))]
    pad = torch.tensor([[False] * 4, [True, False, False, True]])
    assert torch.autograd.gradcheck(lambda *x: layer(*x, pad, causal=True), inputs)


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    layer, x = make(D, H), randn(B, T, D, grad=True)
    (gradient,) = torch.autograd.grad(layer(x, x, x)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    q, k, v = (randn(2, 3, 2, grad=True) for _ in range(3))
    assert torch.autograd.gradgradcheck(lambda *x: scaled_dot_product_attention(*x), (q, k, v))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_weights_in_half_precision_are_distributions_and_outputs_between_the_values(
    dtype: torch.dtype, causal: bool
) -> None:
    q, k, v = (4 * randn(3, 2, H, 300, 64)).to(dtype)  # scaled scores up to 60
    mask = causal_mask(300, 300) if causal else None
    output, weights = attend_with_weights(q, k, v, mask)
    assert (output.dtype, weights.dtype) == (dtype, dtype)
    assert bool((weights >= 0).all())
    rounding = torch.finfo(dtype).eps / 2  # each weight is off by that share of itself, so their sum is too
    near(weights.double().sum(-1), torch.ones(2, H, 300), 1.01 * rounding)
    top = v.double().max(2, keepdim=True).values
    assert bool((output.double() <= top + 3 * rounding * top.abs()).all())
    exact = attention_steps(q.double(), k.double(), v.double(), mask)
    largest = float(exact.scaled.abs().max())  # scores are rounded once, each weight by exp of that at most
    near(weights, exact.weights, math.expm1(2 * largest * rounding))


@BOTH_WAYS
def test_autocast_and_its_masks(need_weights: bool) -> None:
    layer, x = make(D, H).float(), randn(B, S, D).float()
    given = (x, x, x, padding(), randn(S, S))  # a mask of another dtype
    expected, _ = layer(*given, need_weights=need_weights)
    with torch.autocast("cpu", torch.bfloat16):
        output, weights = layer(*given, need_weights=need_weights)
    assert output.dtype == torch.bfloat16
    assert weights is None or weights.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    near(output, expected, 0.1)


@pytest.mark.slow
@BOTH_WAYS
def test_it_compiles_in_one_graph(need_weights: bool) -> None:
    layer, x, pad = make(D, H, num_kv_heads=2), randn(B, S, D), padding()
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    output, _ = compiled(x, x, x, pad, causal=True, need_weights=need_weights)
    near(output, layer(x, x, x, pad, causal=True, need_weights=need_weights)[0])


@BOTH_WAYS
def test_lengths_of_zero(need_weights: bool) -> None:
    layer, x = make(D, H), randn(B, S, D)
    output, _ = layer(x, x[:, :0], x[:, :0], need_weights=need_weights)
    near(output, layer.out_proj.bias.expand(B, S, D), 0)  # a source of nothing is a row of nothing
    for query, source in ((x[:, :0], x), (x[:0], x[:0])):
        assert layer(query, source, source, need_weights=need_weights)[0].shape == query.shape


# algebra


@BOTH_WAYS
def test_a_causal_pass_over_a_beginning_is_the_beginning_of_the_pass(need_weights: bool) -> None:
    layer, x = make(D, H), randn(B, S, D)
    whole, _ = layer(x, x, x, causal=True, need_weights=need_weights)
    for n in range(1, S):
        near(layer(x[:, :n], x[:, :n], x[:, :n], causal=True, need_weights=need_weights)[0], whole[:, :n])
        near(layer(x[:, -n:], x, x, causal=True, need_weights=need_weights)[0], whole[:, -n:])


@BOTH_WAYS
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_shared_heads_are_repeated_heads(need_weights: bool, groups: int, masked: bool) -> None:
    few, many = make(D, H, num_kv_heads=groups), make(D, H, seed=1)
    state = few.state_dict()
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        state[name] = state[name].unflatten(0, (groups, -1)).repeat_interleave(H // groups, 0).flatten(0, 1)
    many.load_state_dict(state)
    x, y, pad = randn(B, T, D, grad=True), randn(B, S, D, grad=True), padding() if masked else None
    results = []
    for layer in (few, many):
        output, weights = layer(x, y, y, pad, causal=masked, need_weights=need_weights)
        results.append([output, *gradients(output, [x, y]), *([weights] if need_weights else [])])
    all_near(*results)


# dropout, and weights at the start


def test_weights_are_given_before_dropout_and_output_is_right_on_average() -> None:
    layer, x = make(D, H, dropout=0.5), randn(1, S, D)
    expected, expected_weights = layer.eval()(x, x, x)
    assert torch.equal(expected, make(D, H)(x, x, x)[0])
    assert torch.equal(layer(x, x, x, need_weights=False)[0], make(D, H)(x, x, x, need_weights=False)[0])
    layer.train()
    for need_weights in (True, False):
        draws, _ = layer(*[x.expand(1000, -1, -1)] * 3, need_weights=need_weights)
        spread = draws.std(0) / math.sqrt(len(draws))
        assert bool(((draws.mean(0) - expected).abs() < 5 * spread).all())
        assert bool((draws.std(0) > 0).all())
    near(layer(x, x, x)[1], expected_weights, 1e-12)


def test_weights_start_xavier_uniform_each_by_itself_and_biases_zero() -> None:
    layer = MultiHeadAttention(128, 8, kdim=64, vdim=32, num_kv_heads=2)
    for linear in layer.projections():
        weight = linear.weight.detach()
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.98 * bound < float(weight.abs().max()) <= bound
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert bool((linear.bias == 0).all())


# rotary positions and the cache


@BOTH_WAYS
@pytest.mark.parametrize("chunks", [[1] * 7, [3, 1, 3], [2, 5], [7]], ids=str)
@pytest.mark.parametrize("rotary", [None, RotaryPosEncoding(D // H)], ids=["no positions", "rotary"])
@pytest.mark.parametrize("grad", [True, False])
def test_decoding_with_a_cache_is_the_full_pass(
    need_weights: bool, chunks: list[int], rotary: nn.Module | None, grad: bool
) -> None:
    layer, x = make(D, H, num_kv_heads=2, rotary=rotary), randn(B, S, D, grad=True)
    full, full_weights = layer(x, x, x, causal=True)
    cache, outputs = KVCache(), []
    for new in x.split(chunks, 1):
        begin, end = cache.length, cache.length + new.shape[1]
        with torch.set_grad_enabled(grad):
            output, weights = layer(new, new, new, causal=True, need_weights=need_weights, cache=cache)
        if need_weights:
            near(weights, full_weights[:, :, begin:end, :end])
        outputs.append(output)
        assert cache.length == end
    near(torch.cat(outputs, 1), full)
    if grad:
        inputs = [x, *layer.parameters()]
        all_near(gradients(torch.cat(outputs, 1), inputs), gradients(full, inputs))


@BOTH_WAYS
def test_decoding_behind_padding_on_the_left(need_weights: bool) -> None:
    layer, x = make(D, H, rotary=RotaryPosEncoding(D // H)), randn(B, S, D)
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


@pytest.mark.parametrize("frozen", [False, True])
def test_a_cache_may_grow_with_and_without_a_graph_before_the_gradient_is_taken(frozen: bool) -> None:
    layer, x = make(D, H), randn(B, S, D)
    for projection in (layer.k_proj, layer.v_proj):
        projection.requires_grad_(not frozen)
    full, cache, parts = layer(x, x, x, causal=True)[0], KVCache(), []
    for i, new in enumerate(x.split(1, 1)):
        with torch.set_grad_enabled(i < 4):
            parts.append(layer(new, new, new, causal=True, cache=cache)[0])
    near(torch.cat(parts, 1), full)
    learnt = [p for p in layer.parameters() if p.requires_grad]
    all_near(gradients(torch.cat(parts[:4], 1), learnt), gradients(full[:, :4], learnt))


@torch.no_grad()
def test_tokens_in_a_cache_are_not_copied_for_each_new_one() -> None:
    cache, k = KVCache(), torch.zeros(1, 1, 1, 2)
    assert len({cache.append(k, k)[0].data_ptr() for _ in range(300)}) < 10


@BOTH_WAYS
def test_rotary_positions_are_relative_and_those_of_a_chunk_are_the_last(need_weights: bool) -> None:
    layer, x = make(D, H, rotary=RotaryPosEncoding(D // H)), randn(B, S, D)
    counted, _ = layer(x, x, x, need_weights=need_weights)
    for start in (0, 1000):
        moved, _ = layer(x, x, x, need_weights=need_weights, positions=torch.arange(S) + start)
        near(moved, counted)
    assert float((counted - make(D, H)(x, x, x)[0]).detach().abs().max()) > 0.01
    causal, _ = layer(x, x, x, causal=True)
    near(layer(x[:, -3:], x, x, causal=True, need_weights=need_weights)[0], causal[:, -3:])
    longer, _ = layer(x, x[:, -3:], x[:, -3:], causal=True, need_weights=need_weights)
    near(longer[:, -1], layer(x[:, -1:], x[:, -3:], x[:, -3:], causal=True)[0][:, 0])


# what is refused

X, Y = torch.zeros(B, T, D), torch.zeros(B, S, D)
LAYER, TURNED = MultiHeadAttention(D, H), MultiHeadAttention(D, H, rotary=RotaryPosEncoding(D // H))


def change_batch(cache: KVCache) -> None:
    LAYER(X, X, X, causal=True, cache=cache)
    LAYER(X[:2], X[:2], X[:2], causal=True, cache=cache)


def step(*shapes: tuple[int, ...], mask: Tensor | None = None) -> AttentionSteps:
    return attention_steps(*(torch.zeros(shape) for shape in shapes), mask)


def wrap(**kwargs: Any) -> MultiHeadAttention:
    return MultiHeadAttention.from_torch(nn.MultiheadAttention(D, H, **kwargs))


UNFIT: list[tuple[Callable[[], Any], str]] = [
    (lambda: MultiHeadAttention(10, 4), "d_model.*num_heads.*10.*4"),
    (lambda: MultiHeadAttention(D, 4, num_kv_heads=3), "num_heads.*num_kv_heads.*4.*3"),
    (lambda: MultiHeadAttention(D, 0), "num_heads.*0"),
    (lambda: MultiHeadAttention(-8, H), "d_model.*-8"),
    (lambda: MultiHeadAttention(D, H, kdim=0), "kdim.*0"),
    (lambda: MultiHeadAttention(D, H, vdim=0), "vdim.*0"),
    (lambda: MultiHeadAttention(D, H, num_kv_heads=0), "num_kv_heads.*0"),
    (lambda: MultiHeadAttention(D, H, dropout=1.0), r"dropout.*1\.0"),
    (lambda: MultiHeadAttention(D, H, dropout=-0.1), r"dropout.*-0\.1"),
    (lambda: LAYER(X[0], Y, Y), r"query.*16.*\(5, 16\)"),
    (lambda: LAYER(X, Y[..., :9], Y), r"key.*16.*\(3, 7, 9\)"),
    (lambda: LAYER(X, Y, Y[None]), r"value.*16.*\(1, 3, 7, 16\)"),
    (lambda: LAYER(X, Y, Y[:, :6]), r"length.*key \(3, 7, 16\), value \(3, 6, 16\)"),
    (lambda: LAYER(X[:2], Y, Y), r"batch.*query \(2, 5, 16\), key \(3, 7, 16\)"),
    (lambda: LAYER(X, Y, Y, torch.zeros(B, T).bool()), r"key_padding_mask.*\(3, 7\).*\(3, 5\)"),
    (lambda: LAYER(X, Y, Y, torch.zeros(B, S)), r"key_padding_mask.*bool.*float32.*\.bool\(\)"),
    (lambda: LAYER(X, Y, Y, torch.zeros(B, S).byte()), r"key_padding_mask.*bool.*uint8.*\.bool\(\)"),
    (lambda: LAYER(X, Y, Y, None, torch.zeros(T, S).byte()), r"attn_mask.*bool.*float.*uint8.*\.bool\(\)"),
    (lambda: LAYER(X, Y, Y, None, torch.zeros(T, S).long()), r"attn_mask.*bool.*float.*int64.*\.bool\(\)"),
    (lambda: LAYER(X, Y, Y, None, torch.zeros(S, T)), r"attn_mask.*\(5, 7\).*\(7, 5\)"),
    (lambda: LAYER(X, Y, Y, None, torch.zeros(H, T, S)), r"\(3, 5, 7\).*\(4, 5, 7\)"),
    (
        lambda: LAYER(X, Y, Y, None, torch.zeros(B * H, T, S), need_weights=False),
        r"\(12, 5, 7\).*attn_mask.view\(3, 4, 5, 7\)",
    ),
    (lambda: LAYER(X, X, X, cache=KVCache()), "cache.*causal=True"),
    (lambda: change_batch(KVCache()), r"cache.*\(3, 4, 5, 4\).*\(2, 4, 5, 4\)"),
    (lambda: LAYER(X, X, X, positions=torch.arange(T)), "positions.*rotary"),
    (lambda: TURNED(X, Y, Y, positions=torch.arange(T)), r"positions.*query \(3, 5, 16\), key \(3, 7, 16\)"),
    (lambda: step((5, 3), (7, 4), (7, 2)), r"q \(5, 3\), k \(7, 4\)"),
    (lambda: step((5, 3), (7, 3), (6, 2)), r"k \(7, 3\), v \(6, 2\)"),
    (lambda: step((3,), (7, 3), (7, 2)), r"q.*length, size.*\(3,\)"),
    (lambda: step((2, 5, 3), (3, 7, 3), (3, 7, 2)), r"q \(2, 5, 3\), k \(3, 7, 3\), v \(3, 7, 2\)"),
    (lambda: step((5, 3), (7, 3), (7, 2), mask=torch.zeros(5, 5)), r"mask.*\(5, 7\).*\(5, 5\)"),
    (lambda: step((5, 3), (7, 3), (7, 2), mask=torch.zeros(2, 5, 7)), r"mask.*\(5, 7\).*\(2, 5, 7\)"),
    (lambda: step((5, 3), (7, 3), (7, 2), mask=torch.zeros(5, 7).int()), "mask.*bool.*int32"),
    (lambda: scaled_dot_product_attention(X, X, X.long()), "v.*floating"),  # whose weights would all be zero
    (lambda: MultiHeadAttention(D, H, num_kv_heads=2).to_torch(), "num_kv_heads.*2.*4"),
    (lambda: TURNED.to_torch(), "rotary"),
    (lambda: wrap(add_bias_kv=True), "add_bias_kv=True"),
    (lambda: wrap(add_zero_attn=True), "add_zero_attn=True"),
]


@pytest.mark.parametrize(("call", "message"), UNFIT, ids=[message for _, message in UNFIT])
def test_what_does_not_fit_is_refused(call: Callable[[], Any], message: str) -> None:
    with refused(message):
        call()
