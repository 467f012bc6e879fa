"""The small Transformer encoder: against torch's own layers, and what an encoding changes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from experiments.nn.encoder import ENCODINGS, Encoder, Encoding

TOKENS, CLASSES = 9, 4


def make(encoding: Encoding, seed: int = 0, **changed: int) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(TOKENS, CLASSES, encoding, d_model=16, num_heads=2, d_ff=24, **changed).double().eval()


def sentences(B: int = 5, L: int = 7) -> Tensor:
    return torch.randint(1, TOKENS, (B, L), generator=torch.Generator().manual_seed(1))


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-12)


def torch_layer(layer: nn.Module) -> nn.TransformerEncoderLayer:
    """torch's layer with the weights of ours."""
    theirs = nn.TransformerEncoderLayer(
        16, 2, 24, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    ours = layer.state_dict()
    packed = {
        f"self_attn.in_proj_{part}": torch.cat([ours[f"attention.{x}_proj.{part}"] for x in "qkv"])
        for part in ("weight", "bias")
    }
    names = {
        "attention.out_proj": "self_attn.out_proj",
        "norm_attention": "norm1",
        "norm_mlp": "norm2",
        "mlp.0": "linear1",
        "mlp.2": "linear2",
    }
    named = {
        f"{theirs_}.{part}": ours[f"{ours_}.{part}"]
        for ours_, theirs_ in names.items()
        for part in ("weight", "bias")
    }
    theirs.load_state_dict(packed | named)
    return theirs.eval()


def sinusoid(p: int, c: int) -> float:
    angle = p / 10000.0 ** ((c - c % 2) / 16)
    return math.cos(angle) if c % 2 else math.sin(angle)


@pytest.mark.parametrize("encoding", ["none", "absolute"])
def test_logits_and_gradients_are_those_of_torch_s_layers(encoding: Encoding) -> None:
    model, tokens = make(encoding), sentences()
    tokens[1, 4:] = tokens[3, 1:] = 0
    padding = tokens == 0
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)  # norms and biases too
    x = model.embedding(tokens)
    if encoding == "absolute":
        x = x + torch.tensor([[sinusoid(p, c) for c in range(16)] for p in range(7)], dtype=torch.float64)
    for layer in model.layers:
        x = torch_layer(layer)(x, src_key_padding_mask=padding)
    pooled = torch.stack([row[~pad].mean(0) for row, pad in zip(model.norm(x), padding, strict=True)])
    wanted = model.read_out(pooled)
    logits = model(tokens)
    assert close(logits, wanted)
    weight = model.embedding.weight
    # torch's layers hold copies of the weights, but the graph back to the embedding is the same function
    gradients = [torch.autograd.grad(z.square().sum(), weight)[0] for z in (logits, wanted)]
    assert close(*gradients)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_only_an_encoding_tells_orders_apart(encoding: Encoding) -> None:
    tokens = torch.arange(1, 8)[None]
    model = make(encoding)
    reordered = tokens[:, [3, 0, 6, 1, 5, 2, 4]]
    distance = float((model(tokens) - model(reordered)).detach().abs().max())
    assert distance < 1e-12 if encoding == "none" else distance > 1e-3


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_padding_behind_changes_nothing(encoding: Encoding) -> None:
    tokens, model = sentences(), make(encoding)
    padded = torch.cat((tokens, torch.zeros(5, 6, dtype=torch.int64)), 1)
    assert close(model(padded), model(tokens))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_moving_all_tokens_is_seen_by_absolute_positions_alone(encoding: Encoding) -> None:
    tokens, model = sentences(), make(encoding)
    moved = torch.cat((torch.zeros(5, 6, dtype=torch.int64), tokens), 1)
    same = close(model(moved), model(tokens))
    assert same == (encoding != "absolute")


def test_a_sentence_of_padding_alone_is_finite() -> None:
    for encoding in ENCODINGS:
        model = make(encoding)
        logits = model(torch.zeros(2, 5, dtype=torch.int64))
        logits.sum().backward()
        assert logits.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_encodings_have_the_same_parameters() -> None:
    states = [make(encoding).state_dict() for encoding in ENCODINGS]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[name], states[0][name]) for name in state)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_parameter_is_used(encoding: Encoding) -> None:
    model = make(encoding)
    model(sentences()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # a key's bias adds the same to every score of a query, which softmax forgets, unless keys are turned
        if encoding == "rotary" or not name.endswith("k_proj.bias"):
            assert float(parameter.grad.abs().max()) > 1e-9, name


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_random_start_moves_absolute_positions_and_only_in_training(encoding: Encoding) -> None:
    tokens = sentences()
    model, still = make(encoding, random_start=20), make(encoding)
    assert torch.equal(model(tokens), still(tokens))
    model.train()
    torch.manual_seed(0)
    seen = {tuple(model(tokens)[0].tolist()) for _ in range(8)}
    assert (len(seen) > 1) == (encoding == "absolute")
    starts = {model.start() for _ in range(500)}
    assert starts == set(range(21))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"num_tokens": 0}, "num_tokens must be at least 1, not 0"),
        ({"num_classes": -1}, "num_classes must be at least 1, not -1"),
        ({"d_model": 0}, "d_model must be at least 1, not 0"),
        ({"num_heads": 0}, "num_heads must be at least 1, not 0"),
        ({"num_heads": 3}, "d_model must be divisible by num_heads, not 16 by 3"),
        ({"d_model": 6, "num_heads": 2}, "d_model / num_heads must be even for rotary positions, not 6 / 2"),
        ({"num_layers": 0}, "num_layers must be at least 1, not 0"),
        ({"d_ff": 0}, "d_ff must be at least 1, not 0"),
        ({"encoding": "learned"}, "encoding must be one of none, absolute, rotary, not learned"),
        ({"random_start": -1}, "random_start must be at least 0, not -1"),
        ({"base": 0.5}, "base must be a number above 1, not 0.5"),
    ],
    ids=str,
)
def test_argument_out_of_range_is_named(argument: dict[str, object], message: str) -> None:
    settings = {"num_tokens": TOKENS, "num_classes": CLASSES, "d_model": 16, "num_heads": 2} | argument
    with pytest.raises(ValueError, match=message):
        Encoder(**settings)  # type: ignore[arg-type]
