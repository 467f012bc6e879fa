"""A vanilla tanh RNN reads Fashion-MNIST row by row, 28 rows of 28 pixels, and names the garment.

Shown beside the curves: the test set before and after training, how gradients fade or grow on their way back
through time, what clipping does to the step that follows a spike, and the most confident mistakes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from experiments.nn.rnn import RNN, gradient_norms_through_time
from runner import figures
from runner.data import Batch, Data
from runner.task import Output, Run, Task

GAINS = (0.5, 1.0, 2.0)  # of W_hh at initialisation: gradients vanish, fade, explode
SHOWN = 32  # images in a picture
SAMPLED = 500  # images behind a gradient figure


class RNNFashion(Task):
    """Train `model` on `data` with `loss`; `clip_norm` and `lr` are drawn, the loop is what uses them."""

    def __init__(
        self,
        model: Callable[..., nn.Module],
        data: Data,
        loss: nn.Module,
        clip_norm: float | None = 1.0,
        lr: float = 0.05,
    ):
        self.model, self.data, self.loss = model, data, loss
        self.clip_norm, self.lr = clip_norm, lr
        self.untrained: dict[str, Tensor] = {}  # what `before` saw and `after` compares with

    def build(self, run: Run) -> RNN:
        """The network, for rows as wide as the images and as many classes as the data has."""
        width = run.splits["train"].inputs.shape[-1]
        network = self.model(input_size=width, num_classes=len(run.data.class_names) if run.data else 0)
        assert isinstance(network, RNN)
        self.network = network
        return network

    def train(self, batch: Batch) -> Output:
        """Cross-entropy of the batch: inputs (B, 28, 28), a row of pixels per time step."""
        logits = self.network(batch.inputs)  # (B, classes)
        return Output(self.loss(logits, batch.targets), logits, batch.targets)

    def state_dict(self) -> dict[str, Any]:
        return {"untrained": self.untrained}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.untrained = state["untrained"]

    def before(self, run: Run) -> None:
        """Remember the untrained network's answers and its gradients through time."""
        logits, targets = self.predict(run)
        run.tracker.pr_curves("test", targets, logits.softmax(1), self.class_names, run.step)
        self.untrained = {"predictions": logits.argmax(1), "gradients": self.gradients(run, self.network)}
        for gain in GAINS:
            network = self.model(
                input_size=self.network.input_to_hidden.in_features,
                num_classes=len(self.class_names),
                gain=gain,
            )
            self.untrained[f"gradients_gain_{gain}"] = self.gradients(run, network.to(run.device))

    def after(self, run: Run) -> None:
        """Draw what the training has changed."""
        logits, targets = self.predict(run)
        before, after = self.untrained["predictions"], logits.argmax(1)
        run.tracker.pr_curves("test", targets, logits.softmax(1), self.class_names, run.step)
        images = run.splits["test"].inputs.cpu()
        self.draw_images(run, images, targets, before, after)
        self.draw_classes(run, targets, before, after)
        self.draw_mistakes(run, images, targets, logits.softmax(1))
        self.draw_gradients(run)
        self.draw_clipping(run)

    @property
    def class_names(self) -> tuple[str, ...]:
        assert self.data is not None
        return self.data.class_names

    def predict(self, run: Run) -> tuple[Tensor, Tensor]:
        """Logits (N, classes) float32 and targets (N,) of the test set, on the CPU."""
        with run.inference("predict"):
            found = [
                (self.network(batch.inputs).float().cpu(), batch.targets) for batch in run.batches("test")
            ]
        targets = [t.cpu() for _, t in found if t is not None]
        return torch.cat([logits for logits, _ in found]), torch.cat(targets)

    def sample(self, run: Run) -> tuple[Tensor, Tensor]:
        """Training images as the network sees them, (SAMPLED, 28, 28), and their targets."""
        split = run.splits["train"]
        assert self.data is not None and split.targets is not None
        chosen = torch.randperm(len(split), generator=run.generator("sample"))[:SAMPLED].to(run.device)
        return self.data.transform(split.inputs[chosen], None), split.targets[chosen]

    def gradients(self, run: Run, network: RNN) -> Tensor:
        """‖∂L/∂h_t‖ for t = 1…T, the mean over sampled images: (T,) on the CPU."""
        inputs, targets = self.sample(run)
        return gradient_norms_through_time(network, inputs, targets, self.loss).cpu()

    def draw_images(self, run: Run, images: Tensor, targets: Tensor, before: Tensor, after: Tensor) -> None:
        """The same test images with the answers of the untrained and of the trained network."""
        shown = torch.randperm(len(images), generator=run.generator("shown"))[:SHOWN]
        run.figure(
            "before_after",
            figures.image_grids(
                {
                    f"before training: {accuracy(before, targets):.1%} of the test set right": images[shown],
                    f"after: {accuracy(after, targets):.1%} right": images[shown],
                },
                [self.captions(before[shown], targets[shown]), self.captions(after[shown], targets[shown])],
            ),
        )

    def captions(self, predictions: Tensor, targets: Tensor) -> list[tuple[str, bool]]:
        """True and predicted label of each image, and whether they agree."""
        names = self.class_names
        return [
            (names[p] if p == t else f"{names[p]}\n(is {names[t]})", p == t)
            for p, t in zip(predictions.tolist(), targets.tolist(), strict=True)
        ]
