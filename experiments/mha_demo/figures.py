"""Figures of multi-head attention."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from experiments.data.lookups import places_asked
from experiments.mha_demo.cases import CEILING, COLOURS, KEYS, QUESTIONS, SIZES, SLOTS, STEPS, Case, Found
from experiments.nn.attention_steps import AttentionSteps
from experiments.nn.lookup_net import LookupNet
from runner import figures
from runner.task import Run


def attention_maps(questions: Tensor, pages: dict[str, tuple[Tensor, Tensor]]) -> Figure:
    """A line per page, a heat map per head: maps (H, questions, S) and mean weights (H, 2) on what is asked."""
    S = questions.shape[1] // 2 - 1
    names = [chr(ord("A") + s % 26) for s in questions[0, 2 : 2 + S].tolist()]  # of the symbols, by slot
    places = places_asked(questions)  # (S, 2)
    rows = [f"{p + 1}? {names[s]}?" for p, s in places.tolist()]
    H = len(next(iter(pages.values()))[0])
    figure, grid = figures.new(len(pages), H, (max(6.4, 1.62 * H + 0.9), 5.2), sharex=True, sharey=True)
    for line, (title, (maps, looks)) in zip(grid, pages.items(), strict=True):
        for head, axes in enumerate(line):
            slots = [f"{i + 1}{name}" for i, name in enumerate(names)]
            image = figures.heat_map(axes, maps[head], rows, slots, limits=(0, 1))
            mark_places(axes, places)
            position, symbol = looks[head].tolist()
            axes.set_title(f"head {head + 1}\n○ {position:.2f}  □ {symbol:.2f}", fontsize=8)
            axes.tick_params(labelsize=6.5)
        line[0].set_ylabel(f"{title}\nquestion: slot? symbol?")
    for axes in grid[-1]:
        axes.set_xlabel("slot and its symbol", fontsize=8)
    figure.colorbar(image, ax=grid, label="attention weight", fraction=0.05, aspect=30)
    title = "Where each head looks\nnumbers: its mean weight on the two slots, over the test set"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.legend(grid[0, 0].lines, SLOTS, loc="outside lower center", ncols=2)
    return figure


def draw_steps(run: Run, case: Case, steps: AttentionSteps) -> None:
    """One page: a row of heat maps per head, a column per step; tensors of `steps` are (H, T, S or Dh)."""
    H, T, S = steps.scores.shape
    size = (2.9 * len(STEPS) + 0.6, max(1.6, 0.3 * T + 0.75) * H + 0.6)
    figure, grid = figures.new(H, len(STEPS), size)
    finite = steps.scaled.abs().max().item()
    limits = [None, (-finite, finite), (-finite, finite), (0.0, 1.0), None]
    legible = max(S, steps.output.shape[-1]) <= 8
    for head, line in enumerate(grid):
        for number, (axes, tensor) in enumerate(zip(line, steps, strict=True)):
            wide = number < 4
            figures.heat_map(
                axes,
                tensor[head],
                case.queries if number == 0 else [""] * T,
                case.source if wide else [str(c + 1) for c in range(tensor.shape[-1])],
                limits=limits[number],
                diverging=number != 3,
                numbers=legible,
                masked=case.blocked if number in (2, 3) else None,
            )
            if head == 0:
                masks = number != 2 or bool(case.blocked.any())
                axes.set_title(STEPS[number] if masks else "3 masked  nothing")
            if wide:
                axes.tick_params(axis="x", labelrotation=30)
            axes.tick_params(length=0)
        line[0].set_ylabel(f"head {head + 1}: query")
    for number, axes in enumerate(grid[-1]):
        axes.set_xlabel("key" if number < 4 else "component of the value")
    figure.suptitle(case.title, x=0.01, ha="left")
    run.figure(f"steps_{case.name}", figure)


PANELS = {
    "std": "standard deviation of the scores",
    "entropy": "entropy of the weights, nats",
    "largest": "largest weight",
    "gradient": "gradient of softmax ‖∂p/∂s‖",
}


def draw_scale(run: Run, raw: Found, scaled: Found, expected: Found, queries: int) -> None:
    """Each statistic over d_k: points are measured, lines predicted from normal scores of std √d_k and 1."""
    figure, grid = figures.new(1, len(PANELS), (14.0, 3.6))
    for axes, (name, title) in zip(grid.flat, PANELS.items(), strict=True):
        for found, colour, label in (
            (raw, figures.VERMILION, "q·k"),
            (scaled, figures.BLUE, "q·k / √$d_k$"),
        ):
            axes.plot(SIZES, [getattr(found[d], name) for d in SIZES], "o", color=colour, label=label)
        lines = (
            {d: getattr(expected[d], name) for d in SIZES} if name != "std" else {d: d**0.5 for d in SIZES}
        )
        axes.plot(
            SIZES, list(lines.values()), color=figures.VERMILION, linewidth=1, label="predicted: N(0, $d_k$)"
        )
        level = 1.0 if name == "std" else getattr(expected[1], name)
        axes.axhline(level, color=figures.BLUE, linewidth=1, label="predicted: N(0, 1)")
        axes.set_xscale("log", base=2)
        axes.set_xticks(SIZES, [str(d) for d in SIZES])
        axes.set(title=title, xlabel="$d_k$, components of a query")
        if name == "std":
            axes.set_yscale("log", base=2)
            axes.set_yticks((1, 2, 4, 8, 16, 32), ["1", "2", "4", "8", "16", "32"])
            axes.legend()
        else:
            axes.set_ylim(bottom=0)
    figure.suptitle(
        f"Why √$d_k$: {queries:,} random queries, {KEYS} keys each; undivided scores grow and softmax saturates",
        x=0.01,
        ha="left",
    )
    run.figure("scale", figure)


def table_scale(run: Run, raw: Found, scaled: Found, expected: Found) -> None:
    """The same as numbers, each beside its prediction."""
    header, rows = ["d_k"], []
    for label in ("q·k", "q·k/√d_k"):
        header += [f"{name} of {label}{what}" for name in PANELS for what in ("", ", predicted")]
    for d_k in SIZES:
        cells: list[float] = [d_k]
        for found, std, by in ((raw, d_k**0.5, d_k), (scaled, 1.0, 1)):
            for name in PANELS:
                cells += [getattr(found[d_k], name), std if name == "std" else getattr(expected[by], name)]
        rows.append(cells)
    run.table("scale", header, rows)


def answered(network: LookupNet, inputs: Tensor, targets: Tensor) -> Tensor:
    """Shares of test samples whose both answers, first answer, second answer are right: (3,) float64."""
    right = torch.stack([network(inputs).argmax(1), targets])  # (2, N): 2 v(p) + v(s)
    first, second = (right // 2).diff(dim=0)[0] == 0, (right % 2).diff(dim=0)[0] == 0
    return torch.stack([first & second, first, second]).double().mean(1)


def mark_places(axes: Axes, places: Tensor) -> None:
    """Rings on the slot at the position, squares on the slot with the symbol: places (questions, 2)."""
    for marker, colour, column in zip("os", COLOURS, places.T.tolist(), strict=True):
        axes.plot(column, range(len(column)), marker, ms=8, mew=1.6, mfc="none", color=colour)


def counted(name: str) -> str:
    """A network's name as people say it: 2 heads for heads_2."""
    number = name.removeprefix("heads_")
    return f"{number} head{'s' * (number != '1')}"


