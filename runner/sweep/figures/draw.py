"""Figures of a sweep: how its values lead to the objective, which values go well together, every run's curve.

A line, cell or point is one setting, the mean over its seeds. The best is vermilion in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runner import figures
from runner.sweep.figures.curves import curves
from runner.sweep.figures.scales import varied_keys
from runner.sweep.figures.settings import heat_map, parallel_coordinates, value_panels
from runner.sweep.leaderboard import fold
from runner.sweep.record import Record


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw the sweep into `folder/figures`, each objective apart; return the files that were written."""
    for name in ("heat_map", "values"):  # of fewer keys than there are by now
        (folder / "figures" / f"{name}.png").unlink(missing_ok=True)

    written = []
    objectives = list(dict.fromkeys(record.ranked_by for record in records))
    for objective in objectives:
        comparable = [record for record in records if record.ranked_by == objective]
        suffix = "" if len(objectives) == 1 else f"_{(objective[0] or 'none').replace('/', '-')}"

        # the figures of these runs, None where there is nothing to draw
        rows = fold(comparable)
        drawn = {"curves": curves(rows, folder)}
        if varied_keys(rows) and any(row.values for row in rows):
            drawn["parallel_coordinates"] = parallel_coordinates(rows)
            drawn["heat_map"] = heat_map(rows)
            drawn["values"] = None if drawn["heat_map"] else value_panels(rows)

        for name, figure in drawn.items():
            if figure is not None:
                path = folder / "figures" / f"{name}{suffix}.png"
                figures.save(figure, path)
                written.append(path)
    return written
