"""Made-up Chinese sentences that say who does what to whom by the order of their words, and by nothing else.

A sentence holds the words 我 (I, me), 你 (you), 爱 (love) and 等 (wait for), once each, among adverbs that change
nothing. Chinese has no cases: the person before the verb is the one who acts. The verb between the two persons is
the one that is meant; the other stands outside, first or last of the four. So there are four classes,

    我爱你 (I love you)    你爱我 (you love me)    我等你 (I wait for you)    你等我 (you wait for me)

Sentences come in families of four, one per class: exchanging 我 with 你 and 爱 with 等 leads from each to the others
while every other word stays. All four have the same bag of words, so a model that sees only the bag gives all four
one answer and is right once in four times, no more and no less.

Letters in shapes: N families, W width (the longest length), B batch.
"""

from __future__ import annotations

import hashlib
from functools import partial
from math import comb

import torch
from torch import Tensor

from experiments.data.distinct import check_enough, check_sizes, distinct_rows
from runner.data import Data, Split
from runner.errors import at_least, within
from runner.streams import generator

_PAD, _ME, _YOU, _LOVE, _WAIT = range(5)
WORDS = ("空", "我", "你", "爱", "等", "今天", "真", "也", "一直", "还", "就", "都", "常常")
_FIRST_ADVERB = 5
_ADVERBS = len(WORDS) - _FIRST_ADVERB
_CLASSES = ("我爱你", "你爱我", "我等你", "你等我")
FAMILY = len(_CLASSES)
LONGER = "length_{}"  # the splits of longer sentences, by their length


class Sentences(Data):
    """Token ids (B, max_length) int64 with padding (0) at the end, and their classes; no sentence is in two splits.

    Lengths of train, val and test run from `min_length` to `max_length` words, evenly as far as there are that many
    sentences (there are eight of 4 words). Each of `lengths` adds a split `length_N` of `length_size` sentences of
    exactly N words, to measure how far what was learnt generalises.
    """

    class_names = _CLASSES

    def __init__(
        self,
        min_length: int = 4,
        max_length: int = 16,
        lengths: tuple[int, ...] = (16, 20, 24, 32, 40, 48, 64),
        train_size: int = 16_000,
        val_size: int = 1000,
        test_size: int = 2000,
        length_size: int = 1000,
        batch_size: int = 64,
        eval_batch_size: int = 1000,
    ):
        super().__init__(batch_size, eval_batch_size)
        self.min_length, self.max_length, self.lengths = min_length, max_length, tuple(lengths)
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        self.length_size = length_size

        # each argument
        at_least(FAMILY, max_length=max_length)  # the four words that say it
        within(FAMILY, max_length, closed=True, min_length=min_length)
        at_least(max_length, lengths=min(lengths, default=max_length))
        sizes = {"train_size": train_size, "val_size": val_size, "test_size": test_size}
        check_sizes(FAMILY, **sizes, length_size=length_size)

        # as many sentences as there are
        needed = sum(sizes.values())
        check_enough("max_length", needed, sum(map(_num_sentences, range(min_length, max_length + 1))))
        for length in lengths:
            check_enough("lengths", needed + length_size, _num_sentences(length))

    def load(self, seed: int) -> dict[str, Split]:
        """Draw all splits; `seed` decides every sentence."""
        random = generator(seed, "sentences")

        # train, val, test
        counts = [size // FAMILY for size in self.sizes.values()]
        N = sum(counts)
        pool = distinct_rows(N, partial(_draw, N, self.min_length, self.max_length, random))
        parts = torch.split(pool, counts)
        splits = {name: _with_family(part) for name, part in zip(self.sizes, parts, strict=True)}

        # longer sentences
        count = self.length_size // FAMILY
        for length in self.lengths:
            exclude = pool if length == self.max_length else None
            first = distinct_rows(count, partial(_draw, count, length, length, random), exclude)
            splits[LONGER.format(length)] = _with_family(first)
        return splits

    def digest(self) -> str:
        """Return one sha256 of all that the sentences are drawn from, except the run's seed."""
        settings = (WORDS, self.min_length, self.max_length, self.lengths, self.sizes, self.length_size)
        return hashlib.sha256(repr(settings).encode()).hexdigest()


def _num_sentences(length: int) -> int:
    """Count the sentences of `length` words: classes × places of the four × which verb is outside × adverbs."""
    adverbs: int = _ADVERBS ** (length - FAMILY)
    return FAMILY * comb(length, FAMILY) * 2 * adverbs


def _draw(count: int, low: int, high: int, random: torch.Generator) -> Tensor:
    """Draw (count, high) sentences of class 0, low … high words long: 我 爱 你 in order, 等 before or after them."""
    # adverbs and padding
    lengths = torch.randint(low, high + 1, (count, 1), generator=random)  # (N, 1)
    beyond = torch.arange(high) >= lengths  # (N, W)
    tokens = torch.randint(_FIRST_ADVERB, len(WORDS), (count, high), generator=random)
    tokens = tokens.masked_fill(beyond, _PAD)

    # the four words
    order = torch.rand(count, high, generator=random).masked_fill(beyond, 2.0).argsort(1)
    places = order[:, :FAMILY].sort(1).values  # (N, 4): a subset each, evenly
    orders = torch.tensor([[_WAIT, _ME, _LOVE, _YOU], [_ME, _LOVE, _YOU, _WAIT]])
    return tokens.scatter(1, places, orders[torch.randint(2, (count,), generator=random)])


def _with_family(first: Tensor) -> Split:
    """Expand sentences of class 0 (N, W) to their families of four, one class after the other: (4N, W)."""
    exchange = torch.arange(len(WORDS)).repeat(FAMILY, 1)  # (4, words): each word's replacement, per class
    exchange[1::2, [_ME, _YOU]] = torch.tensor([_YOU, _ME])
    exchange[2:, [_LOVE, _WAIT]] = torch.tensor([_WAIT, _LOVE])
    inputs = exchange[:, first].transpose(0, 1).flatten(0, 1)  # (4, N, W) → (4N, W)
    return Split(inputs, torch.arange(FAMILY).repeat(len(first)))


def with_adverbs_in_front(tokens: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Move the words of families (N, W) `count` places to the right, adverbs in front: (N, count + W)."""
    shape = (-(-len(tokens) // FAMILY), count)  # the last family may lack members
    adverbs = torch.randint(_FIRST_ADVERB, len(WORDS), shape, generator=random).repeat_interleave(FAMILY, 0)
    return torch.cat((adverbs[: len(tokens)].to(tokens.device), tokens), 1)


def persons_apart(tokens: Tensor) -> Tensor:
    """Return how many places 我 and 你 are apart in each sentence (N, W): (N,) int64."""
    me, you = ((tokens == person).int().argmax(1) for person in (_ME, _YOU))
    return (me - you).abs()


def spell(tokens: Tensor) -> str:
    """Return token ids (L,) as words with a space between, without padding."""
    return " ".join(WORDS[token] for token in tokens.tolist() if token != _PAD)
