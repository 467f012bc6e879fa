"""The vanilla RNN against `torch.nn.RNN` with the same weights, by algebra, and by closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from experiments.nn.rnn import (
    RNN,
    Init,
    Readout,
    _Recurrence,
    decay_per_step,
    gradient_norms_through_time,
)
from tests.experiments.nn.helpers import F64, all_near, near, randn, refused

READOUTS = pytest.mark.parametrize("readout", get_args(Readout))
SHAPES = [(5, 7, 3, 4), (1, 7, 3, 4), (5, 1, 3, 4), (5, 7, 3, 1), (2, 6, 1, 5), (1, 1, 1, 1)]  # B, T, D, H
C = 6


class Reference(nn.Module):
    """`torch.nn.RNN` and a linear layer with the weights of one of ours, which `matching` has by their names there."""

    def __init__(self, ours: RNN):
        super().__init__()
        self.readout = ours.readout
        (H, D), (C, features) = ours.input_to_hidden.weight.shape, ours.hidden_to_output.weight.shape
        rnn, output = nn.RNN(D, H, batch_first=True), nn.Linear(features, C)
        self.rnn, self.output = rnn.to(ours.input_to_hidden.weight), output.to(ours.input_to_hidden.weight)
        self.matching = {
            "input_to_hidden.weight": rnn.weight_ih_l0,
            "input_to_hidden.bias": rnn.bias_ih_l0,
            "hidden_to_hidden.weight": rnn.weight_hh_l0,
            "hidden_to_output.weight": output.weight,
            "hidden_to_output.bias": output.bias,
        }
        with torch.no_grad():
            rnn.bias_hh_l0.zero_()
            for name, parameter in self.matching.items():
                parameter.copy_(ours.get_parameter(name))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.features(self.rnn(x)[0].transpose(0, 1)))

    def features(self, hidden: Tensor) -> Tensor:
        """All states (T, B, H) → what is read out."""
        parts = {"last": [hidden[-1]], "mean": [hidden.mean(0)], "both": [hidden[-1], hidden.mean(0)]}
        return torch.cat(parts[self.readout], 1)


def make(D: int = 3, H: int = 4, readout: Readout = "both", **more: Any) -> RNN:
    """Make a small network in float64, its biases not zero."""
    model = RNN(D, H, C, readout=readout, **more).double()
    with torch.no_grad():
        model.input_to_hidden.bias.normal_()
        model.hidden_to_output.bias.normal_()
    return model


def sequences(B: int = 5, T: int = 7, D: int = 3) -> tuple[Tensor, Tensor]:
    return randn(B, T, D), torch.randint(C, (B,))


def compare(model: RNN, *batches: tuple[Tensor, Tensor], frozen: str = "-") -> None:
    """Logits, the gradient of every parameter that is not frozen, and that of the inputs."""
    reference, results = Reference(model), []
    for network in (model, reference):
        inputs = [x.detach().as_strided(x.size(), x.stride()).requires_grad_() for x, _ in batches]
        logits = [network(x) for x in inputs]
        sum(cross_entropy(z, targets) for z, (_, targets) in zip(logits, batches, strict=True)).backward()
        results.append([*logits, *(x.grad for x in inputs)])
    all_near(*results, rtol=1e-10)
    assert reference.matching.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen), name
        if parameter.grad is not None:
            near(parameter.grad, reference.matching[name].grad, rtol=1e-10)


# equal to torch.nn.RNN


@pytest.mark.parametrize(("B", "T", "D", "H"), SHAPES)
@READOUTS
def test_output_and_every_gradient_are_those_of_torch(
    readout: Readout, B: int, T: int, D: int, H: int
) -> None:
    compare(make(D, H, readout), sequences(B, T, D))


def test_input_of_any_layout_is_left_as_it_is() -> None:
    x, targets = sequences()
    for layout in (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack((x, -x), 3).flatten(2)[:, :, ::2],
        x.flip(1),
        x[:1].expand(5, 7, 3),
    ):
        given, model = layout.clone(), make()
        compare(model, (given, targets))
        near(model(layout), Reference(model)(given))
        assert torch.equal(layout, given)


def test_a_long_sequence_with_saturated_units_and_a_network_twice_in_one_graph() -> None:
    compare(make(init="orthogonal", gain=3.0), sequences(3, 100, 3))
    compare(make(), sequences(5, 7, 3), sequences(5, 4, 3))


@pytest.mark.parametrize("frozen", ["hidden_to_hidden", "input_to_hidden", "hidden_to_output"])
def test_network_with_a_frozen_layer(frozen: str) -> None:
    model = make()
    getattr(model, frozen).requires_grad_(False)
    compare(model, sequences(), frozen=frozen)


# the fast recurrence


def step_by_step(projected: Tensor, w_hh: Tensor) -> Tensor:
    """Equation (1) of the module, as it reads: (T, B, H)."""
    hidden = [torch.tanh(projected[0])]
    for p in projected[1:]:
        hidden.append(torch.tanh(p + hidden[-1] @ w_hh.t()))
    return torch.stack(hidden)


def apply(projected: Tensor, w_hh: Tensor) -> tuple[Tensor, Tensor]:
    """All states (T, B, H) and h_T by `Recurrence`, of a copy, since it overwrites what it is given."""
    T, B, _ = projected.shape
    hidden, last = _Recurrence.apply(projected.flatten(0, 1) * 1.0, w_hh, T)
    return hidden.unflatten(0, (T, B)), last


@pytest.mark.parametrize(
    "function",
    [
        lambda p, w: apply(p, w)[0],
        lambda p, w: apply(p, w)[1],
        lambda p, w: apply(p, w)[0].square().sum() + 3 * apply(p, w)[1],
        lambda p, w: sum(x.square().sum() * n for n, x in enumerate(apply(p, w), 1)),
    ],
    ids=["states", "last", "two calls", "both"],
)
def test_recurrence_by_finite_differences(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """With both sides trained, and with either one frozen."""
    for trained in ((True, True), (True, False), (False, True)):
        inputs = randn(4, 2, 3, grad=trained[0]), randn(3, 3, grad=trained[1])
        assert torch.autograd.gradcheck(function, inputs)


def test_frozen_recurrent_weights_cost_no_product() -> None:
    """Backward is T − 1 products of (B, H) with W_hh, and for ∂L/∂W_hh one of as much work as all of them."""
    (T, B, H), work = (5, 3, 4), {}
    for trained in (False, True):
        hidden, _ = apply(torch.randn(T, B, H, requires_grad=True), torch.randn(H, H, requires_grad=trained))
        with FlopCounterMode(display=False) as counter:
            hidden.backward(torch.ones(T, B, H))
        work[trained] = counter.get_total_flops()
    assert work == {False: 2 * (T - 1) * B * H * H, True: 2 * 2 * (T - 1) * B * H * H}


def test_hidden_states_are_the_fast_path_step_by_step() -> None:
    (x, targets), model = sequences(), make()
    states = model.hidden_states(x)
    assert len(states) == 7 and states[0].shape == (5, 4)
    near(torch.stack(states, 1), Reference(model).rnn(x)[0])
    ways = (model(x), model.read_out(torch.stack(states), states[-1]))
    all_near(*(torch.autograd.grad(cross_entropy(z, targets), [*model.parameters()]) for z in ways), 1e-12)


def test_overwritten_projection_leaves_autograd_right() -> None:
    """The projection is used again after the recurrence: what is read then is h, and so says the gradient."""
    x, w_hh = randn(8, 3, grad=True), randn(3, 3, grad=True)
    projected = x * 2.0
    hidden, _ = _Recurrence.apply(projected, w_hh, 4)
    assert hidden.data_ptr() == projected.data_ptr() and torch.equal(hidden, projected)  # no copy was made
    slow = step_by_step(x.unflatten(0, (4, 2)) * 2.0, w_hh).square().sum()
    all_near(*(torch.autograd.grad(z, (x, w_hh)) for z in ((hidden * projected).sum(), slow)))


def test_what_would_be_a_wrong_gradient_is_an_error() -> None:
    """Overwriting what another node has saved, changing the result before backward, a second derivative."""
    x, w_hh = randn(8, 3, grad=True), randn(3, 3)
    projected = x * 2.0
    other = projected.square().sum()  # needs the values that are overwritten next
    hidden, _ = _Recurrence.apply(projected, w_hh, 4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (other + hidden.sum()).backward()
    hidden, _ = _Recurrence.apply(x * 1.0, w_hh, 4)
    loss = hidden.sum()
    hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    (x, targets), model = sequences(), make()
    loss = cross_entropy(model(x), targets)
    (gradient,) = torch.autograd.grad(loss, model.hidden_to_hidden.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_backward_twice_through_a_kept_graph() -> None:
    (x, targets), model = sequences(), make()
    loss = cross_entropy(model(x), targets)
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, list(model.parameters()))))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: type[torch.no_grad]) -> None:
    (x, _), model = sequences(), make()
    expected, given = model(x).detach(), x.clone()
    with mode():
        logits = model(x)
    assert not logits.requires_grad
    assert torch.equal(logits, expected) and torch.equal(x, given)


def test_bfloat16_autocast() -> None:
    x, targets = sequences(32)
    model = make(H=16).float()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x.float())
        cross_entropy(logits, targets).backward()
    assert logits.dtype == torch.bfloat16
    reference = Reference(model)
    expected = reference(x.float())
    cross_entropy(expected, targets).backward()
    near(logits, expected, 0.05)
    for name, theirs in reference.matching.items():
        gradient = model.get_parameter(name).grad
        assert gradient.dtype == torch.float32
        assert float((gradient - theirs.grad).norm() / theirs.grad.norm()) < 0.05, name


@pytest.mark.slow
def test_compiled_network_is_the_same_function() -> None:
    """Traced whole, step by step: the hand-written backward inside made the compiled network slower.

    It runs by torch's own kernels here; what the compiler's backend makes of the graph is not ours.
    """
    (x, targets), model, traced = sequences(5, 4, 3), make(), []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        traced.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    networks = (model, torch.compile(model, backend=backend, fullgraph=True))
    all_near(*(torch.autograd.grad(cross_entropy(n(x), targets), [*model.parameters()]) for n in networks))
    assert traced.count(torch.tanh) == 4


# the network


def test_the_three_layers_have_their_names_and_sizes() -> None:
    layers = {name.split(".")[0] for name in RNN(3).state_dict()}
    assert layers == {"input_to_hidden", "hidden_to_hidden", "hidden_to_output"}
    for readout, width in (("last", 128), ("mean", 128), ("both", 256)):
        count = sum(p.numel() for p in RNN(28, 128, 10, readout=readout).parameters())  # type: ignore[arg-type]
        assert count == 28 * 128 + 128 + 128 * 128 + width * 10 + 10


def test_xavier_weights_fill_their_bounds_evenly() -> None:
    """Uniform in ±√(6 / (fan_in + fan_out)): the bound, the mean, the variance a²/3."""
    model = RNN(100, 300, 200, readout="last")
    for layer in (model.input_to_hidden, model.hidden_to_hidden, model.hidden_to_output):
        bound, n = math.sqrt(6 / (layer.in_features + layer.out_features)), layer.weight.numel()
        share = layer.weight.detach().double() / bound  # uniform in [−1, 1]
        assert 1 - 20 / n < float(share.abs().max()) <= 1 + 1e-6
        assert abs(float(share.mean())) < 5 * math.sqrt(1 / 3 / n)
        assert abs(float(share.square().mean()) - 1 / 3) < 5 * math.sqrt(4 / 45 / n)
    assert not model.input_to_hidden.bias.any() and not model.hidden_to_output.bias.any()


def test_orthogonal_and_identity() -> None:
    w_hh = RNN(3, 50, init="orthogonal").hidden_to_hidden.weight.detach()
    near(w_hh @ w_hh.t(), torch.eye(50), 1e-5)
    assert not torch.allclose(w_hh.abs(), torch.eye(50), atol=0.1)
    assert torch.equal(RNN(3, 50, init="identity").hidden_to_hidden.weight, torch.eye(50))


@pytest.mark.parametrize("init", get_args(Init))
def test_gain_scales_the_recurrent_weights_alone(init: Init) -> None:
    weights = []
    for gain in (1.0, 2.5):
        torch.manual_seed(3)
        weights.append(RNN(3, 8, init=init, gain=gain).state_dict())
    one, scaled = weights
    assert torch.equal(scaled.pop("hidden_to_hidden.weight"), 2.5 * one.pop("hidden_to_hidden.weight"))
    assert all(torch.equal(one[name], scaled[name]) for name in one)


@torch.no_grad()
def test_dropout_is_of_the_features_and_in_training_only() -> None:
    x, _ = sequences(4, 5, 3)
    model = make(H=200, readout="last", dropout=0.25)
    model.hidden_to_output.weight.zero_()[0] = 1.0  # the first logit is the sum of the features
    model.hidden_to_output.bias.zero_()
    features = model.hidden_states(x)[-1]
    near(model.eval()(x)[:, 0], features.sum(1))
    model.train()
    sums = model(x.repeat(500, 1, 1))[:, 0].view(500, 4)
    # kept with probability 3/4 and scaled by 4/3: the mean stays, the variance is Σ f² · (1/4) / (3/4)
    deviation = (features.square().sum(1) / 3).sqrt()
    assert bool(((sums.mean(0) - features.sum(1)).abs() < 5 * deviation / math.sqrt(500)).all())
    assert bool(((sums.std(0) / deviation - 1).abs() < 5 / math.sqrt(2 * 500)).all())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("input_size", 0), ("hidden_size", 0), ("hidden_size", -3), ("num_classes", 0)),
        *(("init", "zeros"), ("readout", "first"), ("dropout", 1.0), ("dropout", -0.1)),
        *(("dropout", math.nan), ("gain", math.inf), ("gain", math.nan)),
    ],
)
def test_an_argument_out_of_range_is_named(name: str, value: object) -> None:
    with refused(f"{name}.*{value}"):
        RNN(**{"input_size": 3, name: value})  # type: ignore[arg-type]


def test_sequences_of_another_rank_are_refused() -> None:
    with refused(r"B, T, D"):
        RNN(3)(torch.zeros(2, 1, 5, 3))


# gradients through time


def test_gradient_norms_in_the_linear_regime_are_exponential() -> None:
    """Without input h = 0 and tanh' = 1; with W_hh = g Q the norm changes by g per step, exactly."""
    model = make(D=3, H=10, readout="last", init="orthogonal", gain=0.8)
    model.input_to_hidden.bias.data.zero_()
    norms = gradient_norms_through_time(model, torch.zeros(4, 12, 3).double(), torch.arange(4), cross_entropy)
    near(norms[:-1] / norms[1:], torch.full((11,), 0.8), rtol=1e-6)  # Q is orthogonal to float32
    assert decay_per_step(norms) == pytest.approx((0.8, 1.0), rel=1e-6)


