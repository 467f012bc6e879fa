"""What a run leaves to look at: TensorBoard, `metrics.csv`, figures, tables, the screen and `run.log`."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import math
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from runner import figures
from runner.checkpoint import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from tensorboard.compat.proto.summary_pb2 import Summary

log = logging.getLogger("runner")
FIRST_COLUMNS = ("step", "epoch", "split")


class Tracker:
    """One run's records. Without a folder (another rank's, or before there is one) it keeps the history only.

    `resumed_at` is the step of the checkpoint that a run goes on from: what was logged after it is cut.
    """

    def __init__(self, folder: Path | None = None, resumed_at: int | None = None):
        self.folder = folder
        self.history: list[dict[str, Any]] = []
        self.columns: list[str] = list(FIRST_COLUMNS)
        self.writer: SummaryWriter | None = None
        if folder is None:
            return
        if resumed_at is not None and self.metrics_file.exists():
            self.history = [row for row in read_metrics(self.metrics_file) if row["step"] <= resumed_at]
            self._add_columns(name for row in self.history for name in row)
            self._rewrite()
        self.writer = SummaryWriter(str(folder), purge_step=None if resumed_at is None else resumed_at + 1)

    @property
    def metrics_file(self) -> Path:
        assert self.folder is not None
        return self.folder / "metrics.csv"

    def metrics(self, split: str, step: int, epoch: float, values: dict[str, float]) -> None:
        """One row of `metrics.csv` and one point per curve, tag `metric/split`."""
        row = {"step": step, "epoch": round(epoch, 6), "split": split, **values}
        self.history.append(row)
        if self.writer is None:
            return
        for name, value in values.items():
            self.writer.add_scalar(f"{name}/{split}", value, step)
        if self._add_columns(row):
            self._rewrite()
        else:
            with self.metrics_file.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)

    def _add_columns(self, names: Iterable[str]) -> bool:
        fresh = [name for name in dict.fromkeys(names) if name not in self.columns]
        self.columns += fresh
        return bool(fresh) or not self.metrics_file.exists()

    def _rewrite(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(self.history)
        replace_file(self.metrics_file, text.getvalue().encode())

    def layout(self) -> None:
        """The Custom Scalars page: train and val of each metric in one chart, as far as both were logged."""
        if self.writer is None:
            return
        splits: dict[str, list[str]] = {}
        for row in self.history:
            for name in set(row) - set(FIRST_COLUMNS):
                if row["split"] not in splits.setdefault(name, []):
                    splits[name].append(row["split"])
        charts: dict[str, list[str]] = {}  # a metric's variants share its chart
        for name in sorted(splits, key=metric_order):
            if {"train", "val"} <= set(splits[name]):
                tags = [f"^{re.escape(name)}/{split}$" for split in ("train", "val")]
                charts.setdefault(name.split(".")[0], []).extend(tags)
        if charts:
            chart_list = {name: ["Multiline", tags] for name, tags in charts.items()}
            self.writer.add_custom_scalars({"train and val": chart_list})

    def text(self, tag: str, markdown: str, step: int = 0) -> None:
        """Markdown in TensorBoard's Text page."""
        if self.writer is not None:
            self.writer.add_text(tag, markdown, step)

    def figure(self, name: str, figure: Figure, step: int) -> None:
        """A picture as `figures/NAME.png` and as an image in TensorBoard."""
        if self.writer is None or self.folder is None:
            return
        (self.folder / "figures").mkdir(exist_ok=True)
        figures.save(figure, self.folder / "figures" / f"{name}.png")
        self.writer.add_image(name, figures.to_image(figure), step, dataformats="HWC")

    def table(self, name: str, header: list[str], rows: list[list[Any]], step: int) -> None:
        """A table as `tables/NAME.csv` and as text in TensorBoard."""
        if self.writer is None or self.folder is None:
            return
        (self.folder / "tables").mkdir(exist_ok=True)
        text = io.StringIO(newline="")
        csv.writer(text).writerows([header, *rows])
        replace_file(self.folder / "tables" / f"{name}.csv", text.getvalue().encode())
        self.text(name, markdown_table(header, rows), step)

    def pr_curves(
        self, split: str, targets: Tensor, probabilities: Tensor, class_names: Iterable[str], step: int
    ) -> None:
        """A precision-recall curve per class: targets (N,), probabilities (N, classes)."""
        if self.writer is None:
            return
        for number, name in enumerate(class_names):
            self.writer.add_pr_curve(
                f"{name}/{split}", (targets == number).cpu(), probabilities[:, number].float().cpu(), step
            )

    def hparams_start(self, values: dict[str, Any], metrics: Iterable[str]) -> None:
        """Tell the HParams page this run's settings and which tags are its metrics, in this very run."""
        flat = {key: _hparam(value) for key, value in values.items()}
        experiment, start, self._session_end = hparams(flat, dict.fromkeys(metrics, 0.0))
        self._add_summaries(experiment, start)

    def hparams_end(self) -> None:
        """Tell the HParams page that the run has ended."""
        self._add_summaries(self._session_end)

    def _add_summaries(self, *summaries: Summary) -> None:
        # add_hparams would open a second run; the writer's own file writer is the only way into this one
        if self.writer is not None:
            for summary in summaries:
                self.writer._get_file_writer().add_summary(summary)

    def curves(self, title: str) -> None:
        """Redraw the figure of loss and metrics as they stand."""
        if self.writer is not None and self.folder is not None:
            (self.folder / "figures").mkdir(exist_ok=True)
            figures.save(figures.curves(self.history, title), self.folder / "figures" / "curves.png")

    def close(self) -> None:
        """Flush the event file."""
        if self.writer is not None:
            self.writer.close()


