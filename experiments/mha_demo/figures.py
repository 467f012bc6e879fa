"""Figures of multi-head attention, and the tables of their numbers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from experiments.data.lookups import places_asked
from experiments.mha_demo.cases import CEILING, KEYS, SIZES, Case, StatisticsBySize
from experiments.nn.attention_steps import AttentionSteps
from runner import figures
from runner.task import Run

_STEPS = ("1 scores  q·k", "2 scaled  ÷ √$d_k$", "3 masked", "4 weights  softmax", "5 output  Σ weight · v")
_QUESTIONS = ("the value at a position", "the value that a symbol marks")
_SLOTS = ("the slot at the position asked for", "the slot that has the symbol asked for")
_COLOURS = (figures.ORANGE, figures.PURPLE)  # of the two questions; to be seen on white and on blue
_STATISTICS = {
    "std": "standard deviation of the scores",
    "entropy": "entropy of the weights, nats",
    "largest": "largest weight",
    "gradient": "gradient of softmax ‖∂p/∂s‖",
}


# the five steps


def draw_steps(run: Run, case: Case, steps: AttentionSteps) -> None:
    """Draw a row of heat maps per head and a column per step; tensors of `steps` are (H, T, S or Dh)."""
    H, T, S = steps.scores.shape
    size = (2.9 * len(_STEPS) + 0.6, max(1.6, 0.3 * T + 0.75) * H + 0.6)
    figure, grid = figures.new(H, len(_STEPS), size)
    titles = list(_STEPS)
    if not case.blocked.any():
        titles[2] = "3 masked  nothing"

    # heat maps; scaled and masked scores share their colours
    finite = steps.scaled.abs().max().item()
    limits = [None, (-finite, finite), (-finite, finite), (0.0, 1.0), None]
    legible = max(S, steps.output.shape[-1]) <= 8
    for head, line in enumerate(grid):
        for number, (axes, tensor) in enumerate(zip(line, steps, strict=True)):
            by_key = number < 4
            figures.heat_map(
                axes,
                tensor[head],
                case.queries if number == 0 else [""] * T,
                case.source if by_key else [str(c + 1) for c in range(tensor.shape[-1])],
                limits=limits[number],
                diverging=number != 3,
                numbers=legible,
                masked=case.blocked if number in (2, 3) else None,
            )
            if by_key:
                axes.tick_params(axis="x", labelrotation=30)
            axes.tick_params(length=0)
        line[0].set_ylabel(f"head {head + 1}: query")

    # titles
    for number, (top, bottom) in enumerate(zip(grid[0], grid[-1], strict=True)):
        top.set_title(titles[number])
        bottom.set_xlabel("key" if number < 4 else "component of the value")
    figure.suptitle(case.title, x=0.01, ha="left")
    run.figure(f"steps_{case.name}", figure)


# why √d_k


def draw_scale(
    run: Run, raw: StatisticsBySize, scaled: StatisticsBySize, expected: StatisticsBySize, queries: int
) -> None:
    """Draw and tabulate statistics over d_k: points are measured, lines predicted from normal scores."""
    figure, grid = figures.new(1, len(_STATISTICS), (14.0, 3.6))
    for axes, (name, title) in zip(grid.flat, _STATISTICS.items(), strict=True):
        # measured
        shown = ((raw, figures.VERMILION, "q·k"), (scaled, figures.BLUE, "q·k / √$d_k$"))
        for measured, colour, label in shown:
            axes.plot(SIZES, [getattr(measured[d], name) for d in SIZES], "o", color=colour, label=label)

        # predicted
        line = [_predicted(expected, name, d) for d in SIZES]
        axes.plot(SIZES, line, color=figures.VERMILION, linewidth=1, label="predicted: N(0, $d_k$)")
        level = _predicted(expected, name, 1)
        axes.axhline(level, color=figures.BLUE, linewidth=1, label="predicted: N(0, 1)")

        # axes
        axes.set_xscale("log", base=2)
        axes.set_xticks(SIZES, [str(d) for d in SIZES])
        axes.set(title=title, xlabel="$d_k$, components of a query")
        if name == "std":
            axes.set_yscale("log", base=2)
            axes.set_yticks((1, 2, 4, 8, 16, 32), ["1", "2", "4", "8", "16", "32"])
            axes.legend()
        else:
            axes.set_ylim(bottom=0)

    title = f"Why √$d_k$: {queries:,} random queries, {KEYS} keys each; undivided scores grow and softmax saturates"
    figure.suptitle(title, x=0.01, ha="left")
    run.figure("scale", figure)

    # the same as numbers, each beside its prediction
    header, rows = ["d_k"], []
    for scores in ("q·k", "q·k/√d_k"):
        header += [f"{name} of {scores}{end}" for name in _STATISTICS for end in ("", ", predicted")]
    for d_k in SIZES:
        cells: list[float] = [d_k]
        for measured, variance in ((raw, d_k), (scaled, 1)):
            for name in _STATISTICS:
                cells += [getattr(measured[d_k], name), _predicted(expected, name, variance)]
        rows.append(cells)
    run.table("scale", header, rows)


def _predicted(expected: StatisticsBySize, name: str, variance: int) -> float:
    return variance**0.5 if name == "std" else float(getattr(expected[variance], name))


# what heads are for


def draw_attention(run: Run, name: str, questions: Tensor, rows: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Draw the attention of network `name` to `questions` (S, 2 + 2S): a row per title, a heat map per head.

    `rows` holds maps (H, questions, S) and each head's mean weight on the two slots that are asked for, (H, 2).
    """
    # names of the symbols by slot, and of the questions
    S = questions.shape[1] // 2 - 1
    symbols = [chr(ord("A") + s % 26) for s in questions[0, 2 : 2 + S].tolist()]
    places = places_asked(questions)  # (S, 2)
    asked = [f"{p + 1}? {symbols[s]}?" for p, s in places.tolist()]
    slots = [f"{i + 1}{symbol}" for i, symbol in enumerate(symbols)]

    # heat maps
    H = len(next(iter(rows.values()))[0])
    figure, grid = figures.new(len(rows), H, (max(6.4, 1.62 * H + 0.9), 5.2), sharex=True, sharey=True)
    for line, (title, (maps, mean_weights)) in zip(grid, rows.items(), strict=True):
        for head, axes in enumerate(line):
            image = figures.heat_map(axes, maps[head], asked, slots, limits=(0, 1))
            for marker, colour, column in zip("os", _COLOURS, places.T.tolist(), strict=True):
                axes.plot(column, range(S), marker, ms=8, mew=1.6, mfc="none", color=colour)
            position, symbol = mean_weights[head].tolist()
            axes.set_title(f"head {head + 1}\n○ {position:.2f}  □ {symbol:.2f}", fontsize=8)
            axes.tick_params(labelsize=6.5)
        line[0].set_ylabel(f"{title}\nquestion: slot? symbol?")

    # titles
    for axes in grid[-1]:
        axes.set_xlabel("slot and its symbol", fontsize=8)
    figure.colorbar(image, ax=grid, label="attention weight", fraction=0.05, aspect=30)
    title = "Where each head looks\nnumbers: its mean weight on the two slots, over the test set"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.legend(grid[0, 0].lines, _SLOTS, loc="outside lower center", ncols=2)
    run.figure(f"attention_{name}", figure)


