"""A vanilla tanh RNN reads Fashion-MNIST row by row, 28 rows of 28 pixels, and predicts the garment.

Shown beside the curves: the test set before and after training, how gradients vanish or explode on their way back
through time, what clipping does to the step that follows a spike, and the most confident mistakes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from experiments.nn.rnn import RNN, gradient_norms_through_time
from experiments.rnn_fashion import clipping, figures
from runner.data import Batch, Data
from runner.errors import UserError
from runner.task import Output, Run, Task

_GAINS = (0.5, 1.0, 1.5, 3.0)  # of W_hh at initialisation: gradients vanish, fade, last, explode
_SAMPLED = 1000  # training images that a gradient norm is the mean of
# the clipping figure: plain SGD on small batches, its gradient clipped at 1 or not at all, at a learning rate
# that diverges without clipping: about as far as momentum 0.9 gets with 0.05, η / (1 − μ)
_SPIKE_LR, _SPIKE_LIMIT, _SPIKE_STEPS, _SPIKE_BATCH = 0.6, 1.0, 200, 128
_SPIKE_SETTLE = 50  # steps before which no gradient counts as a spike


class RNNFashion(Task):
    """Train `model` on the rows of `data` with `loss`, a module that takes logits (B, C) and targets (B,)."""

    def __init__(self, model: Callable[..., nn.Module], data: Data, loss: nn.Module):
        self.data: Data = data
        self.model, self.loss = model, loss
        self.untrained: dict[str, Any] = {}  # predictions and gradient norms, for `after` to compare with

    def build(self, run: Run) -> RNN:
        """Return the network, for rows as wide as the images and as many classes as the data has."""
        shape, classes = tuple(run.splits["train"].inputs.shape), len(self.data.class_names)
        if len(shape) != 3 or not classes:
            expected = "expected labelled images (N, rows, columns), such as data=fashion_mnist"
            raise UserError(f"{expected}, got {shape} of {classes} classes")
        self.width = shape[2]
        self.network = self._new_network()
        return self.network

    def _new_network(self, **changes: Any) -> RNN:
        """Return a new network with the run's arguments and `changes`."""
        network = self.model(input_size=self.width, num_classes=len(self.data.class_names), **changes)
        assert isinstance(network, RNN)
        return network

    def train(self, batch: Batch) -> Output:
        """Return the loss of a batch of images (B, 28, 28): time runs over the rows."""
        logits = self.network(batch.inputs)  # (B, C)
        return Output(self.loss(logits, batch.targets), logits, batch.targets)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.untrained}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.untrained = state["seen"]

    def before(self, run: Run) -> None:
        """Keep the untrained network's predictions and gradient norms; draw what clipping does."""
        norms = self._gradient_norms(run, self.network)
        self.untrained = {"predictions": run.predictions[""].labels, **norms, "gains": {}}
        for gain in _GAINS:
            network = self._new_network(gain=gain).to(run.device)
            self.untrained["gains"][str(gain)] = self._gradient_norms(run, network)["last"]

        if run.draws:
            self._draw_clipping(run)

    def after(self, run: Run) -> None:
        """Draw what training has changed."""
        # predictions before and after, fewer where loop.eval_batches differs
        targets, after = run.predictions[""].targets, run.predictions[""].labels
        N = min(len(self.untrained["predictions"]), len(targets))
        before, after, targets = self.untrained["predictions"][:N], after[:N], targets[:N]

        # figures
        images, names = run.splits["test"].inputs.cpu(), self.data.class_names
        figures.draw_before_after(run, images, targets, before, after, names)
        figures.draw_gradients(run, self.untrained, self._gradient_norms(run, self.network))

    def _sample(self, run: Run, purpose: str, count: int) -> tuple[Tensor, Tensor]:
        """Return training images as the network sees them, (count, 28, 28), and their targets (count,).

        Images are repeated where there are fewer than `count`.
        """
        split = run.splits["train"]
        assert split.targets is not None
        order = torch.randperm(len(split), generator=run.generator(purpose))
        chosen = order[torch.arange(count) % len(order)].to(run.device)
        return self.data.transform(split.inputs[chosen], None), split.targets[chosen]

    def _gradient_norms(self, run: Run, network: RNN) -> dict[str, Tensor]:
        """Return ‖∂L/∂h_t‖ for t = 1…T, the mean over sampled images, (T,): in all, and through h_T alone."""
        inputs, targets = self._sample(run, "gradients", _SAMPLED)
        network.eval()
        return {
            "all": gradient_norms_through_time(network, inputs, targets, self.loss).cpu(),
            "last": gradient_norms_through_time(network, inputs, targets, self.loss, last_only=True).cpu(),
        }

    def _draw_clipping(self, run: Run) -> None:
        """Draw plain SGD from this run's weights, clipped and not, and the step that follows a spike."""
        unclipped, clipped = self._replay(run, None), self._replay(run, _SPIKE_LIMIT)
        inputs, targets = self._sample(run, "spike", _SAMPLED)
        network = self._new_network().to(run.device).eval()

        def loss_at(lengths: list[float]) -> list[float]:
            return clipping.loss_along(network, clipped, lengths, inputs, targets, self.loss)

        figures.draw_clipping(run, unclipped, clipped, loss_at, _SPIKE_LR, _SPIKE_LIMIT, len(inputs))

    def _replay(self, run: Run, limit: float | None) -> clipping.Replay:
        """Run plain SGD from the network's present weights, on the same batches in every replay."""
        network = self._new_network().to(run.device).eval()
        network.load_state_dict(self.network.state_dict())
        inputs, targets = self._sample(run, "replay", _SPIKE_STEPS * _SPIKE_BATCH)
        batches = zip(inputs.split(_SPIKE_BATCH), targets.split(_SPIKE_BATCH), strict=True)
        return clipping.replay(network, batches, self.loss, _SPIKE_LR, limit, _SPIKE_SETTLE)
