"""The two lookups: what a sample says, that blocks are whole, that splits do not overlap."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from experiments.data.distinct import distinct_rows
from experiments.data.lookups import Lookups, places_asked
from runner.data import Split

SMALL = partial(Lookups, slots=5, train_size=400, val_size=120, test_size=200)


@pytest.fixture(scope="module")
def splits() -> dict[str, Split]:
    return SMALL().load(3)


def test_answer_is_what_looking_it_up_gives(splits):
    assert {name: len(split) for name, split in splits.items()} == {"train": 400, "val": 120, "test": 200}
    for split in splits.values():
        assert split.inputs.dtype == split.targets.dtype == torch.int64
        places = places_asked(split.inputs).tolist()
        for row, target, place in zip(split.inputs.tolist(), split.targets.tolist(), places, strict=True):
            position, symbol, symbols, values = row[0], row[1], row[2:7], row[7:]
            assert sorted(symbols) == list(range(5)) and set(values) <= {0, 1}
            other = symbols.index(symbol)
            assert other != position and place == [position, other]
            assert Lookups.class_names[target] == f"{values[position]}{values[other]}"


def test_block_differs_in_the_two_values_asked_for_alone(splits):
    for split in splits.values():
        assert split.targets.view(-1, 4).tolist() == [[0, 1, 2, 3]] * (len(split) // 4)
        for block in split.inputs.view(-1, 4, 12):
            changed = (block != block[0]).any(0).nonzero().flatten()
            assert torch.equal(changed, 7 + places_asked(block)[0].sort().values)


def test_no_block_comes_twice_within_a_split_or_in_two(splits):
    """Three slots have 3! · 6 · 2 = 72 blocks, of which half are drawn."""
    for drawn, number in ((splits, 180), (Lookups(3, train_size=96, val_size=24, test_size=24).load(0), 36)):
        assert len({tuple(row) for split in drawn.values() for row in split.inputs[::4].tolist()}) == number


def test_every_position_and_symbol_is_asked_for_about_equally_often():
    for column in Lookups().load(0)["train"].inputs[::4, :2].T:  # 4,096 blocks, 512 expected of each
        counts = column.bincount(minlength=8).double()
        assert counts.sub(512).abs().max() < 5 * (4096 * 1 / 8 * 7 / 8) ** 0.5


def test_seed_decides():
    one, same, other = (SMALL().load(seed)["train"].inputs for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert SMALL().digest() == SMALL().digest() != Lookups().digest()


def test_distinct_rows_come_in_the_order_in_which_they_were_drawn():
    draws = iter([[[3, 1], [0, 2], [3, 1], [9, 9], [0, 2]], [[9, 9], [5, 5], [4, 4]]])
    rows = distinct_rows(3, lambda: torch.tensor(next(draws)), exclude=torch.tensor([[0, 2]]))
    assert rows.tolist() == [[3, 1], [9, 9], [5, 5]]
