"""The diffusion task: its losses and evaluations, resuming, modes, and what a user can get wrong."""

from __future__ import annotations

import csv
import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.data.image_folder.dataset import ImageFolder
from experiments.data.lookups import Lookups
from experiments.ddpm_cifar.task import DDPM
from experiments.nn import diffusion, samplers
from experiments.nn.unet import UNet
from runner import run
from runner.data import train_batch
from runner.engine.job import Result
from runner.errors import UserError
from runner.schedule import Constant
from tests.experiments.conftest import (
    IMAGE_SIZE,
    T,
    checkpoint,
    draw_images,
    figures_later,
    figures_of,
    saved,
    table,
)
from tests.experiments.ddpm_cifar.conftest import MEASURES, built, command, metrics_of

QUARTERS = [f"loss_quarter_{i}" for i in (1, 2, 3, 4)]


# what a run leaves


def test_every_evaluation_has_the_curves_of_all_experiments_and_its_own(result: Result) -> None:
    for split in ("val", "test"):
        names = MEASURES | {*QUARTERS, "loss", "bits_per_dim", "fd_pixels_real", "kd_pixels_real"}
        assert all(names <= set(row) for row in metrics_of(result, split))
    val = metrics_of(result, "val")
    assert [row["step"] for row in val] == [0, 4, 8]
    losses = [row["loss"] for row in val]
    assert losses == sorted(losses, reverse=True)

    # real images keep their distance, samples change
    assert len({row["fd_pixels_real"] for row in val}) == 1
    assert len({row["fd_pixels"] for row in val}) == 3


def test_the_loss_before_training_is_one_and_is_the_mean_of_its_quarters(result: Result) -> None:
    first = metrics_of(result, "val")[0]
    assert first["loss"] == pytest.approx(1, abs=0.1)  # ε = 0, against standard normal noise
    assert all(0.4 < first[name] < 1.6 for name in QUARTERS)  # 1 to 3 of the 8 images have their t in each
    for row in (first, *metrics_of(result, "train")):
        assert sum(row[name] for name in QUARTERS) / 4 == pytest.approx(row["loss"], rel=1e-5)


def test_the_numbers_add_up(result: Result) -> None:
    rows = {row["number"]: float(row["here"]) for row in table(result.folder, "numbers")}
    for split in ("train", "test"):
        rate, distortion = rows[f"rate L₁ … L_T, {split}"], rows[f"distortion L₀, {split}"]
        assert rows[f"bits/dim, {split}"] == pytest.approx(rate + distortion) and distortion > 0
        assert f"fd_pixels_real, {split}" in rows
        assert not {name for name in rows if name.startswith(("loss", "bits_per_dim"))}
    last = table(result.folder, "rate_distortion")[-1]
    assert float(last["rate"]) == pytest.approx(rows["rate L₁ … L_T, test"])
    for name in MEASURES:
        assert rows[f"{name}, test"] == pytest.approx(result.metrics["test"][name])


@pytest.mark.slow
def test_it_learns(small: Callable[..., Result], clean_process: None) -> None:
    longer = ("loop.steps=120", "loop.eval_every=120", "optimizer.lr=0.003", "data.batch_size=32")
    first, *_, last = metrics_of(small("ddpm_cifar", *longer), "val")
    assert last["loss"] < 0.5 * first["loss"] and last["bits_per_dim"] < first["bits_per_dim"]


@pytest.mark.slow
def test_the_papers_preset_learns_from_all_images_and_measures_at_the_end(
    tmp_path: Path, clean_process: None
) -> None:
    folder = draw_images(tmp_path / "images", {"train": 40, "test": 12})
    with figures_later():
        result = run(*command(folder, "preset=ddpm_paper", "task.bits_images=0"))
    assert result.status == "done" and "train 40 · test 12 samples" in (result.folder / "run.log").read_text()
    assert not metrics_of(result, "val")
    assert [row["step"] for row in metrics_of(result, "test")] == [0, 8]
    assert {"samples", "learning", "rate_distortion"} <= figures_of(result.folder)
    assert float(table(result.folder, "numbers")[0]["images"]) == 3


@pytest.mark.slow
def test_mode_eval_holds_numbers_of_steps_against_each_other(result: Result, clean_process: None) -> None:
    with figures_later():
        again = run("mode=eval", checkpoint(result), "task.eval_steps=[25,5]", "task.picture_steps=5")
    few, _, real = table(again.folder, "steps")
    assert float(few["fd_pixels"]) == pytest.approx(again.metrics["test"]["fd_pixels"])
    assert float(real["fd_pixels"]) == pytest.approx(again.metrics["test"]["fd_pixels_real"])
    assert "steps" in figures_of(again.folder)


# losses


def parameters(task: DDPM) -> Tensor:
    return torch.nn.utils.parameters_to_vector(task.network.parameters()).detach()


