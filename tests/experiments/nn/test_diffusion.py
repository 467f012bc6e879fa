"""The diffusion process against closed forms in float64, and against distributions of torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from experiments.nn.diffusion import (
    Bound,
    GaussianDiffusion,
    Schedule,
    Variance,
    _decoder_log_likelihood,
    rate_distortion,
)
from tests.experiments.nn.diffusion_models import SCHEDULES, VARIANCES, bent, ideal
from tests.experiments.nn.helpers import F64, all_near, near, randn, refused


def images(*shape: int) -> Tensor:
    """Pixels at the 256 values 2k/255 − 1, in float64; −1 and 1 among them."""
    levels = torch.randint(0, 256, shape).double()
    levels.view(-1)[:2] = torch.tensor([0.0, 255.0], dtype=F64)
    return levels / 127.5 - 1


def numbers(diffusion: GaussianDiffusion, t: Tensor) -> list[Tensor]:
    """β_t, ᾱ_t and ᾱ_{t−1}, (B, 1, 1, 1) each."""
    alpha_bar = torch.cat((diffusion.alphas_cumprod, torch.ones(1, dtype=F64)))  # 1 at −1
    return [x.view(-1, 1, 1, 1) for x in (diffusion.betas[t], alpha_bar[t], alpha_bar[t - 1])]


# schedules


def test_linear_schedule_is_the_papers() -> None:
    """β from 1e-4 to 0.02, and ᾱ_T = 4.0358e-05."""
    diffusion = GaussianDiffusion()
    betas = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    assert diffusion.betas.dtype == diffusion.alphas_cumprod.dtype == F64
    assert diffusion.betas.tolist() == pytest.approx(betas, rel=1e-12)
    assert float(diffusion.alphas_cumprod[-1]) == pytest.approx(4.0358e-05, rel=1e-5)
    assert diffusion.alphas_cumprod.numpy() == pytest.approx(np.cumprod(1 - np.array(betas)), rel=1e-12)
    for timesteps in (200, 500, 4000):  # of another length it ends as noisy
        other = GaussianDiffusion(timesteps)
        assert len(other.betas) == timesteps and 1e-5 < float(other.alphas_cumprod[-1]) < 6e-5


@pytest.mark.parametrize("timesteps", [50, 1000])
def test_cosine_schedule_multiplies_to_its_cosine(timesteps: int) -> None:
    """ᾱ_t = f(t)/f(0) until β is cut to 0.999, at the very end (Nichol & Dhariwal 2021, eq. 17)."""
    diffusion = GaussianDiffusion(timesteps, schedule="cosine")
    f = [math.cos((t / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(timesteps)]
    assert diffusion.alphas_cumprod[:-1].tolist() == pytest.approx([x / f[0] for x in f[1:]], rel=1e-9)
    assert float(diffusion.betas[-1]) == float(diffusion.betas.max()) == 0.999


# the forward process, its posterior, and the step back

T, TIMES = 60, torch.tensor([0, 1, 30, 59])


@SCHEDULES
def test_steps_of_q_composed_are_the_closed_form(schedule: Schedule) -> None:
    """√ᾱ x_0 + √(1−ᾱ) ε, which is all steps of q composed (eqs. 2 and 4), and its inverse (eq. 15)."""
    diffusion, x_0, noise = GaussianDiffusion(T, schedule), images(4, 1, 4, 4), randn(4, 1, 4, 4)
    signal, variance, composed = 1.0, 0.0, []
    for beta in diffusion.betas.tolist():
        signal, variance = math.sqrt(1 - beta) * signal, (1 - beta) * variance + beta
        composed.append((signal, math.sqrt(variance)))
    shares = torch.tensor(composed, dtype=F64)[TIMES].view(4, 2, 1, 1, 1)
    x_t = shares[:, 0] * x_0 + shares[:, 1] * noise
    near(diffusion.q_sample(x_0, TIMES, noise), x_t, 1e-12)
    near(diffusion.predict_x_0(x_t, TIMES, noise), x_0, 1e-7 if schedule == "cosine" else 1e-12)


@SCHEDULES
def test_posterior_is_the_product_of_two_densities(schedule: Schedule) -> None:
    """Bayes: precisions add (eqs. 6 and 7); at the first index it is a point at x_0, with the next log-variance."""
    diffusion, x_0, x_t = GaussianDiffusion(T, schedule), images(4, 1, 4, 4), randn(4, 1, 4, 4)
    t = TIMES.clamp(min=1)
    beta, _, before = numbers(diffusion, t)
    variance = 1 / ((1 - beta) / beta + 1 / (1 - before))
    mean = variance * ((1 - beta).sqrt() / beta * x_t + before.sqrt() / (1 - before) * x_0)
    all_near(diffusion.q_posterior(x_0, x_t, t), (mean, variance, variance.log()), rtol=1e-9)
    first = (x_0, torch.zeros_like(variance), variance[:1].log().expand(4, 1, 1, 1))
    all_near(diffusion.q_posterior(x_0, x_t, torch.zeros_like(t)), first)


@SCHEDULES
@VARIANCES
def test_reverse_process_is_the_posterior_at_a_clipped_x_0(schedule: Schedule, variance: Variance) -> None:
    """Clipped before the mean, else eq. 11; σ² is β_t or β̃_t (§3.2), at the first index β̃ of the second."""
    diffusion, x_t = GaussianDiffusion(T, schedule, variance), 2 * randn(4, 1, 4, 4)
    (beta, alpha_bar, _), eps = numbers(diffusion, TIMES), bent(x_t, TIMES)
    x_0 = (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    clipped, free = (diffusion.p_mean_variance(bent, x_t, TIMES, *clip) for clip in ((), (False,)))
    all_near((clipped.x_0, free.x_0), (x_0.clamp(-1, 1), x_0), rtol=1e-8)
    near(clipped.mean, diffusion.q_posterior(x_0.clamp(-1, 1), x_t, TIMES)[0])
    near(free.mean, (x_t - beta / (1 - alpha_bar).sqrt() * eps) / (1 - beta).sqrt(), rtol=1e-7)
    later, later_alpha_bar, before = numbers(diffusion, TIMES.clamp(min=1))
    sigma_2 = later * (1 - before) / (1 - later_alpha_bar)
    if variance == "fixed_large":
        sigma_2[1:] = beta[1:]
    for p in (clipped, free):
        all_near((p.variance, p.log_variance), (sigma_2, sigma_2.log()), rtol=1e-9)


# losses


def test_simple_loss_is_the_error_of_the_noise_of_each_image() -> None:
    """Eq. 14; the model is shown x_t and t."""
    diffusion, x_0, noise = GaussianDiffusion(T), images(4, 3, 8, 8), randn(4, 3, 8, 8)
    error = noise - bent(diffusion.q_sample(x_0, TIMES, noise), TIMES)
    near(diffusion.loss_simple(bent, x_0, TIMES, noise), error.square().mean((1, 2, 3)))


@SCHEDULES
@VARIANCES
def test_terms_of_the_bound_against_torchs_distributions(schedule: Schedule, variance: Variance) -> None:
    """Eq. 5: KL of two normal distributions, and the mass that a third puts on a bin."""
    diffusion, t = GaussianDiffusion(100, schedule, variance), torch.tensor([0, 1, 2, 50, 98, 99])
    x_0, noise = images(6, 1, 4, 4), randn(6, 1, 4, 4)
    x_t = diffusion.q_sample(x_0, t, noise)
    mean, _, log_variance = diffusion.q_posterior(x_0, x_t, t)
    reverse = diffusion.p_mean_variance(bent, x_t, t, clip=False)
    p = Normal(reverse.mean, (reverse.log_variance / 2).exp().expand_as(x_0))
    nats = kl_divergence(Normal(mean, (log_variance / 2).exp().expand_as(x_0)), p)
    upper = torch.where(x_0 > 0.999, 1.0, p.cdf(x_0 + 1 / 255))
    lower = torch.where(x_0 < -0.999, 0.0, p.cdf(x_0 - 1 / 255))
    nats[0] = -(upper - lower).log()[0]
    near(diffusion.loss_vlb(bent, x_0, t, noise), nats.flatten(1).mean(1) / math.log(2), rtol=1e-7)


def test_the_bounds_terms_have_a_gradient_at_pixels_far_off() -> None:
    """Each x̂_0 is beyond the clip, and the decoder's pixels hundreds of σ from their bins; float32."""
    x_0 = images(2, 1, 4, 4).float()
    scale, noise = torch.full_like(x_0, 500.0, requires_grad=True), torch.randn_like(x_0)
    loss = GaussianDiffusion(100).loss_vlb(lambda x, t: scale * noise, x_0, torch.tensor([0, 30]), noise)
    loss.sum().backward()
    assert scale.grad is not None and bool(loss.isfinite().all())
    assert bool((scale.grad.isfinite() & (scale.grad > 0)).all())


