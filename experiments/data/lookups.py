"""Two look-ups at once: what is in the slot at a position, and what is in the slot that bears a symbol?

A memory has S slots. Slot i bears one of S symbols, each once, and holds a value, 0 or 1. A question names a
position p and a symbol s, and its answer is both values, in this order, as one of four classes.

Samples come in blocks of four that differ in the two values asked for alone: 00, 01, 10, 11. So the classes are
equally frequent, no guess is better than a quarter, and whatever cannot tell which value belongs to which
question fails in every single block, not on average.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from runner.data import Data, Split
from runner.streams import generator

BLOCK = 4  # the pairs of values 00, 01, 10, 11


class Lookups(Data):
    """Samples are rows of 2 + 2S int64: p, s, the S slots' symbols, their S values; the target is 2 v(p) + v(s).

    The slot at p never bears s, so there are two values to find. No two blocks are equal, within a split or
    between splits. Sizes are in samples, multiples of four.
    """

    class_names = ("00", "01", "10", "11")

    def __init__(
        self,
        slots: int = 8,
        train_size: int = 16_384,
        val_size: int = 2048,
        test_size: int = 4096,
        batch_size: int = 128,
        eval_batch_size: int = 1024,
    ):
        super().__init__(batch_size, eval_batch_size)
        if slots < 2:
            raise ValueError(f"slots must be at least 2, one for each value that is asked for, not {slots}")
        sizes = {"train": train_size, "val": val_size, "test": test_size}
        for name, size in sizes.items():
            if size < BLOCK or size % BLOCK:
                raise ValueError(
                    f"{name}_size must be a positive multiple of {BLOCK}, which are a block, not {size}"
                )
        possible = math.factorial(slots) * slots * (slots - 1) * 2 ** (slots - 2)
        wanted = sum(sizes.values()) // BLOCK
        if 2 * wanted > possible:  # by more, drawing until all differ would take long
            raise ValueError(
                f"slots={slots} gives {possible} different blocks; these sizes need {wanted}, and at most half is drawn"
            )
        self.slots, self.sizes = slots, sizes

    def load(self, seed: int) -> dict[str, Split]:
        """Draw the splits; `seed` decides all of them."""
        wanted = sum(self.sizes.values()) // BLOCK
        blocks = distinct_blocks(wanted, self.slots, generator(seed, "lookups"))
        parts = blocks.split([size // BLOCK for size in self.sizes.values()])
        return {name: with_all_answers(part) for name, part in zip(self.sizes, parts, strict=True)}

    def digest(self) -> str:
        """One sha256 for what the samples are drawn from."""
        return hashlib.sha256(repr(("lookups", 1, self.slots, self.sizes)).encode()).hexdigest()


def distinct_blocks(count: int, slots: int, random: torch.Generator) -> Tensor:
    """(count, 2 + 2S) rows of which no two are equal, the two values asked for being 0 in all."""
    rows = torch.empty(0, 2 + 2 * slots, dtype=torch.int64)
    while len(rows) < count:
        rows = first_of_each(torch.cat((rows, draw_blocks(count, slots, random))))
    return rows[:count]


def draw_blocks(count: int, slots: int, random: torch.Generator) -> Tensor:
    """(count, 2 + 2S) rows by chance, the two values asked for being 0."""
    symbols = torch.rand(count, slots, generator=random).argsort(1)  # (N, S): a permutation each
    values = torch.randint(2, (count, slots), generator=random)  # (N, S)
    places = torch.rand(count, slots, generator=random).argsort(1)[:, :2]  # (N, 2): the slots asked for
    values = values.scatter(1, places, 0)
    asked = torch.cat((places[:, :1], symbols.gather(1, places[:, 1:])), dim=1)  # (N, 2): p and s
    return torch.cat((asked, symbols, values), dim=1)


def first_of_each(rows: Tensor) -> Tensor:
    """The rows (N, D) without repetitions, in the order in which each comes first."""
    _, kinds = rows.unique(dim=0, return_inverse=True)  # (N,)
    first = torch.full((int(kinds.max()) + 1,), len(rows))
    first.scatter_reduce_(0, kinds, torch.arange(len(rows)), "amin")
    return rows[first.sort().values]


def with_all_answers(blocks: Tensor) -> Split:
    """Each block (N, 2 + 2S) as its four samples, one after the other."""
    inputs = blocks.repeat_interleave(BLOCK, dim=0)  # (4N, 2 + 2S)
    targets = torch.arange(BLOCK).repeat(len(blocks))  # (4N,)
    slots = inputs.shape[1] // 2 - 1
    values = inputs[:, 2 + slots :]
    values.scatter_(1, places_asked(inputs), torch.stack((targets // 2, targets % 2), dim=1))
    return Split(inputs, targets)


def places_asked(inputs: Tensor) -> Tensor:
    """The slots that samples (N, 2 + 2S) ask for, (N, 2): the one at the position, the one with the symbol."""
    slots = inputs.shape[1] // 2 - 1
    bears = inputs[:, 2 : 2 + slots] == inputs[:, 1:2]  # (N, S), True in one slot
    return torch.stack((inputs[:, 0], bears.int().argmax(1)), dim=1)