def trained(root: Path, world_size: int, dtype: torch.dtype, warmup: int = 0, steps: int = 20) -> Tensor:
    """Return parameters (P,) after steps of the recipe on gradients that are averaged over processes."""
    task, made = built(root)
    task.network.to(dtype)
    optimizer = torch.optim.Adam(task.network.parameters(), lr=2e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: Constant(warmup)(step, steps))
    for step in range(steps):
        optimizer.zero_grad()
        for rank in range(world_size):
            batch = train_batch(made.data, made.splits["train"], 0, step, rank, world_size)
            torch.manual_seed(10 + rank)  # processes do not share the global stream
            (task.train(replace(batch, inputs=batch.inputs.to(dtype))).loss / world_size).backward()
        torch.nn.utils.clip_grad_norm_(task.network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return parameters(task)


def test_two_slices_of_each_batch_are_the_whole_batch(root: Path) -> None:
    """In float64, where what is left is no rounding that Adam has enlarged."""
    before = parameters(built(root)[0])
    whole, sliced = (trained(root, world_size, torch.float64, steps=8) for world_size in (1, 2))
    assert float((whole - sliced).abs().max()) < 1e-9
    assert float((whole - before).abs().max()) > 1e-3


@pytest.mark.slow
def test_two_slices_are_the_whole_batch_in_float32_and_with_the_warm_up_that_ships(root: Path) -> None:
    before = parameters(built(root)[0])
    whole, sliced = (trained(root, world_size, torch.float32, warmup=5000) for world_size in (1, 2))
    assert float((whole - sliced).abs().max()) < 1e-5
    # none of them moves by more than 1e-5 in so few steps
    assert float((whole - sliced).norm() / (whole - before).norm()) < 1e-3


@pytest.mark.parametrize("kind", ["simple", "vlb"])
def test_both_losses_train(root: Path, kind: str) -> None:
    task, made = built(root, loss=kind)
    output, again = (train_batch(made.data, made.splits["train"], 0, 0) for _ in range(2))
    loss = task.train(output).loss
    loss.backward()
    if kind == "simple":  # the untrained network says ε = 0
        again.draws.integers(0, T)
        noise = again.draws.normal(3, IMAGE_SIZE, IMAGE_SIZE)
        assert float(loss.detach()) == pytest.approx(float(noise.square().mean()))
    grads = [p.grad for p in task.network.parameters() if p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in grads) and any(bool(g.any()) for g in grads)


@pytest.mark.slow
def test_a_sweep_over_the_losses_is_ranked_by_the_bound(
    root: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    few = ("loop.steps=2", "loop.eval_every=2", "objective=bits_per_dim/val")
    with figures_later():
        assert cli("-m", *command(root, *few), "task.loss=simple,vlb").status == 0
    [board] = (tmp_path / "outputs" / "ddpm_cifar" / "sweeps").glob("*/leaderboard.csv")
    with board.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["task.loss"] for row in rows} == {"simple", "vlb"}
    bits = [float(row["bits_per_dim/val"]) for row in rows]
    assert bits == sorted(bits) and all(0 < value < 20 for value in bits)


def test_grey_images_are_learnt_as_grey(tmp_path: Path) -> None:
    task, made = built(draw_images(tmp_path / "grey", mode="L"), channels=1)
    assert task.network.in_channels == 1
    assert task.eval("val")["loss"] == pytest.approx(1, abs=0.3)
    assert task.sampling.samples(3).shape == (3, 1, IMAGE_SIZE, IMAGE_SIZE)
    task.before(made)
    assert set(made.figures) == {"samples", "forward"}


def test_the_history_of_samples_is_in_the_checkpoint_and_comes_back(result: Result, root: Path) -> None:
    state = saved(result)["task"]
    assert state["seen"]["steps"] == [0, 4, 8]
    assert all(images.shape == (8, 3, IMAGE_SIZE, IMAGE_SIZE) for images in state["seen"]["samples"])
    task, _ = built(root)
    task.load_state_dict(state)
    assert task.state_dict() is not state and task.state_dict() == state
    task.run.tracker.trains = False
    task.eval("val")
    assert task.history["steps"] == [0, 4, 8]  # what evaluates adds nothing


# modes


def test_the_distance_of_the_summary_is_that_of_the_images_that_mode_sample_writes(
    result: Result, root: Path, clean_process: None
) -> None:
    fake = np.load(run("mode=sample", checkpoint(result), "n=8").folder / "samples.npz")["arr_0"]
    real = ImageFolder(str(root), IMAGE_SIZE).load(0)["test"].inputs[:8].permute(0, 2, 3, 1).numpy()
    x, y = (images.reshape(8, -1).astype(float) / 255 for images in (real, fake))
    product = np.linalg.eigvals(np.cov(x.T) @ np.cov(y.T)).real.clip(0)
    distance = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T))
    distance -= 2 * np.sqrt(product).sum()
    assert result.metrics["test"]["fd_pixels"] == pytest.approx(distance, rel=1e-3)


