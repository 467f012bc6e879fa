"""Attention, broken on purpose: each mistake is caught by the proofs that it should be caught by.

A mutant is the source of attention, of its masks or of its cache with one place changed, compiled anew. A proof takes
the module of attention and asserts; all proofs hold for the true one, and those named beside a mutant fail for it, by
their assertion and by no other error.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.nn import attention, kv_cache, masks

pytestmark = pytest.mark.slow
B, H, T, S, D = 2, 4, 3, 5, 8
F64 = torch.float64
BOTH = (True, False)  # with weights, and by the fused kernel


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def draw(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=F64, requires_grad=grad)


def layer_of(module: ModuleType, **kwargs: object) -> nn.Module:
    """A layer of the module in float64, with biases."""
    layer = module.MultiHeadAttention(D, H, **kwargs).double()
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj):
        nn.init.normal_(projection.bias)
    return layer


def equal(a: Tensor, b: Tensor, atol: float = 1e-9) -> None:
    assert a.shape == b.shape
    assert bool(((a - b).abs() <= atol).all())  # false where there is a NaN


def closed_form(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output and weights of (…, T, Dh), (…, S, Dh), row by row and written another way: exp(q·k/√d)/Σ."""
    kernel = torch.exp(torch.einsum("...td,...sd->...ts", q, k) / q.shape[-1] ** 0.5)
    if blocked is not None:
        kernel = kernel * (~blocked)
    total = kernel.sum(-1, keepdim=True)
    weights = torch.where(total > 0, kernel / total.clamp(min=1e-300), 0.0)
    return torch.einsum("...ts,...sd->...td", weights, v), weights


# Proofs


def steps_are_the_formula(module: ModuleType) -> None:
    q, k, v = draw(T, 4), draw(S, 4), draw(S, 2)
    blocked = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]]).bool()
    steps = module.attention_steps(q, k, v, blocked)
    equal(steps.scores, torch.einsum("td,sd->ts", q, k))
    equal(steps.scaled, steps.scores / 2)  # √4
    assert torch.equal(steps.masked, torch.where(blocked, -math.inf, steps.scaled))
    output, weights = closed_form(q, k, v, blocked)
    equal(steps.weights, weights)
    equal(steps.output, output)
    float_mask = draw(T, S)
    equal(module.attention_steps(q, k, v, float_mask).masked, steps.scaled + float_mask)


def a_row_of_nothing_in_the_steps_is_zeros(module: ModuleType) -> None:
    q, k, v = draw(T, 4, grad=True), draw(S, 4), draw(S, 2)
    steps = module.attention_steps(q, k, v, torch.ones(T, S, dtype=torch.bool))
    equal(steps.weights, torch.zeros(T, S, dtype=F64), 0)
    (gradient,) = torch.autograd.grad(steps.output.sum(), q)
    equal(gradient, torch.zeros(T, 4, dtype=F64), 0)


def steps_keep_their_precision_in_bfloat16(module: ModuleType) -> None:
    q, k, v = (x.bfloat16() for x in (4 * draw(T, 64), draw(S, 64), draw(S, 64)))
    exact = closed_form(q.double(), k.double(), v.double())[1]
    step = torch.finfo(torch.bfloat16).eps
    assert bool(
        ((module.attention_steps(q, k, v).weights.double() - exact).abs() <= step * exact + 1e-5).all()
    )


def heads_are_slices_of_the_projections(module: ModuleType) -> None:
    """Every head by itself, from its own rows of the projections, joined side by side (equation 2)."""
    layer, x, y, z = layer_of(module), draw(B, T, D), draw(B, S, D), draw(B, S, D)
    q, k, v = (
        F.linear(x, *qkv(layer.q_proj)),
        F.linear(y, *qkv(layer.k_proj)),
        F.linear(z, *qkv(layer.v_proj)),
    )
    size = D // H
    heads = [slice(h * size, (h + 1) * size) for h in range(H)]
    found = [closed_form(q[..., s], k[..., s], v[..., s]) for s in heads]
    expected = F.linear(torch.cat([output for output, _ in found], -1), *qkv(layer.out_proj))
    for need_weights in BOTH:
        output, weights = layer(x, y, z, need_weights=need_weights)
        equal(output, expected)
        if need_weights:
            equal(weights, torch.stack([weights for _, weights in found], 1))


