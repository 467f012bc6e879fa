"""One job of a sweep on disk: what was frozen before it ran, and what it came to.

`SWEEP/.sweep/jobs/N.json` holds what was frozen: the resolved config, from which the job is built whatever
the YAML files say by then. `SWEEP/NAME/summary.json` holds what it came to. There is no third place.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.config.command import PATHS
from runner.errors import UserError
from runner.files import atomic_path, read_json

FROZEN = ".sweep"  # below a sweep's folder
NAME_LENGTH = 60  # of a job's folder, which is its legend in TensorBoard
ENDED = ("done", "pruned")  # what is not run again


@dataclass
class Record:
    """One job of a sweep: number, folder's name, swept values (override text by key), config, and outcome.

    `status` is one of: not run, running, done, failed, pruned, interrupted. `value` is the best value of the
    objective, None where there is none or it is no finite number; `metrics` is that of `summary.json`.
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
    status: str = "not run"
    error: str | None = None
    value: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None

    @property
    def experiment(self) -> str:
        """The name of the experiment that the job runs."""
        return str(self.config["name"])

    def folder(self, sweep: Path) -> Path:
        """The job's folder."""
        return sweep / self.name

    def freeze(self, sweep: Path) -> None:
        """Write the part that does not change any more."""
        path = frozen_file(sweep, self.number)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {name: getattr(self, name) for name in FROZEN_FIELDS}
        # a sweep may have thousands of jobs: do not wait for the disk at each
        with atomic_path(path, sync=False) as temporary:
            temporary.write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")

    def look(self, sweep: Path) -> None:
        """Read what the job has come to by now."""
        folder = self.folder(sweep)
        summary = read_json(folder / "summary.json")
        if summary is None:
            self.status, self.error = "interrupted" if folder.exists() else "not run", None
            return
        self.status, self.error = str(summary["status"]), summary.get("error")
        self.metrics, self.seconds = summary.get("metrics") or {}, summary.get("seconds")
        best = (summary.get("best") or {}).get("value")
        self.value = best if best is not None and math.isfinite(best) else None


FROZEN_FIELDS = (
    "number",
    "name",
    "swept",
    "config",
    "digest",
    "objective",
    "direction",
    "overrides",
    "changes",
)


def frozen_file(sweep: Path, number: int) -> Path:
    """Where a job's frozen part lies."""
    return sweep / FROZEN / "jobs" / f"{number}.json"


def read_frozen(sweep: Path, number: int) -> Record:
    """One job as it was frozen."""
    return Record(**json.loads(frozen_file(sweep, number).read_text(encoding="utf-8")))


def read_records(sweep: Path) -> list[Record]:
    """Every job of a sweep's folder, by number, with what it has come to.

    Raises:
        UserError: a file of the sweep cannot be read.
    """
    numbers = sorted(int(path.stem) for path in (sweep / FROZEN / "jobs").glob("[0-9]*.json"))
    try:
        records = [read_frozen(sweep, number) for number in numbers]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{sweep / FROZEN} cannot be read: {error}") from None
    for record in records:
        record.look(sweep)
    return records


def digest(config: dict[str, Any], swept: dict[str, str]) -> str:
    """What a job is known by: its resolved config without the paths, unless a path is what is swept."""
    kept = {key: value for key, value in config.items() if key not in PATHS or key in swept}
    for node, value in kept.items():
        if isinstance(value, dict) and "root" in value and f"{node}.root" not in swept:
            kept[node] = {key: item for key, item in value.items() if key != "root"}
    text = json.dumps(kept, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def job_name(number: int, swept: dict[str, str]) -> str:
    """A folder's name that can be a chart's legend: `3_lr=0.1,seed=1`, without what file systems mind."""
    short = short_keys(list(swept))
    text = ",".join(f"{short[key]}={short_value(value)}" for key, value in swept.items())
    plain = re.sub(r"[^A-Za-z0-9_.,=+-]+", "-", text)
    name = f"{number}_{plain}"
    if len(name) > NAME_LENGTH:  # whole settings, for half of 256 is another number
        kept = name[: NAME_LENGTH + 1].rpartition(",")[0]
        name = kept or name[:NAME_LENGTH]
    return name.rstrip("_")


def short_value(text: str) -> str:
    """A number of many digits by four of them."""
    if re.fullmatch(r"-?\d+\.\d{5,}(e[+-]?\d+)?", text):
        return f"{float(text):.4g}"
    return text


def short_keys(keys: list[str]) -> dict[str, str]:
    """Every dotted key by its shortest end that no other has."""
    short = {}
    for key in keys:
        parts = key.lstrip("+").split(".")
        ends = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        others = [other.lstrip("+") for other in keys if other != key]
        short[key] = next((e for e in ends if not any(f".{o}".endswith(f".{e}") for o in others)), ends[-1])
    return short
