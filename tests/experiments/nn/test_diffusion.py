"""The diffusion process against closed forms in float64, Bayes' rule on a grid, and distributions of torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from experiments.nn.diffusion import (
    Bound,
    GaussianDiffusion,
    Schedule,
    Variance,
    decoder_log_likelihood,
    rate_distortion,
)

F64 = torch.float64
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
VARIANCES: tuple[Variance, ...] = get_args(Variance)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def images(*shape: int) -> Tensor:
    """Pixels at the 256 values 2k/255 − 1, in float64; −1 and 1 among them."""
    levels = torch.randint(0, 256, shape).double()
    levels.view(-1)[:2] = torch.tensor([0.0, 255.0], dtype=F64)
    return levels / 127.5 - 1


def at(t: int, size: int) -> Tensor:
    return torch.full((size,), t)


def running_products(diffusion: GaussianDiffusion) -> list[float]:
    """ᾱ at each index, one multiplication at a time in Python's floats."""
    found, product = [], 1.0
    for beta in diffusion.betas.tolist():
        product *= 1 - beta
        found.append(product)
    return found


def affine(scale: float, shift: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: scale * x + shift * (1 + t.view(-1, 1, 1, 1)) / 7


# schedules


def test_linear_schedule_is_the_papers() -> None:
    """β from 1e-4 to 0.02, and ᾱ_T = 4.0358e-05."""
    diffusion = GaussianDiffusion()
    betas = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    assert diffusion.betas.dtype == diffusion.alphas_cumprod.dtype == F64
    assert torch.allclose(diffusion.betas, torch.tensor(betas, dtype=F64), rtol=1e-12, atol=0)
    assert float(diffusion.alphas_cumprod[-1]) == pytest.approx(4.0358e-05, rel=1e-5)
    assert diffusion.alphas_cumprod.tolist() == pytest.approx(running_products(diffusion), rel=1e-12)


@pytest.mark.parametrize("timesteps", [200, 500, 4000])
def test_linear_schedule_of_another_length_ends_as_noisy(timesteps: int) -> None:
    diffusion = GaussianDiffusion(timesteps)
    assert len(diffusion.betas) == timesteps
    assert 1e-5 < float(diffusion.alphas_cumprod[-1]) < 6e-5


@pytest.mark.parametrize("timesteps", [50, 1000])
def test_cosine_schedule_multiplies_to_its_cosine(timesteps: int) -> None:
    """ᾱ_t = f(t)/f(0) until β is cut to 0.999, at the very end (Nichol & Dhariwal 2021, eq. 17)."""
    diffusion = GaussianDiffusion(timesteps, schedule="cosine")

    def f(t: int) -> float:
        return math.cos((t / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

    wanted = [f(t + 1) / f(0) for t in range(timesteps - 1)]
    assert diffusion.alphas_cumprod[:-1].tolist() == pytest.approx(wanted, rel=1e-9)
    assert float(diffusion.betas[-1]) == 0.999


# the forward process, its posterior, and the step back


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_steps_of_q_composed_are_the_closed_form(schedule: Schedule) -> None:
    """x_t = √(1−β) x_{t−1} + √β ε: mean and variance step by step, against `q_sample` (eqs. 2 and 4)."""
    diffusion = GaussianDiffusion(60, schedule=schedule)
    mean, variance = 1.0, 0.0
    one, zero = torch.ones(1, 1, 1, 1, dtype=F64), torch.zeros(1, 1, 1, 1, dtype=F64)
    for t, beta in enumerate(diffusion.betas.tolist()):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        assert float(diffusion.q_sample(one, at(t, 1), zero)) == pytest.approx(mean, rel=1e-10)
        assert float(diffusion.q_sample(zero, at(t, 1), one)) ** 2 == pytest.approx(variance, rel=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [1, 2, 40, 500, 998])
def test_posterior_is_bayes_rule_on_a_grid(schedule: Schedule, t: int) -> None:
    """q(x_{t−1} | x_t, x_0) ∝ q(x_t | x_{t−1}) q(x_{t−1} | x_0), each a table of values (eqs. 6 and 7)."""
    diffusion = GaussianDiffusion(1000, schedule=schedule)
    x_0, x_t = 0.6, -0.3
    beta, before = float(diffusion.betas[t]), running_products(diffusion)[t - 1]
    grid = torch.linspace(-9, 9, 2_000_001, dtype=F64)
    log_density = -((x_t - math.sqrt(1 - beta) * grid) ** 2) / (2 * beta)
    log_density -= (grid - math.sqrt(before) * x_0) ** 2 / (2 * (1 - before))
    weights = log_density.softmax(0)
    wanted_mean = float((weights * grid).sum())
    wanted_variance = float((weights * (grid - wanted_mean) ** 2).sum())

    def image(value: float) -> Tensor:
        return torch.full((1, 1, 1, 1), value, dtype=F64)

    mean, variance, log_variance = diffusion.q_posterior(image(x_0), image(x_t), at(t, 1))
    assert float(mean) == pytest.approx(wanted_mean, rel=1e-7, abs=1e-9)
    assert float(variance) == pytest.approx(wanted_variance, rel=1e-6)
    assert float(log_variance) == pytest.approx(math.log(wanted_variance), rel=1e-6)


def test_the_first_posterior_is_a_point_at_x_0() -> None:
    """β̃ is zero there; the log-variance is that of the next index, β_1 β_0 / (1 − ᾱ_1)."""
    diffusion, x_0 = GaussianDiffusion(), images(2, 3, 4, 4)
    mean, variance, log_variance = diffusion.q_posterior(x_0, torch.randn(2, 3, 4, 4, dtype=F64), at(0, 2))
    assert torch.allclose(mean, x_0, atol=1e-12) and not variance.any()
    b_0, b_1 = diffusion.betas[:2].tolist()
    wanted = math.log(b_0 * b_1 / (1 - (1 - b_0) * (1 - b_1)))
    assert log_variance.flatten().tolist() == pytest.approx([wanted] * 2, rel=1e-10)


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_x_0_is_predicted_back(t: int) -> None:
    """Eq. 15 undoes eq. 4 where ε is known."""
    diffusion, x_0, noise = GaussianDiffusion(), images(2, 3, 4, 4), torch.randn(2, 3, 4, 4, dtype=F64)
    x_t = diffusion.q_sample(x_0, at(t, 2), noise)
    assert torch.allclose(diffusion.predict_x_0(x_t, at(t, 2), noise), x_0, atol=1e-12)


def test_mean_without_the_clip_is_equation_11() -> None:
    diffusion, x_t = GaussianDiffusion(), torch.randn(4, 3, 4, 4, dtype=F64)
    t, model = torch.tensor([0, 1, 500, 999]), affine(0.3, 0.1)
    beta, alpha_bar = (
        torch.tensor(values, dtype=F64)[t].view(4, 1, 1, 1)
        for values in (diffusion.betas.tolist(), running_products(diffusion))
    )
    wanted = (x_t - beta / (1 - alpha_bar).sqrt() * model(x_t, t)) / (1 - beta).sqrt()
    assert torch.allclose(diffusion.p_mean_variance(model, x_t, t, clip=False).mean, wanted, atol=1e-10)


def test_x_0_is_clipped_before_the_mean() -> None:
    """A model that points far outside: the mean is the posterior's at an x_0 of ±1, not itself clipped."""
    diffusion = GaussianDiffusion()
    x_t, t = 3 * torch.randn(2, 1, 4, 4, dtype=F64), at(700, 2)
    p = diffusion.p_mean_variance(lambda x, t: -50 * x, x_t, t)
    assert torch.equal(p.x_0, x_t.sign())
    beta, alpha_bar = float(diffusion.betas[700]), running_products(diffusion)
    wanted = math.sqrt(alpha_bar[699]) * beta * x_t.sign()
    wanted = (wanted + math.sqrt(1 - beta) * (1 - alpha_bar[699]) * x_t) / (1 - alpha_bar[700])
    assert torch.allclose(p.mean, wanted, atol=1e-12) and float(p.mean.abs().max()) > 1


@pytest.mark.parametrize("variance", VARIANCES)
def test_variance_of_the_reverse_process(variance: Variance) -> None:
    """β_t or β̃_t (§3.2); at the first index both take β̃ of the second."""
    diffusion = GaussianDiffusion(variance=variance)
    t = torch.tensor([0, 1, 2, 500, 999])
    p = diffusion.p_mean_variance(lambda x, t: x, torch.randn(5, 1, 2, 2, dtype=F64), t)
    beta, alpha_bar = diffusion.betas.tolist(), running_products(diffusion)
    small = [beta[i] * (1 - alpha_bar[i - 1]) / (1 - alpha_bar[i]) for i in (1, 1, 2, 500, 999)]
    large = [small[0], *(beta[i] for i in (1, 2, 500, 999))]
    wanted = large if variance == "fixed_large" else small
    assert p.variance.flatten().tolist() == pytest.approx(wanted, rel=1e-9)
    assert p.log_variance.flatten().tolist() == pytest.approx([math.log(w) for w in wanted], rel=1e-9)


# losses


def test_simple_loss_of_a_network_that_says_zero_is_the_noise() -> None:
    """Eq. 14, for each image on its own."""
    diffusion, x_0, noise = GaussianDiffusion(), images(3, 3, 8, 8), torch.randn(3, 3, 8, 8, dtype=F64)
    loss = diffusion.loss_simple(lambda x, t: torch.zeros_like(x), x_0, torch.tensor([0, 400, 999]), noise)
    assert loss.tolist() == pytest.approx([float((image**2).mean()) for image in noise], rel=1e-12)


def test_simple_loss_shows_the_model_x_t_and_t() -> None:
    """With ε_θ = x_t it is ‖ε − x_t‖²."""
    diffusion, x_0, noise = GaussianDiffusion(), images(3, 1, 4, 4), torch.randn(3, 1, 4, 4, dtype=F64)
    t, alpha_bar = torch.tensor([2, 400, 999]), running_products(diffusion)
    seen: list[Tensor] = []
    loss = diffusion.loss_simple(lambda x, t: seen.append(t) or x, x_0, t, noise)  # type: ignore[func-returns-value]
    for b, index in enumerate(t.tolist()):
        x_t = math.sqrt(alpha_bar[index]) * x_0[b] + math.sqrt(1 - alpha_bar[index]) * noise[b]
        assert float(loss[b]) == pytest.approx(float(((noise[b] - x_t) ** 2).mean()), rel=1e-10)
    assert torch.equal(seen[0], t)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variance", VARIANCES)
def test_terms_of_the_bound_against_torchs_distributions(schedule: Schedule, variance: Variance) -> None:
    """Eq. 5: KL of two normal distributions, and the mass that a third puts on a bin."""
    diffusion = GaussianDiffusion(100, schedule, variance)
    t = torch.tensor([0, 1, 2, 50, 98, 99])
    x_0, noise, model = images(6, 1, 4, 4), torch.randn(6, 1, 4, 4, dtype=F64), affine(0.9, 0.01)
    x_t = diffusion.q_sample(x_0, t, noise)
    mean, _, log_variance = diffusion.q_posterior(x_0, x_t, t)
    reverse = diffusion.p_mean_variance(model, x_t, t, clip=False)
    p = Normal(reverse.mean, (reverse.log_variance / 2).exp().expand_as(x_0))
    nats = kl_divergence(Normal(mean, (log_variance / 2).exp().expand_as(x_0)), p)
    upper = torch.where(x_0 > 0.999, 1.0, p.cdf(x_0 + 1 / 255))
    lower = torch.where(x_0 < -0.999, 0.0, p.cdf(x_0 - 1 / 255))
    nats[0] = -(upper - lower).log()[0]
    wanted = nats.flatten(1).mean(1) / math.log(2)
    assert torch.allclose(diffusion.loss_vlb(model, x_0, t, noise), wanted, rtol=1e-7)


def test_the_bounds_terms_have_a_gradient_at_pixels_far_off() -> None:
    """Each x̂_0 is beyond the clip, and the decoder's pixels hundreds of σ from their bins; float32."""
    diffusion, x_0 = GaussianDiffusion(100), images(2, 1, 4, 4).float()
    scale = torch.full_like(x_0, 500.0, requires_grad=True)
    noise = torch.randn_like(x_0)
    loss = diffusion.loss_vlb(lambda x, t: scale * noise, x_0, torch.tensor([0, 30]), noise)
    loss.sum().backward()
    assert scale.grad is not None and bool(loss.isfinite().all())
    assert bool((scale.grad.isfinite() & (scale.grad > 0)).all())


@pytest.mark.parametrize("size", [0.5, 1.0])
def test_prior_term(size: float) -> None:
    """L_T: 7.28e-6 bits for E[x²] = 0.25 and 2.91e-5 for 1, and what torch's distributions say."""
    diffusion, x_0 = GaussianDiffusion(), torch.full((2, 3, 4, 4), size, dtype=F64)
    alpha_bar = running_products(diffusion)[-1]
    q = Normal(math.sqrt(alpha_bar) * x_0, math.sqrt(1 - alpha_bar))
    wanted = kl_divergence(q, Normal(torch.zeros_like(x_0), torch.ones_like(x_0))).mean() / math.log(2)
    assert diffusion.prior_bits(x_0).tolist() == pytest.approx([float(wanted)] * 2, rel=1e-6)
    assert float(wanted) == pytest.approx({0.5: 7.28e-6, 1.0: 2.911e-5}[size], rel=1e-3)
    in_float32 = diffusion.prior_bits(x_0.float())
    assert in_float32.tolist() == pytest.approx([float(wanted)] * 2, rel=1e-5)


# the decoder

LEVELS = torch.arange(256, dtype=F64) / 127.5 - 1


@pytest.mark.parametrize("sigma", [1e-4, 0.007, 0.1, 3.0])
@pytest.mark.parametrize("mean", [-7.0, -1.0, -0.3, 0.0, 0.9961, 1.2])
def test_bins_of_the_decoder_sum_to_one(sigma: float, mean: float) -> None:
    log_variance = torch.tensor(2 * math.log(sigma), dtype=F64)
    log_p = decoder_log_likelihood(LEVELS, torch.full_like(LEVELS, mean), log_variance)
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-12)


def test_decoder_against_the_error_function() -> None:
    """∫ over each bin by Python's erfc, from the side of the mean that the bin is on: nothing cancels there."""
    sigma, mean = 0.05, 0.93
    found = decoder_log_likelihood(LEVELS, torch.tensor(mean, dtype=F64), torch.tensor(2 * math.log(sigma)))

    def beyond(distance: float) -> float:
        return math.erfc(distance / sigma / math.sqrt(2)) / 2

    for k in (60, 128, 200, 246, 254):  # down to 28 σ
        distance = abs(k / 127.5 - 1 - mean)
        mass = beyond(distance - 1 / 255) - beyond(distance + 1 / 255)
        assert float(found[k]) == pytest.approx(math.log(mass), rel=1e-6)
    assert float(found[0]) < -700  # 38 σ away, where erfc is zero
    mirrored = decoder_log_likelihood(
        LEVELS, torch.tensor(-mean, dtype=F64), torch.tensor(2 * math.log(sigma))
    )
    assert torch.allclose(mirrored.flip(0), found, rtol=1e-9)
    assert float(found[255]) == pytest.approx(math.log(beyond(1 - 1 / 255 - mean)), rel=1e-6)


def test_decoder_far_out_in_float32_is_as_in_float64() -> None:
    """1,000 σ from the mean the likelihood is e^−500,000; no floor stands in for it."""
    x_0, mean = images(1, 1, 3, 3), torch.full((1, 1, 3, 3), 0.01, dtype=F64)
    exact = decoder_log_likelihood(x_0, mean, torch.tensor(2 * math.log(1e-3), dtype=F64))
    found = decoder_log_likelihood(x_0.float(), mean.float(), torch.tensor(2 * math.log(1e-3)))
    assert float(exact.min()) < -400_000
    assert torch.allclose(found.double(), exact, rtol=1e-4)


# the whole bound


def signs(size: int) -> tuple[Tensor, Tensor]:
    """Two orthogonal images of ±1, (1, 1, size, size): moments of first and second order are exact."""
    one = torch.ones(size, size, dtype=F64)
    one[:, size // 2 :] = -1
    return one[None, None], one.t()[None, None].contiguous()


def ideal(diffusion: GaussianDiffusion, s: float) -> Callable[[Tensor, Tensor], Tensor]:
    """E[ε | x_t] where x_0 ~ N(0, s²): √(1−ᾱ) x_t / (ᾱ s² + 1 − ᾱ)."""
    alpha_bar = torch.tensor(running_products(diffusion), dtype=F64)

    def model(x: Tensor, t: Tensor) -> Tensor:
        a = alpha_bar.to(x.dtype)[t].view(-1, 1, 1, 1)
        return (1 - a).sqrt() * x / (a * s**2 + 1 - a)

    return model


@pytest.mark.parametrize("variance", VARIANCES)
def test_bits_of_the_known_posterior_of_gaussian_data(variance: Variance) -> None:
    """Every term of the bound in closed form.

    With x_0 ~ N(0, s²) the best x̂_0 misses by s²(1−ᾱ)/(ᾱ s²+1−ᾱ) in the mean square, from which the KL follows.
    ±s and ±1 in place of x_0 and ε have the moments that this expectation asks for, without chance.
    """
    s = 101 / 255
    diffusion = GaussianDiffusion(100, variance=variance)
    one, other = signs(8)
    bound = diffusion.bits_per_dim(ideal(diffusion, s), s * one, lambda t: other, clip=False)
    beta, alpha_bar = diffusion.betas.tolist(), running_products(diffusion)
    wanted = []
    for t in range(1, 100):
        miss = s**2 * (1 - alpha_bar[t]) / (alpha_bar[t] * s**2 + 1 - alpha_bar[t])
        share = beta[t] / (1 - alpha_bar[t])
        small = share * (1 - alpha_bar[t - 1])
        sigma_2 = beta[t] if variance == "fixed_large" else small
        nats = (small / sigma_2 - 1 - math.log(small / sigma_2)) / 2
        nats += alpha_bar[t - 1] * share**2 * miss / (2 * sigma_2)
        wanted.append(nats / math.log(2))
        assert float(bound.mse[0, t]) == pytest.approx(miss, rel=1e-9)
    assert bound.terms[0, 1:].tolist() == pytest.approx(wanted, rel=1e-9)
    prior = (alpha_bar[-1] * s**2 - alpha_bar[-1] - math.log(1 - alpha_bar[-1])) / (2 * math.log(2))
    assert float(bound.prior) == pytest.approx(prior, rel=1e-9)

    def mass(centre: float, sigma: float) -> float:
        return math.erf((centre + 1 / 255) / sigma / math.sqrt(2)) / 2 - (
            math.erf((centre - 1 / 255) / sigma / math.sqrt(2)) / 2
        )

    sigma = math.sqrt(beta[1] * beta[0] / (1 - alpha_bar[1]))
    decoder = []
    for x_0, noise in ((s, 1), (s, -1)):  # and their mirror images
        x_1 = math.sqrt(1 - beta[0]) * x_0 + math.sqrt(beta[0]) * noise
        x_hat = x_1 * math.sqrt(1 - beta[0]) * s**2 / ((1 - beta[0]) * s**2 + beta[0])
        decoder.append(-math.log2(mass(x_0 - x_hat, sigma)))
    assert float(bound.terms[0, 0]) == pytest.approx(sum(decoder) / 2, rel=1e-9)
    assert float(bound.total) == pytest.approx(float(bound.terms.sum() + bound.prior), rel=1e-12)


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_bound_of_gaussian_data_is_its_entropy_and_what_the_variances_cost(variance: Variance) -> None:
    """By the chain rule: what any code needs, and the KL of each true reverse step from the one with σ_t².

    The true step's variance is β̃_t and, by the law of total variance, what x̂_0 misses times the squared
    coefficient of x_0; its mean is p's. The last step is to bins instead, integrated here. The entropy is
    ½ log₂ 2πe s², and 127.5 levels to the unit.
    """
    s, diffusion = 0.2, GaussianDiffusion(variance=variance)
    x_0 = ((torch.randn(1, 1, 128, 64, dtype=F64) * s + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
    s = float(x_0.square().mean().sqrt())  # the sample's own, so that chance is out of the comparison
    beta, alpha_bar = diffusion.betas.tolist(), running_products(diffusion)
    wanted = math.log2(s)  # the logarithms of 2πe and of the levels are in every step's own entropy
    for t in range(1, 1000):
        miss = s**2 * (1 - alpha_bar[t]) / (alpha_bar[t] * s**2 + 1 - alpha_bar[t])
        share = beta[t] / (1 - alpha_bar[t])
        small = share * (1 - alpha_bar[t - 1])
        true = small + alpha_bar[t - 1] * share**2 * miss
        ours = beta[t] if variance == "fixed_large" else small
        wanted += (true / ours - 1 - math.log(true / ours)) / (2 * math.log(2))
    last = math.sqrt(s**2 * beta[0] / ((1 - beta[0]) * s**2 + beta[0]))  # of x_0 given x_1
    p = Normal(0.0, math.sqrt(beta[1] * beta[0] / (1 - alpha_bar[1])))
    c = torch.linspace(-5 * last, 0, 10_001, dtype=F64)  # and the same again on the right
    bits = -(p.cdf(c + 1 / 255) - p.cdf(c - 1 / 255)).log2()
    wanted += float((Normal(0.0, last).log_prob(c).softmax(0) * bits).sum()) - math.log2(last)

    def draw(t: int) -> Tensor:
        """Noise whose second moments are what they are on average: 1, and 0 with x_0."""
        noise = torch.randn_like(x_0)
        noise -= (noise * x_0).mean() / x_0.square().mean() * x_0
        return noise / noise.square().mean().sqrt()

    bound = diffusion.bits_per_dim(ideal(diffusion, s), x_0, draw, clip=False)
    assert float(bound.total.mean()) == pytest.approx(wanted, abs=1e-3)


def test_bits_do_not_depend_on_who_else_is_in_the_batch() -> None:
    diffusion, x_0, noise = GaussianDiffusion(30), images(3, 1, 4, 4), torch.randn(30, 3, 1, 4, 4, dtype=F64)
    model, asked = affine(0.5, 0.1), []
    together = diffusion.bits_per_dim(model, x_0, lambda t: noise[t], on_step=asked.append)
    alone = [
        diffusion.bits_per_dim(model, x_0[b : b + 1], lambda t, b=b: noise[t, b : b + 1]) for b in range(3)
    ]  # type: ignore[misc]
    for name in Bound._fields:
        parts = torch.cat([getattr(bound, name) for bound in alone])
        assert torch.allclose(getattr(together, name), parts, rtol=1e-12)
    assert asked == list(range(29, -1, -1))


def test_bits_have_the_terms_of_the_loss_where_nothing_is_clipped() -> None:
    """One column for each t, its noise the one drawn for that t; clipped, the bound is another one."""
    diffusion, x_0, noise = GaussianDiffusion(30), images(2, 1, 4, 4), torch.randn(30, 2, 1, 4, 4, dtype=F64)
    model = affine(0.5, 0.1)
    bound = diffusion.bits_per_dim(model, x_0, lambda t: noise[t], clip=False)
    for t in range(30):
        assert torch.allclose(bound.terms[:, t], diffusion.loss_vlb(model, x_0, at(t, 2), noise[t]))
    clipped = diffusion.bits_per_dim(model, x_0, lambda t: noise[t])
    assert bool((clipped.mse < bound.mse).any()) and bool((clipped.total < bound.total).all())


def test_bits_in_float32_are_those_in_float64() -> None:
    diffusion, x_0, noise = (
        GaussianDiffusion(200),
        images(2, 3, 8, 8),
        torch.randn(200, 2, 3, 8, 8, dtype=F64),
    )
    model = ideal(diffusion, 0.6)
    exact = diffusion.bits_per_dim(model, x_0, lambda t: noise[t])
    found = diffusion.bits_per_dim(model, x_0.float(), lambda t: noise[t].float())
    assert found.total.dtype == torch.float32
    assert torch.allclose(found.terms.double(), exact.terms, rtol=1e-3, atol=1e-6)
    assert torch.allclose(found.total.double(), exact.total, rtol=1e-5)


def test_rate_and_distortion_by_steps_received() -> None:
    """After one reverse step only x_T has been sent; after all T everything but the decoder's own bits."""
    terms = torch.tensor([[8.0, 4.0, 2.0], [16.0, 0.0, 4.0]])
    mse = torch.tensor([[0.0, 0.04, 0.16], [0.0, 0.12, 0.0]])
    bound = Bound(torch.zeros(2), terms, torch.tensor([1.0, 0.0]), mse)
    rate, rmse = rate_distortion(bound)
    assert rate.tolist() == pytest.approx([0.5, 3.5, 5.5])
    assert rmse.tolist() == pytest.approx([127.5 * math.sqrt(0.08), 127.5 * math.sqrt(0.08), 0.0])


# precision, and what is refused


def test_tables_are_cast_once_for_each_dtype_and_nothing_is_lost_in_between() -> None:
    diffusion, t = GaussianDiffusion(), at(998, 1)
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    rough = diffusion.q_sample(one.bfloat16(), t, zero.bfloat16())
    fine = diffusion.q_sample(one.double(), t, zero.double())
    assert rough.dtype == torch.float32 and fine.dtype == F64
    assert float(fine) == pytest.approx(math.sqrt(running_products(diffusion)[998]), rel=1e-12)
    casts = dict(diffusion.casts)
    diffusion.q_sample(one, t, zero)
    diffusion.q_sample(one.double(), t, zero.double())
    assert all(diffusion.casts[key] is value for key, value in casts.items())


def test_a_network_in_half_precision_gives_results_in_that_of_the_image() -> None:
    diffusion, x = GaussianDiffusion(), torch.randn(2, 1, 4, 4)
    p = diffusion.p_mean_variance(lambda x, t: x.bfloat16(), x, at(500, 2))
    assert p.mean.dtype == p.x_0.dtype == torch.float32
    assert torch.allclose(
        p.mean, diffusion.p_mean_variance(lambda x, t: x.bfloat16().float(), x, at(500, 2)).mean
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "sigmoid"}, "schedule must be linear or cosine, not sigmoid"),
        ({"variance": "learned"}, "variance must be fixed_large or fixed_small, not learned"),
        ({"timesteps": 20}, "timesteps must be at least 21 for the linear schedule, not 20"),
        ({"timesteps": 0}, "timesteps must be at least 21 for the linear schedule, not 0"),
        (
            {"timesteps": 1, "schedule": "cosine"},
            "timesteps must be at least 2 for the cosine schedule, not 1",
        ),
    ],
    ids=str,
)
def test_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        GaussianDiffusion(**arguments)


def test_shapes_that_clash_are_both_named() -> None:
    diffusion, x = GaussianDiffusion(), torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"t must have one entry per image, \(2,\), not \(3,\)"):
        diffusion.q_sample(x, torch.tensor([1, 2, 3]), x)
    with pytest.raises(ValueError, match=r"shaped like x_t, \(2, 3, 4, 4\), not \(2, 6, 4, 4\)"):
        diffusion.p_mean_variance(lambda x, t: torch.cat((x, x), 1), x, torch.tensor([1, 2]))


def test_the_smallest_processes_work() -> None:
    for diffusion in (GaussianDiffusion(21), GaussianDiffusion(2, schedule="cosine")):
        x_0 = images(1, 1, 2, 2)
        bound = diffusion.bits_per_dim(affine(0.5, 0), x_0, lambda t, x=x_0: torch.randn_like(x))  # type: ignore[misc]
        assert bool(bound.total.isfinite())


def test_bits_per_dim_draws_for_itself_where_no_noise_is_given() -> None:
    process, x_0 = GaussianDiffusion(30), torch.zeros(2, 1, 4, 4) + 1 / 255
    torch.manual_seed(3)
    alone = process.bits_per_dim(lambda x, t: 0.9 * x, x_0)
    torch.manual_seed(3)
    given = process.bits_per_dim(lambda x, t: 0.9 * x, x_0, lambda t: torch.randn_like(x_0))
    assert torch.equal(alone.terms, given.terms) and alone.terms.isfinite().all()