@pytest.mark.parametrize(("size", "bits"), [(0.5, 7.28e-6), (1.0, 2.911e-5)])
def test_prior_term(size: float, bits: float) -> None:
    """L_T for E[x²] = 0.25 and 1, as torch's distributions have it."""
    diffusion, x_0 = GaussianDiffusion(), torch.full((2, 3, 4, 4), size, dtype=F64)
    alpha_bar = float((1 - diffusion.betas).log().sum().exp())
    q = Normal(math.sqrt(alpha_bar) * x_0, math.sqrt(1 - alpha_bar))
    expected = float(kl_divergence(q, Normal(torch.zeros_like(x_0), 1.0)).mean()) / math.log(2)
    assert expected == pytest.approx(bits, rel=1e-3)
    for dtype, rel in ((F64, 1e-6), (torch.float32, 1e-5)):
        assert diffusion.prior_bits(x_0.to(dtype)).tolist() == pytest.approx([expected] * 2, rel=rel)


# the decoder


def log_mass(k: int, mean: float, sigma: float) -> float:
    """Log of what N(mean, σ²) puts on the k-th bin, on the side of the mean where nothing cancels."""
    low = -mpmath.inf if k == 0 else ((2 * k - 256) / 255 - mean) / sigma
    high = mpmath.inf if k == 255 else ((2 * k - 254) / 255 - mean) / sigma
    if low + high > 0:
        low, high = -high, -low
    return float(mpmath.log(mpmath.ncdf(high) - mpmath.ncdf(low)))


