"""Denoising diffusion (Ho, Jain & Abbeel 2020): noise is added in T small steps, a network learns to take them back.

    q(x_t | x_{t−1}) = N(√(1−β_t) x_{t−1}, β_t I)                    the forward process                     (2)
    p(x_{t−1} | x_t) = N(μ_θ(x_t, t), σ_t² I)                        the reverse process                     (1)
    L = E_q[KL(q(x_T|x_0) ‖ p(x_T)) + Σ_{t>1} KL(q(x_{t−1}|x_t, x_0) ‖ p(x_{t−1}|x_t)) − log p(x_0|x_1)]     (5)

Equation numbers are those of the paper. Its t runs from 1 to T; here t is an index, from 0 to T − 1, and ᾱ before
the first step is 1. Images lie in [−1, 1]. A model is any callable (x_t, t) → ε with x_t (B, C, H, W), t (B,) int64
and ε like x_t.

Letters in shapes: B batch, C channels, H height, W width, T time steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from experiments.nn.checks import at_least, one_of, shaped

Schedule = Literal["linear", "cosine"]
Variance = Literal["fixed_large", "fixed_small"]
Model = Callable[[Tensor, Tensor], Tensor]

HALF_BIN = 1 / 255  # half the distance between two of the 256 values that a pixel has in [−1, 1]
EDGE = 0.999  # beyond it lies only the first or the last of the 256 values


class Reverse(NamedTuple):
    """p(x_{t−1} | x_t), and the x_0 that it was made from."""

    mean: Tensor  # (B, C, H, W)
    variance: Tensor  # (B, 1, 1, 1)
    log_variance: Tensor  # (B, 1, 1, 1)
    x_0: Tensor  # (B, C, H, W)


class Bound(NamedTuple):
    """The variational bound of single images; all but `mse` in bits per dimension."""

    total: Tensor  # (B,): terms and prior together, an upper bound of −log₂ p(x_0) / (C·H·W)
    terms: Tensor  # (B, T): column 0 is the decoder's −log p(x_0|x_1), column t the KL of eq. 5 at index t
    prior: Tensor  # (B,): KL(q(x_T|x_0) ‖ p(x_T))
    mse: Tensor  # (B, T): the mean square of x̂_0 − x_0, x̂_0 as seen from x_t


class GaussianDiffusion:
    """The forward process, its posterior, the reverse process and the losses.

    Tables are float64 on the CPU and cast once for each dtype and device that asks.

    Args:
        timesteps: T
        schedule: how β_t grows; see `linear_betas` and `cosine_betas`
        variance: σ_t² of the reverse process (§3.2): β_t, right for x_0 ~ N(0, I) ("fixed_large"), or β̃_t, right
            for an x_0 that is one point ("fixed_small")

    Raises:
        ValueError: an unknown `schedule` or `variance`, too few `timesteps` for the schedule.
    """

    def __init__(
        self, timesteps: int = 1000, schedule: Schedule = "linear", variance: Variance = "fixed_large"
    ):
        one_of(get_args(Schedule), schedule=schedule)
        one_of(get_args(Variance), variance=variance)
        self.timesteps, self.schedule, self.variance = timesteps, schedule, variance
        self.betas = linear_betas(timesteps) if schedule == "linear" else cosine_betas(timesteps)  # (T,)
        self.alphas_cumprod = (1 - self.betas).cumprod(0)  # (T,): ᾱ_t
        self.tables = self.make_tables()
        self.casts: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def make_tables(self) -> dict[str, Tensor]:
        """Compute what the equations need of each t, (T,) float64 each.

        β̃_t is zero at the first index: its logarithm, and that of σ_t², is there taken from the second, which
        gives the decoder a better likelihood (as in the authors' code).
        """
        beta, alpha_bar = self.betas, self.alphas_cumprod

        # the posterior of x_{t−1}, and the variance that the reverse process takes
        before = torch.cat((torch.ones(1, dtype=torch.float64), alpha_bar[:-1]))  # ᾱ_{t−1}
        beta_tilde = beta * (1 - before) / (1 - alpha_bar)  # (7)
        sigma_2 = beta if self.variance == "fixed_large" else beta_tilde

        # logarithms, the first taken from the second
        log_beta_tilde = torch.cat((beta_tilde[1:2], beta_tilde[1:])).log()
        log_sigma_2 = torch.cat((beta_tilde[1:2], sigma_2[1:])).log()
        log_ratio = log_beta_tilde - log_sigma_2
        posterior_x_0 = before.sqrt() * beta / (1 - alpha_bar)  # (7)

        return {
            "sqrt_alpha_bar": alpha_bar.sqrt(),
            "sqrt_one_minus_alpha_bar": (1 - alpha_bar).sqrt(),
            "posterior_x_0": posterior_x_0,
            "posterior_x_t": (1 - beta).sqrt() * (1 - before) / (1 - alpha_bar),  # (7)
            "beta_tilde": beta_tilde,
            "log_beta_tilde": log_beta_tilde,
            "log_sigma_2": log_sigma_2,
            "kl_of_variances": (log_ratio.exp() - 1 - log_ratio) / 2,
            "kl_of_x_0": posterior_x_0**2 / (2 * log_sigma_2.exp()),
        }

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Return a table's values at t (B,), shaped (B, 1, …, 1) in the dtype and on the device of `like` (B, …)."""
        shaped("t", t, len(like))
        dtype = torch.promote_types(like.dtype, torch.float32)  # in half precision the schedule would be lost
        key = (name, dtype, like.device)
        if key not in self.casts:
            self.casts[key] = self.tables[name].to(dtype).to(like.device)
        return self.casts[key][t].view(-1, *[1] * (like.ndim - 1))

    def alpha_bar(self, t: int) -> float:
        """ᾱ at one index; 1 at −1, before any noise."""
        return 1.0 if t < 0 else float(self.alphas_cumprod[t])

    def q_sample(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Eq. 4: x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε, all t steps at once."""
        return self.at("sqrt_alpha_bar", t, x_0) * x_0 + self.at("sqrt_one_minus_alpha_bar", t, x_0) * noise

    def q_posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Eqs. 6 and 7: q(x_{t−1} | x_t, x_0), its mean (B, C, H, W), variance and log-variance (B, 1, 1, 1).

        The variance is zero at t = 0, where the log-variance is that of t = 1: see `make_tables`.
        """
        mean = self.at("posterior_x_0", t, x_t) * x_0 + self.at("posterior_x_t", t, x_t) * x_t
        return mean, self.at("beta_tilde", t, x_t), self.at("log_beta_tilde", t, x_t)

    def predict_x_0(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Eq. 15: x̂_0 = (x_t − √(1−ᾱ_t) ε) / √ᾱ_t."""
        noise = self.at("sqrt_one_minus_alpha_bar", t, x_t) * eps
        return (x_t - noise) / self.at("sqrt_alpha_bar", t, x_t)

    def p_mean_variance(self, model: Model, x_t: Tensor, t: Tensor, clip: bool = True) -> Reverse:
        """Eq. 1: p(x_{t−1} | x_t) as the posterior (7) at x̂_0 (15), which is clipped *before* that.

        Without the clip the mean is eq. 11, (x_t − β_t ε / √(1−ᾱ_t)) / √(1−β_t).
        """
        x_0 = self.predict_x_0(x_t, t, predict_noise(model, x_t, t))
        if clip:
            x_0 = x_0.clamp(-1, 1)
        mean, _, _ = self.q_posterior(x_0, x_t, t)
        log_variance = self.at("log_sigma_2", t, x_t)
        return Reverse(mean, log_variance.exp(), log_variance, x_0)

    def loss_simple(self, model: Model, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Eq. 14, ‖ε − ε_θ(x_t, t)‖² as a mean over each image's dimensions: (B,)."""
        eps = predict_noise(model, self.q_sample(x_0, t, noise), t)
        return _mean_per_image((noise - eps).square())

    def loss_vlb(self, model: Model, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return the bound at t, in bits per dimension: (B,); T times its mean over t is L without the prior.

        x̂_0 is not clipped, so that a gradient reaches every pixel.
        """
        p, mse = self.reverse(model, x_0, t, noise, clip=False)
        return torch.where(t == 0, self.decoder_bits(x_0, p), self.posterior_bits(mse, t))

    def reverse(
        self, model: Model, x_0: Tensor, t: Tensor, noise: Tensor, clip: bool
    ) -> tuple[Reverse, Tensor]:
        """Forward (4) and one step back (1): what p says, and the mean square of x̂_0 − x_0 (B,)."""
        p = self.p_mean_variance(model, self.q_sample(x_0, t, noise), t, clip)
        return p, _mean_per_image((p.x_0 - x_0).square())

    def decoder_bits(self, x_0: Tensor, p: Reverse) -> Tensor:
        """L_0 = −log₂ p(x_0|x_1) per dimension, (B,); p is what the reverse process says at t = 0."""
        return _mean_per_image(_decoder_log_likelihood(x_0, p.mean, p.log_variance)) / -math.log(2)

    def posterior_bits(self, mse: Tensor, t: Tensor) -> Tensor:
        """KL(q(x_{t−1}|x_t, x_0) ‖ p(x_{t−1}|x_t)) in bits per dimension (B,), from the mean square of x̂_0 − x_0.

        Both means are eq. 7, at x_0 and at x̂_0: they differ by its first coefficient times x_0 − x̂_0. Subtracted
        on paper, what they share leaves no rounding behind.
        """
        nats = self.at("kl_of_variances", t, mse) + self.at("kl_of_x_0", t, mse) * mse
        return nats / math.log(2)

    def prior_bits(self, x_0: Tensor) -> Tensor:
        """KL(q(x_T|x_0) ‖ N(0, I)), the first term of eq. 5, in bits per dimension: (B,)."""
        alpha_bar = self.alpha_bar(self.timesteps - 1)
        nats = -math.log1p(-alpha_bar) - alpha_bar + alpha_bar * _mean_per_image(x_0.square())
        return nats / (2 * math.log(2))

    @torch.no_grad()
    def bits_per_dim(
        self,
        model: Model,
        x_0: Tensor,
        draw: Callable[[int], Tensor] | None = None,
        clip: bool = True,
        on_step: Callable[[int], None] | None = None,
    ) -> Bound:
        """All T + 1 terms of eq. 5 for each image, every expectation over q by one draw.

        Args:
            model: (x_t, t) → ε
            x_0: images (B, C, H, W), at the 256 values 2k/255 − 1
            draw: noise like x_0 for time step t; None: from torch's global stream
            clip: whether x̂_0 is clipped to [−1, 1]
            on_step: called with each t when it is done, from T − 1 down to 0
        """
        draw = draw or (lambda t: torch.randn_like(x_0))
        terms = x_0.new_empty(len(x_0), self.timesteps)
        mse = torch.empty_like(terms)
        for t in reversed(range(self.timesteps)):
            steps = torch.full((len(x_0),), t, device=x_0.device)
            p, mse[:, t] = self.reverse(model, x_0, steps, draw(t), clip)
            terms[:, t] = self.decoder_bits(x_0, p) if t == 0 else self.posterior_bits(mse[:, t], steps)
            if on_step is not None:
                on_step(t)
        prior = self.prior_bits(x_0)
        return Bound(terms.sum(1) + prior, terms, prior, mse)

    def to_diffusers(self) -> dict[str, Any]:
        """Return the config of diffusers' `DDPMScheduler` for this process, as `scheduler_config.json` holds it."""
        return {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": self.timesteps,
            "beta_schedule": "linear" if self.schedule == "linear" else "squaredcos_cap_v2",
            "beta_start": float(self.betas[0]),
            "beta_end": float(self.betas[-1]),
            "variance_type": self.variance,
            "prediction_type": "epsilon",
            "clip_sample": True,
        }


def linear_betas(timesteps: int) -> Tensor:
    """β from 1e-4 to 0.02 in equal steps (§4), (T,) float64; scaled by 1000/T, so that ᾱ_T stays near 4e-5.

    The scale is that of Nichol & Dhariwal 2021, whose T is 4000.
    """
    at_least(21, "schedule=linear", timesteps=timesteps)  # or β would reach 1
    scale = 1000 / timesteps
    return torch.linspace(1e-4 * scale, 0.02 * scale, timesteps, dtype=torch.float64)


def cosine_betas(timesteps: int) -> Tensor:
    """β_t = min(1 − ᾱ_t / ᾱ_{t−1}, 0.999), ᾱ_t ∝ cos²((t/T + s) / (1 + s) · π/2), s = 0.008; (T,) float64.

    Nichol & Dhariwal 2021, eq. 17.
    """
    at_least(2, "schedule=cosine", timesteps=timesteps)
    t = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    alpha_bar = ((t + 0.008) / 1.008 * math.pi / 2).cos().square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def predict_noise(model: Model, x_t: Tensor, t: Tensor) -> Tensor:
    """ε_θ(x_t, t) in the dtype of x_t, whatever the network computes in."""
    eps = model(x_t, t)
    shaped("model(x_t, t)", eps, *x_t.shape)
    return eps.to(x_t.dtype)


def _decoder_log_likelihood(x_0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Eq. 13: log of what N(mean, σ²) puts on the bin of each of x_0's pixels; all broadcast together.

    The bins of −1 and 1 reach to infinity. A bin is mirrored to the left of the mean, where Φ's logarithm is exact
    however far out it lies: nothing underflows, so no floor is put under the likelihood.
    """
    centred = x_0 - mean
    scale = (-log_variance / 2).exp()
    distance = centred.abs()
    below, above = log_ndtr((-distance - HALF_BIN) * scale), log_ndtr((HALF_BIN - distance) * scale)
    inside = above + (-(below - above).expm1()).log()
    first, last = log_ndtr((centred + HALF_BIN) * scale), log_ndtr((HALF_BIN - centred) * scale)
    return torch.where(x_0 < -EDGE, first, torch.where(x_0 > EDGE, last, inside))


def log_ndtr(z: Tensor) -> Tensor:
    """log Φ(z), exact in both tails; by way of the CPU on MPS, which lacks it."""
    output: Tensor = torch.special.log_ndtr(z.cpu() if z.device.type == "mps" else z)
    return output.to(z.device)


def _mean_per_image(x: Tensor) -> Tensor:
    """(B, …) → (B,)."""
    return x.flatten(1).mean(1)


def rate_distortion(bound: Bound) -> tuple[Tensor, Tensor]:
    """Fig. 5 and Table 4, means over images, by the number of reverse steps 1 … T that were received.

    Returns:
        rate: bits per dimension sent so far, (T,)
        rmse: of x̂_0 on the scale 0 … 255, (T,)
    """
    reverse = bound.terms.double().mean(0).flip(0)  # (T,)
    sent = torch.cat((bound.prior.double().mean()[None], reverse[:-1])).cumsum(0)
    return sent, 127.5 * bound.mse.double().mean(0).flip(0).sqrt()
