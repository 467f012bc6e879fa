"""Spreadsheets with live formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from experiments.mha_demo.cases import CASES, Case
from experiments.nn.attention_steps import AttentionSteps
from runner.spreadsheet import Sheet, column_name


def step_sheet(case: Case, q: Tensor, steps: AttentionSteps) -> Sheet:
    """A case's numbers as they are, and beside those of the first head the formulas that give them again."""
    layout = Columns(q.shape[-1], len(case.source), case.keys_from)
    rows: list[list[Any]] = []
    for head in range(len(q)):
        for t, token in enumerate(case.queries):
            stored = [q[head, t], *(step[head, t] for step in steps)]
            numbers = [number_or_text(x) for tensor in stored for x in tensor.tolist()]
            live = layout.formulas(len(rows) + 3) if head == 0 else []
            rows.append([head + 1, token, *numbers, *live])
    notes = [f"{case.name}: {case.title}. A row is a query of a head."]
    if case is CASES[-1]:
        notes += ["Blue cells are formulas: head 1's five steps again, from q, keys and values."]
        notes += ["The last column says how far their weights and outputs are from the stored ones."]
    return Sheet(layout.header(case.source), rows, 2, "0.0000", {layout.last: "0.0E+00"}, notes)


def source_sheets(case: Case, k: Tensor, v: Tensor) -> dict[str, Sheet]:
    """Keys and values (H, S, Dh) that a case looks at; a value's component is a row, as the weights are."""
    tokens, heads = case.source, range(len(k))
    keys = [[h + 1, token, *k[h, s].tolist()] for h in heads for s, token in enumerate(tokens)]
    values = [[h + 1, c + 1, *v[h, :, c].tolist()] for h in heads for c in range(v.shape[-1])]
    components = [str(c + 1) for c in range(k.shape[-1])]
    return {
        f"{case.keys_from} keys": Sheet([["head", "token", *components]], keys, 2, "0.0000"),
        f"{case.keys_from} values": Sheet([["head", "component", *tokens]], values, 2, "0.0000"),
    }


def number_or_text(x: float) -> float | str:
    """A cell: spreadsheets know no infinity."""
    return x if x > -torch.inf else "−∞"


class Columns:
    """Where a sheet of steps has its columns: head, query, q, the five steps, and the formulas."""

    def __init__(self, components: int, keys: int, source: str):
        self.Dh, self.S, self.source = components, keys, source
        steps = {"scores": keys, "scaled": keys, "masked": keys, "weights": keys, "output": components}
        again = {"=scores": keys, "=scaled": keys, "=exp": keys, "=weights": keys, "=output": components}
        blocks = {"q": components} | steps | again  # the width of each
        self.blocks, self.start, place = blocks, {}, 2
        for name, width in blocks.items():
            self.start[name] = place
            place += width
        self.last = place  # the column of the deviation

    def header(self, tokens: tuple[str, ...]) -> list[list[str]]:
        """Two rows: the block above its first column, then tokens or components."""
        above, below = ["", ""], ["head", "query"]
        for name, width in self.blocks.items():
            title = f"{name[1:]} again" if name[1:] in self.blocks else name.removeprefix("=")
            above += [title, *[""] * (width - 1)]
            by_component = name in ("q", "output", "=output")
            below += [str(c + 1) for c in range(width)] if by_component else tokens
        return [[*above, "deviation"], [*below, "of both"]]

    def cell(self, block: str, number: int, row: int) -> str:
        """Where a number of a block stands, such as G3."""
        return f"{column_name(self.start[block] + number)}{row}"

    def line(self, block: str, row: int) -> str:
        """A block's cells in a row, such as $G3:$M3."""
        first, last = self.start[block], self.start[block] + self.blocks[block] - 1
        return f"${column_name(first)}{row}:${column_name(last)}{row}"

    def formulas(self, row: int) -> list[str]:
        """The five steps of the first head's query in `row`, from q, the keys and the values."""
        keys = [f"'{self.source} keys'!$C{j + 2}:${column_name(1 + self.Dh)}{j + 2}" for j in range(self.S)]
        values = [
            f"'{self.source} values'!$C{c + 2}:${column_name(1 + self.S)}{c + 2}" for c in range(self.Dh)
        ]
        query, exps, weights = (self.line(name, row) for name in ("q", "=exp", "=weights"))
        found = [f"=SUMPRODUCT({query},{key})" for key in keys]
        found += [f"={self.cell('=scores', j, row)}/SQRT(COLUMNS({query}))" for j in range(self.S)]
        found += [
            f"=IF(ISNUMBER({self.cell('masked', j, row)}),EXP({self.cell('=scaled', j, row)}),0)"
            for j in range(self.S)
        ]
        found += [f"={self.cell('=exp', j, row)}/SUM({exps})" for j in range(self.S)]
        found += [f"=SUMPRODUCT({weights},{value})" for value in values]
        pairs = [(self.line(name, row), self.line(f"={name}", row)) for name in ("weights", "output")]
        return [*found, "=SQRT(" + "+".join(f"SUMXMY2({one},{other})" for one, other in pairs) + ")"]
