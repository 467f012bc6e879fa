"""A vanilla tanh RNN reads Fashion-MNIST row by row, 28 rows of 28 pixels, and names the garment.

Shown beside the curves: the test set before and after training, how gradients fade or grow on their way back
through time, what clipping does to the step that follows a spike, and the most confident mistakes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from experiments.nn.rnn import RNN, decay_per_step, gradient_norms_through_time
from experiments.rnn_fashion import clipping
from runner import figures
from runner.data import Batch, Data
from runner.metrics import Classification, accuracy, per_class
from runner.task import Output, Run, Task

GAINS = (0.5, 1.0, 1.5, 3.0)  # of W_hh at initialisation: gradients vanish, fade, last, explode
SHOWN = 32  # images in a picture
SAMPLED = 1000  # training images behind a gradient norm
# the clipping figure: plain SGD on small batches, its gradient clipped at 1 or not at all, at a learning rate
# that falls apart without clipping: about as far as momentum 0.9 gets with 0.05, η / (1 − μ)
SPIKE_LR, SPIKE_LIMIT, SPIKE_STEPS, SPIKE_BATCH = 0.6, 1.0, 200, 128
SPIKE_SETTLE = 50  # steps before which no gradient counts as a spike


class RNNFashion(Task):
    """Train `model` on the rows of `data` with `loss`, a module that takes logits (B, C) and targets (B,)."""

    def __init__(self, model: Callable[..., nn.Module], data: Data, loss: nn.Module):
        self.model, self.data, self.loss = model, data, loss
        self.seen: dict[str, Any] = {}  # what `before` saw, for `after` to compare with

    @property
    def class_names(self) -> tuple[str, ...]:
        assert self.data is not None
        return self.data.class_names

    def build(self, run: Run) -> RNN:
        """The network, for rows as wide as the images and as many classes as the data has."""
        self.width = run.splits["train"].inputs.shape[-1]
        self.network = self.fresh()
        return self.network

    def fresh(self, **changed: Any) -> RNN:
        """A new network of the run's settings, apart from what is changed."""
        network = self.model(input_size=self.width, num_classes=len(self.class_names), **changed)
        assert isinstance(network, RNN)
        return network

    def train(self, batch: Batch) -> Output:
        """The loss of a batch of images (B, 28, 28): time runs over the rows."""
        logits = self.network(batch.inputs)  # (B, C)
        return Output(self.loss(logits, batch.targets), logits, batch.targets)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]

    def before(self, run: Run) -> None:
        """Remember the untrained network's answers and gradients; draw what clipping does."""
        logits, targets = self.predict(run)
        run.pr_curves("test", targets, logits.softmax(1))
        self.seen = {"predictions": logits.argmax(1), **self.gradient_norms(run, self.network)}
        self.seen["gains"] = {}
        for gain in GAINS:
            network = self.fresh(gain=gain).to(run.device)
            self.seen["gains"][str(gain)] = self.gradient_norms(run, network)["last"]
        self.draw_clipping(run)

    def after(self, run: Run) -> None:
        """Draw what training has changed."""
        logits, targets = self.predict(run)
        probabilities = logits.softmax(1)
        run.pr_curves("test", targets, probabilities)
        images = run.splits["test"].inputs.cpu()
        both = min(len(self.seen["predictions"]), len(targets))  # fewer where loop.eval_batches differs
        before, after, targets = self.seen["predictions"][:both], logits[:both].argmax(1), targets[:both]
        self.draw_before_after(run, images, targets, before, after)
        self.draw_classes(run, targets, before, after)
        self.draw_mistakes(run, images, targets, probabilities[:both])
        self.draw_gradients(run)

    def predict(self, run: Run) -> tuple[Tensor, Tensor]:
        """Logits (N, C) float32 and targets (N,) of the test set, on the CPU."""
        logits, targets = [], []
        with run.inference("predict"):
            for batch in run.batches("test"):
                assert batch.targets is not None
                logits.append(self.network(batch.inputs).float().cpu())
                targets.append(batch.targets.cpu())
        return torch.cat(logits), torch.cat(targets)

    def sample(self, run: Run, purpose: str, count: int) -> tuple[Tensor, Tensor]:
        """Training images as the network sees them, (count, 28, 28), and their targets (count,).

        Where there are fewer images than that they come again.
        """
        split = run.splits["train"]
        assert self.data is not None and split.targets is not None
        order = torch.randperm(len(split), generator=run.generator(purpose))
        chosen = order[torch.arange(count) % len(order)].to(run.device)
        return self.data.transform(split.inputs[chosen], None), split.targets[chosen]

    def gradient_norms(self, run: Run, network: RNN) -> dict[str, Tensor]:
        """‖∂L/∂h_t‖ for t = 1…T, the mean over sampled images, (T,): all of it, and what comes through h_T."""
        inputs, targets = self.sample(run, "gradients", SAMPLED)
        network.eval()
        return {
            "all": gradient_norms_through_time(network, inputs, targets, self.loss).cpu(),
            "last": gradient_norms_through_time(network, inputs, targets, self.loss, last_only=True).cpu(),
        }

    def draw_before_after(
        self, run: Run, images: Tensor, targets: Tensor, before: Tensor, after: Tensor
    ) -> None:
        """The same test images with the answers of the untrained and of the trained network."""
        shown = torch.randperm(len(targets), generator=run.generator("shown"))[:SHOWN]
        panels, captions = {}, []
        for title, predictions in (("before training", before), ("after training", after)):
            right = (predictions == targets).double().mean()
            panels[f"{title}: {right:.1%} of the test set right"] = images[shown]
            captions.append(
                [
                    self.caption(int(p), int(t))
                    for p, t in zip(predictions[shown], targets[shown], strict=True)
                ]
            )
        run.figure("before_after", figures.image_grids(panels, captions))

    def caption(self, prediction: int, target: int, certainty: str = "") -> tuple[str, str]:
        """Predicted and true label of one image, and the colour that says whether they agree."""
        names, right = self.class_names, prediction == target
        text = f"{names[prediction]}{certainty}\n" + ("" if right else f"is {names[target]}")
        return text, figures.GREEN if right else figures.VERMILION

    def draw_classes(self, run: Run, targets: Tensor, before: Tensor, after: Tensor) -> None:
        """Confusion matrices, and precision, recall and F1 per class, before and after."""
        names = self.class_names
        counts = {
            "before training": count(before, targets, len(names)),
            "after training": count(after, targets, len(names)),
        }
        titled = {f"{title}: accuracy {accuracy(table):.3f}": table for title, table in counts.items()}
        run.figure("confusion", figures.confusion_matrices(titled, names))
        old, new = (per_class(table) for table in counts.values())
        run.figure("per_class", figures.per_class_scores(old, new, names))
        scores = [name for name in new if name != "support"]
        header = ["class", *(f"{name} {when}" for name in scores for when in ("before", "after")), "support"]
        rows = [
            [
                names[c],
                *(float(table[name][c]) for name in scores for table in (old, new)),
                int(new["support"][c]),
            ]
            for c in range(len(names))
        ]
        run.table("per_class", header, rows)

    def draw_mistakes(self, run: Run, images: Tensor, targets: Tensor, probabilities: Tensor) -> None:
        """The wrong answers that the network was surest of."""
        certainty, predictions = probabilities.max(1)
        wrong = (predictions != targets).nonzero().squeeze(1)
        shown = wrong[certainty[wrong].argsort(descending=True)][:SHOWN]
        if len(shown) == 0:
            return
        captions = [self.caption(int(predictions[i]), int(targets[i]), f" {certainty[i]:.0%}") for i in shown]
        title = f"the most confident of {len(wrong):,} mistakes on {len(targets):,} test images"
        run.figure("mistakes", figures.image_grids({title: images[shown]}, [captions], columns=8))

    def draw_gradients(self, run: Run) -> None:
        """‖∂L/∂h_t‖ over t: at initialisation for several gains, and of this run before and after training."""
        trained = self.gradient_norms(run, self.network)
        gains = {f"gain {gain}": norms for gain, norms in self.seen["gains"].items()}
        this_run = {"before training": self.seen["all"], "after training": trained["all"]}
        through_last = {"before": self.seen["last"], "after": trained["last"]}
        figure, grid = figures.new(1, 2, (11.0, 4.6))
        rows = []
        for axes, lines, colours, marker in (
            (grid[0, 0], gains, (figures.ORANGE, figures.GREEN, figures.SKY, figures.PURPLE), "o"),
            (grid[0, 1], this_run, (figures.GREY, figures.BLUE), "o"),
            (grid[0, 1], through_last, (figures.GREY, figures.BLUE), "x"),
        ):
            for (label, norms), colour in zip(lines.items(), colours, strict=True):
                label += ", through h_T alone" if marker == "x" else ""
                rows.append([label, *draw_norms(axes, norms, label, colour, marker)])
        grid[0, 0].set(title="at initialisation, through h_T alone, by the gain of W_hh")
        grid[0, 1].set(title="this run")
        for axes in grid.flat:
            axes.set(xlabel="time step t, the row of the image", ylabel="mean ‖∂L/∂h_t‖", yscale="log")
            axes.legend()
        run.figure("gradients_through_time", figure)
        header = ["network", "factor per step back", "R² of the straight line", "t = 1 over t = T"]
        run.table("gradients_through_time", header, rows)

    def draw_clipping(self, run: Run) -> None:
        """Plain SGD from this run's weights, clipped and not, and the one step that follows a spike."""
        replays = {
            "not clipped": (figures.VERMILION, self.replay(run, None)),
            f"clipped at {SPIKE_LIMIT:g}": (figures.BLUE, self.replay(run, SPIKE_LIMIT)),
        }
        figure, grid = figures.new(1, 3, (12.6, 3.9))
        for label, (colour, found) in replays.items():
            grid[0, 0].plot(found.norms, color=colour, label=label, linewidth=1)
            grid[0, 1].plot(found.losses, color=colour, label=label, linewidth=1)
        for axes, title in ((grid[0, 0], "gradient norm ‖g‖ before clipping"), (grid[0, 1], "training loss")):
            axes.set(title=title, xlabel=f"step of plain SGD, learning rate {SPIKE_LR}", yscale="log")
            axes.legend()
        self.draw_spike(run, grid[0, 2], replays[f"clipped at {SPIKE_LIMIT:g}"][1])
        run.figure("clipping", figure)

    def replay(self, run: Run, limit: float | None) -> clipping.Replay:
        """Plain SGD from the network's present weights, on batches that every replay sees alike."""
        network = self.fresh().to(run.device).eval()
        network.load_state_dict(self.network.state_dict())
        inputs, targets = self.sample(run, "replay", SPIKE_STEPS * SPIKE_BATCH)
        batches = zip(inputs.split(SPIKE_BATCH), targets.split(SPIKE_BATCH), strict=True)
        return clipping.replay(network, batches, self.loss, SPIKE_LR, limit, SPIKE_SETTLE)

    def draw_spike(self, run: Run, axes: Axes, found: clipping.Replay) -> None:
        """The loss along the gradient at the spike, and where the step ends, clipped and not."""
        if found.spike < 0:  # the gradient stopped being a number before the replay had settled
            axes.set_axis_off()
            return
        inputs, targets = self.sample(run, "spike", SAMPLED)
        network, norm = self.fresh().to(run.device).eval(), found.norms[found.spike]
        loss_at = partial(clipping.loss_along, network, found, inputs=inputs, targets=targets, loss=self.loss)
        lengths = torch.linspace(0, 1.25 * SPIKE_LR * norm, 80).tolist()
        axes.plot(lengths, loss_at(lengths=lengths), color=figures.INK)
        for label, limit, colour in (
            ("clipped", SPIKE_LIMIT, figures.BLUE),
            ("not clipped", None, figures.VERMILION),
        ):
            length = SPIKE_LR * norm * clipping.clip_factor(norm, limit)
            [loss] = loss_at(lengths=[length])
            axes.plot(
                [length], [loss], "o", markersize=8, color=colour, label=f"{label}: ‖Δθ‖ = {length:.2g}"
            )
        axes.axhline(loss_at(lengths=[0.0])[0], color=figures.GREY, linewidth=1, label="before the step")
        axes.set(title="one step, from the same weights", xlabel="length of the step ‖Δθ‖ along −g")
        axes.set_ylabel(f"loss on {len(inputs):,} training images")
        axes.text(
            0.98,
            0.02,
            f"‖g‖ = {norm:.1f}, the largest gradient\nof the clipped run, at step {found.spike}",
            transform=axes.transAxes,
            ha="right",
            va="bottom",
            fontsize=8,
        )
        axes.legend()


def count(predictions: Tensor, targets: Tensor, classes: int) -> Tensor:
    """Confusion counts (C, C) of predictions and targets (N,)."""
    meter = Classification(classes)
    meter.update(nn.functional.one_hot(predictions, classes), targets)
    return meter.confusion


def draw_norms(axes: Axes, norms: Tensor, label: str, colour: str, marker: str) -> list[float]:
    """Norms over t = 1…T with the straight line through their logarithms; its factor, R² and first / last."""
    factor, r_squared = decay_per_step(norms)
    t = torch.arange(1, len(norms) + 1, dtype=torch.float64)
    line = norms.log().mean().exp() * factor ** (t.mean() - t)
    style: Any = {"color": colour, "linewidth": 1.0, "markersize": 4}
    axes.plot(
        t, norms, f"{marker}-", **style, label=f"{label}: ×{factor:.2f} per step back, R² {r_squared:.2f}"
    )
    axes.plot(t.numpy(), line.numpy(), "--", color=colour, linewidth=0.7)
    return [factor, r_squared, float(norms[0] / norms[-1])]
