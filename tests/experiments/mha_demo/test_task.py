"""mha_demo: what it learns, and what it writes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from openpyxl import load_workbook
from openpyxl.worksheet.worksheet import Worksheet
from torch import Tensor

from experiments.mha_demo.cases import CASES
from runner.engine.job import Result
from tests.experiments.conftest import recomputed, table

CHECKS = {
    *("rows_sum_to_one", "masked_is_zero", "masked_never_leaks", "masked_row", "masked_row_finite"),
    *(f"{peer}_{what}" for peer in ("fused", "torch") for what in ("output", "weights", "gradients")),
    *("steps_make_the_layer", "permutation", "paths", "split_block_diagonal", "split_general"),
    *("raw_std", "scaled_std", "scaled_gradient", "raw_gradient"),
    *("one_head_ceiling", "heads_2_learnt", "heads_2_needed"),
}
QUESTIONS = {"position": "the value at a position", "symbol": "the value that a symbol marks"}
H, DH = 2, 4


def test_every_check_is_there_and_one_head_stays_below_its_ceiling(result: Result) -> None:
    assert {check.name for check in result.checks} == CHECKS
    test = result.metrics["test"]
    assert 0.4 < test["accuracy.heads_1"] <= 0.75 and test["accuracy.heads_2"] > 0.99
    assert {f"{m}.heads_2" for m in ("loss", "accuracy", "precision", "recall", "f1")} <= set(test)


def test_the_table_of_heads_is_the_summary_s_and_each_head_of_two_has_its_question(result: Result) -> None:
    rows = {(row["network"], row["without head"]): row for row in table(result.folder, "heads")}
    assert list(rows) == [(f"heads_{n}", h) for n, heads in ((1, "1"), (2, "12")) for h in ("none", *heads)]
    for network in ("heads_1", "heads_2"):
        measured = result.metrics["test"][f"accuracy.{network}"]
        assert float(rows[network, "none"]["both right"]) == pytest.approx(measured)

    # where a head looks, and what falls without it
    served = set()
    for head in "12":
        row = rows["heads_2", head]
        looks = {float(row[f"weight on the {name}'s slot"]): name for name in QUESTIONS}
        falls = {float(row[f"fall of {question}"]): name for name, question in QUESTIONS.items()}
        assert looks[max(looks)] == falls[max(falls)] and max(falls) > 0.3
        served.add(falls[max(falls)])
    assert served == set(QUESTIONS)


def test_scores_grow_as_predicted_and_the_division_takes_it_back(result: Result) -> None:
    rows = [{name: float(x) for name, x in row.items()} for row in table(result.folder, "scale")]
    assert [row["d_k"] for row in rows] == [16, 32, 64, 128, 256, 512, 1024]
    for row in rows:
        assert row["std of q·k, predicted"] == pytest.approx(math.sqrt(row["d_k"]))
        assert row["std of q·k"] == pytest.approx(math.sqrt(row["d_k"]), rel=0.08)
        assert row["std of q·k/√d_k"] == pytest.approx(1, rel=0.08)
        assert row["entropy of q·k/√d_k"] == pytest.approx(1.72, rel=0.08)
        for name in ("entropy", "largest", "gradient"):
            assert row[f"{name} of q·k"] == pytest.approx(row[f"{name} of q·k, predicted"], rel=0.4), row
    assert rows[-1]["gradient of q·k"] < 0.25 * rows[0]["gradient of q·k"]


# the spreadsheet


@pytest.fixture(scope="module")
def path(result: Result) -> Path:
    return result.folder / "tables" / "attention_steps.xlsx"


def block(sheet: Worksheet, name: str, width: int, rows: int) -> Tensor:
    """The numbers below a heading, from the third row on; −∞ is a text in a spreadsheet."""
    [first] = [cell.column for cell in sheet[1] if cell.value == name]
    cells = sheet.iter_rows(3, 2 + rows, first, first + width - 1, values_only=True)
    return torch.tensor([[-math.inf if x == "−∞" else x for x in row] for row in cells], dtype=torch.float64)


def test_the_spreadsheet_holds_the_five_steps(path: Path) -> None:
    book = load_workbook(path)
    for case in CASES:
        sheet, T, S = book[case.name], len(case.queries), len(case.source)
        assert sheet.freeze_panes == "C3" and sheet.max_row == 2 + H * T
        assert [row[0] for row in sheet.iter_rows(3, 2 + T, 2, 2, values_only=True)] == list(case.queries)

        # q, k and v as stored
        source = "cross" if case.name == "cross" else "self"
        q = block(sheet, "q", DH, H * T).view(H, T, DH)
        k, v = (
            torch.tensor(
                [row[2:] for row in book[f"{source} {part}"].iter_rows(2, values_only=True)],
                dtype=torch.float64,
            )
            for part in ("keys", "values")
        )
        k, v = k.view(H, S, DH), v.view(H, DH, S)

        # the five steps from them
        scores = torch.einsum("htc,hsc->hts", q, k)
        masked = (scores / 2).masked_fill(case.blocked, -math.inf)
        weights = masked.exp() / masked.exp().sum(-1, keepdim=True)
        output = torch.einsum("hts,hcs->htc", weights, v)
        steps = {
            "scores": scores,
            "scaled": scores / 2,
            "masked": masked,
            "weights": weights,
            "output": output,
        }
        for name, step in steps.items():
            stored = block(sheet, name, step.shape[-1], H * T).view(step.shape)
            torch.testing.assert_close(stored, step, rtol=0, atol=1e-12)


def test_a_spreadsheet_program_computes_the_same_from_the_formulas(path: Path, tmp_path: Path) -> None:
    [book] = recomputed(tmp_path, path)
    for case in CASES:
        sheet, T, S = book[case.name], len(case.queries), len(case.source)
        for name, width in {"scores": S, "scaled": S, "weights": S, "output": DH}.items():
            again = block(sheet, f"{name} again", width, T)
            torch.testing.assert_close(again, block(sheet, name, width, T), rtol=0, atol=1e-12)
        assert block(sheet, "deviation", 1, T).max() < 1e-12
