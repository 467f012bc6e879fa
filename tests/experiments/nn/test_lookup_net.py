"""The network for two look-ups: its equations, the ceiling of one head, and that two heads have none."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from experiments.data.lookups import Lookups, places_asked
from experiments.nn.lookup_net import LookupNet, silence

SLOTS = 4
TEST = Lookups(slots=SLOTS, train_size=4, val_size=4, test_size=240).load(0)["test"]


def made(num_heads: int, seed: int = 0, d_model: int = 16) -> LookupNet:
    torch.manual_seed(seed)
    return LookupNet(num_heads, d_model, SLOTS).double().requires_grad_(False)


def accuracy(network: LookupNet) -> float:
    return float((network(TEST.inputs).argmax(1) == TEST.targets).double().mean())


def torch_layer(network: LookupNet) -> nn.MultiheadAttention:
    """torch's attention with the network's weights."""
    ours = network.attention
    theirs = nn.MultiheadAttention(16, ours.num_heads, batch_first=True, dtype=torch.float64)
    layers = (ours.q_proj, ours.k_proj, ours.v_proj)
    theirs.in_proj_weight.data = torch.cat([layer.weight for layer in layers])
    theirs.in_proj_bias.data = torch.cat([layer.bias for layer in layers])
    theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    return theirs


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_forward_is_the_equations_with_torch_s_attention(heads: int) -> None:
    network, inputs = made(heads), TEST.inputs
    query = network.position.weight[inputs[:, 0]] + network.symbol.weight[inputs[:, 1]]
    key = torch.stack(
        [network.position.weight[i] + network.symbol.weight[inputs[:, 2 + i]] for i in range(SLOTS)], dim=1
    )
    value = network.value.weight[inputs[:, 2 + SLOTS :]]
    mixed, weights = torch_layer(network)(query[:, None], key, value, average_attn_weights=False)
    scores = network.read_out(mixed[:, 0])
    expected = torch.stack([scores[:, u] + scores[:, 2 + v] for u in (0, 1) for v in (0, 1)], dim=1)
    torch.testing.assert_close(network(inputs), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(network.weights(inputs), weights[:, :, 0], rtol=0, atol=1e-12)


def test_every_number_of_heads_has_as_many_parameters_and_starts_alike() -> None:
    networks = [made(heads).state_dict() for heads in (1, 2, 4, 8)]
    for other in networks[1:]:
        assert all(torch.equal(networks[0][name], weight) for name, weight in other.items())
        assert networks[0].keys() == other.keys()


def test_weights_depend_on_question_and_keys_and_not_on_values() -> None:
    """The proof of the ceiling rests on it."""
    changed = TEST.inputs.clone()
    changed[:, 2 + SLOTS :] = 1 - changed[:, 2 + SLOTS :]
    assert torch.equal(made(2).weights(TEST.inputs), made(2).weights(changed))
    assert not torch.equal(made(2)(TEST.inputs), made(2)(changed))


@pytest.mark.parametrize(("heads", "most"), [(1, 3), (2, 4)])
def test_one_head_answers_at_most_three_samples_of_any_block_and_two_do_four(heads: int, most: int) -> None:
    """Whatever the weights: here those of 300 random networks."""
    best = 0
    for seed in range(300):
        network = made(heads, seed)
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        right = (network(TEST.inputs).argmax(1) == TEST.targets).view(-1, 4).sum(1)
        best = max(best, int(right.max()))
    assert best == most


def test_the_ceiling_by_trying_all_mixtures_and_read_outs() -> None:
    """w_p v_p + w_s v_s compared with a threshold per answer, either way round: three of four at most."""
    grid = [step / 10 for step in range(11)]
    blocks = list(itertools.product((0, 1), (0, 1)))
    thresholds = [step / 20 - 0.025 for step in range(24)]
    best = 0
    for weight in grid:
        mixtures = [weight * p + (1 - weight) * s for p, s in blocks]
        answers = [
            tuple((mixture > at) != turned for mixture in mixtures)
            for at in thresholds
            for turned in (False, True)
        ]
        for first, second in itertools.product(set(answers), set(answers)):
            best = max(
                best, sum(f == p and g == s for f, g, (p, s) in zip(first, second, blocks, strict=True))
            )
    assert best == 3


def by_hand(num_heads: int) -> LookupNet:
    """Weights set by hand. One head: 2/3 on the position's slot, 1/3 on the symbol's. Two heads: one each.

    Components 0 … 3 name positions, 8 … 11 symbols, and 0 and 8 of the values hold −1 or 1.
    """
    network = made(num_heads)
    for parameter in network.parameters():
        parameter.zero_()
    attention = network.attention
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
        layer.weight.copy_(torch.eye(16))
    network.position.weight[:, :4] = torch.eye(4)
    network.symbol.weight[:, 8:12] = torch.eye(4)
    network.value.weight[:, [0, 8]] = torch.tensor([[-1.0, -1.0], [1.0, 1.0]]).double()
    strength = 40 * (16 / num_heads) ** 0.5  # so that all other slots get e^−40
    attention.q_proj.weight.mul_(strength)
    if num_heads == 1:
        attention.q_proj.weight[:8] *= 1 + torch.log(torch.tensor(2.0)) / 40
    network.read_out.weight[1, 0] = network.read_out.weight[3, 8] = 1.0  # 1 against 0, by the sign
    if num_heads == 1:
        network.read_out.bias[3] = -2 / 3
    return network


def test_one_head_reaches_its_ceiling_and_two_heads_have_none() -> None:
    assert accuracy(by_hand(1)) == 0.75
    assert accuracy(by_hand(2)) == 1.0
    places = places_asked(TEST.inputs)
    weights = by_hand(2).weights(TEST.inputs)  # (N, 2, S)
    torch.testing.assert_close(weights.argmax(2), places)


@pytest.mark.parametrize("head", [0, 1, 2, 3])
def test_a_silent_head_puts_out_zeros(head: int) -> None:
    network = made(4)
    joined: list[Tensor] = []
    network.attention.out_proj.register_forward_pre_hook(lambda _, given: joined.append(given[0]))
    network(TEST.inputs)
    expected = joined[0].clone()  # (N, 1, 16), 4 of it each head's
    expected[..., 4 * head : 4 * head + 4] = 0
    mixed = network.attention.out_proj(expected)[:, 0]
    logits = network.answer(mixed)
    silence(network, head)
    torch.testing.assert_close(network(TEST.inputs), logits, rtol=0, atol=1e-12)


def test_a_head_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"head must lie in \[0, 4\), not 4"):
        silence(made(4), 4)
