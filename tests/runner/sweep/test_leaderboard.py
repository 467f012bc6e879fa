"""The leaderboard: seeds folded, ranked by direction, failures beside it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from runner.sweep.leaderboard import fold, leaderboard_text, write_leaderboard
from runner.sweep.record import Record
from tests.runner.sweep.helpers import make_record, table

LOSSES = {"objective": "loss/val", "direction": "minimize"}


def grid() -> list[Record]:
    """Return two learning rates with three seeds each."""
    jobs = zip(itertools.product(("0.1", "0.5"), "012"), (0.5, 0.75, 0.625, 0.875, 0.5, 0.9375), strict=True)
    return [
        make_record(n, {"optimizer.lr": lr, "seed": seed}, value)
        for n, ((lr, seed), value) in enumerate(jobs)
    ]


def test_seeds_fold_into_mean_and_sample_deviation(tmp_path: Path) -> None:
    records = grid()
    write_leaderboard(records, tmp_path)
    first, second = table(tmp_path / "leaderboard.csv")
    assert (first["optimizer.lr"], second["optimizer.lr"]) == ("0.5", "0.1")
    for row, of in ((first, records[3:]), (second, records[:3])):
        values = np.array([record.value for record in of])
        mean, std, seconds = values.mean(), values.std(ddof=1), np.mean([record.seconds for record in of])
        names = ("accuracy/val", "accuracy/val std", "accuracy/test", "loss/test std", "seconds")
        numbers = [float(row[name]) for name in names]
        assert numbers == pytest.approx([mean, std, mean - 0.01, std, seconds], rel=1e-14)
        assert (row["runs"], row["status"]) == ("3", "done")
    assert (first["jobs"], second["jobs"]) == ("3 4 5", "0 1 2")
    assert list(first) == [
        *("optimizer.lr", "runs", "accuracy/val", "accuracy/val std", "loss/test", "loss/test std"),
        *("accuracy/test", "accuracy/test std", "seconds", "status", "jobs"),
    ]


def test_failed_seed_is_left_out_and_counted() -> None:
    records = grid()
    records[3].status, records[3].error = "failed", "RuntimeError: out of memory"
    records[4].status = "pruned"
    [first, second] = fold(records)
    assert (first.settings["optimizer.lr"], first.values) == ("0.5", [0.9375])
    assert (first.runs, first.status, first.seconds()) == ("1 of 3", "1 failed, 1 pruned", [15.0])
    assert (second.runs, second.status) == ("3", "done")
    records[5].value = None  # done, but its objective was never a finite number
    assert [row.settings["optimizer.lr"] for row in fold(records)] == ["0.1", "0.5"]
    records[1].value = None
    assert fold(records)[0].status == "1 without a value"


def test_a_seed_that_an_earlier_version_ran_folds_with_others() -> None:
    """Whose configs have keys that its own did not store."""
    records = grid()
    for record in records[1:]:
        record.config |= {"init": None, "figures": True, "freeze": None}
    assert [row.runs for row in fold(records)] == ["3", "3"]
    records[1].config["freeze"] = "encoder.*"
    assert sorted(row.runs for row in fold(records)) == ["1", "2", "3"]


@pytest.mark.parametrize(("direction", "order"), [("maximize", [2, 0, 1]), ("minimize", [1, 0, 2])])
def test_ranking_follows_direction(direction: str, order: list[int]) -> None:
    values = [(v, "done") for v in (0.5, 0.25, 0.75)] + [(0.9, "failed"), (None, "done"), (0.1, "running")]
    records = [
        make_record(number, {"model.size": str(number)}, value, status, direction=direction)
        for number, (value, status) in enumerate(values)
    ]
    assert [row.records[0].number for row in fold(records)] == [*order, 3, 4, 5]


def test_objectives_stand_apart(tmp_path: Path) -> None:
    records = [
        make_record(0, {"experiment": "a", "seed": "0"}, 0.5),
        make_record(1, {"experiment": "a", "seed": "1"}, 0.25),
        make_record(2, {"experiment": "b", "lr": "2"}, 3.0, **LOSSES),
        make_record(3, {"experiment": "b", "lr": "3"}, 2.0, **LOSSES),
        make_record(4, {"experiment": "c"}, objective=None),
    ]
    write_leaderboard(records, tmp_path)
    rows = [(row["objective"], row["value"], row["jobs"]) for row in table(tmp_path / "leaderboard.csv")]
    assert rows[0] == ("accuracy/val", "0.375", "0 1")
    assert rows[1:] == [("loss/val", "2.0", "3"), ("loss/val", "3.0", "2"), ("", "", "4")]
    assert [row["value"] for row in table(tmp_path / "runs.csv")] == ["0.5", "0.25", "3.0", "2.0", ""]
    head = (tmp_path / "leaderboard.md").read_text(encoding="utf-8").splitlines()[0]
    assert "highest accuracy/val" in head and "lowest loss/val" in head and tmp_path.name in head


def test_settings_differ_by_more_than_the_seed() -> None:
    records = [make_record(n, {"seed": str(n)}, 0.5 + n / 8) for n in range(3)]
    for run in records:
        run.config["data"] = {"split_seed": run.config["seed"]}
    [row] = fold(records)
    assert row.settings == {} and row.jobs == "0 1 2"
    assert "0.6250 ± 0.1250" in leaderboard_text(records)
    records[1].value = records[0].value
    records[1].config["data"]["batch_size"] = 64  # such as a YAML file edited between two calls
    assert [row.jobs for row in fold(records)] == ["0 2", "1"]
    swept = [make_record(n, {"data.seed": str(n // 2), "seed": str(n % 2)}, 0.5) for n in range(4)]
    assert [row.jobs for row in fold(swept)] == ["0 1", "2 3"]


def test_key_added_later_has_its_default_in_older_jobs(tmp_path: Path) -> None:
    older, newer = make_record(0, {}, 0.5), make_record(1, {"model.size": "8"}, math.pi / 4)
    older.config["model"] = {"size": 4}
    write_leaderboard([older, newer], tmp_path)
    best, other = table(tmp_path / "leaderboard.csv")
    assert (best["model.size"], other["model.size"]) == ("8", "4")
    assert float(best["accuracy/val"]) == math.pi / 4 and best["accuracy/val std"] == ""  # every digit


def test_runs_table_has_every_run(tmp_path: Path) -> None:
    records = grid()
    records[2] = make_record(2, records[2].swept, None, "failed", error='ValueError: "a,b"\nis wrong')
    write_leaderboard(records[::-1], tmp_path)
    rows = table(tmp_path / "runs.csv")
    assert [int(row["job"]) for row in rows] == list(range(6))
    assert rows[2]["error"] == 'ValueError: "a,b"' and rows[2]["status"] == "failed"
    for run, row in zip(records, rows, strict=True):
        value = "" if run.value is None else repr(run.value)
        assert row.items() >= (run.swept | {"folder": run.name, "accuracy/val": value}).items()
    text = (tmp_path / "leaderboard.md").read_text(encoding="utf-8")
    assert '`2_lr-0.1_seed-2`: ValueError: "a,b"\n' in text and "is wrong" not in text


def test_markdown_cells(tmp_path: Path) -> None:
    swept = ["|x|", "[1,2,3]", "a b"]
    write_leaderboard([make_record(n, {"note": text}, 0.5) for n, text in enumerate(swept)], tmp_path)
    text = (tmp_path / "leaderboard.md").read_text(encoding="utf-8").replace(r"\|", "")
    counts = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert len(counts) == 5 and len(set(counts)) == 1


def test_screen_is_limited_and_omits_empty_columns() -> None:
    records = [make_record(n, {"lr": f"{n / 7:.12f}"}, n / 1000) for n in range(1000)]
    for run in records[:30]:
        run.status, run.error = "failed", "Oops\nand more"
    lines = leaderboard_text(records, limit=20).splitlines()
    assert lines[2].split()[:2] == ["142.7", "0.9990"]
    assert lines[22] == "… and 980 more in leaderboard.csv"
    assert lines[23:26] == ["", "failed:", f"  {records[0].name}: Oops"]
    assert lines[-1] == "  … and 20 more in runs.csv" and len(lines) == 36
    assert max(map(len, lines)) < 80

    lone = [make_record(n, {"lr": str(n)}, 0.5, objective=None, metrics={}) for n in range(2)]
    assert leaderboard_text(lone).split()[:4] == ["lr", "seconds", "status", "jobs"]
    assert "±" not in leaderboard_text([make_record(0, {"lr": "1"}, 0.5)])
    lone[1].swept = {"lr": "x" * 300}
    assert max(map(len, leaderboard_text(lone).splitlines())) < 80


def test_a_sweep_of_which_nothing_ran_has_its_tables_too(tmp_path: Path) -> None:
    write_leaderboard([], tmp_path)
    assert table(tmp_path / "leaderboard.csv") == [] and leaderboard_text([])
    waiting = [make_record(n, {"lr": str(n)}, None, "not run") for n in range(2)]
    write_leaderboard(waiting, tmp_path)
    assert [row["status"] for row in table(tmp_path / "leaderboard.csv")] == ["not run"] * 2
