"""rnn_fashion on made-up images: what it learns, draws, writes and remembers."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support
from torch import nn

from experiments.nn.rnn import RNN
from experiments.rnn_fashion import RNNFashion
from runner import run
from runner.data import Data, Split
from runner.device import select
from runner.engine.job import Result
from runner.errors import UserError
from runner.task import Run
from tests.experiments.conftest import STAND_IN, checkpoint, figures_later, saved, table
from tests.experiments.stand_in.fake_images import FakeImages


@pytest.mark.slow
def test_learns(small: Callable[..., Result], clean_process: None) -> None:
    metrics = small("rnn_fashion", "loop.epochs=12").metrics
    assert metrics["before"]["test"]["accuracy"] < 0.3
    assert metrics["test"]["accuracy"] > 0.9


def test_per_class_table_equals_scikit_learn_and_the_summary(result: Result) -> None:
    data, rows = FakeImages(), table(result.folder, "per_class")
    test = data.load(0)["test"]
    with torch.no_grad():
        after = result.model(data.transform(test.inputs, None)).argmax(1)
    assert [row["class"] for row in rows] == list(data.class_names)
    for when, predictions, metrics in (
        ("before", saved(result)["task"]["seen"]["predictions"], result.metrics["before"]["test"]),
        ("after", after, result.metrics["test"]),
    ):
        theirs = precision_recall_fscore_support(test.targets, predictions, labels=range(10), zero_division=0)
        assert [int(row["support"]) for row in rows] == theirs[3].tolist()
        for name, column in zip(("precision", "recall", "f1"), theirs, strict=False):
            scores = [float(row[f"{name} {when}"]) for row in rows]
            assert scores == pytest.approx(column.tolist())
            assert sum(scores) / 10 == pytest.approx(metrics[name])


def test_gradients_fade_at_small_gains_and_explode_at_large_ones(result: Result) -> None:
    rows = table(result.folder, "gradients_through_time")
    factors = {row["network"]: float(row["factor per step back"]) for row in rows}
    gains = [factors.pop(f"gain {gain}") for gain in (0.5, 1.0, 1.5, 3.0)]
    assert gains == sorted(gains) and gains[0] < 0.7 and gains[-1] > 1.1
    assert {"before training", "after training"} <= factors.keys()


@pytest.mark.slow
def test_a_checkpoint_that_saw_more_test_images_is_compared_on_fewer(
    result: Result, clean_process: None
) -> None:
    with figures_later():
        again = run("mode=eval", checkpoint(result), "loop.eval_batches=1", config_dir=STAND_IN)
    assert sum(int(row["support"]) for row in table(again.folder, "per_class")) == 50


@pytest.mark.parametrize(
    ("shape", "classes", "refused"),
    [((8, 5, 3), "ab", ""), ((8, 1, 5, 3), "ab", "(8, 1, 5, 3) of 2"), ((8, 5, 3), "", "(8, 5, 3) of 0")],
)
def test_the_network_has_the_sizes_of_the_loaded_data(
    shape: tuple[int, ...], classes: str, refused: str
) -> None:
    data = Data(4)
    task = RNNFashion(RNN, data, nn.Identity())
    data.class_names = tuple(classes)  # as `load` may do
    made = Run("", 0, select("cpu", "float32", 1, False), data, {"train": Split(torch.zeros(shape))})
    if refused:
        with pytest.raises(
            UserError, match=re.escape(f"(N, rows, columns), such as data=fashion_mnist, got {refused} ")
        ):
            task.build(made)
    else:
        network = task.build(made)
        assert (network.input_to_hidden.in_features, network.hidden_to_output.out_features) == (3, 2)
