"""rnn_fashion on made-up images: what it learns, draws, writes and remembers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support

from runner import run
from runner.engine.job import Result
from tests.experiments.conftest import (
    SIZES,
    STAND_IN,
    assert_equal,
    assert_figures,
    assert_same_figures,
    table,
)
from tests.experiments.stand_in.fake_images import FakeImages

FIGURES = {
    "before_after",
    "confusion",
    "per_class",
    "mistakes",
    "gradients_through_time",
    "clipping",
    "curves",
}
SMALL = (*SIZES["rnn_fashion"], "loop.epochs=3")


@pytest.fixture(scope="module")
def result(finished: Callable[[str], Result]) -> Result:
    return finished("rnn_fashion")


@pytest.mark.slow
def test_learns(clean_process: None) -> None:
    metrics = run(*SMALL, "loop.epochs=12", config_dir=STAND_IN).metrics
    assert metrics["before"]["test"]["accuracy"] < 0.3
    assert metrics["test"]["accuracy"] > 0.9


def test_every_picture_shows_something(result: Result) -> None:
    assert_figures(result.folder, FIGURES)


def test_per_class_table_equals_scikit_learn_and_the_summary(result: Result) -> None:
    data = FakeImages()
    test = data.load(0)["test"]
    assert isinstance(result.model, torch.nn.Module)
    with torch.no_grad():
        after = result.model(data.transform(test.inputs, None)).argmax(1)
    saved = torch.load(result.folder / "checkpoints" / "best.pt", weights_only=True)
    before = saved["task"]["seen"]["predictions"]
    rows = table(result.folder, "per_class")
    assert [row["class"] for row in rows] == list(data.class_names)
    metrics = {"before": result.metrics["before"]["test"], "after": result.metrics["test"]}
    for when, predictions in (("before", before), ("after", after)):
        theirs = precision_recall_fscore_support(test.targets, predictions, labels=range(10), zero_division=0)
        assert [int(row["support"]) for row in rows] == theirs[3].tolist()
        for name, column in zip(("precision", "recall", "f1"), theirs, strict=False):
            scores = [float(row[f"{name} {when}"]) for row in rows]
            assert scores == pytest.approx(column.tolist())
            assert sum(scores) / 10 == pytest.approx(metrics[when][name])


def test_gradients_fade_at_small_gains_and_explode_at_large_ones(result: Result) -> None:
    rows = {
        row["network"]: float(row["factor per step back"])
        for row in table(result.folder, "gradients_through_time")
    }
    factors = [rows[f"gain {gain}"] for gain in (0.5, 1.0, 1.5, 3.0)]
    assert factors == sorted(factors) and factors[0] < 0.7 and factors[-1] > 1.1
    assert {"before training", "after training"} <= set(rows)


def evaluate(result: Result, cli: Callable, *overrides: str) -> Path:
    """The folder that `mode=eval` leaves."""
    before = set((result.folder / "eval").glob("*"))
    command = ["mode=eval", f"checkpoint={result.folder}/checkpoints/best.pt", *overrides]
    outcome = cli(*command, config_dir=STAND_IN)
    assert outcome.status == 0, outcome.err
    [folder] = set((result.folder / "eval").iterdir()) - before
    return folder


@pytest.mark.slow
def test_evaluating_the_checkpoint_draws_the_same(result: Result, cli: Callable) -> None:
    folder = evaluate(result, cli)
    assert_same_figures(folder, result.folder, *FIGURES - {"clipping", "curves"})
    assert table(folder, "per_class") == table(result.folder, "per_class")


@pytest.mark.slow
def test_a_checkpoint_that_saw_more_test_images_is_compared_on_fewer(result: Result, cli: Callable) -> None:
    rows = table(evaluate(result, cli, "loop.eval_batches=1"), "per_class")
    assert sum(int(row["support"]) for row in rows) == 50


@pytest.mark.slow
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
    assert {path.stem for path in (result.folder / "figures").glob("*.png")} == FIGURES - {"curves"}


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("accuraccy/val", ["accuracy/val?", "objective=accuracy/val"]),
        ("depth/val", ["objective=depth/val", "loss/val, accuracy/val"]),
    ],
)
def test_an_objective_that_is_not_measured_is_refused_before_a_folder_is_made(
    objective: str, words: list[str], cli: Callable, tmp_path: Path
) -> None:
    outcome = cli(*SMALL, f"objective={objective}", config_dir=STAND_IN)
    assert outcome.status == 2 and all(word in outcome.err for word in words), outcome.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
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
