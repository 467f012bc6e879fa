"""Positions beside the rotary encodings of transformers, torchtune and rotary-embedding-torch, where installed.

They compute their angles in float32, so agreement is to what that allows at the positions compared.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.nn.positions import RotaryPosEncoding, convert_layout
from tests.experiments.nn.test_rope_scaling import LLAMA3

pytestmark = pytest.mark.slow
D = 64
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
OTHERS = {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.707, "mscale_all_dim": 1.2, "truncate": False}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": YARN,
    "yarn, its other keys": {**YARN, "factor": 40.0, **OTHERS},
    "yarn, attention_factor": {**YARN, "attention_factor": 1.25},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 8192},
}


def llama(name: str, base: float, max_len: int) -> Any:
    """transformers' rotary module of LLaMA, with one of the scalings."""
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    sizes = {"hidden_size": 2 * D, "num_attention_heads": 2, "max_position_embeddings": max_len}
    parameters = {**SCALINGS[name], "rope_theta": base}
    return modeling.LlamaRotaryEmbedding(modeling.LlamaConfig(**sizes, rope_parameters=parameters))


def by_llama(module: Any, x: Tensor, where: Tensor) -> Tensor:
    """x (B, H, L, D) at positions (B, L) as transformers turns it."""
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    cos, sin = module(x, where)
    return modeling.apply_rotary_pos_emb(x, x, cos, sin)[0]


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_frequencies_and_rotations_are_those_of_transformers(name: str, base: float) -> None:
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    theirs, kind = llama(name, base, max_len=128), SCALINGS[name]["rope_type"]
    rotary = RotaryPosEncoding(D, base, layout="half", scaling=SCALINGS[name], max_len=128)
    compute = {"default": theirs.compute_default_rope_parameters, **utils.ROPE_INIT_FUNCTIONS}[kind]
    for length in (100, 5000):
        wanted, wanted_factor = compute(theirs.config, device="cpu", seq_len=length)
        theta, factor = rotary.frequencies(length)
        assert factor == pytest.approx(wanted_factor, rel=1e-12)
        assert torch.allclose(theta, wanted.double(), rtol=2e-6, atol=0)
    x, line = torch.randn(2, 3, 200, D), torch.arange(200).expand(2, -1)  # past max_len: `dynamic` stretches
    for where in (None, line, torch.stack((line[0], (line[0] * 7) % 200))):
        wanted = by_llama(llama(name, base, max_len=128), x, line if where is None else where)
        assert torch.allclose(rotary(x, where), wanted, atol=3e-4)


def test_dynamic_is_that_of_transformers_while_a_sequence_grows_and_forgets_where_that_does_not() -> None:
    theirs = llama("dynamic", 10000.0, max_len=64)
    rotary = RotaryPosEncoding(D, layout="half", scaling=SCALINGS["dynamic"], max_len=64)
    errors = []
    for length in (10, 64, 65, 100, 200, 100):
        x = torch.randn(1, 1, length, D)
        errors.append(float((rotary(x) - by_llama(theirs, x, torch.arange(length)[None])).abs().max()))
    *growing, again = errors
    assert max(growing) < 1e-4 and again > 1e-2  # theirs goes on with the base of the longest so far


def test_rotations_are_those_of_torchtune() -> None:
    modules = pytest.importorskip("torchtune.modules")
    rope = pytest.importorskip("torchtune.models.llama3_1")
    plain = modules.RotaryPositionalEmbeddings(dim=D, max_seq_len=512, base=10000), RotaryPosEncoding(D)
    llama3 = (
        rope.Llama3ScaledRoPE(dim=D, max_seq_len=9000, base=500_000, scale_factor=8),
        RotaryPosEncoding(D, base=500_000.0, scaling=SCALINGS["llama3"], max_len=9000),
    )
    line, far = torch.arange(300), torch.tensor([[0, 1, 500, 4097, 8191, 8999]] * 2)
    packed = torch.stack((line, (line * 7) % 512))
    for (theirs, rotary), where, atol in ((plain, None, 1e-4), (plain, packed, 1e-4), (llama3, far, 3e-3)):
        x = torch.randn(2, 3, 300 if where is None else where.shape[1], D)
        wanted = theirs(x.transpose(1, 2), input_pos=where).transpose(1, 2)
        assert torch.allclose(rotary(x, where), wanted, atol=atol)


@pytest.mark.parametrize("R", [D, 32])
def test_rotations_are_those_of_rotary_embedding_torch(R: int) -> None:
    package = pytest.importorskip("rotary_embedding_torch")
    x = torch.randn(2, 3, 300, D)
    wanted = package.RotaryEmbedding(dim=R).rotate_queries_or_keys(x)
    assert torch.allclose(RotaryPosEncoding(D, rotary_dim=R)(x), wanted.detach(), atol=1e-4)


def test_a_projection_converted_for_transformers_gives_the_scores_of_torchtune() -> None:
    """What a conversion of a checkpoint is for: each library with the weights in its own layout."""
    modules = pytest.importorskip("torchtune.modules")
    heads, d_model, L = 2, 32, 20
    tokens, weights = torch.randn(1, L, d_model), [torch.randn(heads * D, d_model) for _ in "qk"]
    theirs = modules.RotaryPositionalEmbeddings(dim=D, max_seq_len=L)
    module, where = llama("default", 10000.0, 128), torch.arange(L).view(1, -1)

    def scores(rotate: Any, projections: list[Tensor]) -> Tensor:
        q, k = (rotate((tokens @ w.t()).unflatten(-1, (heads, D)).transpose(1, 2)) for w in projections)
        return q @ k.mT

    interleaved = scores(lambda x: theirs(x.transpose(1, 2)).transpose(1, 2), weights)
    converted = [convert_layout(w, heads, "half") for w in weights]
    half = scores(lambda x: by_llama(module, x, where), converted)
    assert torch.allclose(half, interleaved, rtol=1e-4, atol=1e-2)
    assert not torch.allclose(scores(lambda x: by_llama(module, x, where), weights), interleaved, atol=10)
