"""Train a denoising diffusion model (Ho et al. 2020) on images, sample from it, measure and draw it.

Letters in shapes: B batch, N images, C channels, H height, W width, T time steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from experiments.data.image_folder.dataset import ImageFolder
from experiments.data.images import ImageData
from experiments.ddpm_cifar import figures, mosaics
from experiments.ddpm_cifar.export import export_diffusers
from experiments.ddpm_cifar.features import FeatureSpace, extractor
from experiments.ddpm_cifar.measures import MIN_IMAGES, Measures
from experiments.ddpm_cifar.sampling import Sampling
from experiments.nn.checks import at_least, within
from experiments.nn.diffusion import GaussianDiffusion
from experiments.nn.samplers import SamplerName, Spacing
from experiments.nn.unet import UNet, training_flops
from runner.data import Batch
from runner.errors import UserError
from runner.task import Output, Run, Task

_log = logging.getLogger("runner")

_QUARTERS = 4  # of the time steps: the loss falls by two orders of magnitude from the first to the last


class DDPM(Task):
    """Train `model`, a `UNet`, on `data` to predict the noise of `diffusion`."""

    modes: ClassVar[tuple[str, ...]] = ("sample", "export")
    without_data: ClassVar[tuple[str, ...]] = modes

    def __init__(
        self,
        model: Callable[..., nn.Module],
        data: ImageData,
        diffusion: GaussianDiffusion,
        loss: Literal["simple", "vlb"] = "simple",  # eq. 14, or the bound itself (eq. 5)
        samples: int = 2000,  # real and generated ones of an evaluation; at most 2,000 before the first step
        sampler: SamplerName = "ddim",  # this and the next four as `samplers.sample` takes them
        steps: int | None = 50,
        eta: float = 0.0,  # ddim alone reads it, so that another can be tried on a network trained with it
        spacing: Spacing | None = None,
        clip: bool | None = None,
        sample_batch: int = 500,  # images that are sampled at once
        features: FeatureSpace = "auto",  # of the measures, see `extractor`
        weights: str | None = None,  # Inception's file, if there is one
        bits_images: int = 16,  # for bits/dim at an evaluation; 0: it is not measured there
        final_bits_images: int = 64,  # of train and of test, after training and in mode=eval
        eval_steps: Sequence[int] = (),  # of the sampler, compared after training and in mode=eval
        picture_steps: int | None = None,  # of the reverse process in figures; None: all T
        channels_last: bool | None = None,  # None: on CUDA alone, see docs/benchmarks.md
        n: int = 64,  # images of mode=sample
    ):
        # arguments
        if not isinstance(data, ImageData):
            raise ValueError(f"data must be images, such as cifar10, got {type(data).__name__}")
        at_least(MIN_IMAGES, samples=samples)
        at_least(1, sample_batch=sample_batch, final_bits_images=final_bits_images, n=n)
        at_least(0, bits_images=bits_images)
        within(0, 1, closed=True, eta=eta)
        T = diffusion.timesteps
        picture_steps = T if picture_steps is None else picture_steps
        within(1, T, True, "timesteps", steps=T if steps is None else steps, picture_steps=picture_steps)
        for number in eval_steps:
            within(1, T, True, "timesteps", eval_steps=number)

        # the network's size is checked before images are read and decoded
        data.as_images()
        self.data: ImageData = data
        self.model, self.diffusion, self.loss = model, diffusion, loss
        with torch.device("meta"):
            self._new_network()

        # evaluation, sampling, figures
        eta = eta if sampler == "ddim" else 0.0
        self.how: dict[str, Any] = dict(sampler=sampler, steps=steps, eta=eta, spacing=spacing, clip=clip)
        self.samples, self.sample_batch, self.n = samples, sample_batch, n
        self.feature_choice, self.channels_last = (features, weights), channels_last
        self.bits_images, self.final_bits_images = bits_images, final_bits_images
        self.eval_steps, self.picture_steps = eval_steps, picture_steps
        self.history: dict[str, Any] = {"steps": [], "samples": []}  # some samples of each evaluation

    def build(self, run: Run) -> UNet:
        """Build the network for images like those of the data, and what samples from it and measures it."""
        channels_last = run.device.type == "cuda" if self.channels_last is None else self.channels_last
        layout = torch.channels_last if channels_last else torch.contiguous_format
        network = self._new_network().to(memory_format=layout)
        self.network, self.flops_per_sample = network, training_flops(network, self.data.shape)

        # without images, as in mode=sample, nothing is measured
        self.sampling = Sampling(run, network, self.diffusion, self.data, self.how, self.sample_batch)
        if run.splits:
            features = extractor(*self.feature_choice, run.device)
            self.measures = Measures(run, features, self.sampling, self.samples)
        return network

    def _new_network(self) -> UNet:
        """Build a U-Net for images of this data set; raise UserError where the model is not one for them."""
        C, H, _ = self.data.shape
        try:
            network = self.model(in_channels=C, image_size=H)
        except UserError as error:
            source = ", as data.size says" if isinstance(self.data, ImageFolder) else ""
            message = f"{error} The images are {H} pixels high{source}."
            raise UserError(message, error.wrong, error.right) from None
        if not isinstance(network, UNet):
            raise UserError(f"model: expected a UNet, got a {type(network).__name__}")
        return network

    # training

    def train(self, batch: Batch) -> Output:
        """Return the loss of images (B, C, H, W) in [−1, 1], each at a random time step (algorithm 1)."""
        return self._denoise(batch, batch.draws.integers(0, self.diffusion.timesteps))

    def _denoise(self, batch: Batch, t: Tensor) -> Output:
        """Return the mean loss at t (B,), and its mean by quarter of the time steps."""
        noise = batch.draws.normal(*self.data.shape)
        loss = self.diffusion.loss_simple if self.loss == "simple" else self.diffusion.loss_vlb
        losses = loss(self.network, batch.inputs, t, noise)  # (B,)

        # times 4: the mean over all images would count those of other quarters as zeros
        quarter = one_hot(_QUARTERS * t // self.diffusion.timesteps, _QUARTERS)  # (B, 4)
        means = (quarter * losses.detach()[:, None]).mean(0) * _QUARTERS
        scalars = {f"loss_quarter_{i + 1}": means[i] for i in range(_QUARTERS)}
        return Output(losses.mean(), scalars=scalars)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.history}  # the name in checkpoints

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = state["seen"]

    # evaluation

    def eval(self, split: str) -> dict[str, float]:
        """Measure the loss, at the same time steps and noise each time, bits/dim, and fresh samples."""
        values = self.measures.loss(split, self._denoise)
        if self.bits_images:
            values["bits_per_dim"] = float(self.measures.bound(split, self.bits_images).total.double().mean())
        values |= self.measures.measure(split)

        # samples, some of which are kept to show how they changed
        if split == "val" or "val" not in self.run.splits:
            images = figures.draw_samples(self.run, self.sampling, self.measures.num_samples)
            if self.run.tracker.trains and self.run.step not in self.history["steps"]:
                self.history["steps"].append(self.run.step)
                self.history["samples"].append(images[: figures.HISTORY_IMAGES].clone())
        return values

    # figures and tables

    def before(self, run: Run) -> None:
        """Draw the forward process."""
        figures.draw_forward(run, self.sampling)

    def after(self, run: Run) -> None:
        """Draw and tabulate what a trained network shows."""
        with run.inference("pictures"):
            # samples
            figures.draw_learning(run, self.history["steps"], self.history["samples"])
            figures.draw_reverse(run, self.sampling, self.picture_steps)
            figures.draw_interpolation(run, self.sampling, self.picture_steps)
            figures.draw_neighbours(run, self.sampling, self.measures.num_samples)

            # numbers; the paper compares with the training images
            self.measures.measure("train")
            if self.eval_steps:
                figures.draw_steps(run, self.sampling, self.measures, self.eval_steps)
            splits: list[str] = [split for split in ("train", "test") if split in run.splits]
            bounds = {split: self.measures.bound(split, self.final_bits_images) for split in splits}
            figures.draw_bound(run, bounds, self.measures.last)

    # modes

    def sample(self, run: Run) -> None:
        """Write `n` images as PNGs, as a grid, and as numbers."""
        with run.inference("sample"):
            images = self.sampling.generate(range(self.n))

        mosaics.write_images(run.folder / "samples", images)
        mosaics.write_archive(run.folder / "samples.npz", images)
        mosaics.write_mosaic(run.folder / "grid.png", images[: figures.GRID_IMAGES])
        where = f"{run.folder / 'samples'}, samples.npz, grid.png"
        _log.info(f"{len(images):,} images by {self.sampling.describe()}: {where}")

    def export(self, run: Run) -> None:
        """Write a folder that diffusers' `DDPMPipeline.from_pretrained` opens."""
        folder = run.folder / "diffusers"
        export_diffusers(folder, self.network, self.diffusion)
        _log.info(f'Written for diffusers: DDPMPipeline.from_pretrained("{folder}")')
