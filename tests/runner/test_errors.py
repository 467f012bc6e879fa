"""What memory does not hold, told so that it can be mended."""

from __future__ import annotations

import pytest
import torch

from runner.errors import UserError, in_words, lacks_memory, room_for

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has 1 GiB free.")
CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 40000000 bytes.")


@pytest.mark.parametrize(
    ("error", "size", "told"),
    [
        (CUDA, 3_200_000_000, "the data, about 3.2 GB: try less."),
        (CUDA, None, "the data, 2.50 GiB of it at once: try less."),
        (CPU, None, "the data, 40 MB of it at once: try less."),
        (MemoryError(), None, "the data: try less."),
    ],
)
def test_what_has_no_room_is_told_with_its_size(error: Exception, size: int | None, told: str) -> None:
    with pytest.raises(UserError) as caught, room_for("the data", "try less", size):
        raise error
    assert str(caught.value) == f"The memory does not hold {told}"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("memory"), UserError("out of memory")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, room_for("the data", "try less"):
        raise error
    assert caught.value is error


def test_torchs_own_words_for_a_lack_of_memory_are_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**61, dtype=torch.uint8)
    assert lacks_memory(caught.value)
    with pytest.raises(UserError, match=r"2\.31e\+06 TB of it at once"), room_for("it", "try less"):
        torch.empty(2**61, dtype=torch.uint8)


def test_bytes_are_said_as_people_say_them() -> None:
    said = [in_words(size) for size in (512, 2_000, 143_000_000, 1e15)]
    assert said == ["512 bytes", "2 kB", "143 MB", "1e+03 TB"]