@READOUTS
def test_gradient_norms_against_hooks_on_single_samples(readout: Readout) -> None:
    """Each sample on its own through `torch.nn.RNNCell`; ours in any grad mode, and none is left in the model."""
    model, (x, targets), cell = make(readout=readout), sequences(3, 5, 3), nn.RNNCell(3, 4).double()
    layers, caught = Reference(model), []
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in layers.rnn.state_dict().items()})
    for b in range(3):
        states = [torch.zeros(1, 4, dtype=F64)]
        for t in range(5):
            states.append(cell(x[b, t][None], states[-1]))
            states[-1].retain_grad()
        cross_entropy(layers.output(layers.features(torch.stack(states[1:]))), targets[b][None]).backward()
        caught.append(torch.stack([state.grad.norm() for state in states[1:]]))
    with torch.no_grad():
        norms = gradient_norms_through_time(model, x, targets, cross_entropy)
    assert norms.dtype == F64 and all(parameter.grad is None for parameter in model.parameters())
    near(norms, torch.stack(caught).mean(0))


@READOUTS
def test_share_through_the_last_state_is_a_product_of_jacobians(readout: Readout) -> None:
    """(∂h_T/∂h_t)ᵀ g with ∂h_k/∂h_{k−1} = diag(1 − h_k²) W_hh; g is what reaches h_T, mean read-out included."""
    model, (x, targets) = make(readout=readout), sequences(3, 5, 3)
    states = torch.stack(model.hidden_states(x)).detach().requires_grad_()
    (outside,) = torch.autograd.grad(cross_entropy(model.read_out(states, states[-1]), targets) * 3, states)
    g, norms = outside[-1], [outside[-1].norm(dim=1).mean()]
    for state in states.detach().flip(0)[:-1]:
        g = ((1 - state**2) * g) @ model.hidden_to_hidden.weight.detach()
        norms.insert(0, g.norm(dim=1).mean())
    found = gradient_norms_through_time(model, x, targets, cross_entropy, last_only=True)
    near(found, torch.stack(norms))


