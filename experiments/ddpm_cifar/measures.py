"""Measures between samples and real images, and the bound on bits per dimension.

Letters in shapes: N images, D features, C channels, H height, W width, T time steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from experiments.ddpm_cifar.features import Features
from experiments.ddpm_cifar.sampling import Sampling
from experiments.nn import generative
from experiments.nn.diffusion import Bound
from experiments.nn.exactness import exact_float32
from runner.data import Batch
from runner.errors import UserError
from runner.task import Meters, Output, Run

MIN_IMAGES = 6  # density counts 5 neighbours
_MAX_UNTRAINED = 2_000  # images of a network before its first step: they are all noise


class Measures:
    """Measures of the network as it is at the run's present step, by `samples` images an evaluation.

    Raises:
        UserError: a split has too few images to measure by.
    """

    def __init__(self, run: Run, features: Features, sampling: Sampling, samples: int):
        for name, split in run.splits.items():
            if len(split) < MIN_IMAGES:
                more = "" if name == "train" else f"; data.{name}_size=N takes N of the training images"
                raise UserError(
                    f"expected at least {MIN_IMAGES} images to measure by, got {len(split)} in {name}{more}"
                )
        self._run, self._features, self._sampling, self._samples = run, features, sampling, samples
        self.last: dict[str, tuple[int, dict[str, float]]] = {}  # by split: images, and their measures
        # by split: features of real images, and distances between real images
        self._real: dict[str, tuple[Tensor, dict[str, float]]] = {}

    @property
    def num_samples(self) -> int:
        """Images of an evaluation; fewer of an untrained network, and where `loop.eval_batches` limits it.

        What mode=eval evaluates counts as trained.
        """
        samples, limit = self._samples, self._run.eval_limit
        if self._run.tracker.trains and self._run.step == 0:
            samples = min(samples, _MAX_UNTRAINED)
        if limit is None:
            return samples
        return max(MIN_IMAGES, min(samples, limit * self._sampling.data.eval_batch_size))

    def num_images(self, split: str) -> int:
        """Return how many images of a split an evaluation takes."""
        return min(self.num_samples, len(self._run.splits[split]))

    def loss(self, split: str, loss_at: Callable[[Batch, Tensor], Output]) -> dict[str, float]:
        """Average `loss_at` (batch, t) over t: each batch has one image in every B-th part of the time steps."""
        data, total, T = self._sampling.data, self.num_images(split), self._sampling.T
        batch_size = min(data.eval_batch_size, len(self._run.splits[split]))
        calls = math.ceil(total / data.eval_batch_size)
        meters, count, argument = Meters(), 0, "data.eval_batch_size"

        # whole batches, until there are enough images
        with self._sampling.progress.network_calls(f"loss of {split}", calls, batch_size, argument) as tick:
            for batch in self._run.batches(split):
                B = len(batch.inputs)
                place = torch.arange(B, device=batch.inputs.device) + batch.draws.uniform()
                t = (place * (T / B)).long().clamp_(max=T - 1)
                meters.update({"": loss_at(batch, t)}, B)
                tick()
                count += B
                if count >= total:
                    break
        return meters.compute()

    def measure(self, split: str) -> dict[str, float]:
        """Compare samples with a split's images; the result also stays in `last`."""
        N = self.num_images(split)
        values = self.compare(split, self._sampling.samples(N))
        self.last[split] = N, values
        return values

    def compare(self, split: str, images: Tensor) -> dict[str, float]:
        """Measure uint8 images (N, C, H, W), and N training images, against the first N of a split."""
        N, progress = len(images), self._sampling.progress
        progress.log_once(self._features.describe)
        real, real_vs_real = self.real(split, N)
        fake, probabilities = self._extract(images, "samples")

        # the pairs of the four measures, in the order of their calls
        with progress.bar(f"measures of {N:,} images", (3 + 2 + 4 + 3) * N**2) as advance:
            overlap = generative.precision_recall(real, fake, done=advance)
            density = generative.density_coverage(real, fake, done=advance)
            recognised = generative.two_sample_accuracy(real, fake, advance)
            distances = self._distances(real, fake, advance)

        values = {
            "accuracy": recognised.accuracy,
            **overlap._asdict(),
            "accuracy_real": recognised.real,
            "accuracy_fake": recognised.fake,
            **density._asdict(),
            **distances,
            **real_vs_real,
        }
        if probabilities is not None:
            values["is"], _ = generative.inception_score(probabilities, min(10, N))
        return values

    def real(self, split: str, N: int) -> tuple[Tensor, dict[str, float]]:
        """Return features (N, D) of a split's first N images, and their distances from N training images.

        Both are computed once. Where there are not so many others, the distances are left out.
        """
        if split in self._real and len(self._real[split][0]) == N:
            return self._real[split]
        features, _ = self._extract(self._run.splits[split].inputs[:N], f"images of {split}")

        # no image is compared with itself
        train = self._run.splits["train"].inputs
        first = N if split == "train" else 0
        available = len(train) - first

        real_vs_real: dict[str, float] = {}
        if available >= N:
            order = torch.randperm(available, generator=self._run.generator("real"))
            others, _ = self._extract(train[(first + order[:N]).to(train.device)], "training images")
            with self._sampling.progress.bar(f"distances between {N:,} real images", 3 * N**2) as advance:
                real_vs_real = self._distances(features, others, advance, "_real")
        else:
            enough = available if split != "train" else (available + N) // 2
            hint = f"try task.samples={enough}" if enough >= MIN_IMAGES else "more training images are needed"
            self._sampling.progress.log_once(
                f"{self._features.frechet}_real and {self._features.kernel}_real of {split} are left out: they "
                f"compare {N:,} images with as many other training images, and there are {available:,}; {hint}."
            )

        self._real[split] = features, real_vs_real
        return self._real[split]

    def bound(self, split: str, count: int) -> Bound:
        """Compute all T + 1 terms of the bound for some of a split's images, always the same; in float32."""
        run, sampling, inputs = self._run, self._sampling, self._run.splits[split].inputs
        chosen = torch.randperm(len(inputs), generator=run.generator("bits", split))[:count]
        batch = min(sampling.batch, len(chosen))
        calls = sampling.T * math.ceil(len(chosen) / batch)
        label = f"bits/dim of {len(chosen):,} images of {split}"
        parts = []

        # bfloat16's error in ε is of the size of the terms at small t
        with exact_float32(run.device), sampling.progress.network_calls(label, calls, batch) as tick:
            for numbers in torch.split(chosen, batch):
                x_0 = sampling.data.transform(inputs[numbers.to(inputs.device)], None)
                noise = sampling.noise(numbers.tolist(), "bits", split)
                bound = sampling.diffusion.bits_per_dim(sampling.network, x_0, noise, on_step=tick)
                parts.append([column.cpu() for column in bound])
        return Bound(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def _distances(
        self, real: Tensor, other: Tensor, done: Callable[[int], object], suffix: str = ""
    ) -> dict[str, float]:
        """Return the two distances under the features' names; `done` counts the second's pairs."""
        return {
            f"{self._features.frechet}{suffix}": generative.frechet_distance(real, other),
            f"{self._features.kernel}{suffix}": generative.kernel_distance(real, other, done),
        }

    def _extract(self, images: Tensor, label: str) -> tuple[Tensor, Tensor | None]:
        with self._sampling.progress.bar(f"features of {len(images):,} {label}", len(images)) as advance:
            return self._features.features(images, advance)
