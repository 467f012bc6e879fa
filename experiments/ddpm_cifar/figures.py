"""Figures and tables of a diffusion model: what the paper shows, and how the network learned.

Letters in shapes: N images, C channels, H height, W width, T time steps, S steps of the reverse process in figures.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from experiments.ddpm_cifar import mosaics, paper
from experiments.ddpm_cifar.measures import Measures
from experiments.ddpm_cifar.mosaics import Panel, to_bytes
from experiments.ddpm_cifar.sampling import Sampling
from experiments.nn import generative
from experiments.nn.diffusion import Bound, rate_distortion
from runner import figures as plots
from runner.task import Run

_log = logging.getLogger("runner")

GRID_IMAGES = 64  # in the grid of samples
HISTORY_IMAGES = 8  # of these after every evaluation, to see the network learn
_HISTORY_ROWS = 10  # evaluations that are shown
_CHAINS = 16  # images whose reverse process is shown
_STRIP, _FRAMES = 11, 48  # instants of the reverse process in a strip, and in its animation
_LAST_FRAME = 12  # repetitions of the animation's end, one second
_STRIP_IMAGES = 6
_SHARES = (1.0, 0.75, 0.5, 0.25)  # of T, at which x_t is shared (Fig. 7)
_REGENERATED = 8  # images from each shared x_t
_NEIGHBOURS = 7  # nearest training images of a sample
_CHUNK = 10_000  # training images that are searched at once


# while it trains


def draw_forward(run: Run, sampling: Sampling) -> None:
    """Draw x_t of real images over t."""
    diffusion = sampling.diffusion
    x_0 = sampling.data.transform(run.splits["train"].inputs[:_STRIP_IMAGES], None)
    noise = sampling.noise(range(_STRIP_IMAGES), "forward")()

    # x_0, then x_t at equal distances
    strips, labels = [x_0], ["x₀\n1"]
    for i in range(_STRIP - 1):
        t = round(i * (sampling.T - 1) / (_STRIP - 2))
        strips.append(diffusion.q_sample(x_0, torch.full((len(x_0),), t, device=x_0.device), noise))
        labels.append(f"{t + 1:,}\n{math.sqrt(diffusion.alpha_bar(t)):.2g}")

    images = to_bytes(torch.stack(strips, 1).flatten(0, 1))
    title = "the forward process: t, and how much √ᾱ of the image is left"
    run.figure("forward", mosaics.table_of_images(images, (), labels, title))


def draw_samples(run: Run, sampling: Sampling, count: int) -> Tensor:
    """Draw the grid of samples at this step; return them, uint8 (N, C, H, W)."""
    images = sampling.samples(min(GRID_IMAGES, count))
    title = f"step {run.step:,}: samples by {sampling.describe()}"
    run.figure("samples", mosaics.panels([Panel(images, columns=8)], title))
    return images


def draw_learning(run: Run, steps: Sequence[int], samples: Sequence[Tensor]) -> None:
    """Draw the images (N, C, H, W) that the same noise became after more and more steps of training."""
    if len(steps) < 2:
        return
    shown = _spaced(len(steps), _HISTORY_ROWS)
    rows = [f"step {steps[i]:,}" for i in shown]
    panel = Panel(torch.cat([samples[i] for i in shown]), HISTORY_IMAGES, rows)
    run.figure("learning", mosaics.panels([panel], "the same noise, after more and more training"))


# the reverse process


def draw_reverse(run: Run, sampling: Sampling, S: int) -> None:
    """Draw the reverse process, the x̂_0 on its way, and other ends from the same x_t (Figs. 6 and 7)."""
    # instants on the way, and the end
    shown = set(_spaced(S, _FRAMES))
    batches: dict[int, list[Tensor]] = {}  # by t

    def record(step: int, t: int, x_t: Tensor, x_0: Tensor) -> None:
        if step in shown:
            batches.setdefault(t, []).append(torch.stack((x_t, x_0)))

    end = sampling.denoise(S, sampling.T - 1, range(_CHAINS), "sample", on_step=record)
    chain = {t: torch.cat(parts, 1) for t, parts in batches.items()}  # (2, N, C, H, W): x_t and x̂_0
    _draw_shared(run, sampling, S, chain)
    times = [t + 1 for t in chain] + [0]
    pairs = torch.stack([*(to_bytes(pair).cpu() for pair in chain.values()), torch.stack((end, end))])
    states, guesses = pairs.unbind(1)  # (frames, N, C, H, W)

    # over t, a row per image
    strip = _spaced(len(times), _STRIP)
    labels = [f"{times[i]:,}" for i in strip]
    for name, frames, title in (
        ("chain", states, "the reverse process, x_t over t"),
        ("progressive", guesses, "progressive generation: the x̂₀ that the network expects at t (Fig. 6)"),
    ):
        images = frames[strip][:, :_STRIP_IMAGES].transpose(0, 1).flatten(0, 1)
        run.figure(name, mosaics.table_of_images(images, (), labels, title))

    # the animation, whose last frame stays for a second
    figure, show = mosaics.moving({"x_t": states, "x̂₀, what it expects to end at": guesses}, 4)
    order = [*range(len(times)), *[len(times) - 1] * _LAST_FRAME]
    run.animation("chain", figure, lambda i: show(order[i], f"t = {times[order[i]]:,}"), len(order))


def _draw_shared(run: Run, sampling: Sampling, S: int, chain: Mapping[int, Tensor]) -> None:
    """Draw what x_t decides: images that are regenerated from one x_t with other noise (Fig. 7)."""
    K, sources = _REGENERATED, 2
    rows, labels = [], []

    # a row per t: x_t, then what it became
    for share in _SHARES:
        t = min(chain, key=lambda t: abs(t + 1 - share * sampling.T))
        x_t = chain[t][0, :sources]
        images = sampling.denoise(S, t, range(sources * K), "shared", t, x=x_t.repeat_interleave(K, 0))
        row = (to_bytes(x_t)[:, None].cpu(), images.unflatten(0, (sources, K)))
        rows.append(torch.cat(row, 1))  # (sources, 1 + K, C, H, W)
        labels.append(f"t = {t + 1:,}")

    columns = ["x_t"] + [""] * K
    panels = [
        Panel(part.flatten(0, 1), K + 1, labels, columns, f"chain {i}")
        for i, part in enumerate(torch.stack(rows, 1), start=1)
    ]
    title = "from the same x_t with other noise: what is decided by t (Fig. 7)"
    run.figure("shared", mosaics.panels(panels, title))


def draw_interpolation(run: Run, sampling: Sampling, S: int) -> None:
    """Draw two images, mixed at several t and denoised from there with the same noise (Fig. 8)."""
    split = run.splits.get("test", run.splits["train"])
    pair = torch.randperm(len(split), generator=run.generator("pair"))[:2].to(split.inputs.device)
    ends = sampling.data.transform(split.inputs[pair], None)  # (2, C, H, W)
    sources = to_bytes(ends).cpu()
    weights = torch.linspace(0, 1, 11, device=run.device).view(-1, 1, 1, 1)

    # a row per t, from pixels to pure noise
    rows, labels = [], []
    for eighth in range(9):
        t = round(eighth * sampling.T / 8) - 1
        rows.append(torch.cat((sources[:1], _mixture(sampling, ends, weights, t, S), sources[1:])))
        labels.append("pixels" if t < 0 else f"t = {t + 1:,}")

    inner = [f"{weight:.1f}" for weight in weights.flatten()[1:-1].tolist()]
    columns = ["source", "rec.", *inner, "rec.", "source"]
    title = "interpolation of two images at t, by λ (Fig. 8)"
    run.figure("interpolation", mosaics.table_of_images(torch.cat(rows), labels, columns, title))


def _mixture(sampling: Sampling, ends: Tensor, weights: Tensor, t: int, S: int) -> Tensor:
    """Denoise (1 − λ) x_t + λ x_t′ of two images (2, C, H, W); at t = −1 mix their pixels.

    `weights` (N, 1, 1, 1) has the λ of each result, uint8 (N, C, H, W) on the CPU.
    """
    if t < 0:
        return to_bytes((1 - weights) * ends[:1] + weights * ends[1:]).cpu()
    times = torch.full((2,), t, device=ends.device)
    x_t = sampling.diffusion.q_sample(ends, times, sampling.noise([0], "interpolation")())
    mixed = (1 - weights) * x_t[:1] + weights * x_t[1:]
    return sampling.denoise(S, t, [0] * len(mixed), "interpolation", t, x=mixed)  # one noise for all


# comparisons


def draw_neighbours(run: Run, sampling: Sampling, count: int) -> None:
    """Draw samples with the training images nearest to them in pixels, which would show memorisation."""
    samples = sampling.samples(min(HISTORY_IMAGES, count))
    train = run.splits["train"].inputs
    query = samples.flatten(1).float() / 255
    distances, indices = [], []

    # the nearest of each chunk
    label = f"the nearest of {len(train):,} training images"
    with sampling.progress.bar(label, len(query) * len(train)) as advance:
        for first in range(0, len(train), _CHUNK):
            chunk = train[first : first + _CHUNK].flatten(1).float().cpu() / 255
            nearest = generative.nearest_neighbours(query, chunk, min(_NEIGHBOURS, len(chunk)), advance)
            distances.append(nearest.distances)
            indices.append(nearest.indices + first)

    # the nearest of all
    order = torch.cat(distances, 1).argsort(1)[:, :_NEIGHBOURS]
    chosen = torch.cat(indices, 1).gather(1, order)  # (N, neighbours)
    neighbours = train[chosen.to(train.device)].cpu()

    images = torch.cat((samples[:, None], neighbours), 1).flatten(0, 1)
    columns = ["sample", *(f"{i + 1}" for i in range(chosen.shape[1]))]
    run.figure("neighbours", mosaics.table_of_images(images, (), columns, f"samples and {label} (pixels)"))


def draw_steps(run: Run, sampling: Sampling, measures: Measures, eval_steps: Sequence[int]) -> None:
    """Draw the images that the same noise becomes in more and more steps, and tabulate their measures."""
    split = "test" if "test" in run.splits else "train"
    N = measures.num_images(split)
    samples = {steps: sampling.generate(range(N), steps) for steps in sorted(set(eval_steps))}

    # figure
    images = torch.cat([images[:HISTORY_IMAGES] for images in samples.values()])
    panel = Panel(images, min(HISTORY_IMAGES, N), [f"{steps:,} steps" for steps in samples])
    title = f"the same noise, in more and more steps of {sampling.sampler}"
    run.figure("steps", mosaics.panels([panel], title))

    # table, whose last row compares real images
    values = {steps: measures.compare(split, images) for steps, images in samples.items()}
    _, real_vs_real = measures.real(split, N)
    names = [name for name in next(iter(values.values())) if name not in real_vs_real]
    rows: list[list[Any]] = [[steps, N, *(row[name] for name in names)] for steps, row in values.items()]
    rows.append(["real images", N, *(real_vs_real.get(f"{name}_real") for name in names)])
    run.table("steps", ["steps", "images", *names], rows)


def draw_bound(
    run: Run, bounds: Mapping[str, Bound], measures: Mapping[str, tuple[int, Mapping[str, float]]]
) -> None:
    """Draw rate and distortion of the last of the splits (Fig. 5); tabulate all numbers beside the paper's."""
    split, bound = list(bounds.items())[-1]
    rate, rmse = rate_distortion(bound)
    run.table("rate_distortion", *paper.rate_distortion_table(rate, rmse))

    # Fig. 5
    figure, grid = plots.new(1, 3, (11.4, 3.6))
    steps = torch.arange(1, len(rate) + 1)
    for axes, x, y, title, xlabel, ylabel in (
        (grid[0, 0], steps, rmse, "distortion", "reverse steps", "RMSE of x̂₀ on [0, 255]"),
        (grid[0, 1], steps, rate, "rate", "reverse steps", "bits/dim received"),
        (grid[0, 2], rate, rmse, "distortion by rate", "bits/dim received", "RMSE of x̂₀ on [0, 255]"),
    ):
        axes.plot(x.numpy(), y.numpy(), color=plots.BLUE)
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axes.set_ylim(bottom=0)
    images = f"{len(bound.total):,} images of {split}"
    figure.suptitle(f"rate and distortion of {images} (Fig. 5)", x=0.01, ha="left")
    run.figure("rate_distortion", figure)

    # all numbers
    header, rows = paper.summary_table(bounds, measures)
    run.table("numbers", header, rows)
    _log.info(paper.beside_the_paper(rows))


def _spaced(count: int, limit: int) -> list[int]:
    """Return at most `limit` indices below `count`, at equal distances, the first and the last included."""
    return sorted({round(i) for i in torch.linspace(0, count - 1, min(limit, count)).tolist()})
