"""A vanilla recurrent network (Elman 1990) from three linear layers, and how gradients travel through it.

    a_t = W_xh x_t + W_hh h_{t−1} + b_h        h_t = tanh(a_t)        h_0 = 0                              (1)
    logits = W_ho r + b_o        r = h_T, the mean of h_1…h_T, or both side by side                        (2)

Letters in shapes: B batch, T time, D input size, H hidden size, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from experiments.nn.checks import at_least, one_of, shaped, within

Init = Literal["xavier", "orthogonal", "identity"]
Readout = Literal["last", "mean", "both"]


class _Recurrence(torch.autograd.Function):
    """h_t = tanh(p_t + h_{t−1} W_hhᵀ) for all t, with backpropagation through time by hand (Werbos 1990).

    With g_t the gradient that reaches h_t from outside and δ_t = ∂L/∂a_t,

        δ_t = (1 − h_t²) ⊙ (g_t + δ_{t+1} W_hh)        ∂L/∂W_hh = Σ_t δ_tᵀ h_{t−1}                           (3)

    The sum over t is one matrix product, and no graph node per step is kept: that is what makes it fast.
    """

    @staticmethod
    def forward(ctx: Any, projected: Tensor, w_hh: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """projected (T·B, H) holds W_xh x_t + b_h, all of a step together, and is overwritten with the states.

        Gives these (T·B, H), and h_T (B, H) by itself, so that it brings no gradient of zeros to all others.
        """
        w_hh_t = w_hh.t().contiguous()  # one copy, so that T products read it in their own order
        h = projected.chunk(steps)  # T views, each (B, H)
        h[0].tanh_()
        for t in range(1, len(h)):
            h[t].addmm_(h[t - 1], w_hh_t).tanh_()
        ctx.mark_dirty(projected)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(projected, w_hh)
        ctx.steps = steps
        return projected, h[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_last: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients from outside, of all states (T·B, H) and of h_T (B, H) → δ (T·B, H), ∂L/∂W_hh (H, H)."""
        # one entry per step of each: h_t, δ_t and the gradient from outside
        hidden, w_hh = ctx.saved_tensors
        deltas = torch.empty_like(hidden)
        h, delta = hidden.chunk(ctx.steps), deltas.chunk(ctx.steps)
        B = len(h[0])
        g = None if grad is None else grad.chunk(ctx.steps)

        # the last step
        direct = grad_last if g is None else g[-1] if grad_last is None else g[-1] + grad_last
        if direct is None:  # autograd asks so where a loss does not depend on either
            return None, None, None
        tanh_backward = torch.ops.aten.tanh_backward.grad_input
        tanh_backward(direct, h[-1], grad_input=delta[-1])

        # back through time
        for t in range(ctx.steps - 2, -1, -1):
            if g is None:
                torch.mm(delta[t + 1], w_hh, out=delta[t])
            else:
                torch.addmm(g[t], delta[t + 1], w_hh, out=delta[t])
            tanh_backward(delta[t], h[t], grad_input=delta[t])

        grad_w_hh = deltas[B:].t() @ hidden[:-B] if ctx.needs_input_grad[1] else None
        return deltas, grad_w_hh, None


