"""Attention beside torchtune's and transformers' LLaMA, with the same weights, where they are installed.

Both share keys and values among heads, both turn queries and keys by their own rotary positions: interleaved in
torchtune, in halves in transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.nn.attention import MultiHeadAttention
from experiments.nn.kv_cache import KVCache
from experiments.nn.positions import RotaryPosEncoding

pytestmark = pytest.mark.slow
B, L, S, D, H = 2, 9, 12, 32, 4
DH = D // H
GROUPS = pytest.mark.parametrize("groups", [1, 2, 4])
BOTH_WAYS = pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "fused"])


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def torchtune_like(ours: MultiHeadAttention, causal: bool, rotary: nn.Module | None = None) -> Any:
    """torchtune's MultiHeadAttention with our four layers."""
    modules = pytest.importorskip("torchtune.modules")
    return modules.MultiHeadAttention(
        embed_dim=D,
        num_heads=H,
        num_kv_heads=ours.num_kv_heads,
        head_dim=DH,
        q_proj=ours.q_proj,
        k_proj=ours.k_proj,
        v_proj=ours.v_proj,
        output_proj=ours.out_proj,
        pos_embeddings=rotary,
        is_causal=causal,
    ).double()


@GROUPS
@BOTH_WAYS
@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_is_torchtunes(groups: int, need_weights: bool, causal: bool) -> None:
    ours = MultiHeadAttention(D, H, num_kv_heads=groups).double()
    theirs = torchtune_like(ours, causal)
    results = []
    for way in ("ours", "theirs"):
        x = torch.randn(
            B, L, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        ).requires_grad_()
        output = ours(x, x, x, causal=causal, need_weights=need_weights)[0] if way == "ours" else theirs(x, x)
        results.append([output, *torch.autograd.grad(output.square().sum(), [x, *ours.parameters()])])
    for a, b in zip(*results, strict=True):
        close(a, b)


@GROUPS
@BOTH_WAYS
def test_cross_attention_with_a_mask_is_torchtunes_and_so_is_a_row_of_nothing(
    groups: int, need_weights: bool
) -> None:
    ours = MultiHeadAttention(D, H, num_kv_heads=groups).double()
    x, y = torch.randn(B, L, D).double(), torch.randn(B, S, D).double()
    blocked = torch.rand(B, L, S) > 0.5
    blocked[0, 3] = True
    output, _ = ours(x, y, y, attn_mask=blocked, need_weights=need_weights)
    close(output, torchtune_like(ours, False)(x, y, mask=~blocked))  # whose True may be looked at


@GROUPS
@BOTH_WAYS
def test_with_rotary_positions_and_a_cache_it_is_torchtunes_full_pass(
    groups: int, need_weights: bool
) -> None:
    modules = pytest.importorskip("torchtune.modules")
    ours = MultiHeadAttention(D, H, num_kv_heads=groups, rotary=RotaryPosEncoding(DH)).double()
    theirs = torchtune_like(ours, True, modules.RotaryPositionalEmbeddings(DH, max_seq_len=64))
    x = torch.randn(B, L, D).double()
    expected = theirs(x, x)  # whose angles are float32
    close(ours(x, x, x, causal=True, need_weights=need_weights)[0], expected, 1e-5)
    cache = KVCache()
    parts = [x[:, :4], x[:, 4:5], x[:, 5:]]
    outputs = [ours(p, p, p, causal=True, need_weights=need_weights, cache=cache)[0] for p in parts]
    close(torch.cat(outputs, 1), expected, 1e-5)
    places = torch.stack([torch.arange(L) + 7, torch.arange(L) * 3])
    moved = ours(x, x, x, causal=True, need_weights=need_weights, positions=places)[0]
    close(moved, theirs(x, x, input_pos=places), 1e-5)


@GROUPS
@BOTH_WAYS
def test_it_is_the_attention_of_transformers_llama(groups: int, need_weights: bool) -> None:
    transformers = pytest.importorskip("transformers")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = transformers.LlamaConfig(
        hidden_size=D, num_attention_heads=H, num_key_value_heads=groups, attention_bias=True
    )
    config._attn_implementation = "eager"
    theirs = llama.LlamaAttention(config, 0).double().eval()
    rotary = RotaryPosEncoding(DH, layout="half")
    ours = MultiHeadAttention(D, H, num_kv_heads=groups, rotary=rotary).double()
    state = {name.replace("o_proj", "out_proj"): x for name, x in theirs.state_dict().items()}
    ours.load_state_dict(state)
    x = torch.randn(B, L, D).double()
    embeddings = llama.LlamaRotaryEmbedding(config)(x, torch.arange(L)[None])
    mask = torch.full((L, L), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    expected, expected_weights = theirs(x, embeddings, mask)
    output, weights = ours(x, x, x, causal=True, need_weights=need_weights)
    close(output, expected, 1e-6)  # their softmax is float32
    if need_weights:
        close(weights, expected_weights, 1e-6)
