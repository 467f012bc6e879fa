"""The vanilla RNN against `torch.nn.RNN` with the same weights, by algebra, and by closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from experiments.nn.rnn import (
    RNN,
    Init,
    Readout,
    Recurrence,
    decay_per_step,
    gradient_norms_through_time,
)

READOUTS: tuple[Readout, ...] = get_args(Readout)
SHAPES = {  # B, T, D, H
    "usual": (5, 7, 3, 4),
    "one sample": (1, 7, 3, 4),
    "one step": (5, 1, 3, 4),
    "one unit": (5, 7, 3, 1),
    "one input": (2, 6, 1, 5),
    "one of each": (1, 1, 1, 1),
}
C = 6


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Reference(nn.Module):
    """`torch.nn.RNN` and a linear layer, holding the weights of one of ours."""

    def __init__(self, ours: RNN):
        super().__init__()
        self.readout = ours.readout
        inputs, hidden = ours.input_to_hidden, ours.hidden_to_hidden
        self.rnn = nn.RNN(inputs.in_features, inputs.out_features, batch_first=True).to(inputs.weight.dtype)
        self.output = nn.Linear(ours.hidden_to_output.in_features, ours.hidden_to_output.out_features)
        self.output.to(inputs.weight.dtype).load_state_dict(ours.hidden_to_output.state_dict())
        with torch.no_grad():
            self.rnn.weight_ih_l0.copy_(inputs.weight)
            self.rnn.weight_hh_l0.copy_(hidden.weight)
            self.rnn.bias_ih_l0.copy_(inputs.bias)
            self.rnn.bias_hh_l0.zero_()

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.rnn(x)  # (B, T, H)
        features = {"last": [hidden[:, -1]], "mean": [hidden.mean(1)]}
        features["both"] = [*features["last"], *features["mean"]]
        return self.output(torch.cat(features[self.readout], 1))

    def gradients(self) -> dict[str, Tensor | None]:
        """The gradient of each parameter, by the name that ours has."""
        rnn, output = self.rnn, self.output
        return {
            "input_to_hidden.weight": rnn.weight_ih_l0.grad,
            "input_to_hidden.bias": rnn.bias_ih_l0.grad,
            "hidden_to_hidden.weight": rnn.weight_hh_l0.grad,
            "hidden_to_output.weight": output.weight.grad,
            "hidden_to_output.bias": output.bias.grad,
        }


def make(D: int = 3, H: int = 4, readout: Readout = "both", **more: object) -> RNN:
    """A small network in float64, its biases not zero."""
    model = RNN(D, H, C, readout=readout, **more).double()  # type: ignore[arg-type]
    with torch.no_grad():
        model.input_to_hidden.bias.normal_()
        model.hidden_to_output.bias.normal_()
    return model


def sequences(B: int, T: int, D: int) -> tuple[Tensor, Tensor]:
    return torch.randn(B, T, D, dtype=torch.float64), torch.randint(C, (B,))


def close(found: Tensor | None, wanted: Tensor | None, tolerance: float = 1e-10) -> bool:
    assert found is not None and wanted is not None
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=tolerance, atol=tolerance)


def assert_equal_to_reference(model: RNN, x: Tensor, targets: Tensor) -> None:
    """Logits, the gradient of every parameter, and that of the input."""
    reference = Reference(model)
    mine, theirs = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    logits, wanted = model(mine), reference(theirs)
    assert close(logits, wanted)
    cross_entropy(logits, targets).backward()
    cross_entropy(wanted, targets).backward()
    assert close(mine.grad, theirs.grad)
    gradients = reference.gradients()
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert close(parameter.grad, gradients[name]), name


# equal to torch.nn.RNN


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("readout", READOUTS)
def test_output_and_every_gradient_are_those_of_torch(readout: Readout, shape: str) -> None:
    B, T, D, H = SHAPES[shape]
    assert_equal_to_reference(make(D, H, readout), *sequences(B, T, D))


@pytest.mark.parametrize("readout", READOUTS)
def test_input_of_any_layout(readout: Readout) -> None:
    x, targets = sequences(5, 7, 3)
    layouts = {
        "time first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "every second": torch.stack((x, -x), 3).flatten(2)[:, :, ::2],
        "backwards": x.flip(1),
        "expanded": x[:1].expand(5, 7, 3),
    }
    model = make(3, 4, readout)
    for layout in layouts.values():
        model.zero_grad()
        assert_equal_to_reference(model, layout, targets)
        given = layout.clone()
        assert close(model(layout), Reference(model)(given))
        assert torch.equal(layout, given)


def test_long_sequence_with_saturated_units() -> None:
    model = make(init="orthogonal", gain=3.0)
    assert_equal_to_reference(model, *sequences(3, 100, 3))


# the fast recurrence


def step_by_step(projected: Tensor, w_hh: Tensor) -> Tensor:
    """Equation (1) of the module, as it reads: (T, B, H)."""
    hidden = [torch.tanh(projected[0])]
    for p in projected[1:]:
        hidden.append(torch.tanh(p + hidden[-1] @ w_hh.t()))
    return torch.stack(hidden)


def recurrence(projected: Tensor, w_hh: Tensor) -> Tensor:
    """All states (T, B, H) by `Recurrence`, of a copy, since it overwrites what it is given."""
    T, B, _ = projected.shape
    return Recurrence.apply(projected.flatten(0, 1) * 1.0, w_hh, T)[0].unflatten(0, (T, B))


def last_by_itself(projected: Tensor, w_hh: Tensor) -> Tensor:
    """h_T by `Recurrence`, its second result."""
    return Recurrence.apply(projected.flatten(0, 1) * 1.0, w_hh, len(projected))[1]


def mixed(projected: Tensor, w_hh: Tensor) -> Tensor:
    """Of both results."""
    hidden, last = Recurrence.apply(projected.flatten(0, 1) * 1.0, w_hh, len(projected))
    return hidden.square().sum() + 3 * last


@pytest.mark.parametrize("function", [recurrence, last_by_itself, mixed])
def test_recurrence_by_finite_differences(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    projected = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    w_hh = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (projected, w_hh))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
def test_recurrence_with_either_side_frozen(needs: tuple[bool, bool]) -> None:
    values = torch.randn(5, 3, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    out = torch.randn(5, 3, 4, dtype=torch.float64)
    gradients = []
    for function in (recurrence, step_by_step):
        projected, w_hh = (v.clone().requires_grad_(n) for v, n in zip(values, needs, strict=True))
        function(projected, w_hh).backward(out)
        gradients.append((projected.grad, w_hh.grad))
    for found, wanted, needed in zip(*gradients, needs, strict=True):
        assert (found is not None) == needed
        assert not needed or close(found, wanted)


def test_frozen_recurrent_weights_cost_no_product() -> None:
    """Backward is T − 1 products of (B, H) with W_hh, and for ∂L/∂W_hh one of as much work as all of them."""
    T, B, H = 5, 3, 4
    work = {}
    for trained in (False, True):
        projected = torch.randn(T, B, H, requires_grad=True)
        hidden = recurrence(projected, torch.randn(H, H, requires_grad=trained))
        with FlopCounterMode(display=False) as counter:
            hidden.backward(torch.ones(T, B, H))
        work[trained] = counter.get_total_flops()
    assert work == {False: 2 * (T - 1) * B * H * H, True: 2 * 2 * (T - 1) * B * H * H}


@pytest.mark.parametrize("frozen", ["hidden_to_hidden", "input_to_hidden", "hidden_to_output"])
def test_network_with_a_frozen_layer(frozen: str) -> None:
    x, targets = sequences(5, 7, 3)
    model = make()
    getattr(model, frozen).requires_grad_(False)
    cross_entropy(model(x), targets).backward()
    reference = Reference(model)
    cross_entropy(reference(x), targets).backward()
    gradients = reference.gradients()
    for name, parameter in model.named_parameters():
        if name.startswith(frozen):
            assert parameter.grad is None
        else:
            assert close(parameter.grad, gradients[name]), name


def test_hidden_states_are_the_fast_path_step_by_step() -> None:
    x, targets = sequences(5, 7, 3)
    model = make()
    fast = torch.autograd.grad(cross_entropy(model(x), targets), list(model.parameters()))
    states = model.hidden_states(x)
    assert len(states) == 7 and states[0].shape == (5, 4)
    slow_loss = cross_entropy(model.read_out(torch.stack(states), states[-1]), targets)
    slow = torch.autograd.grad(slow_loss, list(model.parameters()))
    assert all(close(f, s, 1e-12) for f, s in zip(fast, slow, strict=True))
    theirs, _ = Reference(model).rnn(x)
    assert close(torch.stack(states, 1), theirs)


def test_overwritten_projection_leaves_autograd_right() -> None:
    """The projection is used again after the recurrence: what is read then is h, and so says the gradient."""
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    w_hh = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    projected = x * 2.0
    hidden, _ = Recurrence.apply(projected, w_hh, 4)
    assert hidden.data_ptr() == projected.data_ptr()  # no copy was made
    assert torch.equal(hidden, projected)
    found = torch.autograd.grad((hidden * projected).sum(), (x, w_hh))
    wanted = torch.autograd.grad(step_by_step(x.unflatten(0, (4, 2)) * 2.0, w_hh).square().sum(), (x, w_hh))
    assert all(close(f, w) for f, w in zip(found, wanted, strict=True))


def test_overwriting_what_another_node_has_saved_is_an_error_not_a_wrong_gradient() -> None:
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    w_hh = torch.randn(3, 3, dtype=torch.float64)
    projected = x * 2.0
    other = projected.square().sum()  # needs the values that are overwritten next
    hidden, _ = Recurrence.apply(projected, w_hh, 4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (other + hidden.sum()).backward()


def test_changing_the_result_before_backward_is_an_error_not_a_wrong_gradient() -> None:
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    hidden = recurrence(x, torch.randn(3, 3, dtype=torch.float64))
    loss = hidden.sum()
    hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_same_network_twice_in_one_graph() -> None:
    (x, targets), (other, _) = sequences(5, 7, 3), sequences(5, 4, 3)
    model = make()
    (cross_entropy(model(x), targets) + cross_entropy(model(other), targets)).backward()
    reference = Reference(model)
    (cross_entropy(reference(x), targets) + cross_entropy(reference(other), targets)).backward()
    gradients = reference.gradients()
    assert all(close(parameter.grad, gradients[name]) for name, parameter in model.named_parameters())


def test_backward_twice_through_a_kept_graph() -> None:
    x, targets = sequences(5, 7, 3)
    model = make()
    loss = cross_entropy(model(x), targets)
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_second_derivative_is_refused_clearly() -> None:
    x, targets = sequences(5, 7, 3)
    model = make()
    weight = model.hidden_to_hidden.weight
    (gradient,) = torch.autograd.grad(cross_entropy(model(x), targets), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: type[torch.no_grad]) -> None:
    x, _ = sequences(5, 7, 3)
    model = make()
    with_gradients, given = model(x).detach(), x.clone()
    with mode():
        logits = model(x)
    assert not logits.requires_grad
    assert torch.equal(logits, with_gradients) and torch.equal(x, given)


def test_bfloat16_autocast() -> None:
    x, targets = (sequences(32, 7, 3)[0].float(), torch.randint(C, (32,)))
    model = make(H=16).float()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
        loss = cross_entropy(logits, targets)
    loss.backward()
    assert logits.dtype == torch.bfloat16
    reference = Reference(model)
    wanted = reference(x)
    cross_entropy(wanted, targets).backward()
    assert torch.allclose(logits.float(), wanted, atol=0.05)
    gradients = reference.gradients()
    for name, parameter in model.named_parameters():
        gradient = gradients[name]
        assert parameter.grad is not None and gradient is not None
        assert parameter.grad.dtype == torch.float32
        assert float((parameter.grad - gradient).norm() / gradient.norm()) < 0.05, name


def test_compiled_network_is_the_same_function() -> None:
    """Traced whole, step by step: the hand-written backward inside made the compiled network slower.

    It runs by torch's own kernels here; what the compiler's backend makes of the graph is not ours.
    """
    x, targets = sequences(5, 4, 3)
    model, traced = make(), []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        traced.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    wanted = torch.autograd.grad(cross_entropy(model(x), targets), list(model.parameters()))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    found = torch.autograd.grad(cross_entropy(compiled(x), targets), list(model.parameters()))
    assert all(close(f, w) for f, w in zip(found, wanted, strict=True))
    assert traced.count(torch.tanh) == 4


# the network


def test_number_of_parameters() -> None:
    for readout, width in (("last", 128), ("mean", 128), ("both", 256)):
        count = sum(p.numel() for p in RNN(28, 128, 10, readout=readout).parameters())  # type: ignore[arg-type]
        assert count == 28 * 128 + 128 + 128 * 128 + width * 10 + 10


def test_state_dict_names_the_three_layers() -> None:
    layers = {name.split(".")[0] for name in RNN(3).state_dict()}
    assert layers == {"input_to_hidden", "hidden_to_hidden", "hidden_to_output"}


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


@pytest.mark.parametrize("gain", [1.0, 0.5, 2.0])
def test_orthogonal_and_identity(gain: float) -> None:
    w_hh = RNN(3, 50, init="orthogonal", gain=gain).hidden_to_hidden.weight.detach().double()
    assert torch.allclose(w_hh @ w_hh.t(), gain**2 * torch.eye(50, dtype=torch.float64), atol=1e-5)
    assert not torch.allclose(w_hh.abs(), gain * torch.eye(50, dtype=torch.float64), atol=0.1)
    w_hh = RNN(3, 50, init="identity", gain=gain).hidden_to_hidden.weight.detach()
    assert torch.equal(w_hh, gain * torch.eye(50))


@pytest.mark.parametrize("init", get_args(Init))
def test_gain_scales_the_recurrent_weights_alone(init: Init) -> None:
    weights = []
    for gain in (1.0, 2.5):
        torch.manual_seed(3)
        weights.append(RNN(3, 8, init=init, gain=gain).state_dict())
    one, scaled = weights
    assert torch.equal(scaled.pop("hidden_to_hidden.weight"), 2.5 * one.pop("hidden_to_hidden.weight"))
    assert all(torch.equal(one[name], scaled[name]) for name in one)


def test_dropout_is_of_the_features_and_in_training_only() -> None:
    x, _ = sequences(4, 5, 3)
    model = make(H=200, readout="last", dropout=0.25)
    with torch.no_grad():
        model.hidden_to_output.weight.zero_()
        model.hidden_to_output.bias.zero_()
        model.hidden_to_output.weight[0] = 1.0  # the first logit is the sum of the features
        features = model.hidden_states(x)[-1]
        model.eval()
        assert close(model(x)[:, 0], features.sum(1))
        model.train()
        sums = torch.stack([model(x)[:, 0] for _ in range(500)])
    # kept with probability 3/4 and scaled by 4/3: the mean stays, the variance is Σ f² · (1/4) / (3/4)
    deviation = (features.square().sum(1) / 3).sqrt()
    assert bool(((sums.mean(0) - features.sum(1)).abs() < 5 * deviation / math.sqrt(500)).all())
    assert bool(((sums.std(0) / deviation - 1).abs() < 5 / math.sqrt(2 * 500)).all())


@pytest.mark.parametrize(
    "argument",
    [
        {"input_size": 0},
        {"hidden_size": 0},
        {"hidden_size": -3},
        {"num_classes": 0},
        {"init": "zeros"},
        {"readout": "first"},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"dropout": math.nan},
        {"gain": math.inf},
        {"gain": math.nan},
    ],
    ids=str,
)
def test_argument_out_of_range_is_named(argument: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(argument))} must .*{next(iter(argument.values()))}"):
        RNN(**{"input_size": 3} | argument)  # type: ignore[arg-type]


def test_sequences_of_another_rank_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"\(B, T, D\)"):
        RNN(3)(torch.zeros(2, 1, 5, 3))


# gradients through time


def test_gradient_norms_of_a_scalar_network_by_closed_form() -> None:
    """∂L/∂h_t = (Σ_c ∂L/∂z_c v_c) Π_{k>t} u (1 − h_k²), in plain Python."""
    model = RNN(1, 1, 2, readout="last").double()
    u, w, v = 1.3, 0.7, (0.4, -0.9)
    with torch.no_grad():
        model.hidden_to_hidden.weight.fill_(u)
        model.input_to_hidden.weight.fill_(w)
        model.hidden_to_output.weight.copy_(torch.tensor(v, dtype=torch.float64)[:, None])
    inputs = [0.3, -0.2, 0.8, 0.1, -0.5]
    hidden = [0.0]
    for pixel in inputs:
        hidden.append(math.tanh(w * pixel + u * hidden[-1]))
    odds = [math.exp(c * hidden[-1]) for c in v]
    p = [odd / sum(odds) for odd in odds]
    outside = p[0] * v[0] + (p[1] - 1) * v[1]  # the target is class 1
    wanted = [abs(outside) * math.prod(u * (1 - h * h) for h in hidden[t + 1 :]) for t in range(1, 6)]
    x = torch.tensor(inputs, dtype=torch.float64)[None, :, None]
    found = gradient_norms_through_time(model, x, torch.tensor([1]), cross_entropy)
    assert found.tolist() == pytest.approx(wanted, rel=1e-12)


def test_gradient_norms_in_the_linear_regime_are_exponential() -> None:
    """Without input h = 0 and tanh' = 1; with W_hh = g Q the norm changes by g per step, exactly."""
    model = make(D=3, H=10, readout="last", init="orthogonal", gain=0.8)
    model.input_to_hidden.bias.data.zero_()
    x = torch.zeros(4, 12, 3, dtype=torch.float64)
    norms = gradient_norms_through_time(model, x, torch.tensor([0, 1, 2, 3]), cross_entropy)
    factors = norms[:-1] / norms[1:]
    assert factors.tolist() == pytest.approx([0.8] * 11, rel=1e-6)  # Q is orthogonal to float32
    assert decay_per_step(norms) == pytest.approx((0.8, 1.0), rel=1e-6)


