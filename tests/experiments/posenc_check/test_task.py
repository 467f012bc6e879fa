"""posenc_check: what it proves, writes, learns and remembers, and that a broken encoding makes it fail."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pytest
import torch
from openpyxl.worksheet.worksheet import Worksheet
from torch import Tensor, nn

from experiments.data.lookups import Lookups
from experiments.data.sentences import Sentences
from experiments.nn.attention import MultiHeadAttention
from experiments.nn.encoder import ENCODINGS
from experiments.nn.positions import AbsPosEncoding, RotaryPosEncoding
from experiments.posenc_check import PosEncCheck, checks, setups
from experiments.posenc_check.checks import check_absolute, check_rotary, check_word_order
from runner.engine.job import Result
from runner.streams import generator
from tests.experiments.conftest import SIZES, figures_later, recomputed, table

LAYOUTS = ("rotary_layouts", "rotary_layouts_differ")
RELATIVE = ("rotary_closed_form", "rotary_relative")
DTYPES = ("float64", "float32", "bfloat16")
BOOKS = ("abs_pos_encoding", "cos_pos_encoding", "sin_pos_encoding", "rotary_example")
L, D, FORMULA_ROWS = 12, 8, 3  # of the random matrix, as `SIZES` has it


@pytest.fixture(scope="module")
def result(finished: Callable[[str], Result]) -> Result:
    return finished("posenc_check")


# checks


def test_every_claim_is_held(result: Result) -> None:
    per_dtype = {"absolute_closed_form", "rotary_closed_form", "rotary_norm", "rotary_relative"}
    once = {"absolute_shift", "absolute_similarity", "rotary_composition", *LAYOUTS}
    once |= {f"order_{name}" for name in ("none_tokens", "none_pooled", "absolute", "rotary", "causal")}
    once |= {f"trained_{encoding}" for encoding in ENCODINGS}
    names = {check.name for check in result.checks}
    assert names == for_dtypes(*per_dtype) | once
    assert {row["check"] for row in table(result.folder, "checks")} == names


class WrongSign(RotaryPosEncoding):
    """Turns backwards."""

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        signs, D = torch.tensor([1.0, -1.0], dtype=x.dtype), x.shape[-1]  # of each pair's two numbers
        signs = signs.repeat(D // 2) if self.layout == "interleaved" else signs.repeat_interleave(D // 2)
        return super().forward(x * signs, positions) * signs


class RoundedAngles(RotaryPosEncoding):
    """Counts positions in bfloat16."""

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        positions = torch.arange(x.shape[2]) if positions is None else positions
        return super().forward(x, positions.bfloat16().long())


class NoNumber(RotaryPosEncoding):
    """Half of it wrong: NaN in the layout that is looked at last."""

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        return super().forward(x, positions) * (math.nan if self.layout == "half" else 1.0)


class WrongScale(AbsPosEncoding):
    """√d_model too large."""

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        return x + math.sqrt(self.d_model) * (super().forward(x, offset) - x)


class Wrapped(AbsPosEncoding):
    """Begins again after 1,024 positions."""

    def table(self, length: int, *args: object, **options: object) -> Tensor:
        return super().table(1024).repeat(math.ceil(length / 1024), 1)[:length]


class Recorder:
    """In the place of a run: holds which checks passed."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.passed: dict[str, bool] = {}

    def generator(self, *purpose: str) -> torch.Generator:
        return generator(0, *purpose)

    def check(self, name: str, claim: str, measured: float, tolerance: float, at_least: bool = False) -> None:
        self.passed[name] = measured >= tolerance if at_least else measured <= tolerance

    def figure(self, *_: object) -> None: ...

    table = figure


def failed_checks(check: Callable) -> set[str]:
    recorder = Recorder()
    check(recorder)
    assert recorder.passed
    return {name for name, passed in recorder.passed.items() if not passed}


class Causal(MultiHeadAttention):
    """Sees the order by itself."""

    def forward(self, *args: Tensor, causal: bool = False, **options: bool) -> object:  # type: ignore[override]
        return super().forward(*args, causal=True, **options)