@pytest.mark.parametrize("sigma", [1e-4, 0.007, 0.1, 3.0])
@pytest.mark.parametrize("mean", [-7.0, -1.0, 0.0, 1 / 3, 0.9961, 1.2])
def test_decoder_against_the_error_function(mean: float, sigma: float) -> None:
    """In float32 too, and 80,000 σ from the mean: no floor stands in for a likelihood of e^−3,200,000,000."""
    bins = torch.arange(0, 256, 17)
    exact = torch.tensor([log_mass(k, mean, sigma) for k in bins.tolist()], dtype=F64)
    for dtype, rtol in ((F64, 1e-9), (torch.float32, 1e-4)):
        x_0 = bins.to(dtype) / 127.5 - 1
        found = _decoder_log_likelihood(x_0, x_0.new_tensor(mean), x_0.new_tensor(2 * math.log(sigma)))
        near(found, exact, rtol, rtol)


# the whole bound


@VARIANCES
@pytest.mark.parametrize(("dtype", "rtol"), [(F64, 1e-9), (torch.float32, 1e-3)], ids=str)
def test_bits_of_the_known_posterior_of_gaussian_data(
    variance: Variance, dtype: torch.dtype, rtol: float
) -> None:
    """Every term of the bound in closed form.

    With x_0 ~ N(0, s²) the best x̂_0 misses by s²(1−ᾱ)/(ᾱ s²+1−ᾱ) in the mean square, from which the KL follows.
    ±s and ±1 in place of x_0 and ε have the moments that this expectation asks for, without chance.
    """
    s, diffusion = 101 / 255, GaussianDiffusion(100, variance=variance)
    one = torch.ones(1, 1, 8, 8, dtype=dtype)
    one[..., 4:] = -1  # orthogonal to its transpose
    bound = diffusion.bits_per_dim(ideal(diffusion, s), s * one, lambda t: one.mT, clip=False)
    beta, alpha_bar, before = (x.flatten() for x in numbers(diffusion, torch.arange(100)))

    # KL terms
    miss = s**2 * (1 - alpha_bar) / (alpha_bar * s**2 + 1 - alpha_bar)
    share = beta / (1 - alpha_bar)
    small = share * (1 - before)
    sigma_2 = beta if variance == "fixed_large" else small
    bits = (small / sigma_2 - 1 - (small / sigma_2).log() + before * share**2 * miss / sigma_2) / math.log(4)

    # the prior, the decoder for x_0 = s and both signs of ε, and all together
    prior = (alpha_bar[-1] * s**2 - alpha_bar[-1] - (1 - alpha_bar[-1]).log()) / math.log(4)
    x_1 = (1 - beta[0]).sqrt() * s + beta[0].sqrt() * torch.tensor([1.0, -1.0], dtype=F64)
    x_hat = x_1 * (1 - beta[0]).sqrt() * s**2 / ((1 - beta[0]) * s**2 + beta[0])
    p, x_0 = Normal(x_hat, small[1].sqrt()), torch.tensor(s, dtype=F64)
    bits[0] = -(p.cdf(x_0 + 1 / 255) - p.cdf(x_0 - 1 / 255)).log2().mean()
    all_near((part[0] for part in bound), (bits.sum() + prior, bits, prior, miss), rtol / 1000, rtol)
    assert bound.total.dtype == dtype
    near(bound.total[0], bits.sum() + prior, 0, rtol=min(rtol, 1e-5))


