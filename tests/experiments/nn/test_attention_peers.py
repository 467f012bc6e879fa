"""Attention beside torchtune's and transformers' LLaMA, with the same weights, where they are installed.

Both share keys and values among heads, both turn queries and keys by their own rotary positions: interleaved in
torchtune, in halves in transformers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from experiments.nn.attention import MultiHeadAttention
from experiments.nn.kv_cache import KVCache
from experiments.nn.positions import RotaryPosEncoding
from tests.experiments.nn.helpers import BOTH_WAYS, F64, all_near, near, randn

pytestmark = [pytest.mark.slow, BOTH_WAYS, pytest.mark.parametrize("groups", [1, 2, 4])]
B, L, S, D, H = 2, 9, 12, 32, 4


def test_attention_with_rotary_positions_and_a_cache_is_torchtunes(groups: int, need_weights: bool) -> None:
    modules = pytest.importorskip("torchtune.modules")
    ours = MultiHeadAttention(D, H, num_kv_heads=groups, rotary=RotaryPosEncoding(D // H)).double()
    names = ("q_proj", "k_proj", "v_proj", "output_proj")
    theirs = modules.MultiHeadAttention(
        **{"embed_dim": D, "num_heads": H, "num_kv_heads": groups, "head_dim": D // H},
        **dict(zip(names, ours.projections(), strict=True)),
        pos_embeddings=modules.RotaryPositionalEmbeddings(D // H, max_seq_len=64),
    ).double()
    x, y, cache = randn(B, L, D, grad=True), randn(B, S, D), KVCache()

    # causal: whole, in parts, and at other positions; their angles are float32
    ways: dict[str, Any] = {"causal": True, "need_weights": need_weights}
    places = torch.stack([torch.arange(L) + 7, torch.arange(L) * 3])
    whole, expected, leaves = ours(x, x, x, **ways)[0], theirs(x, x), [x, *ours.parameters()]
    all_near(*([z, *torch.autograd.grad(z.square().sum(), leaves)] for z in (whole, expected)), 1e-4)
    parts = [ours(part, part, part, **ways, cache=cache)[0] for part in x.split([4, 1, 4], 1)]
    near(torch.cat(parts, 1), whole)
    near(ours(x, x, x, **ways, positions=places)[0], theirs(x, x, input_pos=places), 1e-5)

    # another source, with a mask whose row is nothing; True may be looked at in theirs
    theirs.is_causal, blocked = False, torch.rand(B, L, S) > 0.5
    blocked[0, 3] = True
    output, _ = ours(x, y, y, attn_mask=blocked, need_weights=need_weights)
    near(output, theirs(x, y, mask=~blocked), 1e-5)


def test_it_is_the_attention_of_transformers_llama(groups: int, need_weights: bool) -> None:
    transformers = pytest.importorskip("transformers")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = transformers.LlamaConfig(
        hidden_size=D, num_attention_heads=H, num_key_value_heads=groups, attention_bias=True
    )
    config._attn_implementation = "eager"
    theirs = llama.LlamaAttention(config, 0).double().eval()
    rotary = RotaryPosEncoding(D // H, layout="half")
    ours = MultiHeadAttention(D, H, num_kv_heads=groups, rotary=rotary).double()
    ours.load_state_dict({name.replace("o_proj", "out_proj"): x for name, x in theirs.state_dict().items()})
    x = randn(B, L, D)
    embeddings = llama.LlamaRotaryEmbedding(config)(x, torch.arange(L)[None])
    mask = torch.full((L, L), -torch.inf, dtype=F64).triu(1)[None, None]
    expected, expected_weights = theirs(x, embeddings, mask)
    output, weights = ours(x, x, x, causal=True, need_weights=need_weights)
    near(output, expected, 1e-6)  # their softmax is float32
    if need_weights:
        near(weights, expected_weights, 1e-6)
