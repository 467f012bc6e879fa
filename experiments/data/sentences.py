"""Made-up Chinese sentences that say who does what to whom by the order of their words, and by nothing else.

A sentence holds the words 我 (I, me), 你 (you), 爱 (love) and 等 (wait for), once each, among adverbs that change
nothing. Chinese has no cases: the person before the verb is the one who acts. The verb between the two persons is
the one that is meant; the other stands outside, first or last of the four. So there are four classes,

    我爱你 (I love you)    你爱我 (you love me)    我等你 (I wait for you)    你等我 (you wait for me)

Sentences come in families of four, one per class: exchanging 我 with 你 and 爱 with 等 leads from each to the others
while every other word stays. All four have the same bag of words, so who sees the bag alone gives all four one
answer and is right once in four times, no more and no less.

Letters in shapes: N families, W width (the longest length), B batch.
"""

from __future__ import annotations

import hashlib
from math import comb

import torch
from torch import Tensor

from runner.data import Data, Split
from runner.streams import generator

PAD, ME, YOU, LOVE, WAIT = range(5)
WORDS = ("空", "我", "你", "爱", "等", "今天", "真", "也", "一直", "还", "就", "都", "常常")
FIRST_ADVERB = 5
ADVERBS = len(WORDS) - FIRST_ADVERB
CLASSES = ("我爱你", "你爱我", "我等你", "你等我")
FAMILY = len(CLASSES)
LONGER = "length_{}"  # the splits of longer sentences, by their length