@pytest.mark.parametrize("mode", ["sample", "export"])
def test_images_are_made_where_neither_the_data_nor_the_feature_network_is_at_hand(
    result: Result, mode: str, clean_process: None
) -> None:
    if mode == "export":
        pytest.importorskip("safetensors")
    absent = ("data.root=/nowhere", "task.weights=/nowhere/either", "data.batch_size=9999")
    pattern = {"sample": "samples/*.png", "export": "diffusers/**/*.*"}[mode]
    written = []
    for more in ((), absent):
        folder = run(f"mode={mode}", checkpoint(result), "task.n=3", *more).folder
        written.append({path.name: path.read_bytes() for path in folder.glob(pattern)})
    assert len(written[0]) >= 3 and written[0] == written[1]


def test_measures_want_the_data_and_a_checkpoint_its_network(result: Result, cli: Callable[..., Any]) -> None:
    outcome = cli("mode=eval", checkpoint(result), "data.root=/nowhere")
    assert outcome.status == 2 and "/nowhere" in outcome.err
    assert cli("mode=sample", checkpoint(result), "model.base_channels=64").status == 2


# what a user can get wrong


@pytest.mark.parametrize(
    ("key", "value"),
    [("n", 0), ("samples", 2), ("steps", 26), ("picture_steps", 0), ("eval_steps", [5, 26]), ("eta", 2.0)],
)
def test_arguments_out_of_range_are_refused(root: Path, key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{key} must .*, got "):
        built(root, **{key: value})


def test_other_data_and_other_models_are_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="data must be images"):
        DDPM(UNet, Lookups(), diffusion.GaussianDiffusion(T))  # type: ignore[arg-type]
    data = ImageFolder(str(root), IMAGE_SIZE)
    with pytest.raises(UserError, match="expected a UNet, got a Flatten"):
        DDPM(lambda **_: torch.nn.Flatten(), data, diffusion.GaussianDiffusion(T), steps=5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.steps=26", "task.steps"),
        ("task.sampler=euler", "task.sampler.*ddpm, ddim, dpm\\+\\+"),
        ("task.diffusion.schedule=sqrt", "linear, cosine"),
        ("task.weights=/nowhere", "weights=/nowhere"),
        ("data.size=7", "image_size must be divisible by 2.* 7 pixels high, as data.size says"),
        ("data.size=0", "data.size=0: .*at least 1"),
        ("model.attention_resolutions=[7]", "model.attention_resolutions=.* 8 pixels high"),
        ("data=lookups", "data"),
    ],
)
def test_a_mistake_is_one_clear_message(
    root: Path, tmp_path: Path, override: str, message: str, cli: Callable[..., Any]
) -> None:
    cache = tmp_path / "cache"
    outcome = cli(*command(root, f"data.cache={cache}"), override)
    assert outcome.status == 2
    assert re.search(message, outcome.err) and "Traceback" not in outcome.err, outcome.err
    if "size" in override:  # before images are decoded
        assert not cache.exists() and not (tmp_path / "outputs").exists()


def test_a_network_for_other_sizes_is_told_the_size_of_the_images(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    overrides = ("model.channel_mult=[1,1,1,1,1,1,1]", f"data.root={tmp_path}")
    outcome = cli("experiment=ddpm_cifar", "data=fashion_mnist", *overrides)
    assert outcome.status == 2 and "divisible by 64" in outcome.err and "pixels high." in outcome.err
    assert "data.size" not in outcome.err


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"at least 6 images .* 2 in val; data\.val_size=N"):
        built(draw_images(tmp_path / "few", {"train": 20, "val": 2, "test": 8}))
    with pytest.raises(UserError, match=r"in train$"):
        built(draw_images(tmp_path / "fewer", {"train": 2, "val": 6}))


def test_too_little_memory_names_the_batch_to_try(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, _ = built(root, sample_batch=6)
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")

    def full(*_: object) -> Tensor:
        raise error

    monkeypatch.setattr(task.network, "forward", full)
    for call, right in (
        (lambda: task.sampling.generate(range(6)), "task.sample_batch=3"),
        (lambda: task.measures.loss("val", task._denoise), "data.eval_batch_size=4"),
    ):
        with pytest.raises(UserError) as raised:
            call()
        assert raised.value.right == right

    # other errors stay what they are
    error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        task.sampling.generate(range(6))


def test_the_derivation_names_functions_and_tests_that_there_are() -> None:
    tests_folder = Path(__file__).parents[1]
    text = (tests_folder.parents[1] / "docs" / "ddpm.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in tests_folder.rglob("test_*.py"))
    functions = "".join(inspect.getsource(module) for module in (diffusion, samplers))
    named = re.findall(r"`(?:GaussianDiffusion\.)?(\w+)\(\)`", text)
    assert len(named) > 8
    assert not [name for name in named if f"def {name}(" not in functions]
    assert not [name for name in re.findall(r"`(test_\w+)`", text) if f"def {name}(" not in tests]
