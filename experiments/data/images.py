"""What the data sets of images have in common where a network is to make such images."""

from __future__ import annotations

import torch
from torch import Tensor

from runner.data import Data
from runner.streams import BatchRandom, generator


class ImageData(Data):
    """Images to learn from: stored as uint8 (N, C, H, W), in batches as float32 (B, C, H, W) in [−1, 1].

    In training each image is mirrored left to right with probability `flip`.
    """

    def __init__(self, batch_size: int, eval_batch_size: int, flip: float):
        super().__init__(batch_size, eval_batch_size)
        if not 0 <= flip <= 1:
            raise ValueError(f"flip must lie in [0, 1], not {flip}")
        self.flip = flip

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of its images, which is known before any is read."""
        raise NotImplementedError(f"{type(self).__name__} must define shape, the (C, H, W) of its images")

    def as_images(self) -> None:
        """Promise the form above; a task that needs it calls this before the data is read.

        A data set that other experiments want in another form overrides it.
        """

    def transform(self, inputs: Tensor, draws: BatchRandom | None) -> Tensor:
        """uint8 (B, C, H, W) → float32 in [−1, 1]; in training mirrored first."""
        if draws is not None and self.flip:
            inputs = torch.where(draws.uniform(1, 1, 1) < self.flip, inputs.flip(3), inputs)
        return signed(inputs)


def signed(pixels: Tensor) -> Tensor:
    """Bytes as numbers of [−1, 1]: 0 ↦ −1, 255 ↦ 1 (Ho et al. 2020, section 3.3)."""
    return pixels.float().div_(127.5).sub_(1)


def stratified(targets: Tensor, per_class: int, seed: int) -> Tensor:
    """Indices of `per_class` samples of each class by chance, ascending: a function of its arguments."""
    order = torch.randperm(len(targets), generator=generator(seed, "split"))
    shuffled = targets[order]
    chosen = [order[shuffled == label][:per_class] for label in shuffled.unique()]
    return torch.cat(chosen).sort().values


def held_out(targets: Tensor, per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """Which samples are left for training (N,), boolean, and the indices of those that `stratified` takes."""
    taken = stratified(targets, per_class, seed)
    left = torch.ones(len(targets), dtype=torch.bool)
    left[taken] = False
    return left, taken