def test_bits_have_the_terms_of_the_loss_where_nothing_is_clipped() -> None:
    """One column for each t, its noise the one drawn for that t; clipped, the bound is another one."""
    diffusion, x_0, noise, told = GaussianDiffusion(30), images(3, 1, 4, 4), randn(30, 3, 1, 4, 4), []
    clipped = diffusion.bits_per_dim(bent, x_0, lambda t: noise[t], on_step=told.append)
    assert told == list(range(29, -1, -1))
    alone = [diffusion.bits_per_dim(bent, x_0[b, None], lambda t, b=b: noise[t, b, None]) for b in range(3)]
    all_near(clipped, map(torch.cat, zip(*alone, strict=True)), rtol=1e-12)
    free = diffusion.bits_per_dim(bent, x_0, lambda t: noise[t], clip=False)
    losses = [diffusion.loss_vlb(bent, x_0, torch.full((3,), t), noise[t]) for t in range(30)]
    near(free.terms, torch.stack(losses, 1))
    assert bool((clipped.mse < free.mse).any()) and bool((clipped.total < free.total).all())


def test_rate_and_distortion_by_steps_received() -> None:
    """After one reverse step only x_T has been sent; after all T everything but the decoder's own bits."""
    terms = torch.tensor([[8.0, 4.0, 2.0], [16.0, 0.0, 4.0]])
    mse = torch.tensor([[0.0, 0.04, 0.16], [0.0, 0.12, 0.0]])
    rate, rmse = rate_distortion(Bound(torch.zeros(2), terms, torch.tensor([1.0, 0.0]), mse))
    assert rate.tolist() == pytest.approx([0.5, 3.5, 5.5])
    assert rmse.tolist() == pytest.approx([127.5 * math.sqrt(0.08), 127.5 * math.sqrt(0.08), 0.0])


# precision, and what is refused


def test_tables_are_cast_once_for_each_dtype_and_nothing_is_lost_in_between() -> None:
    diffusion, t, one = GaussianDiffusion(), torch.tensor([998]), torch.ones(1)
    expected, casts = diffusion.alphas_cumprod[[998]].sqrt(), []
    for dtype, precision in ((torch.bfloat16, 1e-6), (torch.float32, 1e-6), (F64, 1e-12)):
        for _ in range(2):
            found = diffusion.q_sample(one.to(dtype), t, torch.zeros(1, dtype=dtype))
            assert found.dtype == torch.promote_types(dtype, torch.float32)
            near(found, expected, 0, rtol=precision)
            casts.append({key: id(value) for key, value in diffusion.casts.items()})
    assert all(first.items() <= last.items() for first, last in pairwise(casts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, F64], ids=str)
def test_a_network_in_another_precision_gives_results_in_that_of_the_image(dtype: torch.dtype) -> None:
    diffusion, x, t = GaussianDiffusion(), torch.randn(2, 1, 4, 4), torch.tensor([500, 500])
    p = diffusion.p_mean_variance(lambda x, t: x.to(dtype), x, t)
    assert p.mean.dtype == p.x_0.dtype == torch.float32
    near(p.mean, diffusion.p_mean_variance(lambda x, t: x.to(dtype).float(), x, t).mean, 1e-6)


X_T = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GaussianDiffusion(schedule="sigmoid"), "schedule.*linear.*cosine.*sigmoid"),
        (lambda: GaussianDiffusion(variance="learned"), "variance.*fixed_large.*fixed_small.*learned"),
        (lambda: GaussianDiffusion(20), "timesteps.*21 with schedule=linear.*20"),
        (lambda: GaussianDiffusion(0), "timesteps.*21.*0"),
        (lambda: GaussianDiffusion(1, "cosine"), "timesteps.*2 with schedule=cosine.*1"),
        (lambda: GaussianDiffusion().q_sample(X_T, TIMES, X_T), r"t .*\(2,\).*\(4,\)"),
        (
            lambda: GaussianDiffusion().p_mean_variance(lambda x, t: torch.cat((x, x), 1), X_T, TIMES[:2]),
            r"\(2, 3, 4, 4\).*\(2, 6, 4, 4\)",
        ),
    ],
)
def test_processes_and_shapes_that_cannot_be_are_refused(call: Callable[[], Any], message: str) -> None:
    with refused(message):
        call()


@pytest.mark.parametrize("smallest", [(21,), (2, "cosine")])
def test_the_smallest_processes_work_and_draw_for_themselves(smallest: tuple[Any, ...]) -> None:
    x_0, bounds = images(2, 1, 2, 2), []
    for draw in (None, lambda t: torch.randn_like(x_0)):
        torch.manual_seed(3)
        bounds.append(GaussianDiffusion(*smallest).bits_per_dim(bent, x_0, draw).terms)
    assert torch.equal(*bounds) and bool(bounds[0].isfinite().all())
