"""What the data sets of images share: which images are held out, and what a batch of them looks like."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from experiments.data.cifar10 import CIFAR10
from experiments.data.fashion_mnist import FashionMNIST
from experiments.data.images import ImageData, hold_out_val
from runner.data import Split
from tests.experiments.data.conftest import batch_random, random_bytes

TRAIN = Split(torch.arange(100), torch.arange(100) // 10)
TEST = Split(torch.arange(20), torch.arange(20) // 2)


def test_val_has_as_many_of_each_class_and_depends_on_the_seed_alone() -> None:
    one = hold_out_val(TRAIN, TEST, 30, seed=1)
    torch.rand(7)
    again, other = (hold_out_val(TRAIN, TEST, 30, seed) for seed in (1, 2))
    assert list(one) == ["train", "val", "test"] and one["test"] is TEST
    for name, per_class in (("train", 7), ("val", 3)):
        assert one[name].targets is not None
        assert torch.equal(one[name].targets, one[name].inputs // 10)
        assert torch.bincount(one[name].targets).tolist() == [per_class] * 10
        assert torch.equal(one[name].inputs, again[name].inputs)
    assert sorted([*one["train"].inputs, *one["val"].inputs]) == list(range(100))
    assert not torch.equal(one["val"].inputs, other["val"].inputs)
    without = hold_out_val(TRAIN, TEST, 0, seed=0)
    assert list(without) == ["train", "test"] and torch.equal(without["train"].inputs, TRAIN.inputs)


def test_every_image_is_held_out_equally_often() -> None:
    counts = torch.zeros(100)
    for seed in range(400):
        counts[hold_out_val(TRAIN, TEST, 30, seed)["val"].inputs] += 1
    assert counts.sub(120).abs().max() < 4.5 * 9.2  # binomial(400, 0.3): 120 ± 9.2


def test_bytes_become_numbers_from_minus_one_to_one() -> None:
    images = torch.arange(256, dtype=torch.uint8).expand(3, 256).reshape(1, 3, 16, 16)
    before = images.clone()
    scaled = CIFAR10().transform(images, None)
    assert scaled.dtype == torch.float32 and scaled.min() == -1 and scaled.max() == 1
    assert torch.allclose(scaled.double(), images.double() / 127.5 - 1, rtol=0, atol=1e-7)
    assert torch.equal(images, before)


def as_images() -> FashionMNIST:
    data = FashionMNIST(shift=2, flip=0.5)
    data.as_images()
    return data


@pytest.mark.parametrize(("kind", "shape"), [(CIFAR10, (3, 32, 32)), (FashionMNIST, (28, 28))])
def test_flip_mirrors_its_share_in_training_alone(
    kind: type[CIFAR10 | FashionMNIST], shape: tuple[int, ...]
) -> None:
    images = random_bytes(400, *shape)
    plain = kind(flip=0.25).transform(images, None)
    batch = kind(flip=0.25).transform(images, batch_random(400))
    same = (batch == plain).flatten(1).all(1)
    mirrored = (batch == plain.flip(-1)).flatten(1).all(1)
    assert bool((same ^ mirrored).all())
    assert abs(int(mirrored.sum()) - 100) < 4.5 * 8.7  # binomial(400, 1/4)
    assert torch.equal(kind(flip=0.0).transform(images, batch_random(400)), plain)
    assert torch.equal(kind(flip=1.0).transform(images, batch_random(400)), plain.flip(-1))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (CIFAR10, (3, 32, 32)),
        (lambda: FashionMNIST(shift=2, flip=0.5), (28, 28)),
        (as_images, (1, 32, 32)),
    ],
)
def test_processes_see_what_one_would(make: Callable[[], ImageData], shape: tuple[int, ...]) -> None:
    data, images = make(), random_bytes(8, *shape)
    whole = data.transform(images, batch_random(8))
    parts = [data.transform(images[rows], batch_random(8, rows)) for rows in (slice(0, 4), slice(4, 8))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(data.transform(images, batch_random(8, seed=6)), whole)
