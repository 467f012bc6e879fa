"""The paper's numbers beside ours."""

from __future__ import annotations

import math
import re

import pytest
import torch

from experiments.ddpm_cifar.paper import _TABLE_4, beside_the_paper, rate_distortion_table, summary_table
from experiments.nn.diffusion import Bound, rate_distortion


def bound(B: int, T: int) -> Bound:
    """Made-up terms of B images."""
    draw = torch.Generator().manual_seed(0)
    terms, prior = torch.rand(B, T, generator=draw), torch.rand(B, generator=draw)
    return Bound(terms.sum(1) + prior, terms, prior, torch.rand(B, T, generator=draw))


@pytest.mark.parametrize(("T", "comparable"), [(1000, True), (25, False)])
def test_table_4_has_every_tenth_step_and_the_papers_where_t_is_the_same(T: int, comparable: bool) -> None:
    rate, rmse = rate_distortion(bound(3, T))
    _, rows = rate_distortion_table(rate, rmse)
    assert [row[0] for row in rows] == [max(1, round(tenth * T / 10)) for tenth in range(1, 11)]
    for steps, here, theirs, error, their_error in rows:
        assert (here, error) == (float(rate[steps - 1]), float(rmse[steps - 1]))
        assert (theirs, their_error) == (_TABLE_4[steps] if comparable else (None, None))


def test_the_papers_numbers_stand_beside_ours() -> None:
    its = bound(5, 10)
    measured = {"train": (60, {"fid": 5.0, "is": 9.0}), "test": (50, {"fid": 7.0, "recall": 0.5})}
    _, rows = summary_table({"train": its, "test": its}, measured)

    # bits per dimension with their standard error, and their two parts
    assert [row[4] for row in rows[:6]] == [3.72, None, None, 3.75, 1.78, 1.97]
    bits, rate, distortion = rows[3:6]
    assert bits[2] == pytest.approx(rate[2] + distortion[2])
    assert distortion[2] == pytest.approx(float(its.terms[:, 0].mean()))
    assert bits[3] == pytest.approx(float(its.total.std()) / math.sqrt(5))
    assert math.isnan(summary_table({"test": bound(1, 10)}, {})[1][0][3])

    # measures with the images behind them, and FID with the paper's of its split
    assert rows[6:] == [
        ["fid, train", 60, 5.0, None, 3.17],
        ["is, train", 60, 9.0, None, 9.46],
        ["fid, test", 50, 7.0, None, 5.24],
        ["recall, test", 50, 0.5, None, None],
    ]

    # as text, what the paper has
    lines = beside_the_paper(rows).splitlines()
    assert len(lines) == 1 + 7 and re.search(r"fid, test +7\.0000 +paper 5\.24", lines[-1])
