"""Tables as XLSX: numbers as they are and live formulas, so that a reader recomputes them in a spreadsheet program."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from openpyxl import Workbook
from openpyxl.cell import Cell, WriteOnlyCell
from openpyxl.styles import Alignment, Border, Font, PatternFill, Side
from openpyxl.utils import get_column_letter
from openpyxl.worksheet._write_only import WriteOnlyWorksheet

_HEADER_FILL = PatternFill("solid", fgColor="E6EEF5")
_HEADER_FONT, _FORMULA_FONT = Font(bold=True), Font(color="0072B2")
_RULE = Border(bottom=Side("thin", color="8A8A8A"))
_NARROWEST, _WIDEST = 6.0, 48.0  # of a column, in characters
_ABOUT_FORMULAS = "Blue cells are formulas: a spreadsheet program computes them when it opens the file."


@dataclass(frozen=True)
class Sheet:
    """One sheet of a workbook.

    `header` rows are bold and stay in sight, as do the first `frozen_columns` columns; the first of `rows` is
    row `len(header) + 1`. A text that starts with "=" is a formula, shown in blue; None is an empty cell.
    Numbers are shown by `number_format`, or by the `formats` of their column's index; whole ones as they are.
    `notes` are lines of text: those of all sheets make a last sheet of that name.
    """

    header: Sequence[Sequence[Any]]
    rows: Sequence[Sequence[Any]]
    frozen_columns: int = 1
    number_format: str = "0.000000"
    formats: dict[int, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


def column_name(index: int) -> str:
    """Return the letters of a column, A … Z, AA …, by its index; the first has index 0, as in `Sheet.formats`."""
    return str(get_column_letter(index + 1))


def workbook(sheets: dict[str, Sheet]) -> bytes:
    """Return the content of an XLSX file with the sheets by name."""
    # written row by row: three times as fast as a workbook that can be changed, and these are large
    book = Workbook(write_only=True)
    for name, sheet in sheets.items():
        _fill(book.create_sheet(name), sheet)

    # the notes of all sheets make a last one
    notes = [line for sheet in sheets.values() for line in sheet.notes]
    if any(_is_formula(cell) for sheet in sheets.values() for row in sheet.rows for cell in row):
        notes.append(_ABOUT_FORMULAS)
    if notes:
        page = book.create_sheet("notes")
        page.column_dimensions["A"].width = 110
        for line in notes:
            cell = WriteOnlyCell(page, line)
            cell.data_type = "s"  # text, also where it begins with "="
            cell.alignment = Alignment(wrap_text=True, vertical="top")
            page.append([cell])

    content = io.BytesIO()
    book.save(content)
    return content.getvalue()


def _fill(page: WriteOnlyWorksheet, sheet: Sheet) -> None:
    page.freeze_panes = f"{column_name(sheet.frozen_columns)}{len(sheet.header) + 1}"

    # a width per column that fits its header and its numbers
    lines = [*sheet.header, *sheet.rows[:200]]
    for column in range(max(map(len, lines), default=0)):
        shown = (_length(row[column], sheet, column) for row in lines if column < len(row))
        width = min(_WIDEST, 1.1 * max(_NARROWEST, *shown, 0) + 2)  # bold is wider
        page.column_dimensions[column_name(column)].width = width

    # cells
    for number, row in enumerate([*sheet.header, *sheet.rows], start=1):
        cells = [_cell(page, sheet, column, value) for column, value in enumerate(row)]
        for column, cell in enumerate(cells if number <= len(sheet.header) else []):
            cell.font, cell.fill = _HEADER_FONT, _HEADER_FILL
            cell.alignment = Alignment(horizontal="right" if column >= sheet.frozen_columns else "left")
            cell.border = _RULE if number == len(sheet.header) else Border()
        page.append(cells)


def _cell(page: WriteOnlyWorksheet, sheet: Sheet, column: int, value: Any) -> Cell:
    cell = WriteOnlyCell(page, value)
    if _is_formula(value):
        cell.font = _FORMULA_FONT
    if isinstance(value, float) or cell.data_type == "f":
        cell.number_format = sheet.formats.get(column, sheet.number_format)
    return cell


def _is_formula(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("=")


def _length(value: Any, sheet: Sheet, column: int) -> float:
    """Return how many characters a cell shows; a formula is as wide as its result."""
    number_format = sheet.formats.get(column, sheet.number_format)
    shown = len(number_format) + 1  # the sign; one digit before the point is in the format
    if _is_formula(value):
        return shown
    if isinstance(value, float):
        return shown if "E" in number_format else shown + len(f"{abs(value):.0f}") - 1
    text = "" if value is None else str(value)
    return sum(2 if ord(letter) > 0x2E7F else 1 for letter in text)  # a Chinese character is as wide as two
