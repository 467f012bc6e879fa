"""Denoising diffusion (Ho et al. 2020) learns images: samples, likelihood and everything else that the paper shows.

While it trains: the loss, also by quarter of t, and at every evaluation samples from a noise that stays the same,
measures between them and real images, and the bound on bits per dimension. Afterwards: the reverse process as a
strip and moving, regeneration from a shared x_t, interpolation, rate and distortion, nearest training images.

Letters in shapes: B batch, N images, C channels, H height, W width, T time steps, S visited steps.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from experiments.data.image_folder.dataset import ImageFolder
from experiments.data.images import ImageData
from experiments.ddpm_cifar import mosaics as pictures
from experiments.ddpm_cifar import paper as diffusion_paper
from experiments.ddpm_cifar.features import Features, extractor
from experiments.ddpm_cifar.mosaics import to_bytes
from experiments.ddpm_cifar.progress import Waiting
from experiments.nn import generative, safetensors, samplers
from experiments.nn.diffusion import Bound, GaussianDiffusion, rate_distortion
from experiments.nn.exactness import exact_float32
from experiments.nn.samplers import Noise, OnStep, SamplerName, Spacing
from experiments.nn.unet import UNet, training_flops
from runner import figures
from runner.data import Batch
from runner.errors import UserError, memory_for
from runner.task import Meters, Output, Run, Task

log = logging.getLogger("runner")

QUARTERS = 4  # of the time steps: the loss falls by two orders of magnitude from the first to the last
UNTRAINED = 2_000  # images that a network before its first step is measured by at most: they are all noise
FEWEST = 6  # images that the measures can be taken from: density looks at 5 neighbours
SHOWN = 64  # images in the grid of samples
KEPT = 8  # of these after every evaluation, to see the network learn
PROBE = 16  # images that a CPU's pace is measured on; an accelerator's is not that of a part
CHAINS = 16  # images whose reverse process is shown
STRIP, FRAMES = 11, 48  # instants of the reverse process in a strip, and in its animation
SHARES = (1.0, 0.75, 0.5, 0.25)  # of T, at which x_t is shared (Fig. 7)
REGENERATED = 8  # images from each of them
NEIGHBOURS = 7  # nearest training images of a sample
CHUNK = 10_000  # training images that are looked through at once
REACH = 1024  # pixels by which a proposed size of images may differ from the one that was given
# what a network says of the images' size, which the task sets
ILL_SIZED = re.compile(r"^model\.image_size, .*image_size must (be divisible by (\d+).*)")
ILL_ATTENDED = re.compile(r"attention_resolutions must be among (\[.*\]), the levels' heights, not (\[.*\])")


class DDPM(Task):
    """Train `model`, a `UNet`, on `data` to predict the noise of `diffusion`; sample, measure and draw.

    Args:
        model: the network's factory
        data: images
        diffusion: the process
        loss: "simple" (eq. 14) or "vlb", the bound itself (eq. 5)
        samples: images behind an evaluation: of the split for the loss, and made for the measures; before the
            first step of training at most `UNTRAINED`
        sampler, steps, eta, spacing, clip: as `samplers.sample` takes them; eta is read by ddim alone, so that
            another sampler can be tried on a network that was trained with it
        sample_batch: images that are made at once
        features: what the measures are taken in, see `extractor`
        weights: Inception's weights file, if there is one
        bits_images: images behind bits/dim at an evaluation; 0: bits/dim is not measured there
        final_bits_images: of train and of test after training and in mode=eval
        eval_steps: numbers of the sampler's steps that are held against each other after training and in mode=eval
        picture_steps: steps of the reverse process in the pictures; None: all T
        channels_last: the memory format of the weights; None: plain on the CPU, where both are measured (README), and
            channels last on CUDA, which is its vendor's advice and not measured
        n: images that mode=sample makes
    """

    modes: ClassVar[tuple[str, ...]] = ("sample", "export")
    without_data: ClassVar[tuple[str, ...]] = modes

    def __init__(
        self,
        model: Callable[..., nn.Module],
        data: ImageData,
        diffusion: GaussianDiffusion,
        loss: Literal["simple", "vlb"] = "simple",
        samples: int = 2000,
        sampler: SamplerName = "ddim",
        steps: int | None = 50,
        eta: float = 0.0,
        spacing: Spacing | None = None,
        clip: bool | None = None,
        sample_batch: int = 500,
        features: Literal["auto", "inception", "efflite0", "pixels"] = "auto",
        weights: str | None = None,
        bits_images: int = 16,
        final_bits_images: int = 64,
        eval_steps: Sequence[int] = (),
        picture_steps: int | None = None,
        channels_last: bool | None = None,
        n: int = 64,
    ):
        if not isinstance(data, ImageData):
            raise ValueError("data must be images, such as cifar10, image_folder or fashion_mnist")
        require_at_least(FEWEST, samples=samples)
        require_at_least(1, sample_batch=sample_batch, final_bits_images=final_bits_images, n=n)
        require_at_least(0, bits_images=bits_images)
        require_steps(
            diffusion.timesteps, steps=[steps], picture_steps=[picture_steps], eval_steps=eval_steps
        )
        samplers.make_sampler(diffusion, "ddim", eta)  # it checks eta
        data.as_images()
        self.model, self.data, self.images, self.diffusion, self.loss = model, data, data, diffusion, loss
        self.shape = data.shape
        with torch.device("meta"):  # what is wrong with the sizes is told before images are read and decoded
            self.fresh_network()
        self.samples, self.sample_batch, self.n = samples, sample_batch, n
        self.sampler: SamplerName = sampler
        eta = eta if sampler == "ddim" else 0.0
        self.how: dict[str, Any] = dict(sampler=sampler, steps=steps, eta=eta, spacing=spacing, clip=clip)
        self.feature_choice, self.channels_last = (features, weights), channels_last
        self.bits_images, self.final_bits_images = bits_images, final_bits_images
        self.eval_steps, self.picture_steps = eval_steps, picture_steps
        self.seen: dict[str, Any] = {"steps": [], "samples": []}  # images of each evaluation

    # the network and its loss

    def build(self, run: Run) -> UNet:
        """The network for images like those of the data; where none are read, it is not measured either."""
        for name, split in run.splits.items():
            if len(split) < FEWEST:
                more = "" if name == "train" else f" data.{name}_size=N takes N from the training images."
                raise UserError(
                    f"{name} has {len(split)} images, too few to measure by: {FEWEST} are needed.{more}"
                )
        self.waiting = Waiting(run)
        self.paces: dict[tuple[int, bool], float] = {}  # seconds by batch and precision
        # by split, at the last evaluation: the images behind it, and what they measure
        self.measured: dict[str, tuple[int, dict[str, float]]] = {}
        self.made: tuple[int, Tensor] | None = None  # the step, and images that were made at it
        # by split: features of real images, and the distances between such
        self.known: dict[str, tuple[Tensor, dict[str, float]]] = {}
        network = self.fresh_network()
        self.flops_per_sample = training_flops(network, self.shape)
        wanted = run.device.type == "cuda" if self.channels_last is None else self.channels_last
        self.network = network.to(memory_format=torch.channels_last if wanted else torch.contiguous_format)
        if run.splits:
            self.features: Features = extractor(*self.feature_choice, run.device)
        return self.network

    def fresh_network(self) -> UNet:
        """A network for images of this shape.

        Raises:
            UserError: the images cannot be halved as often as the network has levels, no level has the height of an
                attention, or it is no U-Net.
        """
        C, H, _ = self.shape
        try:
            network = self.model(in_channels=C, image_size=H)
        except UserError as error:
            if found := ILL_SIZED.search(str(error)):
                raise self.ill_sized(found[1], int(found[2])) from None
            if found := ILL_ATTENDED.search(str(error)):
                raise self.ill_attended(error, *map(json.loads, found.groups())) from None
            raise
        if not isinstance(network, UNet):
            raise UserError(f"model must be a UNet, which takes (x_t, t), not a {type(network).__name__}.")
        return network

    def ill_sized(self, reason: str, divisor: int) -> UserError:
        """What a network says of the images' size, by the key that decides, and the nearest size that would do."""
        size = self.shape[1]
        if not isinstance(self.images, ImageFolder):
            return UserError(f"model.channel_mult: the height of the images must {reason}")
        text, fitting = f"data.size must {reason}", self.nearest_size()
        if fitting is not None:
            return UserError(text, f"data.size={size}", f"data.size={fitting}")
        if divisor > REACH:
            return UserError(f"model.channel_mult has too many levels for images of {size} pixels: {text}")
        return UserError(f"model.attention_resolutions are heights that no data.size has together. {text}")

    def ill_attended(self, error: UserError, heights: list[int], given: list[int]) -> UserError:
        """That no level has the height of an attention, with the nearest that would do: by the size or the heights."""
        size = self.shape[1]
        near = list(dict.fromkeys(min(heights, key=lambda height: abs(height - wanted)) for wanted in given))
        right = f"model.attention_resolutions={near}".replace(" ", "")
        fitting = self.nearest_size() if isinstance(self.images, ImageFolder) else None
        where = f"of images {size} pixels high the levels' heights are {heights}"
        text = f"model.attention_resolutions={given}: {where}, so it can be {near}"
        if fitting is None:
            return UserError(f"{text}.", error.wrong or "model.attention_resolutions", right)
        text += f"; or data.size={fitting}."
        if error.wrong is not None:  # it was typed, so it is what is meant to change
            return UserError(text, error.wrong, right)
        return UserError(text, f"data.size={size}", f"data.size={fitting}")

    def nearest_size(self) -> int | None:
        """The size of images, nearest to the present one, of which the network can be built; None: there is none."""
        C, size, _ = self.shape
        for distance in range(1, REACH + 1):
            for other in (size - distance, size + distance):
                with contextlib.suppress(UserError), torch.device("meta"):
                    if other > 0:
                        self.model(in_channels=C, image_size=other)
                        return other
        return None

    @property
    def T(self) -> int:
        return self.diffusion.timesteps

    def train(self, batch: Batch) -> Output:
        """The loss of images (B, C, H, W) in [−1, 1], each at a time step by chance (algorithm 1)."""
        return self.denoise(batch, batch.draws.integers(0, self.T))

    def denoise(self, batch: Batch, t: Tensor) -> Output:
        """The mean loss at t (B,), and its mean by quarter of t."""
        noise = batch.draws.normal(*self.shape)
        loss = self.diffusion.loss_simple if self.loss == "simple" else self.diffusion.loss_vlb
        losses = loss(self.network, batch.inputs, t, noise)  # (B,)
        # times 4: the mean over all images would count those of other quarters as zeros
        quarters = (one_hot(QUARTERS * t // self.T, QUARTERS) * losses.detach()[:, None]).mean(0) * QUARTERS
        scalars = {f"loss_quarter_{i + 1}": quarters[i] for i in range(QUARTERS)}
        return Output(losses.mean(), scalars=scalars)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]

    # evaluation

    @property
    def count(self) -> int:
        """Images behind an evaluation; fewer of an untrained network, and where `loop.eval_batches` cuts it short.

        What mode=eval looks at counts as trained.
        """
        untrained = self.training and self.run.step == 0
        samples, limit = min(self.samples, UNTRAINED) if untrained else self.samples, self.run.eval_limit
        return samples if limit is None else max(FEWEST, min(samples, limit * self.images.eval_batch_size))

    def eval(self, split: str) -> dict[str, float]:
        """Loss at time steps and noise that are the same each time, bits/dim, and measures of fresh samples."""
        values = self.losses(split)
        if self.bits_images:
            values["bits_per_dim"] = float(self.bound(split, self.bits_images).total.double().mean())
        values |= self.measures(split)
        self.measured[split] = self.behind(split), values
        if split == "val" or "val" not in self.run.splits:
            self.show_samples()
        return values

    def behind(self, split: str) -> int:
        """Images of a split behind an evaluation."""
        return min(self.count, len(self.run.splits[split]))

    def losses(self, split: str) -> dict[str, float]:
        """The loss over t in equal shares: each batch has one image in every B-th part of the time steps."""
        meters, seen = Meters(), 0
        total, size = self.behind(split), self.images.eval_batch_size
        calls, batch = math.ceil(total / size), min(size, len(self.run.splits[split]))
        with self.progress(f"loss of {split}", calls, batch, "data.eval_batch_size") as tick:
            for images in self.run.batches(split):
                B = len(images.inputs)
                place = torch.arange(B, device=images.inputs.device) + images.draws.uniform()
                t = (place * (self.T / B)).long().clamp_(max=self.T - 1)
                meters.update({"": self.denoise(images, t)}, B)
                seen += B
                tick()
                if seen >= total:
                    break
        return meters.compute()

    def measures(self, split: str) -> dict[str, float]:
        """How far samples are from the split's images, and how far training images are, as many."""
        return self.compared(split, self.fresh(self.behind(split)))

    def compared(self, split: str, images: Tensor) -> dict[str, float]:
        """How far images (N, C, H, W) are from the first N of a split, and how far training images are, as many."""
        N = len(images)
        self.waiting.say_once(self.features.describe)
        real, apart = self.real(split, N)
        fake, probabilities = self.see(images, "samples")
        # the pairs of two sets that each of the four measures looks at, in the order of their calls
        with self.waiting.bar(f"measures of {N:,} images", (3 + 2 + 4 + 3) * N**2) as count:
            precision, recall, f1 = generative.precision_recall(real, fake, done=count)
            density, coverage = generative.density_coverage(real, fake, done=count)
            told = generative.two_sample_accuracy(real, fake, count)
            distances = self.distances(real, fake, count)
        values = {
            "accuracy": told.accuracy,
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "accuracy_real": told.real,
            "accuracy_fake": told.fake,
            "density": density,
            "coverage": coverage,
            **distances,
            **apart,
        }
        if probabilities is not None:
            values["is"] = generative.inception_score(probabilities, min(10, N)).mean
        return values

    def distances(
        self, real: Tensor, other: Tensor, done: Callable[[int], object], suffix: str = ""
    ) -> dict[str, float]:
        """The two distances, by the names that the features give them; `done` hears of the pairs of the second."""
        return {
            f"{self.features.frechet}{suffix}": generative.frechet_distance(real, other),
            f"{self.features.kernel}{suffix}": generative.kernel_distance(real, other, done),
        }

    def real(self, split: str, N: int) -> tuple[Tensor, dict[str, float]]:
        """Features of N images of a split, and their distances from N other training images; computed once.

        The distances are left out where there are not so many.
        """
        if split not in self.known or len(self.known[split][0]) != N:
            inputs = self.run.splits[split].inputs
            features, _ = self.see(inputs[:N], f"images of {split}")
            apart: dict[str, float] = {}
            train = self.run.splits["train"].inputs
            seen = N if split == "train" else 0  # no image is compared with itself
            left = len(train) - seen
            if left >= N:
                order = torch.randperm(left, generator=self.run.generator("real"))
                others, _ = self.see(train[(seen + order[:N]).to(train.device)], "training images")
                with self.waiting.bar(f"distances between {N:,} real images", 3 * N**2) as count:
                    apart = self.distances(features, others, count, "_real")
            else:
                self.waiting.say_once(self.left_out(split, N, left))
            self.known[split] = features, apart
        return self.known[split]

    def left_out(self, split: str, N: int, left: int) -> str:
        """Why there are no distances between real images."""
        enough = left if split != "train" else (left + N) // 2
        how = f"task.samples={enough} has them" if enough >= FEWEST else "more training images have them"
        return (
            f"{self.features.frechet}_real and {self.features.kernel}_real of {split} are left out: they want as many "
            f"other training images as the {N:,} images that are compared, and there are {left:,}. {how}."
        )

    def see(self, images: Tensor, what: str) -> tuple[Tensor, Tensor | None]:
        """Features and probabilities of uint8 images, under a bar."""
        with self.waiting.bar(f"features of {len(images):,} {what}", len(images)) as count:
            return self.features.features_and_probabilities(images, count)

    def bound(self, split: str, count: int) -> Bound:
        """All T + 1 terms of the bound for some of a split's images, always the same; in float32."""
        run, inputs = self.run, self.run.splits[split].inputs
        chosen = torch.randperm(len(inputs), generator=run.generator("bits", split))[:count]
        batch = min(self.sample_batch, len(chosen))
        calls = self.T * math.ceil(len(chosen) / batch)
        parts = []
        # bfloat16's error in ε is of the size of the terms at small t
        what = f"bits/dim of {len(chosen):,} images of {split}"
        with exact_float32(run.device), self.progress(what, calls, batch) as tick:
            for part in chosen.split(batch):
                x_0 = self.images.transform(inputs[part.to(inputs.device)], None)
                noise = self.noise(part.tolist(), "bits", split)
                found = self.diffusion.bits_per_dim(self.network, x_0, noise, on_step=tick)
                parts.append([column.cpu() for column in found])
        return Bound(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    # images from noise

    def noise(self, numbers: Sequence[int], *purpose: str | int) -> Noise:
        """The noise of these images."""
        streams = [self.run.generator(*(purpose or ("sample",)), number) for number in numbers]
        return Noise(streams, self.shape, self.run.device)

    def fresh(self, count: int) -> Tensor:
        """Images 0 … count − 1 of the network as it is, uint8 on the CPU; each made once at a step of training."""
        if self.made is None or self.made[0] != self.run.step:
            self.made = self.run.step, torch.empty(0, *self.shape, dtype=torch.uint8)
        images = self.made[1]
        if len(images) < count:
            images = torch.cat((images, self.generate(range(len(images), count))))
            self.made = self.run.step, images
        return images[:count]

    def generate(self, numbers: range, steps: int | None = None) -> Tensor:
        """The images of these numbers, uint8 (N, C, H, W) on the CPU: each a function of the seed and its number.

        `steps` are the sampler's, where not as many as usual are wanted.
        """
        steps = steps or self.how["steps"] or self.T
        what = f"{len(numbers):,} samples by {self.described(steps)}"
        return self.reverse(what, numbers, **self.how | {"steps": steps})

    def reverse(
        self,
        what: str,
        numbers: Sequence[int],
        *purpose: str | int,
        x: Tensor | None = None,
        on_step: OnStep = lambda *_: None,
        **how: Any,
    ) -> Tensor:
        """What a sampler makes of noise, or of x (N, C, H, W), `sample_batch` at once: uint8 (N, C, H, W) on the CPU.

        Image i has the noise of `numbers[i]` and the purpose; `on_step` hears of each batch, `how` is the sampler's.
        """
        batch = min(self.sample_batch, len(numbers))
        calls = how["steps"] * math.ceil(len(numbers) / batch)
        parts = []
        with self.progress(what, calls, batch) as tick:

            def stepped(step: int, t: int, x_t: Tensor, x_0: Tensor) -> None:
                on_step(step, t, x_t, x_0)
                tick()

            for first in range(0, len(numbers), batch):
                noise = self.noise(numbers[first : first + batch], *purpose)
                begun = noise() if x is None else x[first : first + batch]
                made = samplers.sample(
                    self.diffusion, self.network, begun, draw=noise, on_step=stepped, **how
                )
                parts.append(to_bytes(made).cpu())
        return torch.cat(parts)

    def described(self, steps: int | None = None) -> str:
        """The sampler in words."""
        eta = f", η = {self.how['eta']:g}" if self.how["eta"] else ""
        return f"{self.sampler} in {steps or self.how['steps'] or self.T:,} steps{eta}"

    @contextlib.contextmanager
    def progress(
        self, what: str, calls: int, batch: int, name: str = "task.sample_batch"
    ) -> Iterator[Callable[..., None]]:
        """A bar over calls of the network on batches that the argument `name` decides, announced where it is long.

        Raises:
            Interrupted: the user asked to stop meanwhile.
            UserError: the memory does not hold a batch of that size.
        """
        with memory_for(name, batch):
            self.waiting.announce(what, calls * self.pace(batch))
            with self.waiting.bar(what, calls) as count:
                yield lambda *_: count(1)

    @property
    def training(self) -> bool:
        """Whether more evaluations will follow."""
        return self.run.tracker.trains

    def pace(self, batch: int) -> float:
        """Seconds of one call of the network, on a batch of that size and in the present precision."""
        device = self.run.device
        B = min(batch, PROBE) if device.type == "cpu" else batch
        key = (B, torch.is_autocast_enabled(device.type))
        if key not in self.paces:
            x = torch.zeros(B, *self.shape, device=device)
            t = torch.zeros(B, dtype=torch.int64, device=device)
            with torch.no_grad():
                self.network(x, t)  # a first call also chooses kernels
                self.run.compute.synchronize()
                start = time.perf_counter()
                self.network(x, t)
                self.run.compute.synchronize()
            self.paces[key] = time.perf_counter() - start
        return self.paces[key] * batch / B

    # pictures

    def before(self, run: Run) -> None:
        """The forward process, and what the run's numbers will be relative to."""
        self.draw_forward(run)

    def after(self, run: Run) -> None:
        """Everything that a trained network shows."""
        with run.inference("pictures"):
            self.draw_learning(run)
            self.draw_reverse(run)
            self.draw_interpolation(run)
            self.draw_neighbours(run)
            self.measured["train"] = (
                self.behind("train"),
                self.measures("train"),
            )  # the paper compares with these
            if self.eval_steps:
                self.draw_steps(run)
            self.draw_bound(run)

    def show_samples(self) -> None:
        """The grid of samples at this step; a few are kept for the picture of how they changed."""
        images, step = self.fresh(min(SHOWN, self.count)), self.run.step
        title = f"step {step:,}: samples by {self.described()}"
        self.run.figure("samples", pictures.grid(images, title))
        if self.training and step not in self.seen["steps"]:
            self.seen["steps"].append(step)
            self.seen["samples"].append(images[:KEPT].clone())

    def draw_learning(self, run: Run) -> None:
        """The same noise, made into images after more and more steps of training."""
        steps, samples = self.seen["steps"], self.seen["samples"]
        if len(steps) < 2:
            return
        shown = sorted({round(i) for i in torch.linspace(0, len(steps) - 1, min(10, len(steps))).tolist()})
        images = torch.cat([samples[i] for i in shown])
        rows = [f"step {steps[i]:,}" for i in shown]
        title = "the same noise, after more and more training"
        run.figure("learning", pictures.panels([("", images, KEPT, rows, ())], title))

    def draw_forward(self, run: Run) -> None:
        """x_t of real images over t."""
        inputs = run.splits["train"].inputs
        noise = self.noise(range(6), "forward")
        x_0, eps = self.images.transform(inputs[:6], None), noise()
        T = self.T
        times = [round(i * (T - 1) / (STRIP - 2)) for i in range(STRIP - 1)]
        strips = [x_0] + [
            self.diffusion.q_sample(x_0, torch.full((len(x_0),), t, device=x_0.device), eps) for t in times
        ]
        labels = ["x₀"] + [f"{t + 1:,}" for t in times]
        kept = [1.0] + [math.sqrt(self.diffusion.alpha_bar(t)) for t in times]
        labels = [f"{label}\n{share:.2g}" for label, share in zip(labels, kept, strict=True)]
        images = to_bytes(torch.stack(strips, 1).flatten(0, 1))
        title = "the forward process: t, and how much √ᾱ of the image is left"
        run.figure("forward", pictures.table_of_images(images, (), labels, title))

    def draw_reverse(self, run: Run) -> None:
        """The reverse process, what it expects to end at, and other ends from the same x_t (Figs. 6 and 7)."""
        S = self.picture_steps or self.T
        frames = sorted({round(i) for i in torch.linspace(0, S - 1, min(FRAMES, S)).tolist()})
        kept: dict[int, list[tuple[int, Tensor, Tensor]]] = {}  # frame: t, x_t, x̂_0, of each batch

        def keep(step: int, t: int, x: Tensor, x_0: Tensor) -> None:
            if step in frames:
                kept.setdefault(step, []).append((t, x, x_0))

        end = self.reverse(
            f"the reverse process in {S:,} steps",
            range(CHAINS),
            "sample",
            steps=S,
            start=self.T - 1,  # else the first of few steps would lie below T
            on_step=keep,
            **self.ancestral,
        )
        chain = [
            (parts[0][0], torch.cat([x for _, x, _ in parts]), torch.cat([x_0 for _, _, x_0 in parts]))
            for parts in kept.values()
        ]
        times = [t + 1 for t, _, _ in chain] + [0]
        states = torch.stack([to_bytes(x_t).cpu() for _, x_t, _ in chain] + [end])
        guesses = torch.stack([to_bytes(x_0).cpu() for _, _, x_0 in chain] + [end])
        self.draw_strips(run, times, states, guesses)
        self.draw_shared(run, chain)
        figure, show = pictures.moving({"x_t": states, "x̂₀, what it expects to end at": guesses}, 4)
        order = [*range(len(times)), *[len(times) - 1] * 12]  # the end is looked at for a second
        run.animation("chain", figure, lambda i: show(order[i], f"t = {times[order[i]]:,}"), len(order))

    def draw_strips(self, run: Run, times: list[int], states: Tensor, guesses: Tensor) -> None:
        """x_t and x̂_0 (frames, N, C, H, W) over t, a row per image."""
        shown = sorted({round(i) for i in torch.linspace(0, len(times) - 1, min(STRIP, len(times))).tolist()})
        labels = [f"{times[i]:,}" for i in shown]
        for name, frames, title in (
            ("chain", states, "the reverse process, x_t over t"),
            ("progressive", guesses, "progressive generation: the x̂₀ that the network expects at t (Fig. 6)"),
        ):
            images = frames[shown][:, :6].transpose(0, 1).flatten(0, 1)
            run.figure(name, pictures.table_of_images(images, (), labels, title))

    def draw_shared(self, run: Run, chain: list[tuple[int, Tensor, Tensor]]) -> None:
        """What x_t decides: images that are regenerated from one x_t with other noise (Fig. 7)."""
        K, sources = REGENERATED, 2
        parts: list[list[Tensor]] = [[] for _ in range(sources)]
        rows = []
        for share in SHARES:
            t, x_t, _ = min(chain, key=lambda frame: abs(frame[0] + 1 - share * self.T))
            rows.append(f"t = {t + 1:,}")
            start = x_t[:sources].repeat_interleave(K, 0)
            images = self.onwards(start, t, range(len(start)), "shared", t)
            for source in range(sources):
                parts[source] += [
                    to_bytes(x_t[source : source + 1]).cpu(),
                    images[source * K : (source + 1) * K],
                ]
        labels = ["x_t"] + [""] * K
        panels = [(f"chain {i + 1}", torch.cat(part), K + 1, rows, labels) for i, part in enumerate(parts)]
        title = "from the same x_t with other noise: what is decided by t (Fig. 7)"
        run.figure("shared", pictures.panels(panels, title))

    def onwards(self, x_t: Tensor, t: int, numbers: Sequence[int], *purpose: str | int) -> Tensor:
        """The end of the reverse process from x_t, as bytes, in as many steps as its share of the pictures' has."""
        steps = max(1, round((self.picture_steps or self.T) * (t + 1) / self.T))
        what = f"the reverse process from t = {t + 1:,}"
        return self.reverse(what, numbers, *purpose, x=x_t, steps=steps, start=t, **self.ancestral)

    @property
    def ancestral(self) -> dict[str, Any]:
        """The reverse process of the pictures: the paper's over all T, else with the smaller variance.

        Over few steps the larger one leaves noise in the images (Song et al. 2021, Table 1, σ̂).
        """
        if self.picture_steps in (None, self.T):
            return {"sampler": "ddpm"}
        return {"sampler": "ddim", "eta": 1.0, "spacing": "uniform", "clip": True}

    def draw_interpolation(self, run: Run) -> None:
        """Two images, mixed at several t and denoised from there, all noise shared (Fig. 8)."""
        split = run.splits.get("test", run.splits["train"])
        pair = torch.randperm(len(split), generator=run.generator("pair"))[:2].to(split.inputs.device)
        ends = self.images.transform(split.inputs[pair], None)  # (2, C, H, W)
        share = torch.linspace(0, 1, 11, device=run.device).view(-1, 1, 1, 1)
        rows, labels = [], []
        for eighth in range(9):
            t = round(eighth * self.T / 8) - 1
            sources = to_bytes(ends).cpu()
            rows.append(torch.cat((sources[:1], self.mixture(ends, share, t), sources[1:])))
            labels.append("pixels" if t < 0 else f"t = {t + 1:,}")
        columns = [
            "source",
            "rec.",
            *(f"{value:.1f}" for value in share.flatten()[1:-1].tolist()),
            "rec.",
            "source",
        ]
        title = "interpolation of two images at t, by λ (Fig. 8)"
        run.figure("interpolation", pictures.table_of_images(torch.cat(rows), labels, columns, title))

    def mixture(self, ends: Tensor, share: Tensor, t: int) -> Tensor:
        """Between two images (2, C, H, W): (1 − λ) x_t + λ x_t′, denoised; t = −1 mixes pixels.

        `share` is λ of each image that is made; they are uint8 (len(share), C, H, W) on the CPU.
        """
        if t < 0:
            return to_bytes((1 - share) * ends[:1] + share * ends[1:]).cpu()
        times = torch.full((2,), t, device=ends.device)
        x = self.diffusion.q_sample(ends, times, self.noise([0], "interpolation")())
        mixed = (1 - share) * x[:1] + share * x[1:]
        return self.onwards(mixed, t, [0] * len(mixed), "interpolation", t)  # one noise for all

    def draw_neighbours(self, run: Run) -> None:
        """Samples with the training images that are nearest to them in pixels: is it memory?"""
        samples = self.fresh(min(KEPT, self.count))
        train = run.splits["train"].inputs
        query = samples.flatten(1).float() / 255
        distances, indices = [], []
        what = f"the nearest of {len(train):,} training images"
        with self.waiting.bar(what, len(query) * len(train)) as count:
            for first in range(0, len(train), CHUNK):
                part = train[first : first + CHUNK].flatten(1).float().cpu() / 255
                found = generative.nearest_neighbours(query, part, min(NEIGHBOURS, len(part)), count)
                distances.append(found.distances)
                indices.append(found.indices + first)
        order = torch.cat(distances, 1).argsort(1)[:, :NEIGHBOURS]
        nearest = torch.cat(indices, 1).gather(1, order)  # (KEPT, NEIGHBOURS)
        images = torch.cat((samples[:, None], train[nearest.to(train.device)].cpu()), 1).flatten(0, 1)
        columns = ["sample", *(f"{i + 1}" for i in range(nearest.shape[1]))]
        title = f"samples and the nearest of {len(train):,} training images (pixels)"
        run.figure("neighbours", pictures.table_of_images(images, (), columns, title))

    def draw_steps(self, run: Run) -> None:
        """The same noise, made into images in more and more steps, and how far these are from real ones."""
        split = "test" if "test" in run.splits else "train"
        N = self.behind(split)
        made = {steps: self.generate(range(N), steps) for steps in sorted(set(self.eval_steps))}
        found = {steps: self.compared(split, images) for steps, images in made.items()}
        rows_as = [f"{steps:,} steps" for steps in made]
        images = torch.cat([images[:KEPT] for images in made.values()])
        title = f"the same noise, in more and more steps of {self.sampler}"
        run.figure("steps", pictures.panels([("", images, min(KEPT, N), rows_as, ())], title))
        _, apart = self.real(split, N)
        names = [name for name in next(iter(found.values())) if name not in apart]
        rows: list[list[Any]] = [
            [steps, N, *(values[name] for name in names)] for steps, values in found.items()
        ]
        rows.append(["real images", N, *(apart.get(f"{name}_real") for name in names)])
        run.table("steps", ["steps", "images", *names], rows)

    # numbers

    def draw_bound(self, run: Run) -> None:
        """Bits per dimension, rate and distortion (Fig. 5, Table 4), and the paper's numbers beside ours."""
        splits: list[str] = [split for split in ("train", "test") if split in run.splits]
        bounds: dict[str, Bound] = {split: self.bound(split, self.final_bits_images) for split in splits}
        seen = bounds[splits[-1]]
        rate, rmse = rate_distortion(seen)
        run.table("rate_distortion", *diffusion_paper.rate_distortion_table(rate, rmse))
        figure, grid = figures.new(1, 3, (11.4, 3.6))
        steps = torch.arange(1, self.T + 1)
        for axes, x, y, title, xlabel, ylabel in (
            (grid[0, 0], steps, rmse, "distortion", "reverse steps", "RMSE of x̂₀ on [0, 255]"),
            (grid[0, 1], steps, rate, "rate", "reverse steps", "bits/dim received"),
            (grid[0, 2], rate, rmse, "distortion by rate", "bits/dim received", "RMSE of x̂₀ on [0, 255]"),
        ):
            axes.plot(x.numpy(), y.numpy(), color=figures.BLUE)
            axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
            axes.set_ylim(bottom=0)
        figure.suptitle(
            f"rate and distortion of {len(seen.total):,} images of {splits[-1]} (Fig. 5)", x=0.01, ha="left"
        )
        run.figure("rate_distortion", figure)
        skipped = ("loss", "bits_per_dim")  # the first is not the bound, the second is of fewer images
        measured = {
            split: (count, {name: value for name, value in values.items() if not name.startswith(skipped)})
            for split, (count, values) in self.measured.items()
        }
        header, rows = diffusion_paper.summary_table(bounds, measured)
        run.table("numbers", header, rows)
        log.info(diffusion_paper.beside_the_paper(rows))

    # modes

    def sample(self, run: Run) -> None:
        """mode=sample: `task.n` images as PNGs, as a grid, and as numbers."""
        with run.inference("sample"):
            images = self.generate(range(self.n))
        folder = run.folder / "samples"
        pictures.write_images(folder, images, range(len(images)))
        pictures.write_archive(run.folder / "samples.npz", images)
        columns = math.ceil(math.sqrt(min(len(images), SHOWN)))
        pictures.write_mosaic(run.folder / "grid.png", images[:SHOWN], columns)
        log.info(
            f"{len(images):,} images by {self.described()}: {folder}, samples.npz and grid.png beside it"
        )

    def export(self, run: Run) -> None:
        """mode=export: a folder that diffusers' `DDPMPipeline.from_pretrained` opens."""
        weights, config = self.network.to_diffusers()
        folder = run.folder / "diffusers"
        index = {
            "_class_name": "DDPMPipeline",
            "_diffusers_version": "0.30.0",
            "unet": ["diffusers", "UNet2DModel"],
            "scheduler": ["diffusers", "DDPMScheduler"],
        }
        files = {
            "model_index.json": as_json(index),
            "unet/config.json": as_json(config),
            "unet/diffusion_pytorch_model.safetensors": safetensors.dumps(weights),
            "scheduler/scheduler_config.json": as_json(self.diffusion.to_diffusers()),
        }
        with pictures.whole(folder) as unfinished:
            for name, content in files.items():
                path = unfinished / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        log.info(f'Written for diffusers: DDPMPipeline.from_pretrained("{folder}")')


def require_at_least(least: int, **numbers: int) -> None:
    """Refuse numbers below the least that they may be."""
    for name, number in numbers.items():
        if number < least:
            raise ValueError(f"{name} must be at least {least}, not {number}")


def require_steps(T: int, **chosen: Sequence[int | None]) -> None:
    """Refuse numbers of steps that a process of T has not; None is all of them."""
    for name, numbers in chosen.items():
        for number in numbers:
            if number is not None and not 1 <= number <= T:
                raise ValueError(f"{name} must lie in [1, {T}], diffusion.timesteps, not {number}")


def as_json(content: dict[str, Any]) -> bytes:
    """JSON as people read it."""
    return (json.dumps(content, indent=2) + "\n").encode()
