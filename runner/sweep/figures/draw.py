"""A sweep's pictures: how its values lead to the objective, which values go well together, every run's curve.

A line, cell or point is one setting, the mean over its seeds. What is best is vermilion in all of them. A value that
is far worse than most (a run that diverged) stands at the end of its axis, marked ≤ or ≥, else the others would all
look alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from runner import figures
from runner.sweep.figures.curves import curves
from runner.sweep.figures.scales import varied_keys
from runner.sweep.figures.settings import heat_map, parallel_coordinates, values
from runner.sweep.leaderboard import aim, fold
from runner.sweep.record import Record


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw what there is to see in `folder/figures`; the files that were written.

    Where the runs have several objectives, each gets its own pictures.
    """
    aims = list(dict.fromkeys(aim(record) for record in records))
    written = []
    for name in ("heat_map", "values"):  # of fewer keys than there are by now
        (folder / "figures" / f"{name}.png").unlink(missing_ok=True)
    for objective, direction in aims:
        same = [record for record in records if aim(record) == (objective, direction)]
        suffix = "" if len(aims) == 1 else f"_{(objective or 'none').replace('/', '-')}"
        for name, figure in pictures(same, folder).items():
            path = folder / "figures" / f"{name}{suffix}.png"
            path.parent.mkdir(exist_ok=True)
            figures.save(figure, path)
            written.append(path)
    return written


def pictures(records: Sequence[Record], folder: Path) -> dict[str, Figure]:
    """The pictures of runs that have one objective, by name."""
    rows = fold(records)
    found = {"curves": curves(rows, folder)}
    keys = varied_keys(rows)
    if keys and any(row.values for row in rows):
        found["parallel_coordinates"] = parallel_coordinates(rows)
        found["heat_map"] = heat_map(rows)
        if found["heat_map"] is None:
            found["values"] = values(rows)
    return {name: figure for name, figure in found.items() if figure is not None}
