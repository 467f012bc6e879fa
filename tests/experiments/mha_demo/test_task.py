"""mha_demo: what it checks and catches, draws and writes, learns and remembers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from openpyxl import load_workbook
from openpyxl.worksheet.worksheet import Worksheet
from torch import Tensor

from experiments.data.lookups import Lookups
from experiments.data.sentences import Sentences
from experiments.mha_demo import cases, checks, task
from experiments.mha_demo.cases import Case
from experiments.nn import attention_steps
from experiments.nn.attention import MultiHeadAttention
from experiments.nn.attention_steps import AttentionSteps
from experiments.nn.lookup_net import LookupNet
from experiments.nn.masks import merge_masks
from runner.engine.job import Result
from tests.experiments.conftest import SIZES, figures_later, recomputed, table

SMALL = SIZES["mha_demo"]
CHECKS = {
    *("rows_sum_to_one", "masked_is_zero", "masked_never_leaks", "masked_row", "masked_row_finite"),
    *(f"{peer}_{what}" for peer in ("fused", "torch") for what in ("output", "weights", "gradients")),
    *("steps_make_the_layer", "permutation", "paths", "split_block_diagonal", "split_general"),
    *("raw_std", "scaled_std", "scaled_gradient", "raw_gradient"),
    *("one_head_ceiling", "heads_2_learnt", "heads_2_needed"),
}


@pytest.fixture(scope="module")
def result(finished: Callable[[str], Result]) -> Result:
    """A run that has learnt its task: 300 steps, and its checks."""
    return finished("mha_demo")


# what a run leaves


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
    questions = {"position": "the value at a position", "symbol": "the value that a symbol marks"}
    served = set()
    for head in "12":
        row = rows["heads_2", head]
        looks = {name: float(row[f"weight on the {name}'s slot"]) for name in questions}
        falls = {name: float(row[f"fall of {question}"]) for name, question in questions.items()}
        assert max(looks, key=lambda name: looks[name]) == max(falls, key=lambda name: falls[name])
        assert max(falls.values()) > 0.3
        served.add(max(falls, key=lambda name: falls[name]))
    assert served == set(questions)


def test_scores_grow_as_predicted_and_the_division_takes_it_back(result: Result) -> None:
    rows = table(result.folder, "scale")
    assert [int(row["d_k"]) for row in rows] == [16, 32, 64, 128, 256, 512, 1024]
    for row in rows:
        d_k = int(row["d_k"])
        assert float(row["std of q·k, predicted"]) == pytest.approx(math.sqrt(d_k))
        assert float(row["std of q·k"]) == pytest.approx(math.sqrt(d_k), rel=0.08)
        assert float(row["std of q·k/√d_k"]) == pytest.approx(1, rel=0.08)
        assert float(row["entropy of q·k/√d_k"]) == pytest.approx(1.72, rel=0.08)
        for name in ("entropy", "largest", "gradient"):
            measured, predicted = float(row[f"{name} of q·k"]), float(row[f"{name} of q·k, predicted"])
            assert measured == pytest.approx(predicted, rel=0.4), (d_k, name)
    gradients = [float(row["gradient of q·k"]) for row in rows]
    assert gradients[-1] < 0.25 * gradients[0]


# the spreadsheet


def sheet_of(path: Path, name: str) -> tuple[Worksheet, dict[str, int]]:
    """A sheet, and the first column of each block of its header."""
    sheet = load_workbook(path)[name]
    return sheet, {cell.value: cell.column for cell in sheet[1] if cell.value}


def block(sheet: Worksheet, first: int, width: int) -> Tensor:
    """The numbers of a block, from the third row on; −∞ is a text in a spreadsheet."""
    rows = sheet.iter_rows(min_row=3, min_col=first, max_col=first + width - 1, values_only=True)
    return torch.tensor(
        [[-math.inf if x == "−∞" else float(x) for x in row] for row in rows], dtype=torch.float64
    )


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_the_spreadsheet_holds_the_five_steps(result: Result, case: Case) -> None:
    path = result.folder / "tables" / "attention_steps.xlsx"
    sheet, start = sheet_of(path, case.name)
    T, S, H, Dh = len(case.queries), len(case.source), 2, 4
    assert sheet.freeze_panes == "C3" and sheet.max_row == 2 + H * T
    assert [row[0] for row in sheet.iter_rows(3, 2 + T, 2, 2, values_only=True)] == list(case.queries)
    q = block(sheet, start["q"], Dh).view(H, T, Dh)
    source = "cross" if case.name == "cross" else "self"
    keys, values = (load_workbook(path)[f"{source} {what}"] for what in ("keys", "values"))
    k = torch.tensor([row[2:] for row in keys.iter_rows(2, values_only=True)], dtype=torch.float64)
    v = torch.tensor([row[2:] for row in values.iter_rows(2, values_only=True)], dtype=torch.float64)
    scores = torch.einsum("htc,hsc->hts", q, k.view(H, S, Dh))
    masked = (scores / 2).masked_fill(case.blocked, -math.inf)
    weights = masked.exp() / masked.exp().sum(-1, keepdim=True)
    output = torch.einsum("hts,hcs->htc", weights, v.view(H, Dh, S))
    steps = {"scores": scores, "scaled": scores / 2, "masked": masked, "weights": weights, "output": output}
    for name, tensor in steps.items():
        stored = block(sheet, start[name], tensor.shape[-1]).view(tensor.shape)
        torch.testing.assert_close(stored, tensor, rtol=0, atol=1e-12)


def test_a_spreadsheet_program_computes_the_same_from_the_formulas(result: Result, tmp_path: Path) -> None:
    [book] = recomputed(tmp_path, result.folder / "tables" / "attention_steps.xlsx")
    for case in cases.CASES:
        sheet, T, S = book[case.name], len(case.queries), len(case.source)
        start = {cell.value: cell.column for cell in sheet[1] if cell.value}
        for name, width in {"scores": S, "scaled": S, "weights": S, "output": 4}.items():
            stored = block(sheet, start[name], width)[:T]
            rows = sheet.iter_rows(3, 2 + T, start[f"{name} again"], start[f"{name} again"] + width - 1)
            again = torch.tensor([[cell.value for cell in row] for row in rows], dtype=torch.float64)
            torch.testing.assert_close(again, stored, rtol=0, atol=1e-12)
        deviations = [
            row[0] for row in sheet.iter_rows(3, 2 + T, start["deviation"], start["deviation"], True)
        ]
        assert max(deviations) < 1e-12


# what is broken is caught


def late_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> AttentionSteps:
    """The mask after the softmax: rows no longer sum to one."""
    right = attention_steps.attention_steps(q, k, v, None)
    weights = right.weights if mask is None else right.weights.masked_fill(mask, 0)
    return right._replace(weights=weights, output=weights @ v)


def unscaled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> AttentionSteps:
    """No division by √d_k."""
    right = attention_steps.attention_steps(q * q.shape[-1] ** 0.5, k, v, mask)
    return right._replace(scores=q @ k.mT)


class Untransposed(MultiHeadAttention):
    """Heads joined without the transpose that brings a token's parts together."""

    def forward(
        self, query, key, value, key_padding_mask=None, attn_mask=None, causal=False, need_weights=True
    ):  # type: ignore[no-untyped-def, override]
        B, T, D = query.shape
        mask = merge_masks(B, self.num_heads, T, key.shape[1], key_padding_mask, attn_mask, causal)
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        steps = attention_steps.attention_steps(q, k, v, mask)
        return self.out_proj(steps.output.reshape(B, T, D)), steps.weights if need_weights else None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "broken", "caught"),
    [
        ("attention_steps", late_mask, {"rows_sum_to_one", "steps_make_the_layer", "fused_output"}),
        ("attention_steps", unscaled, {"scaled_std", "scaled_gradient", "fused_weights"}),
        ("MultiHeadAttention", Untransposed, {"torch_output", "torch_gradients", "permutation"}),
        # networks that have not learnt are held to it too early
        ("attention_steps", attention_steps.attention_steps, {"heads_2_learnt", "heads_2_needed"}),
    ],
)
def test_a_broken_attention_ends_the_run_and_is_named(
    name: str,
    broken: object,
    caught: set[str],
    cli: Callable,
    last_run: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (task, checks):
        monkeypatch.setattr(module, name, broken)
    with figures_later():
        outcome = cli(*SMALL, "debug=fast", *["task.claims_from=10"] * ("heads_2_learnt" in caught))
    assert outcome.status == 1, outcome.err
    summary = json.loads((last_run() / "summary.json").read_text())
    failed = {check["name"] for check in summary["checks"] if not check["passed"]}
    assert caught <= failed and summary["status"] == "failed"
    assert "heads_2_learnt" not in caught or caught == failed
    assert all(check in outcome.out + outcome.err for check in caught)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"heads": []}, "heads must be different numbers from 1 on, not []"),
        ({"heads": [2, 2]}, "heads must be different numbers from 1 on, not [2, 2]"),
        ({"heads": [0, 1]}, "heads must be different numbers from 1 on, not [0, 1]"),
        ({"demo_heads": 1}, "demo_heads must be at least 2"),
        ({"demo_d_model": 9}, "demo_d_model must be divisible by demo_heads=2, not 9"),
        ({"queries": 10}, "queries must be at least 500"),
        ({"data": Sentences()}, "data must be lookups"),
        ({"heads": [3]}, "heads must divide model.d_model=32, which 3 does not"),
    ],
)
def test_what_cannot_be_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        task.MHADemo(**{"model": LookupNet, "data": Lookups(), "heads": [1, 2]} | changed)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("task.heads=[3]", "task.heads=[3]: heads must divide model.d_model=16, which 3 does not"),
        ("model.d_model=0", "model.d_model=0: d_model must be at least 1, not 0"),
    ],
)
def test_the_setting_to_blame_is_named(setting: str, words: str, cli: Callable) -> None:
    outcome = cli(*SMALL, setting)
    assert outcome.status == 2 and words in outcome.err, outcome.err
