"""Names and digests of jobs, and their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runner.errors import UserError
from runner.sweep.record import Record, digest, job_name, read_records, short_keys, short_value
from tests.runner.sweep.helpers import make_record


def record(number: int = 0, swept: dict[str, str] | None = None, **changed: Any) -> Record:
    """Return a job that has not run."""
    return make_record(number, swept, status="not run", metrics={}, **changed)


@pytest.mark.parametrize(
    ("swept", "name"),
    [
        ({"optimizer.lr": "0.1", "seed": "1"}, "3_lr-0.1_seed-1"),
        ({"a.lr": "1", "b.lr": "-2"}, "3_a.lr-1_b.lr--2"),
        ({"lr": "1", "b.lr": "2"}, "3_lr-1_b.lr-2"),
        ({"optimizer": "adam"}, "3_optimizer-adam"),
        ({"optimizer.lr": "0.030000000000000002"}, "3_lr-0.03"),
        ({"optimizer.lr": "1.23456789e-05", "seed": "123456789"}, "3_lr-1.235e-05_seed-123456789"),
        ({"+model.width": "8"}, "3_width-8"),
        ({"note": "../a b/'c'"}, "3_note-..-a-b-c"),
        ({"note": "[1,2,3]", "other": "日本"}, "3_note-1-2-3_other"),
        ({"note": "x" * 300}, "3_note-" + "x" * 53),
        ({"lr": "0.01248", "init": "orthogonal", "clip_norm": "0.97520001", "batch_size": "25600"},
         "3_lr-0.01248_init-orthogonal_clip_norm-0.9752"),  # ends with a whole setting
        ({}, "3"),
    ],
)  # fmt: skip
def test_job_name(swept: dict[str, str], name: str) -> None:
    assert job_name(3, swept) == name


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("12345678", "12345678"),
        ("0.01248", "0.01248"),
        ("142.714285714300", "142.7"),
        ("a" * 40, "a" * 15 + "…" + "a" * 15),
        ("日" * 20, "日" * 7 + "…" + "日" * 7),  # as wide as two letters
    ],
)
def test_short_value(text: str, short: str) -> None:
    assert short_value(text) == short


def test_short_keys_are_distinct_ends() -> None:
    keys = ["a.b.c", "x.b.c", "c", "d.e", "loop.e"]
    short = short_keys(keys)
    assert len(set(short.values())) == len(keys)
    assert all(key == end or key.endswith(f".{end}") for key, end in short.items())


def test_digest_ignores_paths_that_are_not_swept() -> None:
    config: dict[str, Any] = {
        "name": "toy",
        "seed": 0,
        "outputs": "x",
        "data": {"root": "y", "batch_size": 3},
    }
    original = digest(config, {"seed": "0"})
    elsewhere = config | {"outputs": "other", "resume": "r", "checkpoint": "c"}
    assert digest(elsewhere | {"data": {"root": "z", "batch_size": 3}}, {"seed": "0"}) == original
    assert digest(dict(reversed(config.items())), {"seed": "0"}) == original
    assert digest(config | {"seed": 1}, {"seed": "1"}) != original
    assert digest(config | {"data": {"root": "y", "batch_size": 4}}, {"seed": "0"}) != original
    roots = [digest(config | {"data": {"root": root}}, {"data.root": root}) for root in ("y", "z")]
    assert roots[0] != roots[1]


def test_records_are_saved_and_read_in_order(tmp_path: Path) -> None:
    changed: dict[str, Any] = {"swept": {"note": "日本 'x'"}, "changes": ["seed=1 (0)"]}
    for number in (10, 9):
        record(number, **changed).save(tmp_path)
    assert read_records(tmp_path) == [record(9, **changed), record(10, **changed)]
    assert not list(tmp_path.rglob("*.tmp"))
    (tmp_path / ".sweep" / "jobs" / "9.json").write_text('{"number": 0, ')
    with pytest.raises(UserError, match="cannot be read"):
        read_records(tmp_path)


def test_outcome_is_that_of_the_folder(tmp_path: Path) -> None:
    job = record()
    job.save(tmp_path)
    assert read_records(tmp_path)[0].status == "not run"
    job.folder(tmp_path).mkdir()
    assert read_records(tmp_path)[0].status == "interrupted"
    summary = {"status": "done", "error": None, "metrics": {"test": {"loss": 1.0}}, "seconds": 2.0}
    for best, value in (({"value": 0.5}, 0.5), (None, None), ({"value": None}, None)):
        (job.folder(tmp_path) / "summary.json").write_text(json.dumps(summary | {"best": best}))
        [outcome] = read_records(tmp_path)
        assert (outcome.status, outcome.value, outcome.seconds) == ("done", value, 2.0)
        assert outcome.test_metrics() == {"loss": 1.0} and outcome.experiment == "toy"
