"""Names and digests of jobs, and their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from runner.errors import UserError
from runner.sweep.record import digest, job_name, read_records, short_keys, short_value
from tests.runner.sweep.helpers import cases, make_record


@cases("name", "swept", "name")
def test_job_name(swept: str, name: str) -> None:
    assert job_name(3, yaml.safe_load(swept)) == name


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
    config: dict[str, Any] = {"name": "toy", "seed": 0, "outputs": "x"}
    data = {"root": "y", "batch_size": 3}

    def digest_of(swept: str = "seed", **changed: Any) -> str:
        return digest(config | {"data": data} | changed, {swept: ""})

    elsewhere = digest_of(outputs="other", resume="r", checkpoint="c", data=data | {"root": "z"})
    backwards = digest({"data": data} | dict(reversed(config.items())), {"seed": ""})
    assert digest_of() == elsewhere == backwards
    others = [digest_of(seed=1), digest_of(data=data | {"batch_size": 4}), digest_of("data.root")]
    others.append(digest_of("data.root", data=data | {"root": "z"}))
    assert len({digest_of(), *others}) == 5


def test_records_are_saved_and_read_in_order(tmp_path: Path) -> None:
    more: dict[str, Any] = {"status": "not run", "metrics": {}, "changes": ["seed=1 (0)"]}
    records = [make_record(number, {"note": "日本 'x'"}, **more) for number in (9, 10)]
    for record in reversed(records):
        record.save(tmp_path)
    assert read_records(tmp_path) == records
    assert not list(tmp_path.rglob("*.tmp"))
    (tmp_path / ".sweep" / "jobs" / "9.json").write_text('{"number": 0, ')
    with pytest.raises(UserError, match="cannot be read"):
        read_records(tmp_path)


def test_outcome_is_that_of_the_folder(tmp_path: Path) -> None:
    job = make_record(0, {})
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
