"""Where large tensors lie, as the kernel itself says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from experiments.nn.attention import MultiHeadAttention
from experiments.nn.huge_pages import in_huge_pages, madvise

SMAPS = Path("/proc/self/smaps")  # Linux's list of this process's memory


@pytest.mark.skipif(
    madvise() is None or not SMAPS.is_file() or "VmFlags" not in SMAPS.read_text(),
    reason="a kernel without huge pages, or without a list of memory",
)
def test_the_weights_of_an_attention_lie_in_huge_pages() -> None:
    layer, x = MultiHeadAttention(4, 4), torch.randn(1, 1500, 4)  # 36 MB of weights
    with torch.no_grad():
        _, weights = layer(x, x, x)
    middle = weights.data_ptr() + 18_000_000
    areas = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags: (.*?)$", SMAPS.read_text(), re.M | re.S)
    (flags,) = (flags for begin, end, flags in areas if int(begin, 16) <= middle < int(end, 16))
    assert "hg" in flags.split()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 1500))


def test_what_nothing_can_be_asked_for_is_given_back_as_it_is() -> None:
    for new in (torch.empty(3), torch.empty(0), torch.empty(2**25, device="meta")):
        assert in_huge_pages(new) is new
