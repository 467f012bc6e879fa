"""The order task: counted, parsed again in plain Python, and split without overlap."""

from __future__ import annotations

from collections import defaultdict
from functools import partial

import pytest
import torch

from experiments.data import sentences
from experiments.data.sentences import WORDS, Sentences, spell
from runner.data import Split

SMALL = partial(Sentences, train_size=2000, val_size=200, test_size=400, length_size=200)


@pytest.fixture(scope="module")
def splits() -> dict[str, Split]:
    return SMALL().load(seed=0)


@pytest.fixture(scope="module")
def labelled(splits: dict[str, Split]) -> list[tuple[tuple[str, ...], int]]:
    """Every sentence of every split as words, without padding, and its target."""
    rows = [
        row for split in splits.values() for row in zip(split.inputs.tolist(), split.targets, strict=True)
    ]
    return [(tuple(WORDS[token] for token in tokens if token), int(target)) for tokens, target in rows]


def meaning(sentence: tuple[str, ...]) -> str:
    """Return the person before, the verb between, the person behind: how a reader understands it."""
    first, last = (i for i, word in enumerate(sentence) if word in ("我", "你"))
    [verb] = [word for word in sentence[first:last] if word in ("爱", "等")]
    return sentence[first] + verb + sentence[last]


def test_label_is_what_the_sentence_says(labelled):
    bags = defaultdict(list)
    for sentence, target in labelled:
        assert meaning(sentence) == Sentences.class_names[target]
        assert sorted(word for word in sentence if word in "我你爱等") == sorted("我你爱等")  # once each
        bags[(*sorted(sentence),)].append(target)
    # every bag of words has each class equally often
    assert all(sorted(targets) == sorted([0, 1, 2, 3] * (len(targets) // 4)) for targets in bags.values())


def test_no_sentence_is_twice_nor_in_two_splits(labelled):
    assert len({sentence for sentence, _ in labelled}) == len(labelled) == 2600 + 7 * 200
    # 160 of the 320 that there are
    few = Sentences(5, 5, lengths=(5,), train_size=80, val_size=4, test_size=4, length_size=72).load(0)
    assert len({tuple(row) for split in few.values() for row in split.inputs.tolist()}) == 160


def test_family_differs_in_the_exchanged_words_alone(splits):
    families = splits["train"].inputs.unflatten(0, (-1, 4))  # (N, 4, W)
    kept = families.where(families >= sentences._FIRST_ADVERB, 0)
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    assert all(len(family.unique(dim=0)) == 4 for family in families)


def test_lengths_and_padding(splits):
    for name, split in splits.items():
        words = split.inputs != 0
        lengths = words.sum(1)
        assert torch.equal(words, torch.arange(split.inputs.shape[1]) < lengths[:, None])  # padding behind
        low, high = [int(name[7:])] * 2 if name.startswith("length_") else (4, 16)
        assert low <= lengths.min() and lengths.max() == high


def test_lengths_come_evenly():
    """Within five standard errors of a binomial, except the few of 4 and 5 words that there are."""
    lengths = (Sentences(lengths=()).load(0)["train"].inputs[::4] != 0).sum(1)
    counts = torch.bincount(lengths, minlength=17)[6:].double()
    N, p = counts.sum(), 1 / 11
    assert ((counts - N * p).abs() < 5 * (N * p * (1 - p)).sqrt()).all()


def test_every_place_of_the_four_words_occurs():
    """Of 5 words there are C(5, 4) · 2 · 8 = 80 families, and chance finds all of them."""
    drawn = sentences._draw(3000, 5, 5, torch.Generator().manual_seed(0))
    assert len(drawn.unique(dim=0)) == sentences._num_sentences(5) / 4 == 80


def test_seed_decides_every_sentence(splits):
    again, other = (SMALL().load(seed) for seed in (0, 1))
    assert all(torch.equal(again[name].inputs, split.inputs) for name, split in splits.items())
    assert not torch.equal(other["train"].inputs, splits["train"].inputs)
    digests = [Sentences(), Sentences(max_length=15), Sentences(train_size=8000)]
    assert len({data.digest() for data in digests}) == 3 and Sentences().digest() == Sentences().digest()


def test_adverbs_in_front_move_whole_families(splits):
    tokens = splits["test"].inputs[:40]
    moved = sentences.with_adverbs_in_front(tokens, 6, torch.Generator().manual_seed(0))
    assert torch.equal(moved[:, 6:], tokens)
    front = moved[:, :6].unflatten(0, (-1, 4))
    assert front.min() >= sentences._FIRST_ADVERB and front.max() < len(WORDS)
    assert torch.equal(front, front[:, :1].expand_as(front))  # one bag of words still
    assert len(front[:, 0].unique(dim=0)) > 5
    assert sentences.with_adverbs_in_front(tokens, 0, torch.Generator()).equal(tokens)


def test_persons_apart_is_the_distance_of_their_places(splits):
    for split in splits.values():
        apart = [abs(row.index(1) - row.index(2)) for row in split.inputs.tolist()]
        assert sentences.persons_apart(split.inputs).tolist() == apart


def test_a_sentence_is_spelled_without_its_padding():
    assert spell(torch.tensor([5, 1, 3, 2, 4, 0, 0])) == "今天 我 爱 你 等"
