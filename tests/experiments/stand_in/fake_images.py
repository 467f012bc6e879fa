"""Ten classes of images that are easily told apart, in the shapes of Fashion-MNIST."""

from __future__ import annotations

import torch
from torch import Tensor

from runner.data import Data, Split
from runner.streams import Draws, generator


class FakeImages(Data):
    """uint8 images (N, 28, 28): each class has its own random picture, dimmed, with noise on top."""

    class_names = tuple(f"garment {number}" for number in range(10))

    def load(self, seed: int) -> dict[str, Split]:
        pictures = torch.rand(10, 28, 28, generator=generator(0, "pictures"))
        splits = {}
        for name, size in (("train", 400), ("val", 120), ("test", 130)):
            random = generator(0, name)
            targets = torch.randint(10, (size,), generator=random)
            noise = torch.rand(size, 28, 28, generator=random)
            splits[name] = Split((pictures[targets] * 160 + noise * 95).byte(), targets)
        return splits

    def transform(self, inputs: Tensor, draws: Draws | None) -> Tensor:
        return inputs.float() / 127.5 - 1
