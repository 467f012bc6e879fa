"""The small Transformer encoder: against torch's own layers, and what an encoding changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.nn.encoder import ENCODINGS, Encoder, Encoding
from tests.experiments.nn.helpers import near, refusals, refused
from tests.experiments.nn.test_positions import sinusoids

ALL_ENCODINGS = pytest.mark.parametrize("encoding", ENCODINGS)
SIZES: dict[str, Any] = {"num_tokens": 9, "num_classes": 4, "d_model": 16, "num_heads": 2, "d_ff": 24}
PADDING = torch.zeros(5, 6, dtype=torch.int64)


def make(encoding: Encoding = "rotary", **changed: Any) -> Encoder:
    torch.manual_seed(0)
    return Encoder(encoding=encoding, **(SIZES | changed)).double().eval()


def sentences() -> Tensor:
    return torch.randint(1, 9, (5, 7))


def make_theirs(layer: Any) -> nn.TransformerEncoderLayer:
    """Make torch's layer with the weights of ours."""
    theirs = nn.TransformerEncoderLayer(16, 2, 24, 0.0, "gelu", batch_first=True, norm_first=True)
    theirs.self_attn = layer.attention.to_torch()
    theirs.norm1, theirs.norm2 = layer.norm_attention, layer.norm_mlp
    theirs.linear1, _, theirs.linear2 = layer.mlp
    return theirs.eval()


@pytest.mark.parametrize("encoding", ["none", "absolute"])
def test_logits_and_gradients_are_those_of_torch_s_layers(encoding: Encoding) -> None:
    model, tokens = make(encoding), sentences()
    tokens[1, 4:] = tokens[3, 1:] = 0
    padding = tokens == 0
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)  # norms and biases too
    x = model.embedding(tokens)
    if encoding == "absolute":
        x = x + sinusoids(range(7), 16)
    for layer in model.layers:
        x = make_theirs(layer)(x, src_key_padding_mask=padding)
    pooled = [row[~pad].mean(0) for row, pad in zip(model.norm(x), padding, strict=True)]
    logits, expected = model(tokens), model.read_out(torch.stack(pooled))
    near(logits, expected, 1e-12)
    weight = model.embedding.weight  # attention's own are copied into torch's, out of our graph
    near(*(torch.autograd.grad(z.square().sum(), weight)[0] for z in (logits, expected)), 1e-12)


@ALL_ENCODINGS
def test_only_an_encoding_tells_orders_apart(encoding: Encoding) -> None:
    """Order by any, a move of all tokens by absolute positions alone, padding behind by none."""
    model, tokens = make(encoding), sentences()
    logits, line = model(tokens), torch.arange(1, 8)[None]
    near(model(torch.cat((tokens, PADDING), 1)), logits, 1e-12)
    moved = model(torch.cat((PADDING, tokens), 1))
    assert torch.allclose(moved, logits, rtol=0, atol=1e-12) == (encoding != "absolute")
    distance = (model(line) - model(line[:, [3, 0, 6, 1, 5, 2, 4]])).detach().abs().max()
    assert float(distance) < 1e-12 if encoding == "none" else float(distance) > 1e-3


@ALL_ENCODINGS
def test_encodings_have_the_same_parameters_and_use_them_and_padding_alone_is_finite(
    encoding: Encoding,
) -> None:
    model, first = make(encoding), make(ENCODINGS[0]).state_dict()
    state = model.state_dict()
    assert state.keys() == first.keys() and all(torch.equal(state[name], first[name]) for name in state)
    logits = model(torch.cat((sentences()[:, :6], PADDING)))
    assert logits.isfinite().all()
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        # a key's bias adds the same to every score of a query, which softmax forgets, unless keys are turned
        used = encoding == "rotary" or not name.endswith("k_proj.bias")
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert not used or float(parameter.grad.abs().max()) > 1e-9, name


@ALL_ENCODINGS
def test_a_random_start_moves_absolute_positions_and_only_in_training(encoding: Encoding) -> None:
    tokens, model = sentences(), make(encoding, random_start=20)
    assert torch.equal(model(tokens), make(encoding)(tokens))
    model.train()
    outputs = {tuple(model(tokens)[0].tolist()) for _ in range(8)}
    assert (len(outputs) > 1) == (encoding == "absolute")
    assert {model.start() for _ in range(500)} == set(range(21))


@refusals("encoder")
def test_an_argument_out_of_range_is_named(call: str, message: str) -> None:
    with refused(message):
        eval(call)
