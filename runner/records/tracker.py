"""What a run leaves on disk: TensorBoard event files, `metrics.csv`, figures and tables."""

from __future__ import annotations

import csv
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
from runner.files import csv_bytes, replace_file
from runner.records.console import markdown_table, metric_order
from runner.spreadsheet import Sheet, workbook

if TYPE_CHECKING:
    from matplotlib.figure import Figure


FIRST_COLUMNS = ("step", "epoch", "split")


class Tracker:
    """Write one run's records. Without a folder (on another rank, or before there is one) keep the history only.

    `resumed_at` is the step of the checkpoint that a run resumes from, -1 where there is none yet, and `rows`
    the number of rows of `metrics.csv` at it: what was logged after them is cut. `trains` is False for an
    evaluation of a checkpoint: a single value makes no curve, and would add a column to the HParams page. Without
    `draws` there are no pictures.
    """

    def __init__(
        self,
        folder: Path | None = None,
        resumed_at: int | None = None,
        rows: int | None = None,
        trains: bool = True,
        draws: bool = True,
    ):
        self.folder, self.trains, self.draws = folder, trains, draws
        self.history: list[dict[str, Any]] = []
        self.columns: list[str] = list(FIRST_COLUMNS)
        self.writer: SummaryWriter | None = None
        self._drawn: set[tuple[str, int]] = set()  # split, step: a curve has one point per step
        self._recorded: set[tuple[str, str]] = set()  # metric without its variant, split
        self._charts: dict[str, dict[str, Any]] = {}  # the Custom Scalars page as it was last written
        if folder is None:
            return
        self.metrics_file = folder / "metrics.csv"
        self.writer = _open_writer(folder, None if resumed_at is None else resumed_at + 1)
        if resumed_at is None or not self.metrics_file.exists():
            return

        # the rows up to the checkpoint; the file is cut after them
        stored = read_metrics(self.metrics_file)
        self.history = [row for row in stored[:rows] if row["step"] <= resumed_at]
        # what `purge_step` leaves in the event files, also the test metrics of a run that is trained longer
        self._drawn = {(row["split"], row["step"]) for row in stored if row["step"] <= resumed_at}
        self._rewrite()
        for row in self.history:
            self._lay_out(row["split"], row)

    def metrics(self, split: str, step: int, epoch: float, values: dict[str, float]) -> None:
        """Write one row of `metrics.csv` and one point per curve, tag `metric/split`."""
        row = {"step": step, "epoch": round(epoch, 6), "split": split, **values}
        self.history.append(row)
        if self.writer is None:
            return

        # one point per curve
        if self.trains:
            if (split, step) not in self._drawn:
                for name, value in values.items():
                    self.writer.add_scalar(f"{name}/{split}", value, step)
            self._drawn.add((split, step))
            self._lay_out(split, values)
            self.writer.flush()  # TensorBoard shows what metrics.csv has, and a kill loses nothing

        # one row; a new column rewrites the file
        if set(row) <= set(self.columns) and self.metrics_file.exists():
            with self.metrics_file.open("ab") as file:
                file.write(csv_bytes([[row.get(name) for name in self.columns]]))
        else:
            self._rewrite()

    def _rewrite(self) -> None:
        self.columns = list(dict.fromkeys([*self.columns, *(name for row in self.history for name in row)]))
        rows = [[row.get(name) for name in self.columns] for row in self.history]
        replace_file(self.metrics_file, csv_bytes([self.columns, *rows]))

    def _lay_out(self, split: str, names: Iterable[str]) -> None:
        """Write the Custom Scalars page when there is something new to overlay."""
        self._recorded |= {(name.split(".")[0], split) for name in names if name not in FIRST_COLUMNS}
        charts = _custom_charts(self._recorded)
        if charts != self._charts and self.writer is not None:
            self._charts = charts
            self.writer.add_custom_scalars(charts)

    def text(self, tag: str, markdown: str, step: int = 0) -> None:
        """Add Markdown to TensorBoard's Text page."""
        if self.writer is not None:
            self.writer.add_text(tag, markdown, step)

    def figure(self, name: str, figure: Figure, step: int) -> None:
        """Save a figure as `figures/NAME.png` and as an image in TensorBoard."""
        if self.folder is not None and self.draws:
            path = self.folder / "figures" / f"{name}.png"
            figures.save(figure, path)
            self._add_summary(_image_summary(name, path.read_bytes()), step)

    def animation(
        self, name: str, figure: Figure, draw: Callable[[int], object], frames: int, fps: int, step: int
    ) -> None:
        """Save an animation as `figures/NAME.gif` and as an image in TensorBoard, which plays it."""
        if self.folder is not None and self.draws:
            path = self.folder / "figures" / f"{name}.gif"
            figures.save_animation(figure, draw, frames, fps, path)
            self._add_summary(_image_summary(name, path.read_bytes()), step)

    def table(self, name: str, header: list[str], rows: list[list[Any]], step: int) -> None:
        """Save a table as `tables/NAME.csv` and as text in TensorBoard."""
        if self.folder is not None:
            replace_file(self.folder / "tables" / f"{name}.csv", csv_bytes([header, *rows]))
            self.text(name, markdown_table(header, rows), step)

    def spreadsheet(self, name: str, sheets: dict[str, Sheet]) -> None:
        """Save sheets as `tables/NAME.xlsx`."""
        if self.folder is not None:
            replace_file(self.folder / "tables" / f"{name}.xlsx", workbook(sheets))

    def pr_curves(
        self, split: str, targets: Tensor, probabilities: Tensor, class_names: Iterable[str], step: int
    ) -> None:
        """Add a precision-recall curve per class: targets (N,), probabilities (N, classes)."""
        if self.writer is None or not self.draws:
            return
        # the split comes first in the tag: TensorBoard makes a section of what stands before the first slash
        for number, name in enumerate(class_names):
            scores = probabilities[:, number].float().cpu()
            self.writer.add_pr_curve(f"{split}/{name}", (targets == number).cpu(), scores, step)

    def hparams_start(self, values: dict[str, Any]) -> None:
        """Write this run's settings for the HParams page, into this run's own event file."""
        # The first summary, an experiment's columns, is left out: TensorBoard would take one run's columns
        # for all runs below its logdir. Without it, it gathers them from every run.
        _, start, self._session_end = hparams({key: _hparam(value) for key, value in values.items()}, {})
        self._add_summary(start)

    def hparams_end(self) -> None:
        """Write for the HParams page that the run has ended."""
        self._add_summary(self._session_end)

    def _add_summary(self, summary: Summary, step: int | None = None) -> None:
        # add_hparams would open a second run, and add_image would draw the picture again; the writer's own
        # file writer is the only other way in
        if self.writer is not None:
            self.writer._get_file_writer().add_summary(summary, step)

    def curves(self, title: str) -> None:
        """Redraw the figure of loss and metrics so far."""
        if self.writer is not None and self.draws:
            self.figure("curves", figures.curves(self.history, title), self.history[-1]["step"])

    def close(self) -> None:
        """Flush the event file."""
        if self.writer is not None:
            self.writer.close()


