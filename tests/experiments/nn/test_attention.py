"""Attention against its formula in plain Python, torch.nn.MultiheadAttention, the fused kernel, and algebra.

Letters in shapes: B batch, H heads, T queries, S source, D model size, Dh size of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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

F64 = torch.float64
B, H, T, S, D = 3, 4, 5, 7, 16
BOTH_WAYS = pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "fused"])


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def draw(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    """Normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return torch.randn(*shape, dtype=F64, generator=generator, requires_grad=grad)


def make(*args: Any, seed: int = 0, **kwargs: Any) -> MultiHeadAttention:
    """Ours in float64, with biases that are not zero."""
    torch.manual_seed(seed)
    made = MultiHeadAttention(*args, **kwargs).double()
    for layer in made.projections():
        if layer.bias is not None:
            nn.init.normal_(layer.bias)
    return made


def padding(length: int = S) -> Tensor:
    """(B, length): nothing, the first, and all but two are padding."""
    mask = torch.zeros(B, length, dtype=torch.bool)
    mask[1, 0] = True
    mask[2, 2:] = True
    return mask


def seldom(*shape: int) -> Tensor:
    """A boolean mask that leaves the last key to every query."""
    blocked = draw(*shape, seed=5) > 0.3
    blocked[..., -1] = False
    return blocked


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Of a scalar that weighs every number of the output differently."""
    return list(torch.autograd.grad((output * draw(*output.shape, seed=9)).sum(), inputs))


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# The five steps


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> AttentionSteps:
    """The five steps of one head in plain Python, number by number; mask (T, S) is True or −∞ where blocked."""
    (t, d), s = q.shape, len(k)
    scores = [[sum(float(q[i, c]) * float(k[j, c]) for c in range(d)) for j in range(s)] for i in range(t)]
    scaled = [[x / d**0.5 for x in row] for row in scores]
    masked = [row[:] for row in scaled]
    for i in range(t):
        for j in range(s):
            if mask is not None and mask.dtype == torch.bool:
                masked[i][j] = -math.inf if mask[i, j] else masked[i][j]
            elif mask is not None:
                masked[i][j] += float(mask[i, j])
    weights = []
    for row in masked:
        exps = [math.exp(x) for x in row]
        weights.append([e / sum(exps) if sum(exps) else 0.0 for e in exps])
    output = [
        [sum(w * float(v[j, c]) for j, w in enumerate(row)) for c in range(v.shape[1])] for row in weights
    ]
    return AttentionSteps(*(torch.tensor(x, dtype=F64) for x in (scores, scaled, masked, weights, output)))


MASKS = {
    "none": None,
    "boolean": seldom(T, S),
    "causal": causal_mask(T, S),
    "float": draw(T, S, seed=3),
    "float and blocked": draw(T, S, seed=3).masked_fill(seldom(T, S), -math.inf),
    "a row of nothing": seldom(T, S).index_fill(0, torch.tensor([2]), True),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_the_five_steps_are_the_formula(mask: Tensor | None) -> None:
    q, k, v = draw(T, 3), draw(S, 3), draw(S, 2)
    for name, ours, plain in zip(
        AttentionSteps._fields, attention_steps(q, k, v, mask), by_hand(q, k, v, mask), strict=True
    ):
        assert torch.allclose(ours, plain, rtol=0, atol=1e-12), name


def test_the_five_steps_take_leading_axes_and_a_mask_that_broadcasts() -> None:
    q, k, v = draw(B, H, T, 3), draw(B, H, S, 3), draw(B, H, S, 2)
    mask = padding()[:, None, None]
    steps = attention_steps(q, k, v, mask)
    for b in range(B):
        for h in range(H):
            plain = by_hand(q[b, h], k[b, h], v[b, h], mask[b, 0].expand(T, S))
            close(steps.weights[b, h], plain.weights, 1e-12)
            close(steps.output[b, h], plain.output, 1e-12)
    output, weights = scaled_dot_product_attention(q, k, v, mask)
    assert torch.equal(output, steps.output)
    assert torch.equal(weights, steps.weights)


@pytest.mark.parametrize("name", ["none", "boolean", "float", "float and blocked"])
def test_all_ways_agree_with_torchs_function_and_their_gradients_too(name: str) -> None:
    mask = MASKS[name]
    theirs_mask = ~mask if mask is not None and mask.dtype == torch.bool else mask
    inputs = [draw(B, H, T, 6, grad=True), draw(B, H, S, 6, grad=True), draw(B, H, S, 6, seed=1, grad=True)]
    theirs = F.scaled_dot_product_attention(*inputs, theirs_mask)
    expected = gradients(theirs, inputs)
    for ours in (
        attention_steps(*inputs, mask).output,
        attend_with_weights(*inputs, mask)[0],
        attend_fused(*inputs, mask),
    ):
        close(ours, theirs, 1e-12)
        for ours_gradient, gradient in zip(gradients(ours, inputs), expected, strict=True):
            close(ours_gradient, gradient)


def test_scores_in_half_precision_are_float32_and_weights_as_near_as_the_dtype_allows() -> None:
    q, k, v = (x.bfloat16() for x in (4 * draw(T, 64), draw(S, 64), draw(S, 64)))
    steps = attention_steps(q, k, v)
    exact = attention_steps(q.double(), k.double(), v.double())
    assert steps.scores.dtype == steps.masked.dtype == torch.float32
    assert steps.weights.dtype == steps.output.dtype == torch.bfloat16
    close(steps.scaled.double(), exact.scaled, 1e-5)
    half_a_step = torch.finfo(torch.bfloat16).eps / 2
    assert bool(((steps.weights.double() - exact.weights).abs() <= half_a_step * exact.weights + 1e-5).all())


def test_raw_scores_beyond_float16_do_not_overflow() -> None:
    q = torch.full((1, 1, 2, 64), 60.0, dtype=torch.float16)  # scores 230,400; scaled 28,800
    for output in (attention_steps(q, q, q).output, attend_with_weights(q, q, q, None)[0]):
        close(output, q, 0)


# Masks


def test_causal_masks_end_in_the_lower_right_corner() -> None:
    assert causal_mask(2, 4).int().tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]
    assert causal_mask(3, 3).int().tolist() == [[0, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert causal_mask(3, 2).int().tolist() == [[1, 1], [0, 1], [0, 0]]
    assert causal_mask(1, 4).int().tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("shape", [(T, S), (B, T, S), (B, H, T, S)], ids=["TS", "BTS", "BHTS"])
@pytest.mark.parametrize("kind", ["boolean", "float"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_masks_merge_as_they_do_element_by_element(
    shape: tuple[int, ...], kind: str, padded: bool, causal: bool
) -> None:
    attn_mask = seldom(*shape) if kind == "boolean" else draw(*shape)
    pad = padding() if padded else None
    merged = merge_masks(B, H, T, S, pad, attn_mask, causal)
    assert merged is not None
    merged = merged.expand(B, H, T, S)
    full = {2: attn_mask[None, None], 3: attn_mask[:, None] if len(shape) == 3 else None, 4: attn_mask}
    own = full[len(shape)].expand(B, H, T, S)
    for b, h, t, s in torch.cartesian_prod(*(torch.arange(n) for n in (B, H, T, S))).tolist():
        hidden = bool((padded and padding()[b, s]) or (causal and s > t + S - T))
        if kind == "boolean":
            assert bool(merged[b, h, t, s]) == (hidden or bool(own[b, h, t, s]))
        else:
            assert float(merged[b, h, t, s]) == (-math.inf if hidden else float(own[b, h, t, s]))


def test_no_mask_is_none() -> None:
    assert merge_masks(B, H, T, S) is None
    assert merge_masks(B, H, 1, S, causal=True) is None  # the last query sees all


# Against torch.nn.MultiheadAttention

LAYERS = {
    "self": {},
    "no bias": {"bias": False},
    "kdim": {"kdim": 6, "vdim": 10},
    "vdim, no bias": {"vdim": 10, "bias": False},
    "batch second": {"batch_first": False},
}


def theirs_with_biases(batch_first: bool = True, **kwargs: Any) -> nn.MultiheadAttention:
    torch.manual_seed(1)
    made = nn.MultiheadAttention(D, H, batch_first=batch_first, dtype=F64, **kwargs)
    for bias in (made.in_proj_bias, made.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    return made


def their_call(theirs: nn.MultiheadAttention, inputs: list[Tensor], **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Batch first whatever the layer says, with the weights of each head."""
    if not theirs.batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    output, weights = theirs(*inputs, average_attn_weights=False, **kwargs)
    return output if theirs.batch_first else output.transpose(0, 1), weights