@pytest.mark.parametrize("readout", READOUTS)
def test_gradient_norms_against_hooks_on_single_samples(readout: Readout) -> None:
    """Each sample on its own through `torch.nn.RNNCell`, its gradients caught by hooks on the way back."""
    model = make(readout=readout)
    x, targets = sequences(3, 5, 3)
    cell = nn.RNNCell(3, 4).double()
    layers = Reference(model)
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in layers.rnn.state_dict().items()})
    caught = torch.zeros(3, 5, dtype=torch.float64)

    def catch(b: int, t: int, hidden: Tensor) -> Tensor:
        hidden.register_hook(lambda gradient: caught[b, t].copy_(gradient.norm()) and None)
        return hidden

    for b in range(3):
        h, states = torch.zeros(1, 4, dtype=torch.float64), []
        for t in range(5):
            h = catch(b, t, cell(x[b, t][None], h))
            states.append(h)
        hidden = torch.stack(states)
        features = {"last": [hidden[-1]], "mean": [hidden.mean(0)], "both": [hidden[-1], hidden.mean(0)]}
        cross_entropy(layers.output(torch.cat(features[readout], 1)), targets[b][None]).backward()
    found = gradient_norms_through_time(model, x, targets, cross_entropy)
    assert found.shape == (5,) and close(found, caught.mean(0))


