"""Deliberately broken copies of process, samplers and network, each caught by a proof that the true one passes.

A mutant is a module's source with one text replaced, which must stand in it exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from experiments.nn import diffusion, samplers, unet
from experiments.nn.dropout import Dropout

pytestmark = pytest.mark.slow
F64 = torch.float64
Proof = Callable[[ModuleType], None]
SOURCES = {
    module.__name__.rpartition(".")[2]: Path(str(module.__file__)).read_text(encoding="utf-8")
    for module in (diffusion, samplers, unet)
}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-9) -> bool:
    return found.shape == wanted.shape and bool(
        ((found - wanted).abs() <= tolerance * (1 + wanted.abs())).all()
    )


def bent(x: Tensor, t: Tensor) -> Tensor:
    """A model that is neither linear nor blind to t, and whose x̂_0 leaves [−1, 1] here and there."""
    return torch.tanh(x + t.view(-1, 1, 1, 1) / 30 - 1) * 0.8 + 0.3 * x


def images() -> Tensor:
    x_0 = torch.randint(0, 256, (4, 1, 4, 4)).double()
    x_0[0, 0, 0, 0], x_0[0, 0, 0, 1] = 0, 255
    return x_0 / 127.5 - 1


def products(betas: Tensor) -> list[float]:
    """ᾱ at each index, and 1 at −1."""
    found, product = [], 1.0
    for beta in betas.tolist():
        product *= 1 - beta
        found.append(product)
    return [*found, 1.0]


def chosen(values: list[float], t: Tensor) -> Tensor:
    return torch.tensor(values, dtype=F64)[t].view(-1, 1, 1, 1)


TIMES = torch.tensor([0, 1, 30, 59])


# the process


def proof_diffusion_schedules(module: ModuleType) -> None:
    """β from 1e-4 to 0.02 at T = 1000, ᾱ_T = 4.0358e-05; the cosine's ᾱ."""
    linear, cosine = module.GaussianDiffusion(), module.GaussianDiffusion(60, schedule="cosine")
    assert close(
        linear.betas[[0, 500, 999]], torch.tensor([1e-4, 1e-4 + 0.0199 * 500 / 999, 0.02], dtype=F64)
    )
    assert abs(float(linear.alphas_cumprod[-1]) - 4.0358e-05) < 1e-9
    assert 1e-5 < float(module.GaussianDiffusion(100).alphas_cumprod[-1]) < 6e-5
    f = [math.cos((t / 60 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(60)]
    assert close(cosine.alphas_cumprod[:-1], torch.tensor(f[1:], dtype=F64) / f[0])
    assert float(cosine.betas.max()) == 0.999


def proof_diffusion_forward(module: ModuleType) -> None:
    """Eqs. 4 and 15."""
    process, x_0, noise = module.GaussianDiffusion(60), images(), torch.randn(4, 1, 4, 4, dtype=F64)
    a = chosen(products(process.betas), TIMES)
    x_t = a.sqrt() * x_0 + (1 - a).sqrt() * noise
    assert close(process.q_sample(x_0, TIMES, noise), x_t)
    assert close(process.predict_x_0(x_t, TIMES, noise), x_0)


def proof_diffusion_posterior(module: ModuleType) -> None:
    """Eqs. 6 and 7 as the product of two normal densities: precisions add."""
    process, x_0, x_t = module.GaussianDiffusion(60), images(), torch.randn(4, 1, 4, 4, dtype=F64)
    t = TIMES.clamp(min=1)
    beta, before = chosen(process.betas.tolist(), t), chosen(products(process.betas), t - 1)
    variance = 1 / ((1 - beta) / beta + 1 / (1 - before))
    mean = variance * ((1 - beta).sqrt() / beta * x_t + before.sqrt() / (1 - before) * x_0)
    found = process.q_posterior(x_0, x_t, t)
    assert close(found[0], mean) and close(found[1], variance) and close(found[2], variance.log())
    first = process.q_posterior(x_0, x_t, torch.zeros_like(t))
    assert (
        close(first[0], x_0) and not first[1].any() and close(first[2], variance[:1].log().expand(4, 1, 1, 1))
    )


def proof_diffusion_reverse(module: ModuleType) -> None:
    """The posterior's mean at x̂_0, clipped before; σ² = β_t or β̃_t, at the first index β̃_1."""
    x_t = 2 * torch.randn(4, 1, 4, 4, dtype=F64)
    for variance in ("fixed_large", "fixed_small"):
        process = module.GaussianDiffusion(60, variance=variance)
        beta, alpha_bar = process.betas.tolist(), products(process.betas)
        a = chosen(alpha_bar, TIMES)
        for clip in (True, False):
            p = process.p_mean_variance(bent, x_t, TIMES, clip=clip)
            x_0 = (x_t - (1 - a).sqrt() * bent(x_t, TIMES)) / a.sqrt()
            x_0 = x_0.clamp(-1, 1) if clip else x_0
            assert close(p.x_0, x_0) and close(p.mean, process.q_posterior(x_0, x_t, TIMES)[0])
        small = [beta[t] * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) for t in (1, 1, 30, 59)]
        sigma_2 = [small[0], *(beta[t] for t in (1, 30, 59))] if variance == "fixed_large" else small
        wanted = torch.tensor(sigma_2, dtype=F64).view(4, 1, 1, 1)
        assert close(p.variance, wanted) and close(p.log_variance, wanted.log())


def proof_diffusion_losses(module: ModuleType) -> None:
    """Eq. 14 for each image; the terms of eq. 5 by torch's distributions; the whole bound; the prior."""
    x_0, noise, t = images(), torch.randn(4, 1, 4, 4, dtype=F64), TIMES
    for variance in ("fixed_large", "fixed_small"):
        process = module.GaussianDiffusion(60, variance=variance)
        x_t = process.q_sample(x_0, t, noise)
        assert close(
            process.loss_simple(bent, x_0, t, noise), (noise - bent(x_t, t)).square().mean((1, 2, 3))
        )
        mean, _, log_variance = process.q_posterior(x_0, x_t, t)
        reverse = process.p_mean_variance(bent, x_t, t, clip=False)
        p = Normal(reverse.mean, (reverse.log_variance / 2).exp().expand_as(x_0))
        nats = kl_divergence(Normal(mean, (log_variance / 2).exp().expand_as(x_0)), p)
        upper = torch.where(x_0 > 0.999, 1.0, p.cdf(x_0 + 1 / 255))
        lower = torch.where(x_0 < -0.999, 0.0, p.cdf(x_0 - 1 / 255))
        nats[0] = -(upper - lower).log()[0]
        assert close(process.loss_vlb(bent, x_0, t, noise), nats.mean((1, 2, 3)) / math.log(2), 1e-6)
        bound = process.bits_per_dim(bent, x_0, lambda t: noise, clip=False)
        for column in (0, 1, 59):
            now = torch.full((4,), column)
            assert close(bound.terms[:, column], process.loss_vlb(bent, x_0, now, noise))
            wanted = process.predict_x_0(
                process.q_sample(x_0, now, noise), now, bent(process.q_sample(x_0, now, noise), now)
            )
            assert close(bound.mse[:, column], (wanted - x_0).square().mean((1, 2, 3)))
        assert close(bound.total, bound.terms.sum(1) + bound.prior)
        clipped = process.bits_per_dim(bent, x_0, lambda t: noise)
        assert bool((clipped.mse < bound.mse).any())
        a = products(process.betas)[59]
        prior = kl_divergence(Normal(math.sqrt(a) * x_0, math.sqrt(1 - a)), Normal(0 * x_0, 1 + 0 * x_0))
        assert close(bound.prior, prior.mean((1, 2, 3)) / math.log(2), 1e-8)


def proof_diffusion_decoder(module: ModuleType) -> None:
    """256 bins that sum to one, the outer two reaching to infinity; finite far out in float32."""
    levels = torch.arange(256, dtype=F64) / 127.5 - 1
    for mean in (-1.3, -0.2, 0.0, 0.99):
        for sigma in (0.007, 0.3):
            p = Normal(torch.tensor(mean, dtype=F64), sigma)
            log_p = module.decoder_log_likelihood(
                levels, p.mean, torch.tensor(2 * math.log(sigma), dtype=F64)
            )
            assert abs(float(log_p.exp().sum()) - 1) < 1e-10
            assert close(log_p[-1:].exp(), 1 - p.cdf(torch.tensor([254 / 255], dtype=F64)), 1e-10)
            assert close(log_p[:1].exp(), p.cdf(torch.tensor([-254 / 255], dtype=F64)), 1e-10)
            middle = p.cdf(levels[100] + 1 / 255) - p.cdf(levels[100] - 1 / 255)
            assert close(log_p[100].exp(), middle, 1e-10)
    far = module.decoder_log_likelihood(levels.float(), torch.tensor(0.01), torch.tensor(2 * math.log(1e-3)))
    assert bool(far.isfinite().all()) and float(far.min()) < -400_000


def proof_diffusion_precision(module: ModuleType) -> None:
    """Half-precision images meet float32 tables, float64 ones float64 tables, whoever came first."""
    process, t = module.GaussianDiffusion(60), torch.tensor([59])
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    wanted = math.sqrt(products(process.betas)[59])
    for dtype, tolerance in ((torch.bfloat16, 1e-6), (torch.float32, 1e-6), (F64, 1e-14)):
        assert abs(float(process.q_sample(one.to(dtype), t, zero.to(dtype))) - wanted) < tolerance
    for dtype in (torch.bfloat16, F64):
        found = process.p_mean_variance(lambda x, t, dtype=dtype: x.to(dtype), one, t)
        assert found.mean.dtype == torch.float32


def proof_diffusion_rate(module: ModuleType) -> None:
    """Table 4: what was sent before a step, and the error seen from it, from the noisiest on."""
    terms, mse = torch.tensor([[8.0, 4.0, 2.0]]), torch.tensor([[0.0, 0.04, 0.16]])
    rate, rmse = module.rate_distortion(module.Bound(torch.zeros(1), terms, torch.tensor([1.0]), mse))
    assert close(rate, torch.tensor([1.0, 3.0, 7.0], dtype=F64))
    assert close(rmse, torch.tensor([51.0, 25.5, 0.0], dtype=F64), 1e-6)


# samplers


def proof_samplers_ancestral(module: ModuleType) -> None:
    """Algorithm 2, all steps, both variances; clipped unless told otherwise."""
    noise, z = torch.randn(2, 1, 4, 4, dtype=F64), torch.randn(60, 2, 1, 4, 4, dtype=F64)
    for variance in ("fixed_large", "fixed_small"):
        process, x = diffusion.GaussianDiffusion(60, variance=variance), noise
        for step, t in enumerate(range(59, -1, -1)):
            x = process.p_mean_variance(bent, x, torch.full((2,), t)).mean
            if t > 0:
                beta, alpha_bar = float(process.betas[t]), products(process.betas)
                small = beta * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
                x = x + math.sqrt(beta if variance == "fixed_large" else small) * z[step]
        assert close(module.sample(process, bent, noise, draw=lambda step: z[step]), x, 1e-8)


def proof_samplers_ddim(module: ModuleType) -> None:
    """Eqs. 12 and 16 on quadratic indices with the network's own ε; with η = 1 and a clip, ancestral sampling."""
    process, noise = (
        diffusion.GaussianDiffusion(60, variance="fixed_small"),
        torch.randn(2, 1, 4, 4, dtype=F64),
    )
    z, alpha_bar = torch.randn(60, 2, 1, 4, 4, dtype=F64), products(process.betas)
    for eta in (0.0, 0.4):
        x = noise
        for step, (t, s) in enumerate(pairwise([48, 27, 12, 3, 0, -1])):  # 48 (i/4)²
            a, before = alpha_bar[t], alpha_bar[s]
            eps = bent(x, torch.full((2,), t))
            sigma = eta * math.sqrt((1 - before) / (1 - a) * (1 - a / before))
            x_0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
            x = math.sqrt(before) * x_0 + math.sqrt(1 - before - sigma**2) * eps + sigma * z[step]
        found = module.sample(process, bent, noise, 5, "ddim", lambda step: z[step], eta=eta)
        assert close(found, x, 1e-8)
    ancestral = samplers.sample(process, bent, noise, draw=lambda step: z[step])
    found = module.sample(process, bent, noise, None, "ddim", lambda step: z[step], eta=1.0, clip=True)
    assert close(found, ancestral, 1e-6)


def proof_samplers_multistep(module: ModuleType) -> None:
    """Second order towards the exact flow of N(0.3, 0.25²)."""
    process, m, s = diffusion.GaussianDiffusion(20_000), 0.3, 0.25
    x = torch.randn(1, 1, 4, 4, dtype=F64)
    a = float(process.alphas_cumprod[-1])
    wanted = m + s * (x - math.sqrt(a) * m) / math.sqrt(a * s**2 + 1 - a)

    def ideal(x: Tensor, t: Tensor) -> Tensor:
        a = process.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * m) / (a * s**2 + 1 - a)

    errors = [float((module.sample(process, ideal, x, n, "dpm++") - wanted).norm()) for n in (20, 40, 80)]
    assert all(3.2 < coarse / fine < 4.8 for coarse, fine in pairwise(errors))
    assert errors[-1] < 0.01
    process, x = diffusion.GaussianDiffusion(60), torch.randn(2, 1, 4, 4, dtype=F64)
    found = module.sample(process, bent, x, 4, "dpm++", spacing="quadratic")
    alpha_bar = products(process.betas)
    before: list[tuple[Tensor, float]] = []
    for t, s in ((48, 21), (21, 5), (5, 0)):  # 48 (i/3)², and algorithm 2 of the paper on its uneven steps
        a, after = alpha_bar[t], alpha_bar[s]
        here, there = (math.log(value / (1 - value)) / 2 for value in (a, after))
        x_0 = ((x - math.sqrt(1 - a) * bent(x, torch.full((2,), t))) / math.sqrt(a)).clamp(-1, 1)
        d = x_0
        if before:
            r = (here - before[-1][1]) / (there - here)
            d = (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * before[-1][0]
        before.append((x_0, here))
        x = math.sqrt((1 - after) / (1 - a)) * x - math.sqrt(after) * (math.exp(here - there) - 1) * d
    a = alpha_bar[0]
    last = (x - math.sqrt(1 - a) * bent(x, torch.zeros(2, dtype=torch.int64))) / math.sqrt(a)
    assert close(found, last.clamp(-1, 1))


def proof_samplers_visits(module: ModuleType) -> None:
    process = diffusion.GaussianDiffusion()
    assert module.visits(process, 10, "uniform") == [*range(900, -1, -100)]
    assert module.visits(process, 11, "quadratic") == [8 * i**2 for i in range(10, -1, -1)]
    snr = (process.alphas_cumprod / (1 - process.alphas_cumprod)).log()
    even = torch.linspace(float(snr[0]), float(snr[-1]), 12, dtype=F64)
    assert module.visits(process, 12, "logsnr")[::-1] == [int((snr - v).abs().argmin()) for v in even]
    even = torch.linspace(float(snr[0]), float(snr[400]), 7, dtype=F64)
    assert module.visits(process, 7, "logsnr", 400)[::-1] == [int((snr - v).abs().argmin()) for v in even]
    for spacing in ("uniform", "quadratic", "logsnr"):
        assert module.visits(process, 1, spacing) == [999] and module.visits(process, 1, spacing, 7) == [7]
        for steps, start in ((100, None), (999, None), (1000, None), (50, 60), (61, 60), (5, 400)):
            found = module.visits(process, steps, spacing, start)
            assert len(found) == steps and all(t > s for t, s in pairwise(found)) and found[-1] == 0
            assert found[0] < 1000 and (start is None or found[0] == start)


def proof_samplers_calls(module: ModuleType) -> None:
    """What `on_step` is told, when `draw` is asked, and that no graph is left."""
    process, noise = diffusion.GaussianDiffusion(60), 2 * torch.randn(2, 1, 4, 4, dtype=F64)
    told: list[tuple[int, int, Tensor, Tensor]] = []
    asked: list[int] = []
    gain = nn.Parameter(torch.tensor(1.0))
    for sampler in ("ddpm", "ddim", "dpm++"):
        found = module.sample(
            process,
            lambda x, t: gain * bent(x, t),
            noise,
            6,
            sampler,
            lambda step: asked.append(step) or noise,  # type: ignore[func-returns-value]
            on_step=lambda *step: told.append(step),
            start=20,
        )
        assert not found.requires_grad
        assert [number for number, *_ in told] == list(range(6)) and told[0][1] == 20
        assert torch.equal(told[0][2], noise) and close(told[-1][3], found)
        largest = max(float(x_0.abs().max()) for *_, x_0 in told)
        assert (largest > 1) == (sampler == "ddim")
        assert asked == (list(range(5)) if sampler == "ddpm" else [])
        told.clear()
        asked.clear()


def proof_samplers_refusals(module: ModuleType) -> None:
    process, noise = diffusion.GaussianDiffusion(60), torch.zeros(1, 1, 4, 4)
    refused = (
        {"sampler": "euler"},
        {"draw": None},
        {"steps": 0},
        {"steps": 61},
        {"steps": 3, "start": 1},
        {"start": 60},
        {"start": -1},
        {"sampler": "dpm++", "eta": 0.5},
        {"sampler": "ddim", "eta": 1.5},
        {"spacing": "cubic"},
    )
    for arguments in refused:
        try:
            module.sample(process, bent, noise, **{"draw": lambda step: noise, **arguments})
        except ValueError:
            continue
        raise AssertionError(f"{arguments} was taken")


# the network


def plain(p: dict[str, Tensor], x: Tensor, t: Tensor, groups: int) -> Tensor:
    """The whole U-Net once more, from a dict of weights."""
    half = p["conv_in.weight"].shape[0] // 2

    def conv(name: str, h: Tensor, stride: int = 1, pad: tuple[int, ...] = (1, 1, 1, 1)) -> Tensor:
        return F.conv2d(F.pad(h, pad), p[f"{name}.weight"], p[f"{name}.bias"], stride)

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ p[f"{name}.weight"].t() + p[f"{name}.bias"]

    def norm(name: str, h: Tensor) -> Tensor:
        parts = h.reshape(len(h), groups, -1)
        parts = (parts - parts.mean(2, True)) / (parts.var(2, correction=0, keepdim=True) + 1e-6).sqrt()
        return parts.view_as(h) * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]

    def swish(h: Tensor) -> Tensor:
        return h * h.sigmoid()

    def block(name: str, x: Tensor) -> Tensor:
        h = conv(f"{name}.conv1", swish(norm(f"{name}.norm1", x)))
        h = h + linear(f"{name}.time_emb_proj", swish(e))[:, :, None, None]
        h = conv(f"{name}.conv2", swish(norm(f"{name}.norm2", h)))
        short = f"{name}.conv_shortcut"
        return h + (conv(short, x, pad=(0, 0, 0, 0)) if f"{short}.weight" in p else x)

    def attend(name: str, x: Tensor) -> Tensor:
        if f"{name}.to_q.weight" not in p:
            return x
        n = norm(f"{name}.group_norm", x).flatten(2).mT
        q, k, v = (linear(f"{name}.to_{letter}", n) for letter in "qkv")
        h = linear(f"{name}.to_out.0", (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v)
        return x + h.mT.reshape(x.shape)

    angles = t.double()[:, None] * torch.tensor([10000 ** (-i / (half - 1)) for i in range(half)], dtype=F64)
    e = linear("time_embedding.linear_1", torch.cat((angles.sin(), angles.cos()), 1))
    e = linear("time_embedding.linear_2", swish(e))
    h = conv("conv_in", x)
    kept, level = [h], 0
    while f"down_blocks.{level}.resnets.0.conv1.weight" in p:
        number, here = 0, f"down_blocks.{level}"
        while f"{here}.resnets.{number}.conv1.weight" in p:
            h = attend(f"{here}.attentions.{number}", block(f"{here}.resnets.{number}", h))
            kept.append(h)
            number += 1
        if f"{here}.downsamplers.0.conv.weight" in p:
            h = conv(f"{here}.downsamplers.0.conv", h, 2, (0, 1, 0, 1))
            kept.append(h)
        level += 1
    h = block("mid_block.resnets.0", h)
    h = block("mid_block.resnets.1", attend("mid_block.attentions.0", h))
    for up in range(level):
        number, here = 0, f"up_blocks.{up}"
        while f"{here}.resnets.{number}.conv1.weight" in p:
            h = torch.cat((h, kept.pop()), 1)
            h = attend(f"{here}.attentions.{number}", block(f"{here}.resnets.{number}", h))
            number += 1
        if f"{here}.upsamplers.0.conv.weight" in p:
            h = conv(f"{here}.upsamplers.0.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return conv("conv_out", swish(norm("conv_norm_out", h)))


def drawn(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in network.double().eval().parameters():
            parameter.normal_(std=(parameter[0].numel() if parameter.ndim > 1 else 4) ** -0.5)
    return network


def proof_unet_whole(module: ModuleType) -> None:
    """The network's output from a plain copy of all its formulas; small images, so that ε in the norm shows."""
    for arguments, groups in (((1, 32, (1, 2, 1), 2, (4,), 8), 8), ((3, 8, (1, 2), 1, (8,), 8), 2)):
        network = drawn(module.UNet(*arguments))
        for scale in (1.0, 1e-3):
            with torch.no_grad():
                network.conv_in.weight.mul_(scale)
                network.conv_in.bias.mul_(scale)
                x, t = torch.randn(2, arguments[0], 8, 16, dtype=F64), torch.tensor([3, 970])
                assert close(network(x, t), plain(network.state_dict(), x, t, groups), 1e-7)


def proof_unet_size(module: ModuleType) -> None:
    with torch.device("meta"):
        network = module.UNet()
    assert sum(parameter.numel() for parameter in network.parameters()) == 35_746_307
    assert {m.num_groups for m in network.modules() if isinstance(m, nn.GroupNorm)} == {32}
    assert {m.p for m in network.modules() if isinstance(m, Dropout)} == {0.1}


def proof_unet_start(module: ModuleType) -> None:
    """Zero output; branches at zero; everything else Xavier uniform; dropout in training alone."""
    network = module.UNet(1, 32, (1, 2), 1, (4,), 8, dropout=0.5)
    assert not network(torch.randn(2, 1, 8, 8), torch.tensor([3, 700])).any()
    for name, weight in network.named_parameters():
        if weight.ndim > 1 and not name.endswith(("conv2.weight", "to_out.0.weight", "conv_out.weight")):
            bound = math.sqrt(6 / (weight[0, 0].numel() * (weight.shape[0] + weight.shape[1])))
            assert 0.9 * bound < float(weight.detach().abs().max()) <= bound
        elif not name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "norm_out.weight")):
            assert not weight.any()
    x, t = torch.randn(2, 1, 8, 8, dtype=F64), torch.tensor([3, 700])
    drawn(network)
    assert torch.equal(network(x, t), network(x, t))
    network.train()
    assert not torch.equal(network(x, t), network(x, t))


def proof_unet_time(module: ModuleType) -> None:
    """Sines beside cosines; 999 is not 1000 in half precision."""
    angles = [999 * 10000 ** (-i / 15) for i in range(16)]
    wanted = torch.tensor([[*(math.sin(a) for a in angles), *(math.cos(a) for a in angles)]], dtype=F64)
    assert close(module.sinusoids(torch.tensor([999]), 32, F64), wanted)
    for dtype in (torch.float32, torch.bfloat16):
        found = module.sinusoids(torch.tensor([999]), 32, dtype)
        assert found.dtype == torch.float32 and close(found.double(), wanted, 1e-4)


def proof_unet_exchange(module: ModuleType) -> None:
    """Out and back, old names too; what is foreign is refused."""
    network = drawn(module.UNet(1, 32, (1, 2, 2), 1, (4,), 8, dropout=0.2)).float()
    state, config = network.to_diffusers()
    wanted = {"norm_num_groups": 8, "dropout": 0.2, "sample_size": 8, "block_out_channels": [32, 64, 64]}
    wanted["down_block_types"] = ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"]
    wanted["up_block_types"] = ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]
    assert {name: config[name] for name in wanted} == wanted
    renamed = {name: name.replace(".to_q.", ".query.").replace(".to_out.0.", ".proj_attn.") for name in state}
    old = {renamed[name]: value for name, value in state.items()}
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([5])
    for weights in (state, old):
        back = module.UNet.from_diffusers(weights, config).eval()
        assert torch.equal(back(x, t), network(x, t)) and back.to_diffusers()[1] == config
    for change in ({"norm_eps": 1e-5}, {"flip_sin_to_cos": True}, {"attention_head_dim": 8}):
        try:
            module.UNet.from_diffusers(state, {**config, **change})
        except ValueError:
            continue
        raise AssertionError(f"{change} was taken")


