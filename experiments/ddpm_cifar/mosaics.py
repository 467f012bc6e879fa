"""Sets of small images as figures and files: mosaics with labelled rows and columns, PNGs, an archive of numbers.

Images are uint8 (N, C, H, W), grey (C = 1) or colour (C = 3), on any device.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from runner import figures
from runner.errors import UserError
from runner.files import atomic_path

GAP = 2  # white pixels between two images
INCHES = 0.62  # of an image in a figure
LETTER = 0.085  # inches of a letter beside it
HEADLINE = 0.102  # inches of a letter of the title
PIXELS = 128  # that a small image is magnified to at least, so that an image viewer does not blur it


def to_bytes(x: Tensor) -> Tensor:
    """[−1, 1] → uint8, each to the nearest of the 256 values that a pixel has."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def mosaic(images: Tensor, columns: int, gap: int = GAP) -> Tensor:
    """(N, C, H, W) → (height, width, 3) uint8: row after row, white between them and where none is left."""
    N, _, H, W = images.shape
    rows = math.ceil(N / columns)
    coloured = images.cpu().expand(N, 3, H, W)
    framed = pad(coloured, (0, gap, 0, gap), value=255)
    empty = framed.new_full((rows * columns - N, *framed.shape[1:]), 255)
    cells = torch.cat((framed, empty)).view(rows, columns, 3, H + gap, W + gap)
    whole = cells.permute(0, 3, 1, 4, 2).reshape(rows * (H + gap), columns * (W + gap), 3)
    return whole[: whole.shape[0] - gap, : whole.shape[1] - gap]


def draw(
    axes: Axes,
    images: Tensor,
    columns: int,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
) -> AxesImage:
    """A mosaic on `axes`, with a label beside each row and above each column where they are given."""
    _, _, H, W = images.shape
    shown = axes.imshow(mosaic(images, columns).numpy())
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    axes.set_xticks([i * (W + GAP) + W / 2 for i in range(len(column_labels))], column_labels)
    axes.set_yticks([i * (H + GAP) + H / 2 for i in range(len(row_labels))], row_labels)
    return shown


def panels(
    parts: Sequence[tuple[str, Tensor, int, Sequence[str], Sequence[str]]], title: str, note: str = ""
) -> Figure:
    """Mosaics side by side, each (title, images, columns, row labels, column labels), and a line below them."""
    widths = [
        max(2.0, INCHES * columns + LETTER * max(map(len, row_labels), default=0))
        for _, _, columns, row_labels, _ in parts
    ]
    rows = max(math.ceil(len(images) / columns) for _, images, columns, _, _ in parts)
    above = 0.5 + 0.25 * any(heading for heading, *_ in parts) + 0.2 * any(len(part[4]) for part in parts)
    size = (
        max(sum(widths) + 0.2 * len(parts), HEADLINE * len(title)),
        INCHES * rows + above + 0.25 * bool(note),
    )
    figure, grid = figures.new(1, len(parts), size, width_ratios=widths)
    for axes, (heading, images, columns, row_labels, column_labels) in zip(grid.flat, parts, strict=True):
        draw(axes, images, columns, row_labels, column_labels)
        if heading:
            axes.set_title(heading, pad=18 if len(column_labels) else 6)
    figure.suptitle(title, x=0.01, ha="left")
    if note:
        figure.supxlabel(note, fontsize=8, color=figures.GREY, x=0.01, ha="left")
    return figure


def table_of_images(
    images: Tensor, row_labels: Sequence[str], column_labels: Sequence[str], title: str, note: str = ""
) -> Figure:
    """One mosaic, as many columns as labels; images (rows × columns, C, H, W), row after row."""
    return panels([("", images, len(column_labels), row_labels, column_labels)], title, note)


def grid(images: Tensor, title: str, columns: int = 8) -> Figure:
    """Images without labels."""
    return panels([("", images, columns, (), ())], title)


def moving(panes: dict[str, Tensor], columns: int) -> tuple[Figure, Callable[[int, str], None]]:
    """A figure of mosaics that change: panes (frames, N, C, H, W) by title, and what shows frame i under a title."""
    first = next(iter(panes.values()))
    rows = math.ceil(first.shape[1] / columns)
    size = (len(panes) * (INCHES * columns + 0.3), INCHES * rows + 0.9)
    figure, axes = figures.new(1, len(panes), size)
    shown = []
    for place, (heading, frames) in zip(axes.flat, panes.items(), strict=True):
        shown.append(draw(place, frames[0], columns))
        place.set_title(heading)
    headline = figure.suptitle(" ", x=0.01, ha="left")

    def show(frame: int, title: str) -> None:
        headline.set_text(title)
        for image, frames in zip(shown, panes.values(), strict=True):
            image.set_data(mosaic(frames[frame], columns).numpy())

    return figure, show


def magnified(images: Tensor) -> Tensor:
    """Small images with each pixel repeated, so that programs which smooth what they enlarge leave them be."""
    factor = max(1, PIXELS // images.shape[-1])
    return interpolate(images.float(), scale_factor=factor, mode="nearest").to(torch.uint8)


def png(pixels: np.ndarray) -> bytes:
    """(H, W, 3), (H, W, 1) or (H, W) uint8 as the bytes of a PNG file."""
    content = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(content, "PNG")
    return content.getvalue()


@contextlib.contextmanager
def room_for(folder: Path) -> Iterator[None]:
    """What goes wrong with the disk, in one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"Images cannot be written to {folder}: {error.strerror or error}.") from None


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file or folder that is whole or not there: given aside, and renamed to `path` at the end.

    Raises:
        UserError: the file system refuses; nothing is left.
    """
    with room_for(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as unfinished:
            yield unfinished


def write_images(folder: Path, images: Tensor, numbers: Sequence[int]) -> None:
    """Each image as NUMBER.png, of the pixels it has."""
    with whole(folder) as unfinished:
        unfinished.mkdir()
        for number, image in zip(numbers, images, strict=True):
            (unfinished / f"{number:06d}.png").write_bytes(png(image.permute(1, 2, 0).cpu().numpy()))


def write_archive(path: Path, images: Tensor) -> None:
    """The images as an `.npz` of one array, `arr_0`, uint8 (N, H, W, C), as guided-diffusion's evaluator reads it."""
    with whole(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, images.permute(0, 2, 3, 1).cpu().numpy())


def write_mosaic(path: Path, images: Tensor, columns: int) -> None:
    """The images as one PNG, magnified."""
    with whole(path) as unfinished:
        unfinished.write_bytes(png(mosaic(magnified(images), columns, gap=4).numpy()))