def _hparam(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.csv`: empty cells left out, numbers as numbers."""
    rows: list[dict[str, Any]] = []
    with path.open(newline="") as file:
        for raw in csv.DictReader(file):
            if None in raw.values():  # a row that a kill cut short
                continue
            row: dict[str, Any] = {key: float(text) for key, text in raw.items() if text and key != "split"}
            rows.append(row | {"step": int(row["step"]), "split": raw["split"]})
    return rows


def metric_order(name: str) -> tuple[int, str]:
    """Sorts metric names as people read them: loss, accuracy, precision, recall, f1, then the rest."""
    known = ["loss", "accuracy", "precision", "recall", "f1"]
    base = name.split(".")[0]
    return (known.index(base) if base in known else len(known), name)


def markdown_table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table of the rows."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(format_cell(cell) for cell in line) + " |" for line in lines)


def text_table(header: list[str], rows: list[list[Any]]) -> str:
    """The rows in aligned columns, for the screen: the first to the left, the others to the right."""
    cells = [[format_cell(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("─" * width for width in widths), *lines[1:]])


def format_cell(value: Any) -> str:
    """Four decimals for a number that is not whole, scientific where four would hide it."""
    if isinstance(value, float):
        small = value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e5)
        return "–" if math.isnan(value) else f"{value:.2e}" if small else f"{value:.4f}"
    return "–" if value is None else str(value)


class Screen(logging.Handler):
    """Log records as plain lines on standard output, above the live bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)


class Bar:
    """The one live line of a training run; nothing where the output is not a terminal."""

    def __init__(self, total: int, initial: int):
        self.bar = tqdm(
            total=total,
            initial=initial,
            disable=None,  # tqdm's word for: only on a terminal
            unit="step",
            dynamic_ncols=True,
            leave=False,
            bar_format="{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} steps, {remaining} left{postfix}",
        )

    def advance(self) -> None:
        """One step is done."""
        self.bar.update()

    def show(self, values: dict[str, float]) -> None:
        """Put the latest readings behind the bar."""
        shown = [f"{name} {format_cell(value)}" for name, value in values.items()]
        self.bar.set_postfix_str("  ".join(shown))

    def close(self) -> None:
        self.bar.close()


@contextlib.contextmanager
def logging_to(path: Path | None) -> Iterator[None]:
    """What the runner logs, to the screen and, where `path` is given, to that file as well."""
    handlers: list[logging.Handler] = [Screen()]
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
