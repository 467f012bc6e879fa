"""Figures of the RNN, and the tables of their numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from experiments.nn.rnn import decay_per_step
from experiments.rnn_fashion import clipping
from runner import figures
from runner.task import Run

_SHOWN = 32  # images in a figure


def draw_before_after(
    run: Run, images: Tensor, targets: Tensor, before: Tensor, after: Tensor, names: tuple[str, ...]
) -> None:
    """Draw the same test images with the predictions (N,) of the untrained and of the trained network."""
    shown = torch.randperm(len(targets), generator=run.generator("shown"))[:_SHOWN]
    panels, captions = {}, []
    for title, predictions in (("before training", before), ("after training", after)):
        share = (predictions == targets).double().mean()
        panels[f"{title}: {share:.1%} of the test set right"] = images[shown]
        labels = zip(predictions[shown].tolist(), targets[shown].tolist(), strict=True)
        captions.append([figures.label_caption(names, guess, target) for guess, target in labels])
    run.figure("before_after", figures.image_grids(panels, captions))


def draw_gradients(run: Run, untrained: dict[str, Any], trained: dict[str, Tensor]) -> None:
    """Draw and tabulate ‖∂L/∂h_t‖ over t: at initialisation for several gains, and before and after training.

    `untrained` and `trained` hold norms (T,) of all of the gradient, "all", and of what comes through h_T, "last";
    `untrained` also those through h_T by gain, "gains".
    """
    # lines
    gains = {f"gain {gain}": norms for gain, norms in untrained["gains"].items()}
    both = {"before": untrained, "after": trained}
    whole = {f"{when} training": norms["all"] for when, norms in both.items()}
    last = {f"{when}, through h_T alone": norms["last"] for when, norms in both.items()}
    figure, [[left, right]] = figures.new(1, 2, (11.0, 4.6))
    rows = []
    for axes, lines, colours, marker in (
        (left, gains, (figures.ORANGE, figures.GREEN, figures.SKY, figures.PURPLE), "o"),
        (right, whole, (figures.GREY, figures.BLUE), "o"),
        (right, last, (figures.GREY, figures.BLUE), "x"),
    ):
        for (label, norms), colour in zip(lines.items(), colours, strict=True):
            factor, r_squared = decay_per_step(norms)
            rows.append([label, factor, r_squared, float(norms[0] / norms[-1])])

            # the norms, and the straight line through their logarithms
            t = torch.arange(1, len(norms) + 1, dtype=torch.float64)
            line = norms.log().mean().exp() * factor ** (t.mean() - t)
            label += f": ×{factor:.2f} per step back, R² {r_squared:.2f}"
            axes.plot(t, norms, f"{marker}-", color=colour, linewidth=1.0, markersize=4, label=label)
            axes.plot(t.numpy(), line.numpy(), "--", color=colour, linewidth=0.7)

    # titles
    left.set(title="at initialisation, through h_T alone, by the gain of W_hh")
    right.set(title="this run")
    for axes in (left, right):
        axes.set(xlabel="time step t, the row of the image", ylabel="mean ‖∂L/∂h_t‖", yscale="log")
        axes.legend()
    run.figure("gradients_through_time", figure)
    header = ["network", "factor per step back", "R² of the straight line", "t = 1 over t = T"]
    run.table("gradients_through_time", header, rows)


def draw_clipping(
    run: Run,
    unclipped: clipping.Replay,
    clipped: clipping.Replay,
    loss_at: Callable[[list[float]], list[float]],
    lr: float,
    limit: float,
    num_images: int,
) -> None:
    """Draw plain SGD clipped at `limit` and not, and the step at the spike of the clipped run.

    `loss_at` returns the loss on `num_images` images after a step of each length along that gradient.
    """
    # both runs
    figure, [[norms, losses, spike]] = figures.new(1, 3, (12.6, 3.9))
    for label, colour, replay in (
        ("not clipped", figures.VERMILION, unclipped),
        (f"clipped at {limit:g}", figures.BLUE, clipped),
    ):
        norms.plot(replay.norms, color=colour, label=label, linewidth=1)
        losses.plot(replay.losses, color=colour, label=label, linewidth=1)
    for axes, title in ((norms, "gradient norm ‖g‖ before clipping"), (losses, "training loss")):
        axes.set(title=title, xlabel=f"step of plain SGD, learning rate {lr}", yscale="log")
        axes.legend()

    # the spike, unless the gradient was not finite before the replay had settled
    if clipped.spike < 0:
        spike.set_axis_off()
    else:
        _draw_spike(spike, clipped, loss_at, lr, limit)
        spike.set_ylabel(f"loss on {num_images:,} training images")
    run.figure("clipping", figure)


def _draw_spike(
    axes: Axes,
    clipped: clipping.Replay,
    loss_at: Callable[[list[float]], list[float]],
    lr: float,
    limit: float,
) -> None:
    """Draw the loss by the length of the step at the spike, and where that step ends, clipped and not."""
    # the loss by length
    norm = clipped.norms[clipped.spike]
    lengths = torch.linspace(0, 1.25 * lr * norm, 80).tolist()
    axes.plot(lengths, loss_at(lengths), color=figures.INK)

    # both ends
    for name, at_most, colour in (("clipped", limit, figures.BLUE), ("not clipped", None, figures.VERMILION)):
        length = lr * norm * clipping.clip_factor(norm, at_most)
        label = f"{name}: ‖Δθ‖ = {length:.2g}"
        axes.plot([length], loss_at([length]), "o", markersize=8, color=colour, label=label)
    axes.axhline(loss_at([0.0])[0], color=figures.GREY, linewidth=1, label="before the step")

    # titles
    axes.set(title="one step, from the same weights", xlabel="length of the step ‖Δθ‖ along −g")
    note = f"‖g‖ = {norm:.1f}, the largest gradient\nof the clipped run, at step {clipped.spike}"
    axes.text(0.98, 0.02, note, transform=axes.transAxes, ha="right", va="bottom", fontsize=8)
    axes.legend()
