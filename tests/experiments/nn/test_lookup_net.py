"""The network for two look-ups: its equations, the ceiling of one head, and that two heads have none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from experiments.data.lookups import Lookups, places_asked
from experiments.nn.lookup_net import LookupNet, silence
from tests.experiments.nn.helpers import F64, near, refused

SLOTS = 4
TEST = Lookups(slots=SLOTS, train_size=4, val_size=4, test_size=240).load(0)["test"]


def make(num_heads: int, seed: int = 0) -> LookupNet:
    torch.manual_seed(seed)
    return LookupNet(num_heads, 16, SLOTS).double().requires_grad_(False)


def right(network: LookupNet) -> Tensor:
    """Which of the four samples of each block are answered rightly, (60, 4)."""
    return (network(TEST.inputs).argmax(1) == TEST.targets).view(-1, 4)


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_forward_is_the_equations_with_torch_s_attention(heads: int) -> None:
    network, inputs = make(heads), TEST.inputs
    attention, theirs = network.attention, nn.MultiheadAttention(16, heads, batch_first=True, dtype=F64)
    *projections, out = attention.projections()
    theirs.in_proj_weight.data = torch.cat([layer.weight for layer in projections])
    theirs.in_proj_bias.data = torch.cat([layer.bias for layer in projections])
    theirs.out_proj.load_state_dict(out.state_dict())
    position, symbol = network.position.weight, network.symbol.weight
    query = position[inputs[:, 0]] + symbol[inputs[:, 1]]
    key = torch.stack([position[i] + symbol[inputs[:, 2 + i]] for i in range(SLOTS)], dim=1)
    value = network.value.weight[inputs[:, 2 + SLOTS :]]
    mixed, weights = theirs(query[:, None], key, value, average_attn_weights=False)
    scores = network.read_out(mixed[:, 0])
    expected = torch.stack([scores[:, u] + scores[:, 2 + v] for u in (0, 1) for v in (0, 1)], dim=1)
    near(network(inputs), expected, 1e-12)
    near(network.weights(inputs), weights[:, :, 0], 1e-12)


def test_every_number_of_heads_has_as_many_parameters_and_starts_alike() -> None:
    first, *others = [make(heads).state_dict() for heads in (1, 2, 4, 8)]
    for other in others:
        assert first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "most"), [(1, 3), (2, 4)])
def test_one_head_answers_at_most_three_samples_of_any_block_and_two_do_four(heads: int, most: int) -> None:
    """Whatever the weights: here those of 300 random networks."""
    best = 0
    for seed in range(300):
        network = make(heads, seed)
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        best = max(best, int(right(network).sum(1).max()))
    assert best == most


def by_hand(num_heads: int) -> LookupNet:
    """Set weights by hand. One head: 2/3 on the position's slot, 1/3 on the symbol's. Two heads: one each.

    Components 0 … 3 name positions, 8 … 11 symbols, and 0 and 8 of the values hold −1 or 1.
    """
    network = make(num_heads)
    for parameter in network.parameters():
        parameter.zero_()
    attention = network.attention
    for layer in attention.projections():
        layer.weight.copy_(torch.eye(16))
    network.position.weight[:, :4] = torch.eye(4)
    network.symbol.weight[:, 8:12] = torch.eye(4)
    network.value.weight[:, [0, 8]] = torch.tensor([[-1.0, -1.0], [1.0, 1.0]]).double()
    strength = 40 * (16 / num_heads) ** 0.5  # so that all other slots get e^−40
    attention.q_proj.weight.mul_(strength)
    network.read_out.weight[1, 0] = network.read_out.weight[3, 8] = 1.0  # 1 against 0, by the sign
    if num_heads == 1:
        attention.q_proj.weight[:8] *= 1 + torch.log(torch.tensor(2.0)) / 40
        network.read_out.bias[3] = -2 / 3
    return network


def test_one_head_reaches_its_ceiling_and_two_heads_have_none() -> None:
    assert float(right(by_hand(1)).double().mean()) == 0.75
    assert bool(right(by_hand(2)).all())
    assert torch.equal(by_hand(2).weights(TEST.inputs).argmax(2), places_asked(TEST.inputs))


@pytest.mark.parametrize("head", [0, 1, 2, 3])
def test_a_silent_head_puts_out_zeros_and_a_fifth_is_refused(head: int) -> None:
    network, joined = make(4), list[Tensor]()
    network.attention.out_proj.register_forward_pre_hook(lambda _, given: joined.append(given[0].clone()))
    network(TEST.inputs)
    joined[0][..., 4 * head : 4 * head + 4] = 0  # (N, 1, 16), 4 of it each head's
    logits = network.answer(network.attention.out_proj(joined[0])[:, 0])
    silence(network, head)
    near(network(TEST.inputs), logits, 1e-12)
    with refused("head.*4.*4"):
        silence(network, 4)