def qkv(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    return layer.weight, layer.bias


def torchs_layer_is_the_same_function(module: ModuleType) -> None:
    for kdim, vdim in ((None, None), (6, 10)):
        theirs = nn.MultiheadAttention(D, H, kdim=kdim, vdim=vdim, batch_first=True, dtype=F64)
        for bias in (theirs.in_proj_bias, theirs.out_proj.bias):
            nn.init.normal_(bias)
        ours = module.MultiHeadAttention.from_torch(theirs)
        inputs = (draw(B, T, D), draw(B, S, kdim or D), draw(B, S, vdim or D))
        expected, expected_weights = theirs(*inputs, average_attn_weights=False)
        output, weights = ours(*inputs)
        equal(output, expected)
        equal(weights, expected_weights)
        back, _ = ours.to_torch()(*inputs)
        equal(back, expected)


def masks_block_what_they_say(module: ModuleType) -> None:
    """A boolean, a float and a padding mask, each against the closed form with what it blocks."""
    layer, x, y = layer_of(module), draw(B, T, D), draw(B, S, D)
    blocked = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 1, 0, 0], [1, 0, 1, 1, 0]]).bool()
    pad = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 0, 1]]).bool()
    added = torch.zeros(T, S, dtype=F64).masked_fill(blocked, -math.inf)
    everywhere = torch.zeros(B, T, S, dtype=torch.bool)
    for given, hidden in (
        ({"attn_mask": blocked}, everywhere | blocked),
        ({"attn_mask": added}, everywhere | blocked),
        ({"key_padding_mask": pad}, everywhere | pad[:, None]),
        ({"attn_mask": blocked, "key_padding_mask": pad}, blocked | pad[:, None]),
        ({"attn_mask": added, "key_padding_mask": pad}, blocked | pad[:, None]),
    ):
        expected, expected_weights = by_projections(layer, x, y, hidden)
        for need_weights in BOTH:
            output, weights = layer(x, y, y, **given, need_weights=need_weights)
            equal(output, expected)
            if need_weights:
                equal(weights, expected_weights)