def draw_heads(run: Run, shares: dict[str, Tensor]) -> None:
    """Draw the accuracy by number of heads, beside a guess and the most that one head can answer."""
    figure, [[axes]] = figures.new(1, 1, (7.6, 4.0))

    # bars
    answers = zip(("both values", *_QUESTIONS), (figures.GREY, *_COLOURS), strict=True)
    for number, (label, colour) in enumerate(answers):
        places = [place + 0.27 * (number - 1) for place in range(len(shares))]
        heights = [float(share[number]) for share in shares.values()]
        bars = axes.bar(places, heights, 0.25, color=colour, label=label)
        axes.bar_label(bars, fmt="%.3f", fontsize=7, padding=1)

    # levels to compare with
    for level, text in ((0.25, "a guess\nat both"), (CEILING, "the most\nof one head,\nboth values")):
        axes.axhline(level, color=figures.INK, linestyle="--", linewidth=1)
        axes.text(len(shares) - 0.5, level + 0.01, text, fontsize=8, va="bottom")

    # axes
    axes.set_xlim(-0.6, len(shares) + 0.1)
    axes.set_xticks(range(len(shares)), [_in_words(name) for name in shares])
    axes.set(title="test accuracy by number of heads, at the same width", ylim=(0, 1.08), ylabel="accuracy")
    axes.grid(visible=False, axis="x")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    run.figure("heads", figure)


def _in_words(name: str) -> str:
    """Return 2 heads for heads_2."""
    number = name.removeprefix("heads_")
    return f"{number} head{'s' * (number != '1')}"


def draw_ablation(run: Run, shares: dict[str, Tensor], ablated: dict[str, list[Tensor]]) -> None:
    """Draw by how much each answer's accuracy falls without each head."""
    widths = [len(heads) + 0.6 for heads in ablated.values()]
    size = (0.62 * sum(widths) + 1.8, 3.6)
    figure, grid = figures.new(1, len(ablated), size, sharey=True, width_ratios=widths)

    # a panel per network
    for axes, (name, without) in zip(grid.flat, ablated.items(), strict=True):
        for number, colour in enumerate(_COLOURS, start=1):
            places = [head + 1 + 0.38 * (number - 1.5) for head in range(len(without))]
            falls = [float(shares[name][number] - share[number]) for share in without]
            axes.bar(places, falls, 0.36, color=colour, label=_QUESTIONS[number - 1])
        axes.set_title(_in_words(name))
        axes.set_xticks(range(1, len(without) + 1))
        axes.set_xlabel("head taken out")
        axes.set_xlim(0.4, len(without) + 0.6)
        axes.grid(visible=False, axis="x")

    # titles
    grid[0, 0].set_ylabel("fall of the accuracy")
    figure.suptitle("What each head was for: how far the test accuracy falls without it", x=0.01, ha="left")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    run.figure("ablation", figure)


def table_heads(
    run: Run, shares: dict[str, Tensor], ablated: dict[str, list[Tensor]], mean_weights: dict[str, Tensor]
) -> None:
    """Write each head's mean weight on the two slots, and what is answered without it."""
    header = ["network", "without head", "weight on the position's slot", "weight on the symbol's slot"]
    header += ["both right", *_QUESTIONS, "fall of both", *(f"fall of {question}" for question in _QUESTIONS)]

    rows: list[list[Any]] = []
    for name, share in shares.items():
        rows.append([name, "none", "", "", *share.tolist(), 0.0, 0.0, 0.0])
        for head, without in enumerate(ablated[name]):
            falls = (share - without).tolist()
            rows.append([name, head + 1, *mean_weights[name][head].tolist(), *without.tolist(), *falls])
    run.table("heads", header, rows)
