"""Two lookups at once: the value in the slot at a position, and the value in the slot with a symbol.

A memory has S slots. Slot i has one of S symbols, each occurring once, and holds a value, 0 or 1. A question names a
position p and a symbol s, and its answer is both values, in this order, as one of four classes.

Samples come in blocks of four that differ only in the two values asked for: 00, 01, 10, 11. So the classes are
equally frequent, no guess is better than a quarter, and a model that cannot tell which value belongs to which
question fails in every single block, not on average.
"""

from __future__ import annotations

import hashlib
import math
from functools import partial

import torch
from torch import Tensor

from experiments.data.distinct import check_enough, check_sizes, distinct_rows
from runner.data import Data, Split
from runner.errors import at_least
from runner.streams import generator

_BLOCK = 4  # the pairs of values 00, 01, 10, 11


class Lookups(Data):
    """Rows of 2 + 2S int64: p, s, the S slots' symbols, their S values; the target is 2 v(p) + v(s).

    The slot at p never has s, so there are two values to find. No two blocks are equal, within a split or between
    splits. Sizes are in samples, multiples of four.
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
        at_least(2, slots=slots)  # one for each value that is asked for
        check_sizes(_BLOCK, train_size=train_size, val_size=val_size, test_size=test_size)
        self.slots, self.sizes = slots, {"train": train_size, "val": val_size, "test": test_size}
        blocks = math.factorial(slots) * slots * (slots - 1) * 2 ** (slots - 2)
        check_enough("slots", sum(self.sizes.values()), _BLOCK * blocks)

    def load(self, seed: int) -> dict[str, Split]:
        """Draw the splits; `seed` decides all of them."""
        counts = [size // _BLOCK for size in self.sizes.values()]
        draw = partial(_draw_blocks, sum(counts), self.slots, generator(seed, "lookups"))
        blocks = torch.split(distinct_rows(sum(counts), draw), counts)
        return {name: _with_all_answers(block) for name, block in zip(self.sizes, blocks, strict=True)}

    def digest(self) -> str:
        """Return one sha256 of the settings that the samples are drawn from."""
        return hashlib.sha256(repr(("lookups", 1, self.slots, self.sizes)).encode()).hexdigest()


def _draw_blocks(count: int, slots: int, random: torch.Generator) -> Tensor:
    """Draw (count, 2 + 2S) rows, in which the two values asked for are 0."""
    symbols = torch.rand(count, slots, generator=random).argsort(1)  # (N, S): a permutation each
    values = torch.randint(2, (count, slots), generator=random)  # (N, S)
    places = torch.rand(count, slots, generator=random).argsort(1)[:, :2]  # (N, 2): the slots asked for
    values = values.scatter(1, places, 0)
    question = torch.cat((places[:, :1], symbols.gather(1, places[:, 1:])), dim=1)  # (N, 2): p and s
    return torch.cat((question, symbols, values), dim=1)


def _with_all_answers(blocks: Tensor) -> Split:
    """Expand each block (N, 2 + 2S) to its four samples, one after the other."""
    inputs = blocks.repeat_interleave(_BLOCK, dim=0)  # (4N, 2 + 2S)
    targets = torch.arange(_BLOCK).repeat(len(blocks))  # (4N,)
    slots = inputs.shape[1] // 2 - 1
    values = inputs[:, 2 + slots :]
    values.scatter_(1, places_asked(inputs), torch.stack((targets // 2, targets % 2), dim=1))
    return Split(inputs, targets)


def places_asked(inputs: Tensor) -> Tensor:
    """Return the slots that samples (N, 2 + 2S) ask for, (N, 2): the one at the position, the one with the symbol."""
    slots = inputs.shape[1] // 2 - 1
    matches = inputs[:, 2 : 2 + slots] == inputs[:, 1:2]  # (N, S), True in one slot
    return torch.stack((inputs[:, 0], matches.int().argmax(1)), dim=1)