def for_dtypes(*names: str) -> set[str]:
    return {f"{name}_{dtype}" for name in names for dtype in DTYPES}


@pytest.mark.parametrize(
    ("check", "broken", "caught"),
    [
        *((check, None, set()) for check in (check_absolute, check_rotary, check_word_order)),
        (check_absolute, WrongScale, for_dtypes("absolute_closed_form")),
        (check_absolute, Wrapped, {"absolute_shift"}),
        (check_rotary, WrongSign, for_dtypes("rotary_closed_form")),  # R_{−m} is as good in every other way
        (check_rotary, RoundedAngles, {"rotary_composition", *for_dtypes(*RELATIVE)}),
        (check_rotary, NoNumber, {*LAYOUTS, *for_dtypes(*RELATIVE)}),
        (check_word_order, Causal, {"order_none_tokens", "order_none_pooled"}),
    ],
)
def test_a_broken_encoding_fails_the_claims_that_it_breaks_and_no_others(
    check: Callable, broken: type | None, caught: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken is not None:
        module = setups if broken is Causal else checks
        monkeypatch.setattr(module, broken.__base__.__name__, broken)
    assert failed_checks(check) == caught


@pytest.mark.slow
def test_a_broken_encoding_makes_the_run_fail_and_say_so(
    cli: Callable, last_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "RotaryPosEncoding", RoundedAngles)
    sizes = ("data.train_size=400", "data.val_size=100", "data.test_size=200")
    with figures_later():
        outcome = cli(*SIZES["posenc_check"], *sizes, "debug=fast", "loop.steps=1")
    assert outcome.status == 1
    assert "rotary_relative_float32" in (outcome.out + outcome.err).split("Checks failed: ")[1]
    assert json.loads((last_run() / "summary.json").read_text())["status"] == "failed"
    assert (last_run() / "tables" / "rotary_example.xlsx").exists()  # all that was found is kept


# training


def test_networks_begin_alike_and_learn_the_order_with_positions_alone(result: Result) -> None:
    before, test = result.metrics["before"]["test"], result.metrics["test"]
    assert before["loss.none"] == pytest.approx(before["loss.rotary"], rel=0.02)
    assert test["accuracy.none"] == 0.25  # every family has one answer, right once in four times
    assert min(test["accuracy.absolute"], test["accuracy.rotary"]) >= 0.95
    for metric in ("loss", "accuracy", "precision", "recall", "f1"):
        assert {f"{metric}.{encoding}" for encoding in ENCODINGS} <= set(test)


@torch.no_grad()
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_length_and_distance_tables_equal_the_networks_own_answers(result: Result, encoding: str) -> None:
    # by length
    network, hits = result.model[encoding].eval(), {}
    splits = Sentences(lengths=(16, 24), length_size=200).load(0)
    for length in (16, 24):
        split = splits[f"length_{length}"]
        hits[f"{length}"] = (network(split.inputs).argmax(1) == split.targets).double()
    rows = table(result.folder, "length_generalisation")
    shares = {row["words in the sentence"]: float(row[encoding]) for row in rows}
    assert shares == pytest.approx({length: float(hit.mean()) for length, hit in hits.items()})

    # by distance
    apart = [abs(row.index(1) - row.index(2)) for row in splits["length_24"].inputs.tolist()]
    rows = table(result.folder, "distance_generalisation")
    assert [row["places from 我 to 你"] for row in rows] == ["2–15", "16–23"]
    for row in rows:
        low, high = map(int, row["places from 我 to 你"].split("–"))
        there = torch.tensor([low <= distance <= high for distance in apart])
        assert float(row[encoding]) == pytest.approx(float(hits["24"][there].mean()))


def test_rotary_does_not_care_where_a_sentence_stands_and_absolute_does(result: Result) -> None:
    rows = {row["adverbs put in front of it"]: row for row in table(result.folder, "place_generalisation")}
    assert list(rows) == ["0", "4", "8", "16", "32", "48"]
    assert all(float(row["none"]) == 0.25 for row in rows.values())
    for encoding in ENCODINGS:  # not moved, the first 1000 of the test set
        whole = result.metrics["test"][f"accuracy.{encoding}"]
        assert float(rows["0"][encoding]) == pytest.approx(whole, abs=0.03)
    assert float(rows["8"]["rotary"]) > 0.95
    assert float(rows["16"]["rotary"]) > 0.7 > 0.3 > float(rows["16"]["absolute"])


def test_answers_show_whole_families(result: Result) -> None:
    rows = table(result.folder, "answers")
    assert [row["says"] for row in rows] == [*Sentences.class_names, *Sentences.class_names]
    assert len({row["sentence"] for row in rows}) == 8
    for family in (rows[:4], rows[4:]):
        assert len({row["none"] for row in family}) == 1


def test_precision_of_the_score_by_dtype_of_the_angles(result: Result) -> None:
    rows = {(row["dtype"], row["angles in"]): row for row in table(result.folder, "relative_position")}
    far = "window at 131,072"
    assert float(rows["float32", "float64"][far]) < 1e-7 < 1e-5 < float(rows["float32", "float32"][far])
    assert float(rows["bfloat16", "float64"][far]) < 1e-2 < float(rows["bfloat16", "bfloat16"][far])


# spreadsheets


@pytest.fixture(scope="module")
def matrix() -> Tensor:
    """The random matrix of the run."""
    return torch.randn(L, D, dtype=torch.float64, generator=generator(0, "matrix"))


def angle(p: int, i: int) -> float:
    return p * 10000.0 ** (-2 * i / D)


def numbers(page: Worksheet, first_row: int, columns: int = D) -> list[list[float]]:
    """The rows from `first_row` (counted from 1) on, without the position in front."""
    rows = list(page.iter_rows(min_row=first_row, max_col=columns + 1, values_only=True))
    assert [row[0] for row in rows] == list(range(len(rows)))
    return [list(row[1:]) for row in rows]  # type: ignore[arg-type]


def rotated(x: Tensor) -> list[list[float]]:
    """Each pair turned, in plain Python."""
    result = []
    for p, row in enumerate(x.tolist()):
        line = []
        for i in range(D // 2):
            a, b, c, s = row[2 * i], row[2 * i + 1], math.cos(angle(p, i)), math.sin(angle(p, i))
            line += [a * c - b * s, b * c + a * s]
        result.append(line)
    return result


def test_tables_reopened_are_the_closed_form(result: Result, matrix: Tensor) -> None:
    sin = [[math.sin(angle(p, i)) for i in range(D // 2)] for p in range(L)]
    cos = [[math.cos(angle(p, i)) for i in range(D // 2)] for p in range(L)]
    both = np.stack((sin, cos), axis=-1).reshape(L, D)
    for name, wanted, columns, top in (
        ("abs_pos_encoding", both, D, 5),
        ("sin_pos_encoding", sin, D // 2, 4),
        ("cos_pos_encoding", cos, D // 2, 4),
    ):
        book = openpyxl.load_workbook(result.folder / "tables" / f"{name}.xlsx")
        page = book["table"]
        np.testing.assert_allclose(numbers(page, top + 1, columns), wanted, rtol=0, atol=1e-13)
        header = {row[0]: row[1:] for row in page.iter_rows(max_row=top, values_only=True)}
        pairs = [i for i in range(D // 2) for _ in range(2 * columns // D)]
        assert header["pair i"] == tuple(pairs)
        assert header["θ_i"] == pytest.approx([angle(1, i) for i in pairs])
        assert header["wavelength 2π/θ_i"] == pytest.approx([2 * math.pi / angle(1, i) for i in pairs])
        assert page.freeze_panes == f"B{top + 1}" and book["recompute"].freeze_panes == f"C{top + 1}"
    book = openpyxl.load_workbook(result.folder / "tables" / "abs_pos_encoding.xlsx")
    assert book["recompute"]["D6"].value == "=SIN($A6*C$3)"  # as docs/positions.md has it
    np.testing.assert_allclose(numbers(book["x"], 2), matrix, rtol=1e-15)  # openpyxl writes 16 digits
    np.testing.assert_allclose(numbers(book["x + encoding"], 2), matrix.numpy() + both, rtol=0, atol=1e-13)


def test_rotary_example_reopened_is_the_matrix_turned(result: Result, matrix: Tensor) -> None:
    book = openpyxl.load_workbook(result.folder / "tables" / "rotary_example.xlsx")
    np.testing.assert_allclose(numbers(book["x"], 2), matrix, rtol=1e-15)  # openpyxl writes 16 digits
    np.testing.assert_allclose(numbers(book["x rotated"], 2), rotated(matrix), rtol=0, atol=1e-13)
    assert book["rotation"].freeze_panes == "C3"


@pytest.fixture(scope="module")
def computed(result: Result, tmp_path_factory: pytest.TempPathFactory) -> dict[str, openpyxl.Workbook]:
    """The workbooks after a spreadsheet program has evaluated their formulas."""
    books = [result.folder / "tables" / f"{name}.xlsx" for name in BOOKS]
    return dict(zip(BOOKS, recomputed(tmp_path_factory.mktemp("recomputed"), *books), strict=True))


@pytest.mark.parametrize("name", BOOKS[:3])
def test_formulas_give_the_stored_numbers(
    name: str, result: Result, computed: dict[str, openpyxl.Workbook]
) -> None:
    columns, top = (D, 5) if name == "abs_pos_encoding" else (D // 2, 4)
    page = computed[name]["recompute"]
    rows = [row[2:] for row in page.iter_rows(min_row=top + 1, values_only=True)]
    stored, found = ([row[start::2] for row in rows] for start in (0, 1))
    source = openpyxl.load_workbook(result.folder / "tables" / f"{name}.xlsx")
    wanted = numbers(source["table"], top + 1, columns)[:FORMULA_ROWS]
    np.testing.assert_allclose(np.array(found, float), wanted, rtol=0, atol=1e-13)
    np.testing.assert_allclose(np.array(stored, float), wanted, rtol=0, atol=1e-14)
    assert all(abs(row[1].value) < 1e-12 for row in page.iter_rows(min_row=top + 1))
    # and formulas they are: none of these numbers was written beside
    formulas = source["recompute"].iter_rows(min_row=top + 1, min_col=4, values_only=True)
    assert all(str(cell).startswith(("=SIN(", "=COS(")) for row in formulas for cell in row[::2])


def test_rotary_formulas_give_the_rotated_matrix(
    matrix: Tensor, computed: dict[str, openpyxl.Workbook]
) -> None:
    rows = list(computed["rotary_example"]["rotation"].iter_rows(min_row=3, values_only=True))
    assert len(rows) == FORMULA_ROWS * D // 2
    wanted = rotated(matrix[:FORMULA_ROWS])
    for p, i, theta, turn, a, b, *rest in rows:
        assert isinstance(p, int) and isinstance(i, int)
        cos, cos_, sin, sin_, first, first_, second, second_, difference = rest
        assert theta == pytest.approx(angle(1, i)) and turn == pytest.approx(angle(p, i))
        assert (a, b) == pytest.approx(tuple(matrix[p, 2 * i : 2 * i + 2].tolist()))
        turned = [math.cos(angle(p, i))] * 2 + [math.sin(angle(p, i))] * 2
        assert [cos, cos_, sin, sin_] == pytest.approx(turned)
        assert [first, first_] == pytest.approx([wanted[p][2 * i]] * 2)
        assert [second, second_] == pytest.approx([wanted[p][2 * i + 1]] * 2)
        assert abs(difference) < 1e-12  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"d_model": 7}, "d_model must be an even number from 2 to 256, not 7"),
        ({"d_model": 258}, "d_model must be an even number from 2 to 256, not 258"),
        ({"length": 0}, "length must be at least 1"),
        ({"claims_from": 0}, "claims_from must be at least 1"),
        ({"formula_rows": 65}, "formula_rows must lie in [0, length=64]"),
        ({"data": Lookups()}, "data must be sentences, the task that this experiment is about, not Lookups"),
    ],
)
def test_a_setting_out_of_range_is_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        PosEncCheck(**{"model": nn.Module, "data": Sentences(), "loss": nn.Identity()} | changed)
