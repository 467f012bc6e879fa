"""rnn_fashion on made-up images: what it learns, draws, writes and remembers."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from sklearn.metrics import precision_recall_fscore_support

from runner import run
from runner.engine.job import Result
from tests.experiments.test_all import STAND_IN

FIGURES = {
    "before_after",
    "confusion",
    "per_class",
    "mistakes",
    "gradients_through_time",
    "clipping",
    "curves",
}
SMALL = ("experiment=rnn_fashion", "data=fake_images", "threads=1", "model.hidden_size=24", "loop.epochs=3")
SLOW = "optimizer.lr=0.02"  # does not learn everything, so that there are mistakes to draw


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(*SMALL, SLOW, f"outputs={tmp_path_factory.mktemp('finished')}", config_dir=STAND_IN)


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "tables" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_learns(clean_process: None) -> None:
    result = run(*SMALL, "loop.epochs=12", config_dir=STAND_IN)
    assert result.metrics["before"]["test"]["accuracy"] < 0.3
    assert result.metrics["test"]["accuracy"] > 0.9


def test_every_picture_shows_something(finished: Result) -> None:
    pictures = {path.stem: imread(path) for path in (finished.folder / "figures").glob("*.png")}
    assert set(pictures) == FIGURES
    for name, pixels in pictures.items():
        ink = (np.asarray(pixels)[..., :3] < 0.9).any(-1).mean()
        assert min(pixels.shape[:2]) >= 250 and 0.01 < ink < 0.9, (name, pixels.shape, ink)


def test_per_class_table_equals_scikit_learn_and_the_summary(finished: Result) -> None:
    data = importlib.import_module("fake_images").FakeImages()
    test = data.load(0)["test"]
    assert isinstance(finished.model, torch.nn.Module)
    with torch.no_grad():
        after = finished.model(data.transform(test.inputs, None)).argmax(1)
    saved = torch.load(finished.folder / "checkpoints" / "best.pt", weights_only=True)
    before = saved["task"]["seen"]["predictions"]
    rows = table(finished.folder, "per_class")
    assert [row["class"] for row in rows] == list(data.class_names)
    metrics = {"before": finished.metrics["before"]["test"], "after": finished.metrics["test"]}
    for when, predictions in (("before", before), ("after", after)):
        theirs = precision_recall_fscore_support(test.targets, predictions, labels=range(10), zero_division=0)
        assert [int(row["support"]) for row in rows] == theirs[3].tolist()
        for name, column in zip(("precision", "recall", "f1"), theirs, strict=False):
            scores = [float(row[f"{name} {when}"]) for row in rows]
            assert scores == pytest.approx(column.tolist())
            assert sum(scores) / 10 == pytest.approx(metrics[when][name])


def test_gradients_fade_at_small_gains_and_explode_at_large_ones(finished: Result) -> None:
    rows = {
        row["network"]: float(row["factor per step back"])
        for row in table(finished.folder, "gradients_through_time")
    }
    factors = [rows[f"gain {gain}"] for gain in (0.5, 1.0, 1.5, 3.0)]
    assert factors == sorted(factors) and factors[0] < 0.7 and factors[-1] > 1.1
    assert {"before training", "after training"} <= set(rows)


def look(finished: Result, cli: Callable, *overrides: str) -> Path:
    """The folder that `mode=eval` leaves."""
    seen = set((finished.folder / "eval").glob("*"))
    call = ["mode=eval", f"checkpoint={finished.folder}/checkpoints/best.pt", *overrides]
    outcome = cli(*call, config_dir=STAND_IN)
    assert outcome.status == 0, outcome.err
    [folder] = set((finished.folder / "eval").iterdir()) - seen
    return folder


def test_looking_at_the_checkpoint_draws_the_same(finished: Result, cli: Callable) -> None:
    again = look(finished, cli)
    for name in ("before_after", "confusion", "per_class", "mistakes", "gradients_through_time"):
        one, other = (imread(folder / "figures" / f"{name}.png") for folder in (again, finished.folder))
        np.testing.assert_array_equal(one, other)
    assert table(again, "per_class") == table(finished.folder, "per_class")


def test_a_checkpoint_that_saw_more_test_images_is_compared_on_fewer(finished: Result, cli: Callable) -> None:
    rows = table(look(finished, cli, "loop.eval_batches=1"), "per_class")
    assert sum(int(row["support"]) for row in rows) == 50


@pytest.mark.parametrize(
    "setting",
    [
        "model.readout=last",
        "model.readout=mean",
        "loop.clip_norm=null",
        "optimizer=adamw",
        "precision=bfloat16",
        "loop.ema=0.9",
        "model.init=identity",
    ],
)
def test_other_settings_run_to_the_end(setting: str, clean_process: None) -> None:
    result = run(*SMALL, "debug=fast", setting, config_dir=STAND_IN)
    assert result.status == "done"
    assert {path.stem for path in (result.folder / "figures").glob("*.png")} == FIGURES


@pytest.mark.parametrize(
    ("objective", "holds"),
    [
        ("accuraccy/val", ["Did you mean accuracy/val?", "try: python -m runner", "objective=accuracy/val"]),
        ("depth/val", ["objective=depth/val is not measured", "Measured: loss/val, accuracy/val"]),
    ],
)
def test_an_objective_that_is_not_measured_is_told_before_a_folder_is_made(
    objective: str, holds: list[str], cli: Callable, tmp_path: Path
) -> None:
    outcome = cli(*SMALL, f"objective={objective}", config_dir=STAND_IN)
    assert outcome.status == 2 and all(words in outcome.err for words in holds), outcome.err
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_has_the_bits_of_one_that_was_never_stopped(clean_process: None) -> None:
    """With every source of randomness on: dropout, flips, shifts, averaged weights."""
    random = ("model.dropout=0.3", "data.flip=0.5", "data.shift=2", "loop.ema=0.9", "schedule=constant")
    whole = run(*SMALL, *random, "loop.epochs=2", config_dir=STAND_IN)
    first = run(*SMALL, *random, "loop.epochs=1", config_dir=STAND_IN)
    resumed = run(f"resume={first.folder}", "loop.epochs=2", config_dir=STAND_IN)
    assert resumed.folder == first.folder and resumed.metrics["test"] == whole.metrics["test"]
    one, other = (
        torch.load(r.folder / "checkpoints" / "last.pt", weights_only=True) for r in (whole, resumed)
    )
    for part in ("model", "optimizer", "ema", "task"):
        assert_equal(one[part], other[part])


def assert_equal(one: Any, other: Any) -> None:
    """Nested dicts, lists and tensors, to the bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
