"""What a run leaves to look at: TensorBoard, `metrics.csv`, figures, tables, the screen and `run.log`."""

from __future__ import annotations

import csv
import io
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from runner import figures
from runner.files import replace_file
from runner.records.console import markdown_table, metric_order
from runner.spreadsheet import Sheet, workbook

if TYPE_CHECKING:
    from matplotlib.figure import Figure


FIRST_COLUMNS = ("step", "epoch", "split")


class Tracker:
    """One run's records. Without a folder (another rank's, or before there is one) it keeps the history only.

    `resumed_at` is the step of the checkpoint that a run goes on from, -1 where there is none yet, and `rows`
    the rows of `metrics.csv` at it: what was logged after them is cut. `trains` is False for a look at a
    checkpoint: its few numbers are no curves, and the HParams page of its run would get columns for each.
    """

    def __init__(
        self,
        folder: Path | None = None,
        resumed_at: int | None = None,
        rows: int | None = None,
        trains: bool = True,
    ):
        self.folder, self.trains = folder, trains
        self.history: list[dict[str, Any]] = []
        self.columns: list[str] = list(FIRST_COLUMNS)
        self.writer: SummaryWriter | None = None
        self._drawn: set[tuple[str, int]] = set()  # split, step: a curve has one point per step
        self._seen: set[tuple[str, str]] = set()  # metric without its variant, split
        self._charts: dict[str, dict[str, Any]] = {}  # the Custom Scalars page as it was last written
        if folder is None:
            return
        self.writer = open_writer(folder, None if resumed_at is None else resumed_at + 1)
        if resumed_at is not None and self.metrics_file.exists():
            self._go_on(read_metrics(self.metrics_file), resumed_at, rows)

    def _go_on(self, found: list[dict[str, Any]], resumed_at: int, rows: int | None) -> None:
        """Take up the rows up to the checkpoint; the file is cut after them."""
        self.history = [row for row in found[:rows] if row["step"] <= resumed_at]
        # what `purge_step` leaves in the event files, also the test metrics of a run that is trained longer
        self._drawn = {(row["split"], row["step"]) for row in found if row["step"] <= resumed_at}
        self._add_columns(name for row in self.history for name in row)
        self._rewrite()
        for row in self.history:
            self._lay_out(row["split"], row)

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
        if self.trains:
            self._draw(self.writer, split, step, values)
        if self._add_columns(row):
            self._rewrite()
        else:
            with self.metrics_file.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)

    def _draw(self, writer: SummaryWriter, split: str, step: int, values: dict[str, float]) -> None:
        """One point per curve."""
        if (split, step) not in self._drawn:
            for name, value in values.items():
                writer.add_scalar(f"{name}/{split}", value, step)
        self._drawn.add((split, step))
        self._lay_out(split, values)
        writer.flush()  # whoever looks sees what metrics.csv has, and a kill takes nothing away

    def _add_columns(self, names: Iterable[str]) -> bool:
        fresh = [name for name in dict.fromkeys(names) if name not in self.columns]
        self.columns += fresh
        return bool(fresh) or not self.metrics_file.exists()

    def _rewrite(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.history)
        replace_file(self.metrics_file, text.getvalue().encode())

    def _lay_out(self, split: str, names: Iterable[str]) -> None:
        """Write the Custom Scalars page as soon as there is something to overlay, and when it changes."""
        fresh = {(name.split(".")[0], split) for name in names if name not in FIRST_COLUMNS} - self._seen
        self._seen |= fresh
        charts = custom_charts(self._seen) if fresh else self._charts
        if charts != self._charts and self.writer is not None:
            self._charts = charts
            self.writer.add_custom_scalars(charts)

    def text(self, tag: str, markdown: str, step: int = 0) -> None:
        """Markdown in TensorBoard's Text page."""
        if self.writer is not None:
            self.writer.add_text(tag, markdown, step)

    def figure(self, name: str, figure: Figure, step: int) -> None:
        """A picture as `figures/NAME.png` and as an image in TensorBoard."""
        if self.writer is None or self.folder is None:
            return
        (self.folder / "figures").mkdir(exist_ok=True)
        path = self.folder / "figures" / f"{name}.png"
        figures.save(figure, path)
        self._add_summaries(image_summary(name, path.read_bytes()), step=step)

    def animation(
        self, name: str, figure: Figure, draw: Callable[[int], object], frames: int, fps: int, step: int
    ) -> None:
        """A moving picture as `figures/NAME.gif` and as an image in TensorBoard, which plays it."""
        if self.writer is None or self.folder is None:
            return
        (self.folder / "figures").mkdir(exist_ok=True)
        path = self.folder / "figures" / f"{name}.gif"
        figures.save_animation(figure, draw, frames, fps, path)
        self._add_summaries(image_summary(name, path.read_bytes()), step=step)

    def table(self, name: str, header: list[str], rows: list[list[Any]], step: int) -> None:
        """A table as `tables/NAME.csv` and as text in TensorBoard."""
        if self.writer is None or self.folder is None:
            return
        (self.folder / "tables").mkdir(exist_ok=True)
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        replace_file(self.folder / "tables" / f"{name}.csv", text.getvalue().encode())
        self.text(name, markdown_table(header, rows), step)

    def spreadsheet(self, name: str, sheets: dict[str, Sheet]) -> None:
        """Sheets as `tables/NAME.xlsx`."""
        if self.folder is None:
            return
        (self.folder / "tables").mkdir(exist_ok=True)
        replace_file(self.folder / "tables" / f"{name}.xlsx", workbook(sheets))

    def pr_curves(
        self, split: str, targets: Tensor, probabilities: Tensor, class_names: Iterable[str], step: int
    ) -> None:
        """A precision-recall curve per class: targets (N,), probabilities (N, classes)."""
        if self.writer is None:
            return
        # the split comes first in the tag: TensorBoard makes a section of what stands before the first slash
        for number, name in enumerate(class_names):
            self.writer.add_pr_curve(
                f"{split}/{name}", (targets == number).cpu(), probabilities[:, number].float().cpu(), step
            )

    def hparams_start(self, values: dict[str, Any]) -> None:
        """Tell the HParams page this run's settings, in this very run."""
        # The first summary, an experiment's columns, is left out: TensorBoard would take one run's columns
        # for all runs below its logdir. Without it, it gathers them from every run.
        _, start, self._session_end = hparams({key: _hparam(value) for key, value in values.items()}, {})
        self._add_summaries(start)

    def hparams_end(self) -> None:
        """Tell the HParams page that the run has ended."""
        self._add_summaries(self._session_end)

    def _add_summaries(self, *summaries: Summary, step: int | None = None) -> None:
        # add_hparams would open a second run, and add_image would draw the picture again; the writer's own
        # file writer is the only other way in
        if self.writer is not None:
            for summary in summaries:
                self.writer._get_file_writer().add_summary(summary, step)

    def curves(self, title: str) -> None:
        """Redraw the figure of loss and metrics as they stand."""
        if self.writer is not None:
            self.figure("curves", figures.curves(self.history, title), self.history[-1]["step"])

    def close(self) -> None:
        """Flush the event file."""
        if self.writer is not None:
            self.writer.close()


