"""runner.metrics against hand-worked numbers, scikit-learn and torchmetrics."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import sklearn.metrics
import torch
import torchmetrics.functional.classification as reference
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassF1Score

from runner import metrics
from runner.metrics import Classification
from tests.conftest import LIMIT

C, N = 5, 203
random = torch.Generator().manual_seed(3)
TARGETS = torch.randint(C, (N,), generator=random)
PREDICTIONS = torch.where(torch.rand(N, generator=random) < 0.6, TARGETS, TARGETS.roll(1))
present, absent = TARGETS != 2, (TARGETS != 2) & (PREDICTIONS != 2)
CASES = {  # predictions and targets, both (N,)
    "random": (PREDICTIONS, TARGETS),
    "absent_class": (PREDICTIONS[absent], TARGETS[absent]),
    "only_predicted": (PREDICTIONS[present], TARGETS[present]),
    "one_class": (torch.full((7,), 3), torch.full((7,), 3)),
    "all_wrong": ((TARGETS + 1) % C, TARGETS),
}
cases = pytest.mark.parametrize(("predictions", "targets"), CASES.values(), ids=CASES)


def logits_for(predictions: Tensor) -> Tensor:
    """(N, C) whose largest entry is the prediction's, by a random margin."""
    noise = torch.rand(len(predictions), C, generator=torch.Generator().manual_seed(4))
    return noise + 2 * torch.nn.functional.one_hot(predictions, C)


# logits, targets and mean loss per batch, the last one smaller
BATCHES = [
    (logits, targets, torch.nn.functional.cross_entropy(logits, targets))
    for logits, targets in zip(logits_for(PREDICTIONS).split(64), TARGETS.split(64), strict=True)
]


def filled(batches: Sequence[tuple[Tensor, ...]] = BATCHES) -> Classification:
    meter = Classification(C)
    for batch in batches:
        meter.update(*batch)
    return meter


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], rtol: float = 1e-12) -> None:
    torch.testing.assert_close(one, other, rtol=rtol, atol=0)


def test_per_class_by_hand() -> None:
    """Targets a a a b b, predictions a a b b b and a third class that nobody has."""
    confusion = torch.tensor([[2, 1, 0], [0, 2, 0], [0, 0, 0]])
    expected = {
        "precision": torch.tensor([2 / 2, 2 / 3, 0], dtype=torch.float64),
        "recall": torch.tensor([2 / 3, 2 / 2, 0], dtype=torch.float64),
        "f1": torch.tensor([4 / 5, 4 / 5, 0], dtype=torch.float64),
        "support": torch.tensor([3, 2, 0]),
    }
    torch.testing.assert_close(metrics.per_class(confusion), expected)


@cases
def test_confusion_and_accuracy_equal_scikit_learn_and_torchmetrics(
    predictions: Tensor, targets: Tensor
) -> None:
    confusion = filled([(logits_for(predictions), targets)]).confusion
    theirs = sklearn.metrics.confusion_matrix(targets, predictions, labels=range(C))
    assert confusion.equal(torch.from_numpy(theirs))
    assert confusion.equal(reference.multiclass_confusion_matrix(predictions, targets, C))
    accuracy = sklearn.metrics.accuracy_score(targets, predictions)
    assert float(metrics.accuracy(confusion)) == pytest.approx(accuracy)


@cases
@pytest.mark.parametrize("average", ["macro", "micro", "weighted", None])
def test_scores_equal_scikit_learn_and_torchmetrics(
    average: metrics.Average, predictions: Tensor, targets: Tensor
) -> None:
    confusion = filled([(logits_for(predictions), targets)]).confusion
    options = {"labels": list(range(C)) if average is None else None, "average": average, "zero_division": 0}
    for name in ("precision", "recall", "f1"):
        ours = getattr(metrics, name)(confusion, average)
        theirs = getattr(sklearn.metrics, f"{name}_score")(targets, predictions, **options)
        expected = torch.as_tensor(theirs, dtype=torch.float64)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-15)
        score = getattr(reference, f"multiclass_{name}" + "_score" * (name == "f1"))
        expected = score(predictions, targets, C, average=average or "none").double()
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)  # theirs is float32


def test_nothing_counted_is_zero_and_a_loss_never_given_is_nan() -> None:
    empty = torch.zeros(C, C, dtype=torch.int64)
    for score in (metrics.precision, metrics.recall, metrics.f1):
        assert [float(score(empty, average)) for average in ("macro", "micro", "weighted")] == [0, 0, 0]
    assert float(metrics.accuracy(empty)) == 0
    values = filled([(torch.eye(C), torch.arange(C))]).compute()
    assert values["loss"].isnan() and values["accuracy"] == 1


def test_a_ragged_last_batch_is_exact() -> None:
    """203 samples by 64, 64, 64 and 11 against all at once: the loss is the mean over samples."""
    values, loss = filled().compute(), torch.nn.functional.cross_entropy(logits_for(PREDICTIONS), TARGETS)
    assert list(values) == ["loss", "accuracy", "precision", "recall", "f1"]
    assert all(value.dtype == torch.float64 and value.ndim == 0 for value in values.values())
    f1 = sklearn.metrics.f1_score(TARGETS, PREDICTIONS, average="macro")
    assert (float(values["loss"]), float(values["f1"])) == pytest.approx((loss.item(), f1), rel=1e-6)