def test_decay_of_an_exact_exponential_and_of_a_constant() -> None:
    """‖∂L/∂h_t‖ = c · factor^(T − t): one step back in time multiplies by the factor."""
    for factor in (0.5, 0.97, 1.0, 1.6):
        norms = 3e-4 * factor ** torch.arange(27.0, -1, -1, dtype=F64)
        assert decay_per_step(norms) == pytest.approx((factor, 1.0), rel=1e-9)
    for level, dtype in product((1.0, 0.3, 3.7e5, 1e-7), (torch.float32, F64)):
        assert decay_per_step(torch.full((28,), level, dtype=dtype)) == (1.0, 1.0)


def test_decay_against_a_fit_by_least_squares() -> None:
    norms, t = torch.rand(28, dtype=F64) + 0.1, torch.arange(28, dtype=F64)
    _, slope = torch.linalg.lstsq(torch.stack((t**0, t), 1), norms.log()[:, None]).solution[:, 0].tolist()
    correlation = torch.corrcoef(torch.stack((t, norms.log())))[0, 1]
    assert decay_per_step(norms) == pytest.approx((math.exp(-slope), float(correlation**2)), rel=1e-9)


def test_decay_leaves_out_what_is_no_positive_number() -> None:
    """The line goes through the others at their own places in time; fewer than two have none."""
    norms = 0.5 ** torch.arange(9.0, -1, -1, dtype=F64)
    norms[0], norms[4], norms[6] = 0.0, math.inf, math.nan
    assert decay_per_step(norms) == pytest.approx((0.5, 1.0))
    for few in ([], [1.0], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0], [math.inf, 1.0]):
        assert all(math.isnan(value) for value in decay_per_step(torch.tensor(few)))