def by_projections(layer: nn.Module, x: Tensor, y: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The layer by the closed form; hidden is (B, T, S)."""
    q, k, v = (
        F.linear(z, *qkv(p)).view(B, -1, H, D // H).permute(0, 2, 1, 3)
        for z, p in ((x, layer.q_proj), (y, layer.k_proj), (y, layer.v_proj))
    )
    output, weights = closed_form(q, k, v, hidden[:, None])
    joined = torch.cat([output[:, h] for h in range(H)], -1)
    return F.linear(joined, *qkv(layer.out_proj)), weights


def causal_ends_in_the_lower_right_corner(module: ModuleType) -> None:
    layer, x = layer_of(module), draw(B, S, D)
    later = torch.tensor([[s > t for s in range(S)] for t in range(S)]).expand(B, S, S)
    expected, _ = by_projections(layer, x, x, later)
    for need_weights in BOTH:
        equal(layer(x, x, x, causal=True, need_weights=need_weights)[0], expected)
        equal(layer(x[:, -T:], x, x, causal=True, need_weights=need_weights)[0], expected[:, -T:])
        equal(layer(x[:, -1:], x, x, causal=True, need_weights=need_weights)[0], expected[:, -1:])


def a_row_of_nothing_is_zeros(module: ModuleType) -> None:
    layer = layer_of(module)
    pad = torch.tensor([[False] * S, [True] * S])
    for need_weights in BOTH:
        x, y = draw(B, T, D, grad=True), draw(B, S, D, grad=True)
        output, weights = layer(x, y, y, pad, need_weights=need_weights)
        equal(output[1], layer.out_proj.bias.expand(T, D), 0)
        if need_weights:
            equal(weights[1], torch.zeros(H, T, S, dtype=F64), 0)
        gradients = torch.autograd.grad(output.square().sum(), [x, y, *layer.parameters()])
        assert all(bool(g.isfinite().all()) for g in gradients)
        equal(gradients[0][1], torch.zeros(T, D, dtype=F64), 0)


def padding_may_hold_anything(module: ModuleType) -> None:
    layer, x, y = layer_of(module), draw(B, T, D), draw(B, S, D)
    pad = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 1, 1, 1]]).bool()
    for need_weights in BOTH:
        expected, _ = layer(x, y, y, pad, need_weights=need_weights)
        for content in (1e10, math.inf, math.nan):
            filled = y.masked_fill(pad[..., None], content)
            equal(layer(x, filled, filled, pad, need_weights=need_weights)[0], expected, 0)
            equal(layer(x, filled, filled.clone(), pad, need_weights=need_weights)[0], expected, 0)


def decoding_is_the_full_pass(module: ModuleType) -> None:
    for rotary in (None, Turn()):
        layer, x = layer_of(module, rotary=rotary, num_kv_heads=2), draw(B, S, D)
        full, _ = layer(x, x, x, causal=True)
        for grad in (True, False):
            cache, outputs = module.KVCache(), []
            with torch.set_grad_enabled(grad):
                for part in (slice(0, 1), slice(1, 2), slice(2, 4), slice(4, 5)):
                    new = x[:, part]
                    outputs.append(layer(new, new, new, causal=True, cache=cache)[0])
            equal(torch.cat(outputs, 1), full)
        equal(layer(x[:, -T:], x, x, causal=True)[0], full[:, -T:])


def queries_and_keys_are_turned(module: ModuleType) -> None:
    """At counted positions and at given ones, against the same layer without rotary on turned projections."""
    layer, x, turn = layer_of(module, rotary=Turn()), draw(B, S, D), Turn()
    for at in (None, torch.tensor([0, 2, 3, 7, 8])):
        q, k, v = (
            F.linear(x, *qkv(p)).view(B, S, H, D // H).transpose(1, 2)
            for p in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        output, weights = closed_form(turn(q, at), turn(k, at), v)
        expected = F.linear(torch.cat([output[:, h] for h in range(H)], -1), *qkv(layer.out_proj))
        for need_weights in BOTH:
            equal(layer(x, x, x, need_weights=need_weights, positions=at)[0], expected)
        equal(layer(x, x, x, positions=at)[1], weights)


class Turn(nn.Module):
    """Each pair of a head turned by its position, in radians."""

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        at = torch.arange(x.shape[2]) if positions is None else positions
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.exp(1j * at.double())[:, None]
        return torch.view_as_real(pairs).flatten(-2)


def heads_share_keys_and_values_by_neighbourhood(module: ModuleType) -> None:
    """Head h uses group h // 2, with weights, fused, and where the steps are taken because of a learnt mask."""
    layer, x = layer_of(module, num_kv_heads=2), draw(B, S, D)
    size = D // H
    q, k, v = (F.linear(x, *qkv(p)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    outputs = []
    for h in range(H):
        own, shared = slice(h * size, (h + 1) * size), slice(h // 2 * size, (h // 2 + 1) * size)
        outputs.append(closed_form(q[..., own], k[..., shared], v[..., shared])[0])
    expected = F.linear(torch.cat(outputs, -1), *qkv(layer.out_proj))
    learnt = torch.zeros(S, S, dtype=F64, requires_grad=True)
    for need_weights in BOTH:
        equal(layer(x, x, x, need_weights=need_weights)[0], expected)
        equal(layer(x, x, x, attn_mask=learnt, need_weights=need_weights)[0], expected)


def gradients_are_those_of_the_closed_form(module: ModuleType) -> None:
    q, k, v = draw(B, H, T, 2, grad=True), draw(B, 2, S, 2, grad=True), draw(B, 2, S, 2, grad=True)
    blocked = torch.tensor([[0, 1, 0, 0, 1], [1, 1, 1, 1, 1], [1, 0, 1, 1, 0]]).bool()
    output, weights = module.attend_with_weights(q, k, v, blocked)
    repeated = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    for pair, expected_pair in (
        ((output, weights), closed_form(q, *repeated, blocked)),
        ((output,), closed_form(q, *repeated, blocked)[:1]),
    ):
        ours = torch.autograd.grad(weighed(pair), [q, k, v], retain_graph=True)
        expected = torch.autograd.grad(weighed(expected_pair), [q, k, v], retain_graph=True)
        for a, b in zip(ours, expected, strict=True):
            equal(a, b)


def weighed(tensors: tuple[Tensor, ...]) -> Tensor:
    """A scalar to which every number contributes in its own way."""
    return sum(
        ((x * torch.linspace(1, 2, x.numel(), dtype=F64).view(x.shape)).sum() for x in tensors),
        start=torch.zeros((), dtype=F64),
    )


def half_precision_gives_distributions(module: ModuleType) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        q, k, v = ((4 * draw(1, 2, 200, 64)).to(dtype) for _ in range(3))
        _, weights = module.attend_with_weights(q, k, v, None)
        assert bool((weights >= 0).all())
        sums = weights.double().sum(-1)
        assert float((sums - 1).abs().max()) <= 1.01 * torch.finfo(dtype).eps / 2


def dropout_leaves_the_weights_that_are_given_and_rests_in_eval(module: ModuleType) -> None:
    layer, x = layer_of(module, dropout=0.5), draw(B, S, D)
    expected, expected_weights = layer.eval()(x, x, x)
    equal(layer(x, x, x)[0], expected, 0)
    equal(layer(x, x, x, need_weights=False)[0], expected)
    dropped, weights = layer.train()(x, x, x)
    equal(weights, expected_weights)
    assert not torch.allclose(dropped, expected)


Proof = Callable[[ModuleType], None]
PROOFS: list[Proof] = [
    steps_are_the_formula,
    a_row_of_nothing_in_the_steps_is_zeros,
    steps_keep_their_precision_in_bfloat16,
    heads_are_slices_of_the_projections,
    torchs_layer_is_the_same_function,
    masks_block_what_they_say,
    causal_ends_in_the_lower_right_corner,
    a_row_of_nothing_is_zeros,
    padding_may_hold_anything,
    decoding_is_the_full_pass,
    queries_and_keys_are_turned,
    heads_share_keys_and_values_by_neighbourhood,
    gradients_are_those_of_the_closed_form,
    half_precision_gives_distributions,
    dropout_leaves_the_weights_that_are_given_and_rests_in_eval,
]


# Mutants


@dataclass
class Mutant:
    """A place in the source, what stands there instead, and the proofs that find it."""

    name: str
    old: str
    new: str
    caught_by: tuple[Proof, ...]


MUTANTS = [
    Mutant(
        "mask after softmax, in the steps",
        "weights = softmax(masked)",
        "weights = apply_mask(softmax(scaled), mask).clamp(min=0)",
        (steps_are_the_formula,),
    ),
    Mutant(
        "no softmax, in the quick way",
        "            softmax_(a)\n",
        "",
        (heads_are_slices_of_the_projections, masks_block_what_they_say, half_precision_gives_distributions),
    ),
    Mutant(
        "softmax before the mask is added",
        "            if bias is not None:\n                a.add_(bias[part])\n            softmax_(a)\n",
        "            softmax_(a)\n            if bias is not None:\n                a.add_(bias[part]).clamp_(min=0)\n",
        (masks_block_what_they_say, gradients_are_those_of_the_closed_form),
    ),
    Mutant(
        "mask inverted, in the steps",
        "scaled.masked_fill(mask, -math.inf)",
        "scaled.masked_fill(~mask, -math.inf)",
        (steps_are_the_formula,),
    ),
    Mutant(
        "mask inverted, in the quick way",
        "masked_fill_(mask, -math.inf)",
        "masked_fill_(~mask, -math.inf)",
        (masks_block_what_they_say, causal_ends_in_the_lower_right_corner),
    ),
    Mutant(
        "mask inverted, in the fused way",
        "~mask if mask.dtype == torch.bool else mask",
        "mask",
        (masks_block_what_they_say, causal_ends_in_the_lower_right_corner),
    ),
    Mutant(
        "heads joined without transposing",
        "output.transpose(1, 2).reshape(B, T, D)",
        "output.reshape(B, T, D)",
        (heads_are_slices_of_the_projections, torchs_layer_is_the_same_function),
    ),
    Mutant(
        "heads taken from the wrong axis",
        "x.unflatten(-1, (heads, -1)).transpose(1, 2)",
        "x.unflatten(-1, (-1, heads)).movedim(-1, 1)",
        (heads_are_slices_of_the_projections, torchs_layer_is_the_same_function),
    ),
    Mutant(
        "scaled by d_k, in the steps",
        "scores / math.sqrt(d_k)",
        "scores / d_k",
        (steps_are_the_formula,),
    ),
    Mutant(
        "scaled by √d_model, in the quick way",
        "alpha=Dh**-0.5, out=z",
        "alpha=(H * Dh) ** -0.5, out=z",
        (heads_are_slices_of_the_projections, torchs_layer_is_the_same_function),
    ),
    Mutant(
        "softmax over the queries, in the steps",
        "torch.softmax(masked.masked_fill(nowhere, 0), -1)",
        "torch.softmax(masked.masked_fill(nowhere, 0), -2)",
        (steps_are_the_formula,),
    ),
    Mutant(
        "softmax over the queries, in the quick way",
        "torch.softmax(scores, -1, out=scores)",
        "torch.softmax(scores, -2, out=scores)",
        (heads_are_slices_of_the_projections, half_precision_gives_distributions),
    ),
    Mutant(
        "softmax without the largest score taken off, in half precision",
        "torch.softmax(scores, -1, out=scores)",
        "scores.exp_().div_(scores.sum(-1, keepdim=True))",
        (half_precision_gives_distributions,),
    ),
    Mutant(
        "scores in bfloat16",
        "return wide(q) @ wide(k).transpose(-2, -1)",
        "return q @ k.transpose(-2, -1)",
        (steps_keep_their_precision_in_bfloat16,),
    ),
    Mutant(
        "causal from the upper left corner",
        ".triu(S - T + 1)",
        ".triu(1)",
        (causal_ends_in_the_lower_right_corner, decoding_is_the_full_pass),
    ),
    Mutant(
        "causal one too early",
        ".triu(S - T + 1)",
        ".triu(S - T)",
        (causal_ends_in_the_lower_right_corner,),
    ),
    Mutant(
        "the kernel's triangle where lengths differ",
        "triangle = causal and alone and T == S and not need_weights",
        "triangle = causal and alone and not need_weights",
        (causal_ends_in_the_lower_right_corner,),
    ),
    Mutant(
        "−1e9 for −∞, in the steps",
        "scaled.masked_fill(mask, -math.inf)",
        "scaled.masked_fill(mask, -1e9)",
        (steps_are_the_formula, a_row_of_nothing_in_the_steps_is_zeros),
    ),
    Mutant(
        "a row of nothing is uniform",
        "return mask.masked_fill(nowhere, 0), nowhere",
        "return mask.masked_fill(nowhere, 0), None",
        (a_row_of_nothing_is_zeros,),
    ),
    Mutant(
        "a row of nothing is left to softmax",
        "if not reading_waits and not nowhere.any():",
        "if not reading_waits:",
        (a_row_of_nothing_is_zeros, gradients_are_those_of_the_closed_form),
    ),
    Mutant(
        "a row of nothing in the steps is 0/0",
        "torch.softmax(masked.masked_fill(nowhere, 0), -1).masked_fill(nowhere, 0)",
        "torch.softmax(masked, -1)",
        (a_row_of_nothing_in_the_steps_is_zeros,),
    ),
    Mutant(
        "padding of queries",
        "blocked = key_padding_mask[:, None, None, :]",
        "blocked = torch.nn.functional.pad(key_padding_mask, (0, max(T - S, 0)))[:, None, :T, None]",
        (masks_block_what_they_say,),
    ),
    Mutant(
        "padding is left as it is",
        "key, value = without_padding(key, value, key_padding_mask[:, past:])",
        "pass",
        (padding_may_hold_anything,),
    ),
    Mutant(
        "padding of values is left as it is",
        "value.masked_fill(hidden, 0)",
        "value",
        (padding_may_hold_anything,),
    ),
    Mutant(
        "padding forgotten beside a boolean mask",
        "return attn_mask if blocked is None else attn_mask | blocked",
        "return attn_mask",
        (masks_block_what_they_say,),
    ),
    Mutant(
        "a cache that overwrites",
        "buffer[:, :, self.length : end] = new",
        "buffer[:, :, :count] = new",
        (decoding_is_the_full_pass,),
    ),
    Mutant(
        "a cache that puts what is new first",
        "torch.cat((buffer[:, :, : self.length], new), dim=2)",
        "torch.cat((new, buffer[:, :, : self.length]), dim=2)",
        (decoding_is_the_full_pass,),
    ),
    Mutant(
        "positions of queries that do not go on from the cache",
        "first_query = S - T if causal else 0",
        "first_query = 0",
        (decoding_is_the_full_pass,),
    ),
    Mutant(
        "positions of keys that do not go on from the cache",
        "self.rotary(k, counted(past, k))",
        "self.rotary(k)",
        (decoding_is_the_full_pass,),
    ),
    Mutant(
        "keys turned as queries are",
        "self.rotary(k, counted(past, k))",
        "self.rotary(k, counted(first_query, k))",
        (decoding_is_the_full_pass,),
    ),
    Mutant(
        "keys not turned",
        "self.rotary(k, counted(past, k))",
        "k",
        (queries_and_keys_are_turned,),
    ),
    Mutant(
        "given positions for queries alone",
        "self.rotary(q, positions), self.rotary(k, positions)",
        "self.rotary(q, positions), self.rotary(k)",
        (queries_and_keys_are_turned,),
    ),
    Mutant(
        "groups that take turns, in the steps",
        "k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)",
        "k, v = k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1)",
        (heads_share_keys_and_values_by_neighbourhood,),
    ),
    Mutant(
        "groups that take turns, in the quick way",
        "return x.reshape(b * G, H // G * T, N)",
        "return x.view(b, H // G, G, T, N).transpose(1, 2).reshape(b * G, H // G * T, N)",
        (heads_share_keys_and_values_by_neighbourhood,),
    ),
    Mutant(
        "biases dropped on the way from torch",
        "layer.bias.copy_(bias)",
        "pass",
        (torchs_layer_is_the_same_function,),
    ),
    Mutant(
        "queries and keys swapped on the way from torch",
        "weights = source.in_proj_weight.chunk(3)",
        "k, q, v = source.in_proj_weight.chunk(3)\n        weights = (q, k, v)",
        (torchs_layer_is_the_same_function,),
    ),
    Mutant(
        "a gradient without its sum along the row",
        "dz.sub_(by_group(r[part], G))",
        "pass",
        (gradients_are_those_of_the_closed_form,),
    ),
    Mutant(
        "a gradient without that of the weights",
        "if grad_weights is not None:",
        "if False:",
        (gradients_are_those_of_the_closed_form,),
    ),
    Mutant(
        "a gradient without the scale",
        "dz.mul_(a).mul_(Dh**-0.5)",
        "dz.mul_(a)",
        (gradients_are_those_of_the_closed_form,),
    ),
    Mutant(
        "weights given after dropout",
        "weighted_sum(F.dropout(steps.weights, dropout), v), steps.weights",
        "weighted_sum(F.dropout(steps.weights, dropout), v), F.dropout(steps.weights, dropout)",
        (dropout_leaves_the_weights_that_are_given_and_rests_in_eval,),
    ),
    Mutant(
        "dropout in eval",
        "self.dropout if self.training else 0.0",
        "self.dropout",
        (dropout_leaves_the_weights_that_are_given_and_rests_in_eval,),
    ),
]

SOURCES = {
    module.__name__: Path(str(module.__file__)).read_text(encoding="utf-8")
    for module in (masks, kv_cache, attention)  # the last imports from the others
}


def compiled(sources: dict[str, str]) -> ModuleType:
    """The module of the last source, which finds those before it where it imports them from."""
    with pytest.MonkeyPatch.context() as patch:
        for name, source in sources.items():
            module = ModuleType(name)
            exec(compile(source, name, "exec"), module.__dict__)
            patch.setitem(sys.modules, name, module)
    return module


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.__name__)
def test_what_is_proven_holds(proof: Proof) -> None:
    proof(compiled(SOURCES))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mistake_is_caught_by_the_proofs_that_should(mutant: Mutant) -> None:
    assert sum(source.count(mutant.old) for source in SOURCES.values()) == 1, "the place is to be one"
    module = compiled({name: source.replace(mutant.old, mutant.new) for name, source in SOURCES.items()})
    assert mutant.caught_by
    for proof in mutant.caught_by:
        with pytest.raises(AssertionError):
            proof(module)


def test_every_proof_catches_something() -> None:
    assert {proof.__name__ for m in MUTANTS for proof in m.caught_by} == {proof.__name__ for proof in PROOFS}
