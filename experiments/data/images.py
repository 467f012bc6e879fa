"""What the data sets of images share: their form in memory and in a batch, and splitting off validation images."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from runner.data import Data, Split
from runner.errors import UserError, within
from runner.streams import BatchRandom, generator

NUM_CLASSES = 10  # of CIFAR-10 and Fashion-MNIST


class ImageData(Data):
    """Images stored as uint8 (N, C, H, W), in batches float32 (B, C, H, W) in [−1, 1].

    In training each image is mirrored left to right with probability `flip`.
    """

    def __init__(self, batch_size: int, eval_batch_size: int, flip: float):
        super().__init__(batch_size, eval_batch_size)
        within(0, 1, closed=True, flip=flip)
        self.flip = flip

    @cached_property  # which an attribute of a subclass or of an object replaces
    def shape(self) -> tuple[int, int, int]:
        """Return the (C, H, W) of the images, known before any is read."""
        raise UserError(f"data: {type(self).__name__} must define shape = (C, H, W), the size of its images")

    def as_images(self) -> None:
        """Promise the form above; a task that needs it calls this before `load`.

        A data set that has another form by default overrides it.
        """

    def transform(self, inputs: Tensor, draws: BatchRandom | None) -> Tensor:
        """Scale uint8 (B, C, H, W) to float32 in [−1, 1]; in training mirror first."""
        if draws is not None and self.flip:
            inputs = torch.where(draws.uniform(1, 1, 1) < self.flip, inputs.flip(3), inputs)
        return to_signed(inputs)


def to_signed(pixels: Tensor) -> Tensor:
    """Scale bytes to [−1, 1]: 0 ↦ −1, 255 ↦ 1 (Ho et al. 2020, section 3.3)."""
    return pixels.float().div_(127.5).sub_(1)


def check_val_size(val_size: int, num_images: int) -> None:
    """Raise ValueError unless `val_size` leaves some of the images, and takes as many of each class."""
    if val_size % NUM_CLASSES or not 0 <= val_size < num_images:
        largest = num_images - NUM_CLASSES
        raise ValueError(f"val_size must be a multiple of {NUM_CLASSES} in [0, {largest}], got {val_size}")


def hold_out_val(train: Split, test: Split, val_size: int, seed: int) -> dict[str, Split]:
    """Return the splits, with `val_size` training images, as many of each class, as "val" (0: without it)."""
    assert train.targets is not None
    order = torch.randperm(len(train), generator=generator(seed, "split"))
    shuffled = train.targets[order]
    classes = range(int(shuffled.max()) + 1)
    val = torch.cat([order[shuffled == label][: val_size // NUM_CLASSES] for label in classes]).sort().values
    rest = torch.ones(len(train), dtype=torch.bool)
    rest[val] = False

    splits = {"train": Split(train.inputs[rest], train.targets[rest])}
    if val_size:
        splits["val"] = Split(train.inputs[val], train.targets[val])
    return splits | {"test": test}
