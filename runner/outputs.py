"""What the hooks of an experiment return: `Output`, its checks, and the sums and predictions of many batches."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from runner.errors import UserError
from runner.metrics import IGNORED, Classification, confusion_counts
from runner.records.console import shown_path

T = TypeVar("T")
FORGOTTEN_INIT = "before Module.__init__()"  # torch's words for a network whose constructor forgot it
_MOST_CLASSES = 1000  # with a confusion matrix; above, such as words, loss and accuracy alone
_MOST_KEPT = 2**24  # probabilities of one network, 64 MiB; those of later samples are left out
# as the CPU, CUDA, a convolution and MPS say it
_OTHER_DEVICE = re.compile("on the same device|on the expected device|weight type|Placeholder storage")


@dataclass
class Output:
    """Model outputs and loss for one batch.

    Logits and targets together make a classifier, of samples or of sequences: it gets accuracy, precision, recall
    and F1, a confusion matrix, scores per class and precision-recall curves, and of images its mistakes. Targets
    of −100, as `cross_entropy` leaves them out, do not count.
    """

    loss: Tensor  # scalar: the mean over the batch; with a graph when training
    logits: Tensor | None = None  # (batch, classes), or (batch, time, classes)
    targets: Tensor | None = None  # (batch,), or (batch, time)
    scalars: dict[str, Tensor] = field(default_factory=dict)  # the task's own, each a mean over the batch


def hook_error(hook: Callable[..., Any], expected: str, given: object) -> UserError:
    """Build the error for a hook that returned something else than expected, with its class and file."""
    code = inspect.unwrap(getattr(hook, "__func__", hook)).__code__
    place = f"{shown_path(Path(code.co_filename))}, line {code.co_firstlineno}"
    return UserError(f"{hook.__qualname__} ({place}): expected {expected}, got {_describe(given)}.")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {tuple(value.shape)}, {value.dtype}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return str(value) if value is None or isinstance(value, str) else f"a {type(value).__name__}"


def by_variant(hook: Callable[..., Any], result: object, kind: type[T], expected: str) -> dict[str, T]:
    """Return what a hook returned by variant; a single one has the name "".

    Raises:
        UserError: it is neither of this kind nor a dict of them by name.
    """
    results: dict[Any, Any] = result if isinstance(result, dict) else {"": result}
    bad = [name for name in results if not (isinstance(name, str) and name.isidentifier())]
    if bad and result is results:
        names = "identifiers as the names of variants, such as rotary"
        raise hook_error(hook, names, ", ".join(map(repr, bad)))
    for value in results.values():
        if not isinstance(value, kind):
            raise hook_error(hook, f"{expected}, or a dict of them by name", value)
    return results


def outputs_of(train: Callable[[Any], Any], batch: Any) -> dict[str, Output]:
    """Call a task's `train` and return its outputs by variant.

    Raises:
        UserError: it returns something else, or the network is not where its inputs are.
    """
    device = batch.inputs.device
    try:
        result = train(batch)
    except RuntimeError as error:
        if not _OTHER_DEVICE.search(str(error)):
            raise
        raise _device_error(train, device, str(error).splitlines()[0].rstrip(".!")) from None
    outputs = by_variant(train, result, Output, "an Output(loss, logits, targets)")
    for output in outputs.values():
        _require_fitting(train, output)
        if output.loss.device != device:
            raise _device_error(train, device, f"a loss on {output.loss.device}")
    return outputs


def _require_fitting(train: Callable[[Any], Any], output: Output) -> None:
    """Raise UserError unless the tensors of an output have the shapes that it asks for."""
    # loss and scalars
    for name, value in {"loss": output.loss, **output.scalars}.items():
        if not isinstance(value, Tensor) or value.ndim:
            raise hook_error(train, f"a tensor of one number, (), as {name}", value)
    if torch.is_grad_enabled() and not output.loss.requires_grad:
        expected = "a loss that depends on the network, without detach, item or no_grad"
        raise hook_error(train, expected, "one without a graph")

    # a classifier
    logits, targets = output.logits, output.targets
    if logits is None or targets is None:
        return
    if targets.is_floating_point() or logits.shape[:-1] != targets.shape or not targets.ndim:
        swapped = logits.ndim > 2 and logits.shape[:1] + logits.shape[2:] == targets.shape
        hint = "; logits.movedim(1, -1) has them" if swapped else ""
        expected = (
            "logits (batch, classes) and whole targets (batch,), or (batch, time, classes) and (batch, time)"
        )
        shapes = f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)}, {targets.dtype}{hint}"
        raise hook_error(train, expected, shapes)


def _device_error(train: Callable[[Any], Any], device: torch.device, given: str) -> UserError:
    """Build the error for a layer or tensor that is not where the batch is."""
    layers = "layers in the network that build returns (a list of them as nn.ModuleList)"
    others = "constants as its buffers, new tensors with device=batch.inputs.device"
    return hook_error(train, f"every layer and tensor on {device}: {layers}, {others}", given)


def metric_name(metric: str, variant: str) -> str:
    """Return a metric's name on screen and on disk: `accuracy`, or `accuracy.rotary` for a variant."""
    return f"{metric}.{variant}" if variant else metric