def test_merged_partial_counts_equal_the_whole_and_reset_forgets_them() -> None:
    meter = filled(BATCHES[::2])
    meter.merge_state(filled(BATCHES[1::2]))
    assert meter.confusion.equal(filled().confusion)
    assert_same(meter.compute(), filled().compute())
    meter.reset()
    assert not meter.confusion.any() and not meter.loss_sum and not meter.count


def test_forward_gives_the_batch_and_adds_it() -> None:
    meter = filled(BATCHES[:1])
    assert_same(meter(*BATCHES[1]), filled(BATCHES[1:2]).compute())
    assert int(meter.count) == int(meter.confusion.sum()) == 128


def test_state_dict_round_trip_copies_and_goes_on() -> None:
    saved = filled().state_dict()
    assert set(saved) == {"confusion", "loss_sum", "count"}
    meter, fresh = filled(BATCHES[:1]), Classification(C)
    meter.compute()  # its cached result must not outlive the loading
    for loaded in (meter, fresh):
        loaded.load_state_dict(saved)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torchmetrics warns of a compute() before any update()
            assert_same(loaded.compute(), filled().compute())
    meter.update(*BATCHES[0])
    assert int(saved["count"]) == N and int(meter.count) == N + 64
    with pytest.raises(RuntimeError, match="size"):
        Classification(C + 1).load_state_dict(filled().state_dict())


def test_composes_with_torchmetrics() -> None:
    collection = MetricCollection({"ours": Classification(C), "theirs": MulticlassF1Score(C)})
    for logits, targets, loss in BATCHES:
        collection.update(logits, targets, loss=loss)
    values = {name: value.item() for name, value in collection.compute().items()}
    assert values["f1"] == pytest.approx(values["theirs"], rel=1e-6)
    assert values["loss"] == pytest.approx(filled().compute()["loss"].item())


def test_bfloat16_losses_are_summed_in_float64() -> None:
    meter = Classification(2)
    for _ in range(1000):
        loss = torch.tensor(1.0078125, dtype=torch.bfloat16, requires_grad=True)
        meter.update(torch.eye(2, dtype=torch.bfloat16), torch.arange(2), loss)
    assert meter.loss_sum.item() == 1000 * 2 * 1.0078125 and not meter.loss_sum.requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_counts_on_a_cuda_device_without_waiting_for_it() -> None:
    meter = Classification(C).to("cuda")
    on_device = [[tensor.to("cuda") for tensor in batch] for batch in BATCHES]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in on_device:
            meter.update(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert meter.confusion.is_cuda
    assert_same(meter.compute(), filled().compute(), rtol=1e-6)


def test_update_reads_nothing() -> None:
    """On the meta device there are no values to read."""
    meter = Classification(C).to("meta")
    meter.update(*(tensor.to("meta") for tensor in BATCHES[0]))
    assert meter.confusion.shape == (C, C) and meter.confusion.is_meta


def test_a_device_without_float64_sums_in_float32() -> None:
    def to_such_a_device(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return tensor.clone()

    meter = filled()._apply(to_such_a_device)
    assert meter.loss_sum.dtype == torch.float32
    assert_same(meter.compute(), filled().compute(), rtol=1e-6)
    meter.reset()
    meter.update(*BATCHES[0])
    assert meter.loss_sum.dtype == torch.float32 and meter.compute()["loss"].dtype == torch.float64


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: filled([(torch.rand(4, 6), torch.zeros(4))]), r"\(4, 5\) and \(4,\), got \(4, 6\)"),
        (lambda: filled([(torch.rand(4, C), torch.zeros(3))]), r"got \(4, 5\) and \(3,\)"),
        (lambda: filled([(torch.rand(1, C), torch.tensor([-1]))]), "index out of range"),
        (lambda: filled([(torch.rand(1, C), torch.tensor([C]))]), "index out of range"),
        (lambda: metrics.f1(torch.eye(C).long(), "mean"), "macro, micro, weighted or None, got 'mean'"),
        (lambda: metrics.accuracy(torch.zeros(2, 3, dtype=torch.int64)), "square"),
        (lambda: Classification(0), "at least 1"),
    ],
)
def test_wrong_shapes_labels_and_averages_are_refused(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, IndexError, RuntimeError), match=message):
        mistake()


def count_share(rank: int, folder: Path) -> None:
    """One of two processes: every second batch, then the metrics over both."""
    meeting, patience = f"file://{folder}/meeting", timedelta(seconds=LIMIT)
    torch.distributed.init_process_group("gloo", meeting, patience, rank=rank, world_size=2)
    try:
        meter = filled(BATCHES[rank::2])
        values = meter.compute()
        assert int(meter.count) == (128, 75)[rank]  # after compute() each goes on with its own counts
    finally:
        torch.distributed.destroy_process_group()
    assert_same(values, filled().compute())


def test_two_processes_equal_one(tmp_path: Path) -> None:
    # a fork has the packages that a spawned process would import for seconds
    other = torch.multiprocessing.get_context("fork").Process(target=count_share, args=(0, tmp_path))
    other.start()
    try:
        count_share(1, tmp_path)
        other.join(LIMIT)
        assert other.exitcode == 0
    finally:
        other.kill()
