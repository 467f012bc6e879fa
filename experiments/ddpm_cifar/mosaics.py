"""Sets of small images as figures and files: mosaics with labelled rows and columns, PNGs, a NumPy archive.

Images are uint8 (N, C, H, W), grey (C = 1) or colour (C = 3), on any device.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from runner import figures
from runner.errors import UserError
from runner.files import atomic_path

_GAP = 2  # white pixels between two images
_INCHES = 0.62  # of an image in a figure
_LETTER = 0.085  # inches of a letter beside it
_TITLE_LETTER = 0.102  # inches of a letter of the title
_MIN_PIXELS = 128  # size that a small image is enlarged to, so that an image viewer does not blur it


class Panel(NamedTuple):
    """A mosaic in a figure: images (N, C, H, W), row after row, and the labels of its rows and columns."""

    images: Tensor
    columns: int
    row_labels: Sequence[str] = ()
    column_labels: Sequence[str] = ()
    title: str = ""


def to_bytes(x: Tensor) -> Tensor:
    """Convert [−1, 1] to uint8, each to the nearest of the 256 values that a pixel has."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _mosaic(images: Tensor, columns: int, gap: int = _GAP) -> Tensor:
    """Lay out images row after row as (height, width, 3) uint8, white between them and where none is left."""
    N, _, H, W = images.shape
    rows = math.ceil(N / columns)

    # white around each image, and white ones to fill the last row
    white = (0, gap, 0, gap, 0, 0, 0, rows * columns - N)
    cells = pad(images.cpu().expand(N, 3, H, W), white, value=255)

    # no gap at the right and below
    pixels = cells.view(rows, columns, 3, H + gap, W + gap).permute(0, 3, 1, 4, 2)
    pixels = pixels.reshape(rows * (H + gap), columns * (W + gap), 3)
    return pixels[: pixels.shape[0] - gap, : pixels.shape[1] - gap]


# figures


def panels(parts: Sequence[Panel], title: str) -> Figure:
    """Draw mosaics side by side."""
    # space for the images, the titles and the labels
    beside = [_LETTER * max(map(len, part.row_labels), default=0) for part in parts]
    widths = [max(2.0, _INCHES * part.columns + label) for part, label in zip(parts, beside, strict=True)]
    rows = max(math.ceil(len(part.images) / part.columns) for part in parts)
    above = 0.5 + 0.25 * any(part.title for part in parts) + 0.2 * any(part.column_labels for part in parts)
    width = max(sum(widths) + 0.2 * len(parts), _TITLE_LETTER * len(title))

    figure, axes = figures.new(1, len(parts), (width, _INCHES * rows + above), width_ratios=widths)
    for cell, part in zip(axes.flat, parts, strict=True):
        _draw(cell, part)
        if part.title:
            cell.set_title(part.title, pad=18 if part.column_labels else 6)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def table_of_images(
    images: Tensor, row_labels: Sequence[str], column_labels: Sequence[str], title: str
) -> Figure:
    """Draw one mosaic (rows × columns, C, H, W) with as many columns as labels."""
    return panels([Panel(images, len(column_labels), row_labels, column_labels)], title)


def moving(panes: dict[str, Tensor], columns: int) -> tuple[Figure, Callable[[int, str], None]]:
    """Return a figure of mosaics (frames, N, C, H, W) by title, and what shows frame i under a headline."""
    rows = math.ceil(next(iter(panes.values())).shape[1] / columns)
    size = (len(panes) * (_INCHES * columns + 0.3), _INCHES * rows + 0.9)
    figure, axes = figures.new(1, len(panes), size)

    # the first frame, whose images are exchanged later
    shown = []
    for cell, (title, frames) in zip(axes.flat, panes.items(), strict=True):
        shown.append(_draw(cell, Panel(frames[0], columns)))
        cell.set_title(title)
    headline = figure.suptitle(" ", x=0.01, ha="left")

    def show(frame: int, title: str) -> None:
        headline.set_text(title)
        for image, frames in zip(shown, panes.values(), strict=True):
            image.set_data(_mosaic(frames[frame], columns).numpy())

    return figure, show


def _draw(axes: Axes, panel: Panel) -> AxesImage:
    """Draw a mosaic, with a label beside each row and above each column where they are given."""
    _, _, H, W = panel.images.shape
    image = axes.imshow(_mosaic(panel.images, panel.columns).numpy())
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)

    # labels at the middle of each image
    rows, columns = panel.row_labels, panel.column_labels
    axes.set_xticks([i * (W + _GAP) + W / 2 for i in range(len(columns))], columns)
    axes.set_yticks([i * (H + _GAP) + H / 2 for i in range(len(rows))], rows)
    return image


# files


@contextlib.contextmanager
def atomic_output(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` at the end, a file or a folder.

    Raises:
        UserError: the file system refuses; nothing is left.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"could not write to {path.parent}: {error.strerror or error}") from None


def write_images(folder: Path, images: Tensor) -> None:
    """Write each image as NUMBER.png, pixel by pixel."""
    with atomic_output(folder) as temporary:
        temporary.mkdir()
        for number, image in enumerate(images):
            (temporary / f"{number:06d}.png").write_bytes(_png(image.permute(1, 2, 0).cpu().numpy()))


def write_archive(path: Path, images: Tensor) -> None:
    """Write images as an `.npz` of one array, `arr_0`, uint8 (N, H, W, C), as guided-diffusion reads it."""
    with atomic_output(path) as temporary, temporary.open("wb") as file:
        np.savez(file, images.permute(0, 2, 3, 1).cpu().numpy())


def write_mosaic(path: Path, images: Tensor) -> None:
    """Write images as one PNG, as many rows as columns; each pixel of small images is repeated."""
    factor = max(1, _MIN_PIXELS // images.shape[-1])
    enlarged = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    with atomic_output(path) as temporary:
        temporary.write_bytes(_png(_mosaic(enlarged, math.ceil(math.sqrt(len(images))), gap=4).numpy()))


def _png(pixels: np.ndarray[Any, Any]) -> bytes:
    """Encode uint8 (H, W, 3) or (H, W, 1)."""
    content = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(content, "PNG")
    return content.getvalue()