class Sentences(Data):
    """Token ids (B, max_length) int64 with padding (0) behind, and their classes; no sentence is in two splits.

    Lengths of train, val and test run from `min_length` to `max_length` words, each as often as another as far
    as there are so many sentences (there are eight of 4 words). For each of `lengths` there is a split more,
    `length_N` with `length_size` sentences of exactly N words, to measure how far what was learnt carries.

    Raises:
        ValueError: a size that is no positive multiple of 4, lengths out of order, or more sentences wanted
            than half of those that there are.
    """

    class_names = CLASSES

    def __init__(
        self,
        min_length: int = 4,
        max_length: int = 16,
        lengths: tuple[int, ...] = (16, 20, 24, 32, 40, 48, 64),
        train_size: int = 16_000,
        val_size: int = 1000,
        test_size: int = 2000,
        length_size: int = 1000,
        batch_size: int = 128,
        eval_batch_size: int = 1000,
    ):
        super().__init__(batch_size, eval_batch_size)
        if max_length < FAMILY:
            raise ValueError(f"max_length must be at least {FAMILY}, for four words say it, not {max_length}")
        if not FAMILY <= min_length <= max_length:
            raise ValueError(
                f"min_length must lie in [{FAMILY}, max_length={max_length}], for four words say it, not {min_length}"
            )
        sizes = {"train_size": train_size, "val_size": val_size, "test_size": test_size}
        for name, size in {**sizes, "length_size": length_size}.items():
            if size < FAMILY or size % FAMILY:
                raise ValueError(f"{name} must be a positive multiple of {FAMILY}, the classes, not {size}")
        families = sum(sizes.values()) // FAMILY
        require_enough("max_length", families, sum(map(families_of, range(min_length, max_length + 1))))
        for length in lengths:
            if length < max_length:
                raise ValueError(f"lengths must be at least max_length={max_length}, not {length}")
            require_enough("lengths", families + length_size // FAMILY, families_of(length))
        self.min_length, self.max_length, self.lengths = min_length, max_length, tuple(lengths)
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        self.length_size = length_size

    def load(self, seed: int) -> dict[str, Split]:
        """Draw all splits; `seed` decides every sentence."""
        random = generator(seed, "sentences")
        counts = [size // FAMILY for size in self.sizes.values()]
        pool = distinct(sum(counts), self.min_length, self.max_length, random)
        splits = {name: with_family(part) for name, part in zip(self.sizes, pool.split(counts), strict=True)}
        for length in self.lengths:
            known = pool if length == self.max_length else None
            drawn = distinct(self.length_size // FAMILY, length, length, random, known)
            splits[LONGER.format(length)] = with_family(drawn)
        return splits

    def digest(self) -> str:
        """One sha256 of all that the sentences are drawn from, the run's seed apart."""
        drawn_from = (WORDS, self.min_length, self.max_length, self.lengths, self.sizes, self.length_size)
        return hashlib.sha256(repr(drawn_from).encode()).hexdigest()


def families_of(length: int) -> int:
    """How many families have sentences of `length` words: places of the four, which is outside, the adverbs."""
    return comb(length, FAMILY) * 2 * ADVERBS ** (length - FAMILY)


def require_enough(name: str, wanted: int, there_are: int) -> None:
    if 2 * wanted > there_are:  # else drawing until enough are new takes for ever
        raise ValueError(
            f"{name} allows {FAMILY * there_are:,} sentences, and {FAMILY * wanted:,} are more than half of them"
        )


def distinct(count: int, low: int, high: int, random: torch.Generator, known: Tensor | None = None) -> Tensor:
    """(count, high) sentences of class 0, low … high words long, no two equal and none among `known` (·, high)."""
    known = torch.empty(0, high, dtype=torch.int64) if known is None else known
    rows = known
    while len(rows) < len(known) + count:
        rows = first_of_each(torch.cat((rows, draw(count, low, high, random))))
    return rows[len(known) : len(known) + count]


def first_of_each(rows: Tensor) -> Tensor:
    """The rows (N, W) without repetitions, in the order in which each comes first."""
    _, kinds = rows.unique(dim=0, return_inverse=True)  # (N,)
    first = torch.full((int(kinds.max()) + 1,), len(rows))
    first.scatter_reduce_(0, kinds, torch.arange(len(rows)), "amin")
    return rows[first.sort().values]


def draw(count: int, low: int, high: int, random: torch.Generator) -> Tensor:
    """(count, high) sentences of class 0 by chance: 我 爱 你 in this order, 等 before or behind all three."""
    lengths = torch.randint(low, high + 1, (count, 1), generator=random)  # (N, 1)
    behind = torch.arange(high) >= lengths  # (N, W)
    tokens = torch.randint(FIRST_ADVERB, len(WORDS), (count, high), generator=random).masked_fill(behind, PAD)
    order = torch.rand(count, high, generator=random).masked_fill(behind, 2.0).argsort(1)
    places = order[:, :FAMILY].sort(1).values  # (N, 4): a subset each, evenly
    orders = torch.tensor([[WAIT, ME, LOVE, YOU], [ME, LOVE, YOU, WAIT]])
    return tokens.scatter(1, places, orders[torch.randint(2, (count,), generator=random)])


def with_family(first: Tensor) -> Split:
    """Sentences of class 0 (N, W), each as its family of four, one class after the other: (4N, W)."""
    exchanged = torch.arange(len(WORDS)).repeat(FAMILY, 1)  # (4, words): what becomes of each word, per class
    exchanged[1::2, [ME, YOU]] = torch.tensor([YOU, ME])
    exchanged[2:, [LOVE, WAIT]] = torch.tensor([WAIT, LOVE])
    inputs = exchanged[:, first].transpose(0, 1).flatten(0, 1)  # (4, N, W) → (4N, W)
    return Split(inputs, torch.arange(FAMILY).repeat(len(first)))


def with_adverbs_in_front(tokens: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Whole families (N, W), their words moved `count` places: (N, count + W), as many adverbs in front."""
    shape = (len(tokens) // FAMILY, count)
    adverbs = torch.randint(FIRST_ADVERB, len(WORDS), shape, generator=random).repeat_interleave(FAMILY, 0)
    return torch.cat((adverbs.to(tokens.device), tokens), 1)


def persons_apart(tokens: Tensor) -> Tensor:
    """How many places 我 and 你 are apart in each sentence (N, W): (N,) int64."""
    places = [(tokens == person).int().argmax(1) for person in (ME, YOU)]
    return (places[0] - places[1]).abs()


def spell(tokens: Tensor) -> str:
    """Token ids (L,) as words with a space between, padding left out."""
    return " ".join(WORDS[token] for token in tokens.tolist() if token != PAD)
