"""Spreadsheets, opened by the library that others use; those of experiments are computed by LibreOffice."""

from __future__ import annotations

import io

import pytest
from openpyxl import load_workbook
from openpyxl.workbook import Workbook

from runner.spreadsheet import _ABOUT_FORMULAS, Sheet, column_name, workbook

VALUES = Sheet(
    header=[["position", "frequency", "sine"], ["unit", "rad", "很长的一个标题"]],
    rows=[[p, 0.1 * p, f"=SIN(B{p + 3})"] for p in range(4)] + [["none", None, True]],
    formats={1: "0.00E+00"},
    notes=["= 1 + 1 would be a formula", "θ is an angle"],
)


def opened(sheets: dict[str, Sheet]) -> Workbook:
    return load_workbook(io.BytesIO(workbook(sheets)))


def test_cells_are_what_was_given_and_formulas_told_apart_from_text() -> None:
    book = opened({"values": VALUES})
    page = book["values"]
    for found, given in zip(page.values, [*VALUES.header, *VALUES.rows], strict=True):
        assert list(found) == [pytest.approx(v, rel=1e-15) if isinstance(v, float) else v for v in given]
    assert [cell.data_type for cell in page["C"]] == ["s", "s", "f", "f", "f", "f", "b"]
    notes = [*VALUES.notes, _ABOUT_FORMULAS]
    assert [(cell.data_type, cell.value) for cell in book["notes"]["A"]] == [("s", note) for note in notes]
    assert opened({"a": Sheet([["x"]], [[1]]), "b": Sheet([["y"]], [[2]])}).sheetnames == ["a", "b"], (
        "no notes"
    )


def test_header_stays_in_sight_and_columns_fit_their_formatted_numbers() -> None:
    page = opened({"values": VALUES})["values"]
    assert page.freeze_panes == "B3"
    assert [bool(row[0].font.b) for row in page.iter_rows()] == [True, True] + [False] * 5
    assert [cell.number_format for cell in page[4]] == ["General", "0.00E+00", "0.000000"]
    widths = {name: column.width for name, column in page.column_dimensions.items()}
    assert widths["A"] >= len("position") and widths["B"] >= len("-0.00E+00")
    assert widths["C"] >= 2 * len("很长的一个标题")
    large = opened({"v": Sheet([["n"], [62_831.853072]], [[0.5]])})["v"]
    assert large.column_dimensions["A"].width >= 1.1 * len("62831.853072")


def test_columns_have_the_names_that_formulas_call_them_by() -> None:
    names = [column_name(index) for index in (0, 1, 25, 26, 51, 52, 701, 702)]
    assert names == ["A", "B", "Z", "AA", "AZ", "BA", "ZZ", "AAA"]
