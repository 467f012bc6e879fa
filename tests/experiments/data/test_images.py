"""What the data sets of images share: which images are held out, and what a batch of them looks like."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from experiments.data.cifar10 import CIFAR10
from experiments.data.fashion_mnist import FashionMNIST
from experiments.data.images import ImageData, hold_out_val
from runner.data import Split
from runner.errors import UserError
from tests.experiments.data.conftest import batch_random, random_bytes

TRAIN = Split(torch.arange(100), torch.arange(100) // 10)
TEST = Split(torch.arange(20), torch.arange(20) // 2)


def test_val_has_as_many_of_each_class_and_depends_on_the_seed_alone():
    one = hold_out_val(TRAIN, TEST, 30, seed=1)
    torch.rand(7)
    again, other = (hold_out_val(TRAIN, TEST, 30, seed) for seed in (1, 2))
    assert list(one) == ["train", "val", "test"] and one["test"] is TEST
    for name, per_class in (("train", 7), ("val", 3)):
        assert torch.equal(one[name].targets, one[name].inputs // 10)
        assert torch.bincount(one[name].targets).tolist() == [per_class] * 10
        assert torch.equal(one[name].inputs, again[name].inputs)
    assert sorted([*one["train"].inputs, *one["val"].inputs]) == list(range(100))
    assert one["val"].inputs.diff().min() > 0  # in the order that they had
    assert not torch.equal(one["val"].inputs, other["val"].inputs)
    without = hold_out_val(TRAIN, TEST, 0, seed=0)
    assert list(without) == ["train", "test"] and torch.equal(without["train"].inputs, TRAIN.inputs)


def test_a_missing_shape_is_reported_with_the_class_that_lacks_it():
    with pytest.raises(UserError, match=r"ImageData must define shape = \(C, H, W\)"):
        ImageData(1, 1, 0.0).shape  # noqa: B018


def test_every_image_is_held_out_equally_often():
    held_out = torch.cat([hold_out_val(TRAIN, TEST, 30, seed)["val"].inputs for seed in range(400)])
    assert held_out.bincount().sub(120).abs().max() < 4.5 * 9.2  # binomial(400, 0.3): 120 ± 9.2


@pytest.mark.parametrize(
    ("data", "shape", "shift", "scale"),
    [
        (CIFAR10(flip=1.0), (3, 16, 16), 0.5, 0.5),  # bytes become numbers from −1 to 1
        (FashionMNIST(shift=3, flip=1.0), (16, 16), 0.2860, 0.3530),
    ],
)
def test_evaluation_scales_and_nothing_else(data, shape, shift, scale):
    images = torch.arange(256, dtype=torch.uint8).expand(3, 256).reshape(-1, *shape)
    before, expected = images.clone(), ((images.double() / 255 - shift) / scale).float()
    torch.testing.assert_close(data.transform(images, None), expected, rtol=0, atol=1e-6)
    assert torch.equal(images, before)


def as_images(data: FashionMNIST) -> FashionMNIST:
    data.as_images()
    return data


@pytest.mark.parametrize(("kind", "shape"), [(CIFAR10, (3, 32, 32)), (FashionMNIST, (28, 28))])
def test_flip_mirrors_its_share_in_training_alone(kind, shape):
    images, draws = random_bytes(400, *shape), batch_random(400)
    plain, batch = (kind(flip=0.25).transform(images, each) for each in (None, draws))
    same, mirrored = ((batch == rows).flatten(1).all(1) for rows in (plain, plain.flip(-1)))
    assert (same ^ mirrored).all()
    assert abs(int(mirrored.sum()) - 100) < 4.5 * 8.7  # binomial(400, 1/4)
    assert torch.equal(kind(flip=0.0).transform(images, draws), plain)
    assert torch.equal(kind(flip=1.0).transform(images, draws), plain.flip(-1))


SHIFTED = FashionMNIST(shift=2, flip=0.5)


@pytest.mark.parametrize(
    ("data", "shape"),
    [(CIFAR10(), (3, 32, 32)), (SHIFTED, (28, 28)), (as_images(FashionMNIST(shift=2)), (1, 32, 32))],
)
def test_processes_see_what_one_would(data, shape):
    images = random_bytes(8, *shape)
    whole = data.transform(images, batch_random(8))
    parts = [data.transform(images[rows], batch_random(8, rows)) for rows in (slice(0, 4), slice(4, 8))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(data.transform(images, batch_random(8, seed=6)), whole)


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    return pad(image, (27, 27, 27, 27))[27 - down : 55 - down, 27 - right : 55 - right]


def test_every_shift_up_to_the_limit_mirrored_or_not_and_no_other():
    [image] = random_bytes(1, 28, 28)
    steps = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    possible = torch.stack([shifted(source, *step) for source in (image, image.flip(1)) for step in steps])
    for flip, number in ((0.5, 18), (0.0, 9)):
        batch = FashionMNIST(shift=1, flip=flip)._augment(image.expand(600, 28, 28), batch_random(600))
        counts = (batch == possible[:number, None]).flatten(2).all(2).sum(1)
        assert counts.sum() == 600 and counts.min() > 12  # 33 ± 5.6 of each, or more


def test_largest_shift_leaves_a_corner():
    [image] = random_bytes(1, 28, 28)
    batch = FashionMNIST(shift=27)._augment(image.expand(2000, 28, 28), batch_random(2000))
    corners = torch.stack([shifted(image, down, right) for down in (-27, 27) for right in (-27, 27)])
    lit = (batch > 0).flatten(1).sum(1)
    assert lit.min() == 1  # never all black
    assert (batch[lit == 1][:, None] == corners).flatten(2).all(2).any(1).all()


def test_as_images_are_shifted_and_mirrored_as_the_rows_are():
    images = random_bytes(50, 28, 28)
    padded = SHIFTED._augment(pad(images, (2, 2, 2, 2))[:, None], batch_random(50))
    rows = pad(SHIFTED._augment(images, batch_random(50)), (2, 2, 2, 2))
    assert padded.shape == (50, 1, 32, 32)
    # except the border, where the padding keeps what the rows lose
    assert torch.equal(padded[:, 0, 4:-4, 4:-4], rows[:, 4:-4, 4:-4])
