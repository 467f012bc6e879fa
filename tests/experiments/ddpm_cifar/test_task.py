"""The diffusion task: its losses and evaluations, resuming, modes, and what a user can get wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from experiments.data.lookups import Lookups
from runner import run
from runner.data import train_batch
from runner.engine.job import Result
from runner.errors import UserError
from runner.schedule import Constant
from tests.experiments.conftest import (
    IMAGE_SIZE,
    SIZES,
    T,
    checkpoint,
    draw_images,
    figures_later,
    figures_of,
    saved,
    table,
)
from tests.experiments.ddpm_cifar.conftest import MEASURES, built
from tests.runner.engine import helpers

QUARTERS = [f"loss_quarter_{i}" for i in (1, 2, 3, 4)]


def metrics_of(result: Result, split: str) -> list[dict[str, float]]:
    """Return the rows of a split in `metrics.csv`."""
    found = helpers.rows(result.folder, split)
    return [{name: float(text) for name, text in row.items() if text and name != "split"} for row in found]


# what a run leaves


def test_every_evaluation_has_its_measures_and_the_loss_falls_from_one(result: Result) -> None:
    val, train, test = (metrics_of(result, split) for split in ("val", "train", "test"))
    names = MEASURES | {*QUARTERS, "loss", "bits_per_dim", "fd_pixels_real", "kd_pixels_real"}
    assert all(names <= set(row) for row in (*val, *test))
    assert [row["step"] for row in val] == [0, 4, 8]
    assert val[0]["loss"] == pytest.approx(1, abs=0.1)  # ε = 0, against standard normal noise
    assert val[0]["loss"] > val[1]["loss"] > val[2]["loss"]
    assert all(0.4 < val[0][name] < 1.6 for name in QUARTERS)  # 1 to 3 of the 8 images have their t in each
    for row in (val[0], *train):
        assert sum(row[name] for name in QUARTERS) / 4 == pytest.approx(row["loss"], rel=1e-5)

    # real images keep their distance, samples change
    assert len({row["fd_pixels_real"] for row in val}) == 1
    assert len({row["fd_pixels"] for row in val}) == 3


def test_the_numbers_add_up(result: Result) -> None:
    rows = {row["number"]: float(row["here"]) for row in table(result.folder, "numbers")}
    for split in ("train", "test"):
        rate, distortion = rows[f"rate L₁ … L_T, {split}"], rows[f"distortion L₀, {split}"]
        assert rows[f"bits/dim, {split}"] == pytest.approx(rate + distortion) and distortion > 0
        assert f"fd_pixels_real, {split}" in rows
    assert not {name for name in rows if name.startswith(("loss", "bits_per_dim"))}
    assert float(table(result.folder, "rate_distortion")[-1]["rate"]) == pytest.approx(rate)
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
        result = run(*SIZES["ddpm_cifar"], f"data.root={folder}", "preset=ddpm_paper", "task.bits_images=0")
    assert result.status == "done" and "train 40 · test 12 samples" in (result.folder / "run.log").read_text()
    assert not metrics_of(result, "val")
    assert [row["step"] for row in metrics_of(result, "test")] == [0, 8]
    assert {"samples", "learning", "rate_distortion"} <= figures_of(result.folder)
    assert float(table(result.folder, "numbers")[0]["images"]) == 3


# losses


@pytest.mark.parametrize(
    ("dtype", "warmup", "steps", "tolerance"),
    [
        (torch.float64, 0, 8, 1e-7),  # where what is left is no rounding that Adam has enlarged
        pytest.param(torch.float32, 5000, 20, 1e-3, marks=pytest.mark.slow),  # the warm-up that ships
    ],
)
def test_two_slices_of_each_batch_are_the_whole_batch(
    root: Path, dtype: torch.dtype, warmup: int, steps: int, tolerance: float
) -> None:
    """The recipe's steps, on gradients that are averaged over processes, move the parameters alike."""
    moves = []
    for world_size in (1, 2):
        task, made = built(root)
        parameters = list(task.network.to(dtype).parameters())
        before = torch.nn.utils.parameters_to_vector(parameters).detach()
        optimizer = torch.optim.Adam(parameters, lr=2e-4)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: Constant(warmup)(step, steps))
        for step in range(steps):
            optimizer.zero_grad()
            for rank in range(world_size):
                batch = train_batch(made.data, made.splits["train"], 0, step, rank, world_size)
                torch.manual_seed(10 + rank)  # processes do not share the global stream
                (task.train(replace(batch, inputs=batch.inputs.to(dtype))).loss / world_size).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
        moves.append(torch.nn.utils.parameters_to_vector(parameters).detach() - before)
    whole, sliced = moves
    assert float((whole - sliced).norm() / whole.norm()) < tolerance


