"""runner.metrics against hand-worked numbers, scikit-learn and torchmetrics."""

from __future__ import annotations

import warnings
from collections.abc import Callable
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
from tests.runner.test_task import Reads

C = 5
CASES = ["random", "absent_class", "only_predicted", "one_class", "all_wrong"]


def predictions_and_targets(case: str) -> tuple[Tensor, Tensor]:
    """Both (N,)."""
    random = torch.Generator().manual_seed(3)
    targets = torch.randint(C, (203,), generator=random)
    predictions = torch.where(torch.rand(203, generator=random) < 0.6, targets, targets.roll(1))
    present = targets != 2
    return {
        "random": (predictions, targets),
        "absent_class": (predictions[present & (predictions != 2)], targets[present & (predictions != 2)]),
        "only_predicted": (predictions[present], targets[present]),
        "one_class": (torch.full((7,), 3), torch.full((7,), 3)),
        "all_wrong": ((targets + 1) % C, targets),
    }[case]


def logits_for(predictions: Tensor) -> Tensor:
    """(N, C) whose largest entry is the prediction's, by a random margin."""
    noise = torch.rand(len(predictions), C, generator=torch.Generator().manual_seed(4))
    return noise + 2 * torch.nn.functional.one_hot(predictions, C)


def batches(size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Logits, targets and mean loss per batch, the last one smaller."""
    predictions, targets = predictions_and_targets("random")
    pairs = zip(logits_for(predictions).split(size), targets.split(size), strict=True)
    return [(logits, target, torch.nn.functional.cross_entropy(logits, target)) for logits, target in pairs]


def counted(case: str) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions, targets and the confusion matrix of a case."""
    predictions, targets = predictions_and_targets(case)
    meter = Classification(C)
    meter.update(logits_for(predictions), targets)
    return predictions, targets, meter.confusion


def filled(size: int = 64) -> Classification:
    meter = Classification(C)
    for logits, targets, loss in batches(size):
        meter.update(logits, targets, loss)
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


@pytest.mark.parametrize("case", CASES)
def test_confusion_and_accuracy_equal_scikit_learn_and_torchmetrics(case: str) -> None:
    predictions, targets, confusion = counted(case)
    theirs = sklearn.metrics.confusion_matrix(targets, predictions, labels=range(C))
    assert confusion.equal(torch.from_numpy(theirs))
    assert confusion.equal(reference.multiclass_confusion_matrix(predictions, targets, C))
    accuracy = sklearn.metrics.accuracy_score(targets, predictions)
    assert float(metrics.accuracy(confusion)) == pytest.approx(accuracy)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("average", ["macro", "micro", "weighted", None])
def test_scores_equal_scikit_learn_and_torchmetrics(average: metrics.Average, case: str) -> None:
    predictions, targets, confusion = counted(case)
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
    meter = Classification(C)
    meter.update(torch.eye(C), torch.arange(C))
    assert meter.compute()["loss"].isnan() and meter.compute()["accuracy"] == 1


def test_a_ragged_last_batch_is_exact() -> None:
    """203 samples by 64, 64, 64 and 11 against all at once: the loss is the mean over samples."""
    [(logits, targets, loss)] = batches(203)
    values = filled(size=64).compute()
    assert list(values) == ["loss", "accuracy", "precision", "recall", "f1"]
    assert all(value.dtype == torch.float64 and value.ndim == 0 for value in values.values())
    f1 = sklearn.metrics.f1_score(targets, logits.argmax(1), average="macro")
    assert (float(values["loss"]), float(values["f1"])) == pytest.approx((loss.item(), f1), rel=1e-6)


def test_merged_partial_counts_equal_the_whole_and_reset_forgets_them() -> None:
    halves = [Classification(C), Classification(C)]
    for number, batch in enumerate(batches(64)):
        halves[number % 2].update(*batch)
    halves[0].merge_state(halves[1])
    assert halves[0].confusion.equal(filled().confusion)
    assert_same(halves[0].compute(), filled().compute())
    halves[0].reset()
    assert not halves[0].confusion.any() and not halves[0].loss_sum and not halves[0].count


def test_forward_gives_the_batch_and_adds_it() -> None:
    meter, alone, [first, second, *_] = Classification(C), Classification(C), batches(64)
    meter.update(*first)
    alone.update(*second)
    assert_same(meter(*second), alone.compute())
    assert int(meter.count) == int(meter.confusion.sum()) == 128


def test_state_dict_round_trip_copies_and_goes_on() -> None:
    saved = filled().state_dict()
    assert set(saved) == {"confusion", "loss_sum", "count"}
    meter = Classification(C)
    meter.update(*batches(64)[0])
    meter.compute()  # its cached result must not outlive the loading
    meter.load_state_dict(saved)
    fresh = Classification(C)
    fresh.load_state_dict(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torchmetrics warns of a compute() before any update()
        for loaded in (meter, fresh):
            assert_same(loaded.compute(), filled().compute())
    meter.update(*batches(64)[0])
    assert int(saved["count"]) == 203 and int(meter.count) == 203 + 64
    with pytest.raises(RuntimeError, match="size"):
        Classification(C + 1).load_state_dict(filled().state_dict())


def test_composes_with_torchmetrics() -> None:
    collection = MetricCollection({"ours": Classification(C), "theirs": MulticlassF1Score(C)})
    for logits, targets, loss in batches(64):
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
    on_device = [[tensor.to("cuda") for tensor in batch] for batch in batches(64)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in on_device:
            meter.update(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert meter.confusion.is_cuda
    assert_same(meter.compute(), filled().compute(), rtol=1e-6)


def test_update_does_not_synchronise() -> None:
    meter, batch = Classification(C), batches(64)[0]
    with Reads() as reads:
        meter.update(*batch)
    assert not reads.operations
    meter = Classification(C).to("meta")  # a device without values has none to read
    meter.update(*(tensor.to("meta") for tensor in batch))
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
    meter.update(*batches(64)[0])
    assert meter.loss_sum.dtype == torch.float32 and meter.compute()["loss"].dtype == torch.float64


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            lambda: Classification(C).update(torch.rand(4, 6), torch.zeros(4)),
            r"\(4, 5\) and \(4,\), got \(4, 6\)",
        ),
        (lambda: Classification(C).update(torch.rand(4, C), torch.zeros(3)), r"got \(4, 5\) and \(3,\)"),
        (lambda: Classification(C).update(torch.rand(1, C), torch.tensor([-1])), "index out of range"),
        (lambda: Classification(C).update(torch.rand(1, C), torch.tensor([C])), "index out of range"),
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
    meeting, patience = f"file://{folder}/meeting", timedelta(minutes=15)
    torch.distributed.init_process_group("gloo", meeting, patience, rank=rank, world_size=2)
    try:
        meter = Classification(C)
        for batch in batches(64)[rank::2]:
            meter.update(*batch)
        values = meter.compute()
        assert int(meter.count) == (128, 75)[rank]  # after compute() each goes on with its own counts
    finally:
        torch.distributed.destroy_process_group()
    assert_same(values, filled().compute())


def test_two_processes_equal_one(tmp_path: Path) -> None:
    # a fork has the packages that a spawned process would import for seconds
    other = torch.multiprocessing.get_context("fork").Process(target=count_share, args=(0, tmp_path))
    other.start()
    count_share(1, tmp_path)
    other.join()
    assert other.exitcode == 0
