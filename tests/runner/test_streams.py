"""Every random number is a function of the seed and its purpose."""

from __future__ import annotations

import itertools

import pytest
import torch

from runner.streams import BatchRandom, generator, reseed, seed_of

CPU = torch.device("cpu")


def test_unequal_purposes_have_unequal_seeds_as_they_always_were():
    assert seed_of(0, "batch", 17) == 5807457501080063215  # another hash would break every resume
    purposes = [(), ("a",), ("a", 1), ("a", "1"), ("a1",), (1, "a"), ("a", 11), ("a", 1, 1), ("step", 0, 0)]
    seeds = [seed_of(seed, *purpose) for seed in (0, 1) for purpose in purposes]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generator_depends_on_nothing_else():
    first = torch.randn(4, generator=generator(3, "x"))
    torch.randn(100)
    assert torch.equal(first, torch.randn(4, generator=generator(3, "x")))
    assert not torch.equal(first, torch.randn(4, generator=generator(4, "x")))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_draw_what_one_process_draws(ranks):
    """Several draws in a row, of every kind: the slices of N processes are the rows of one."""

    def draws(rows: slice) -> list[torch.Tensor]:
        batch = BatchRandom(11, CPU, 8, rows)
        return [batch.normal(3), batch.uniform(), batch.integers(2, 9, 5), batch.normal()]

    share = 8 // ranks
    parts = [draws(slice(rank * share, (rank + 1) * share)) for rank in range(ranks)]
    for whole, *slices in zip(draws(slice(None)), *parts, strict=True):
        assert torch.equal(whole, torch.cat(slices))
        assert not any(torch.equal(one, other) for one, other in itertools.combinations(slices, 2))


def test_draws_have_their_distributions():
    batch = BatchRandom(5, CPU, 20_000)
    normal, uniform, integers = batch.normal(), batch.uniform(), batch.integers(3, 7)
    assert abs(float(normal.mean())) < 0.03 and abs(float(normal.std()) - 1) < 0.03  # 4 standard errors
    assert float(uniform.min()) >= 0 and float(uniform.max()) < 1 and abs(float(uniform.mean()) - 0.5) < 0.01
    assert sorted(set(integers.tolist())) == [3, 4, 5, 6] and integers.dtype == torch.int64


def test_reseed_equals_manual_seed():
    reseed(12, CPU)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(12)))
