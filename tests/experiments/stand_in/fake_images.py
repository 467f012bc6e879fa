"""Ten classes of images that are easily told apart, in the place of Fashion-MNIST's."""

from __future__ import annotations

import torch

from experiments.data.fashion_mnist import FashionMNIST
from runner.data import Split
from runner.streams import generator


class FakeImages(FashionMNIST):
    """uint8 images, in the form that `as_images` says: each class has its own picture, dimmed, with noise on top."""

    def load(self, seed: int) -> dict[str, Split]:
        pictures = torch.rand(10, 28, 28, generator=generator(0, "pictures"))
        splits = {}
        for name, size in (("train", 400), ("val", 120), ("test", 130)):
            random = generator(0, name)
            targets = torch.randint(10, (size,), generator=random)
            noise = torch.rand(size, 28, 28, generator=random)
            images = (pictures[targets] * 160 + noise * 95).byte()
            splits[name] = Split(self.stored(images), targets)
        return splits