def their_gradients(theirs: nn.MultiheadAttention) -> list[Tensor]:
    """Weights of q, k, v, out, then their biases."""
    if theirs.in_proj_weight is not None:
        found = list(theirs.in_proj_weight.grad.chunk(3))
    else:
        found = [p.grad for p in (theirs.q_proj_weight, theirs.k_proj_weight, theirs.v_proj_weight)]
    found.append(theirs.out_proj.weight.grad)
    if theirs.in_proj_bias is not None:
        found += [*theirs.in_proj_bias.grad.chunk(3), theirs.out_proj.bias.grad]
    return found


def our_gradients(ours: MultiHeadAttention) -> list[Tensor]:
    layers = ours.projections()
    return [x.weight.grad for x in layers] + [x.bias.grad for x in layers if x.bias is not None]


def compare(theirs: nn.MultiheadAttention, inputs: list[Tensor], ours_masks: dict, masks: dict) -> None:
    """Output, each head's weights, and the gradients of every parameter and input, with and without weights."""
    expected, expected_weights = their_call(theirs, inputs, **masks)
    factor = draw(*expected.shape, seed=9)
    theirs.zero_grad()
    expected_inputs = torch.autograd.grad((expected * factor).sum(), inputs, retain_graph=True)
    (expected * factor).sum().backward()
    for need_weights in (True, False):
        ours = MultiHeadAttention.from_torch(theirs)
        output, weights = ours(*inputs, **ours_masks, need_weights=need_weights)
        close(output, expected)
        if need_weights:
            close(weights, expected_weights)
        else:
            assert weights is None
        for a, b in zip(
            torch.autograd.grad((output * factor).sum(), inputs, retain_graph=True),
            expected_inputs,
            strict=True,
        ):
            close(a, b)
        (output * factor).sum().backward()
        for a, b in zip(our_gradients(ours), their_gradients(theirs), strict=True):
            close(a, b)


