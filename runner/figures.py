"""The house style, and figures that several experiments draw.

Every figure is made by `new` and saved by `save`, through matplotlib's object interface: no window opens and a
caller's own figures stay untouched. Draw by hand inside `style()`; the engine calls a task's hooks inside it.
Text may be in any language that the fonts below hold.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import font_manager, rcsetup
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from runner.files import replace_file
from runner.records.console import METRICS

FONT = Path(__file__).parent / "fonts" / "DroidSansFallback-subset.ttf"
# for characters that are rarer than those of FONT, where a machine has them
RARE = ("Noto Sans CJK SC", "Source Han Sans SC", "PingFang SC", "Microsoft YaHei")

# Okabe & Ito 2008: distinguishable with every kind of colour vision
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
PALETTE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)
INK, GREY, FAINT = "#222222", "#8A8A8A", "#E6E6E6"
SPLIT_COLOURS = {"train": BLUE, "val": VERMILION}
# what else the rows of a run hold
_NO_METRICS = {"step", "epoch", "split", "learning_rate", "grad_norm", "grad_norm_clipped", "ema_decay"}
_NO_METRICS |= {"samples_per_second", "utilisation"}
_NUMBERED = 30  # classes in a picture that has their numbers; more would be too small, and slow to draw


@cache
def _font_families() -> list[str]:
    """Add our font, once, and return the families to look for a character in, matplotlib's own first."""
    fonts = font_manager.fontManager
    fonts.addfont(FONT)
    ours = next(entry for entry in fonts.ttflist if entry.fname == str(FONT))
    fonts.ttflist.append(replace(ours, weight=700))  # it serves for bold too, without a warning each time
    installed = {entry.name for entry in fonts.ttflist}
    return ["DejaVu Sans", ours.name, *(name for name in RARE if name in installed)]


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Apply the house style to the figures that are made inside."""
    with mpl.rc_context():
        # the figure, and its text
        mpl.rc("figure", dpi=100, titlesize=12, titleweight="bold")
        mpl.rc("figure.constrained_layout", h_pad=0.08, w_pad=0.08)
        mpl.rc("savefig", dpi=150)
        mpl.rc("font", family=_font_families(), size=9)
        mpl.rc("text", color=INK)

        # axes; without titley every tick label is measured to see whether the title is in its way
        mpl.rc("axes", titlesize=10, titleweight="bold", titlelocation="left", titley=1.0, labelsize=9)
        mpl.rc("axes", edgecolor=GREY, labelcolor=INK, grid=True, axisbelow=True)
        mpl.rc("axes", prop_cycle=rcsetup.cycler(color=PALETTE))
        mpl.rc("axes.spines", top=False, right=False)
        mpl.rc("grid", color=FAINT, linewidth=0.8)
        mpl.rc("xtick", color=INK, labelsize=8)
        mpl.rc("ytick", color=INK, labelsize=8)

        # what they show
        mpl.rc("lines", linewidth=1.6, markersize=4)
        mpl.rc("image", interpolation="nearest")
        mpl.rc("legend", frameon=False, fontsize=8)
        yield


def new(
    rows: int = 1,
    columns: int = 1,
    size: tuple[float, float] = (6.4, 4.0),
    layout: Literal["constrained"] | None = "constrained",
    **options: Any,
) -> tuple[Figure, np.ndarray]:
    """Make a figure of `size` inches and its axes, (rows, columns); `options` go to `Figure.subplots`."""
    with style():
        figure = Figure(figsize=size, layout=layout)
        FigureCanvasAgg(figure)
        return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure: Figure, path: Path) -> None:
    """Write the figure as PNG, in one step: a reader never sees half a file."""
    content = io.BytesIO()
    with style():
        figure.savefig(content, format="png")
    replace_file(path, content.getvalue())


def save_animation(figure: Figure, draw: Callable[[int], object], frames: int, fps: int, path: Path) -> None:
    """Write frames 0 … `frames` − 1 as a GIF that plays for ever: `draw(i)` makes the figure show frame i."""
    writer = PillowWriter(fps=fps)
    with style(), TemporaryDirectory() as folder:  # matplotlib writes nowhere but to a path
        frame_file = Path(folder) / path.name
        figure.canvas.draw()
        figure.set_layout_engine("none")  # it would move the axes from frame to frame
        with writer.saving(figure, str(frame_file), dpi=80):
            for number in range(frames):
                draw(number)
                writer.grab_frame()
        replace_file(path, frame_file.read_bytes())


@style()
def curves(history: Sequence[dict[str, Any]], title: str) -> Figure:
    """Draw loss and metrics over epochs on train (faint) and val (strong), a panel each; a colour per variant.

    `history` holds rows with step, epoch, split and metrics, as `metrics.csv` has them.
    """
    # the usual metrics, the experiment's own, then the learning rate
    names = (name.split(".")[0] for row in history if row["split"] in SPLIT_COLOURS for name in row)
    measured = [name for name in dict.fromkeys(names) if name not in _NO_METRICS]
    own = [name for name in measured if name not in METRICS]
    shown = [name for name in METRICS if name in measured] + own or ["loss"]
    if any("learning_rate" in row for row in history):
        shown.append("learning_rate")

    # fixed margins: a constrained layout takes half of the time, and this is drawn at every evaluation
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    size = (3.6 * columns, 2.7 * rows + 0.4)
    figure, grid = new(rows, columns, size, layout=None)
    figure.subplots_adjust(
        0.55 / size[0], 0.5 / size[1], 1 - 0.15 / size[0], 1 - 0.7 / size[1], wspace=0.2, hspace=0.45
    )

    # panels
    for axes, metric in zip(grid.flat, shown, strict=False):
        _curve_panel(axes, history, metric)
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    figure.suptitle(title, x=0.01, ha="left")

    # one legend for all panels: in the first, or above them all where there are variants
    lines, labels = grid[0, 0].get_legend_handles_labels()
    if len(lines) > len(SPLIT_COLOURS):
        by_label = dict(zip(labels, lines, strict=True))
        strong = {label.removesuffix(" val"): by_label[label] for label in labels if label.endswith(" val")}
        legend = figure.legend(
            strong.values(), strong, loc="upper right", ncols=len(strong), alignment="right"
        )
        legend.set_title("val; train is fainter")
    elif lines:
        grid[0, 0].legend()
    return figure


def _curve_panel(axes: Axes, history: Sequence[dict[str, Any]], metric: str) -> None:
    # a line per variant and split
    names = dict.fromkeys(name for row in history for name in row if name.split(".")[0] == metric)
    variants = len(names) > 1
    for number, name in enumerate(names):
        for split, colour in SPLIT_COLOURS.items():
            points = [(row["epoch"], row[name]) for row in history if row["split"] == split and name in row]
            if not points:
                continue
            axes.plot(
                *zip(*points, strict=True),
                color=PALETTE[number % len(PALETTE)] if variants else colour,
                alpha=0.45 if split == "train" and variants else 1.0,
                linewidth=1.0 if split == "train" else 1.8,
                marker="o" if split == "val" and len(points) < 40 else None,
                markersize=3,
                label=f"{name.partition('.')[2]} {split}".strip(),
            )

    # limits without the untrained network, whose point would press all others into a line
    trained = [row[name] for row in history for name in names if row["epoch"] > 0 and name in row]
    low, high = min(trained, default=0.0), max(trained, default=1.0)
    if math.isfinite(low) and low < high < math.inf:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))

    axes.set_title("F1" if metric == "f1" else metric.replace("_", " "))
    axes.set_xlabel("epoch")
    axes.locator_params(nbins=5)


@style()
def image_grids(
    panels: dict[str, Tensor], captions: Sequence[Sequence[tuple[str, str]]], columns: int = 4
) -> Figure:
    """Draw images side by side: one panel per title with (N, H, W), (N, 1, H, W) or, in colour, (N, 3, H, W).

    `captions` holds, per panel and image, a text of up to two lines and its colour.
    """
    rows = math.ceil(len(next(iter(panels.values()))) / columns)
    figure = Figure((1.35 * len(panels) * columns, 1.5 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)

    # a panel per title, with a caption per image
    parts = figure.subfigures(1, len(panels), squeeze=False, wspace=0.04).flat
    for part, (title, images), texts in zip(parts, panels.items(), captions, strict=True):
        part.suptitle(title, x=0.02, ha="left")
        grid = part.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, image, (text, colour) in zip(grid.flat, images, texts, strict=False):
            axes.imshow(_pixels(image), cmap="gray_r")
            axes.set_title(text, fontsize=8.5, color=colour, fontweight="normal", loc="center", pad=3)
    return figure


def are_images(inputs: Tensor) -> bool:
    """Return whether samples are images: bytes (N, H, W), or (N, 1, H, W) and (N, 3, H, W) of any type."""
    return (inputs.ndim == 3 and inputs.dtype == torch.uint8) or (
        inputs.ndim == 4 and inputs.shape[1] in (1, 3)
    )


def label_caption(names: Sequence[str], prediction: int, target: int, certainty: str = "") -> tuple[str, str]:
    """Return the predicted and the true label of an image, and the colour that says whether they agree."""
    right = prediction == target
    return f"{names[prediction]}{certainty}\n" + (
        "" if right else f"is {names[target]}"
    ), GREEN if right else VERMILION


def _pixels(image: Tensor) -> np.ndarray:
    """Return an image as matplotlib takes it: (H, W), or (H, W, 3) from 0 to 1."""
    pixels: np.ndarray = (image if image.ndim == 2 else image.movedim(0, -1).squeeze(-1)).cpu().numpy()
    if pixels.ndim == 2 or pixels.dtype == np.uint8:
        return pixels
    low, high = pixels.min(), pixels.max()
    return np.asarray((pixels - low) / (high - low or 1))


def heat_map(
    axes: Axes,
    matrix: Tensor,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    limits: tuple[float, float] | None = None,
    diverging: bool = False,
    numbers: bool = False,
    masked: Tensor | None = None,
) -> AxesImage:
    """Draw a matrix (R, C) as colours, with labels per row and column; return the image, for a colour bar.

    `limits` are the values of the first and last colour (default: the finite values' own); `diverging` takes
    red and blue around zero. `numbers` writes each value. Cells where `masked` (R, C) is True are hatched.
    """
    # colours
    values = matrix.detach().double().cpu().numpy()
    finite = values[np.isfinite(values)]
    low, high = limits or ((finite.min(), finite.max()) if len(finite) else (0.0, 1.0))
    if diverging and limits is None:
        high = max(abs(low), abs(high)) or 1.0
        low = -high
    colours = "RdBu_r" if diverging else "Blues"
    image = axes.imshow(np.ma.masked_invalid(values), colours, vmin=low, vmax=high, aspect="auto")
    axes.grid(False)

    # masked cells, and the numbers of the others
    hidden = np.zeros(values.shape, bool) if masked is None else masked.cpu().numpy()
    for row, column in np.argwhere(hidden):
        corner = (column - 0.5, row - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, facecolor=FAINT, edgecolor=GREY, hatch="////", linewidth=0))
    for row, column in np.argwhere(~hidden) if numbers else ():
        value = values[row, column]
        colour = text_colour(image, float(value)) if np.isfinite(value) else INK
        text = "−∞" if value == -np.inf else f"{value:.2f}".replace("-", "−")
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)

    # labels, or whole numbers of rows and columns
    for axis, labels in ((axes.xaxis, columns), (axes.yaxis, rows)):
        if labels is not None:
            axis.set_ticks(range(len(labels)), labels)
        else:
            axis.set_major_locator(MaxNLocator("auto", integer=True))
    return image


def text_colour(image: AxesImage, value: float) -> str:
    """Return the colour of text on the image's colour of `value`: white where that is dark (ITU-R BT.601)."""
    red, green, blue, _ = image.to_rgba(np.array(value))
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else INK


@style()
def confusion_matrices(panels: dict[str, Tensor], class_names: Sequence[str]) -> Figure:
    """Draw counts (C, C) side by side, rows the true class; colour and number are the share of the row."""
    # cells become smaller where there are many classes
    C = len(class_names)
    cell = min(0.42, 12 / C)
    side = max(1.6 + cell * C, 3.2)
    figure, grid = new(1, len(panels), (side * len(panels), side))

    for axes, (title, counts) in zip(grid.flat, panels.items(), strict=True):
        # each cell's share of its row
        share = (counts.double() / counts.sum(1, keepdim=True).clamp(min=1)).cpu().numpy()
        image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axes.grid(False)
        for row, column in np.argwhere(share >= 0.01) if C <= _NUMBERED else ():
            text, colour = f"{100 * share[row, column]:.0f}", text_colour(image, share[row, column])
            axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)

        # classes
        size = min(8, 60 * cell)
        axes.set_xticks(range(C), class_names, rotation=45, ha="right", rotation_mode="anchor", fontsize=size)
        axes.set_yticks(range(C), class_names, fontsize=size)
        axes.set(title=title, xlabel="predicted class", ylabel="true class (row: 100 %)")
    return figure


