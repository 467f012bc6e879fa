"""Figures of position encodings, and of how far the trained networks generalise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from torch import Tensor

from experiments.nn.encoder import ENCODINGS
from experiments.nn.positions import AbsPosEncoding, RotaryPosEncoding, inverse_frequencies
from experiments.posenc_check import claims, setups
from runner import figures
from runner.task import Run

_HANDS = (0, 2, 4, 6)  # pairs of 32 dimensions: a turn in 6, 20, 63 and 199 positions
_HANDS_DIM = 32
_APART = 3  # positions between query and key in the animation


def draw_encoding(run: Run) -> None:
    """Draw the table as a heat map, and four of its columns as waves; then PE(p) · PE(q) over the distance."""
    D, L = setups.CLAIM_DIM, 100
    table = AbsPosEncoding(D).table(L)
    figure, [[left, right]] = figures.new(1, 2, (11.0, 4.2), gridspec_kw={"width_ratios": (1.25, 1)})

    # the table
    image = figures.heat_map(left, table, limits=(-1, 1), diverging=True)
    figure.colorbar(image, ax=left, pad=0.02)
    left.set(title="PE(p): fast waves left, slow ones right", xlabel="dimension (even: sin, odd: cos)")
    left.set_ylabel("position p")

    # the waves; dots are positions
    for c in (0, 8, 16, 32):
        wavelength = float(2 * math.pi / inverse_frequencies(D)[c // 2])
        label = f"{c}, wavelength {wavelength:.3g}"
        right.plot(table[:, c], "-" if c else ".-", label=label, linewidth=1.2)
    right.set(title="four of its dimensions", xlabel="position p", ylim=(-1.1, 1.6), yticks=(-1, 0, 1))
    right.legend(ncols=2, loc="upper center")
    run.figure("encoding_table", figure)

    # all products
    similarity = table @ table.t() / (D / 2)  # (L, L)
    figure, [[left, right]] = figures.new(1, 2, (10.4, 4.2), gridspec_kw={"width_ratios": (1.1, 1)})
    image = figures.heat_map(left, similarity)
    figure.colorbar(image, ax=left, pad=0.02)
    left.set(title="PE(p)·PE(q) over D/2: the same along each diagonal")
    left.set(xlabel="position q", ylabel="position p")

    # four of their rows
    for p in (0, 25, 50, 99):
        right.plot(torch.arange(L) - p, similarity[p], label=f"p = {p}", linewidth=1.2)
    right.set(title="rows as a function of the distance lie on each other", xlabel="distance q − p")
    right.legend()
    run.figure("encoding_similarity", figure)


def draw_wavelengths(run: Run) -> None:
    """Draw the wavelength 2π/θ_i of each pair, and lengths to compare with."""
    waves = 2 * math.pi / inverse_frequencies(setups.CLAIM_DIM, setups.BASE)
    figure, [[axes]] = figures.new(size=(6.8, 4.0))
    axes.plot(waves, "o", color=figures.BLUE)

    # lengths, with a note where there are no points
    for length in (16, 512, setups.TABLE_LENGTH):
        whole = int((waves <= length).sum())
        axes.axhline(length, color=figures.GREY, linewidth=1, linestyle=":")
        left = whole > len(waves) / 3
        text = f"{whole} of {len(waves)} pairs turn within {length:,} positions"
        place, side = (-0.5 if left else len(waves) - 0.5, length), "left" if left else "right"
        axes.annotate(text, place, (0, 3), textcoords="offset points", fontsize=8, ha=side)

    axes.set(title="wavelengths in a geometric series, from 6 positions to 47,000", yscale="log")
    axes.set(xlabel=f"pair i of D/2 = {len(waves)}", ylabel=r"2π/$\theta_i$, positions per turn")
    run.figure("wavelengths", figure)


def _unit_vectors(positions: Tensor) -> Tensor:
    """Rotate (1, 0) of each pair to positions (L,), (L, D/2, 2)."""
    x = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(len(positions), _HANDS_DIM // 2)
    return claims.turn(RotaryPosEncoding(_HANDS_DIM, setups.BASE), x, positions).view(len(positions), -1, 2)


def _circle(axes: Axes, title: str) -> None:
    """Draw a unit circle."""
    turn = torch.linspace(0, 2 * math.pi, 200)
    axes.plot(turn.cos(), turn.sin(), color=figures.FAINT, linewidth=1.5, zorder=0)
    axes.set(title=title, xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal", xticks=(), yticks=())
    axes.spines[["left", "bottom"]].set_visible(False)


def draw_rotation(run: Run) -> None:
    """Draw four pairs over positions, each in its plane, and animate them."""
    L = 16
    points = _unit_vectors(torch.arange(L))
    figure, [row] = figures.new(1, len(_HANDS), (12.0, 3.5))

    # a panel per pair
    for axes, i in zip(row, _HANDS, strict=True):
        theta = float(inverse_frequencies(_HANDS_DIM, setups.BASE)[i])
        _circle(axes, f"pair {i}: θ = {theta:.3g}, a turn in {2 * math.pi / theta:.0f}")
        x, y = points[:, i].unbind(1)
        axes.plot(x, y, color=figures.GREY, linewidth=0.6)
        dots = axes.scatter(x, y, c=range(L), cmap="viridis", s=42, zorder=3)
        for p in (0, L - 1):
            axes.text(*(1.14 * points[p, i]).tolist(), str(p), ha="center", va="center", fontsize=8)

    figure.colorbar(dots, ax=row, label="position p", pad=0.01)
    run.figure("rotation", figure)
    _animate_rotation(run)


def _animate_rotation(run: Run) -> None:
    """Animate a query and a key 3 positions apart, left, and four pairs as the hands of a clock, right."""
    frames = 20  # a whole turn of the pair on the left
    turns = _unit_vectors(torch.arange(frames + _APART))
    figure, [[left, right]] = figures.new(1, 2, (7.2, 4.1), layout=None)
    figure.subplots_adjust(0.02, 0.09, 0.98, 0.92, wspace=0.08)

    # query and key
    _circle(left, "")
    shown = _HANDS[1]
    query, key = (
        left.plot([], [], "o-", linewidth=2.5, markersize=6, color=colour, label=label)[0]
        for colour, label in ((figures.INK, "query, $R_m q$"), (figures.PURPLE, "key, $R_n k$"))
    )
    left.legend(loc="lower center", ncols=2, bbox_to_anchor=(0.5, -0.1))

    # hands
    _circle(right, "")
    hands = [right.plot([], [], "o-", linewidth=2, label=f"pair {i}")[0] for i in _HANDS]
    right.legend(loc="lower center", ncols=4, bbox_to_anchor=(0.5, -0.1), columnspacing=1, handlelength=1)

    lines = [
        (query, _APART, shown),
        (key, 0, shown),
        *((hand, 0, i) for hand, i in zip(hands, _HANDS, strict=True)),
    ]

    def draw(p: int) -> None:
        for line, ahead, i in lines:
            x, y = turns[p + ahead, i].tolist()
            line.set_data([0, x], [0, y])
        score = float(turns[p + _APART, shown] @ turns[p, shown])
        left.set_title(f"pair {shown}, m = {p + _APART:2d}, n = {p:2d}: score {score:.3f}")
        right.set_title(f"four pairs, position {p:2d}")

    run.animation("turning", figure, draw, frames, fps=6)


def draw_relative(run: Run, scores: Tensor, errors: dict[tuple[str, str], list[float]]) -> None:
    """Draw scores (S, W, W) of a near and a far window, and their `errors` by dtype and dtype of the angles."""
    figure, [row] = figures.new(1, 3, (13.2, 4.2), gridspec_kw={"width_ratios": (1, 1, 1.25)})

    # scores
    limit = float(scores.abs().max())
    for axes, window in zip(row, (0, -1), strict=False):
        start = setups.STARTS[window]
        image = figures.heat_map(axes, scores[window], limits=(-limit, limit), diverging=True)
        axes.set(title=rf"$\langle R_m q, R_n k\rangle$, window at {start:,}")
        axes.set(xlabel=f"n − {start:,}" if start else "n", ylabel=f"m − {start:,}" if start else "m")
    figure.colorbar(image, ax=row[1], pad=0.02)

    # errors
    colours = {"float64": figures.INK, "float32": figures.BLUE, "bfloat16": figures.VERMILION}
    starts = [f"{start:,}" for start in setups.STARTS]
    for (dtype, angles), values in errors.items():
        style, label = "o-" if angles == "float64" else "x--", f"{dtype}, angles in {angles}"
        row[2].plot(starts, values, style, color=colours[dtype], label=label)
    row[2].set(title="what the score is off at most", xlabel="start of the window", yscale="log")
    row[2].set(ylabel="error / ‖q‖‖k‖", ylim=(1e-17, 1e4))
    row[2].legend(loc="upper left", ncols=2, fontsize=7)
    run.figure("relative_position", figure)


def draw_decay(run: Run) -> None:
    """Draw the score over the distance: of a query that equals its key, and of two that are independent."""
    # scores
    D, N, L = setups.CLAIM_DIM, 200, 257
    rotary, distances = RotaryPosEncoding(D, setups.BASE), torch.arange(L)
    q, k = torch.randn(2, N, D, dtype=torch.float64, generator=run.generator("decay"))
    alike = claims.scores_by_distance(rotary, q, q, distances)  # (N, L)
    independent = claims.scores_by_distance(rotary, q, k, distances)

    # mean and spread
    figure, [[left, right]] = figures.new(1, 2, (11.0, 4.0), sharey=True)
    for axes, scores, colour in ((left, alike, figures.BLUE), (right, independent, figures.VERMILION)):
        low, high = scores.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64), dim=0)
        axes.fill_between(distances, low, high, color=colour, alpha=0.2, label=f"90 % of {N} pairs")
        axes.plot(distances, scores.mean(0), color=colour, label="mean")
        axes.set_xlabel("distance m − n")

    # bound and titles
    bound, label = claims.decay_bound(D, distances), "shape of RoFormer's bound: mean $|S_j|$"
    left.plot(distances, bound, color=figures.INK, linewidth=1, linestyle="--", label=label)
    left.set(title="key = query: the score decays", ylabel=r"$\langle R_m q, R_n k\rangle$ / ‖q‖‖k‖")
    right.set(title="independent key and query: nothing decays")
    for axes in (left, right):
        axes.legend(loc="upper right")
    run.figure("rotary_decay", figure)


def draw_word_order(run: Run, reordered: Sequence[setups.Reordered]) -> None:
    """Draw the outputs of both orders as rows, with a line from each word to itself in the other order."""
    figure, grid = figures.new(2, 2, (11.0, 6.4))
    for axes, setup in zip(grid.flat, reordered, strict=True):
        # outputs: 我爱你 left, 你爱我 right
        L, D = setup.outputs.shape
        gap = D // 2
        space = torch.full((L, gap), math.nan, dtype=torch.float64)
        figures.heat_map(axes, torch.cat((setup.outputs, space, setup.reordered), 1), diverging=True)

        # a line per word: green between equal vectors, red between others
        for place, word in enumerate(setups.ORDER):
            difference = float(setup.tokens[word])
            equal = difference <= setups.EXACT
            colour, text = (figures.GREEN, "=") if equal else (figures.VERMILION, f"≠ {difference:.2f}")
            axes.plot((D - 0.4, D + gap - 0.6), (word, place), color=colour, linewidth=2)
            for x, y, side in ((-0.9, word, "right"), (2 * D + gap - 0.1, place, "left")):
                axes.text(x, y, setups.SENTENCE[word], ha=side, va="center", fontsize=13)
            axes.text(
                2 * D + gap + 2.2, place, text, color=colour, va="center", fontsize=9, fontweight="bold"
            )

        # verdict
        axes.set(title=setup.title, xticks=(), yticks=(), xlim=(-2.5, 2 * D + gap + 7))
        axes.spines[["left", "bottom"]].set_visible(False)
        verdict = "the order is lost" if setup.pooled <= setups.EXACT else "the order is seen"
        apart = f"{setup.pooled:.2f}" if setup.pooled > setups.TELL_APART else f"{setup.pooled:.0e}"
        axes.set_xlabel(f"{verdict}: the means over the words are {apart} of a vector apart", loc="left")

    figure.suptitle("我爱你 and 你爱我 through one attention layer with random weights", x=0.01, ha="left")
    run.figure("word_order", figure)


def draw_generalisation(run: Run, panels: dict[str, tuple[str, str, dict[str, dict[str, float]]]]) -> None:
    """Draw and tabulate accuracies by setting and encoding: a title, a label of the x-axis and values per name."""
    figure, [row] = figures.new(1, len(panels), (4.2 * len(panels), 4.0), sharey=True)
    for axes, (name, (title, label, accuracies)) in zip(row, panels.items(), strict=True):
        # settings are numbers, or ranges such as 2–15, which stand in their middle
        ranges = [[float(end) for end in setting.split("–")] for setting in accuracies]
        lows, highs = [ends[0] for ends in ranges], [ends[-1] for ends in ranges]
        places = [(low + high) / 2 for low, high in zip(lows, highs, strict=True)]

        # a line per encoding
        for colour, encoding in zip(figures.PALETTE, ENCODINGS, strict=False):
            heights = [values[encoding] for values in accuracies.values()]
            axes.plot(places, heights, "o-", color=colour, label=encoding)
            axes.hlines(heights, lows, highs, color=colour, linewidth=4, alpha=0.3)
        axes.set(title=title, xlabel=label, ylim=(0, 1.04))
        axes.set_xticks(places, list(accuracies))

        rows = [[setting, *(values[e] for e in ENCODINGS)] for setting, values in accuracies.items()]
        run.table(f"{name}_generalisation", [label, *ENCODINGS], rows)

    row[0].set_ylabel("accuracy")
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ENCODINGS))
    run.figure("length_generalisation", figure)