# the mutants: in which module, what is replaced, by what

MUTANTS: dict[str, tuple[str, str, str]] = {
    "clip after the mean": (
        "diffusion",
        "        if clip:\n            x_0 = x_0.clamp(-1, 1)\n        mean, _, _ = self.q_posterior(x_0, x_t, t)\n",
        "        mean, _, _ = self.q_posterior(x_0, x_t, t)\n        if clip:\n            x_0 = x_0.clamp(-1, 1)\n",
    ),
    "the mean clipped": (
        "diffusion",
        "mean, _, _ = self.q_posterior(x_0, x_t, t)\n",
        "mean = self.q_posterior(x_0, x_t, t)[0].clamp(-1, 1)\n",
    ),
    "no clip": ("diffusion", "x_0.clamp(-1, 1)", "x_0"),
    "1 − ᾱ for its root": ("diffusion", "(1 - alpha_bar).sqrt(),", "(1 - alpha_bar),"),
    "ᾱ for its root": ("diffusion", '"sqrt_alpha_bar": alpha_bar.sqrt()', '"sqrt_alpha_bar": alpha_bar'),
    "ᾱ_t for ᾱ_{t−1}": (
        "diffusion",
        "before = torch.cat((torch.ones(1, dtype=torch.float64), alpha_bar[:-1]))",
        "before = alpha_bar",
    ),
    "ᾱ_{t−2} for ᾱ_{t−1}": (
        "diffusion",
        "torch.cat((torch.ones(1, dtype=torch.float64), alpha_bar[:-1]))",
        "torch.cat((torch.ones(2, dtype=torch.float64), alpha_bar[:-2]))",
    ),
    "β_0 as the first variance": (
        "diffusion",
        "log_sigma_2 = torch.cat((beta_tilde[1:2], sigma_2[1:])).log()",
        "log_sigma_2 = sigma_2.clamp(min=1e-20).log()",
    ),
    "β_1 as the first variance": (
        "diffusion",
        "torch.cat((beta_tilde[1:2], sigma_2[1:]))",
        "torch.cat((sigma_2[1:2], sigma_2[1:]))",
    ),
    "variances swapped": ("diffusion", 'self.variance == "fixed_large"', 'self.variance == "fixed_small"'),
    "posterior without a root": ("diffusion", "before.sqrt() * beta", "before * beta"),
    "posterior's share of x_t": (
        "diffusion",
        "(1 - beta).sqrt() * (1 - before)",
        "(1 - beta) * (1 - before)",
    ),
    "ε from t + 1": ("diffusion", "predict_noise(model, x_t, t))", "predict_noise(model, x_t, t + 1))"),
    "σ doubled in the mean's KL": ("diffusion", "(2 * log_sigma_2.exp())", "log_sigma_2.exp()"),
    "KL of the variances turned round": (
        "diffusion",
        "log_ratio.exp() - 1 - log_ratio",
        "(-log_ratio).exp() - 1 + log_ratio",
    ),
    "nats for bits": ("diffusion", "return nats / math.log(2)", "return nats"),
    "decoder in nats": ("diffusion", "p.log_variance)) / -math.log(2)", "p.log_variance)) * -1"),
    "decoder at every t": ("diffusion", "torch.where(t == 0, self.dec", "torch.where(t >= 0, self.dec"),
    "decoder nowhere": (
        "diffusion",
        "self.decoder_bits(x_0, p) if t == 0 else",
        "self.decoder_bits(x_0, p) if t < 0 else",
    ),
    "bins twice as wide": ("diffusion", "HALF_BIN = 1 / 255 ", "HALF_BIN = 2 / 255 "),
    "bins of 256 values over 256": ("diffusion", "HALF_BIN = 1 / 255 ", "HALF_BIN = 1 / 256 "),
    "first and last bin swapped": ("diffusion", "first, last =", "last, first ="),
    "no last bin": ("diffusion", "x_0 > EDGE", "x_0 > EDGE + 1"),
    "no first bin": ("diffusion", "x_0 < -EDGE", "x_0 < -EDGE - 1"),
    "edges within reach of others": ("diffusion", "EDGE = 0.999 ", "EDGE = 0.2 "),
    "variance for a deviation": ("diffusion", "(-log_variance / 2).exp()", "(-log_variance).exp()"),
    "a floor under the likelihood": (
        "diffusion",
        "last, inside))",
        "last, inside)).clamp(min=math.log(1e-12))",
    ),
    "prior without its x_0": (
        "diffusion",
        " + alpha_bar * mean_per_image(x_0.square())",
        " + 0 * mean_per_image(x_0)",
    ),
    "prior at the first step": ("diffusion", "self.alpha_bar(self.timesteps - 1)", "self.alpha_bar(0)"),
    "prior forgotten": ("diffusion", "terms.sum(1) + prior,", "terms.sum(1),"),
    "bits unclipped": ("diffusion", "x_0, steps, draw(t), clip)", "x_0, steps, draw(t), False)"),
    "loss of the whole batch": ("diffusion", "x.flatten(1).mean(1)", "x.flatten(1).mean().expand(len(x))"),
    "loss a sum": ("diffusion", "x.flatten(1).mean(1)", "x.flatten(1).sum(1)"),
    "loss of the mean": ("diffusion", "(noise - eps).square()", "(noise - eps).abs()"),
    "tables in half precision": (
        "diffusion",
        "torch.promote_types(like.dtype, torch.float32)",
        "like.dtype",
    ),
    "tables in float32": ("diffusion", "torch.promote_types(like.dtype, torch.float32)", "torch.float32"),
    "one cast for all dtypes": (
        "diffusion",
        "key = (name, dtype, like.device)",
        "key = (name, torch.float32, like.device)",
    ),
    "the network's dtype kept": ("diffusion", "return eps.to(x_t.dtype)", "return eps"),
    "β to 0.01": ("diffusion", "1e-4 * scale, 0.02 * scale", "1e-4 * scale, 0.01 * scale"),
    "β not scaled": ("diffusion", "1e-4 * scale, 0.02 * scale", "1e-4, 0.02"),
    "the cosine's offset": ("diffusion", "((t + 0.008) / 1.008", "((t + 0.0) / 1.0"),
    "the cosine not squared": ("diffusion", ".cos().square()", ".cos()"),
    "β up to 1": ("diffusion", ".clamp(max=0.999)", ""),
    "rate of its own step": ("diffusion", "bound.prior.double().mean()[None], reverse[:-1])", "reverse,)"),
    "rate from the cleanest on": (
        "diffusion",
        "bound.terms.double().mean(0).flip(0)",
        "bound.terms.double().mean(0)",
    ),
    "root of the mean forgotten": ("diffusion", ".flip(0).sqrt()", ".flip(0)"),
    # samplers
    "noise at the end": (
        "samplers",
        "        if s < 0:  # the last step ends",
        "        if s < -1:  # the last step ends",
    ),
    "ancestral variances swapped": ("samplers", '.variance == "fixed_large"', '.variance == "fixed_small"'),
    "ancestral without the root of σ²": (
        "samplers",
        "return mean, math.sqrt(beta if",
        "return mean, (beta if",
    ),
    "β of one step": (
        "samplers",
        "beta, kept = 1 - a_t / a_s,",
        "beta, kept = float(self.diffusion.betas[t]) * 1.01,",
    ),
    "η not squared": ("samplers", "self.eta**2", "self.eta"),
    "σ̂ of the small step": ("samplers", "(1 - a_t / a_s) * (1 - a_s) / (1 - a_t)\n", "(1 - a_t / a_s)\n"),
    "no room for the noise": ("samplers", "max(1 - a_s - variance, 0.0)", "(1 - a_s)"),
    "ε not that of the clipped x̂_0": ("samplers", "(x - math.sqrt(a_t) * x_0) / math.sqrt(1 - a_t)", "x"),
    "first order alone": ("samplers", "if self.before is not None:", "if False:"),
    "extrapolation backwards": ("samplers", "/ 2 * (x_0 - x_0_before)", "/ 2 * (x_0_before - x_0)"),
    "half a step too far": ("samplers", "(here - further_back) / 2 * (", "(here - further_back) * ("),
    "h of the step before": (
        "samplers",
        "(there - here) / (here - further_back)",
        "(here - further_back) / (there - here)",
    ),
    "λ doubled": ("samplers", "math.log1p(-alpha_bar)) / 2", "math.log1p(-alpha_bar))"),
    "variance kept for deviation": (
        "samplers",
        "kept = math.sqrt((1 - a_s) / (1 - a_t))\n",
        "kept = (1 - a_s) / (1 - a_t)\n",
    ),
    "always clipped": ("samplers", "return x_0.clamp(-1, 1) if clip else x_0", "return x_0.clamp(-1, 1)"),
    "never clipped": ("samplers", "return x_0.clamp(-1, 1) if clip else x_0", "return x_0"),
    "x_0 told for x_t": ("samplers", "on_step(step, t, x, x_0)", "on_step(step, t, x_0, x)"),
    "noise of one step for all": ("samplers", "sigma * draw(step)", "sigma * draw(0)"),
    "a graph": ("samplers", "@torch.no_grad()\n", ""),
    "spacing from the top": ("samplers", "i * T // steps", "(i + 1) * T // steps - 1"),
    "quadratic to T": ("samplers", "top = 0.8 * T if", "top = T - 1 if"),
    "quadratic linear": ("samplers", "(i / last) ** 2", "(i / last)"),
    "repetitions visited": ("samplers", "min(max(index, free), room)", "min(index, room)"),
    "past the end": ("samplers", "min(max(index, free), room)", "max(index, free)"),
    "start ignored": ("samplers", "float(snr[top])", "float(snr[-1])"),
    "steps not counted": ("samplers", "if not 1 <= steps <= indices:", "if not 1 <= steps <= T:"),
    # the network
    "ε of 1e-5": ("unet", "EPS = 1e-6", "EPS = 1e-5"),
    "padding all round": (
        "unet",
        "return self.conv(F.pad(x, (0, 1, 0, 1)))",
        "return F.conv2d(x, self.conv.weight, self.conv.bias, 2, 1)",
    ),
    "padding on the left and above": ("unet", "(0, 1, 0, 1)", "(1, 0, 1, 0)"),
    "time interleaved": (
        "unet",
        "torch.cat((angles.sin(), angles.cos()), 1)",
        "torch.stack((angles.sin(), angles.cos()), 2).flatten(1)",
    ),
    "cosines first": ("unet", "(angles.sin(), angles.cos())", "(angles.cos(), angles.sin())"),
    "frequencies over half": ("unet", "/ (half - 1)", "/ half"),
    "time in half precision": ("unet", "torch.promote_types(dtype, torch.float32)", "dtype"),
    "no swish on the time": ("unet", "e = F.silu(self.time_embedding(t))", "e = self.time_embedding(t)"),
    "time after the second norm": (
        "unet",
        "self.dropout(F.silu(self.norm2(h)))",
        "self.dropout(F.silu(self.norm2(h - self.time_emb_proj(e)[:, :, None, None])))",
    ),
    "no shortcut": (
        "unet",
        "return h + (x if self.conv_shortcut is None else",
        "return h + (0 if self.conv_shortcut is None else",
    ),
    "halved by √2": ("unet", "return h + (x if", "return 2**-0.5 * h + (x if"),
    "no dropout": (
        "unet",
        "self.conv2(self.dropout(F.silu(self.norm2(h))))",
        "self.conv2(F.silu(self.norm2(h)))",
    ),
    "attention's input forgotten": ("unet", "return x + self.to_out", "return 0 * x + self.to_out"),
    "keys for values": ("unet", "(self.to_q, self.to_k, self.to_v))", "(self.to_q, self.to_k, self.to_k))"),
    "scores not scaled": ("unet", "q @ k.mT / math.sqrt(C)", "q @ k.mT"),
    "pixels transposed": ("unet", ".unflatten(2, (H, W))", ".unflatten(2, (W, H)).mT"),
    "skips in another order": ("unet", "kept.pop()), 1), e)", "kept.pop(0)), 1), e)"),
    "skips in front": ("unet", "torch.cat((h, kept.pop()), 1)", "torch.cat((kept.pop(), h), 1)"),
    "bilinear": ("unet", 'mode="nearest"', 'mode="bilinear"'),
    "middle without attention": (
        "unet",
        "self.attentions[0](self.resnets[0](h, e))",
        "self.resnets[0](h, e)",
    ),
    "no last norm": ("unet", "F.silu(self.conv_norm_out(h))", "F.silu(h)"),
    "attention a level too low": (
        "unet",
        "image_size >> level in attention_resolutions",
        "image_size >> level + 1 in attention_resolutions",
    ),
    "second convolution not zero": (
        "unet",
        "nn.init.zeros_(module.conv2.weight)",
        "nn.init.ones_(module.conv2.weight)",
    ),
    "last convolution not zero": ("unet", "nn.init.zeros_(self.conv_out.weight)", "pass"),
    "Kaiming": ("unet", "nn.init.xavier_uniform_(module.weight)", "nn.init.kaiming_uniform_(module.weight)"),
    "one channel to a group": ("unet", "min(32, base_channels // 4)", "min(32, base_channels)"),
    "old names lost": ("unet", '("query", "to_q"), ', ""),
    "settings taken unseen": ("unet", "if name in config and config[name] != wanted:", "if False:"),
    "groups left out of the config": ("unet", '            "norm_num_groups": self.groups,\n', ""),
    "levels upside down": ("unet", "for kind in reversed(kinds)", "for kind in kinds[:0:-1] + kinds[1:2]"),
}


def proofs(name: str) -> list[Proof]:
    return [value for key, value in globals().items() if key.startswith(f"proof_{name}_")]


def load(source: str, name: str) -> ModuleType:
    made = ModuleType(name)
    exec(compile(source, name, "exec"), made.__dict__)
    return made


@pytest.mark.parametrize("name", SOURCES)
def test_the_true_module_passes(name: str) -> None:
    for proof in proofs(name):
        proof(load(SOURCES[name], name))


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name: str) -> None:
    where, old, new = MUTANTS[name]
    source = SOURCES[where]
    assert source.count(old) == 1, f"{old!r} stands in {where} {source.count(old)} times"
    mutant = load(source.replace(old, new), where)  # which imports: what catches it is a proof
    assert any(fails(proof, mutant) for proof in proofs(where)), f"no proof noticed: {name}"


def fails(proof: Proof, mutant: ModuleType) -> bool:
    try:
        proof(mutant)
    except (AssertionError, RuntimeError, ValueError, LookupError, ArithmeticError):
        return True
    return False
