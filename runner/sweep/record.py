"""One job of a sweep on disk: what was saved before it ran, and its outcome.

`SWEEP/.sweep/jobs/N.json` holds the resolved config, from which the job is built whatever the YAML files say
by then. `SWEEP/NAME/summary.json` holds the outcome. There is no third place.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.config.command import PATHS
from runner.errors import UserError
from runner.files import atomic_path, read_json

STATE_FOLDER = ".sweep"  # below a sweep's folder
ENDED = ("done", "pruned")  # statuses of jobs that are not run again
_NAME_LENGTH = 60  # of a job's folder, which is its legend in TensorBoard
_OUTCOME = ("status", "error", "value", "metrics", "seconds")  # fields that are read from the job's folder

RankedBy = tuple[str | None, str]  # objective, direction


@dataclass
class Record:
    """One job of a sweep: number, folder's name, swept values (override text by key), config, and outcome.

    `status` is one of: not run, running, done, failed, pruned, interrupted. `value` is the best value of the
    objective, None where there is none or it is not finite; `metrics` is that of `summary.json`.
    """

    number: int
    name: str
    swept: dict[str, str]
    config: dict[str, Any]
    digest: str
    objective: str | None
    direction: str
    overrides: list[str] = field(default_factory=list)  # the command line that makes this job alone
    changes: list[str] = field(default_factory=list)  # what differs from the experiment's defaults
    choices: dict[str, Any] = field(default_factory=dict)  # the chosen options, by group
    status: str = "not run"
    error: str | None = None
    value: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None

    @property
    def experiment(self) -> str:
        return str(self.config["name"])

    @property
    def ranked_by(self) -> RankedBy:
        """Objective and direction; only records that agree in both can be compared."""
        return self.objective, self.direction

    def folder(self, sweep: Path) -> Path:
        return sweep / self.name

    def test_metrics(self) -> dict[str, float]:
        """Return the metrics on the test set, none where the run has not measured them."""
        return self.metrics.get("test") or {}

    def save(self, sweep: Path) -> None:
        """Write what does not change any more."""
        saved = {name: value for name, value in vars(self).items() if name not in _OUTCOME}
        with atomic_path(saved_file(sweep, self.number), sync=False) as temporary:
            temporary.write_text(json.dumps(saved, ensure_ascii=False), encoding="utf-8")

    def refresh(self, sweep: Path) -> None:
        """Read the job's outcome so far."""
        folder = self.folder(sweep)
        summary = read_json(folder / "summary.json")
        if summary is None:
            self.status, self.error = "interrupted" if folder.exists() else "not run", None
            return

        self.status, self.error = str(summary["status"]), summary.get("error")
        self.metrics, self.seconds = summary.get("metrics") or {}, summary.get("seconds")
        best = (summary.get("best") or {}).get("value")
        self.value = best if best is not None and math.isfinite(best) else None


def require_own_folders(records: Sequence[Record]) -> None:
    """Raise UserError where two jobs would share a folder, or one would lie in another's."""
    numbers = {Path(record.name): record.number for record in records}
    for record in records:
        path = Path(record.name)
        holders = (numbers.get(place, record.number) for place in (path, *path.parents))
        other = next((number for number in holders if number != record.number), None)
        if other is not None:
            raise UserError(
                f"hydra.sweep.subdir: jobs {record.number} and {other} would share {record.name}: "
                "begin it with ${hydra.job.num}."
            )


def saved_file(sweep: Path, number: int) -> Path:
    """Return where the job is saved."""
    return sweep / STATE_FOLDER / "jobs" / f"{number}.json"


def next_number(records: Sequence[Record]) -> int:
    return 1 + max((record.number for record in records), default=-1)


def read_record(sweep: Path, number: int) -> Record:
    """Read one job as it was saved, without its outcome."""
    return Record(**json.loads(saved_file(sweep, number).read_text(encoding="utf-8")))


def read_records(sweep: Path) -> list[Record]:
    """Read every job of a sweep's folder, by number, with its outcome."""
    numbers = sorted(int(path.stem) for path in (sweep / STATE_FOLDER / "jobs").glob("[0-9]*.json"))
    try:
        records = [read_record(sweep, number) for number in numbers]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{sweep / STATE_FOLDER} cannot be read: {error}") from None
    for record in records:
        record.refresh(sweep)
    return records


def digest(config: dict[str, Any], swept: Mapping[str, object]) -> str:
    """Hash a resolved config without its paths, unless a path is swept: equal for equal jobs."""
    added = {"figures": config.get("figures"), "init": None, "freeze": None}  # later than the first sweeps
    compared = {
        key: value
        for key, value in config.items()
        if (key not in PATHS or key in swept) and not (key in added and value == added[key])
    }
    for node, value in compared.items():
        if isinstance(value, dict) and "root" in value and f"{node}.root" not in swept:
            compared[node] = {key: item for key, item in value.items() if key != "root"}
    text = json.dumps(compared, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def job_name(number: int, swept: Mapping[str, str]) -> str:
    """Name a job's folder, which is also its legend in charts: `3_lr-0.1_seed-1`, safe in any shell."""
    short = short_keys(list(swept))
    safe = {key: re.sub(r"[^A-Za-z0-9_.+-]+", " ", short_value(value, 300)) for key, value in swept.items()}
    settings = [f"{short[key]}-{'-'.join(value.split())}".rstrip("-") for key, value in safe.items()]
    # whole settings, for half of 256 is another number
    prefixes = itertools.accumulate([str(number), *settings], "{}_{}".format)
    fitting = [name for name in prefixes if len(name) <= _NAME_LENGTH]
    return f"{number}_{settings[0]}"[:_NAME_LENGTH] if settings and len(fitting) == 1 else fitting[-1]


def short_value(text: str, width: int = 32) -> str:
    """Shorten a swept value: a long number to four digits, a long text to its ends, `width` columns in all."""
    if len(text) > 7 and re.fullmatch(r"-?\d+\.\d*(e[+-]?\d+)?", text):
        return f"{float(text):.4g}"
    columns = sum(2 if letter >= "\u2e80" else 1 for letter in text)  # Chinese and the like are twice as wide
    if columns <= width:
        return text
    end = (width - 2) * len(text) // (2 * columns)
    return f"{text[:end]}…{text[-end:]}"


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Map every dotted key to its shortest end that no other key has."""
    short = {}
    for key in keys:
        parts = key.lstrip("+").split(".")
        ends = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        others = [other.lstrip("+") for other in keys if other != key]
        short[key] = next((e for e in ends if not any(f".{o}".endswith(f".{e}") for o in others)), ends[-1])
    return short
