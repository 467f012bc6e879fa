"""Figures of position encodings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from torch import Tensor

from experiments.nn.encoder import ENCODINGS
from experiments.nn.positions import AbsPosEncoding, RotaryPosEncoding, inverse_frequencies
from experiments.posenc_check import claims
from experiments.posenc_check.setups import (
    BASE,
    CLAIM_DIM,
    COLOURS,
    DTYPES,
    EXACT,
    ORDER,
    SENTENCE,
    STARTS,
    TABLE_LENGTH,
    TELL_APART,
    Accuracies,
    Reordered,
    short,
)
from runner import figures
from runner.task import Run


def draw_accuracies(axes: Axes, found: Accuracies) -> None:
    """A line per encoding over the settings in `found`, numbers or ranges such as 2–15, drawn in their middle."""
    ranges = [[float(end) for end in setting.split("–")] for setting in found]
    places = [(ends[0] + ends[-1]) / 2 for ends in ranges]
    for name in ENCODINGS:
        colour, heights = COLOURS[name], [values[name] for values in found.values()]
        axes.plot(places, heights, "o-", color=colour, label=name)
        lows, highs = [ends[0] for ends in ranges], [ends[-1] for ends in ranges]
        axes.hlines(heights, lows, highs, color=colour, linewidth=4, alpha=0.3)
    axes.set_xticks(places, list(found))
    axes.set_ylim(0, 1.04)


def accuracy(confusion: Tensor) -> float:
    """The share of counts (C, C) on the diagonal."""
    return float(confusion.diagonal().sum().double() / confusion.sum())


def draw_encoding(run: Run) -> None:
    """The table as a heat map, and four of its columns as waves."""
    D, L = CLAIM_DIM, 100
    table = AbsPosEncoding(D).table(L)
    figure, [[left, right]] = figures.new(1, 2, (11.0, 4.2), gridspec_kw={"width_ratios": (1.25, 1)})
    image = figures.heat_map(left, table, limits=(-1, 1), diverging=True)
    figure.colorbar(image, ax=left, pad=0.02)
    left.set(title="PE(p): fast waves left, slow ones right", xlabel="dimension (even: sin, odd: cos)")
    left.set_ylabel("position p")
    for number, (c, style) in enumerate({0: ".-", 8: "-", 16: "-", 32: "-"}.items()):  # dots are positions
        wavelength = float(2 * math.pi / inverse_frequencies(D)[c // 2])
        label = f"{c}, wavelength {wavelength:.3g}"
        right.plot(table[:, c], style, color=figures.PALETTE[number], label=label, linewidth=1.2)
    right.set(title="four of its dimensions", xlabel="position p", ylim=(-1.1, 1.6), yticks=(-1, 0, 1))
    right.legend(ncols=2, loc="upper center")
    run.figure("encoding_table", figure)


def draw_similarity(run: Run) -> None:
    """PE(p) · PE(q): a function of the distance alone."""
    D, L = CLAIM_DIM, 100
    table = AbsPosEncoding(D).table(L)
    similarity = table @ table.t() / (D / 2)
    figure, [[left, right]] = figures.new(1, 2, (10.4, 4.2), gridspec_kw={"width_ratios": (1.1, 1)})
    image = figures.heat_map(left, similarity)
    figure.colorbar(image, ax=left, pad=0.02)
    left.set(title="PE(p)·PE(q) over D/2: the same along each diagonal")
    left.set(xlabel="position q", ylabel="position p")
    for number, p in enumerate((0, 25, 50, 99)):
        right.plot(
            torch.arange(L) - p, similarity[p], color=figures.PALETTE[number], label=f"p = {p}", linewidth=1.2
        )
    right.set(title="rows as a function of the distance lie on each other", xlabel="distance q − p")
    right.legend()
    run.figure("encoding_similarity", figure)


def draw_wavelengths(run: Run) -> None:
    """2π/θ_i per pair, against lengths that matter."""
    theta = inverse_frequencies(CLAIM_DIM, BASE)
    waves = 2 * math.pi / theta
    figure, [[axes]] = figures.new(size=(6.8, 4.0))
    axes.plot(waves, "o", color=figures.BLUE)
    for length in (16, 512, TABLE_LENGTH):
        whole = int((waves <= length).sum())
        axes.axhline(length, color=figures.GREY, linewidth=1, linestyle=":")
        left = whole > len(waves) / 3  # room for a note where the points are not
        axes.annotate(
            f"{whole} of {len(waves)} pairs turn within {length:,} positions",
            (-0.5 if left else len(waves) - 0.5, length),
            (0, 3),
            textcoords="offset points",
            fontsize=8,
            ha="left" if left else "right",
        )
    axes.set(title="wavelengths in a geometric series, from 6 positions to 47,000")
    axes.set(
        xlabel=f"pair i of D/2 = {len(waves)}", ylabel=r"2π/$\theta_i$, positions per turn", yscale="log"
    )
    run.figure("wavelengths", figure)


HANDS = (0, 2, 4, 6)  # pairs of 32 dimensions: a turn in 6, 20, 63 and 199 positions
HANDS_DIM = 32
APART = 3  # positions between query and key in the animation


def unit_turns(positions: Tensor) -> Tensor:
    """Where the encoding takes (1, 0) of each pair: positions (L,) → (L, D/2, 2)."""
    x = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(len(positions), HANDS_DIM // 2)
    return claims.turn(RotaryPosEncoding(HANDS_DIM, BASE), x, positions).unflatten(1, (-1, 2))


def circle(axes: Axes, title: str) -> None:
    """A unit circle to draw on."""
    turn = torch.linspace(0, 2 * math.pi, 200)
    axes.plot(turn.cos(), turn.sin(), color=figures.FAINT, linewidth=1.5, zorder=0)
    axes.set(title=title, xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal", xticks=(), yticks=())
    axes.spines[["left", "bottom"]].set_visible(False)


def draw_rotation(run: Run) -> None:
    """One pair in the plane over positions, for four pairs; and the same as clocks that run."""
    L = 16
    points = unit_turns(torch.arange(L))
    figure, [row] = figures.new(1, len(HANDS), (12.0, 3.5))
    for axes, i in zip(row, HANDS, strict=True):
        theta = float(inverse_frequencies(HANDS_DIM, BASE)[i])
        circle(axes, f"pair {i}: θ = {theta:.3g}, a turn in {2 * math.pi / theta:.0f}")
        x, y = points[:, i].unbind(1)
        axes.plot(x, y, color=figures.GREY, linewidth=0.6)
        dots = axes.scatter(x, y, c=range(L), cmap="viridis", s=42, zorder=3)
        for p in (0, L - 1):
            axes.annotate(
                str(p), (1.14 * float(x[p]), 1.14 * float(y[p])), ha="center", va="center", fontsize=8
            )
    figure.colorbar(dots, ax=row, label="position p", pad=0.01)
    run.figure("rotation", figure)
    animate_rotation(run)


def animate_rotation(run: Run) -> None:
    """Left, a query and a key 3 positions apart turn together; right, four pairs as the hands of a clock."""
    frames = 20  # a whole turn of the pair on the left
    turns = unit_turns(torch.arange(frames + APART))
    figure, [[left, right]] = figures.new(1, 2, (7.2, 4.1), layout=None)
    figure.subplots_adjust(0.02, 0.09, 0.98, 0.92, wspace=0.08)
    circle(left, "")
    circle(right, "")
    shown = HANDS[1]
    query, key = (
        left.plot([], [], "o-", linewidth=2.5, markersize=6, color=colour, label=label)[0]
        for colour, label in ((figures.INK, "query, $R_m q$"), (figures.PURPLE, "key, $R_n k$"))
    )
    left.legend(loc="lower center", ncols=2, bbox_to_anchor=(0.5, -0.1))
    hands = [
        right.plot([], [], "o-", linewidth=2, markersize=4, color=figures.PALETTE[n], label=f"pair {i}")[0]
        for n, i in enumerate(HANDS)
    ]
    right.legend(loc="lower center", ncols=4, bbox_to_anchor=(0.5, -0.1), columnspacing=1, handlelength=1)

    def draw(p: int) -> None:
        for line, place in ((query, p + APART), (key, p)):
            point = turns[place, shown]
            line.set_data([0, float(point[0])], [0, float(point[1])])
        for hand, i in zip(hands, HANDS, strict=True):
            hand.set_data([0, float(turns[p, i, 0])], [0, float(turns[p, i, 1])])
        score = float(turns[p + APART, shown] @ turns[p, shown])
        left.set_title(f"pair {shown}, m = {p + APART:2d}, n = {p:2d}: score {score:.3f}")
        right.set_title(f"four pairs, position {p:2d}")

    run.animation("turning", figure, draw, frames, fps=6)


def draw_relative(run: Run, scores: Tensor, errors: dict[tuple[str, str], list[float]]) -> None:
    """Scores (S, W, W) of a window near and one far out, and how exact they are by dtype and dtype of the angles."""
    figure, [row] = figures.new(1, 3, (13.2, 4.2), gridspec_kw={"width_ratios": (1, 1, 1.25)})
    limit = float(scores.abs().max())
    for axes, window in zip(row, (0, -1), strict=False):
        start = STARTS[window]
        image = figures.heat_map(axes, scores[window], limits=(-limit, limit), diverging=True)
        axes.set(title=rf"$\langle R_m q, R_n k\rangle$, window at {start:,}")
        axes.set(xlabel=f"n − {start:,}" if start else "n", ylabel=f"m − {start:,}" if start else "m")
    figure.colorbar(image, ax=row[1], pad=0.02)
    colours = dict(zip(map(short, DTYPES), (figures.INK, figures.BLUE, figures.VERMILION), strict=True))
    for (dtype, angles), values in errors.items():
        style, label = "o-" if angles == "float64" else "x--", f"{dtype}, angles in {angles}"
        row[2].plot(range(len(STARTS)), values, style, color=colours[dtype], label=label)
    row[2].set_xticks(range(len(STARTS)), [f"{start:,}" for start in STARTS])
    row[2].set(title="what the score is off at most", xlabel="start of the window", yscale="log")
    row[2].set(ylabel="error / ‖q‖‖k‖", ylim=(1e-17, 1e4))
    row[2].legend(loc="upper left", ncols=2, fontsize=7)
    run.figure("relative_position", figure)


def draw_decay(run: Run) -> None:
    """The score over the distance: of a query that equals its key, and of two that are independent."""
    D, N, L = CLAIM_DIM, 200, 257
    rotary, distances = RotaryPosEncoding(D, BASE), torch.arange(L)
    q, k = torch.randn(2, N, D, dtype=torch.float64, generator=run.generator("decay"))
    alike = claims.scores_by_distance(rotary, q, q, distances)  # (N, L)
    independent = claims.scores_by_distance(rotary, q, k, distances)
    figure, [[left, right]] = figures.new(1, 2, (11.0, 4.0), sharey=True)
    for axes, scores, colour in ((left, alike, figures.BLUE), (right, independent, figures.VERMILION)):
        low, high = scores.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64), dim=0)
        axes.fill_between(distances, low, high, color=colour, alpha=0.2, label=f"90 % of {N} pairs")
        axes.plot(distances, scores.mean(0), color=colour, label="mean")
        axes.set_xlabel("distance m − n")
    left.plot(
        distances,
        claims.decay_bound(D, distances),
        color=figures.INK,
        linewidth=1,
        linestyle="--",
        label="shape of RoFormer's bound: mean $|S_j|$",
    )
    left.set(title="key = query: the score decays", ylabel=r"$\langle R_m q, R_n k\rangle$ / ‖q‖‖k‖")
    right.set(title="independent key and query: nothing decays")
    for axes in (left, right):
        axes.legend(loc="upper right")
    run.figure("rotary_decay", figure)


def draw_word_order(run: Run, setups: Sequence[Reordered]) -> None:
    """The outputs of both orders as rows, a line from each word to itself in the other order."""
    figure, grid = figures.new(2, 2, (11.0, 6.4))
    for axes, setup in zip(grid.flat, setups, strict=True):
        draw_reordered(axes, setup)
    figure.suptitle("我爱你 and 你爱我 through one attention layer with random weights", x=0.01, ha="left")
    run.figure("word_order", figure)


def draw_reordered(axes: Axes, setup: Reordered) -> None:
    """One panel: 我爱你 left, 你爱我 right, green lines between equal vectors, red ones between others."""
    L, D = setup.outputs.shape
    gap = D // 2
    space = torch.full((L, gap), math.nan, dtype=torch.float64)
    figures.heat_map(axes, torch.cat((setup.outputs, space, setup.reordered), 1), diverging=True)
    for place, word in enumerate(ORDER):
        difference = float(setup.tokens[word])
        equal = difference <= EXACT
        colour = figures.GREEN if equal else figures.VERMILION
        axes.plot((D - 0.4, D + gap - 0.6), (word, place), color=colour, linewidth=2)
        for x, y, side in ((-0.9, word, "right"), (2 * D + gap - 0.1, place, "left")):
            axes.text(x, y, SENTENCE[word], ha=side, va="center", fontsize=13)
        text = "=" if equal else f"≠ {difference:.2f}"
        axes.text(*(2 * D + gap + 2.2, place, text), color=colour, va="center", fontsize=9, fontweight="bold")
    axes.set(title=setup.title, xticks=(), yticks=(), xlim=(-2.5, 2 * D + gap + 7))
    axes.spines[["left", "bottom"]].set_visible(False)
    verdict = "the order is lost" if setup.pooled <= EXACT else "the order is seen"
    apart = f"{setup.pooled:.2f}" if setup.pooled > TELL_APART else f"{setup.pooled:.0e}"
    axes.set_xlabel(f"{verdict}: the means over the words are {apart} of a vector apart", loc="left")
