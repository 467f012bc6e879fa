"""Numbers of Ho, Jain & Abbeel 2020 on CIFAR-10, and the tables in which they stand beside ours.

A table is a header and rows; None is a number that the paper does not give.

Letters in shapes: B images, T time steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from experiments.nn.diffusion import Bound

_Table = tuple[list[str], list[list[Any]]]

_T = 1000  # its numbers by reverse steps stand beside ours where T is the same
_TEST_BITS, _TRAIN_BITS = 3.75, 3.72  # per dimension, Table 1 and §4.3
_RATE, _DISTORTION = 1.78, 1.97  # bits/dim, §4.3
_FID, _INCEPTION_SCORE = {"train": 3.17, "test": 5.24}, 9.46  # Table 1 and §4.1: 50,000 samples
_TABLE_4 = {  # reverse steps: rate in bits/dim, RMSE on [0, 255]
    100: (0.00000, 67.60),
    200: (0.00013, 60.97),
    300: (0.00081, 54.18),
    400: (0.00282, 46.13),
    500: (0.00716, 38.03),
    600: (0.01507, 30.81),
    700: (0.02866, 24.44),
    800: (0.05415, 18.47),
    900: (0.11994, 12.02),
    1000: (1.77581, 0.951),
}


def rate_distortion_table(rate: Tensor, rmse: Tensor) -> _Table:
    """Tabulate every tenth of the reverse steps (Table 4): rate in bits/dim (T,), RMSE on [0, 255] (T,)."""
    T, rows = len(rate), []
    for tenth in range(1, 11):
        steps = max(1, round(tenth * T / 10))
        theirs: Sequence[float | None] = _TABLE_4[steps] if T == _T else (None, None)
        rows.append([steps, float(rate[steps - 1]), theirs[0], float(rmse[steps - 1]), theirs[1]])
    return ["reverse steps", "rate", "rate, paper", "RMSE", "RMSE, paper"], rows


def summary_table(
    bounds: Mapping[str, Bound], measures: Mapping[str, tuple[int, Mapping[str, float]]]
) -> _Table:
    """Tabulate one number per row: bounds by split, then measures by split with their number of images."""
    # bits per dimension with their standard error, and their two parts
    rows: list[list[Any]] = []
    for split, bound in bounds.items():
        bits = bound.total.double()  # (B,)
        B, mean, distortion = len(bits), float(bits.mean()), float(bound.terms[:, 0].double().mean())
        error = float(bits.std() / math.sqrt(B)) if B > 1 else math.nan
        paper = (_TEST_BITS, _RATE, _DISTORTION) if split == "test" else (_TRAIN_BITS, None, None)
        rows += [
            [f"bits/dim, {split}", B, mean, error, paper[0]],
            [f"rate L₁ … L_T, {split}", B, mean - distortion, None, paper[1]],
            [f"distortion L₀, {split}", B, distortion, None, paper[2]],
        ]

    # measures
    for split, (images, values) in measures.items():
        theirs = {"is": _INCEPTION_SCORE, "fid": _FID.get(split)}
        rows += [
            [f"{name}, {split}", images, value, None, theirs.get(name)] for name, value in values.items()
        ]
    return ["number", "images", "here", "standard error", "paper, CIFAR-10"], rows


def beside_the_paper(rows: Sequence[Sequence[Any]]) -> str:
    """Return as text the rows (number, images, here, error, paper) for which the paper has a number."""
    header = "Here and in the paper, on CIFAR-10 (all: tables/numbers.csv, rate_distortion.csv):"
    lines = [
        f"  {name.ljust(22)} {here:8.4f}   paper {paper:.2f}" for name, _, here, _, paper in rows if paper
    ]
    return "\n".join([header, *lines])
