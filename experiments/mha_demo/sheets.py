"""Spreadsheets with live formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from experiments.mha_demo.cases import CASES, Case
from experiments.nn.attention_steps import AttentionSteps
from runner.spreadsheet import Sheet, column_name


def step_sheet(case: Case, q: Tensor, steps: AttentionSteps) -> Sheet:
    """Return a case's numbers, and beside those of the first head the formulas that compute them again."""
    layout = _Columns(q.shape[-1], len(case.source), case.keys_from)

    # a row per head and query
    rows: list[list[Any]] = []
    for head in range(len(q)):
        for t, token in enumerate(case.queries):
            stored = [q[head, t], *(step[head, t] for step in steps)]
            # spreadsheets have no infinity
            numbers = [x if x > -torch.inf else "−∞" for tensor in stored for x in tensor.tolist()]
            live = layout.formulas(len(rows) + 3) if head == 0 else []
            rows.append([head + 1, token, *numbers, *live])

    notes = [f"{case.name}: {case.title}. A row is a query of a head."]
    if case is CASES[-1]:
        notes += [
            "Blue cells are formulas: head 1's five steps again, from q, keys and values.",
            "The last column says how far their weights and outputs are from the stored ones.",
        ]
    return Sheet(layout.header(case.source), rows, 2, "0.0000", {layout.last: "0.0E+00"}, notes)


def source_sheets(case: Case, k: Tensor, v: Tensor) -> dict[str, Sheet]:
    """Return keys and values (H, S, Dh) of a case; a value's component is a row, as the weights are."""
    tokens, heads = case.source, range(len(k))
    keys = [[h + 1, token, *k[h, s].tolist()] for h in heads for s, token in enumerate(tokens)]
    values = [[h + 1, c + 1, *v[h, :, c].tolist()] for h in heads for c in range(v.shape[-1])]
    components = [str(c + 1) for c in range(k.shape[-1])]
    return {
        f"{case.keys_from} keys": Sheet([["head", "token", *components]], keys, 2, "0.0000"),
        f"{case.keys_from} values": Sheet([["head", "component", *tokens]], values, 2, "0.0000"),
    }


class _Columns:
    """Columns of a sheet of steps: head, query, q, the five steps, and the formulas."""

    def __init__(self, components: int, keys: int, source: str):
        self.Dh, self.S, self.source = components, keys, source
        steps = {"scores": keys, "scaled": keys, "masked": keys, "weights": keys, "output": components}
        again = {"=scores": keys, "=scaled": keys, "=exp": keys, "=weights": keys, "=output": components}
        self.blocks = {"q": components} | steps | again  # widths by name
        self.start, column = {}, 2
        for name, width in self.blocks.items():
            self.start[name] = column
            column += width
        self.last = column  # of the deviation

    def header(self, tokens: tuple[str, ...]) -> list[list[str]]:
        """Return two rows: the block above its first column, then tokens or components."""
        above, below = ["", ""], ["head", "query"]
        for name, width in self.blocks.items():
            title = f"{name[1:]} again" if name[1:] in self.blocks else name.removeprefix("=")
            above += [title, *[""] * (width - 1)]
            by_component = name in ("q", "output", "=output")
            below += [str(c + 1) for c in range(width)] if by_component else tokens
        return [[*above, "deviation"], [*below, "of both"]]

    def _cell(self, block: str, number: int, row: int) -> str:
        """Return the reference of a block's cell in a row, such as G3."""
        return f"{column_name(self.start[block] + number)}{row}"

    def _range(self, block: str, row: int) -> str:
        """Return the reference of all of a block's cells in a row, such as $G3:$M3."""
        first, last = self.start[block], self.start[block] + self.blocks[block] - 1
        return f"${column_name(first)}{row}:${column_name(last)}{row}"

    def formulas(self, row: int) -> list[str]:
        """Return the five steps of the first head's query in `row`, from q, the keys and the values."""
        # the sheets that the formulas read
        last_key, last_value = column_name(1 + self.Dh), column_name(1 + self.S)
        keys = [f"'{self.source} keys'!$C{j + 2}:${last_key}{j + 2}" for j in range(self.S)]
        values = [f"'{self.source} values'!$C{c + 2}:${last_value}{c + 2}" for c in range(self.Dh)]
        query, exps, weights = (self._range(name, row) for name in ("q", "=exp", "=weights"))

        # scores, scaled, exp, weights, output
        cells = [f"=SUMPRODUCT({query},{key})" for key in keys]
        cells += [f"={self._cell('=scores', j, row)}/SQRT(COLUMNS({query}))" for j in range(self.S)]
        for j in range(self.S):
            masked, scaled = self._cell("masked", j, row), self._cell("=scaled", j, row)
            cells.append(f"=IF(ISNUMBER({masked}),EXP({scaled}),0)")
        cells += [f"={self._cell('=exp', j, row)}/SUM({exps})" for j in range(self.S)]
        cells += [f"=SUMPRODUCT({weights},{value})" for value in values]

        # deviation from the stored numbers
        pairs = [(self._range(name, row), self._range(f"={name}", row)) for name in ("weights", "output")]
        return [*cells, "=SQRT(" + "+".join(f"SUMXMY2({one},{other})" for one, other in pairs) + ")"]
