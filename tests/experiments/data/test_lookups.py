"""The two look-ups: what a sample says, that blocks are whole, that splits are apart, that sizes are checked."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from experiments.data.lookups import Lookups, first_of_each, places_asked
from runner.data import Split

SMALL = {"slots": 5, "train_size": 400, "val_size": 120, "test_size": 200}


@pytest.fixture(scope="module")
def splits() -> dict[str, Split]:
    return Lookups(**SMALL).load(3)


def parts(row: list[int]) -> tuple[int, int, list[int], list[int]]:
    """Position, symbol, the slots' symbols, their values."""
    slots = len(row) // 2 - 1
    return row[0], row[1], row[2 : 2 + slots], row[2 + slots :]


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_the_answer_is_what_looking_it_up_gives(splits: dict[str, Split], name: str) -> None:
    split = splits[name]
    assert split.targets is not None and len(split) == SMALL[f"{name}_size"]
    assert split.inputs.dtype == split.targets.dtype == torch.int64
    for row, target in zip(split.inputs.tolist(), split.targets.tolist(), strict=True):
        position, symbol, symbols, values = parts(row)
        assert sorted(symbols) == list(range(5)) and set(values) <= {0, 1}
        other = symbols.index(symbol)
        assert other != position
        assert Lookups.class_names[target] == f"{values[position]}{values[other]}"


def test_places_asked_are_those_that_a_search_finds(splits: dict[str, Split]) -> None:
    inputs = splits["test"].inputs
    found = [
        [position, symbols.index(symbol)] for position, symbol, symbols, _ in map(parts, inputs.tolist())
    ]
    assert places_asked(inputs).tolist() == found


def test_a_block_differs_in_the_two_values_asked_for_alone(splits: dict[str, Split]) -> None:
    for split in splits.values():
        assert split.targets is not None
        assert split.targets.view(-1, 4).tolist() == [[0, 1, 2, 3]] * (len(split) // 4)
        for block in split.inputs.view(-1, 4, 12):
            asked = {7 + int(place) for place in places_asked(block)[0]}
            changed = {column for column in range(12) if len(set(block[:, column].tolist())) > 1}
            assert changed == asked


def test_no_block_comes_twice_within_a_split_or_in_two(splits: dict[str, Split]) -> None:
    firsts = [tuple(row) for split in splits.values() for row in split.inputs[::4].tolist()]
    assert max(Counter(firsts).values()) == 1


def test_every_position_and_symbol_is_asked_for_about_equally_often() -> None:
    asked = Lookups().load(0)["train"].inputs[::4, :2]  # 4,096 blocks, 512 expected of each
    for column in asked.T:
        counts = column.bincount(minlength=8).double()
        assert counts.sub(512).abs().max() < 5 * (4096 * 1 / 8 * 7 / 8) ** 0.5


def test_the_seed_decides() -> None:
    one, same, other = (Lookups(**SMALL).load(seed)["train"].inputs for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert Lookups(**SMALL).digest() == Lookups(**SMALL).digest() != Lookups().digest()


def test_first_of_each_keeps_the_order() -> None:
    rows = torch.tensor([[3, 1], [0, 2], [3, 1], [9, 9], [0, 2]])
    assert first_of_each(rows).tolist() == [[3, 1], [0, 2], [9, 9]]


def test_a_small_memory_gives_as_many_blocks_as_it_has() -> None:
    """Three slots have 3! · 6 · 2 = 72 blocks; half of them are drawn, all different."""
    splits = Lookups(slots=3, train_size=96, val_size=24, test_size=24).load(0)
    assert len({tuple(row) for split in splits.values() for row in split.inputs[::4].tolist()}) == 36


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"slots": 1}, "slots must be at least 2"),
        ({"train_size": 402}, "train_size must be a positive multiple of 4, which are a block, not 402"),
        ({"test_size": 0}, "test_size must be a positive multiple of 4, which are a block, not 0"),
        ({"slots": 3}, "slots=3 gives 72 different blocks; these sizes need 180"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Lookups(**(SMALL | wrong))
