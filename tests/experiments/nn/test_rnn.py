"""The vanilla RNN against `torch.nn.RNN` with the same weights, by algebra, and by closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from statistics import correlation, linear_regression
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from experiments.nn.rnn import RNN, Init, Readout, _Recurrence, decay_per_step, gradient_norms_through_time
from tests.experiments.nn.helpers import F64, all_near, near, randn, refused

READOUTS = pytest.mark.parametrize("readout", get_args(Readout))
# B, T, D, H
SHAPES = [(5, 7, 3, 4), (1, 7, 3, 4), (5, 1, 3, 4), (5, 7, 3, 1), (2, 6, 1, 5), (1, 1, 1, 1), (3, 100, 3, 4)]
C = 6


def make(D: int = 3, H: int = 4, readout: Readout = "both", **more: Any) -> RNN:
    """Make a small network in float64, its biases not zero."""
    model = RNN(D, H, C, readout=readout, **more).double()
    nn.init.normal_(model.input_to_hidden.bias)
    nn.init.normal_(model.hidden_to_output.bias)
    return model


def sequences(B: int = 5, T: int = 7, D: int = 3) -> tuple[Tensor, Tensor]:
    return randn(B, T, D), torch.randint(C, (B,))


def weights_of(model: RNN) -> tuple[Tensor, ...]:
    """W_xh, W_hh, b_h, and zeros for torch's second bias."""
    bias = model.input_to_hidden.bias
    return model.input_to_hidden.weight, model.hidden_to_hidden.weight, bias, torch.zeros_like(bias)


def torch_states(x: Tensor, *weights: Tensor) -> Tensor:
    """x (B, T, D) → all states (T, B, H), by what `torch.nn.RNN` calls."""
    h_0 = x.new_zeros(1, len(x), len(weights[1]))
    return torch.rnn_tanh(x, h_0, weights, len(weights) == 4, 1, 0.0, True, False, True)[0].transpose(0, 1)


def torch_logits(model: RNN, x: Tensor) -> Tensor:
    states = torch_states(x, *weights_of(model))
    parts = {"last": [states[-1]], "mean": [states.mean(0)], "both": [states[-1], states.mean(0)]}
    return nn.functional.linear(torch.cat(parts[model.readout], 1), *model.hidden_to_output.parameters())


def compare(model: RNN, x: Tensor, targets: Tensor) -> None:
    """Logits and all gradients, of what is not frozen, of the fast path, of the readable one, and of torch."""

    def step_by_step(x: Tensor) -> Tensor:
        states = model.hidden_states(x)
        return model.read_out(torch.stack(states), states[-1])

    results = []
    for forward in (lambda x: torch_logits(model, x), model, step_by_step):
        leaf = x.detach().requires_grad_()
        logits = forward(leaf)
        of = (leaf, *(parameter for parameter in model.parameters() if parameter.requires_grad))
        loss = cross_entropy(logits, targets)
        gradients = torch.autograd.grad(loss, of, materialize_grads=True)  # W_hh may be unused where T = 1
        results.append([logits, *gradients])
    for ours in results[1:]:
        all_near(ours, results[0], rtol=1e-10)


# equal to torch.nn.RNN


@pytest.mark.parametrize(("B", "T", "D", "H"), SHAPES)
@READOUTS
def test_output_and_every_gradient_are_those_of_torch(
    readout: Readout, B: int, T: int, D: int, H: int
) -> None:
    compare(make(D, H, readout, gain=1.5), *sequences(B, T, D))


def test_input_of_any_layout_is_left_as_it_is() -> None:
    x, targets = sequences()
    for layout in (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack((x, -x), 3).flatten(2)[:, :, ::2],
        x[:1].expand(5, 7, 3),
    ):
        given = layout.clone()
        compare(make(), layout, targets)
        assert torch.equal(layout, given)


@pytest.mark.parametrize("frozen", ["hidden_to_hidden", "input_to_hidden", "hidden_to_output"])
def test_network_with_a_frozen_layer(frozen: str) -> None:
    model = make()
    getattr(model, frozen).requires_grad_(False)
    compare(model, *sequences())


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