@pytest.mark.parametrize("kwargs", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("source", ["self", "cross"])
def test_every_layer_of_torch_is_the_same_function(kwargs: dict[str, Any], source: str) -> None:
    theirs = theirs_with_biases(**kwargs)
    x = draw(B, T, D, grad=True)
    if source == "self" and theirs.in_proj_weight is not None:
        expected, _ = their_call(theirs, [x, x, x])
        (gradient,) = gradients(expected, [x])
        for need_weights in (True, False):
            output, _ = MultiHeadAttention.from_torch(theirs)(x, x, x, need_weights=need_weights)
            close(output, expected)
            close(gradients(output, [x])[0], gradient)
        return
    key, value = draw(B, S, theirs.kdim, grad=True), draw(B, S, theirs.vdim, seed=2, grad=True)
    compare(theirs, [x, key, value], {}, {})


@pytest.mark.parametrize("shape", [(T, S), (B, T, S), (B, H, T, S)], ids=["TS", "BTS", "BHTS"])
@pytest.mark.parametrize("kind", ["boolean", "float"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_every_mask_means_what_it_does_in_torch(
    shape: tuple[int, ...], kind: str, padded: bool, causal: bool
) -> None:
    mask = seldom(*shape) if kind == "boolean" else draw(*shape)
    mask[..., 0] = False if kind == "boolean" else 0.0  # under a causal mask the first key stays open
    pad = padding() if padded else None
    if pad is not None:
        pad[:, 0] = False
    full = mask if mask.ndim == 4 else mask[:, None] if mask.ndim == 3 else mask[None, None]
    full = full.expand(B, H, T, S)
    if causal:
        later = torch.tensor([[s > t + S - T for s in range(S)] for t in range(T)])
        full = full | later if kind == "boolean" else full.masked_fill(later, -math.inf)
    theirs_pad = pad
    if pad is not None and kind == "float":  # torch wants both of one kind
        theirs_pad = torch.zeros(B, S, dtype=F64).masked_fill(pad, -math.inf)
    theirs = theirs_with_biases()
    inputs = [draw(B, T, D, grad=True), draw(B, S, D, grad=True), draw(B, S, D, seed=2, grad=True)]
    compare(
        theirs,
        inputs,
        {"key_padding_mask": pad, "attn_mask": mask, "causal": causal},
        {"key_padding_mask": theirs_pad, "attn_mask": full.flatten(0, 1)},
    )


@pytest.mark.parametrize("kwargs", LAYERS.values(), ids=LAYERS.keys())
def test_a_layer_survives_the_way_to_torch_and_back(kwargs: dict[str, Any]) -> None:
    kwargs = {k: v for k, v in kwargs.items() if k != "batch_first"}
    ours = make(D, H, dropout=0.25, **kwargs).eval()
    theirs = ours.to_torch()
    back = MultiHeadAttention.from_torch(theirs)
    assert theirs.batch_first
    assert (theirs.dropout, back.dropout, theirs.training, back.training) == (0.25, 0.25, False, False)
    for (name, a), (other, b) in zip(ours.state_dict().items(), back.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    inputs = [draw(B, T, D), draw(B, S, ours.kdim), draw(B, S, ours.vdim)]
    close(their_call(theirs, inputs)[0], ours(*inputs)[0])
    with torch.no_grad():
        theirs.out_proj.weight.zero_()
    assert bool((back.out_proj.weight != 0).any()), "copies, not the same memory"


def test_the_four_layers_have_the_names_that_checkpoints_use() -> None:
    names = [f"{layer}_proj.{kind}" for layer in "qkv" for kind in ("weight", "bias")]
    assert list(MultiHeadAttention(D, H).state_dict()) == [*names, "out_proj.weight", "out_proj.bias"]


# Rows in which everything is masked


@BOTH_WAYS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("by", ["padding", "boolean", "float", "causal"])
def test_a_row_with_everything_masked_is_zeros_behind_the_last_projection(
    need_weights: bool, training: bool, grad: bool, by: str
) -> None:
    layer = make(D, H).train(training)
    length = 3 if by == "causal" else S  # of 5 queries the first two then come before all keys
    inputs = [draw(B, T, D, grad=True), draw(B, length, D, grad=True), draw(B, length, D, seed=2, grad=True)]
    everything = torch.zeros(B, T, length, dtype=torch.bool)
    masks: dict[str, Any] = {"causal": by == "causal"}
    if by == "causal":
        everything[:, :2] = True
    elif by == "padding":
        everything[1] = True
        masks["key_padding_mask"] = everything[:, 0]
    else:
        everything[0, 3] = everything[2, 0] = True
        blocked = torch.zeros(B, T, length, dtype=F64).masked_fill(everything, -math.inf)
        masks["attn_mask"] = everything if by == "boolean" else blocked
    with torch.set_grad_enabled(grad):
        output, weights = layer(*inputs, **masks, need_weights=need_weights)
    dead = everything.all(-1)  # (B, T)
    assert bool(output.isfinite().all())
    close(output[dead], layer.out_proj.bias.expand(int(dead.sum()), D), 0)
    alive, _ = layer(*inputs, causal=by == "causal", need_weights=need_weights)
    close(output[~dead], alive[~dead], 1e-12)
    if need_weights:
        rows = weights.transpose(1, 2)  # (B, T, H, S)
        assert bool((rows[dead] == 0).all())
        close(rows[~dead].sum(-1), torch.ones(int((~dead).sum()), H, dtype=F64), 1e-12)
    if grad:
        found = gradients(output, [*inputs, *layer.parameters()])
        assert all(bool(g.isfinite().all()) for g in found)
        assert bool((found[0][dead] == 0).all()), "such a query is never read"
        assert all(bool((g != 0).any()) for g in found[:3])


@BOTH_WAYS
def test_a_batch_of_nothing_but_padding_trains_the_last_bias_alone(need_weights: bool) -> None:
    layer, x = make(D, H), draw(B, T, D)
    layer(x, x, x, torch.ones(B, T, dtype=torch.bool), need_weights=need_weights)[0].sum().backward()
    for name, parameter in layer.named_parameters():
        assert bool((parameter.grad != 0).any()) == (name == "out_proj.bias"), name


# What is masked cannot be seen


@BOTH_WAYS
@pytest.mark.parametrize("content", [1e10, math.inf, math.nan], ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["key is value", "key and value"])
def test_padding_may_hold_anything(need_weights: bool, content: float, shared: bool) -> None:
    layer, pad = make(D, H), padding()
    results = []
    for filled in (0.0, content):
        query = draw(B, T, D, grad=True)
        key = draw(B, S, D).masked_fill(pad[..., None], filled).requires_grad_()
        value = key if shared else draw(B, S, D, seed=2).masked_fill(pad[..., None], filled).requires_grad_()
        output, weights = layer(query, key, value, pad, need_weights=need_weights)
        leaves = [query, key] if shared else [query, key, value]
        results.append([output, *gradients(output, [*leaves, *layer.parameters()])])
        assert bool((results[-1][2][pad] == 0).all()), "no gradient goes into padding"
        if need_weights:
            assert bool((weights.transpose(1, 3)[pad] == 0).all()), "exactly"
    for clean, filled_in in zip(*results, strict=True):
        assert torch.equal(clean, filled_in)


@BOTH_WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padding_in_self_attention_leaves_the_tokens_alone(need_weights: bool, dtype: torch.dtype) -> None:
    layer, pad = make(D, H).to(dtype), padding()
    outputs = []
    for content in (0.0, 1e10, math.inf, math.nan):
        x = draw(B, S, D).masked_fill(pad[..., None], content).to(dtype)
        outputs.append(layer(x, x, x, pad, need_weights=need_weights)[0][~pad])
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@BOTH_WAYS
@pytest.mark.parametrize("by", ["boolean", "float", "causal"])
def test_huge_content_behind_another_mask_is_not_seen(need_weights: bool, by: str) -> None:
    layer = make(D, H).float()
    hidden = 6  # the last key, which only the last query may look at
    masks: dict[str, Any] = {"causal": True}
    if by != "causal":
        masks = {"attn_mask": causal_mask(S, S)}
    if by == "float":
        masks["attn_mask"] = torch.zeros(S, S).masked_fill(masks["attn_mask"], -math.inf)
    outputs = []
    for content in (0.0, 1e10):
        x = draw(B, S, D).float()
        x[:, hidden] = content
        outputs.append(layer(x, x, x, **masks, need_weights=need_weights)[0][:, :hidden])
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)


def test_masked_scores_beyond_float16_are_not_seen() -> None:
    q, k, v = ((10 * draw(1, H, S, 8, seed=i)).half() for i in range(3))
    mask = causal_mask(S, S)
    expected, _ = attend_with_weights(q, k, v, mask)
    k[:, :, -1] = 60_000 * q[:, :, 0].sign()  # times the first query, which may not look there: over 10⁶
    v[:, :, -1] = 60_000
    for output in (attend_with_weights(q, k, v, mask)[0], attend_fused(q, k, v, mask)):
        torch.testing.assert_close(output[:, :, :-1], expected[:, :, :-1], rtol=1e-2, atol=1e-2)


def test_in_the_five_steps_a_masked_score_may_be_anything() -> None:
    q, k, v = draw(T, 3), draw(S, 3), draw(S, 2)
    hidden = torch.zeros(T, S, dtype=torch.bool)
    hidden[:, 2] = True
    expected = attention_steps(q, k, v, hidden)
    for content in (1e10, math.inf, math.nan):
        k[2] = content
        for mask in (hidden, torch.zeros(T, S, dtype=F64).masked_fill(hidden, -math.inf)):
            assert torch.equal(attention_steps(q, k, v, mask).weights, expected.weights)


# Ways of computing it


@BOTH_WAYS
def test_the_fused_kernel_is_used_exactly_without_weights(need_weights: bool) -> None:
    x = draw(B, S, D)
    function = F.scaled_dot_product_attention
    with mock.patch.object(F, "scaled_dot_product_attention", side_effect=function) as kernel:
        make(D, H)(x, x, x, need_weights=need_weights)
    assert kernel.call_count == (0 if need_weights else 1)


def test_the_fused_kernel_is_told_of_a_causal_mask_where_its_own_is_ours() -> None:
    layer, x = make(D, H), draw(B, S, D)

    def arguments(query: Tensor, pad: Tensor | None = None) -> tuple[Tensor | None, bool]:
        function = F.scaled_dot_product_attention
        with mock.patch.object(F, "scaled_dot_product_attention", side_effect=function) as kernel:
            layer(query, x, x, pad, causal=True, need_weights=False)
        _, _, _, mask, _, causal = kernel.call_args.args
        return mask, causal

    assert arguments(x) == (None, True)
    assert arguments(x[:, -1:]) == (None, False), "one query sees all"
    mask, causal = arguments(x[:, -2:])
    assert (mask is not None, causal) == (True, False), "torch's own would be aligned top left"
    mask, causal = arguments(x, padding())
    assert (mask is not None, causal) == (True, False)


@pytest.mark.parametrize("masked", ["none", "causal", "padding", "float"])
def test_both_ways_agree_in_float32(masked: str) -> None:
    torch.manual_seed(0)
    layer = MultiHeadAttention(64, 8)
    query, source = draw(2, 40, 64).float(), draw(2, 50, 64).float()
    kwargs: dict[str, Any] = {
        "none": {},
        "causal": {"causal": True},
        "padding": {"key_padding_mask": torch.arange(50).expand(2, 50) > 30},
        "float": {"attn_mask": draw(40, 50).float()},
    }[masked]
    outputs = [layer(query, source, source, **kwargs, need_weights=n)[0] for n in (True, False)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("together", [1, H * T * S, 2 * H * T * S, 10**9])
def test_in_however_many_parts_it_is_the_same(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, pad = make(D, H, num_kv_heads=2), padding()
    pad[1] = True  # a batch element that is all padding, in a part of its own
    inputs = [draw(B, T, D, grad=True), draw(B, S, D, grad=True), draw(B, S, D, seed=2, grad=True)]
    expected, _ = layer(*inputs, pad, need_weights=False)
    monkeypatch.setattr(attention_kernels, "TOGETHER", together)
    output, weights = layer(*inputs, pad)
    close(output, expected)
    wanted = gradients(expected, [*inputs, *layer.parameters()])
    for a, b in zip(gradients(output, [*inputs, *layer.parameters()]), wanted, strict=True):
        close(a, b)
    assert weights.shape == (B, H, T, S)


def test_a_float_mask_that_is_learnt_has_its_gradient() -> None:
    layer, x = make(D, H), draw(B, T, D)
    bias = draw(H, T, T, grad=True)
    found = []
    for need_weights in (True, False):
        output, _ = layer(x, x, x, attn_mask=bias.expand(B, H, T, T), need_weights=need_weights, causal=True)
        found += gradients(output, [bias])
    close(*found)
    assert bool((found[0].tril() != 0).any())
    assert bool((found[0].triu(1) == 0).all())


def test_gradients_are_right_to_the_second_digit_of_a_difference() -> None:
    q, k, v = (draw(2, n, 3, 2, seed=i, grad=True) for i, n in enumerate((4, 2, 2)))
    mask = causal_mask(3, 3).index_fill(0, torch.tensor([1]), True)  # with a row of nothing
    assert torch.autograd.gradcheck(lambda *x: attend_with_weights(*x, mask), (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: attend_with_weights(*x, mask)[1], (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: attend_fused(*x, mask), (q, k, v))
    layer = make(4, 2, kdim=3, vdim=5)
    inputs = (draw(2, 3, 4, grad=True), draw(2, 4, 3, grad=True), draw(2, 4, 5, grad=True))
    pad = torch.tensor([[False] * 4, [True, False, False, True]])
    assert torch.autograd.gradcheck(lambda *x: layer(*x, pad, causal=True), inputs)


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    layer, x = make(D, H), draw(B, T, D, grad=True)
    (gradient,) = torch.autograd.grad(layer(x, x, x)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    q, k, v = (draw(2, 3, 2, seed=i, grad=True) for i in range(3))
    assert torch.autograd.gradgradcheck(lambda *x: scaled_dot_product_attention(*x), (q, k, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_weights_in_half_precision_are_distributions_and_outputs_between_the_values(
    dtype: torch.dtype, causal: bool
) -> None:
    q, k, v = ((4 * draw(2, H, 300, 64, seed=i)).to(dtype) for i in range(3))  # scaled scores up to 60
    mask = causal_mask(300, 300) if causal else None
    output, weights = attend_with_weights(q, k, v, mask)
    assert (output.dtype, weights.dtype) == (dtype, dtype)
    assert bool((weights >= 0).all())
    rounding = torch.finfo(dtype).eps / 2  # each weight is off by that share of itself, so their sum is too
    assert float((weights.double().sum(-1) - 1).abs().max()) <= 1.01 * rounding
    top = v.double().max(2, keepdim=True).values
    assert bool((output.double() <= top + 3 * rounding * top.abs()).all())
    exact = attention_steps(q.double(), k.double(), v.double(), mask)
    largest = float(exact.scaled.abs().max())  # scores are rounded once, each weight by exp of that at most
    assert float((weights.double() - exact.weights).abs().max()) <= math.expm1(2 * largest * rounding)


@pytest.mark.parametrize("causal", [False, True])
def test_a_layer_in_half_precision_gives_distributions(causal: bool) -> None:
    layer, x = make(64, 4), 6 * draw(2, 300, 64)
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype)
        _, weights = layer.to(dtype)(half, half, half, causal=causal)
        assert weights.dtype == dtype
        sums = weights.detach().double().sum(-1)
        assert float((sums - 1).abs().max()) <= 1.01 * torch.finfo(dtype).eps / 2


@BOTH_WAYS
def test_autocast_and_its_masks(need_weights: bool) -> None:
    layer, x = make(D, H).float(), draw(B, S, D).float()
    expected, _ = layer(x, x, x, padding(), draw(S, S).float(), need_weights=need_weights)
    with torch.autocast("cpu", torch.bfloat16):
        output, weights = layer(x, x, x, padding(), draw(S, S).float(), need_weights=need_weights)
    assert output.dtype == torch.bfloat16
    assert weights is None or weights.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=0.1)


@BOTH_WAYS
@pytest.mark.parametrize("masked", [False, True])
def test_it_compiles_in_one_graph(need_weights: bool, masked: bool) -> None:
    layer, x = make(D, H, num_kv_heads=2), draw(B, S, D)
    pad = padding() if masked else None
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    output, _ = compiled(x, x, x, pad, causal=True, need_weights=need_weights)
    close(output, layer(x, x, x, pad, causal=True, need_weights=need_weights)[0])


@BOTH_WAYS
def test_lengths_of_zero(need_weights: bool) -> None:
    layer, x = make(D, H), draw(B, S, D)
    output, _ = layer(x, x[:, :0], x[:, :0], need_weights=need_weights)
    close(output, layer.out_proj.bias.expand(B, S, D), 0)  # a source of nothing is a row of nothing
    assert layer(x[:, :0], x, x, need_weights=need_weights)[0].shape == (B, 0, D)
    assert layer(x[:0], x[:0], x[:0], need_weights=need_weights)[0].shape == (0, S, D)


# Algebra


@BOTH_WAYS
def test_without_positions_a_permuted_sentence_is_permuted_output(need_weights: bool) -> None:
    layer, x, order = make(D, H), draw(B, S, D), torch.tensor([3, 0, 6, 2, 5, 1, 4])
    output, weights = layer(x, x, x, need_weights=need_weights)
    permuted, permuted_weights = layer(x[:, order], x[:, order], x[:, order], need_weights=need_weights)
    close(permuted, output[:, order], 1e-12)
    if need_weights:
        close(permuted_weights, weights[:, :, order][..., order], 1e-12)


@BOTH_WAYS
def test_the_order_of_the_source_does_not_matter_to_cross_attention(need_weights: bool) -> None:
    layer, x, y, order = make(D, H), draw(B, T, D), draw(B, S, D), torch.tensor([3, 0, 6, 2, 5, 1, 4])
    a, _ = layer(x, y, y, padding(), need_weights=need_weights)
    b, _ = layer(x, y[:, order], y[:, order], padding()[:, order], need_weights=need_weights)
    close(a, b, 1e-12)


@BOTH_WAYS
def test_a_causal_pass_over_a_beginning_is_the_beginning_of_the_pass(need_weights: bool) -> None:
    layer, x = make(D, H), draw(B, S, D)
    whole, _ = layer(x, x, x, causal=True, need_weights=need_weights)
    for n in range(1, S):
        close(layer(x[:, :n], x[:, :n], x[:, :n], causal=True, need_weights=need_weights)[0], whole[:, :n])
        last = layer(x[:, -n:], x, x, causal=True, need_weights=need_weights)[0]
        close(last, whole[:, -n:])


# Shared keys and values


@BOTH_WAYS
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_shared_heads_are_repeated_heads(need_weights: bool, groups: int, masked: bool) -> None:
    few, many = make(D, H, num_kv_heads=groups), make(D, H, seed=1)
    with torch.no_grad():
        for name in ("q_proj", "out_proj"):
            getattr(many, name).load_state_dict(getattr(few, name).state_dict())
        for name in ("k_proj", "v_proj"):
            shared, own = getattr(few, name), getattr(many, name)
            heads = shared.weight.view(groups, D // H, D).repeat_interleave(H // groups, dim=0)
            own.weight.copy_(heads.reshape(D, D))
            own.bias.copy_(shared.bias.view(groups, -1).repeat_interleave(H // groups, dim=0).flatten())
    x, y, pad = draw(B, T, D, grad=True), draw(B, S, D, grad=True), padding() if masked else None
    a, a_weights = few(x, y, y, pad, causal=masked, need_weights=need_weights)
    b, b_weights = many(x, y, y, pad, causal=masked, need_weights=need_weights)
    close(a, b)
    if need_weights:
        close(a_weights, b_weights)
    for g, h in zip(gradients(a, [x, y]), gradients(b, [x, y]), strict=True):
        close(g, h)


# Dropout


def test_weights_are_given_before_dropout_and_output_is_right_on_average() -> None:
    layer, x = make(D, H, dropout=0.5), draw(1, S, D)
    expected, expected_weights = layer.eval()(x, x, x)
    layer.train()
    for need_weights in (True, False):
        torch.manual_seed(0)
        draws = torch.stack([layer(x, x, x, need_weights=need_weights)[0] for _ in range(2000)])
        spread = draws.std(0) / math.sqrt(len(draws))
        assert bool(((draws.mean(0) - expected).abs() < 5 * spread).all())
        assert bool((draws.std(0) > 0).all())
    close(layer(x, x, x)[1], expected_weights, 1e-12)


@BOTH_WAYS
def test_dropout_rests_in_eval(need_weights: bool) -> None:
    layer, x = make(D, H, dropout=0.5).eval(), draw(B, S, D)
    layer_without = make(D, H)
    assert torch.equal(
        layer(x, x, x, need_weights=need_weights)[0], layer_without(x, x, x, need_weights=need_weights)[0]
    )


# Weights at the start


def test_weights_start_xavier_uniform_each_by_itself_and_biases_zero() -> None:
    torch.manual_seed(0)
    layer = MultiHeadAttention(128, 8, kdim=64, vdim=32, num_kv_heads=2)
    for linear in layer.projections():
        weight = linear.weight.detach()
        fan_out, fan_in = weight.shape
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.98 * bound < float(weight.abs().max()) <= bound
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert bool((linear.bias == 0).all())


# Rotary positions and the cache


class Rotary(nn.Module):
    """Rotary positions by complex numbers (Su et al. 2021, eq. 13), in float64, for tests alone."""

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        length, size = x.shape[2:]
        at = torch.arange(length) if positions is None else positions
        theta = 10000.0 ** (-torch.arange(0, size, 2, dtype=F64) / size)
        angle = at.double()[..., None] * theta
        angle = angle[:, None] if at.ndim == 2 else angle
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angle), angle)
        return torch.view_as_real(turned).flatten(-2)


@BOTH_WAYS
@pytest.mark.parametrize("chunks", [[1] * 7, [3, 1, 3], [2, 5], [7]], ids=str)
@pytest.mark.parametrize("rotary", [None, Rotary()], ids=["no positions", "rotary"])
@pytest.mark.parametrize("grad", [True, False])
def test_decoding_with_a_cache_is_the_full_pass(
    need_weights: bool, chunks: list[int], rotary: nn.Module | None, grad: bool
) -> None:
    layer, x = make(D, H, num_kv_heads=2, rotary=rotary), draw(B, S, D, grad=True)
    full, full_weights = layer(x, x, x, causal=True)
    cache, done, outputs = KVCache(), 0, []
    for n in chunks:
        new = x[:, done : done + n]
        with torch.set_grad_enabled(grad):
            output, weights = layer(new, new, new, causal=True, need_weights=need_weights, cache=cache)
        if need_weights:
            close(weights, full_weights[:, :, done : done + n, : done + n])
        outputs.append(output)
        done += n
        assert cache.length == done
    output = torch.cat(outputs, 1)
    close(output, full)
    if grad:
        inputs = [x, *layer.parameters()]
        for a, b in zip(gradients(output, inputs), gradients(full, inputs), strict=True):
            close(a, b)


@BOTH_WAYS
def test_decoding_behind_padding_on_the_left(need_weights: bool) -> None:
    layer, x = make(D, H, rotary=Rotary()), draw(B, S, D)
    pad = torch.arange(S) < torch.tensor([[0], [2], [3]])
    x = x.masked_fill(pad[..., None], math.nan)
    positions = (torch.arange(S) - pad.sum(1, keepdim=True)).clamp(min=0)
    cache, outputs = KVCache(), []
    for part in (slice(0, 4), slice(4, 5), slice(5, 7)):
        new, seen = x[:, part], pad[:, : part.stop]
        outputs.append(layer(new, new, new, seen, None, True, need_weights, positions[:, part], cache)[0])
    output = torch.cat(outputs, 1)
    for b in range(B):
        own = x[b : b + 1, int(pad[b].sum()) :]  # the sentence by itself, without padding
        close(output[b : b + 1, int(pad[b].sum()) :], layer(own, own, own, causal=True)[0])


def test_a_cache_that_was_filled_with_a_graph_goes_on_without() -> None:
    layer, x = make(D, H), draw(B, S, D)
    full, cache = layer(x, x, x, causal=True)[0], KVCache()
    first = layer(x[:, :3], x[:, :3], x[:, :3], causal=True, cache=cache)[0]
    with torch.no_grad():
        rest = [layer(*[x[:, i : i + 1]] * 3, causal=True, cache=cache)[0] for i in range(3, S)]
    close(torch.cat([first, *rest], 1), full)
    first.sum().backward()  # what came later wrote nothing into this graph


def test_a_cache_may_grow_before_the_gradient_is_taken_with_frozen_keys_and_values() -> None:
    layer, x = make(D, H), draw(B, S, D)
    for projection in (layer.k_proj, layer.v_proj):
        projection.requires_grad_(False)
    full, cache = layer(x, x, x, causal=True)[0], KVCache()
    parts = [layer(*[x[:, i : i + 1]] * 3, causal=True, cache=cache)[0] for i in range(S)]
    for a, b in zip(
        gradients(torch.cat(parts, 1), [layer.q_proj.weight]),
        gradients(full, [layer.q_proj.weight]),
        strict=True,
    ):
        close(a, b)


def test_tokens_in_a_cache_are_not_copied_for_each_new_one() -> None:
    cache, k = KVCache(), torch.zeros(1, 1, 1, 2)
    with torch.no_grad():
        places = {cache.append(k, k)[0].data_ptr() for _ in range(1000)}
    assert len(places) < 12


@BOTH_WAYS
def test_rotary_positions_are_relative_and_those_of_a_chunk_are_the_last(need_weights: bool) -> None:
    layer, x = make(D, H, rotary=Rotary()), draw(B, S, D)
    here, _ = layer(x, x, x, need_weights=need_weights, positions=torch.arange(S))
    there, _ = layer(x, x, x, need_weights=need_weights, positions=torch.arange(S) + 1000)
    counted, _ = layer(x, x, x, need_weights=need_weights)
    plain, _ = make(D, H)(x, x, x)
    close(here, there)
    close(here, counted)
    assert float((here - plain).detach().abs().max()) > 0.01
    causal, _ = layer(x, x, x, causal=True)
    close(layer(x[:, -3:], x, x, causal=True, need_weights=need_weights)[0], causal[:, -3:])
    longer, _ = layer(x, x[:, -3:], x[:, -3:], causal=True, need_weights=need_weights)
    close(longer[:, -1], layer(x[:, -1:], x[:, -3:], x[:, -3:], causal=True)[0][:, 0])


# What is refused

X, Y = torch.zeros(B, T, D), torch.zeros(B, S, D)
LAYER = MultiHeadAttention(D, H)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"d_model": 10, "num_heads": 4}, "d_model must be divisible by num_heads, not 10 by 4"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads must be divisible by num_kv_heads, not 4 by 3"),
        ({"num_heads": 0}, "num_heads must be at least 1, not 0"),
        ({"d_model": -8}, "d_model must be at least 1, not -8"),
        ({"kdim": 0}, "kdim must be at least 1, not 0"),
        ({"vdim": 0}, "vdim must be at least 1, not 0"),
        ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, not 0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), not 1.0"),
        ({"dropout": -0.1}, r"dropout must lie in \[0, 1\), not -0.1"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(**({"d_model": D, "num_heads": H} | kwargs))


PADDING, MASK = "key_padding_mask", "attn_mask"
UNFIT: list[tuple[tuple[Tensor, ...], dict[str, Any], str]] = [
    ((X[0], Y, Y), {}, r"query must be \(batch, length, 16\), not \(5, 16\)"),
    ((X, Y[..., :9], Y), {}, r"key must be \(batch, length, 16\), not \(3, 7, 9\)"),
    ((X, Y, Y[None]), {}, r"value must be \(batch, length, 16\), not \(1, 3, 7, 16\)"),
    ((X, Y, Y[:, :6]), {}, r"one length: .*key \(3, 7, 16\), value \(3, 6, 16\)"),
    ((X[:2], Y, Y), {}, r"one batch size: query \(2, 5, 16\), key \(3, 7, 16\)"),
    ((X, Y, Y), {PADDING: torch.zeros(B, T).bool()}, r"key_padding_mask .*\(3, 7\).* not \(3, 5\)"),
    ((X, Y, Y), {PADDING: torch.zeros(B, S)}, r"key_padding_mask .*boolean.*float32.*\.bool\(\)"),
    ((X, Y, Y), {PADDING: torch.zeros(B, S).byte()}, r"key_padding_mask .*boolean.*uint8.*\.bool\(\)"),
    ((X, Y, Y), {MASK: torch.zeros(T, S).byte()}, r"attn_mask .*boolean.*or float.*uint8.*\.bool\(\)"),
    ((X, Y, Y), {MASK: torch.zeros(T, S).long()}, r"attn_mask .*boolean.*or float.*int64.*\.bool\(\)"),
    ((X, Y, Y), {MASK: torch.zeros(S, T)}, r"attn_mask must be \(T, S\) = \(5, 7\).*not \(7, 5\)"),
    ((X, Y, Y), {MASK: torch.zeros(H, T, S)}, r"\(B, T, S\) = \(3, 5, 7\).*not \(4, 5, 7\)"),
    ((X, Y, Y), {MASK: torch.zeros(B * H, T, S)}, r"not \(12, 5, 7\).*attn_mask.view\(3, 4, 5, 7\)"),
    ((X, X, X), {"cache": KVCache()}, "cache .* causal=True"),
    ((X, X, X), {"positions": torch.arange(T)}, "positions are for rotary"),
]


@pytest.mark.parametrize(("inputs", "kwargs", "message"), UNFIT, ids=[case[2] for case in UNFIT])
@BOTH_WAYS
def test_inputs_that_do_not_fit_are_refused(
    inputs: tuple[Tensor, ...], kwargs: dict[str, Any], message: str, need_weights: bool
) -> None:
    with pytest.raises(ValueError, match=message):
        LAYER(*inputs, **kwargs, need_weights=need_weights)


def test_positions_for_two_lengths_are_refused() -> None:
    layer = MultiHeadAttention(D, H, rotary=Rotary())
    with pytest.raises(ValueError, match=r"positions .*query \(3, 5, 16\), key \(3, 7, 16\)"):
        layer(X, Y, Y, positions=torch.arange(T))


def test_a_cache_of_another_batch_is_refused() -> None:
    cache = KVCache()
    LAYER(X, X, X, causal=True, cache=cache)
    with pytest.raises(ValueError, match=r"cache holds .*\(3, 4, 5, 4\).*\(2, 4, 5, 4\) cannot follow"):
        LAYER(X[:2], X[:2], X[:2], causal=True, cache=cache)


@pytest.mark.parametrize(
    ("shapes", "mask", "message"),
    [
        (((5, 3), (7, 4), (7, 2)), None, r"q \(5, 3\), k \(7, 4\)"),
        (((5, 3), (7, 3), (6, 2)), None, r"k \(7, 3\), v \(6, 2\)"),
        (((3,), (7, 3), (7, 2)), None, r"q must be \(…, length, size\), not \(3,\)"),
        (((5, 3), (7, 3), (7, 2)), torch.zeros(5, 5), r"mask must broadcast to the scores' \(5, 7\), not \(5, 5\)"),
        (((5, 3), (7, 3), (7, 2)), torch.zeros(2, 5, 7), r"mask must broadcast .*\(5, 7\), not \(2, 5, 7\)"),
        (((5, 3), (7, 3), (7, 2)), torch.zeros(5, 7).int(), "mask must be boolean.*int32"),
        (((2, 5, 3), (3, 7, 3), (3, 7, 2)), None, r"q \(2, 5, 3\), k \(3, 7, 3\), v \(3, 7, 2\)"),
    ],
)  # fmt: skip
def test_steps_that_cannot_be_taken_are_refused(
    shapes: tuple[tuple[int, ...], ...], mask: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        attention_steps(*(torch.zeros(shape) for shape in shapes), mask)


@pytest.mark.parametrize("argument", ["add_bias_kv", "add_zero_attn"])
def test_layers_of_torch_that_have_no_counterpart_are_refused(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}=True"):
        MultiHeadAttention.from_torch(nn.MultiheadAttention(D, H, **{argument: True}))


def test_steps_of_integers_whose_weights_would_all_be_zero_are_refused() -> None:
    x = torch.ones(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="v must be of a floating dtype"):
        scaled_dot_product_attention(x.float(), x.float(), x)


def test_layers_without_a_counterpart_in_torch_are_refused() -> None:
    with pytest.raises(ValueError, match="num_kv_heads = num_heads, not 2 and 4"):
        MultiHeadAttention(D, H, num_kv_heads=2).to_torch()
    with pytest.raises(ValueError, match="rotary"):
        MultiHeadAttention(D, H, rotary=Rotary()).to_torch()