@style()
def per_class_scores(tables: dict[str, dict[str, Tensor]], class_names: Sequence[str]) -> Figure:
    """Draw scores (C,) of each class, one panel per score: a dot per table, the last one's with its value.

    What was `before training` is grey, and blue what became of it.
    """
    last = list(tables)[-1]
    names = [name for name in tables[last] if name != "support"]
    C = len(class_names)
    figure, grid = new(1, len(names), (3.2 * len(names) + 0.8, 0.34 * C + 1.2), sharey=True)
    places = np.arange(C)
    colours = [GREY, BLUE] if "before training" in tables else list(PALETTE)

    for axes, name in zip(grid.flat, names, strict=True):
        # a dot per table, and a line from the lowest to the highest
        values = np.stack([table[name].cpu().numpy() for table in tables.values()])  # (tables, C)
        axes.hlines(places, values.min(0), values.max(0), color=FAINT, linewidth=3, zorder=1)
        for number, (label, row) in enumerate(zip(tables, values, strict=True)):
            axes.plot(row, places, "o", color=colours[number % len(colours)], label=label, clip_on=False)

        # the last value, and the classes
        offset = {"xytext": (0, 5), "textcoords": "offset points"}
        for place, value in zip(places, values[-1], strict=True) if C <= _NUMBERED else ():
            axes.annotate(f"{value:.2f}", (value, place), **offset, ha="center", fontsize=7)
        axes.set(title=name.upper() if name == "f1" else name, xlim=(-0.02, 1.02))
        axes.set_yticks(places, class_names)
        axes.set_ylim(C - 0.5, -0.7)

    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(tables))
    return figure