def test_without_gradients() -> None:
    (x, _), model = sequences(), make()
    given = x.clone()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            logits = model(x)
        assert not logits.requires_grad
        assert torch.equal(logits, model(x)) and torch.equal(x, given)


def test_bfloat16_autocast() -> None:
    (x, targets), model = sequences(32), make(H=16).float()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x.float())
        loss = cross_entropy(logits, targets)
    assert logits.dtype == torch.bfloat16
    expected = torch_logits(model, x.float())
    near(logits, expected, 0.05)
    ways = (loss, cross_entropy(expected, targets))
    for ours, theirs in zip(*(torch.autograd.grad(z, [*model.parameters()]) for z in ways), strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - theirs).norm() / theirs.norm()) < 0.05


# the fast recurrence


def apply(projected: Tensor, w_hh: Tensor) -> tuple[Tensor, Tensor]:
    """All states (T, B, H) and h_T by `_Recurrence`, of a copy, since it overwrites what it is given."""
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


def test_overwritten_projection_leaves_autograd_right() -> None:
    """What is read of it after the recurrence is h, and so says the gradient, also twice through a kept graph."""
    x, w_hh = randn(8, 3, grad=True), randn(3, 3, grad=True)
    projected = x * 2.0
    hidden, _ = _Recurrence.apply(projected, w_hh, 4)
    assert hidden.data_ptr() == projected.data_ptr() and torch.equal(hidden, projected)  # no copy was made
    fast = (hidden * projected).sum()
    slow = torch_states(x.view(4, 2, 3).transpose(0, 1), 2 * torch.eye(3, dtype=F64), w_hh).square().sum()
    once, twice, expected = (torch.autograd.grad(z, (x, w_hh), retain_graph=True) for z in (fast, fast, slow))
    all_near((*once, *twice), expected * 2)


