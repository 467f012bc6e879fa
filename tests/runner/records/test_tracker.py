"""The records of a run, each read back by another program: csv, TensorBoard's own reader, a terminal."""

from __future__ import annotations

import io
import logging
import math
import re
import sys
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer import event_file_writer

from runner import figures
from runner.cli import main
from runner.records.console import (
    format_cell,
    live_line,
    log,
    logging_to,
    metric_order,
    short_metrics,
    shown_path,
    text_table,
)
from runner.records.tracker import Tracker, _custom_charts, _image_summary, read_metrics
from tests.conftest import TOYS


def rows_of(tracker: Tracker, split: str = "train") -> list[tuple[int, float]]:
    """The points of the loss that `metrics.csv` holds."""
    return [(row["step"], row["loss"]) for row in read_metrics(tracker.metrics_file) if row["split"] == split]


def events_of(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    return events.Reload()


def curve(folder: Path, tag: str = "loss/train") -> list[tuple[int, float]]:
    """The points that TensorBoard's own reader finds."""
    return [(event.step, event.value) for event in events_of(folder).Scalars(tag)]


def test_metrics_file_holds_every_digit_and_grows_columns(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.metrics("val", 0, 0.0, {"loss": 1 / 3})
    tracker.metrics("train", 5, 0.5, {"loss": math.pi, "learning_rate": 1e-300})
    tracker.metrics("val", 10, 1.0, {"loss": math.inf, "accuracy": 0.1 + 0.2})
    tracker.close()
    assert tracker.metrics_file.read_bytes().decode().split("\n") == [
        "step,epoch,split,loss,learning_rate,accuracy",
        f"0,0.0,val,{1 / 3!r},,",
        f"5,0.5,train,{math.pi!r},1e-300,",
        f"10,1.0,val,inf,,{0.1 + 0.2!r}",
        "",
    ]


def test_a_row_that_a_kill_cut_at_any_byte_is_no_row(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.metrics("train", 1, 0.5, {"loss": 0.25, "samples_per_second": 1234.5})
    whole = tracker.metrics_file.read_bytes()
    tracker.metrics("train", 2, 1.0, {"loss": 0.125, "samples_per_second": 2345.75})
    tracker.close()
    both = tracker.metrics_file.read_bytes()
    assert read_metrics(tracker.metrics_file) == tracker.history
    for length in range(len(whole), len(both)):
        tracker.metrics_file.write_bytes(both[:length])
        assert read_metrics(tracker.metrics_file) == tracker.history[:1]


def test_event_file_has_at_once_what_the_metrics_file_has(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    for step in (3, 4, 5):
        tracker.metrics("train", step, 0.5, {"loss": 0.75})
        assert curve(tmp_path) == rows_of(tracker)  # the writer is neither closed nor told to flush
    tracker.close()


def test_going_on_cuts_rows_and_points_after_the_checkpoint(tmp_path: Path) -> None:
    first = Tracker(tmp_path)
    for step in (0, 2, 4, 6, 8):
        first.metrics("train", step, step / 4, {"loss": 10.0 - step})
    first.close()
    second = Tracker(tmp_path, resumed_at=4, rows=3)
    assert rows_of(second) == [(0, 10), (2, 8), (4, 6)]
    for step in (6, 8, 10):
        second.metrics("train", step, step / 4, {"loss": 20.0 - step})
    second.close()
    points = [(0, 10.0), (2, 8.0), (4, 6.0), (6, 14.0), (8, 12.0), (10, 10.0)]
    assert curve(tmp_path) == rows_of(second) == points


def test_records_that_are_opened_in_one_second_are_read_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of a sweep that fails at once is tried again in the same second, by the same process."""
    clock = [1_790_000_000.25]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(95))
    for attempt in range(12):  # the counter of the files goes from 99 to 100 on the way
        tracker = Tracker(tmp_path, resumed_at=attempt - 1, rows=attempt)
        tracker.metrics("train", attempt, 0.5, {"loss": float(attempt)})
        tracker.metrics("train", attempt + 1, 0.5, {"loss": -1.0})  # cut off by the next one
        tracker.close()
    assert curve(tmp_path) == [*((n, float(n)) for n in range(12)), (12, -1.0)]
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 12 and clock[0] < 1_790_000_003


@pytest.mark.parametrize(
    ("splits", "resumed_at", "kept"),
    [
        ([("test", 0)], -1, 0),  # killed before its first checkpoint
        ([("test", 0), ("val", 8), ("test", 4)], 8, 2),  # killed after the test of the best weights
    ],
)
def test_metrics_after_the_last_checkpoint_are_one_row_and_one_point(
    tmp_path: Path, splits: list[tuple[str, int]], resumed_at: int, kept: int
) -> None:
    rows = [(split, step, step / 8, {"loss": 1.0 - step}) for split, step in splits]
    first = Tracker(tmp_path)
    for row in rows:
        first.metrics(*row)
    first.close()
    second = Tracker(tmp_path, resumed_at, kept)
    assert len(read_metrics(second.metrics_file)) == kept
    for row in rows[kept:]:
        second.metrics(*row)
    second.close()
    assert curve(tmp_path, "loss/test") == rows_of(second, "test")
    assert [(row["split"], row["step"]) for row in read_metrics(second.metrics_file)] == [
        row[:2] for row in rows
    ]


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = Tracker()
    tracker.metrics("train", 1, 0.1, {"loss": 1.0})
    tracker.figure("nothing", figures.new()[0], 1)
    tracker.table("nothing", ["a"], [[1]], 1)
    tracker.curves("nothing")
    tracker.pr_curves("test", torch.tensor([0]), torch.tensor([[1.0]]), ["a"], 1)
    tracker.close()
    assert tracker.history == [{"step": 1, "epoch": 0.1, "split": "train", "loss": 1.0}]
    assert list(tmp_path.iterdir()) == []


def test_a_look_at_a_checkpoint_keeps_its_numbers_and_leaves_no_curves(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, trains=False)
    tracker.metrics("test", 7, 1.0, {"loss": 0.5})
    tracker.close()
    assert rows_of(tracker, "test") == [(7, 0.5)] and events_of(tmp_path).Tags()["scalars"] == []


def test_layout_is_there_as_soon_as_train_and_val_are(tmp_path: Path) -> None:
    tag, tracker = "custom_scalars__config__", Tracker(tmp_path)
    tracker.metrics("val", 0, 0.0, {"loss": 1.0, "accuracy": 0.1})
    assert tag not in events_of(tmp_path).Tags()["tensors"]
    for metric, layouts in (("loss", 1), ("loss", 1), ("accuracy", 2)):
        tracker.metrics("train", 5, 1.0, {metric: 1.0})
        assert len(events_of(tmp_path).Tensors(tag)) == layouts
    tracker.close()


def test_charts_overlay_what_both_splits_have_and_all_variants_of_it() -> None:
    charts = _custom_charts({("loss", "train"), ("loss", "val"), ("grad_norm", "train"), ("own", "val")})
    assert list(charts["train and val"]) == ["loss"]
    train, val = (re.compile(tag) for tag in charts["train and val"]["loss"][1])
    assert train.match("loss/train") and train.match("loss.rotary/train") and val.match("loss.none/val")
    assert not any(train.match(tag) for tag in ("loss/val", "losses/train", "my_loss/train"))
    before, after = charts["gradient"]["norm before and after clipping"][1]
    assert not re.match(before, "grad_norm_clipped/train") and re.match(after, "grad_norm_clipped.a/train")


def test_figure_is_the_same_picture_on_disk_and_in_tensorboard(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    figure, grid = figures.new(size=(3, 2))
    grid[0, 0].plot([1, 2, 0])
    tracker.figure("shape", figure, 12)
    tracker.close()
    [event] = events_of(tmp_path).Images("shape")
    png = (tmp_path / "figures" / "shape.png").read_bytes()
    assert event.encoded_image_string == png and event.step == 12
    pixels = matplotlib.image.imread(io.BytesIO(png))
    assert (event.height, event.width) == pixels.shape[:2] == (300, 450)
    assert _image_summary("shape", png).value[0].image.colorspace == pixels.shape[2] == 4
    assert np.ptp(pixels[..., :3]) > 0.5  # something was drawn


def test_table_is_a_csv_and_a_text(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.table("scores", ["class", "f1"], [["裙子, long", 0.5], ["T-shirt/top", 1 / 3]], 4)
    tracker.close()
    text = (tmp_path / "tables" / "scores.csv").read_text(encoding="utf-8")
    assert text == f'class,f1\n"裙子, long",0.5\nT-shirt/top,{1 / 3!r}\n'
    [event] = events_of(tmp_path).Tensors("scores/text_summary")
    assert event.tensor_proto.string_val[0].decode().splitlines()[2] == "| 裙子, long | 0.5000 |"


def test_hparams_are_plain_and_name_no_columns_for_others(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.hparams_start({"lr": 0.1, "nesterov": True, "betas": [0.9, 0.99], "clip": None, "epochs": 3})
    tracker.hparams_end()
    tracker.close()
    found = {
        value.tag: HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for path in tmp_path.iterdir()
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
    }
    assert set(found) == {"_hparams_/session_start_info", "_hparams_/session_end_info"}
    values = found["_hparams_/session_start_info"].session_start_info.hparams
    assert values["lr"].number_value == 0.1 and values["epochs"].number_value == 3
    assert values["nesterov"].string_value == "true"
    assert values["betas"].string_value == "[0.9, 0.99]" and values["clip"].string_value == "null"


def test_how_numbers_tables_and_metrics_are_shown() -> None:
    values = [0.5, 0.0, 0.00049, -123456.0, math.nan, None, math.inf, 7, "text", True]
    assert " ".join(map(format_cell, values)) == "0.5000 0.0000 4.90e-04 -1.23e+05 – – inf 7 text True"

    lines = text_table(["name", "x"], [["a", 1.0], ["longer", 10]]).splitlines()
    assert lines == ["name         x", "──────  ──────", "a       1.0000", "longer      10"]

    ordered = ["loss", "accuracy.a", "accuracy.b", "precision", "recall", "f1", "alpha", "zeta"]
    assert sorted(sorted(ordered), key=metric_order) == ordered

    step = {"loss": 0.20871, "accuracy": 0.9375, "learning_rate": 0.05, "samples_per_second": 10665.4}
    assert short_metrics(step) == "loss 0.2087, accuracy 0.9375, lr 0.05, 10,665/s"
    assert short_metrics({"loss.a": 1.0, "loss.b": 2.0, "f1.a": 0.5}) == "loss 1.0000/2.0000"


def test_paths_are_shown_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown_path(tmp_path / "a" / "b") == str(Path("a", "b"))
    assert shown_path(tmp_path.parent) == str(tmp_path.parent)


def test_screen_and_log_say_the_same_and_a_bar_nothing_where_there_is_no_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before, line = list(log.handlers), "epoch 1 | val loss 0.5, 准确率 0.9"
    with logging_to(tmp_path / "run.log"):
        bar = live_line(10, 0, "{bar}{postfix}")
        log.info(line)
        log.log(logging.DEBUG, "not for the user")
        bar.update()
        bar.set_postfix_str("loss 1.0")
        bar.close()
    assert capfd.readouterr() == (f"{line}\n", "") and log.handlers == before
    assert (tmp_path / "run.log").read_text(encoding="utf-8") == f"{line}\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_live_line_on_a_terminal(clean_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "101")
    monkeypatch.setenv("LINES", "40")
    terminal = Terminal()
    command = ["--config-dir", str(TOYS), "experiment=gallery", "threads=1", "loop.epochs=3"]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "stderr", terminal)
        assert main([*command, "loop.log_every=1"]) == 0

    seen = terminal.getvalue()
    live = [part for part in re.split(r"[\r\n]", seen) if re.search(r"\d+% .*\d+/15, .* left", part)]
    full = re.compile(r"\d+% .* \d+/15, [\d:?]+ left, loss \d\.\d{4}, accuracy \d\.\d{4}, lr 0\.05, [\d,]+/s")
    assert any(full.search(part) for part in live), live
    permanent = [line for line in seen.split("\n") if "val loss" in line]
    assert [re.findall(r"step (\d+)/15", line)[0] for line in permanent] == ["0", "5", "10", "15"]
    assert seen.count("tensorboard --logdir outputs") == 1
