"""What a job is called and known by, and what its folder says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runner.errors import UserError
from runner.sweep.record import Record, digest, job_name, read_records, short_keys


def record(number: int = 0, **changed: Any) -> Record:
    """A job that has not run."""
    config = {"name": "toy", "seed": 0, "outputs": "x", "data": {"root": "y", "batch_size": 3}}
    given = {"swept": {"seed": "0"}, "config": config, "digest": "d", "objective": "accuracy/val"}
    return Record(number, f"{number}_seed=0", direction="maximize", **(given | changed))


@pytest.mark.parametrize(
    ("swept", "name"),
    [
        ({"optimizer.lr": "0.1", "seed": "1"}, "3_lr=0.1,seed=1"),
        ({"a.lr": "1", "b.lr": "2"}, "3_a.lr=1,b.lr=2"),
        ({"lr": "1", "b.lr": "2"}, "3_lr=1,b.lr=2"),
        ({"optimizer": "adam"}, "3_optimizer=adam"),
        ({"optimizer.lr": "0.030000000000000002"}, "3_lr=0.03"),
        ({"optimizer.lr": "1.23456789e-05"}, "3_lr=1.235e-05"),
        ({"+model.width": "8"}, "3_width=8"),
        ({"note": "../a b/'c'"}, "3_note=..-a-b-c-"),
        ({"note": "x" * 300}, "3_note=" + "x" * 53),
        ({}, "3"),
    ],
)
def test_names_are_short_and_plain(swept: dict[str, str], name: str) -> None:
    assert job_name(3, swept) == name


def test_short_keys_are_told_apart() -> None:
    keys = ["a.b.c", "x.b.c", "c", "d.e", "loop.e"]
    short = short_keys(keys)
    assert len(set(short.values())) == len(keys)
    assert all(key == end or key.endswith(f".{end}") for key, end in short.items())


def test_a_job_is_known_by_its_config_without_paths() -> None:
    config: dict[str, Any] = record().config
    known = digest(config, {"seed": "0"})
    elsewhere = config | {"outputs": "other", "resume": "r", "checkpoint": "c"}
    assert digest(elsewhere | {"data": {"root": "z", "batch_size": 3}}, {"seed": "0"}) == known
    assert digest(dict(reversed(config.items())), {"seed": "0"}) == known
    assert digest(config | {"seed": 1}, {"seed": "1"}) != known
    assert digest(config | {"data": {"root": "y", "batch_size": 4}}, {"seed": "0"}) != known
    roots = [digest(config | {"data": {"root": root}}, {"data.root": root}) for root in ("y", "z")]
    assert roots[0] != roots[1]  # a path that is swept is what the jobs differ in


def test_what_is_frozen_is_read_back(tmp_path: Path) -> None:
    for number in (10, 9):
        record(number, swept={"note": "日本 'x'"}, changes=["seed=1 (0)"]).freeze(tmp_path)
    found = read_records(tmp_path)
    assert [entry.number for entry in found] == [9, 10]
    assert found[1] == record(10, swept={"note": "日本 'x'"}, changes=["seed=1 (0)"])
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_the_folder_says(tmp_path: Path) -> None:
    job = record()
    job.freeze(tmp_path)
    assert read_records(tmp_path)[0].status == "not run"
    job.folder(tmp_path).mkdir()
    assert read_records(tmp_path)[0].status == "interrupted"
    summary = {
        "status": "done",
        "error": None,
        "best": {"value": 0.5},
        "metrics": {"test": {"loss": 1.0}},
        "seconds": 2.0,
    }
    for best, value in (({"value": 0.5}, 0.5), (None, None), ({"value": None}, None)):
        (job.folder(tmp_path) / "summary.json").write_text(json.dumps(summary | {"best": best}))
        [found] = read_records(tmp_path)
        assert (found.status, found.value, found.seconds) == ("done", value, 2.0)
        assert found.metrics == {"test": {"loss": 1.0}} and found.experiment == "toy"


def test_a_frozen_job_that_cannot_be_read_is_one_message(tmp_path: Path) -> None:
    record().freeze(tmp_path)
    (tmp_path / ".sweep" / "jobs" / "0.json").write_text('{"number": 0, ')
    with pytest.raises(UserError, match="cannot be read"):
        read_records(tmp_path)


def test_a_long_name_ends_with_a_whole_setting() -> None:
    swept = {"optimizer.lr": "0.01248", "model.init": "orthogonal", "loop.clip_norm": "0.97520001"}
    assert (
        job_name(17, swept | {"data.batch_size": "256"}) == "17_lr=0.01248,init=orthogonal,clip_norm=0.9752"
    )
    assert job_name(1, {"task.note": "x" * 99}) == f"1_note={'x' * 53}"
