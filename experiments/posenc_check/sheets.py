"""Spreadsheets with live formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from experiments.nn.positions import AbsPosEncoding, RotaryPosEncoding, inverse_frequencies
from experiments.posenc_check import claims
from experiments.posenc_check.setups import BASE
from runner.spreadsheet import Sheet, column_name
from runner.task import Run


def write_spreadsheets(run: Run, length: int, d_model: int, formula_rows: int) -> None:
    """Write a random matrix (length, d_model) through each encoding, the first `formula_rows` with formulas."""
    x = torch.randn(length, d_model, dtype=torch.float64, generator=run.generator("matrix"))
    theta = inverse_frequencies(d_model, BASE)

    # absolute
    absolute = AbsPosEncoding(d_model, max_len=length)
    table = _table_sheets(absolute.table(length), theta.repeat_interleave(2), ("SIN", "COS"), formula_rows)
    added = {"x": _matrix_sheet(x), "x + encoding": _matrix_sheet(absolute(x[None])[0])}
    run.spreadsheet("abs_pos_encoding", table | added)

    # cosines and sines
    rotary = RotaryPosEncoding(d_model, BASE, max_len=length)
    cos, sin = rotary.tables(length)
    run.spreadsheet("cos_pos_encoding", _table_sheets(cos, theta, ("COS",), formula_rows))
    run.spreadsheet("sin_pos_encoding", _table_sheets(sin, theta, ("SIN",), formula_rows))

    # rotary
    rotated = claims.turn(rotary, x, torch.arange(length))
    sheets = {
        "rotation": _rotation_sheet(x[:formula_rows], rotated[:formula_rows], cos, sin),
        "x": _matrix_sheet(x),
        "x rotated": _matrix_sheet(rotated),
    }
    run.spreadsheet("rotary_example", sheets)


def _table_sheets(values: Tensor, theta: Tensor, functions: Sequence[str], rows: int) -> dict[str, Sheet]:
    """Return a table (L, n) of functions of p θ_c, θ (n,), and a sheet that recomputes its first `rows`."""
    # the function and the pair of each column
    n, D = values.shape[1], 2 * values.shape[1] // len(functions)
    names = [functions[c % len(functions)] for c in range(n)]
    pairs = [c // len(functions) for c in range(n)]

    # the whole table
    table = Sheet(
        header=[
            *([["dimension", *range(n)]] if len(functions) == 2 else []),
            ["pair i", *pairs],
            ["θ_i", *theta.tolist()],
            ["wavelength 2π/θ_i", *(2 * math.pi / theta).tolist()],
            ["position", *(name.lower() for name in names)],
        ],
        rows=[[p, *row] for p, row in enumerate(values.tolist())],
        notes=[
            f"table: a row per position; each number is the sine or cosine of position · θ_i. D = {D}.",
            "θ_i = 10000^(−2i/D) are the radians per position; a pair has turned once after 2π/θ_i positions.",
            "recompute: the first positions, with a formula beside each stored number; column B sums what is between.",
        ],
    )

    return {"table": table, "recompute": _recompute_sheet(table, names, rows, D)}


def _recompute_sheet(table: Sheet, names: Sequence[str], num_rows: int, D: int) -> Sheet:
    """Return two columns per column of a table: the stored numbers, and formulas from θ_i in the header."""
    # header: an empty cell after each, and formulas in the place of θ_i and the wavelength
    columns = [(column_name(2 * c + 2), column_name(2 * c + 3)) for c in range(len(names))]  # stored, formula
    header = [[label, *(x for cell in cells for x in (None, cell)), None] for label, *cells in table.header]
    pair, theta = len(header) - 3, len(header) - 2  # their lines
    header[-3][2::2] = [f"={BASE:.0f}^(-2*{stored}{pair}/{D})" for stored, _ in columns]
    header[-2][2::2] = [f"=2*PI()/{stored}{theta}" for stored, _ in columns]
    headings = [f"{name.lower()}{end}" for name in names for end in ("", ", formula")]
    header[-1] = ["position", "Σ |stored − formula|", *headings]

    # a row per position
    body = []
    for p, *row in table.rows[:num_rows]:
        line = len(header) + 1 + p
        cells: list[Any] = [p, "=" + "+".join(f"ABS({a}{line}-{b}{line})" for a, b in columns)]
        for value, name, (stored, _) in zip(row, names, columns, strict=True):
            cells += [value, f"={name}($A{line}*{stored}${theta})"]
        body.append(cells)
    return Sheet(header, body, frozen_columns=2, formats={1: "0.0E+00"})


def _rotation_sheet(x: Tensor, rotated: Tensor, cos: Tensor, sin: Tensor) -> Sheet:
    """Return each pair of x (P, D) and of its rotation (P, D), a row per position and pair, with formulas."""
    # header
    twice = [name for name in ("cos", "sin", "rotated 2i", "rotated 2i+1") for _ in range(2)]
    header: list[list[Any]] = [
        ["position", "pair i", "θ_i", "angle", "x_2i", "x_2i+1", *twice, "largest difference"],
        [None, None, "formula", "formula", "stored", "stored", *("stored", "formula") * 4, None],
    ]

    # a row per position and pair
    P, D = x.shape
    body: list[list[Any]] = []
    for p, i in product(range(P), range(D // 2)):
        a, b, line = 2 * i, 2 * i + 1, len(header) + len(body) + 1
        differences = (f"ABS({stored}{line}-{formula}{line})" for stored, formula in ("GH", "IJ", "KL", "MN"))
        body.append(
            [
                *(p, i, f"={BASE:.0f}^(-2*B{line}/{D})", f"=A{line}*C{line}"),
                *(float(x[p, a]), float(x[p, b])),
                *(float(cos[p, i]), f"=COS(D{line})", float(sin[p, i]), f"=SIN(D{line})"),
                *(float(rotated[p, a]), f"=E{line}*G{line}-F{line}*I{line}"),
                *(float(rotated[p, b]), f"=F{line}*G{line}+E{line}*I{line}"),
                f"=MAX({','.join(differences)})",
            ]
        )

    notes = [
        "rotation: a line per position p and pair i of x; the pair (x_2i, x_2i+1) is turned by the angle p θ_i:",
        "    rotated 2i = x_2i cos − x_2i+1 sin        rotated 2i+1 = x_2i+1 cos + x_2i sin",
        "x and x rotated: the whole matrix before and after, a line per position.",
    ]
    return Sheet(header, body, frozen_columns=2, formats={14: "0.0E+00"}, notes=notes)


def _matrix_sheet(values: Tensor) -> Sheet:
    return Sheet([["position", *range(values.shape[1])]], [[p, *x] for p, x in enumerate(values.tolist())])