@pytest.mark.parametrize("kind", ["simple", "vlb"])
def test_both_losses_train(root: Path, kind: str) -> None:
    task, made = built(root, loss=kind)
    batch, again = (train_batch(made.data, made.splits["train"], 0, 0) for _ in range(2))
    loss = task.train(batch).loss
    loss.backward()
    if kind == "simple":  # the untrained network says ε = 0
        again.draws.integers(0, T)
        noise = again.draws.normal(3, IMAGE_SIZE, IMAGE_SIZE)
        assert float(loss.detach()) == pytest.approx(float(noise.square().mean()))
    assert torch.nn.utils.clip_grad_norm_(task.network.parameters(), 1.0, error_if_nonfinite=True) > 0


@pytest.mark.slow
def test_a_sweep_over_the_losses_is_ranked_by_the_bound(
    root: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    few = ("loop.steps=2", "loop.eval_every=2", "objective=bits_per_dim/val", "task.loss=simple,vlb")
    with figures_later():
        assert cli("-m", *SIZES["ddpm_cifar"], f"data.root={root}", *few).status == 0
    [board] = (tmp_path / "outputs" / "ddpm_cifar" / "sweeps").glob("*/leaderboard.csv")
    rows = helpers.table(board)
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
    task, made = built(root)
    task.load_state_dict(state)
    assert task.state_dict() is not state and task.state_dict() == state
    made.tracker.trains = False
    task.eval("val")
    assert task.history["steps"] == [0, 4, 8]  # what evaluates adds nothing


# modes


@pytest.mark.parametrize(("mode", "files"), [("sample", "samples/*.png"), ("export", "diffusers/**/*.*")])
def test_images_are_made_where_neither_the_data_nor_the_feature_network_is_at_hand(
    result: Result, mode: str, files: str, clean_process: None
) -> None:
    if mode == "export":
        pytest.importorskip("safetensors")
    command = (f"mode={mode}", checkpoint(result), "task.n=3", "task.steps=null", "task.sampler=ddpm")
    absent = ("data.root=/nowhere", "task.weights=/nowhere/either", "data.batch_size=9999")
    present, other = (
        {path.name: path.read_bytes() for path in run(*command, *more).folder.glob(files)}
        for more in ((), absent)
    )
    assert len(present) >= 3 and present == other


# what a user can get wrong


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("n", 0, " must be at least 1, got 0"),
        ("samples", 2, " must be at least 6, got 2"),
        ("steps", 26, r" must .*\[1, timesteps = 25\], got 26"),
        ("picture_steps", 0, " must .*25.*, got 0"),
        ("eval_steps", [5, 26], " must .*25.*, got 26"),
        ("eta", 2.0, " must .*, got 2"),
        ("data", Lookups(), " must be images.*got Lookups"),
        ("model", lambda **_: torch.nn.Flatten(), ": expected a UNet, got a Flatten"),
        ("weights", "/nowhere", "=/nowhere "),
    ],
)
def test_arguments_that_do_not_fit_are_refused(root: Path, key: str, value: object, message: str) -> None:
    with pytest.raises((ValueError, UserError), match=f"^{key}{message}"):
        built(root, **{key: value})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("task.sampler=euler", r"task\.sampler.*ddpm, ddim, dpm\+\+"),
        ("task.diffusion.schedule=sqrt", "linear, cosine"),
        ("data=image_folder data.size=7", r"divisible by .* = 8, .* 7 pixels high, as data\.size says"),
        ("data=image_folder data.size=0", r"data\.size=0: .*at least 1"),
        ("model.attention_resolutions=[7]", r"model\.attention_resolutions=.* 32 pixels high\."),
        (
            "data=fashion_mnist model.channel_mult=[1,1,1,1,1,1,1]",
            r"divisible by .* = 64, .* 32 pixels high\.",
        ),
    ],
)
def test_a_mistake_is_one_clear_message_before_images_are_read(
    tmp_path: Path, overrides: str, message: str, cli: Callable[..., Any]
) -> None:
    outcome = cli("experiment=ddpm_cifar", f"data.root={tmp_path}", *overrides.split())
    assert outcome.status == 2
    assert re.search(message, outcome.err) and "Traceback" not in outcome.err, outcome.err
    assert not list(tmp_path.iterdir())


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"at least 6 images .* 2 in val; data\.val_size=N"):
        built(draw_images(tmp_path / "few", {"train": 20, "val": 2, "test": 8}))
    with pytest.raises(UserError, match=r"in train$"):
        built(draw_images(tmp_path / "fewer", {"train": 2, "val": 6}))


def test_too_little_memory_for_the_loss_names_the_batch_to_try(root: Path) -> None:
    task, _ = built(root)
    task.network.forward = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(UserError) as raised:
        task.measures.loss("val", task._denoise)
    assert raised.value.right == "data.eval_batch_size=4"