def draw_heads(run: Run, scores: dict[str, Tensor]) -> None:
    """What each number of heads answers, beside a guess and the most that one head can answer."""
    figure, grid = figures.new(1, 1, (7.6, 4.0))
    axes = grid[0, 0]
    for number, (label, colour) in enumerate(
        zip(("both values", *QUESTIONS), (figures.GREY, *COLOURS), strict=True)
    ):
        places = [place + 0.27 * (number - 1) for place in range(len(scores))]
        bars = axes.bar(places, [float(s[number]) for s in scores.values()], 0.25, color=colour, label=label)
        axes.bar_label(bars, fmt="%.3f", fontsize=7, padding=1)
    for level, text in ((0.25, "a guess\nat both"), (CEILING, "the most\nof one head,\nboth values")):
        axes.axhline(level, color=figures.INK, linestyle="--", linewidth=1)
        axes.text(len(scores) - 0.5, level + 0.01, text, fontsize=8, va="bottom")
    axes.set_xlim(-0.6, len(scores) + 0.1)
    axes.set_xticks(range(len(scores)), [counted(name) for name in scores])
    axes.set(title="test accuracy by number of heads, at the same width", ylim=(0, 1.08), ylabel="accuracy")
    axes.grid(visible=False, axis="x")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    run.figure("heads", figure)


def draw_ablation(run: Run, scores: dict[str, Tensor], alone: dict[str, list[Tensor]]) -> None:
    """By how much each answer's accuracy falls without each head."""
    widths = [len(found) + 0.6 for found in alone.values()]
    figure, grid = figures.new(
        1, len(alone), (0.62 * sum(widths) + 1.8, 3.6), sharey=True, width_ratios=widths
    )
    for axes, (name, without) in zip(grid.flat, alone.items(), strict=True):
        for number, colour in enumerate(COLOURS, start=1):
            places = [head + 1 + 0.38 * (number - 1.5) for head in range(len(without))]
            drops = [float(scores[name][number] - found[number]) for found in without]
            axes.bar(places, drops, 0.36, color=colour, label=QUESTIONS[number - 1])
        axes.set_title(counted(name))
        axes.set_xticks(range(1, len(without) + 1))
        axes.set_xlabel("head taken out")
        axes.set_xlim(0.4, len(without) + 0.6)
        axes.grid(visible=False, axis="x")
    grid[0, 0].set_ylabel("fall of the accuracy")
    figure.suptitle("What each head was for: how far the test accuracy falls without it", x=0.01, ha="left")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    run.figure("ablation", figure)


def table_heads(
    run: Run, scores: dict[str, Tensor], alone: dict[str, list[Tensor]], looks: dict[str, Tensor]
) -> None:
    """Where each head looks and what is answered without it."""
    header = ["network", "without head", "weight on the position's slot", "weight on the symbol's slot"]
    header += ["both right", *QUESTIONS, "fall of both", *(f"fall of {question}" for question in QUESTIONS)]
    rows: list[list[Any]] = []
    for name, whole in scores.items():
        rows.append([name, "none", "", "", *whole.tolist(), 0.0, 0.0, 0.0])
        for head, without in enumerate(alone[name]):
            falls = (whole - without).tolist()
            rows.append([name, head + 1, *looks[name][head].tolist(), *without.tolist(), *falls])
    run.table("heads", header, rows)
