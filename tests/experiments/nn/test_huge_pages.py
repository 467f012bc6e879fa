"""Where large tensors lie, as the kernel itself says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from experiments.nn.attention import MultiHeadAttention
from experiments.nn.huge_pages import in_huge_pages, madvise

SMAPS = Path("/proc/self/smaps")  # Linux's list of this process's memory


def flags_at(address: int) -> list[str]:
    """What the kernel has noted of the memory at an address."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= address < int(span[2], 16)
        elif inside and line.startswith("VmFlags"):
            return line.split()
    return []


needs_linux = pytest.mark.skipif(
    madvise() is None or not SMAPS.is_file() or "VmFlags" not in SMAPS.read_text(),
    reason="a kernel without huge pages, or without a list of memory",
)


@needs_linux
def test_the_weights_of_an_attention_lie_in_huge_pages() -> None:
    layer, x = MultiHeadAttention(4, 4), torch.randn(1, 1500, 4)  # 36 MB of weights
    with torch.no_grad():
        _, weights = layer(x, x, x)
    assert "hg" in flags_at(weights.data_ptr() + 18_000_000)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 1500))


def test_what_nothing_can_be_asked_for_is_given_back_as_it_is() -> None:
    for new in (torch.empty(3), torch.empty(0), torch.empty(2**25, device="meta")):
        assert in_huge_pages(new) is new