def test_what_would_be_a_wrong_gradient_is_an_error() -> None:
    """Overwriting what another node has saved, changing the result before backward, a second derivative."""
    x, w_hh = randn(8, 3, grad=True), randn(3, 3, grad=True)
    projected = x * 2.0
    other = projected.square().sum()  # needs the values that are overwritten next
    overwriting, _ = _Recurrence.apply(projected, w_hh, 4)
    hidden, _ = _Recurrence.apply(x * 1.0, w_hh, 4)
    loss = hidden.sum()
    hidden.mul_(2)
    for wrong in (other + overwriting.sum(), loss):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            wrong.backward()
    loss = _Recurrence.apply(x * 1.0, w_hh, 4)[1].square().sum()
    (gradient,) = torch.autograd.grad(loss, w_hh, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# the network


@pytest.mark.parametrize(("readout", "width"), [("last", 128), ("mean", 128), ("both", 256)])
def test_the_three_layers_have_their_names_and_sizes(readout: Readout, width: int) -> None:
    sizes = {name: tuple(p.shape) for name, p in RNN(28, 128, 10, readout=readout).state_dict().items()}
    assert sizes == {
        **{"input_to_hidden.weight": (128, 28), "input_to_hidden.bias": (128,)},
        **{"hidden_to_output.weight": (10, width), "hidden_to_output.bias": (10,)},
        "hidden_to_hidden.weight": (128, 128),
    }


def test_xavier_weights_fill_their_bounds_evenly() -> None:
    """Uniform in ±√(6 / (fan_in + fan_out)): the bound, the mean, the variance a²/3."""
    model = RNN(100, 300, 200, readout="last")
    for layer in (model.input_to_hidden, model.hidden_to_hidden, model.hidden_to_output):
        bound, n = math.sqrt(6 / (layer.in_features + layer.out_features)), layer.weight.numel()
        share = layer.weight.detach().double() / bound  # uniform in [−1, 1]
        assert 1 - 20 / n < float(share.abs().max()) <= 1 + 1e-6
        assert abs(float(share.mean())) < 5 * math.sqrt(1 / 3 / n)
        assert abs(float(share.square().mean()) - 1 / 3) < 5 * math.sqrt(4 / 45 / n)
        assert layer.bias is None or not layer.bias.any()


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
    weights[0]["hidden_to_hidden.weight"] *= 2.5
    assert all(map(torch.equal, *(state.values() for state in weights)))


@torch.no_grad()
def test_dropout_is_of_the_features_and_in_training_only() -> None:
    """Kept with probability 3/4 and scaled by 4/3, which an output layer of the identity shows."""
    model, (x, _) = RNN(3, 200, 200, readout="last", dropout=0.25).double(), sequences(64)
    nn.init.eye_(model.hidden_to_output.weight)
    features = model.hidden_states(x)[-1]
    near(model.eval()(x), features)
    found = model.train()(x)
    kept = found != 0
    near(found, features * kept * 4 / 3)
    assert abs(int(kept.sum()) - 0.75 * kept.numel()) < 5 * math.sqrt(0.25 * 0.75 * kept.numel())


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
    with refused(r"x .*\(B, T, 3\), got \(2, 1, 5, 3\)"):
        RNN(3)(torch.zeros(2, 1, 5, 3))


# gradients through time


@READOUTS
@pytest.mark.parametrize("last_only", [False, True], ids=["total", "last"])
def test_gradient_norms_are_products_of_jacobians(readout: Readout, last_only: bool) -> None:
    """∂L/∂h_t is what reaches it from outside and J_{t+1}ᵀ ∂L/∂h_{t+1}, J_k = diag(1 − h_k²) W_hh; in any mode."""
    model, (x, targets) = make(readout=readout), sequences(3, 5, 3)
    states = torch_states(x, *weights_of(model)).detach().requires_grad_()
    # the loss is a mean over three samples, which do not meet
    (outside,) = torch.autograd.grad(3 * cross_entropy(model.read_out(states, states[-1]), targets), states)
    g = [outside[-1]]
    with torch.no_grad():
        for t in (3, 2, 1, 0):
            g.insert(0, ((1 - states[t + 1] ** 2) * g[0]) @ model.hidden_to_hidden.weight)
            g[0] += 0 if last_only else outside[t]
        norms = gradient_norms_through_time(model, x, targets, cross_entropy, last_only)
    assert all(parameter.grad is None for parameter in model.parameters())
    near(norms, torch.stack(g).norm(dim=2).mean(1))
    model.requires_grad_(False)  # a frozen network has the same
    near(norms, gradient_norms_through_time(model, x, targets, cross_entropy, last_only))
    assert gradient_norms_through_time(model.float(), x.float(), targets, cross_entropy).dtype == F64


def test_decay_of_an_exact_exponential_and_of_a_constant() -> None:
    """‖∂L/∂h_t‖ = c · factor^(T − t): one step back in time multiplies by the factor."""
    for factor in (0.5, 0.97, 1.0, 1.6):
        norms = 3e-4 * factor ** torch.arange(27.0, -1, -1, dtype=F64)
        assert decay_per_step(norms) == pytest.approx((factor, 1.0), rel=1e-9)
    for level, dtype in product((1.0, 0.3, 3.7e5, 1e-7), (torch.float32, F64)):
        assert decay_per_step(torch.full((28,), level, dtype=dtype)) == (1.0, 1.0)


def test_decay_against_a_fit_by_least_squares() -> None:
    norms = torch.rand(28, dtype=F64) + 0.1
    points = range(28), norms.log().tolist()
    expected = math.exp(-linear_regression(*points).slope), correlation(*points) ** 2
    assert decay_per_step(norms) == pytest.approx(expected, rel=1e-9)


def test_decay_leaves_out_what_is_no_positive_number() -> None:
    """The line goes through the others at their own places in time; fewer than two have none."""
    norms = 0.5 ** torch.arange(9.0, -1, -1, dtype=F64)
    norms[0], norms[4], norms[6] = 0.0, math.inf, math.nan
    assert decay_per_step(norms) == pytest.approx((0.5, 1.0))
    for few in ([], [1.0], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0], [math.inf, 1.0]):
        assert all(math.isnan(value) for value in decay_per_step(torch.tensor(few)))