def open_writer(folder: Path, purge_step: int | None) -> SummaryWriter:
    """A writer whose event file is read after those that the folder has, so that `purge_step` drops their tail.

    Readers sort the files by name: a second, then host, process and a counter, all as text. Of two that one
    process opens in the same second, `.10` would be read before `.9`; the later one then waits for the next.
    """
    before = {path.name for path in folder.glob("events.out.tfevents.*")}
    for _ in range(2):  # a clock that was set back is not waited for
        writer = SummaryWriter(str(folder), purge_step=purge_step)
        fresh = {path.name for path in folder.glob("events.out.tfevents.*")} - before
        if max(before, default="") < min(fresh, default="~"):
            return writer
        writer.close()
        for name in fresh:
            (folder / name).unlink()
        time.sleep(1 - time.time() % 1)
    return SummaryWriter(str(folder), purge_step=purge_step)


def _hparam(value: Any) -> int | float | str:
    """A value as the HParams page takes it; true, false and null are words, as on the command line."""
    if value is None or isinstance(value, bool):  # torch would make the numbers 0 and 1 of the latter
        return "null" if value is None else str(value).lower()
    return value if isinstance(value, int | float | str) else str(value)


def image_summary(tag: str, content: bytes) -> Summary:
    """A PNG or GIF as it is, with colour, transparency and motion, for TensorBoard's Images page."""
    gif = content.startswith(b"GIF8")
    width, height = struct.unpack("<HH", content[6:10]) if gif else struct.unpack(">II", content[16:24])
    image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=content)
    return Summary(value=[Summary.Value(tag=tag, image=image)])


def custom_charts(seen: set[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """The Custom Scalars page: train and val of each metric in one chart, and the two gradient norms.

    `seen` holds (metric, split). The charts name no variant, so those of all runs below a logdir are equal:
    TensorBoard merges equal charts and shows the others beside each other.
    """
    variant = r"(\.\w+)?"
    both = sorted({metric for metric, split in seen if {(metric, "train"), (metric, "val")} <= seen})
    charts: dict[str, dict[str, Any]] = {}
    if both:
        charts["train and val"] = {
            metric: ["Multiline", [f"^{metric}{variant}/{split}$" for split in ("train", "val")]]
            for metric in sorted(both, key=metric_order)
        }
    if ("grad_norm", "train") in seen:
        tags = [f"^{metric}{variant}/train$" for metric in ("grad_norm", "grad_norm_clipped")]
        charts["gradient"] = {"norm before and after clipping": ["Multiline", tags]}
    return charts


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.csv`: empty cells left out, numbers as numbers."""
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):  # a row that a kill cut short, be it in its last number
        del lines[-1]
    for raw in csv.DictReader(lines):
        row: dict[str, Any] = {key: float(text) for key, text in raw.items() if text and key != "split"}
        rows.append(row | {"step": int(row["step"]), "split": raw["split"]})
    return rows
