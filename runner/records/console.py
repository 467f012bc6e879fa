"""The screen: log, live lines and tables."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

log = logging.getLogger("runner")
METRICS = ("loss", "accuracy", "precision", "recall", "f1")


def shown_path(path: Path) -> str:
    """Return the path as the screen shows it: relative to the current folder where it lies below it."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def metric_order(name: str) -> tuple[int, str]:
    """Sort metric names as people read them: loss, accuracy, precision, recall, f1, then the rest."""
    base = name.split(".")[0]
    rank = METRICS.index(base) if base in METRICS else len(METRICS)
    return rank, name


def markdown_table(header: list[str], rows: list[list[Any]]) -> str:
    """Format rows as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    cells = ((format_cell(cell).replace("|", r"\|") for cell in line) for line in lines)  # |x| is one cell
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def text_table(header: list[str], rows: list[list[Any]], left: int = 1) -> str:
    """Format rows in aligned columns: the first `left` columns to the left, the others to the right."""
    cells = [[format_cell(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["─" * width for width in widths])
    align = [str.ljust] * left + [str.rjust] * (len(header) - left)
    return "\n".join(
        "  ".join(put(cell, width) for put, cell, width in zip(align, row, widths, strict=True))
        for row in cells
    )


def format_cell(value: Any) -> str:
    """Format floats with four decimals, in scientific notation where four would hide the value; NaN and None as –."""
    if isinstance(value, float):
        small = value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e5)
        return "–" if math.isnan(value) else f"{value:.2e}" if small else f"{value:.4f}"
    return "–" if value is None else str(value)


def print_line(text: str) -> None:
    """Print on standard output, above the progress bar if there is one; a pipe or a file gets the line now."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


class _Screen(logging.Handler):
    """Print log records."""

    def emit(self, record: logging.LogRecord) -> None:
        print_line(self.format(record))


def live_line(total: int, initial: int, layout: str) -> tqdm:
    """Make a progress bar that vanishes when it is closed; it shows on a terminal alone (`disable=None`)."""
    options = {"disable": None, "dynamic_ncols": True, "leave": False, "bar_format": layout}
    return tqdm(total=total, initial=initial, **options)


def short_metrics(values: dict[str, float]) -> str:
    """Format a training step's metrics in less than 80 columns: loss and accuracy (variants share a name), speed."""
    shown = []
    for metric in ("loss", "accuracy"):
        texts = [format_cell(value) for name, value in values.items() if name.split(".")[0] == metric]
        if texts:
            shown.append(f"{metric} {'/'.join(texts)}")
    if "learning_rate" in values:
        shown.append(f"lr {values['learning_rate']:.3g}")
    if "samples_per_second" in values:
        shown.append(f"{values['samples_per_second']:,.0f}/s")
    return ", ".join(shown)


@contextlib.contextmanager
def logging_to(path: Path | None, screen: bool = True) -> Iterator[None]:
    """Send the runner's log to the screen and, where `path` is given, to that file as well."""
    # handlers
    handlers: list[logging.Handler] = [_Screen()] if screen else []
    if path is not None:
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False

    try:
        yield
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()