def _open_writer(folder: Path, purge_step: int | None) -> SummaryWriter:
    """Open an event file that is read after those in the folder, so that `purge_step` drops their tail.

    Readers sort the files by name: a second, then host, process and a counter, all as text. Of two that one
    process opens in the same second, `.10` would be read before `.9`; wait for the next second then.
    """
    before = {path.name for path in folder.glob("events.out.tfevents.*")}
    for _ in range(2):  # a clock that was set back is not waited for
        writer = SummaryWriter(str(folder), purge_step=purge_step)
        opened = {path.name for path in folder.glob("events.out.tfevents.*")} - before
        if max(before, default="") < min(opened, default="~"):
            return writer
        writer.close()
        for name in opened:
            (folder / name).unlink()
        time.sleep(1 - time.time() % 1)
    return SummaryWriter(str(folder), purge_step=purge_step)


def _hparam(value: Any) -> int | float | str:
    """Convert a value for the HParams page; true, false and null are words, as on the command line."""
    if value is None or isinstance(value, bool):  # torch would make the numbers 0 and 1 of the latter
        return "null" if value is None else str(value).lower()
    return value if isinstance(value, int | float | str) else str(value)


def _image_summary(tag: str, content: bytes) -> Summary:
    """Wrap a PNG or GIF for TensorBoard's Images page, with its colour, transparency and motion."""
    gif = content.startswith(b"GIF8")
    width, height = struct.unpack("<HH", content[6:10]) if gif else struct.unpack(">II", content[16:24])
    image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=content)
    return Summary(value=[Summary.Value(tag=tag, image=image)])


def _custom_charts(recorded: set[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Lay out the Custom Scalars page: train and val of each metric in one chart, and the two gradient norms.

    `recorded` holds (metric, split). The charts name no variant, so those of all runs below a logdir are equal:
    TensorBoard merges equal charts and shows the others beside each other.
    """

    def chart(*tags: tuple[str, str]) -> list[Any]:
        return ["Multiline", [rf"^{metric}(\.\w+)?/{split}$" for metric, split in tags]]

    charts: dict[str, dict[str, Any]] = {}
    both = [metric for metric, split in recorded if split == "val" and (metric, "train") in recorded]
    if both:
        ordered = sorted(both, key=metric_order)
        charts["train and val"] = {metric: chart((metric, "train"), (metric, "val")) for metric in ordered}
    if ("grad_norm", "train") in recorded:
        norms = chart(("grad_norm", "train"), ("grad_norm_clipped", "train"))
        charts["gradient"] = {"norm before and after clipping": norms}
    return charts


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a `metrics.csv`: empty cells left out, numbers as numbers."""
    # a kill may have cut the last row, even inside its last number
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]

    rows: list[dict[str, Any]] = []
    for raw in csv.DictReader(whole.splitlines()):
        row: dict[str, Any] = {key: float(cell) for key, cell in raw.items() if cell and key != "split"}
        rows.append(row | {"step": int(row["step"]), "split": raw["split"]})
    return rows
