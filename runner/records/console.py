"""The screen: log, live lines and tables."""

from __future__ import annotations

import contextlib
import logging
import math
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

log = logging.getLogger("runner")
_FIRST_METRICS = ("loss", "accuracy", "precision", "recall", "f1")


def shown_path(path: Path) -> str:
    """Return the path as the screen shows it: relative to the current folder where it lies below it."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def quote(path: Path) -> str:
    """Return the path as it is typed in a shell."""
    return shlex.quote(shown_path(path))


def metric_order(name: str) -> tuple[int, str]:
    """Sort metric names as people read them: loss, accuracy, precision, recall, f1, then the rest."""
    base = name.split(".")[0]
    rank = _FIRST_METRICS.index(base) if base in _FIRST_METRICS else len(_FIRST_METRICS)
    return rank, name


def markdown_table(header: list[str], rows: list[list[Any]]) -> str:
    """Format rows as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    cells = ((format_cell(cell).replace("|", r"\|") for cell in line) for line in lines)  # |x| is one cell
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def text_table(header: list[str], rows: list[list[Any]], left: int = 1) -> str:
    """Format rows in aligned columns: the first `left` columns to the left, the others to the right."""
    cells = [[format_cell(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("─" * width for width in widths), *lines[1:]])


def format_cell(value: Any) -> str:
    """Format floats with four decimals, in scientific notation where four would hide the value; NaN and None as –."""
    if isinstance(value, float):
        small = value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e5)
        return "–" if math.isnan(value) else f"{value:.2e}" if small else f"{value:.4f}"
    return "–" if value is None else str(value)


class _Screen(logging.Handler):
    """Print log records on standard output, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()  # a pipe or a file gets the line now


def live_line(total: int, initial: int, layout: str) -> tqdm:
    """Make a progress bar that vanishes when it is closed; it shows on a terminal alone."""
    return tqdm(
        total=total,
        initial=initial,
        disable=None,  # tqdm's value for: only on a terminal
        dynamic_ncols=True,
        leave=False,
        bar_format=layout,
    )


class Bar:
    """The progress bar of a training run."""

    def __init__(self, total: int, initial: int):
        layout = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt}, {remaining} left{postfix}"
        self.bar = live_line(total, initial, layout)

    def advance(self) -> None:
        """Count one step."""
        self.bar.update()

    def show(self, values: dict[str, float]) -> None:
        """Show the latest metrics behind the bar."""
        self.bar.set_postfix_str(_short_metrics(values))

    def close(self) -> None:
        self.bar.close()


def _short_metrics(values: dict[str, float]) -> str:
    """Format a step's metrics in less than 80 columns; variants share a name."""
    # loss and accuracy, one value per variant
    grouped: dict[str, list[str]] = {}
    for name, value in values.items():
        metric = name.split(".")[0]
        if metric in ("loss", "accuracy"):
            grouped.setdefault(metric, []).append(format_cell(value))
    shown = [f"{metric} {'/'.join(texts)}" for metric, texts in grouped.items()]

    if "learning_rate" in values:
        shown.append(f"lr {values['learning_rate']:.3g}")
    if "samples_per_second" in values:
        shown.append(f"{values['samples_per_second']:,.0f}/s")
    return ", ".join(shown)


@contextlib.contextmanager
def logging_to(path: Path | None, screen: bool = True) -> Iterator[None]:
    """Send the runner's log to the screen and, where `path` is given, to that file as well."""
    # attach
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

    # detach
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()
