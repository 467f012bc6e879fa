"""The order task: counted, parsed again in plain Python, and split without overlap."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from experiments.data import sentences
from experiments.data.sentences import CLASSES, PAD, WORDS, Sentences, spell
from runner.data import Split

SMALL = {"train_size": 2000, "val_size": 200, "test_size": 400, "length_size": 200}


@pytest.fixture(scope="module")
def splits() -> dict[str, Split]:
    return Sentences(**SMALL).load(seed=0)  # type: ignore[arg-type]


def words(split: Split) -> list[list[str]]:
    """Each sentence as a list of words, without padding."""
    return [[WORDS[token] for token in row if token != PAD] for row in split.inputs.tolist()]


def meaning(sentence: list[str]) -> str:
    """The person before, the verb between, the person behind: how a reader understands it."""
    first, last = (i for i, word in enumerate(sentence) if word in ("我", "你"))
    [verb] = [word for word in sentence[first:last] if word in ("爱", "等")]
    return sentence[first] + verb + sentence[last]


def test_the_label_is_what_the_sentence_says(splits: dict[str, Split]) -> None:
    for split in splits.values():
        assert split.targets is not None
        assert [meaning(sentence) for sentence in words(split)] == [
            CLASSES[target] for target in split.targets.tolist()
        ]


def test_every_bag_of_words_has_each_class_equally_often(splits: dict[str, Split]) -> None:
    for split in splits.values():
        assert split.targets is not None
        counts: dict[tuple[str, ...], Counter[int]] = {}
        for sentence, target in zip(words(split), split.targets.tolist(), strict=True):
            counts.setdefault(tuple(sorted(sentence)), Counter())[target] += 1
        assert all(len(set(count.values())) == 1 and len(count) == len(CLASSES) for count in counts.values())


def test_the_four_words_come_once_each_and_the_rest_are_adverbs(splits: dict[str, Split]) -> None:
    for split in splits.values():
        for sentence in words(split):
            assert sorted(set(sentence) & set("我你爱等")) == sorted("我你爱等")
            assert sum(word in set("我你爱等") for word in sentence) == 4


def test_a_family_differs_in_the_exchanged_words_alone(splits: dict[str, Split]) -> None:
    for family in splits["train"].inputs.unflatten(0, (-1, 4)):
        adverbs = family >= sentences.FIRST_ADVERB
        assert (adverbs == adverbs[0]).all() and (family[:, adverbs[0]] == family[0, adverbs[0]]).all()
        assert len(family.unique(dim=0)) == 4


def test_lengths_and_padding(splits: dict[str, Split]) -> None:
    for name, split in splits.items():
        there = split.inputs != PAD
        lengths = there.sum(1)
        assert torch.equal(there, torch.arange(split.inputs.shape[1]) < lengths[:, None])  # padding behind
        if name.startswith("length_"):
            assert (lengths == int(name.removeprefix("length_"))).all()
        else:
            assert lengths.min() >= 4 and lengths.max() == 16


def test_lengths_come_evenly() -> None:
    """Within five standard errors of a binomial, apart from the few of 4 and 5 words that there are."""
    lengths = (Sentences(lengths=()).load(0)["train"].inputs[::4] != PAD).sum(1)
    counts = torch.bincount(lengths, minlength=17)[6:].double()
    N, p = counts.sum(), 1 / 11
    assert ((counts - N * p).abs() < 5 * (N * p * (1 - p)).sqrt()).all()


def test_no_sentence_is_twice_nor_in_two_splits(splits: dict[str, Split]) -> None:
    found = [spell(row) for split in splits.values() for row in split.inputs]
    assert len(found) == len(set(found)) == 2600 + 7 * 200


def test_every_place_of_the_four_words_occurs() -> None:
    """Of 5 words there are C(5, 4) · 2 · 8 = 80 families, and chance finds all of them."""
    drawn = sentences.draw(3000, 5, 5, torch.Generator().manual_seed(0))
    assert len(drawn.unique(dim=0)) == sentences.families_of(5) == 80


def test_the_seed_decides_every_sentence(splits: dict[str, Split]) -> None:
    again, other = (Sentences(**SMALL).load(seed) for seed in (0, 1))  # type: ignore[arg-type]
    assert all(torch.equal(again[name].inputs, split.inputs) for name, split in splits.items())
    assert not torch.equal(other["train"].inputs, splits["train"].inputs)


def test_digest_tells_settings_apart() -> None:
    digests = {Sentences().digest(), Sentences(max_length=15).digest(), Sentences(train_size=8000).digest()}
    assert len(digests) == 3 and Sentences().digest() in digests


def test_adverbs_in_front_move_whole_families(splits: dict[str, Split]) -> None:
    tokens = splits["test"].inputs[:40]
    moved = sentences.with_adverbs_in_front(tokens, 6, torch.Generator().manual_seed(0))
    assert torch.equal(moved[:, 6:], tokens)
    front = moved[:, :6]
    assert bool((front >= sentences.FIRST_ADVERB).all()) and bool((front < len(WORDS)).all())
    families = front.unflatten(0, (-1, 4))
    assert torch.equal(families, families[:, :1].expand_as(families))  # one bag of words still
    assert len(families[:, 0].unique(dim=0)) > 5
    assert sentences.with_adverbs_in_front(tokens, 0, torch.Generator()).equal(tokens)


def test_persons_apart(splits: dict[str, Split]) -> None:
    for name in ("train", "length_64"):
        tokens = splits[name].inputs
        wanted = [abs(row.index(1) - row.index(2)) for row in tokens.tolist()]
        assert sentences.persons_apart(tokens).tolist() == wanted


def test_spelled() -> None:
    assert spell(torch.tensor([5, 1, 3, 2, 4, 0, 0])) == "今天 我 爱 你 等"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"max_length": 2}, r"^max_length must be at least 4, .* not 2$"),
        ({"min_length": 3}, r"min_length must lie in \[4, max_length=16\].* not 3"),
        ({"min_length": 17}, r"min_length must lie in \[4, max_length=16\].* not 17"),
        ({"train_size": 0}, "train_size must be a positive multiple of 4, the classes, not 0"),
        ({"test_size": 6}, "test_size must be a positive multiple of 4, the classes, not 6"),
        ({"length_size": -4}, "length_size must be a positive multiple of 4, the classes, not -4"),
        ({"lengths": (12,)}, "lengths must be at least max_length=16, not 12"),
        ({"max_length": 5}, "max_length allows 328 sentences, and 19,000 are more than half of them"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
    ],
    ids=str,
)
def test_argument_out_of_range_is_named(argument: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sentences(**argument)  # type: ignore[arg-type]


def test_a_length_with_too_few_sentences_is_named() -> None:
    sizes = {"train_size": 40, "val_size": 4, "test_size": 4, "length_size": 200}
    with pytest.raises(ValueError, match="lengths allows 320 sentences, and 248 are more than half of them"):
        Sentences(min_length=4, max_length=5, lengths=(5,), **sizes)  # type: ignore[arg-type]
