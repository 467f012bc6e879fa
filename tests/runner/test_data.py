"""Batch k is a function of (seed, k), whatever the number of processes."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from runner.data import Data, Split, batch_indices, eval_batches, train_batch
from runner.streams import BatchRandom


class Noisy(Data):
    """Adds noise to training batches, from their own draws."""

    def transform(self, inputs: Tensor, draws: BatchRandom | None) -> Tensor:
        return inputs.float() if draws is None else inputs + draws.normal(2)


SPLIT = Split(torch.arange(46).reshape(23, 2), torch.arange(23))


def test_batch_is_a_function_of_seed_and_step():
    in_order = [train_batch(Noisy(8), SPLIT, 5, step) for step in range(9)]
    for step in (7, 2, 8, 0, 2):
        again = train_batch(Noisy(8), SPLIT, 5, step)
        assert torch.equal(again.inputs, in_order[step].inputs)
        assert torch.equal(again.targets, in_order[step].targets)
    assert not any(torch.equal(one.inputs, other.inputs) for one, other in combinations(in_order, 2))
    assert not torch.equal(train_batch(Noisy(8), SPLIT, 6, 0).targets, in_order[0].targets)


@pytest.mark.parametrize(("length", "batch_size"), [(23, 8), (24, 8), (23, 1), (7, 7), (5, 12), (1, 3)])
def test_every_sample_once_per_epoch(length, batch_size):
    epochs = 4
    steps = -(-epochs * length // batch_size)
    indices = torch.cat([batch_indices(length, batch_size, 3, step) for step in range(steps)])
    assert len(indices) == steps * batch_size, "every batch is full"
    orders = indices[: epochs * length].reshape(epochs, length).tolist()
    assert all(sorted(order) == list(range(length)) for order in orders)
    assert length <= 5 or len(set(map(tuple, orders))) == epochs, "every epoch has its own order"


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_share_the_global_batch(ranks):
    """Rows, targets and augmentation, in a batch of two epochs."""
    whole = train_batch(Noisy(8), SPLIT, 5, 2)
    parts = [train_batch(Noisy(8), SPLIT, 5, 2, rank, ranks) for rank in range(ranks)]
    assert all(len(part.inputs) == 8 // ranks for part in parts)
    assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
    assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
    assert torch.equal(torch.cat([part.draws.uniform(3) for part in parts]), whole.draws.uniform(3))
    with pytest.raises(AssertionError, match="batch_size=8 does not divide"):
        train_batch(Noisy(8), SPLIT, 5, 0, 0, 3)


def test_split_without_targets():
    bare = Split(SPLIT.inputs)
    assert train_batch(Noisy(8), bare, 5, 0).targets is None
    assert next(eval_batches(Noisy(8), bare, 5, "val")).targets is None


@pytest.mark.parametrize(("limit", "sizes"), [(None, [10, 10, 3]), (2, [10, 10]), (9, [10, 10, 3])])
def test_eval_batches_are_the_split_in_order(limit, sizes):
    batches = list(eval_batches(Noisy(8, eval_batch_size=10), SPLIT, 5, "val", limit))
    assert [len(batch.inputs) for batch in batches] == sizes
    assert torch.equal(torch.cat([batch.inputs for batch in batches]), SPLIT.inputs[: sum(sizes)].float())
    assert torch.equal(torch.cat([batch.targets for batch in batches]), SPLIT.targets[: sum(sizes)])


def test_random_numbers_of_evaluation_belong_to_split_and_batch():
    def noise(name: str) -> list[Tensor]:
        batches = eval_batches(Noisy(8, eval_batch_size=8), SPLIT, 5, name)
        return [batch.draws.normal()[:7] for batch in batches]

    assert all(map(torch.equal, noise("val"), noise("val")))
    assert not any(torch.equal(*pair) for pair in combinations(noise("val") + noise("test"), 2))
