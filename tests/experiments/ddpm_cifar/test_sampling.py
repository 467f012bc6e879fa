"""Samples belong to the seed and their numbers; what is written of them and of their network others can read."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.data.image_folder.dataset import ImageFolder
from experiments.ddpm_cifar.export import export_diffusers
from experiments.nn import samplers
from experiments.nn.diffusion import GaussianDiffusion
from experiments.nn.unet import UNet
from runner import run
from runner.engine.job import Result
from runner.errors import UserError
from tests.experiments.conftest import IMAGE_SIZE, T, checkpoint
from tests.experiments.ddpm_cifar.conftest import built


def images(root: Path, numbers: range, seed: int = 0, **changed: Any) -> np.ndarray[Any, Any]:
    task, _ = built(root, seed, noisy=True, **changed)
    return task.sampling.generate(numbers).numpy().astype(int)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_the_same_seed_gives_the_same_image_whatever_the_batch(root: Path, sampler: str) -> None:
    one = images(root, range(7), sampler=sampler, sample_batch=3)
    other = images(root, range(5), sampler=sampler, sample_batch=5)
    assert one.shape == (7, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert abs(one[:5] - other).max() <= 1
    assert abs(images(root, range(5), seed=1, sampler=sampler) - other).max() > 20

    # any sampler is tried on a network that was trained with noisy ddim, and ddim alone reads eta
    changed = abs(images(root, range(5), sampler=sampler, eta=1.0) - other).max()
    assert changed > 20 if sampler == "ddim" else changed == 0


def test_samples_are_made_once_at_a_step_of_training(root: Path) -> None:
    task, made = built(root)
    four, six = task.sampling.samples(4), task.sampling.samples(6)
    assert torch.equal(six[:4], four) and torch.equal(six, task.sampling.generate(range(6)))
    torch.nn.init.normal_(task.network.conv_out.weight, std=0.1)
    assert torch.equal(task.sampling.samples(6), six)
    made.step = 1
    assert not torch.equal(task.sampling.samples(6), six)


def test_a_single_step_of_the_figures_starts_where_x_is(root: Path) -> None:
    task, _ = built(root)
    visited: list[int] = []
    for t in (24, 3):
        task.sampling.denoise(1, t, [0], "test", on_step=lambda step, t, x, x_0: visited.append(t))
    assert visited == [24, 3]


def test_the_archive_is_what_guided_diffusions_evaluator_reads(
    result: Result, root: Path, clean_process: None
) -> None:
    """One stored array of that name, whose header says bytes, row after row: the images of the PNGs."""
    sampled = run("mode=sample", checkpoint(result), "n=8").folder
    fake = np.load(sampled / "samples.npz")["arr_0"]
    files = sorted((sampled / "samples").glob("*.png"))
    assert [file.name for file in files] == [f"00000{number}.png" for number in range(8)]
    np.testing.assert_array_equal([np.asarray(Image.open(file)) for file in files], fake)
    assert min(Image.open(sampled / "grid.png").size) > IMAGE_SIZE
    with zipfile.ZipFile(sampled / "samples.npz") as archive, archive.open("arr_0.npy") as file:
        assert archive.namelist() == ["arr_0.npy"]
        assert np.lib.format.read_magic(file) == (1, 0)  # type: ignore[no-untyped-call]
        header = np.lib.format.read_array_header_1_0(file)  # type: ignore[no-untyped-call]
        assert header == (fake.shape, False, np.dtype("uint8"))
        assert len(file.read()) == 8 * IMAGE_SIZE * IMAGE_SIZE * 3

    # the run's summary measured the same images
    real = ImageFolder(str(root), IMAGE_SIZE).load(0)["test"].inputs[:8].permute(0, 2, 3, 1).numpy()
    x, y = (images.reshape(8, -1).astype(float) / 255 for images in (real, fake))
    product = np.linalg.eigvals(np.cov(x.T) @ np.cov(y.T)).real.clip(0)
    distance = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T))
    assert result.metrics["test"]["fd_pixels"] == pytest.approx(
        distance - 2 * np.sqrt(product).sum(), rel=1e-3
    )


# export


@pytest.mark.slow
def test_diffusers_opens_the_export_and_makes_the_same_images(root: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    network = built(root, noisy=True)[0].network.eval()
    export_diffusers(tmp_path / "diffusers", network, GaussianDiffusion(T))
    pipeline = diffusers.DDPMPipeline.from_pretrained(str(tmp_path / "diffusers"))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(2, torch.Generator().manual_seed(5), num_inference_steps=T, output_type="np").images

    stream = torch.Generator().manual_seed(5)
    noise = [torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=stream) for _ in range(T)]
    ours = samplers.sample(GaussianDiffusion(T), network, noise[0], draw=lambda step: noise[step + 1])
    ours = ((ours + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-4)


def test_the_exported_weights_are_the_networks(root: Path, tmp_path: Path) -> None:
    peer = pytest.importorskip("safetensors.torch")
    network = built(root, noisy=True, channels_last=True)[0].network
    export_diffusers(tmp_path / "diffusers", network, GaussianDiffusion(T))
    weights = peer.load_file(tmp_path / "diffusers" / "unet" / "diffusion_pytorch_model.safetensors")
    torch.testing.assert_close(weights, dict(network.state_dict()), rtol=0, atol=0)


def test_without_safetensors_the_error_is_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="pip install safetensors"):
        export_diffusers(tmp_path / "diffusers", UNet.__new__(UNet), GaussianDiffusion(T))
    assert list(tmp_path.iterdir()) == []