@pytest.mark.parametrize("readout", READOUTS)
def test_share_through_the_last_state_is_a_product_of_jacobians(readout: Readout) -> None:
    """(∂h_T/∂h_t)ᵀ g with ∂h_k/∂h_{k−1} = diag(1 − h_k²) W_hh; g is what reaches h_T, mean read-out included."""
    model = make(readout=readout)
    x, targets = sequences(3, 5, 3)
    states = [state.detach() for state in model.hidden_states(x)]
    last = torch.stack(states).requires_grad_()
    (outside,) = torch.autograd.grad(cross_entropy(model.read_out(last, last[-1]), targets) * 3, last)
    g, w_hh = outside[-1], model.hidden_to_hidden.weight.detach()
    wanted = [g.norm(dim=1).mean()]
    for state in states[:0:-1]:
        g = ((1 - state**2) * g) @ w_hh
        wanted.insert(0, g.norm(dim=1).mean())
    found = gradient_norms_through_time(model, x, targets, cross_entropy, last_only=True)
    assert close(found, torch.stack(wanted))


def test_gradient_norms_leave_no_gradient_and_work_without_grad_mode() -> None:
    model = make()
    x, targets = sequences(3, 5, 3)
    with torch.no_grad():
        norms = gradient_norms_through_time(model, x, targets, cross_entropy)
    assert not norms.requires_grad and norms.dtype == torch.float64
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("factor", [0.5, 0.97, 1.0, 1.6])
def test_decay_of_an_exact_exponential(factor: float) -> None:
    """‖∂L/∂h_t‖ = c · factor^(T − t): one step back in time multiplies by the factor."""
    norms = 3e-4 * factor ** torch.arange(27.0, -1, -1, dtype=torch.float64)
    assert all(earlier / later == pytest.approx(factor) for earlier, later in pairwise(norms.tolist()))
    assert decay_per_step(norms) == pytest.approx((factor, 1.0), rel=1e-9)