class Predictions:
    """What a classifier answers on a split: all its counts, and the probabilities of the first samples."""

    confusion: Tensor | int = 0  # (C, C) int64: row = target, column = prediction

    def __init__(self) -> None:
        self.logits: list[Tensor] = []
        self.kept: list[Tensor] = []  # targets of these
        self.room = _MOST_KEPT
        self.of_samples = True  # one target per sample, not a sequence of them

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch, without waiting for its device."""
        self.of_samples = targets.ndim == 1
        logits, targets = logits.detach().flatten(0, -2), targets.flatten()
        self.confusion = confusion_counts(logits.argmax(1), targets, logits.shape[1]) + self.confusion
        self.room -= logits.numel()
        if self.room >= 0:
            self.logits.append(logits)
            self.kept.append(targets)

    @property
    def counts(self) -> Tensor:
        """Return the confusion matrix (C, C), on the CPU."""
        return torch.as_tensor(self.confusion).cpu()

    @property
    def targets(self) -> Tensor:
        """Return the targets (N,) of the samples that were kept, on the CPU; IGNORED ones are left out."""
        targets = torch.cat(self.kept).cpu()
        return targets[targets != IGNORED]

    @property
    def places(self) -> Tensor:
        """Return where the same stood in the split (N,), counting IGNORED ones."""
        return (torch.cat(self.kept).cpu() != IGNORED).nonzero().squeeze(1)

    @property
    def labels(self) -> Tensor:
        """Return the predicted classes (N,) of the same."""
        return self.probabilities.argmax(1)

    @property
    def probabilities(self) -> Tensor:
        """Return the probabilities (N, C) of the same, float32, on the CPU."""
        logits, targets = torch.cat(self.logits).float().cpu(), torch.cat(self.kept).cpu()
        return logits[targets != IGNORED].softmax(1)


class Meters:
    """The metrics of many batches, summed on their device without waiting for it; `keep` also the predictions."""

    def __init__(self, keep: bool = False) -> None:
        self.classified: dict[str, Classification] = {}  # by variant
        self.sums: dict[str, Tensor] = {}  # over samples, by metric name with its variant
        self.counts: dict[str, int] = {}  # of the samples in `sums`
        self.predictions: dict[str, Predictions] = {}  # of the classifiers, by variant
        self.keep = keep

    def update(self, outputs: dict[str, Output], count: int) -> None:
        """Add one batch of `count` samples."""
        for variant, output in outputs.items():
            scalars, logits, targets = dict(output.scalars), output.logits, output.targets
            if logits is None or targets is None:
                scalars["loss"] = output.loss
            elif logits.shape[-1] > _MOST_CLASSES:
                counted = targets != IGNORED
                hits = (logits.argmax(-1) == targets) & counted
                scalars |= {"loss": output.loss, "accuracy": hits.sum() / counted.sum().clamp(min=1)}
            else:
                meter = self._classification(variant, logits.shape[-1], logits.device)
                meter.update(logits.detach(), targets, output.loss.detach())
                if self.keep:
                    self.predictions.setdefault(variant, Predictions()).update(logits, targets)

            # torchmetrics' MeanMetric copies the count to the device at each call, which waits for it
            for key, value in scalars.items():
                name = metric_name(key, variant)
                if name not in self.sums:
                    dtype = torch.float32 if value.device.type == "mps" else torch.float64  # which MPS lacks
                    self.sums[name], self.counts[name] = value.new_zeros((), dtype=dtype), 0
                self.sums[name].add_(value.detach(), alpha=count)
                self.counts[name] += count

    def _classification(self, variant: str, num_classes: int, device: torch.device) -> Classification:
        if variant not in self.classified:
            self.classified[variant] = Classification(num_classes).to(device)
        return self.classified[variant]

    def compute(self) -> dict[str, float]:
        """Return the metrics by name; this waits for the device."""
        values: dict[str, float] = {}
        for variant, meter in self.classified.items():
            values |= {metric_name(name, variant): float(value) for name, value in meter.compute().items()}
        return values | {name: float(total) / self.counts[name] for name, total in self.sums.items()}

    def reset(self) -> None:
        for meter in self.classified.values():
            meter.reset()
        self.sums, self.counts = {}, {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "classified": {name: dict(meter.state_dict()) for name, meter in self.classified.items()},
            "sums": self.sums,
            "counts": self.counts,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        for variant, sums in state["classified"].items():
            self._classification(variant, len(sums["confusion"]), device).load_state_dict(sums)
        self.sums = {name: total.to(device) for name, total in state["sums"].items()}
        self.counts = dict(state["counts"])
