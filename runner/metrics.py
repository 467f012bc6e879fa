"""Loss, accuracy, precision, recall and F1 from one confusion matrix that is counted on the device.

Everything is a function of the counts n[i, j], how many samples of class i were taken for class j. Write
TP_c = n[c, c], P_c = Σ_i n[i, c] (predicted as c) and S_c = Σ_j n[c, j] (the support of c), N = Σ_c S_c, and
let K be the classes that occur in the targets or in the predictions. Then, per class,

    precision_c = TP_c / P_c    recall_c = TP_c / S_c    F1_c = 2 TP_c / (P_c + S_c)

where F1_c is the harmonic mean of the other two (van Rijsbergen 1979, Information Retrieval, chapter 7: 1 − E
at α = 1/2), and over classes (Sokolova & Lapalme 2009, "A systematic analysis of performance measures for
classification tasks", table 3: M and μ)

    macro      Σ_{c in K} score_c / |K|: macro F1 is the mean of the F1_c, as scikit-learn and torchmetrics
               have it, not the F1 of two means as in table 3 (Opitz & Burst 2019, arXiv 1911.03347, on both)
    micro      the score of the summed counts: with one label per sample all three are the accuracy Σ TP_c / N
    weighted   Σ_c (S_c / N) score_c

0/0 is 0: the precision of a class that was never predicted, the recall of one that never occurred.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from runner.errors import at_least

Average = Literal["macro", "micro", "weighted"] | None  # None: per class
IGNORED = -100  # a target that does not count, as in torch's cross_entropy


class Classification(Metric):
    """Count one classifier's outputs on their device; only reading the counts waits for the device.

    Other arguments than `num_classes` are those of `torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False  # a batch's counts do not depend on those before

    confusion: Tensor  # (C, C) int64: row = target, column = prediction
    loss_sum: Tensor  # scalar float64 (float32 on MPS): the sum over samples
    count: Tensor  # scalar int64: the samples in `loss_sum`

    def __init__(self, num_classes: int, **kwargs: Any):
        super().__init__(**kwargs)
        at_least(1, num_classes=num_classes)
        self.num_classes = num_classes
        states = {
            "confusion": torch.zeros(num_classes, num_classes, dtype=torch.int64),
            "loss_sum": torch.zeros((), dtype=torch.float64),
            "count": torch.zeros((), dtype=torch.int64),
        }
        for name, zero in states.items():
            self.add_state(name, zero, dist_reduce_fx="sum", persistent=True)

    def update(self, logits: Tensor, targets: Tensor, loss: Tensor | None = None) -> None:
        """Add a batch: logits (B, C), targets (B,) of any integer type, loss the scalar mean over the batch.

        Sequences count alike: logits (B, T, C), targets (B, T). Targets of IGNORED are left out; others outside
        [0, C) are an IndexError on the CPU and a device-side assertion on CUDA.

        Raises:
            ValueError: the shapes do not fit.
        """
        C, shape = self.num_classes, tuple(logits.shape[:-1])
        if logits.shape != (*shape, C) or targets.shape != shape:
            shapes = f"{tuple(logits.shape)} and {tuple(targets.shape)}"
            raise ValueError(f"expected logits and targets of {(*shape, C)} and {shape}, got {shapes}")
        targets = targets.flatten()
        self.confusion += confusion_counts(logits.argmax(-1).flatten(), targets, C)
        if loss is not None:
            counted = (targets != IGNORED).sum()
            self.loss_sum += loss.detach().to(self.loss_sum.dtype) * counted
            self.count += counted

    def compute(self) -> dict[str, Tensor]:
        """Return loss (NaN where none was given), accuracy, macro precision, recall and F1, float64 on the CPU.

        On the CPU because one copy of the counts is one wait for the device, not one for every number, and
        because not every device has float64.
        """
        confusion = self.confusion.cpu()
        return {
            "loss": self.loss_sum.cpu().double() / self.count.cpu(),
            "accuracy": accuracy(confusion),
            "precision": precision(confusion, "macro"),
            "recall": recall(confusion, "macro"),
            "f1": f1(confusion, "macro"),
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        try:
            fn(torch.zeros((), dtype=torch.float64))
        except TypeError:  # on its way to a device that has no float64: MPS
            self.loss_sum = self.loss_sum.float()
            self._defaults["loss_sum"] = torch.zeros((), device=self.device)
        return super()._apply(fn, exclude_state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # torchmetrics would keep the given tensors themselves: on their device, changed by our updates, and
        # hidden behind the result of an earlier compute()
        for name in self._defaults:
            if prefix + name in state_dict:
                getattr(self, name).copy_(state_dict.pop(prefix + name))
        self._computed = None
        self._update_count += 1  # there are counts, so compute() need not warn that there are none
        super()._load_from_state_dict(state_dict, prefix, *args)


def confusion_counts(predictions: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Count predictions (N,) of targets (N,): (C, C) int64, row = target, column = prediction.

    Targets of IGNORED are left out.
    """
    # bincount, or a selection, would wait for a CUDA device, to learn the size of its result
    counted = targets != IGNORED
    cell = torch.add(predictions, targets, alpha=num_classes) * counted  # (N,) = C target + prediction
    counts = cell.new_zeros(num_classes, num_classes)
    counts.view(-1).index_add_(0, cell, counted.to(cell.dtype))
    return counts


def accuracy(confusion: Tensor) -> Tensor:
    """Return Σ TP_c / N of counts (C, C), the share of samples that were classified correctly."""
    return recall(confusion, "micro")


def precision(confusion: Tensor, average: Average = "macro") -> Tensor:
    """Return TP_c / P_c of counts (C, C): (C,) per class, or averaged."""
    hits, predicted, _ = _counts(confusion)
    return _score(confusion, hits, predicted, average)


def recall(confusion: Tensor, average: Average = "macro") -> Tensor:
    """Return TP_c / S_c of counts (C, C): (C,) per class, or averaged."""
    hits, _, supports = _counts(confusion)
    return _score(confusion, hits, supports, average)


def f1(confusion: Tensor, average: Average = "macro") -> Tensor:
    """Return 2 TP_c / (P_c + S_c) of counts (C, C): (C,) per class, or averaged."""
    hits, predicted, supports = _counts(confusion)
    return _score(confusion, 2 * hits, predicted + supports, average)


def per_class(confusion: Tensor) -> dict[str, Tensor]:
    """Return precision, recall and F1 of each class, float64 (C,), and its support, int64 (C,)."""
    return {
        "precision": precision(confusion, None),
        "recall": recall(confusion, None),
        "f1": f1(confusion, None),
        "support": confusion.sum(1),
    }


def _counts(confusion: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return TP, P and S per class, each (C,)."""
    C = len(confusion)
    if confusion.shape != (C, C):
        raise ValueError(f"expected a square confusion matrix, got {tuple(confusion.shape)}")
    return confusion.diagonal(), confusion.sum(0), confusion.sum(1)


def _score(confusion: Tensor, numerator: Tensor, denominator: Tensor, average: Average) -> Tensor:
    """Average the ratio of two counts per class, both (C,)."""
    _, predicted, supports = _counts(confusion)
    if average == "micro":
        return _divide(numerator.sum(), denominator.sum())
    scores = _divide(numerator, denominator)
    if average is None:
        return scores
    if average not in ("macro", "weighted"):
        raise ValueError(f"average must be macro, micro, weighted or None, got {average!r}")
    weights = supports if average == "weighted" else (predicted + supports > 0).long()
    return (scores * _divide(weights, weights.sum())).sum()


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the float64 ratio of two counts; 0/0 is 0 (the first is zero wherever the second is)."""
    return numerator.double() / denominator.clamp(min=1)