@pytest.mark.parametrize("level", [1.0, 0.3, 3.7e5, 1e-7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decay_of_a_constant(level: float, dtype: torch.dtype) -> None:
    assert decay_per_step(torch.full((28,), level, dtype=dtype)) == (1.0, 1.0)


def test_decay_against_a_fit_by_least_squares() -> None:
    norms = torch.rand(28, dtype=torch.float64) + 0.1
    t = torch.arange(28, dtype=torch.float64)
    design = torch.stack((torch.ones(28, dtype=torch.float64), t), 1)
    _, slope = torch.linalg.lstsq(design, norms.log()[:, None]).solution[:, 0].tolist()
    correlation = torch.corrcoef(torch.stack((t, norms.log())))[0, 1]
    assert decay_per_step(norms) == pytest.approx((math.exp(-slope), float(correlation**2)), rel=1e-9)


def test_decay_leaves_out_what_is_no_positive_number() -> None:
    """The line goes through the others at their own places in time."""
    norms = 0.5 ** torch.arange(9.0, -1, -1, dtype=torch.float64)
    norms[0], norms[4], norms[6] = 0.0, math.inf, math.nan
    assert decay_per_step(norms) == pytest.approx((0.5, 1.0))


@pytest.mark.parametrize("norms", [[], [1.0], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0], [math.inf, 1.0]], ids=str)
def test_decay_of_fewer_than_two_points_is_no_number(norms: list[float]) -> None:
    assert all(math.isnan(value) for value in decay_per_step(torch.tensor(norms)))