class RNN(nn.Module):
    """A vanilla tanh RNN classifier of sequences, equations (1) and (2).

    All weights are Xavier uniform (Glorot & Bengio 2010, eq. 16) and all biases zero; `init` says how W_hh
    starts (orthogonal: Saxe et al. 2014; identity: Le et al. 2015) and `gain` scales it. `dropout` is the
    share of the read-out features dropped in training.

    Raises:
        ValueError: a size below 1, an unknown `init` or `readout`, a gain that is not finite, a dropout
            outside [0, 1).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int = 128,
        num_classes: int = 10,
        init: Init = "xavier",
        gain: float = 1.0,
        readout: Readout = "both",
        dropout: float = 0.0,
    ):
        super().__init__()
        at_least(1, input_size=input_size, hidden_size=hidden_size, num_classes=num_classes)
        within(0, 1, dropout=dropout)
        one_of(get_args(Init), init=init)
        one_of(get_args(Readout), readout=readout)
        if not math.isfinite(gain):
            raise ValueError(f"gain must be a finite number, got {gain}")

        self.readout: Readout = readout
        self.input_to_hidden = nn.Linear(input_size, hidden_size)  # W_xh and the one bias b_h
        self.hidden_to_hidden = nn.Linear(hidden_size, hidden_size, bias=False)  # W_hh
        self.hidden_to_output = nn.Linear(hidden_size * (2 if readout == "both" else 1), num_classes)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters(init, gain)

    @torch.no_grad()
    def reset_parameters(self, init: Init, gain: float) -> None:
        """Draw the weights anew."""
        for layer in (self.input_to_hidden, self.hidden_to_hidden, self.hidden_to_output):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        w_hh = self.hidden_to_hidden.weight
        if init == "orthogonal":
            nn.init.orthogonal_(w_hh)
        elif init == "identity":
            nn.init.eye_(w_hh)
        w_hh.mul_(gain)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) → logits (B, C), by the fast recurrence."""
        shaped("x", x, "B", "T", self.input_to_hidden.in_features)
        if torch.compiler.is_compiling():  # it fuses the readable path, which then is faster
            states = self.hidden_states(x)
            return self.read_out(torch.stack(states), states[-1])
        B, T, D = x.shape
        rows = x.transpose(0, 1).reshape(T * B, D)
        projected = self.input_to_hidden(rows)  # (T·B, H): all inputs in one product
        w_hh = self.hidden_to_hidden.weight.to(projected.dtype)
        hidden, last = _Recurrence.apply(projected, w_hh, T)
        return self.read_out(hidden.unflatten(0, (T, B)), last)

    def hidden_states(self, x: Tensor) -> list[Tensor]:
        """x (B, T, D) → [h_1, …, h_T], each (B, H), step by step as equation (1) reads: the reference."""
        projected = self.input_to_hidden(x)  # (B, T, H)
        hidden = [torch.tanh(projected[:, 0])]  # h_0 = 0
        for t in range(1, x.shape[1]):
            hidden.append(torch.tanh(projected[:, t] + self.hidden_to_hidden(hidden[-1])))
        return hidden

    def read_out(self, hidden: Tensor, last: Tensor) -> Tensor:
        """All states (T, B, H) and the last (B, H) → logits (B, C), equation (2)."""
        if self.readout == "last":
            features = last
        elif self.readout == "mean":
            features = hidden.mean(0)
        else:
            features = torch.cat((last, hidden.mean(0)), dim=1)  # (B, 2H)
        output: Tensor = self.hidden_to_output(self.dropout(features))
        return output


def gradient_norms_through_time(
    model: RNN, x: Tensor, targets: Tensor, loss: Callable[[Tensor, Tensor], Tensor], last_only: bool = False
) -> Tensor:
    """‖∂L/∂h_t‖ of each sample's own loss, the mean over samples: (T,) float64.

    The total derivative, through all later steps (Pascanu et al. 2013, eq. 4 and 5). With `last_only` what
    reaches h_t through h_T alone, (∂h_T/∂h_t)ᵀ ∂L/∂h_T: the product of T − t Jacobians, without the share
    that a mean read-out hands to every step directly. x is (B, T, D), targets (B,), `loss` a batch mean.
    """
    with torch.enable_grad():
        # of x too, so that there is a graph where all layers are frozen
        hidden = model.hidden_states(x.detach().requires_grad_())
        logits = model.read_out(torch.stack(hidden), hidden[-1])
        total = loss(logits, targets) * len(x)  # samples do not meet
        gradients = torch.autograd.grad(total, hidden, retain_graph=last_only)
        if last_only:
            gradients = torch.autograd.grad(hidden[-1], hidden, gradients[-1])
    return torch.stack([gradient.cpu().double().norm(dim=1).mean() for gradient in gradients])


def decay_per_step(norms: Tensor) -> tuple[float, float]:
    """Fit the factor per step *back* in time, by a straight line through log ‖∂L/∂h_t‖, and return its R² too.

    Below 1 gradients vanish, above 1 they explode; R² near 1 means that they do so exponentially. Norms that
    underflowed to zero or overflowed are left out; with fewer than two left there is no line, and both are NaN.
    """
    norms = norms.cpu().double()
    used = (norms > 0) & norms.isfinite()
    t, y = torch.arange(len(norms), dtype=torch.float64)[used], norms[used].log()
    if len(t) < 2:
        return math.nan, math.nan
    if bool((y == y[0]).all()):  # a level line fits exactly; below R² would be the rounding of the mean
        return 1.0, 1.0
    dt, dy = t - t.mean(), y - y.mean()
    slope = (dt * dy).sum() / dt.square().sum()
    r_squared = 1 - (dy - slope * dt).square().sum() / dy.square().sum()
    return float(torch.exp(-slope)), float(r_squared)
